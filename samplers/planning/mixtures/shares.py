"""Exact shares: in which order sources take turns, and how much of each comes before a given batch of the training.

The order is that of worst-case fair weighted fair queueing (WF2Q; Bennett and Zhang, 1996). A source may take its next
turn once the others have had their share of what it took so far, and of the sources that may, the one goes first whose
turn must end soonest. Then no prefix gives a source a turn more, or a turn less, than its share, however many sources
there are and whatever sizes their turns have.

Two sources, shares 3 to 1, turns of 10 tokens:

>>> turns = [np.full(6, 10), np.full(2, 10)]
>>> take_turns(np.array([0.75, 0.25]), np.zeros(2), turns).tolist()
[0, 1, 0, 0, 0, 1, 0, 0]
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Final, Protocol

import numpy as np

from samplers.planning.budget import Floats, Integers


def take_turns(shares: Floats, taken: Floats, turns: Sequence[Integers]) -> Integers:
    """The source of each turn, until all turns are taken: int64 `[sum of turns]`.

    Args:
        shares: Share of each source, float64 `[sources]`, above 0; their sum is 1.
        taken: Units that each source took before, float64 `[sources]`.
        turns: The units of the turns of each source, int64 `[turns of the source]` each.
    """
    order: list[int] = []
    sizes = [each.tolist() for each in turns]
    share, done = shares.tolist(), taken.tolist()
    total = float(sum(done))
    # By the total at which the turn may begin; then, once it may, by the total at which it should have ended.
    waiting = [(done[source] / share[source], source) for source, own in enumerate(sizes) if own]
    heapify(waiting)
    ready: list[tuple[float, int]] = []
    next_turn = [0] * len(sizes)
    while waiting or ready:
        while waiting and (waiting[0][0] <= total or not ready):
            source = heappop(waiting)[1]
            heappush(ready, ((done[source] + sizes[source][next_turn[source]]) / share[source], source))
        source = heappop(ready)[1]
        order.append(source)
        units = sizes[source][next_turn[source]]
        total += units
        done[source] += units
        next_turn[source] += 1
        if next_turn[source] < len(sizes[source]):
            heappush(waiting, (done[source] / share[source], source))
    return np.array(order, np.int64)


# A count is exchanged by a batch or two: a source of as many batches in an epoch still has more at its end.
FEWEST_TO_MOVE: Final = 6


class BatchStream(Protocol):
    """The endless batches of a source, as far as their units are known without any sample."""

    @property
    def phase(self) -> float:
        """The part of a batch that must lie within the first units, so that it counts."""
        ...

    def units_before(self, batches: int) -> float:
        """Units of the first batches of the stream."""
        ...

    def batches_within(self, units: float) -> int:
        """Batches of the stream of which at least `phase` lies within its first units."""
        ...


def count_batches_of(
    streams: Sequence[BatchStream], shares: Floats, batches: int, *, units_per_batch: float, per_epoch: Floats
) -> Integers:
    """How many of the first `batches` batches of the training come from each source: int64 `[sources]`.

    All sources advance together; each count is rounded to the nearest batch, and then some are exchanged, so that no
    source is off by much more than half a batch of the real total. Sources of a few batches in an epoch take no part in
    exchanges: at the end of an epoch, none may have fewer batches than at its beginning.

    Args:
        streams: Of the sources.
        shares: Share of each in units, float64 `[sources]`, above 0; their sum is 1.
        batches: How many batches of all sources together.
        units_per_batch: About as many units as a batch has.
        per_epoch: About as many batches as each source has in an epoch, float64 `[sources]`.
    """
    counts = _first_batches(streams, shares, batches, units_per_batch)
    taken = np.array([stream.units_before(count) for stream, count in zip(streams, counts.tolist(), strict=True)])
    may_move = per_epoch >= FEWEST_TO_MOVE
    for _ in range(2 * int(may_move.sum())):
        behind = shares * float(taken.sum()) - taken
        latest = int(np.where(may_move, behind, -np.inf).argmax())
        earliest = int(np.where(may_move & (counts > 0), behind, np.inf).argmin())
        exchanged = counts.copy()
        exchanged[latest] += 1
        exchanged[earliest] -= 1
        changed = taken.copy()
        for number in (latest, earliest):
            changed[number] = streams[number].units_before(int(exchanged[number]))
        if latest == earliest or _worst(shares * float(changed.sum()) - changed) >= _worst(behind):
            break
        counts, taken = exchanged, changed
    return counts


def _worst(behind: Floats) -> float:
    return float(np.abs(behind).max())


def _first_batches(streams: Sequence[BatchStream], shares: Floats, batches: int, units_per_batch: float) -> Integers:
    """How many of the first batches are of each source, if all advance together: int64 `[sources]`.

    Batch number n of a source counts at the total at which its share holds the batches before and `phase` of this one.
    Of the batches near the total that is about right, those with the smallest totals come first.
    """

    def count(total: float) -> Integers:
        within = [stream.batches_within(total * share) for stream, share in zip(streams, shares.tolist(), strict=True)]
        return np.array(within)

    # Few steps, since each looks at every source: the batches in between are sorted.
    width = (len(streams) + 1) * units_per_batch
    high = max(1.0, batches * units_per_batch)
    last = count(high)
    while last.sum() < batches:
        high += max(width, (batches - int(last.sum())) * units_per_batch)
        last = count(high)
    first = np.zeros_like(last)
    step = width
    while (near := high - step) > 0:
        counts = count(near)
        if counts.sum() <= batches:
            first = counts
            break
        high, last, step = near, counts, 2 * step
    totals, owners = [], []
    for number, (stream, share) in enumerate(zip(streams, shares.tolist(), strict=True)):
        for batch in range(int(first[number]) + 1, int(last[number]) + 1):
            totals.append(_interpolate(stream, batch) / share)
            owners.append(number)
    # Of equal totals the sources that stand first, each with its batches in their order.
    chosen = np.array(owners, np.int64)[np.argsort(totals, kind="stable")[: batches - int(first.sum())]]
    counted: Integers = first + np.bincount(chosen, minlength=len(streams))
    return counted


def _interpolate(stream: BatchStream, count: int) -> float:
    """Units of a stream with which its batch number `count`, from 1, counts."""
    before = stream.units_before(count - 1)
    return before + stream.phase * (stream.units_before(count) - before)


def spread_phases(periods: Floats) -> list[float]:
    """Phases of sources, so that those that take turns equally often do not all do so at once.

    Four sources, of which three have a batch in about as many units of all:

    >>> spread_phases(np.array([10.0, 40.0, 40.0, 40.5]))
    [0.5, 0.16666666666666666, 0.5, 0.8333333333333334]

    Args:
        periods: Units of all sources in which each has a batch, float64 `[sources]`.
    """
    groups = np.round(np.log(periods) * 8)
    phases = np.empty(len(periods))
    for group in np.unique(groups).tolist():
        members = np.flatnonzero(groups == group)
        phases[members] = (np.arange(len(members)) + 0.5) / len(members)
    found: list[float] = phases.tolist()
    return found
