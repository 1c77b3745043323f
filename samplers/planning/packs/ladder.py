"""Attempts at the recipes of an epoch: from those that mix best to plain best-fit decreasing, which always succeeds.

An attempt spreads the long documents over all rows with noise, and places the short ones by best fit. The fewer are
placed by best fit, the more the recipes differ between epochs, and the more attempts fail.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, stream_keys
from samplers.planning.packs.groups import Groups, Ranking, Tree

# Shares, noise and jitter are counted in thousandths.
WHOLE: Final = 1_000
_HASH_BITS: Final = 20
_HASH_SHIFT: Final = np.uint64(64 - _HASH_BITS)
# What a key is for.
_JITTER, _SPREAD = range(2)


@dataclass(frozen=True)
class Rung:
    """How an attempt places documents.

    Attributes:
        finish: Share of the tokens, the shortest documents, that is placed by best fit, in thousandths.
        noise: Noise in the spread, as a share of the capacity, in thousandths.
        jitter: Noise in the decreasing order of the finish, as a share of a length, in thousandths.
        once: Whether each row takes one document of a class before any takes a second.
    """

    finish: int
    noise: int = 0
    jitter: int = 0
    once: bool = True


# In order of how rarely documents meet again. A noise of 0.7 succeeds where 0.5 or 1 often fail: with less, all rows
# come to the finish with about equal room, with more, too many with too little. Where a row has many documents, less is
# better: the room that noise leaves goes to the shortest documents, of which some rows then have far more than others.
# With 376 documents in a row, the number of the shortest tenth varied 26 times as much as at random with a noise of
# 0.7, 9 times with 0.3, and documents met less often too; with 18 in a row they met more often.
_NOISE: Final = 700
_LITTLE_NOISE: Final = 300
LADDER: Final = (
    *(Rung(finish, _LITTLE_NOISE) for finish in (5, 20)),
    *(Rung(finish, _NOISE) for finish in (20, 50, 100, 200)),
    Rung(WHOLE, jitter=300),
    Rung(350, _NOISE),
    *(Rung(WHOLE, jitter=jitter) for jitter in (100, 30, 0)),
    Rung(800, _NOISE, once=False),
    *(Rung(WHOLE, jitter=jitter, once=False) for jitter in (300, 100, 30, 0)),
)
# The first rung for rows of fewer documents.
FULL_NOISE: Final = next(index for index, rung in enumerate(LADDER) if rung.noise == _NOISE)
# The first rung that does not place each class once in a row.
REPEATING: Final = next(index for index, rung in enumerate(LADDER) if not rung.once)


@dataclass(frozen=True, eq=False)
class PackTask:
    """Documents of each class, and the rows that must hold them.

    Attributes:
        sizes: What a document of each class takes of each limit, int64 `[J, D]`, largest first.
        counts: Documents of each class, int64 `[J]`.
        limits: What a row holds of each limit, int64 `[D]`.
    """

    sizes: Integers
    counts: Integers
    limits: Integers

    @property
    def shares(self) -> Integers:
        """Size of each class in units of the first limit, by the limit of which it takes most: int64 `[J]`."""
        return np.asarray((-(-self.sizes * self.limits[0] // self.limits)).max(1), np.int64)

    @property
    def bound(self) -> int:
        """Rows that any packing needs at least."""
        return int((-(-(self.counts @ self.sizes) // self.limits)).max())


def attempt(task: PackTask, rows: int, rung: Rung, key: int) -> Tree | None:
    """Recipes for that many rows, or None where the attempt fails.

    Args:
        task: What to place.
        rows: At most as many as documents.
        rung: How.
        key: Of the attempt.
    """
    groups = Groups(task.sizes, task.limits, rows)
    remaining = list(_in_order(task, rung, key))
    spread = _spread_classes(task, rung)
    hash_groups = _Noise(derive_key(key, _SPREAD))
    ranking = _emptiest_first(hash_groups, int(task.limits[0]) * rung.noise // WHOLE)
    for turn, (number, count) in enumerate(remaining[:spread]):
        remaining[turn] = number, groups.place(number, count, ranking)
    ranking = _fullest_first(hash_groups)
    spare = rows * int(task.limits[0]) - int(task.sizes[:, 0] @ task.counts)
    for number, count in remaining:
        rest = groups.place(number, count, ranking) if rung.once else groups.place_best_fit(number, count)
        # What is lost for good tells of a failure before the last documents do.
        if rest or groups.lost > spare:
            return None
    return fill_empty(groups.tree())


def fill_empty(tree: Tree) -> Tree:
    """Give each empty row the last document of another row: of those that hold several, the longest last document."""
    empty = int(tree.open_rows()[0])
    if empty == 0:
        return tree
    parents, classes, rows = (column.tolist() for column in tree)
    opened = tree.open_rows().tolist()
    # Classes are numbered longest first.
    candidates = sorted(
        (number, group) for group, number in enumerate(classes) if opened[group] and parents[group] > 0
    )[::-1]
    while empty:
        number, group = candidates.pop()
        moved = min(empty, opened[group])
        rows[group] -= moved
        opened[group] -= moved
        parents.append(0)
        classes.append(number)
        rows.append(moved)
        empty -= moved
        parent = parents[group]
        opened[parent] += moved
        if parents[parent] > 0:
            candidates.append((classes[parent], parent))
            candidates.sort(reverse=True)
    return Tree(*(np.array(column) for column in (parents, classes, rows)))


def _in_order(task: PackTask, rung: Rung, key: int) -> Iterator[tuple[int, int]]:
    """Classes and their documents, in decreasing order of size with the rung's jitter."""
    order = np.arange(len(task.counts))
    if rung.jitter:
        hashes = (stream_keys(derive_key(key, _JITTER), order) >> _HASH_SHIFT).astype(np.int64)
        scores = task.shares * ((WHOLE << _HASH_BITS) - rung.jitter * hashes)
        order = np.argsort(-scores, kind="stable")
    return zip(order.tolist(), task.counts[order].tolist(), strict=True)


def _spread_classes(task: PackTask, rung: Rung) -> int:
    """How many of the first classes are spread."""
    if rung.finish == WHOLE:
        return 0
    tokens = np.cumsum(task.sizes[:, 0] * task.counts)
    # A class is spread if it begins before that share of the tokens.
    return 1 + int(tokens.searchsorted(int(tokens[-1]) * (WHOLE - rung.finish) // WHOLE))


class _Noise:
    """A new number below 2**20 for each group in each turn: of a hash by its number, the top bits of a product."""

    def __init__(self, key: int) -> None:
        self._key = key
        self._hashes = stream_keys(key, np.arange(1 << 10))
        self._turn = 0

    def __call__(self, numbers: Integers) -> Integers:
        while int(numbers[-1]) >= len(self._hashes):
            more = np.arange(len(self._hashes), 2 * len(self._hashes))
            self._hashes = np.concatenate([self._hashes, stream_keys(self._key, more)])
        self._turn += 1
        # Odd factors are bijections of the hashes.
        hashes = self._hashes[numbers] * np.uint64(derive_key(self._key, self._turn) | 1)
        hashes >>= _HASH_SHIFT
        return hashes.view(np.int64)


def _emptiest_first(hash_groups: _Noise, noise: int) -> Ranking:
    """The emptiest groups first, with noise."""

    def rank(rooms: Integers, numbers: Integers) -> Integers:
        scores = hash_groups(numbers)
        scores *= -noise
        scores -= rooms << _HASH_BITS
        return scores.argsort(kind="stable")

    return rank


def _fullest_first(hash_groups: _Noise) -> Ranking:
    """The fullest groups first, those of equal room by a hash."""

    def rank(rooms: Integers, numbers: Integers) -> Integers:
        return ((rooms << _HASH_BITS) + hash_groups(numbers)).argsort(kind="stable")

    return rank
