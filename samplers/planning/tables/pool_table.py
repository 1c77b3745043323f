"""PoolTable: the batches of a small corpus, which is sorted again in each epoch.

Buckets mix little in a corpus of a few batches: half of it may be one bucket. Such a corpus is small enough to be
dealt again in each epoch. Its samples go at random to as many *pools* as it has windows; each pool is sorted by length
and cut into batches that are as full as the budget allows. The number of batches depends on the draw, so an epoch takes
the first draw that has no more batches than every epoch must have, and splits batches if it has fewer. With several
replicas, short batches would make replicas wait for each other: there a draw is cut again into batches with even shares
of the budget.

Twelve samples, two pools, batches of three rows: each pool of six is sorted, and the batches of two epochs, as
lengths:

>>> lengths = np.array([9, 8, 7, 6, 6, 5, 4, 3, 3, 2, 1, 1])
>>> table = choose_table(lengths, Options(batch_size=3, window=6))
>>> type(table).__name__, table.pools, len(table)
('PoolTable', 2, 4)
>>> for epoch in (0, 1):
...     samples, rows = table.for_epoch(epoch, 1).batch_samples(np.arange(4), key=0)
...     [lengths[batch].tolist() for batch in np.split(samples, rows.cumsum()[:-1])]
[[9, 7, 6], [8, 6, 4], [5, 3, 1], [3, 2, 1]]
[[9, 6, 4], [8, 7, 6], [5, 3, 3], [2, 1, 1]]
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Final, NamedTuple, Self, cast

import numpy as np

from samplers.planning.budget import Floats, Integers
from samplers.planning.keyed_shuffle import derive_key, draw_until, permute
from samplers.planning.options import Options
from samplers.planning.sorting import IndexArray, Lengths, SortedLengths, sort_lengths
from samplers.planning.tables.batch_table import BatchSizes, BatchTable
from samplers.planning.tables.buckets import (
    MANY_BATCHES,
    count_windows,
    cut_variants,
    estimate_batches,
    sort_buckets,
)
from samplers.planning.tables.epoch_table import KeptEpochs, Shape
from samplers.planning.tables.last_step import split_largest

# An epoch is sorted when its first batch is taken: some milliseconds.
MANY_SAMPLES: Final = 1 << 15
# Number of draws that decide how many batches every epoch has.
SAMPLED_DRAWS: Final = 8
# Shares of the budget are counted in 1024ths; this many 1024ths on either side of the smallest share are tried.
SHARE_UNITS: Final = 1 << 10
NEAR: Final = 12
# Batches at the end of each pool that are cut again together with those of the other pools.
TAIL: Final = 3
# Purpose of a key, next to those of `batch_table`.
POOLS: Final = 30


class EpochBatches(NamedTuple):
    """An epoch's batches: sample indices, one batch after the other, and the rows of each batch."""

    samples: IndexArray
    rows: Integers


class Pools(NamedTuple):
    """Samples in pools, and their batches.

    Attributes:
        members: Samples, pool after pool and longest first, as indices into those that may share a batch.
        ends: Where each pool ends.
        borders: Where each batch begins, and the end of the last.
    """

    members: Integers
    ends: list[int]
    borders: list[int]


@dataclass(frozen=True, eq=False)
class PoolTable(KeptEpochs, BatchTable):
    """The batches of a small corpus; ids of batches of one shape are adjacent; each epoch draws its batches.

    Attributes:
        pools: Number of pools.
        batches: Batches of every epoch.
        drawn: The batches of the epoch to which this table belongs; None before an epoch is chosen.
        is_predicted: Whether the number of batches is predicted, and not counted in a few draws.
    """

    pools: int = 2
    batches: int = 0
    drawn: EpochBatches | None = field(default=None, kw_only=True)
    is_predicted: bool = field(default=False, kw_only=True)

    def __len__(self) -> int:
        """Batches in an epoch, before any is split among replicas."""
        return self.batches

    def _make_epoch(self, epoch: int, num_replicas: int) -> Self:
        """The table of an epoch that this many replicas begin.

        Its batches are the first draw that has few enough batches, and whose last step the replicas can share.
        """
        # With batches that are too small for this many replicas, no draw can be shared.
        most = self.options.budget.max_rows(int(self._widths[-1]))
        hopeless = not self.can_share_last_step(np.full(self.batches, most), num_replicas)
        drawn = draw_until(
            partial(self._draw, epoch, num_replicas),
            lambda batches: hopeless or self.can_share_last_step(batches.rows, num_replicas),
            patient=epoch not in self.trial_epochs,
        )
        if drawn is None:
            in_turn = self.is_predicted and not self.full_rows
            usual = self._deal_in_turn() if in_turn else min(self._sample_draws(), key=self._count)
            drawn = self._finish(usual, num_replicas)
        return replace(self, drawn=drawn)

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that hold every batch of any epoch, without repetition."""
        return [(rows, (width,)) for rows, width in self._row_limits()]

    def _row_limits(self) -> list[tuple[int, int]]:
        """Rows and width of each shape."""
        samples = len(self.sorted_lengths) - self.sorted_lengths.overlong_alone
        overlong = self._width_at(np.arange(self.sorted_lengths.overlong_alone))
        single = dict.fromkeys((1, width) for width in overlong.tolist())
        most = {width: min(samples, self.options.budget.max_rows(width)) for width in np.unique(self._widths).tolist()}
        return [*single, *((rows, width) for width, rows in sorted(most.items(), reverse=True))]

    @property
    def last_dropped(self) -> int:
        """Samples of the batch that `batch_size` leaves short and `drop_last` drops; others in each epoch."""
        rows = self.full_rows
        return len(self._widths) % rows if rows and self.options.drop_last else 0

    def _digested_text(self) -> str:
        # Positions carry the digest of this text, so that it must never change.
        return repr((self.pools, self.batches, self._row_limits(), self.options.drop_last))

    def batch_rows(self, batch_ids: Integers) -> Integers:
        """Rows of these batches: int64 `[n]`."""
        return self._epoch_batches.rows[batch_ids]

    def batch_samples(self, batch_ids: Integers, key: int) -> tuple[IndexArray, Integers]:
        """The samples of these batches, one batch after the other, each longest first.

        Args:
            batch_ids: int64 `[n]`, each in `range(len(table))`.
            key: Random key of the epoch, which has decided the draw already.

        Returns:
            Sample indices `[sum(rows)]`, and the rows of each batch, int64 `[n]`.
        """
        del key
        samples, all_rows = self._epoch_batches
        rows = all_rows[batch_ids]
        return samples[concatenate_ranges((all_rows.cumsum() - all_rows)[batch_ids], rows)], rows

    def shape_fill(self, sizes: BatchSizes) -> Floats:
        """Rows divided by the most rows of a shape that is wide enough, float64 `[n]`: above 1 if no shape holds it."""
        most = [max(1, self.options.budget.max_rows(width)) for width in sizes.widths[:, 0].tolist()]
        fill: Floats = sizes.rows / np.array(most)
        return fill

    @property
    def _epoch_batches(self) -> EpochBatches:
        """The batches of this table's epoch; those of epoch 0, if it belongs to none."""
        return cast(EpochBatches, self.for_epoch(0, 1).drawn if self.drawn is None else self.drawn)

    @cached_property
    def _sort_keys(self) -> Integers:
        """What samples are sorted by, longest first, without those that exceed the budget alone: int64 `[n]`."""
        lengths = self.sorted_lengths.lengths_between(self.sorted_lengths.overlong_alone, len(self.sorted_lengths))
        return self._exchange_widths(lengths)[:, 0]

    @cached_property
    def _sort_ranks(self) -> Integers:
        """The rank of each sample among the different sort keys, the longest first: int64 `[n]`, each below n."""
        return np.unique(-self._sort_keys, return_inverse=True)[1].reshape(-1)

    @cached_property
    def _widths(self) -> Integers:
        """The padded widths of these samples: int64 `[n]`."""
        return np.maximum(self._sort_keys, 1)

    @property
    def full_rows(self) -> int:
        """Rows of every batch but one, if `batch_size` alone decides them; else 0."""
        size = self.options.batch_size
        return size if size is not None and self.options.budget.max_rows(int(self._widths[0])) == size else 0

    @property
    def saves_padding(self) -> bool:
        """Whether widths differ and need more than one batch: pools would make two of one full batch."""
        widest, narrowest = int(self._widths[0]), int(self._widths[-1])
        return narrowest < widest and self.options.budget.max_rows(widest) < len(self._widths)

    def _draw(self, epoch: int, num_replicas: int, attempt: int) -> EpochBatches | None:
        """One attempt; None if it has too many batches."""
        pools = self._deal(derive_key(self.options.seed, epoch, POOLS, attempt))
        return self._finish(pools, num_replicas) if self._count(pools) <= self.batches else None

    def _sample_draws(self) -> Iterable[Pools]:
        """A few draws, the same for every seed."""
        return (self._deal(derive_key(POOLS, number)) for number in range(SAMPLED_DRAWS))

    def usual_batches(self) -> int:
        """How many batches draws have on average, rounded up; the same for every seed."""
        return -(-sum(map(self._count, self._sample_draws())) // SAMPLED_DRAWS)

    def predict_batches(self) -> int:
        """How many batches most draws have at most, without a draw; the same for every seed.

        Samples that are dealt in turn, in the order of their lengths, need hardly fewer than those of a draw. The last
        batch of a pool is as full as it happens to be: on average half a batch more is needed. For 96 corpora of 300
        to 6,000 samples it was the usual number of draws, or one more for a sixth of them; 88 to 100 % of draws had no
        more.
        """
        planned = len(self._widths) - self.last_dropped
        if self.full_rows:
            return -(-planned // self.full_rows) + self.sorted_lengths.overlong_alone
        pools = self._deal_in_turn()
        widths, needed = self._widths[pools.members], 0
        # In integers, in 1024ths of a batch, since a float's last bit may differ between machines.
        for first, end in pairwise(pools.borders):
            whole = end not in pools.ends
            limit = max(1, self.options.budget.max_rows(int(widths[first])))
            needed += SHARE_UNITS if whole else min(SHARE_UNITS, (end - first) * SHARE_UNITS // limit)
        needed += SHARE_UNITS * self.pools // 2
        return max(self._count(pools), -(-needed // SHARE_UNITS) + self.sorted_lengths.overlong_alone)

    def _deal_in_turn(self) -> Pools:
        """Deal the samples to pools in turn, longest first, and cut each pool into batches."""
        samples, borders = len(self._widths), [0]
        members = [np.arange(pool, samples, self.pools) for pool in range(self.pools)]
        ends = np.cumsum([len(each) for each in members]).tolist()
        widths = self._widths[np.concatenate(members)]
        for end in ends:
            borders += self._cut(widths, borders[-1], end, SHARE_UNITS)
        return Pools(np.concatenate(members), ends, borders)

    def _count(self, pools: Pools) -> int:
        """Batches of these pools, and of the samples that exceed the budget alone."""
        return len(pools.borders) - 1 + self.sorted_lengths.overlong_alone

    def _deal(self, key: int) -> Pools:
        """Deal the samples to pools, sort each pool, and cut it into batches."""
        samples, full_rows = len(self._widths), self.full_rows
        shuffled = permute(np.arange(samples), samples, key)
        planned = samples - self.last_dropped
        if full_rows:
            # Whole batches for each pool: 5 batches of 4 rows in 2 pools are 8 and 12 samples.
            ends = -(-planned // full_rows) * np.arange(1, self.pools + 1) // self.pools * full_rows
        else:
            ends = samples * np.arange(1, self.pools + 1) // self.pools
        ends = np.minimum(ends, planned)
        # Pool, length and shuffled index as the digits of one number: sorting numbers is faster than a lexsort.
        pools = np.searchsorted(ends, shuffled, side="right")
        keys = (pools * samples + self._sort_ranks) * samples + shuffled
        keys.sort()
        sample_at = np.empty_like(shuffled)
        sample_at[shuffled] = np.arange(samples)
        members = sample_at[keys[:planned] % samples]
        widths, borders = self._widths[members], [0]
        for end in ends.tolist():
            borders += self._cut(widths, borders[-1], end, SHARE_UNITS)
        return Pools(members, ends.tolist(), borders)

    def _cut(self, widths: Integers, first: int, end: int, share: int) -> list[int]:
        """The ends of batches cut from `first` to `end`, each with this share of the rows that fit.

        At three quarters of 5 rows, 3.75, batches have 3, 4, 4 and 4 rows, since fractions of a row are carried over.
        """
        ends, carry = [], 0
        while first < end:
            carry += self.options.budget.max_rows(int(widths[first])) * share
            rows = max(1, carry // SHARE_UNITS)
            carry = max(0, carry - rows * SHARE_UNITS)
            first = min(end, first + rows)
            ends.append(first)
        return ends

    def _even(self, pools: Pools) -> Pools:
        """Cut the pools again into as many batches as the epoch needs, with even shares of the budget.

        Otherwise the last batch of a pool is short, and the replicas of its step wait for those with a full batch. The
        last batches of all pools are cut again together, so that at most one batch of the epoch is short, and not by
        much.
        """
        widths, cuts, first = self._widths[pools.members], [], 0
        counts = np.diff(np.searchsorted(pools.borders, [0, *pools.ends])).tolist()
        lacking = self.batches - self._count(pools)
        for pool, (end, count) in enumerate(zip(pools.ends, counts, strict=True)):
            cuts.append([first, *self._cut_into(widths, first, end, count + (lacking + pool) // self.pools)])
            first = end
        heads = [cut[: max(1, len(cut) - TAIL)] for cut in cuts]
        tail = np.concatenate([np.arange(head[-1], end) for head, end in zip(heads, pools.ends, strict=True)])
        tail = tail[np.argsort(-self._sort_keys[pools.members[tail]], kind="stable")]
        head = [np.arange(start, head[-1]) for start, head in zip([0, *pools.ends], heads, strict=False)]
        members = pools.members[np.concatenate([*head, tail])]
        sizes = [size for head in heads for size in np.diff(head).tolist()]
        most = sum(map(len, cuts)) - sum(map(len, heads))
        ends = self._cut_into(self._widths[members], len(members) - len(tail), len(members), most)
        return Pools(members, pools.ends, [*np.cumsum([0, *sizes]).tolist(), *ends])

    def _cut_into(self, widths: Integers, first: int, end: int, most: int) -> list[int]:
        """The ends of batches with an even share, cut from `first` to `end`: `most` batches, if possible."""
        if first == end:
            # A pool of a corpus with fewer samples than pools.
            return []
        low, high = 0, SHARE_UNITS
        while high - low > 1:
            middle = (low + high) // 2
            fits = len(self._cut(widths, first, end, middle)) <= most
            low, high = (low, middle) if fits else (middle, high)
        # Of the shares nearby, choose one whose last batch is as full as the others.
        near = range(max(1, high - NEAR), min(SHARE_UNITS, high + NEAR) + 1)
        cuts = [self._cut(widths, first, end, share) for share in near]
        fitting = [cut for cut in cuts if len(cut) <= most]
        return max(fitting, key=lambda cut: self._smallest_use(widths, [first, *cut]))

    def _smallest_use(self, widths: Integers, borders: list[int]) -> float:
        """The smallest share of the rows that fit in one of these batches."""
        return min(
            (end - first) / max(1, self.options.budget.max_rows(int(widths[first]))) for first, end in pairwise(borders)
        )

    def _finish(self, pools: Pools, num_replicas: int) -> EpochBatches:
        """Split the largest batches until there are enough, and sort all by rows; over-long samples come first."""
        if num_replicas > 1 and not self.full_rows:
            pools = self._even(pools)
        sizes = np.diff(pools.borders)
        parts = split_largest(sizes.tolist(), self.batches - self._count(pools))
        # A batch of 8 rows in 3 parts: 3, 3 and 2.
        # Of no batch, if all that is planned are over-long samples.
        counts = np.array(parts, np.int64)
        piece = concatenate_ranges(np.zeros_like(counts), counts)
        whole, part = np.repeat(sizes, counts), np.repeat(counts, counts)
        rows: Integers = whole // part + (piece < whole % part)
        starts = rows.cumsum() - rows
        by_rows = np.lexsort([-self._widths[pools.members[starts]], rows])
        starts, rows = starts[by_rows], rows[by_rows]
        overlong = self.sorted_lengths.overlong_alone
        samples: IndexArray = self.sorted_lengths.order[overlong + pools.members[concatenate_ranges(starts, rows)]]
        if self._exchanges_lengths:
            samples = self._sort_batches(samples, rows)
        return EpochBatches(
            np.concatenate([self.sorted_lengths.order[:overlong], samples]),
            np.concatenate([np.ones(overlong, np.int64), rows]),
        )


def concatenate_ranges(starts: Integers, counts: Integers) -> Integers:
    """The integers from each start on, as many as its count: int64 `[sum(counts)]`."""
    within: Integers = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(starts, counts) + within


def choose_table(lengths: Lengths, options: Options, *, predicts: bool = False) -> BatchTable:
    """Lengths to the batches of any epoch: a `PoolTable` for a small corpus, else a `BatchTable`.

    Args:
        lengths: Integers `[N]` or `[N, K]`, or an index that holds them.
        options: The planner's.
        predicts: Whether a `PoolTable` predicts its number of batches, in a fraction of the time that draws take.

    Raises:
        TypeError: Lengths or indices are not integers.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: Lengths have the wrong shape, or no batch is left to plan.
    """
    sorted_lengths = sort_lengths(lengths, options)
    small = make_pool_table(sorted_lengths, options, predicts=predicts)
    if small is not None:
        return small
    first, *others = (tuple(sort_buckets(buckets, options)) for buckets in cut_variants(sorted_lengths, options))
    variants = tuple(BatchTable(sorted_lengths, buckets, options) for buckets in others)
    table = BatchTable(sorted_lengths, first, options, variants=variants)
    if not first or len(table) == 0:
        raise ValueError(
            f"no batch is left to plan: drop_last drops all {len(sorted_lengths)} samples, fewer than "
            f"batch_size={options.batch_size}; lower batch_size or keep the last batch"
        )
    return table


def make_pool_table(sorted_lengths: SortedLengths, options: Options, *, predicts: bool = False) -> PoolTable | None:
    """The table of a small corpus; None if it is large, has several fields, or real tokens count."""
    if not options.shuffle or sorted_lengths.fields > 1 or options.count_tokens == "real":
        return None
    if not 0 < len(sorted_lengths) - sorted_lengths.overlong_alone <= MANY_SAMPLES:
        return None
    batches = estimate_batches(sorted_lengths, options)
    windows = count_windows(sorted_lengths, options, batches)
    table = PoolTable(sorted_lengths, (), options, pools=windows)
    # Batches of a fixed size are dealt whole, and each pool needs one. By default there are two pools. They pad less
    # than buckets, however few batches there are: 100 samples in three budgets of tokens 32 %, where buckets pad 42 %.
    few = 1 if options.window is None and table.saves_padding else 2 * windows
    fewest = windows if table.full_rows else few
    if not windows > 1 or not fewest <= batches < MANY_BATCHES:
        return None
    if options.drop_last and options.batch_size is not None and not table.full_rows:
        # The draw would decide which batches `batch_size` leaves short.
        return None
    if predicts:
        return replace(table, batches=table.predict_batches(), is_predicted=True)
    return replace(table, batches=table.usual_batches())
