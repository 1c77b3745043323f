"""Shards to windows to batches: the plan of a corpus that is read in order, a run of shards at a time.

A window is a run of shuffled shards whose samples are planned together. Every epoch has windows of its own, the order
of which, what is in a batch and the order of a window's batches are decided by the epoch as well; all epochs have as
many batches. Windows are dealt to lanes, each a contiguous part of the reading order: whoever reads one lane reads a
window, then the next.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final, NamedTuple, Self, cast

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, permute, stream_keys
from samplers.planning.options import Options
from samplers.planning.schedule import Course, Epoch
from samplers.planning.sorting import Corpus, IndexedLengths, Places, rank_lengths
from samplers.planning.tables.batch_table import Layout, Shape, in_order, turn_of
from samplers.planning.tables.buckets import MOST_TURNS, Edge, count_batches, count_windows, cut_edges

# A window holds at least so many samples where no number is given: enough batches of a usual size to be even in width.
WINDOW: Final = 10_000
# Ways to group the shards, which epochs take in turn; of how many the batches are counted, to have as many in all; and
# how many draws each may make to have no more.
GROUPINGS: Final = 16
COUNTED: Final = 4
TRIED: Final = 32
# By so many times more draws than the first epochs do the others look for a last step that replicas can share.
PATIENCE: Final = 32
# What a key is for, next to the purposes of `schedule`: shards among windows, windows and batches in an epoch.
SHARDS, WINDOWS, SLOTS = range(10, 13)
# The visit of a batch that was split among replicas.
SPLIT: Final = -1


class _Part(NamedTuple):
    """A window: its shards, its samples, longest first, and its edges, which begin at the window's first sample."""

    shards: tuple[int, ...]
    order: Places
    edges: list[Edge]


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
        starts: where the samples of each window begin in the order, and last their number: int64 `[windows + 1]`.
        interleave: lanes of each replica.
        groupings: other windows of the same shards, with as many batches; None where epochs have the same.
        number: of this grouping.
    """

    windows: tuple[tuple[int, ...], ...]
    sizes: Integers
    starts: Integers
    interleave: int
    groupings: "Groupings | None" = field(default=None, kw_only=True)
    number: int = field(default=0, kw_only=True)

    def of_epoch(self, epoch: int, replicas: int) -> Self:
        """The layout of an epoch that so many replicas begin: these windows or others of as many batches."""
        if self.groupings is None:
            return self
        number = turn_of(epoch, GROUPINGS, self.options.seed)
        found = self if number == self.number else self.groupings.layout_of(number, len(self))
        return cast(Self, found) if found is not None and found.is_shared(epoch, replicas) else self

    @property
    def trials(self) -> Iterable[int]:
        """Epochs that show whether replicas can share the last step of every epoch."""
        # Those of the first grouping among them, which stands in for others.
        own = [turn_of(epoch, GROUPINGS, self.options.seed) for epoch in range(GROUPINGS)].index(self.number)
        return {0, 1, own}

    def is_shared(self, epoch: int, replicas: int) -> bool:
        """Whether an epoch of these windows ends with a row for each of so many replicas."""
        if len(self) % replicas == 0 or self.options.drop_last:
            return True
        last = WindowEpoch(self, epoch, replicas).batches_at(np.arange(len(self))[-replicas:])
        return self.shares(self.rows_of(last), replicas)

    @cached_property
    def shapes(self) -> list[Shape]:
        """The closed list of (rows, width) that batches have at most, in any epoch, without repetition."""
        epochs = {turn_of(epoch, GROUPINGS, self.options.seed): self.of_epoch(epoch, 1) for epoch in range(GROUPINGS)}
        return list(dict.fromkeys(shape for layout in (self, *epochs.values()) for shape in layout.own_shapes))

    @property
    def _decided(self) -> str:
        return repr((super()._decided, self.windows, self.interleave))

    @property
    def _regions(self) -> Integers:
        """The windows: what is in one is read together."""
        return self.starts


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
        """The first draw whose last step the replicas can share."""
        layout, first = self.layout, self._draw(0)
        # The windows that stand in for others have passed the trials: one of more draws is all but sure to do.
        stands_in = layout.groupings is not None and self.epoch not in layout.trials
        for turn in range(PATIENCE * TRIED if stands_in else TRIED):
            drawn = first if turn == 0 else self._draw(turn)
            if not layout.options.shuffle or layout.shares(
                layout.rows_of(drawn.numbers[-self.replicas :]), self.replicas
            ):
                return drawn
        return first

    def _draw(self, turn: int) -> _Sequence:
        layout, total = self.layout, len(self.layout)
        order = self._order(turn)
        sizes = layout.sizes[order]
        # In the order of reading: the window of each batch, and the batches of each window as the layout has them.
        window = np.repeat(np.arange(len(order)), sizes)
        first: Integers = (layout.sizes.cumsum() - layout.sizes)[order]
        numbers: Integers = np.arange(total) + np.repeat(first - (sizes.cumsum() - sizes), sizes)
        lane, position = self._deal(total)
        if layout.options.shuffle:
            drawn = stream_keys(self._turn_key(SLOTS, turn), position // self.replicas)
            slots = np.lexsort((drawn, window))
            numbers[slots] = numbers.copy()
            self._put_last(numbers)
        visits = np.concatenate([[0], ((np.diff(window) != 0) | (np.diff(lane) != 0)).cumsum()])
        where = np.empty_like(position)
        where[position] = np.arange(total)
        return _Sequence(numbers[where], visits[where])

    def _turn_key(self, purpose: int, turn: int) -> int:
        return derive_key(self._key(purpose), turn) if turn else self._key(purpose)

    def _order(self, turn: int) -> Integers:
        """The order of windows; the one that holds the batch of most rows comes last, where steps are split."""
        options, count = self.layout.options, len(self.layout.sizes)
        if not options.shuffle:
            return np.arange(count)
        shuffled = count if options.drop_last else count - 1
        order = np.arange(count)
        order[:shuffled] = permute(order[:shuffled], shuffled, self._turn_key(WINDOWS, turn))
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


@dataclass(frozen=True, eq=False)
class Groupings:
    """The ways to group a corpus' shards into windows.

    Attributes:
        corpus: the samples, longest first.
        owner: the shard of each of them, int64 `[n]`.
        options: the planner's.
        window: samples of a window at least.
        interleave: lanes of each replica.
    """

    corpus: Corpus
    owner: Integers
    options: Options
    window: int
    interleave: int

    def layout_of(self, number: int, batches: int) -> WindowLayout | None:
        """A grouping with so many batches, if one is found."""
        if number not in self._known:
            while len(self._known) > 1:
                del self._known[next(iter(self._known))]
            self._known[number] = self._search(number, batches)
        return self._known[number]

    def first(self) -> WindowLayout:
        """The grouping whose number of batches all others shall have.

        Raises:
            ValueError: No batch is left to plan.
        """
        drawn = [self._cut(number, 0) for number in range(COUNTED)] if self.options.shuffle else [self._cut(0, 0)]
        counts = [sum(count_batches(part.edges) for part in parts) for parts in drawn]
        # Where `drop_last` drops the short batches no grouping can have more: the usual number is the likeliest again.
        batches = Counter(counts).most_common(1)[0][0] if self._drops else max(counts)
        number = counts.index(batches)
        if batches == 0:
            raise ValueError(
                f"no batch is left to plan: drop_last drops all {len(self.corpus)} samples, fewer in each window than "
                f"batch_size={self.options.batch_size}; lower batch_size, raise window, or keep the last batch"
            )
        layout = self._join(drawn[number])
        return replace(layout, groupings=self, number=number) if self.options.shuffle else layout

    @cached_property
    def _known(self) -> dict[int, WindowLayout | None]:
        return {}

    @property
    def _drops(self) -> bool:
        return self.options.drop_last and self.options.batch_size is not None

    def _search(self, number: int, batches: int) -> WindowLayout | None:
        for turn in range(TRIED):
            parts = self._cut(number, turn)
            more = batches - sum(count_batches(part.edges) for part in parts)
            if more > 0 and not self._drops:
                parts = self._cut(number, turn, more)
                more = batches - sum(count_batches(part.edges) for part in parts)
            if more == 0:
                return self._join(parts)
        return None

    def _cut(self, number: int, turn: int, more: int = 0) -> list[_Part]:
        """The windows of a grouping, and so many batches more than they need, dealt out among their last edges."""
        samples = np.bincount(self.owner, minlength=1)
        windows = group_shards(samples, self.window, self._key(number, turn))
        window_of = np.zeros(len(samples), np.int32)
        for place, shards in enumerate(windows):
            window_of[list(shards)] = place
        # Stable, so that each window's samples stay longest first, and those that alone exceed the budget before them.
        window = window_of[self.owner]
        order = self.corpus.order[np.argsort(window, kind="stable")]
        ends = np.bincount(window, minlength=len(windows)).cumsum()
        alone = np.bincount(window[: self.corpus.alone], minlength=len(windows)).tolist()
        extra = np.diff(np.arange(len(windows) + 1) * more // len(windows)).tolist()
        parts = []
        for shards, own, count, added in zip(windows, np.split(order, ends[:-1]), alone, extra, strict=True):
            corpus = replace(self.corpus, order=own, alone=count)
            dealt = count_windows(corpus, self.options)
            turns = min(MOST_TURNS, dealt)
            edges = cut_edges(corpus, self.options, dealt, shift=dealt * (number % turns) // turns, more=added)
            parts.append(_Part(shards, own, in_order(edges, self.options)))
        return parts

    def _key(self, number: int, turn: int) -> int | None:
        return derive_key(self.options.seed, SHARDS, number, turn) if self.options.shuffle else None

    def _join(self, parts: list[_Part]) -> WindowLayout:
        """Put the windows one after the other; the one with the batch of most rows last."""
        if self.options.shuffle:
            most = max(parts, key=lambda part: part.edges[-1].rows if part.edges else 0)
            parts = [*(part for part in parts if part is not most), most]
        first = np.cumsum([0, *(len(part.order) for part in parts)]).tolist()
        edges = [
            edge._replace(first=edge.first + start)
            for start, part in zip(first, parts, strict=False)
            for edge in part.edges
        ]
        return WindowLayout(
            replace(self.corpus, order=np.concatenate([part.order for part in parts])),
            tuple(edges),
            self.options,
            tuple(part.shards for part in parts),
            np.array([count_batches(part.edges) for part in parts]),
            np.array(first),
            self.interleave,
        )


def lay_out_windows(lengths: IndexedLengths, starts: Integers, options: Options, interleave: int = 1) -> WindowLayout:
    """Cut a corpus into windows, and each window into batches; every epoch has windows of its own.

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
    # A window is planned as a corpus is, in windows of its own.
    within = replace(options, window=None)
    return Groupings(corpus, owner, within, options.window or WINDOW, interleave).first()


def group_shards(samples: Integers, window: int, key: int | None) -> list[tuple[int, ...]]:
    """The shards of each window: runs of shuffled shards, each run as long as the wanted samples need.

    Args:
        samples: of each shard that are planned, int64 `[shards]`; a shard of none is in no window.
        window: samples of a window at least.
        key: of the shuffle; None for shards in their order.
    """
    shards: Integers = np.flatnonzero(samples)
    if key is not None:
        shards = shards[permute(np.arange(len(shards)), len(shards), key)]
    runs: list[list[int]] = []
    held = window
    for shard in shards.tolist():
        if held >= window:
            runs.append([])
            held = 0
        runs[-1].append(shard)
        held += int(samples[shard])
    if len(runs) > 1 and 2 * held < window:
        # A last run of less than half a window would pad much.
        runs[-2:] = [runs[-2] + runs[-1]]
    return [tuple(run) for run in runs]
