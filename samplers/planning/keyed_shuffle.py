"""Counter-based shuffles: a permutation whose entry at one index is computed from the index and a key alone.

A plan has to be the same on every rank, machine and version, and one batch of it has to be found without computing the
whole epoch. A library's `permutation` gives neither; a keyed bijection gives both. With key 5, index 0 of ten goes to
index 6, whether it is asked for alone or with all others:

>>> permute_one(0, 10, 5), permute(np.arange(10), 10, 5).tolist()
(6, [6, 9, 2, 0, 3, 7, 4, 8, 1, 5])
"""

import itertools
from collections.abc import Callable
from typing import Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Integers

Words: TypeAlias = npt.NDArray[np.uint64]
Drawn = TypeVar("Drawn")

# In domains of up to this size, an order is drawn from the list of all orders.
LISTED: Final = 7
# Larger domains need fewer rounds until every pair of targets is as likely as any other: (size below, rounds).
ROUNDS: Final = ((LISTED + 1, 0), (64, 16), (1 << 63, 8))
# Draws that an epoch makes before its first usable one is good enough.
ATTEMPTS: Final = 32
# Some epochs must not fail: they make this many times more draws.
ATTEMPTS_FACTOR: Final = 32
_MASK: Final = (1 << 64) - 1
_GAMMA: Final = 0x9E3779B97F4A7C15
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB


def derive_key(*words: int) -> int:
    """A 64-bit key from non-negative integers (a seed, an epoch, a purpose); their order and number matter.

    The words are absorbed one by one into SplitMix64 (Steele, Lea and Flood, 2014).

    >>> derive_key(0, 1) == derive_key(1, 0), derive_key(7) < 1 << 64
    (False, True)
    """
    key = len(words)
    for word in words:
        key = _mix((key + (word & _MASK) + _GAMMA) & _MASK)
        key = _mix((key + _GAMMA) & _MASK)
    return key


def stream_keys(key: int, numbers: Integers) -> Words:
    """The key of each numbered stream under `key`: the outputs of SplitMix64 at these numbers.

    Args:
        key: Key of the whole family, from `derive_key`.
        numbers: int64 `[n]`, not negative.

    Returns:
        uint64 `[n]`.
    """
    mixed = numbers.astype(np.uint64)
    mixed *= np.uint64(_GAMMA)
    mixed += np.uint64(key)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def permute(indices: Integers, size: int, keys: Words | int) -> Integers:
    """The image of each index under a keyed bijection on `range(size)`.

    A Feistel network over a domain of any size (the generalised Feistel cipher with cycle walking of Black and Rogaway,
    2002). An index is written as `(left, right)` in `range(a) x range(b)`, with `a * b` just above `size`: of size 10,
    a = 4 and b = 3, so that index 9 is (1, 2). In each round one half is shifted by a hash of the other. A result
    outside `range(size)`, here 10 or 11, is sent through the network again. An order of at most seven indices is drawn
    from the list of all orders.

    Args:
        indices: int64 `[n]`, each in `range(size)`.
        size: Size of the domain, at most 2**62.
        keys: uint64 `[n]`, a key for each index, or one for all.

    Returns:
        int64 `[n]`, each in `range(size)`; distinct indices under equal keys stay distinct.
    """
    keys = np.full(1, keys, np.uint64) if isinstance(keys, int) else keys
    return Domains(np.array([max(size, 1)])).permute(indices, None, keys)


class Domains:
    """Domains of several sizes, in each of which indices are permuted.

    Args:
        sizes: int64 `[domains]`, each 1 to 2**62.
    """

    def __init__(self, sizes: Integers) -> None:
        self.sizes = sizes
        self._left, self._right = _sides(sizes)
        size_below, rounds = np.array(ROUNDS, np.uint64).T
        self._rounds = rounds[np.searchsorted(size_below, sizes.view(np.uint64), side="right")].view(np.int64)

    def permute(self, indices: Integers, domains: Integers | None, keys: Words) -> Integers:
        """The image of each index under a keyed bijection on its domain, as in the function `permute`.

        Args:
            indices: int64 `[n]`, each in the range of its domain.
            domains: Number of each index' domain, int64 `[n]`; None for a single domain.
            keys: uint64 `[n]`, or `[1]` for all.
        """
        rounds = self._rounds if domains is None else self._rounds[domains]
        if len(rounds) > 1 and (rounds != rounds[:1]).any():
            return self._permute_by_rounds(indices, domains, keys, rounds)
        chosen = slice(None) if domains is None else domains
        if not len(rounds) or not rounds[0]:
            return _pick_order(indices, self.sizes[chosen], stream_keys(0, keys.view(np.int64)))
        left, right = self._left[chosen], self._right[chosen]
        sizes = self.sizes[chosen].view(np.uint64)
        moved = _feistel(indices.view(np.uint64), (left, right), keys, int(rounds[0]))
        outside = np.flatnonzero(moved >= sizes)
        # Cycle walking: most results are inside, so that few passes remain.
        while len(outside):
            a, b, own_keys = (array if len(array) == 1 else array[outside] for array in (left, right, keys))
            moved[outside] = _feistel(moved[outside], (a, b), own_keys, int(rounds[0]))
            outside = outside[moved[outside] >= (sizes if len(sizes) == 1 else sizes[outside])]
        return moved.view(np.int64)

    def _permute_by_rounds(
        self, indices: Integers, domains: Integers | None, keys: Words, rounds: Integers
    ) -> Integers:
        """`permute` for domains that need different numbers of rounds."""
        moved = np.empty_like(indices)
        for _, number in ROUNDS:
            chosen = np.flatnonzero(rounds == number)
            if len(chosen):
                chosen_keys = keys if len(keys) == 1 else keys[chosen]
                chosen_domains = domains if domains is None else domains[chosen]
                moved[chosen] = self.permute(indices[chosen], chosen_domains, chosen_keys)
        return moved


def permute_one(index: int, size: int, key: int) -> int:
    """`permute` for a single index."""
    return int(permute(np.array([index]), size, key)[0])


def permute_each(indices: Integers, sizes: Integers, keys: Words) -> Integers:
    """`permute` in domains of several sizes, most of which are as large as the first.

    Args:
        indices: int64 `[n]`.
        sizes: Size of each index' domain, int64 `[n]`.
        keys: uint64 `[n]`.
    """
    if not len(indices):
        return indices
    usual = sizes == sizes[0]
    size = int(sizes[0])
    # One domain for all is much cheaper than a domain for each; the few others are computed again afterwards.
    within = indices if usual.all() else np.minimum(indices, size - 1)
    moved = Domains(sizes[:1]).permute(within, None, keys)
    others = np.flatnonzero(~usual)
    if len(others):
        _, first, domain = np.unique(sizes[others], return_index=True, return_inverse=True)
        moved[others] = Domains(sizes[others][first]).permute(indices[others], domain, keys[others])
    return moved


def draw(numbers: Integers, size: int, key: int) -> Integers:
    """An independent random number in `range(size)` for each of `numbers`: int64 `[n]`."""
    return _scale(stream_keys(key, numbers), size).view(np.int64)


def draw_until(
    draw: Callable[[int], Drawn | None], accept: Callable[[Drawn], bool], *, patient: bool = False
) -> Drawn | None:
    """The first draw that is accepted; if none is, the first that could be made; None if no draw could be made.

    The draws of a few epochs are checked when a loader is made (its trial epochs). If these all find an accepted draw
    within 32 attempts, a draw is accepted so often that a patient epoch, of 1,024 attempts, practically always finds
    one.

    Below, attempt 0 is not accepted, attempt 1 cannot be made, and attempt 2 is the first to be accepted. In the second
    call none is accepted, and attempt 0 is the result:

    >>> draws = [3, None, 8, 9]
    >>> draw_until(lambda attempt: draws[attempt % 4], lambda number: number > 5)
    8
    >>> draw_until(lambda attempt: draws[attempt % 4], lambda number: number > 10)
    3

    Args:
        draw: Gives the draw of an attempt, or None if it is not usable.
        accept: Whether a draw meets the condition.
        patient: Whether to go through all 1,024 attempts, if the first 32 gave a usable draw.
    """
    first = None
    for attempt in range(ATTEMPTS_FACTOR * ATTEMPTS if patient else ATTEMPTS):
        if attempt >= ATTEMPTS and first is None:
            break
        drawn = draw(attempt)
        if drawn is None:
            continue
        if accept(drawn):
            return drawn
        first = drawn if first is None else first
    return first


def _pick_order(indices: Integers, sizes: Integers, words: Words) -> Integers:
    """A random order of at most seven indices, from a random word: each order is equally likely."""
    words = np.broadcast_to(words, np.broadcast_shapes(words.shape, sizes.shape)).copy()
    orders = _scale(words, _COUNTS[sizes]).view(np.int64)
    return _ORDERS[_STARTS[sizes] + orders * sizes + indices]


def _list_orders() -> tuple[Words, Integers, Integers]:
    """For each size: the number of orders and where they begin in the list of all; and that list."""
    orders = [list(itertools.permutations(range(size))) for size in range(LISTED + 1)]
    counts = np.array([len(of_size) for of_size in orders], np.uint64)
    entries = [size * len(of_size) for size, of_size in enumerate(orders)]
    flat = np.array([index for of_size in orders for order in of_size for index in order], np.int64)
    return counts, np.cumsum([0, *entries[:-1]]), flat


_COUNTS, _STARTS, _ORDERS = _list_orders()


def _sides(sizes: Integers) -> tuple[Words, Words]:
    """The sides a and b of each domain: a is even, since shifts of an odd number of indices only make even orders."""
    roots = np.sqrt((sizes - 1).astype(np.float64)).astype(np.int64)
    # A float's root may be wrong by one for sizes above 2**52.
    roots -= roots * roots > sizes - 1
    roots += (roots + 1) * (roots + 1) <= sizes - 1
    left = roots + 1
    left += left & 1
    return left.view(np.uint64), (-(-sizes // left)).view(np.uint64)


def _feistel(indices: Words, sides: tuple[Words, Words], keys: Words, rounds: int) -> Words:
    """The rounds of the network; the result may be outside the domain."""
    a, b = sides
    right, left = np.divmod(indices, a if len(a) > 1 else a[0])
    # Buffers for temporary values: new arrays in each round would cost as much as the arithmetic.
    mixed, spare = np.empty_like(left), np.empty_like(left)
    for number in range(rounds):
        half, other, size = (right, left, b) if number % 2 else (left, right, a)
        np.add(other, keys, out=mixed)
        mixed ^= np.uint64((number * _GAMMA) & _MASK)
        mixed *= np.uint64(_MIX_1)
        mixed ^= np.right_shift(mixed, np.uint64(32), out=spare)
        mixed *= np.uint64(_MIX_2)
        # The hash's top 32 bits, scaled to the side's size, are added modulo that size. A negative difference wraps to
        # a huge number, so that the smaller of the two is the remainder.
        mixed >>= np.uint64(32)
        mixed *= size
        mixed >>= np.uint64(32)
        half += mixed
        np.minimum(half, np.subtract(half, size, out=spare), out=half)
    right *= a
    right += left
    return right


def _scale(words: Words, size: int | Words) -> Words:
    """The top 32 bits of each word, scaled to `range(size)`; in place."""
    words >>= np.uint64(32)
    words *= np.uint64(size) if isinstance(size, int) else size
    words >>= np.uint64(32)
    return words


def _mix(word: int) -> int:
    """The output function of SplitMix64, in Python ints."""
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK
    return word ^ (word >> 31)
