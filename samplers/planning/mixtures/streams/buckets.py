"""BucketStream: the batches of a source whose samples share a batch with samples of similar length."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.mixtures.streams.source_stream import LoadedBatches, SourceStream
from samplers.planning.schedules.schedule import SAMPLES_AT_ONCE
from samplers.planning.sorting import IndexArray
from samplers.planning.tables.batch_table import BatchTable
from samplers.planning.tables.epoch_order import SAMPLES
from samplers.planning.tables.pool_table import PoolTable

_EMPTY: Final = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class BucketStream(SourceStream):
    """The endless batches of a source whose samples share a batch with samples of similar length."""

    table: BatchTable

    @property
    def has_equal_passes(self) -> bool:
        """Whether all passes have as many units: padded tokens depend on the shuffle, and what `drop_last` drops."""
        return self.unit != "padded" and not self.table.options.drop_last

    def estimate(self, pass_number: int) -> Integers:
        """The units of all batches of a pass by batch id: int64 `[len(table)]`.

        Real tokens of a batch are those of its bucket, divided by the bucket's batches: as a batch takes one sample of
        every stratum, it is off by less than one sample. Otherwise all batches of the pass are made and counted: padded
        tokens, small sources whose batches are drawn, and samples that are exchanged with shorter ones.
        """
        table = self.table.for_epoch(pass_number, 1)
        if self.unit == "samples":
            return table.batch_rows(np.arange(len(table)))
        if self.unit == "padded" or isinstance(table, PoolTable) or not _is_stratified(table):
            size = 1 + SAMPLES_AT_ONCE * len(table) // table.planned
            parts = [
                self.load(pass_number, np.arange(first, min(first + size, len(table)))).units
                for first in range(0, len(table), size)
            ]
            return np.concatenate(parts)
        return _bucket_tokens(table)

    def load(self, pass_number: int, batch_ids: Integers) -> LoadedBatches:
        """The samples of these batches, int64 `[n]`."""
        table = self.table.for_epoch(pass_number, 1)
        if not len(batch_ids):
            return LoadedBatches(_EMPTY, _EMPTY, _EMPTY, _EMPTY, _EMPTY)
        samples, rows = table.batch_samples(batch_ids, table.order(pass_number, 1).key(SAMPLES))
        return LoadedBatches(
            samples.astype(np.int64) + self.offset, rows, self._count(table, samples, rows), _EMPTY, _EMPTY
        )

    def likeness(self, pass_number: int, batch_ids: Integers) -> Integers:
        """Batch ids: those of one shape are adjacent, and the last have the most rows."""
        del pass_number
        return batch_ids

    def _count(self, table: BatchTable, samples: IndexArray, rows: Integers) -> Integers:
        """The units of batches: int64 `[n]`."""
        if self.unit == "samples":
            return rows
        if self.unit == "tokens":
            tokens: Integers = np.add.reduceat(table.sample_lengths(samples).sum(1), np.cumsum(rows) - rows)
            return tokens
        sizes = table.measure_batches(samples, rows)
        padded: Integers = sizes.rows * sizes.widths.sum(1)
        return padded


def _is_stratified(table: BatchTable) -> bool:
    """Whether all samples of a stratum are of almost one length: of one field, and not exchanged within a width."""
    return table.sorted_lengths.fields == 1 and table.options.allowed_widths is None


def _bucket_tokens(table: BatchTable) -> Integers:
    """Real tokens of the batches of each bucket, as even as integers are: int64 `[batches]`."""
    bounds = [
        (bucket.first, bucket.first + bucket.batches * bucket.full + bucket.rest * (bucket.rows - bucket.full))
        for bucket in table.buckets
    ]
    lengths = table.sorted_lengths.lengths_between(0, len(table.sorted_lengths)).sum(1)
    sums = np.concatenate([[0], np.cumsum(lengths)])
    first, end = np.array(bounds).T
    totals = sums[end] - sums[first]
    batches = np.array([bucket.batches for bucket in table.buckets])
    planned = batches - np.array([bucket.skipped for bucket in table.buckets])
    owners = np.repeat(np.arange(len(planned)), planned)
    numbers = np.arange(len(owners)) - np.repeat(np.cumsum(planned) - planned, planned)
    tokens: Integers = (totals[owners] * (numbers + 1)) // batches[owners]
    tokens -= (totals[owners] * numbers) // batches[owners]
    return tokens
