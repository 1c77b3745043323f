"""PackStream: the batches of a source whose documents share rows."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.mixtures.streams.source_stream import LoadedBatches, SourceStream
from samplers.planning.pack_batches.packed_table import PackedTable
from samplers.planning.sorting import IndexArray

_EMPTY: Final = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class PackStream(SourceStream):
    """The endless batches of a source whose documents share rows."""

    table: PackedTable

    def estimate(self, pass_number: int) -> Integers:
        """The units of all batches of a pass by batch id: int64 `[len(table)]`.

        Rows are full, but for a percent: real tokens are those of all rows, divided by the rows.
        """
        table = self.table
        rows = self._rows_of(pass_number, np.arange(len(table)))
        if self.unit == "padded":
            return rows * sum(table.packs.limits.capacity)
        if self.unit == "samples":
            return table.for_epoch(pass_number, 1).batch_rows(np.arange(len(table)))
        ends = np.cumsum(rows) * self._tokens // int(rows.sum())
        return np.diff(ends, prepend=0)

    def load(self, pass_number: int, batch_ids: Integers) -> LoadedBatches:
        """The documents of these batches, int64 `[n]`."""
        if not len(batch_ids):
            return LoadedBatches(_EMPTY, _EMPTY, _EMPTY, _EMPTY, _EMPTY)
        table = self.table.for_epoch(pass_number, 1)
        batches = table.rows_of_batches(batch_ids)
        sizes = batches.sizes
        if self.unit == "samples":
            units = sizes
        elif self.unit == "padded":
            units = batches.rows * sum(table.packs.limits.capacity)
        else:
            steps = table.sample_lengths(batches.samples).sum(1)
            units = np.add.reduceat(steps, np.cumsum(sizes) - sizes)
        return LoadedBatches(
            self._indices(batches.samples, len(table.lengths)), sizes, units, batches.documents, batches.rows
        )

    def likeness(self, pass_number: int, batch_ids: Integers) -> Integers:
        """Costs of batches, where documents have some; else their order in the stream. A short batch is last."""
        table = self.table.for_epoch(pass_number, 1)
        rows, limits = self._rows_of(pass_number, batch_ids), table.packs.limits
        likeness: Integers = np.arange(len(batch_ids))
        if limits.cost is not None and len(batch_ids):
            batches = table.rows_of_batches(batch_ids)
            costs = limits.costs(-(-table.sample_lengths(batches.samples) // limits.multiple))
            sums = np.add.reduceat(costs, np.cumsum(batches.sizes) - batches.sizes)
            likeness = np.argsort(np.argsort(sums, kind="stable"), kind="stable")
        return likeness + len(batch_ids) * (rows < self.table.options.rows)

    def _rows_of(self, pass_number: int, batch_ids: Integers) -> Integers:
        """Rows of these batches of a pass: the last one may be short."""
        del pass_number
        rows = self.table.options.rows
        return np.minimum(rows, len(self.table.packs) - batch_ids * rows)

    @property
    def _tokens(self) -> int:
        """Real tokens of all documents."""
        if "tokens" not in self._constants:
            self._constants["tokens"] = float(self.table.sample_lengths(self._documents.astype(np.int64)).sum())
        return int(self._constants["tokens"])

    @property
    def _documents(self) -> IndexArray:
        """The samples and pieces of a pass, in any order: integers `[n]`."""
        packs = self.table.packs
        return packs.classes.order if packs.samples is None else packs.samples[packs.classes.order]
