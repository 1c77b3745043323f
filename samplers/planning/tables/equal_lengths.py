"""Samples of one length trade places: who is as good as another need not stay among the same neighbours.

A run is a stretch of the order whose samples all count for the same padded width (or length), so that any of them may
stand in the place of any other at no cost. A shuffle that keeps to its strata would let a sample meet only those of its
own edge, and never one of its own stratum. So in every epoch the samples of a run are dealt out again among its places,
by a keyed bijection. A run within one stratum needs none of it: the stratum is shuffled as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import Domains, Words, stream_keys


@dataclass(frozen=True, eq=False)
class Extents:
    """Where the runs of an order begin and end.

    Attributes:
        width_at: what the samples at these places count for, int64 `[n]` -> int64 `[n]`. Within a region it never
            rises from one place to the next.
        regions: where each region begins, and last the number of places, int64 `[regions + 1]`: no run crosses from one
            region into the next.
    """

    width_at: Callable[[Integers], Integers]
    regions: Integers

    def crosses(self, places: Integers) -> npt.NDArray[np.bool_]:
        """Whether a run goes on from the place before to each of these places, 0 to the number of places: `[n]`."""
        inside: npt.NDArray[np.bool_] = np.not_equal(self.regions[np.searchsorted(self.regions, places)], places)
        later = places[inside]
        inside[inside] = self.width_at(later) == self.width_at(later - 1)
        return inside

    def around(self, places: Integers) -> tuple[Integers, Integers]:
        """Where the run of each of these places begins, and where it ends: int64 `[n]`, `[n]`."""
        if not len(places):
            return places, places
        region = np.searchsorted(self.regions, places, side="right") - 1
        widths = self.width_at(places)
        # Many places are of one run.
        least = int(widths.min())
        _, first, owner = np.unique(
            region * (int(widths.max()) - least + 1) + widths - least, return_index=True, return_inverse=True
        )
        region, widths, inside = region[first], widths[first], places[first]
        starts = self._first_at_most(widths, self.regions[region], inside)
        ends = self._first_at_most(widths - 1, inside + 1, self.regions[region + 1])
        return starts[owner], ends[owner]

    def _first_at_most(self, widths: Integers, low: Integers, high: Integers) -> Integers:
        """The first place from `low` on whose width is at most this one, or `high`: bisections side by side."""
        while (open_ := low < high).any():
            middle = np.where(open_, (low + high) // 2, 0)
            narrow = self.width_at(middle) <= widths
            low, high = np.where(open_ & ~narrow, middle + 1, low), np.where(open_ & narrow, middle, high)
        return low


class Runs:
    """The runs that reach over the bounds of strata, found for an edge when a batch first takes from it.

    Args:
        extents: of the order.
        strata: the number of each edge's first stratum, and last of all strata: int64 `[edges + 1]`.
        bounds: where strata begin and how many samples they have: int64 `[n]` -> int64 `[n]`, `[n]`.
    """

    def __init__(
        self, extents: Extents, strata: Integers, bounds: Callable[[Integers], tuple[Integers, Integers]]
    ) -> None:
        self._extents, self._strata, self._bounds = extents, strata, bounds
        self._known = np.zeros(len(strata) - 1, np.bool_)
        self._crossed = np.zeros(len(strata) - 1, np.bool_)
        # Of each stratum: how many of its first samples belong to a run that begins before it, and which; the same of
        # its last samples and a run that goes on behind it. Pages of zeros take no memory until they are written.
        self._before, self._head, self._after, self._tail = np.zeros((4, int(strata[-1])), np.int64)
        self._starts = np.zeros(0, np.int64)
        self._domains = Domains(np.zeros(0, np.int64))
        self._keys: tuple[int, Words] = (0, np.zeros(0, np.uint64))

    def crossed(self, edges: Integers) -> npt.NDArray[np.bool_]:
        """Whether runs reach over bounds of these edges' strata: bool `[n]`; the edges are known from then on."""
        known = self._known[edges]
        if not known.all():
            self._find(np.unique(edges[~known]))
        return self._crossed[edges]

    def whole(self, strata: Integers, sizes: Integers) -> npt.NDArray[np.bool_]:
        """Whether each of these strata is part of one run, so that it need not be shuffled by itself: bool `[n]`."""
        whole: npt.NDArray[np.bool_] = self._before[strata] == sizes
        return whole

    def exchange_whole(self, strata: Integers, places: Integers, key: int) -> Integers:
        """The places of the order that stand, in an epoch, for places in strata that are part of one run.

        Args:
            strata: their numbers, int64 `[n]`.
            places: in the order, int64 `[n]`.
            key: of the epoch and of this purpose.
        """
        return self._move(self._head[strata], places, key)

    def exchange(self, strata: Integers, sizes: Integers, offsets: Integers, places: Integers, key: int) -> Integers:
        """The places that stand for places in any strata.

        Args:
            strata: their numbers, int64 `[n]`.
            sizes: of each.
            offsets: of the place within its stratum.
            places: in the order.
            key: of the epoch and of this purpose.
        """
        before = offsets < self._before[strata]
        moving = np.flatnonzero(before | (offsets >= sizes - self._after[strata]))
        if len(moving):
            strata = strata[moving]
            runs = np.where(before[moving], self._head[strata], self._tail[strata])
            places[moving] = self._move(runs, places[moving], key)
        return places

    def _move(self, runs: Integers, places: Integers, key: int) -> Integers:
        if self._keys[0] != key or len(self._keys[1]) != len(self._starts):
            self._keys = (key, stream_keys(key, self._starts))
        starts = self._starts[runs]
        return starts + self._domains.permute(places - starts, runs, self._keys[1][runs])

    def _find(self, edges: Integers) -> None:
        counts = self._strata[edges + 1] - self._strata[edges]
        end = counts.cumsum()
        within: Integers = np.arange(end[-1]) - np.repeat(end - counts, counts)
        strata = np.repeat(self._strata[edges], counts) + within
        first, size = self._bounds(strata)
        last = first + size
        # A stratum ends where the next one of its edge begins.
        outer = end - 1
        crossed = self._extents.crosses(np.concatenate([first, last[outer]]))
        behind = np.append(crossed[1 : len(first)], values=False)
        behind[outer] = crossed[len(first) :]
        for there, inside, held, which in (
            (np.flatnonzero(crossed[: len(first)]), first, self._before, self._head),
            (np.flatnonzero(behind), last - 1, self._after, self._tail),
        ):
            starts, ends = self._extents.around(inside[there])
            held[strata[there]] = np.minimum(ends, last[there]) - np.maximum(starts, first[there])
            which[strata[there]] = self._add(starts, ends)
        # A run that begins with its stratum and goes on behind it holds all of the stratum as well.
        all_of_it = strata[self._after[strata] == size]
        self._before[all_of_it], self._head[all_of_it] = self._after[all_of_it], self._tail[all_of_it]
        held_any = crossed[: len(first)] | behind
        self._crossed[edges] = np.logical_or.reduceat(held_any, end - counts)
        self._known[edges] = True

    def _add(self, starts: Integers, ends: Integers) -> Integers:
        """Add runs, and give the number of each."""
        found, first, owner = np.unique(starts, return_index=True, return_inverse=True)
        numbers = len(self._starts) + owner
        self._domains = Domains(np.concatenate([self._domains.sizes, ends[first] - found]))
        self._starts = np.concatenate([self._starts, found])
        return numbers
