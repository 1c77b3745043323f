"""Mixing samples of equal length: they are exchanged across strata and buckets in each epoch, at no cost.

A *run* is a stretch of the sorted order whose samples all have the same padded width (or length), so that any of them
can replace any other. If samples were shuffled in their own stratum only, a sample would meet only samples of its own
bucket, and never one of its own stratum. So in each epoch the samples of a run are permuted over the whole run, by a
keyed bijection. A run inside one stratum needs no exchange, because its stratum is shuffled anyway.

Nine samples of widths 5 5 5 5 3 3 3 2 2 have three runs. If strata begin at 0, 3 and 6, the run of width 5 crosses
into the second stratum, and the run of width 3 into the third:

>>> widths = np.array([5, 5, 5, 5, 3, 3, 3, 2, 2])
>>> finder = RunFinder(lambda sorted_indices: widths[sorted_indices], np.array([0, 9]))
>>> finder.crosses(np.array([0, 3, 6])).tolist()
[False, True, True]
>>> [bounds.tolist() for bounds in finder.find_bounds(np.array([3, 6]))]
[[0, 4], [4, 7]]
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import Domains, Words, stream_keys


@dataclass(frozen=True, eq=False)
class RunFinder:
    """Finds where the runs of a sorted order begin and end.

    Attributes:
        width_at: The widths of the samples at sorted indices, int64 `[n]` -> int64 `[n]`. In a section, widths never
            rise along the order.
        sections: Where each section of the order begins, and last its length, int64 `[sections + 1]`: no run crosses
            from one section into the next. A corpus is one section, a window of shards is one of its own.
    """

    width_at: Callable[[Integers], Integers]
    sections: Integers

    def crosses(self, sorted_indices: Integers) -> npt.NDArray[np.bool_]:
        """Whether a sample is of the same run as the one before it, for indices 0 to the order's length: bool `[n]`."""
        inside: npt.NDArray[np.bool_] = np.not_equal(
            self.sections[np.searchsorted(self.sections, sorted_indices)], sorted_indices
        )
        later = sorted_indices[inside]
        inside[inside] = self.width_at(later) == self.width_at(later - 1)
        return inside

    def find_bounds(self, sorted_indices: Integers) -> tuple[Integers, Integers]:
        """Where the run of each sample begins and where it ends: int64 `[n]`, `[n]`."""
        if not len(sorted_indices):
            return sorted_indices, sorted_indices
        section = np.searchsorted(self.sections, sorted_indices, side="right") - 1
        widths = self.width_at(sorted_indices)
        # Many samples are of one run: search once for each pair of section and width.
        # A pair becomes one number: section x (number of widths) + width - smallest width.
        smallest = int(widths.min())
        _, first, owner = np.unique(
            section * (int(widths.max()) - smallest + 1) + widths - smallest, return_index=True, return_inverse=True
        )
        section, widths, inside = section[first], widths[first], sorted_indices[first]
        starts = self._first_at_most(widths, self.sections[section], inside)
        ends = self._first_at_most(widths - 1, inside + 1, self.sections[section + 1])
        return starts[owner], ends[owner]

    def _first_at_most(self, widths: Integers, low: Integers, high: Integers) -> Integers:
        """The first sorted index from `low` on whose width is at most `widths`, or `high`: parallel bisections."""
        while (unfinished := low < high).any():
            middle = np.where(unfinished, (low + high) // 2, 0)
            is_narrow = self.width_at(middle) <= widths
            low = np.where(unfinished & ~is_narrow, middle + 1, low)
            high = np.where(unfinished & is_narrow, middle, high)
        return low


class RunExchange:
    """Exchanges the samples of runs that cross the borders of strata.

    The runs of a bucket are found when one of its batches is first asked for.

    Args:
        finder: Finds the runs.
        first_strata: The number of each bucket's first stratum, and last the number of all strata: int64
            `[buckets + 1]`.
        bounds: First sorted index and size of strata: int64 `[n]` -> int64 `[n]`, `[n]`.
    """

    def __init__(
        self, finder: RunFinder, first_strata: Integers, bounds: Callable[[Integers], tuple[Integers, Integers]]
    ) -> None:
        self._finder, self._first_strata, self._bounds = finder, first_strata, bounds
        self._is_searched = np.zeros(len(first_strata) - 1, np.bool_)
        self._is_crossed = np.zeros(len(first_strata) - 1, np.bool_)
        # For each stratum: how many of its first samples belong to a run that begins before it, and the number of that
        # run; the same for its last samples and a run that continues after it. Pages of zeros use no memory until they
        # are written.
        self._head_size, self._head_run, self._tail_size, self._tail_run = np.zeros(
            (4, int(first_strata[-1])), np.int64
        )
        self._starts = np.zeros(0, np.int64)
        self._domains = Domains(np.zeros(0, np.int64))
        self._keys: tuple[int, Words] = (0, np.zeros(0, np.uint64))

    def crosses_strata(self, buckets: Integers) -> npt.NDArray[np.bool_]:
        """Whether runs cross the borders of these buckets' strata: bool `[n]`."""
        is_searched = self._is_searched[buckets]
        if not is_searched.all():
            self._search(np.unique(buckets[~is_searched]))
        return self._is_crossed[buckets]

    def covers(self, strata: Integers, sizes: Integers) -> npt.NDArray[np.bool_]:
        """Whether all of a stratum is part of one run, so that it needs no shuffle of its own: bool `[n]`."""
        covered: npt.NDArray[np.bool_] = self._head_size[strata] == sizes
        return covered

    def exchange_covered(self, strata: Integers, sorted_indices: Integers, key: int) -> Integers:
        """The samples that replace these in an epoch, for strata that are covered by one run.

        Args:
            strata: Number of each sample's stratum, int64 `[n]`.
            sorted_indices: The samples, int64 `[n]`.
            key: Random key of the epoch, for this purpose.

        Returns:
            Sorted indices, int64 `[n]`.
        """
        return self._permute_runs(self._head_run[strata], sorted_indices, key)

    def exchange(
        self, strata: Integers, sizes: Integers, offsets: Integers, *, sorted_indices: Integers, key: int
    ) -> Integers:
        """The samples that replace these in an epoch, for any strata.

        Args:
            strata: Number of each sample's stratum, int64 `[n]`.
            sizes: Size of each stratum.
            offsets: Index of each sample in its stratum.
            sorted_indices: The samples; overwritten.
            key: Random key of the epoch, for this purpose.

        Returns:
            Sorted indices, int64 `[n]`.
        """
        in_head = offsets < self._head_size[strata]
        moving = np.flatnonzero(in_head | (offsets >= sizes - self._tail_size[strata]))
        if len(moving):
            strata = strata[moving]
            runs = np.where(in_head[moving], self._head_run[strata], self._tail_run[strata])
            sorted_indices[moving] = self._permute_runs(runs, sorted_indices[moving], key)
        return sorted_indices

    def _permute_runs(self, runs: Integers, sorted_indices: Integers, key: int) -> Integers:
        """Each sample's replacement in its run."""
        if self._keys[0] != key or len(self._keys[1]) != len(self._starts):
            self._keys = (key, stream_keys(key, self._starts))
        starts = self._starts[runs]
        return starts + self._domains.permute(sorted_indices - starts, runs, self._keys[1][runs])

    def _search(self, buckets: Integers) -> None:
        """Find the runs that cross the borders of these buckets' strata."""
        counts = self._first_strata[buckets + 1] - self._first_strata[buckets]
        end = counts.cumsum()
        within: Integers = np.arange(end[-1]) - np.repeat(end - counts, counts)
        strata = np.repeat(self._first_strata[buckets], counts) + within
        first, size = self._bounds(strata)
        last = first + size
        # A stratum ends where the next one of its bucket begins; only the last one's end is asked for.
        outer = end - 1
        crossed = self._finder.crosses(np.concatenate([first, last[outer]]))
        crossed_after = np.append(crossed[1 : len(first)], values=False)
        crossed_after[outer] = crossed[len(first) :]
        for members, inside, sizes, run_of in (
            (np.flatnonzero(crossed[: len(first)]), first, self._head_size, self._head_run),
            (np.flatnonzero(crossed_after), last - 1, self._tail_size, self._tail_run),
        ):
            starts, ends = self._finder.find_bounds(inside[members])
            sizes[strata[members]] = np.minimum(ends, last[members]) - np.maximum(starts, first[members])
            run_of[strata[members]] = self._add(starts, ends)
        # A run that begins with its stratum and continues after it covers the stratum as well.
        covered = strata[self._tail_size[strata] == size]
        self._head_size[covered], self._head_run[covered] = self._tail_size[covered], self._tail_run[covered]
        self._is_crossed[buckets] = np.logical_or.reduceat(crossed[: len(first)] | crossed_after, end - counts)
        self._is_searched[buckets] = True

    def _add(self, starts: Integers, ends: Integers) -> Integers:
        """Add runs, and return the number of each."""
        unique_starts, first, owner = np.unique(starts, return_index=True, return_inverse=True)
        numbers = len(self._starts) + owner
        self._domains = Domains(np.concatenate([self._domains.sizes, ends[first] - unique_starts]))
        self._starts = np.concatenate([self._starts, unique_starts])
        return numbers
