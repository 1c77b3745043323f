"""Shards to windows to batches: the plan of a corpus that is read in order, a run of shards at a time.

A window is a run of shuffled shards whose samples are planned together. Which shards make a window is decided by the
seed, so that all epochs have as many batches; the order of windows, what is in a batch and the order of a window's
batches are decided by the epoch as well. Windows are dealt to lanes, each a contiguous part of the reading order:
whoever reads one lane reads a window, then the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Final, NamedTuple

import numpy as np

from samplers.budget import Integers
from samplers.corpus import Corpus, IndexedLengths, Places, rank_lengths
from samplers.course import Course, Epoch
from samplers.edges import Edge, count_batches, cut_turns
from samplers.layout import Layout, in_order
from samplers.options import Options
from samplers.shuffle import derive_key, permute, stream_keys

# A window holds at least so many samples where no number is given: enough batches of a usual size to be even in width.
WINDOW: Final = 10_000
# What a key is for, beside the purposes of `samplers.course`: shards among windows, windows and batches in an epoch.
SHARDS, WINDOWS, SLOTS = range(10, 13)
# The visit of a batch that was split among replicas.
SPLIT: Final = -1


class _Part(NamedTuple):
    """A window: its shards, its samples, longest first, and its edges, which begin at the window's first sample."""

    shards: tuple[int, ...]
    order: Places
    even: list[Edge]
    odd: list[Edge]

    @property
    def most_rows(self) -> int:
        return min(edges[-1].rows if edges else 0 for edges in (self.even, self.odd))


class _Sequence(NamedTuple):
    """Of each batch of an epoch, in the order of its sequence: number in the layout, and visit, int64 `[batches]`."""

    numbers: Integers
    visits: Integers


@dataclass(frozen=True, eq=False)
class WindowLayout(Layout):
    """The batches of all windows, window after window; within a window alike ones stand next to each other.

    Attributes:
        windows: the shards of each.
        sizes: the batches of each, int64 `[windows]`.
        interleave: lanes of each replica.
    """

    windows: tuple[tuple[int, ...], ...]
    sizes: Integers
    interleave: int

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when an edge, a window or the choice of samples does."""
        decided = repr((super().digest, self.windows, self.interleave))
        return blake2b(decided.encode(), digest_size=8).hexdigest()

    @property
    def _regions(self) -> Integers:
        """The window of each edge: its samples are read together."""
        last = self._table.ends - 1
        return np.searchsorted(self.sizes.cumsum(), last, side="right")


@dataclass(frozen=True, eq=False)
class WindowEpoch(Epoch):
    """The sequence of an epoch's batches, read from `replicas * interleave` lanes in turn.

    The batches of a window are ordered by numbers that are drawn for steps, the same for all lanes: replicas that are
    in different windows take batches of like rank in width, so that they wait little for each other. The last batch of
    the sequence has the most rows of all, since the last step of a course may have to be split.
    """

    layout: WindowLayout

    def batches_at(self, positions: Integers) -> Integers:
        """The numbers, in the layout, of the batches at these positions of the sequence: int64 `[n]`."""
        return self._sequence.numbers[positions]

    def visits_at(self, positions: Integers) -> Integers:
        """Which of these batches are read together, a lane's part of a window: numbers of visits, int64 `[n]`."""
        return self._sequence.visits[positions]

    @cached_property
    def _sequence(self) -> _Sequence:
        layout, total = self.layout, len(self.layout)
        order = self._order()
        sizes = layout.sizes[order]
        # In the order of reading: the window of each batch, and the batches of each window as the layout has them.
        window = np.repeat(np.arange(len(order)), sizes)
        first: Integers = (layout.sizes.cumsum() - layout.sizes)[order]
        numbers: Integers = np.arange(total) + np.repeat(first - (sizes.cumsum() - sizes), sizes)
        lane, position = self._deal(total)
        if layout.options.shuffle:
            drawn = stream_keys(self._key(SLOTS), position // self.replicas)
            slots = np.lexsort((drawn, window))
            numbers[slots] = numbers.copy()
            self._put_last(numbers)
        visits = np.concatenate([[0], ((np.diff(window) != 0) | (np.diff(lane) != 0)).cumsum()])
        where = np.empty_like(position)
        where[position] = np.arange(total)
        return _Sequence(numbers[where], visits[where])

    def _order(self) -> Integers:
        """The order of windows; the one that holds the batch of most rows comes last, where steps are split."""
        options, count = self.layout.options, len(self.layout.sizes)
        if not options.shuffle:
            return np.arange(count)
        shuffled = count if options.drop_last else count - 1
        order = np.arange(count)
        order[:shuffled] = permute(order[:shuffled], shuffled, self._key(WINDOWS))
        return order

    def _deal(self, total: int) -> tuple[Integers, Integers]:
        """Cut the order of reading into lanes: of each batch its lane, and its position in the sequence."""
        lanes = self.replicas * self.layout.interleave
        short, longer = divmod(total, lanes)
        # The last lanes take one more, or the last batch read would not be the last of the sequence.
        lengths = short + (np.arange(lanes) >= lanes - longer)
        lane = np.repeat(np.arange(lanes), lengths)
        turn = np.arange(total) - np.repeat(lengths.cumsum() - lengths, lengths)
        return lane, turn * lanes + (lane + longer) % lanes

    def _put_last(self, numbers: Integers) -> None:
        if not self.layout.options.drop_last:
            greatest = numbers.argmax()
            numbers[greatest], numbers[-1] = numbers[-1], numbers[greatest]


@dataclass(frozen=True, eq=False)
class WindowCourse(Course):
    """What is left of such an epoch, as any number of replicas take it."""

    epoch: WindowEpoch

    def visits_of(self, numbers: Integers) -> Integers:
        """Which of these batches of the course are read together: numbers of visits, int64 `[n]`.

        Args:
            numbers: int64 `[n]`, each in `range(course.batches)`; those of a split step are a visit by themselves.
        """
        visits = np.full(len(numbers), SPLIT)
        whole = numbers < self.whole * self.replicas
        visits[whole] = self.epoch.visits_at(self.taken + numbers[whole])
        return visits


def lay_out_windows(lengths: IndexedLengths, starts: Integers, options: Options, interleave: int = 1) -> WindowLayout:
    """Cut a corpus into windows, and each window into batches, once for all epochs.

    Args:
        lengths: of all samples, in the order of their shards.
        starts: the place of each shard's first sample, then N: int64 `[shards + 1]`.
        options: the planner's; `window` is how many samples a window has at least, unless it is all there are.
        interleave: lanes of each replica.

    Raises:
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: No batch is left to plan.
    """
    corpus = rank_lengths(lengths, options)
    owner: Integers = np.searchsorted(starts, corpus.order, side="right") - 1
    windows = group_shards(np.bincount(owner, minlength=len(starts) - 1), options)
    # A window is planned as a corpus is, in windows of its own.
    options = replace(options, window=None)
    parts = _cut_parts(corpus, owner, windows, options)
    if options.shuffle:
        most = max(parts, key=lambda part: part.most_rows)
        parts.sort(key=lambda part: part is most)
    corpus = replace(corpus, order=np.concatenate([part.order for part in parts]))
    odd = WindowLayout(
        corpus,
        _joined(parts, [part.odd for part in parts]),
        options,
        tuple(part.shards for part in parts),
        np.array([count_batches(part.odd) for part in parts]),
        interleave,
    )
    layout = replace(odd, edges=_joined(parts, [part.even for part in parts]), odd=odd)
    if len(layout.edges) == 0 or len(layout) == 0:
        raise ValueError(
            f"no batch is left to plan: drop_last drops all {len(corpus)} samples, fewer in each window than "
            f"batch_size={options.batch_size}; lower batch_size, raise window, or keep the last batch"
        )
    return layout


def _joined(parts: Sequence[_Part], edges: Sequence[list[Edge]]) -> tuple[Edge, ...]:
    """The edges of all windows, each where its window begins in the order of all."""
    first = np.cumsum([0, *(len(part.order) for part in parts)]).tolist()
    return tuple(
        edge._replace(first=edge.first + start) for start, own in zip(first, edges, strict=False) for edge in own
    )


def group_shards(samples: Integers, options: Options) -> list[tuple[int, ...]]:
    """The shards of each window: runs of shuffled shards, each run as long as the wanted samples need.

    Args:
        samples: of each shard that are planned, int64 `[shards]`; a shard of none is in no window.
        options: `window`, `seed` and `shuffle`.
    """
    least = options.window or WINDOW
    shards: Integers = np.flatnonzero(samples)
    if options.shuffle:
        shards = shards[permute(np.arange(len(shards)), len(shards), derive_key(options.seed, SHARDS))]
    runs: list[list[int]] = []
    held = least
    for shard in shards.tolist():
        if held >= least:
            runs.append([])
            held = 0
        runs[-1].append(shard)
        held += int(samples[shard])
    if len(runs) > 1 and 2 * held < least:
        # A last run of less than half a window would pad much.
        runs[-2:] = [runs[-2] + runs[-1]]
    return [tuple(run) for run in runs]


def _cut_parts(corpus: Corpus, owner: Integers, windows: Sequence[tuple[int, ...]], options: Options) -> list[_Part]:
    window_of = np.zeros(owner.max() + 1, np.int64)
    for number, shards in enumerate(windows):
        window_of[list(shards)] = number
    window = window_of[owner]
    # Stable, so that each window's samples stay longest first, and those that alone exceed the budget before them.
    order = corpus.order[np.argsort(window, kind="stable")]
    ends = np.bincount(window, minlength=len(windows)).cumsum()
    alone = np.bincount(window[: corpus.alone], minlength=len(windows)).tolist()
    parts = []
    for shards, samples, count in zip(windows, np.split(order, ends[:-1]), alone, strict=True):
        turns = cut_turns(replace(corpus, order=samples, alone=count), options)
        parts.append(_Part(shards, samples, *(in_order(edges, options) for edges in turns)))
    return parts
