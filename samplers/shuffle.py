"""Counter-based shuffles: where one item goes is computed from its place and a key, without the rest.

A plan has to be the same on every rank, machine and version, and one batch of it has to be found without laying out
the epoch. Both rule out a library's `permutation`; here a keyed bijection says where each item goes.
"""

from math import isqrt
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]

# Domains of a few places need the most: after 6 rounds the 120 orders of 5 places are visibly uneven.
ROUNDS: Final = 12
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
    round again (the generalised Feistel cipher with cycle walking of Black and Rogaway, 2002).

    Args:
        places: int64 `[n]`, each in `range(size)`.
        size: of the domain, at most 2**62.
        keys: uint64 `[n]`, a key for each place, or one for all.

    Returns:
        int64 `[n]`, each in `range(size)`; distinct places under equal keys stay distinct.
    """
    if size <= 1:
        return np.zeros(len(places), np.int64)
    keys = np.full(1, keys, np.uint64) if isinstance(keys, int) else keys
    moved = _feistel(places.astype(np.uint64), size, keys)
    outside = np.flatnonzero(moved >= size)
    while len(outside):
        moved[outside] = _feistel(moved[outside], size, keys if len(keys) == 1 else keys[outside])
        outside = outside[moved[outside] >= size]
    return moved.view(np.int64)


def permute_one(place: int, size: int, key: int) -> int:
    """`permute` for a single place."""
    return int(permute(np.array([place]), size, key)[0])


def draw(numbers: Integers, size: int, key: int) -> Integers:
    """A number in `range(size)` for each of `numbers`, independent of one another: int64 `[n]`."""
    return _scale(stream_keys(key, numbers), size).view(np.int64)


def _feistel(places: Words, size: int, keys: Words) -> Words:
    a = isqrt(size - 1) + 1
    b = -(-size // a)
    right, left = np.divmod(places, np.uint64(a))
    for turn in range(ROUNDS):
        if turn % 2:
            _shift(right, left, b, keys, turn)
        else:
            _shift(left, right, a, keys, turn)
    right *= np.uint64(a)
    right += left
    return right


def _shift(half: Words, other: Words, size: int, keys: Words, turn: int) -> None:
    """Add to `half`, modulo `size`, a hash of the other half; in place."""
    mixed = other + (keys ^ np.uint64((turn * _GAMMA) & _MASK))
    mixed *= np.uint64(_MIX_1)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(_MIX_2)
    half += _scale(mixed, size)
    # Below zero wraps to a huge number, so that the smaller of the two is the remainder.
    np.minimum(half, half - np.uint64(size), out=half)


def _scale(words: Words, size: int) -> Words:
    """The top 32 bits of each word, scaled to `range(size)`; in place."""
    words >>= np.uint64(32)
    words *= np.uint64(size)
    words >>= np.uint64(32)
    return words


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK
    return word ^ (word >> 31)
