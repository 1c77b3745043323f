"""Counter-based shuffles: where one item goes is computed from its place and a key, without the rest.

A plan has to be the same on every rank, machine and version, and one batch of it has to be found without laying out
the epoch. Both rule out a library's `permutation`; here a keyed bijection says where each item goes.
"""

import itertools
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]

# Up to so many places, an order is drawn from the list of all.
LISTED: Final = 7
# Larger domains need fewer rounds until every pair of places is as likely as any other: (places below, rounds).
ROUNDS: Final = ((LISTED + 1, 0), (64, 16), (1 << 63, 8))
_MASK: Final = (1 << 64) - 1
_GAMMA: Final = 0x9E3779B97F4A7C15
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB


def derive_key(*words: int) -> int:
    """A 64-bit key from non-negative integers (a seed, an epoch, a purpose); their order and number count.

    The words are absorbed one by one into SplitMix64 (Steele, Lea and Flood, 2014).
    """
    key = len(words)
    for word in words:
        key = _mix((key + (word & _MASK) + _GAMMA) & _MASK)
        key = _mix((key + _GAMMA) & _MASK)
    return key


def stream_keys(key: int, numbers: Integers) -> Words:
    """The key of each numbered stream under `key`: the outputs of SplitMix64 at those places.

    Args:
        key: of the whole family, from `derive_key`.
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


def permute(places: Integers, size: int, keys: Words | int) -> Integers:
    """Where each place goes under a keyed bijection on `range(size)`.

    A Feistel network over a domain of any size: a place is written as `(left, right)` in `range(a) x range(b)` with
    `a * b` just above `size`, the halves are shifted in turn by a hash of the other, and what falls outside is sent
    round again (the generalised Feistel cipher with cycle walking of Black and Rogaway, 2002). An order of at most
    seven places is drawn from the list of all of them.

    Args:
        places: int64 `[n]`, each in `range(size)`.
        size: of the domain, at most 2**62.
        keys: uint64 `[n]`, a key for each place, or one for all.

    Returns:
        int64 `[n]`, each in `range(size)`; distinct places under equal keys stay distinct.
    """
    keys = np.full(1, keys, np.uint64) if isinstance(keys, int) else keys
    return Domains(np.array([max(size, 1)])).permute(places, None, keys)


class Domains:
    """Domains of several sizes, in each of which places are permuted.

    Args:
        sizes: int64 `[domains]`, each 1 to 2**62.
    """

    def __init__(self, sizes: Integers) -> None:
        self.sizes = sizes
        self._left, self._right = _sides(sizes)
        below, rounds = np.array(ROUNDS, np.uint64).T
        self._rounds = rounds[np.searchsorted(below, sizes.view(np.uint64), side="right")].view(np.int64)

    def permute(self, places: Integers, domains: Integers | None, keys: Words) -> Integers:
        """Where each place goes under a keyed bijection on its domain, as the function `permute` sends it.

        Args:
            places: int64 `[n]`, each in the range of its domain.
            domains: of each place the number of its domain, int64 `[n]`; None for a single domain.
            keys: uint64 `[n]`, or `[1]` for all.
        """
        rounds = self._rounds if domains is None else self._rounds[domains]
        if len(rounds) == 1 or (rounds == rounds[:1]).all():
            return self._permute(places, domains, keys, int(rounds[0]) if len(rounds) else 0)
        moved = np.empty_like(places)
        for _, number in ROUNDS:
            chosen = np.flatnonzero(rounds == number)
            if len(chosen):
                some = keys if len(keys) == 1 else keys[chosen]
                moved[chosen] = self._permute(
                    places[chosen], domains if domains is None else domains[chosen], some, number
                )
        return moved

    def _permute(self, places: Integers, domains: Integers | None, keys: Words, rounds: int) -> Integers:
        chosen = slice(None) if domains is None else domains
        if rounds == 0:
            return _pick_order(places, self.sizes[chosen], keys)
        left, right = self._left[chosen], self._right[chosen]
        bounds = self.sizes[chosen].view(np.uint64)
        moved = _feistel(places.view(np.uint64), left, right, keys, rounds)
        outside = np.flatnonzero(moved >= bounds)
        while len(outside):
            a, b, own = (array if len(array) == 1 else array[outside] for array in (left, right, keys))
            moved[outside] = _feistel(moved[outside], a, b, own, rounds)
            outside = outside[moved[outside] >= (bounds if len(bounds) == 1 else bounds[outside])]
        return moved.view(np.int64)


def permute_one(place: int, size: int, key: int) -> int:
    """`permute` for a single place."""
    return int(permute(np.array([place]), size, key)[0])


def draw(numbers: Integers, size: int, key: int) -> Integers:
    """A number in `range(size)` for each of `numbers`, independent of one another: int64 `[n]`."""
    return _scale(stream_keys(key, numbers), size).view(np.int64)


def _pick_order(places: Integers, sizes: Integers, keys: Words) -> Integers:
    """Any order of at most seven places, each as likely as any other."""
    words = np.broadcast_to(stream_keys(0, keys.view(np.int64)), np.broadcast_shapes(keys.shape, sizes.shape)).copy()
    orders = _scale(words, _COUNTS[sizes]).view(np.int64)
    return _ORDERS[_STARTS[sizes] + orders * sizes + places]


def _list_orders() -> tuple[Words, Integers, Integers]:
    """Of each size how many orders there are, where they begin in the list of all, and that list."""
    orders = [list(itertools.permutations(range(size))) for size in range(LISTED + 1)]
    counts = np.array([len(each) for each in orders], np.uint64)
    entries = [size * len(each) for size, each in enumerate(orders)]
    flat = np.array([place for each in orders for order in each for place in order], np.int64)
    return counts, np.cumsum([0, *entries[:-1]]), flat


_COUNTS, _STARTS, _ORDERS = _list_orders()


def _sides(sizes: Integers) -> tuple[Words, Words]:
    """The sides a and b of each domain: a is even, since shifts of an odd number of places only make even orders."""
    roots = np.sqrt((sizes - 1).astype(np.float64)).astype(np.int64)
    # A float's root may be one off for sizes above 2**52.
    roots -= roots * roots > sizes - 1
    roots += (roots + 1) * (roots + 1) <= sizes - 1
    left = roots + 1
    left += left & 1
    return left.view(np.uint64), (-(-sizes // left)).view(np.uint64)


def _feistel(places: Words, a: Words, b: Words, keys: Words, rounds: int) -> Words:
    right, left = np.divmod(places, a if len(a) > 1 else a[0])
    # Arrays for what is computed on the way: new ones in each round would cost as much as the arithmetic.
    mixed, spare = np.empty_like(left), np.empty_like(left)
    for turn in range(rounds):
        half, other, size = (right, left, b) if turn % 2 else (left, right, a)
        np.add(other, keys, out=mixed)
        mixed ^= np.uint64((turn * _GAMMA) & _MASK)
        mixed *= np.uint64(_MIX_1)
        mixed ^= np.right_shift(mixed, np.uint64(32), out=spare)
        mixed *= np.uint64(_MIX_2)
        # A hash of the other half is added, modulo the side's size. Below zero wraps to a huge number, so that the
        # smaller of the two is the remainder.
        half += _scale(mixed, size)
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
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK
    return word ^ (word >> 31)
