"""WindowTable: the batches of a corpus in shards, which is read in order, some shards at a time.

A *window* is a run of shuffled shards whose samples are planned together. Each epoch groups the shards into windows of
its own (a *grouping*), and shuffles the order of windows, the samples in a batch and the batches of a window; all
epochs have equally many batches.

Twelve samples in four shards of three, at least six samples in a window: two windows of two shards. Two epochs, the
shards of each window and the lengths in each batch of the first window:

>>> class Index:
...     lengths, fingerprint = np.array([6, 5, 4, 6, 5, 4, 3, 2, 1, 3, 2, 1]), "of these lengths"
>>> first = make_window_table(Index(), np.arange(0, 13, 3), Options(max_tokens=12, window=6))
>>> for epoch in (0, 1):
...     table = first.for_epoch(epoch, 1)
...     samples, rows = table.batch_samples(np.arange(table.window_sizes[0]), key=epoch)
...     table.windows, [Index.lengths[batch].tolist() for batch in np.split(samples, rows.cumsum()[:-1])]
(((3, 1), (0, 2)), [[6, 2], [5, 1], [4, 3]])
(((3, 2), (1, 0)), [[2, 1], [3, 2], [3, 1]])
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Final, NamedTuple, Self, cast

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, draw_until, permute
from samplers.planning.options import Options
from samplers.planning.sorting import IndexArray, IndexedLengths, SortedLengths, sort_lengths
from samplers.planning.tables.batch_table import BatchTable
from samplers.planning.tables.buckets import (
    MOST_VARIANTS,
    Bucket,
    count_batches,
    count_windows,
    cut_buckets,
    predict_batches,
    sort_buckets,
)
from samplers.planning.tables.epoch_order import choose_variant
from samplers.planning.tables.epoch_table import Shape
from samplers.planning.tables.window_order import WindowOrder

# Default window: enough samples for batches of similar width.
DEFAULT_WINDOW: Final = 10_000
# Groupings of the shards, each of which some epochs use, and how many of them decide the number of batches of all.
GROUPINGS: Final = 16
COUNTED_GROUPINGS: Final = 4
MANY_WINDOWS: Final = 1 << 15
# Purpose of a key, next to those of `window_order`: shards among windows.
SHARDS: Final = 10


class PlannedWindow(NamedTuple):
    """A window: its shards, its samples, longest first, and its buckets, which begin at the window's first sample."""

    shards: tuple[int, ...]
    order: IndexArray
    buckets: list[Bucket]


@dataclass(frozen=True, eq=False)
class WindowTable(BatchTable):
    """The batches of all windows, window after window; in a window, ids of batches of one shape are adjacent.

    Attributes:
        windows: The shards of each window.
        window_sizes: Batches of each window, int64 `[windows]`.
        window_starts: Sorted index of each window's first sample, and last the number of samples: int64
            `[windows + 1]`.
        interleave: Lanes of each replica.
        groupings: Other windows of the same shards, with equally many batches; None if all epochs have the same.
        number: Number of this grouping.
    """

    windows: tuple[tuple[int, ...], ...]
    window_sizes: Integers
    window_starts: Integers
    interleave: int
    groupings: "Groupings | None" = field(default=None, kw_only=True)
    number: int = field(default=0, kw_only=True)

    def __len__(self) -> int:
        """Batches in an epoch, before any is split among replicas."""
        return int(self.window_sizes.sum())

    def for_epoch(self, epoch: int, num_replicas: int) -> Self:
        """The table of an epoch that this many replicas begin: these windows, or others with equally many batches."""
        if self.groupings is None:
            return self
        number = choose_variant(epoch, GROUPINGS, self.options.seed)
        table = self if number == self.number else self.groupings.find_table(number, len(self))
        return cast(Self, table) if table is not None and table.is_shared(epoch, num_replicas) else self

    def order(self, epoch: int, num_replicas: int) -> WindowOrder:
        """The order of this table's batches in an epoch that this many replicas begin."""
        return WindowOrder(
            len(self),
            self.options,
            epoch,
            num_replicas,
            window_sizes=self.window_sizes,
            interleave=self.interleave,
            can_share=partial(self._can_share_batches, num_replicas),
            # This grouping replaces others, so that it must find an order in every epoch.
            # The first two epochs are trials in any case, and begin sooner if the others are not looked for.
            patient=self.groupings is not None and epoch > 1 and epoch not in self.trial_epochs,
        )

    def _can_share_batches(self, num_replicas: int, batch_ids: Integers) -> bool:
        """Whether each replica gets a row of the last step, if these are the last batches of an epoch."""
        return self.can_share_last_step(self.batch_rows(batch_ids), num_replicas)

    @cached_property
    def trial_epochs(self) -> Iterable[int]:
        """Epochs that show whether replicas can share the last step of every epoch."""
        # Among them one of the first grouping, which replaces those that cannot be shared.
        return {0, 1, first_epoch(self.number, self.options.seed)}

    def is_shared(self, epoch: int, num_replicas: int) -> bool:
        """Whether an epoch of these windows ends with a row for each of this many replicas."""
        if self.has_whole_steps(num_replicas):
            return True
        last = self.order(epoch, num_replicas).batch_at_position(np.arange(len(self))[-num_replicas:])
        return self._can_share_batches(num_replicas, last)

    @cached_property
    def shapes(self) -> list[Shape]:
        """The shapes that hold every batch of any epoch, without repetition."""
        tables = {choose_variant(epoch, GROUPINGS, self.options.seed): epoch for epoch in range(GROUPINGS)}
        others = [self.for_epoch(epoch, 1) for epoch in tables.values()]
        return list(dict.fromkeys(shape for table in (self, *others) for shape in table.bucket_shapes))

    def _digested_text(self) -> str:
        # Positions carry the digest of this text, so that it must never change.
        return repr((super()._digested_text(), self.windows, self.interleave))

    @property
    def other_windows(self) -> int | None:
        """Samples of a window at least; None where all epochs have the same windows."""
        return None if self.groupings is None else min(self.groupings.window, self.planned)

    @property
    def _sections(self) -> Integers:
        """The windows: samples of one window are read together, and are not exchanged with others."""
        return self.window_starts


def first_epoch(number: int, seed: int) -> int:
    """The first epoch that has this grouping."""
    return [choose_variant(epoch, GROUPINGS, seed) for epoch in range(GROUPINGS)].index(number)


@dataclass(frozen=True, eq=False)
class Groupings:
    """The ways to group a corpus' shards into windows.

    Attributes:
        sorted_lengths: The samples.
        shard_of: The shard of each sample, in their sorted order, int64 `[n]`.
        options: The planner's.
        window: Samples of a window at least.
        interleave: Lanes of each replica.
    """

    sorted_lengths: SortedLengths
    shard_of: Integers
    options: Options
    window: int
    interleave: int

    def find_table(self, number: int, batches: int) -> WindowTable | None:
        """A grouping with this many batches, if one is found; the last two are kept."""
        if number not in self._tables:
            while len(self._tables) > 1:
                del self._tables[next(iter(self._tables))]
            self._tables[number] = draw_until(
                lambda attempt: self._draw(number, attempt, batches), lambda table: len(table) == batches
            )
        return self._tables[number]

    def first_table(self) -> WindowTable:
        """The grouping whose number of batches all others must have.

        Raises:
            ValueError: No batch is left to plan.
        """
        drawn = self._group(range(COUNTED_GROUPINGS if self.options.shuffle else 1), attempt=0)
        counts = [grouping.batches for grouping in drawn]
        # If `drop_last` drops the short batches, no grouping can have more: the usual number is found most often.
        batches = Counter(counts).most_common(1)[0][0] if self._drops_short else max(counts)
        number = counts.index(batches)
        if batches == 0:
            raise ValueError(
                f"no batch is left to plan: drop_last drops all {len(self.sorted_lengths)} samples, fewer in each "
                f"window than batch_size={self.options.batch_size}; lower batch_size, raise window, or keep the last "
                "batch"
            )
        table = self._join(drawn[number].windows())
        return replace(table, groupings=self, number=number) if self.options.shuffle else table

    @cached_property
    def samples(self) -> Integers:
        """Planned samples of each shard, int64 `[shards]`."""
        return np.bincount(self.shard_of, minlength=1)

    @cached_property
    def _tables(self) -> dict[int, WindowTable | None]:
        """Groupings that were found, by number."""
        return {}

    @property
    def _drops_short(self) -> bool:
        """Whether each window drops the batch that `batch_size` leaves short."""
        return self.options.drop_last and self.options.batch_size is not None

    def _draw(self, number: int, attempt: int, batches: int) -> WindowTable | None:
        """One attempt at a grouping with this many batches; None if it has others."""
        (grouping,) = self._group([number], attempt)
        extra = batches - grouping.batches
        if extra < 0 or (extra and self._drops_short):
            return None
        table = self._join(grouping.windows(extra))
        return table if len(table) == batches else None

    def _group(self, numbers: Sequence[int], attempt: int) -> "list[Grouping]":
        """An attempt at each of these groupings; where shards stay in their order, there is one."""
        keys = [derive_key(self.options.seed, SHARDS, number, attempt) for number in numbers]
        drawn = group_shards(self.samples, self.window, keys if self.options.shuffle else None)
        return [Grouping(self, number, shards) for number, shards in zip(numbers, drawn, strict=True)]

    def _join(self, windows: list[PlannedWindow]) -> WindowTable:
        """Put the windows one after the other; the one that has the batch with the most rows comes last."""
        if self.options.shuffle:
            longest = max(windows, key=lambda window: window.buckets[-1].rows if window.buckets else 0)
            windows = [*(window for window in windows if window is not longest), longest]
        first = np.cumsum([0, *(len(window.order) for window in windows)]).tolist()
        buckets: list[Bucket] = []
        for start, window in zip(first, windows, strict=False):
            # Column by column, in half of the time: there is a bucket for every second batch.
            firsts, *others = zip(*window.buckets, strict=True) if window.buckets else ((),)
            buckets += map(Bucket._make, zip(map(start.__add__, firsts), *others, strict=True))
        return WindowTable(
            replace(self.sorted_lengths, order=np.concatenate([window.order for window in windows])),
            tuple(buckets),
            self.options,
            tuple(window.shards for window in windows),
            np.array([count_batches(window.buckets) for window in windows]),
            np.array(first),
            self.interleave,
        )


@dataclass(frozen=True, eq=False)
class Grouping:
    """One attempt at a grouping, whose windows are planned when they are asked for, each once.

    Attributes:
        groupings: All groupings.
        number: Number of the grouping.
        shards: The shards of each window.
    """

    groupings: Groupings
    number: int
    shards: list[tuple[int, ...]]

    @cached_property
    def batches(self) -> int:
        """Batches of all windows, which need not be planned where `batch_size` alone decides."""
        samples = [int(self.groupings.samples[list(shards)].sum()) for shards in self.shards]
        counts = [predict_batches(count, self.groupings.options) for count in samples]
        return sum(
            count_batches(self._plan(window).buckets) if count is None else count for window, count in enumerate(counts)
        )

    def windows(self, extra: int = 0) -> list[PlannedWindow]:
        """The windows, with `extra` more batches than needed, spread over their last buckets."""
        # Two batches more in five windows: 0, 0, 1, 0 and 1.
        extras = np.diff(np.arange(len(self.shards) + 1) * extra // len(self.shards)).tolist()
        return [self._plan(window, more) for window, more in enumerate(extras)]

    def _plan(self, window: int, extra: int = 0) -> PlannedWindow:
        """A window, cut into buckets as a corpus is; the borders are shifted from grouping to grouping."""
        if (window, extra) not in self._planned:
            members, options = self._members[window], self.groupings.options
            windows = count_windows(members, options)
            variants = min(MOST_VARIANTS, windows)
            shift = windows * (self.number % variants) // variants
            buckets = cut_buckets(members, options, windows, shift=shift, extra=extra)
            planned = PlannedWindow(self.shards[window], members.order, sort_buckets(buckets, options))
            self._planned[window, extra] = planned
        return self._planned[window, extra]

    @cached_property
    def _planned(self) -> dict[tuple[int, int], PlannedWindow]:
        """Windows that are planned, by number and batches that they have beyond those that they need."""
        return {}

    @cached_property
    def _members(self) -> list[SortedLengths]:
        """The samples of each window."""
        whole, windows = self.groupings.sorted_lengths, len(self.shards)
        # NumPy sorts integers of up to 16 bits without comparing them.
        window_of_shard = np.zeros(len(self.groupings.samples), np.int16 if windows <= MANY_WINDOWS else np.int32)
        for window, shards in enumerate(self.shards):
            window_of_shard[list(shards)] = window
        # A stable sort: each window's samples stay longest first, with those that exceed the budget alone before them.
        window_of = window_of_shard[self.groupings.shard_of]
        order = whole.order[np.argsort(window_of, kind="stable")]
        ends = np.bincount(window_of, minlength=windows).cumsum()
        overlong = np.bincount(window_of[: whole.overlong_alone], minlength=windows).tolist()
        return [
            replace(whole, order=part, overlong_alone=count)
            for part, count in zip(np.split(order, ends[:-1]), overlong, strict=True)
        ]


def make_window_table(
    lengths: IndexedLengths, shard_starts: Integers, options: Options, interleave: int = 1
) -> WindowTable:
    """Cut a corpus in shards into windows, and each window into batches; every epoch has windows of its own.

    Args:
        lengths: Lengths of all samples, in the order of their shards.
        shard_starts: Index of each shard's first sample, then N: int64 `[shards + 1]`.
        options: The planner's; `window` is how many samples a window has at least, unless the corpus is smaller.
        interleave: Lanes of each replica.

    Raises:
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: No batch is left to plan.
    """
    sorted_lengths = sort_lengths(lengths, options)
    shard_of: Integers = np.searchsorted(shard_starts, sorted_lengths.order, side="right") - 1
    # Each window is planned as a corpus is, with the default number of windows inside.
    inner = replace(options, window=None)
    return Groupings(sorted_lengths, shard_of, inner, options.window or DEFAULT_WINDOW, interleave).first_table()


def group_shards(samples: Integers, window: int, keys: Sequence[int] | None) -> list[list[tuple[int, ...]]]:
    """The shards of each window, for each of several shuffles: runs of shards, each as long as the window needs.

    >>> group_shards(np.array([40, 70, 50, 0, 90]), window=100, keys=None)
    [[(0, 1), (2, 4)]]

    Args:
        samples: Planned samples of each shard, int64 `[shards]`; a shard with none is in no window.
        window: Samples of a window at least.
        keys: Keys of the shuffles; None leaves the shards in their order.
    """
    shards: Integers = np.flatnonzero(samples)
    if keys is None:
        return [_cut_runs(shards.tolist(), samples.tolist(), window)]
    # Of few shards, one shuffle takes about as long as four.
    indices, repeated = np.tile(np.arange(len(shards)), len(keys)), np.repeat(np.array(keys, np.uint64), len(shards))
    shuffled = shards[permute(indices, len(shards), repeated)].reshape(len(keys), -1)
    return [_cut_runs(order, samples.tolist(), window) for order in shuffled.tolist()]


def _cut_runs(shards: list[int], samples: list[int], window: int) -> list[tuple[int, ...]]:
    """Cut shards in an order into windows."""
    groups: list[list[int]] = []
    held = window
    for shard in shards:
        if held >= window:
            groups.append([])
            held = 0
        groups[-1].append(shard)
        held += samples[shard]
    if len(groups) > 1 and 2 * held < window:
        # A last window of less than half the size would have much padding.
        groups[-2:] = [groups[-2] + groups[-1]]
    return [tuple(group) for group in groups]
