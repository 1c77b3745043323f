"""BatchTable: which samples are in batch number i of an epoch.

The number of batches and their shapes are the same in every epoch; the samples in a batch change. Twelve samples, a
budget of 12 tokens, two windows. The first bucket has two batches of two rows; the second needs three batches for the
other eight samples, two of three rows and one of two. A batch takes one sample of every stratum of its bucket, and a
keyed bijection of the epoch decides which. The batches of two epochs, as lengths:

>>> from samplers.planning.sorting import sort_lengths
>>> from samplers.planning.tables.buckets import cut_buckets, sort_buckets
>>> lengths = np.array([6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1])
>>> options = Options(max_tokens=12, window=6)
>>> sorted_lengths = sort_lengths(lengths, options)
>>> buckets = sort_buckets(cut_buckets(sorted_lengths, options, windows=2), options)
>>> [(bucket.batches, bucket.rows, bucket.width) for bucket in buckets]
[(2, 2, (6,)), (3, 3, (4,))]
>>> table = BatchTable(sorted_lengths, tuple(buckets), options)
>>> for epoch in (0, 1):
...     samples, rows = table.batch_samples(np.arange(len(table)), key=epoch)
...     [lengths[batch].tolist() for batch in np.split(samples, rows.cumsum()[:-1])]
[[6, 5], [6, 5], [4, 2], [4, 2, 1], [3, 3, 1]]
[[6, 5], [6, 5], [4, 2], [4, 3, 1], [3, 2, 1]]
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt

from collate.widths import padded_widths
from samplers.planning.budget import Floats, Integers
from samplers.planning.keyed_shuffle import derive_key, permute_each, stream_keys
from samplers.planning.options import Options
from samplers.planning.sorting import IndexArray, SortedLengths
from samplers.planning.tables.buckets import Bucket
from samplers.planning.tables.epoch_order import EpochOrder, choose_variant
from samplers.planning.tables.epoch_table import EpochTable, Shape
from samplers.planning.tables.equal_lengths import RunExchange, RunFinder
from samplers.planning.tables.last_step import cut_by_cost, split_batches

# Purpose of a key, next to those of `epoch_order`: the exchange in runs.
RUNS: Final = 21
# Attributes that are large and that are computed again where a table is unpickled.
_COMPUTED: Final = frozenset(["_exchange", "_run_numbers", "_epochs"])
# Costs are counted in millionths of the budget.
BUDGET_UNITS: Final = 1 << 20


class BatchSizes(NamedTuple):
    """For each batch: rows `[n]`, padded widths `[n, K]`, and real tokens over all fields `[n]`; int64."""

    rows: Integers
    widths: Integers
    tokens: Integers

    @property
    def shapes(self) -> list[Shape]:
        """The different shapes, widest first."""
        shapes = np.unique(np.column_stack([self.widths, self.rows]), axis=0)[::-1].tolist()
        return [(rows, tuple(width)) for *width, rows in shapes]


class BucketColumns(NamedTuple):
    """The buckets as columns, int64 `[buckets]`, with the number of each bucket's first stratum and its last batch."""

    first: Integers
    batches: Integers
    rows: Integers
    full: Integers
    rest: Integers
    skipped: Integers
    first_stratum: Integers
    end: Integers


class Entries(NamedTuple):
    """Entries of strata: number of the stratum, its first sorted index, its size, and the offset in it; int64 `[n]`."""

    strata: Integers
    first: Integers
    size: Integers
    offset: Integers


@dataclass(frozen=True, eq=False)
class BatchTable(EpochTable):
    """The batches of an epoch by batch id; ids of batches of one shape are adjacent.

    Batch j of a bucket takes from each stratum the sample that a keyed bijection of the epoch sends j to.

    Attributes:
        sorted_lengths: The samples.
        buckets: In the order of their batch ids.
        options: The planner's.
        variants: Tables with other bucket borders and equally many batches; each epoch uses one of them, or this one.
    """

    sorted_lengths: SortedLengths
    buckets: tuple[Bucket, ...]
    options: Options
    variants: tuple["BatchTable", ...] = field(default=(), kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _COMPUTED}

    def for_epoch(self, epoch: int, num_replicas: int) -> Self:
        """The table of an epoch that this many replicas begin: this one, or another with equally many batches."""
        del num_replicas
        variant = choose_variant(epoch, 1 + len(self.variants), self.options.seed)
        return cast(Self, self.variants[variant - 1]) if variant else self

    def order(self, epoch: int, num_replicas: int) -> EpochOrder:
        """The order of this table's batches in an epoch that this many replicas begin."""
        return EpochOrder(len(self), self.options, epoch, num_replicas)

    def __len__(self) -> int:
        """Batches in an epoch, before any is split among replicas."""
        return int(self._columns.end[-1])

    @property
    def planned(self) -> int:
        """Samples in an epoch."""
        return len(self.sorted_lengths)

    @property
    def dataset_size(self) -> int:
        """Samples in the dataset, with those that are not planned."""
        return len(self.sorted_lengths.lengths)

    @property
    def lengths_digest(self) -> str:
        """Sixteen hexadecimal digits that change when a length changes."""
        return self.sorted_lengths.digest

    @property
    def trial_epochs(self) -> Iterable[int]:
        """Epochs that show whether replicas can share the last step of every epoch."""
        # These use every variant, and a variant ends with the same number of rows each time.
        return range(max(2, 1 + len(self.variants)))

    def can_share_last_step(self, rows: Integers, num_replicas: int) -> bool:
        """Whether each replica gets a row of the last step, if the last batches of an epoch have these rows `[n]`."""
        partial = len(self) % num_replicas
        return partial == 0 or self.options.drop_last or int(rows[-partial:].sum()) >= num_replicas

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that hold every batch of any epoch, without repetition."""
        return list(dict.fromkeys(shape for table in (self, *self.variants) for shape in table.bucket_shapes))

    @property
    def bucket_shapes(self) -> list[Shape]:
        """The shape of each bucket."""
        return [(bucket.rows, bucket.width) for bucket in self.buckets]

    @property
    def last_dropped(self) -> int:
        """Samples of the batch that `batch_size` leaves short and `drop_last` drops; others in each epoch."""
        return len(self.sorted_lengths) - sum(
            (bucket.batches - bucket.rest - bucket.skipped) * bucket.full + bucket.rest * bucket.rows
            for bucket in self.buckets
        )

    @property
    def parts(self) -> list[SortedLengths]:
        """The samples, in parts each of which is longest first: here one."""
        return [self.sorted_lengths]

    def count_dropped(self, sequences: int) -> int:
        """Samples of an epoch that `drop_last` leaves out, if it gives this many."""
        return len(self.sorted_lengths) - sequences

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when a bucket or the choice of samples changes."""
        chosen = b""
        if self.options.indices is not None:
            chosen = np.sort(self.sorted_lengths.order).astype("<i8").tobytes()
        return blake2b(self._digested_text().encode() + chosen, digest_size=8).hexdigest()

    def _digested_text(self) -> str:
        """All that decides a plan, except the lengths, the seed and the choice of samples."""
        others = ", ".join(map(_digested_buckets, (table.buckets for table in self.variants)))
        # A tuple of one has a comma at its end, as `repr` writes it.
        others = f"({others},)" if len(self.variants) == 1 else f"({others})"
        return f"({_digested_buckets(self.buckets)}, {others}, {self.options.shuffle}, {self.options.drop_last})"

    def batch_rows(self, batch_ids: Integers) -> Integers:
        """Rows of these batches: int64 `[n]`."""
        return self._count_rows(*self._locate(batch_ids))

    def batch_samples(self, batch_ids: Integers, key: int) -> tuple[IndexArray, Integers]:
        """The samples of these batches, one batch after the other; those of one field longest first.

        Args:
            batch_ids: int64 `[n]`, each in `range(len(table))`.
            key: Random key of the epoch.

        Returns:
            Sample indices `[sum(rows)]`, and the rows of each batch, int64 `[n]`.
        """
        columns = self._columns
        buckets, batch_in_bucket = self._locate(batch_ids)
        rows = self._count_rows(buckets, batch_in_bucket)
        # Row r of a batch is from stratum r of its bucket: one entry for each row of each batch.
        stratum: Integers = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        offset: Integers = np.repeat(batch_in_bucket, rows)
        if (columns.rest[buckets] == columns.batches[buckets]).all():
            size: Integers = np.repeat(columns.batches[buckets], rows)
            first: Integers = np.repeat(columns.first[buckets], rows) + stratum * size
        else:
            owner: Integers = np.repeat(buckets, rows)
            first, size = self._stratum_bounds(owner, stratum)
            # Short strata have samples for the last batches of their bucket only.
            offset -= columns.batches[owner] - size
        if not self.options.shuffle:
            return self.sorted_lengths.order[first + offset], rows
        strata: Integers = np.repeat(columns.first_stratum[buckets], rows) + stratum
        is_crossed = np.repeat(self._exchange.crosses_strata(buckets), rows)
        sorted_indices = self._shuffle(Entries(strata, first, size, offset), is_crossed, key)
        samples: IndexArray = self.sorted_lengths.order[sorted_indices]
        return self._sort_batches(samples, rows) if self._exchanges_lengths else samples, rows

    def share_batches(self, batch_ids: Integers, key: int, num_replicas: int) -> list[IndexArray]:
        """The rows of the last step's batches, sorted together and cut into pieces of even cost.

        If a piece would exceed the budget, each batch is split on its own.
        """
        given, counts = self.batch_samples(batch_ids, key)
        samples = given[np.argsort(-self.sorted_lengths.sample_lengths(given).sum(1), kind="stable")]

        def measure(rows: Integers) -> Integers:
            return self._count_costs(self.measure_batches(samples, rows))

        rows = cut_by_cost(measure(np.ones(len(samples), np.int64)), num_replicas, measure=measure, limit=BUDGET_UNITS)
        if rows is None:
            return split_batches(np.split(given, np.cumsum(counts)[:-1]), num_replicas)
        return np.split(samples, rows.cumsum()[:-1])

    def _count_costs(self, sizes: BatchSizes) -> Integers:
        """Shares of the budget, or of the rows of a wide enough shape if that is more, in units.

        Rounded up, and integers, because sums of floats may differ between machines.
        """
        shares = np.minimum(np.maximum(self.budget_use(sizes), self.shape_fill(sizes)), 2.0)
        units: Integers = np.maximum(1, np.ceil(shares * BUDGET_UNITS)).astype(np.int64)
        return units

    def budget_use(self, sizes: BatchSizes) -> Floats:
        """The share of the budget that batches of these sizes use: float64 `[n]`."""
        widths = sizes.widths if self.sorted_lengths.fields > 1 else sizes.widths[:, 0]
        return self.options.budget.use(sizes.rows, widths, sizes.tokens)

    def sample_lengths(self, samples: IndexArray) -> Integers:
        """Lengths of samples `[n]` as they are planned: int64 `[n, K]`."""
        return self.sorted_lengths.sample_lengths(samples)

    def measure_batches(self, samples: IndexArray, rows: Integers) -> BatchSizes:
        """Rows, widths and tokens of batches.

        Args:
            samples: Sample indices, one batch after the other: `[sum(rows)]`.
            rows: Rows of each batch, at least one: int64 `[n]`.
        """
        lengths, starts = self.sorted_lengths.sample_lengths(samples), np.cumsum(rows) - rows
        longest = np.maximum.reduceat(lengths, starts)
        tokens = np.add.reduceat(lengths.sum(1), starts)
        return BatchSizes(rows, padded_widths(longest, self.options.allowed_widths), tokens)

    def shape_fill(self, sizes: BatchSizes) -> Floats:
        """Rows divided by the most rows of a shape that is wide enough, float64 `[n]`: above 1 if no shape holds it."""
        # Many batches are of one width, and many buckets of one shape.
        widths, owner = np.unique(sizes.widths, axis=0, return_inverse=True)
        shapes = np.unique([(*bucket.width, bucket.rows) for bucket in self.buckets], axis=0)
        most: Integers = np.array(
            [np.where((shapes[:, :-1] >= width).all(1), shapes[:, -1], 0).max() for width in widths]
        )[owner.reshape(-1)]
        return np.where(most > 0, sizes.rows / np.maximum(most, 1), np.inf)

    @cached_property
    def _columns(self) -> BucketColumns:
        first, batches, rows, full, rest, skipped = np.array([bucket[:6] for bucket in self.buckets], np.int64).T
        return BucketColumns(
            first, batches, rows, full, rest, skipped, np.cumsum(rows) - rows, np.cumsum(batches - skipped)
        )

    def _shuffle(self, entries: Entries, is_crossed: npt.NDArray[np.bool_], key: int) -> Integers:
        """The sorted indices of the samples that an epoch puts at these entries: int64 `[n]`.

        Each stratum is shuffled, and samples of runs that cross strata are exchanged in their run.

        Args:
            entries: n of them.
            is_crossed: Whether runs cross the borders of the strata of the entry's bucket: bool `[n]`.
            key: Random key of the epoch.
        """
        if not is_crossed.any():
            return self._shuffle_strata(entries, None, key)
        # Where one run covers a stratum, the permutation of the run is a shuffle of the stratum too.
        is_covered = is_crossed & self._exchange.covers(entries.strata, entries.size)
        run_key = derive_key(key, RUNS)
        if not is_covered.any():
            return self._shuffle_strata(entries, run_key, key)
        sorted_indices = entries.first + entries.offset
        covered, others = np.flatnonzero(is_covered), np.flatnonzero(~is_covered)
        sorted_indices[covered] = self._exchange.exchange_covered(
            entries.strata[covered], sorted_indices[covered], run_key
        )
        if len(others):
            sorted_indices[others] = self._shuffle_strata(
                Entries(*(column[others] for column in entries)), run_key, key
            )
        return sorted_indices

    def _shuffle_strata(self, entries: Entries, run_key: int | None, key: int) -> Integers:
        """The sorted indices after a shuffle of each stratum, and an exchange in runs if there is a key for it."""
        strata, first, size, offset = entries
        offset = permute_each(offset, size, stream_keys(key, strata))
        sorted_indices = first + offset
        if run_key is None:
            return sorted_indices
        return self._exchange.exchange(strata, size, offset, sorted_indices=sorted_indices, key=run_key)

    def _sort_batches(self, samples: IndexArray, rows: Integers) -> IndexArray:
        """Samples of one padded width that were exchanged, back in the order of their lengths in each batch."""
        lengths = self.sorted_lengths.sample_lengths(samples).sum(1)
        batches = np.repeat(np.arange(len(rows)), rows)
        bits, longest = len(samples).bit_length(), int(lengths.max(initial=0))
        if (len(rows) * (longest + 1)) >> (62 - bits):
            return samples[np.lexsort([-lengths, batches])]
        # Batch, length and index as the digits of one number: sorting numbers is faster than an argsort.
        keys = ((batches * (longest + 1) + longest - lengths) << bits) + np.arange(len(samples))
        keys.sort()
        ordered: IndexArray = samples[keys & ((1 << bits) - 1)]
        return ordered

    @property
    def _exchanges_lengths(self) -> bool:
        """Whether samples of different lengths are exchanged, because they are padded to one width."""
        return self.sorted_lengths.fields == 1 and self.options.allowed_widths is not None

    def _stratum_bounds(self, buckets: Integers, stratum: Integers) -> tuple[Integers, Integers]:
        """The first sorted index and the size of strata, each given by its bucket and its index in the bucket."""
        columns = self._columns
        short = np.maximum(stratum - columns.full[buckets], 0)
        first = columns.first[buckets] + (stratum - short) * columns.batches[buckets] + short * columns.rest[buckets]
        return first, np.where(stratum >= columns.full[buckets], columns.rest[buckets], columns.batches[buckets])

    @cached_property
    def _exchange(self) -> RunExchange:
        first_strata = np.append(self._columns.first_stratum, self._columns.rows.sum())
        return RunExchange(RunFinder(self._width_at, self._sections), first_strata, self._bounds_by_number)

    def _bounds_by_number(self, strata: Integers) -> tuple[Integers, Integers]:
        """The first sorted index and the size of strata, given by their number in the table."""
        buckets: Integers = np.searchsorted(self._columns.first_stratum, strata, side="right") - 1
        return self._stratum_bounds(buckets, strata - self._columns.first_stratum[buckets])

    @property
    def _sections(self) -> Integers:
        """Parts of the order that samples must stay in: where each begins, and the end of the last."""
        return np.array([0, len(self.sorted_lengths)])

    def _width_at(self, sorted_indices: Integers) -> Integers:
        """The width by which samples are exchanged; for several fields, the number of the run instead."""
        if self.sorted_lengths.fields > 1:
            return self._run_numbers[sorted_indices]
        samples = self.sorted_lengths.order[sorted_indices]
        return self._exchange_widths(self.sorted_lengths.sample_lengths(samples))[:, 0]

    @cached_property
    def _run_numbers(self) -> Integers:
        """For several fields, a number that falls by one wherever the widths change: int64 `[n]`."""
        widths = self._exchange_widths(self.sorted_lengths.lengths_between(0, len(self.sorted_lengths)))
        new = np.zeros(len(widths), np.int64)
        new[1:] = (widths[1:] != widths[:-1]).any(1)
        return -new.cumsum()

    def _exchange_widths(self, lengths: Integers) -> Integers:
        """Padded widths of single samples; their lengths, if widths are not rounded or real tokens count."""
        rounded = self.options.allowed_widths is not None and self.options.count_tokens == "padded"
        return padded_widths(lengths, self.options.allowed_widths) if rounded else lengths

    def _locate(self, batch_ids: Integers) -> tuple[Integers, Integers]:
        """Each batch's bucket, and its index among the bucket's batches."""
        columns = self._columns
        buckets = np.searchsorted(columns.end, batch_ids, side="right")
        return buckets, batch_ids - columns.end[buckets] + columns.batches[buckets]

    def _count_rows(self, buckets: Integers, batch_in_bucket: Integers) -> Integers:
        """Rows of batches that `_locate` has found."""
        columns = self._columns
        is_full = batch_in_bucket >= columns.batches[buckets] - columns.rest[buckets]
        return np.where(is_full, columns.rows[buckets], columns.full[buckets])


def _digested_buckets(buckets: tuple[Bucket, ...]) -> str:
    """Buckets as they are digested: positions carry the digest, so that this text must never change."""
    texts = [
        f"Edge(first={first}, batches={batches}, rows={rows}, full={full}, rest={rest}, skipped={skipped}, "
        f"width={width})"
        for first, batches, rows, full, rest, skipped, width in buckets
    ]
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"
