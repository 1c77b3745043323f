"""Mixtures of full rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, Self

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, permute
from samplers.planning.mixtures.blending import blend
from samplers.planning.mixtures.mixed_plan import MixedPlan, PositionOrder, make_plan, options_of_sources
from samplers.planning.mixtures.mixed_table import MixedTable
from samplers.planning.mixtures.mixture import Mixture, named_errors
from samplers.planning.mixtures.sequence import MixedEpoch
from samplers.planning.mixtures.streams import LoadedBatches, SourceStream
from samplers.planning.pack_batches.options import PackOptions
from samplers.planning.pack_batches.packed_table import BatchRows, PackedTable
from samplers.planning.pack_batches.table import PackBatches, pack_batches
from samplers.planning.packs.documents import Pieces
from samplers.planning.packs.one_list import pack_rows
from samplers.planning.sorting import as_length_array
from samplers.planning.tables.epoch_order import EpochOrder
from samplers.planning.tables.last_step import split_largest

# Batches of a window of packs, whose rows are full however many there are.
WINDOW_BATCHES: Final = 128
# Purposes of keys: rows of several sources, and their order.
BLENDS, ROWS = 64, 67
_EMPTY: Final = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class PackStream(SourceStream):
    """The endless batches of a source whose documents share rows."""

    table: PackBatches

    def estimate(self, pass_number: int) -> Integers:
        """The units of all batches of a pass by batch id: int64 `[len(table)]`.

        Rows are full, but for a percent: real tokens are those of all rows, divided by the rows.
        """
        table = self.table
        rows = self._rows_of(np.arange(len(table)))
        if self.unit == "padded":
            return rows * sum(table.packs.limits.capacity)
        if self.unit == "samples":
            return table.for_epoch(pass_number, 1).batch_rows(np.arange(len(table)))
        ends = np.cumsum(rows) * self._tokens // len(table.packs)
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
        rows, limits = self._rows_of(batch_ids), table.packs.limits
        likeness: Integers = np.arange(len(batch_ids))
        if limits.cost is not None and len(batch_ids):
            batches = table.rows_of_batches(batch_ids)
            costs = limits.costs(-(-table.sample_lengths(batches.samples) // limits.multiple))
            sums = np.add.reduceat(costs, np.cumsum(batches.sizes) - batches.sizes)
            likeness = np.argsort(np.argsort(sums, kind="stable"), kind="stable")
        return likeness + len(batch_ids) * (rows < self.table.options.rows)

    def _rows_of(self, batch_ids: Integers) -> Integers:
        """Rows of these batches: the last one of a pass may be short."""
        rows = self.table.options.rows
        return np.minimum(rows, len(self.table.packs) - batch_ids * rows)

    @property
    def _tokens(self) -> int:
        """Real tokens of all documents."""
        if "tokens" not in self._constants:
            packs = self.table.packs
            documents = packs.classes.order if packs.samples is None else packs.samples[packs.classes.order]
            self._constants["tokens"] = float(self.table.sample_lengths(documents.astype(np.int64)).sum())
        return int(self._constants["tokens"])


@dataclass(frozen=True, eq=False)
class MixedPackTable(MixedTable, PackedTable):
    """Batches of rows of a mixture. Once an epoch is chosen, batch ids are positions in its order.

    Attributes:
        mixed: The sources, and what each epoch takes of them.
        joined_pieces: The pieces of the split samples of all sources, or None.
        epoch_batches: The batches of the epoch to which this table belongs; None before an epoch is chosen.
    """

    mixed: MixedPlan = field(kw_only=True)
    joined_pieces: Pieces | None = field(default=None, kw_only=True)
    epoch_batches: MixedEpoch | None = field(default=None, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_epochs"} | {"epoch_batches": None}

    def __len__(self) -> int:
        """Batches of every epoch."""
        return self.mixed.batches

    @property
    def planned(self) -> int:
        """Documents in an epoch, as far as all epochs have equally many."""
        return self.mixed.samples_per_epoch

    @property
    def pieces(self) -> Pieces | None:
        """The pieces of the split samples of all sources, or None."""
        return self.joined_pieces

    @property
    def dropped(self) -> int:
        """Samples that `overlong="drop"` leaves out."""
        return sum(stream.table.dropped for stream in self.mixed.streams if isinstance(stream, PackStream))

    @property
    def trial_epochs(self) -> Iterable[int]:
        """Epochs that show whether replicas can share their last rows."""
        return (self.mixed.stage.epoch,)

    def _make_epoch(self, epoch: int, num_replicas: int) -> Self:
        """The table of an epoch that this many replicas begin."""
        batches = self.mixed.epoch(epoch, num_replicas)
        if self.mixed.mixture.within == "sample":
            key = derive_key(self.options.seed, epoch, BLENDS)
            cutter = RowCutter(self)
            batches = blend(
                batches, cutter, self.mixed.shares, num_replicas=num_replicas, window=WINDOW_BATCHES, key=key
            )
        return replace(self, epoch_batches=batches)

    def order(self, epoch: int, num_replicas: int) -> EpochOrder:
        """The order of this table's batches, which is that of their ids."""
        return PositionOrder(len(self), self.options, epoch, num_replicas)

    def batches_of(self, epoch: int, num_replicas: int) -> MixedEpoch:
        """The batches of an epoch that this many replicas begin."""
        return self.for_epoch(epoch, num_replicas)._batches  # noqa: SLF001

    def tokens_of(self, samples: Integers) -> Integers:
        """Real time steps of each of these documents, over all fields: int64 `[n]`."""
        if not len(samples):
            return samples
        tokens: Integers = self.sample_lengths(samples).sum(1)
        return tokens

    def units_of(self, samples: Integers, batches: MixedEpoch, positions: Integers) -> Integers:
        """What each of the documents of these batches adds to the units of its source: int64 `[n]`."""
        if self.mixed.mixture.unit != "padded":
            return np.ones_like(samples) if self.mixed.mixture.unit == "samples" else self.tokens_of(samples)
        # The first document of a batch stands for its rows.
        units, sizes = np.zeros_like(samples), batches.sizes[positions]
        units[np.cumsum(sizes) - sizes] = batches.rows[positions] * sum(self.packs.limits.capacity)
        return units

    def whole_samples(self, samples: Integers) -> Integers:
        """The sample of each index, which may be of a piece: int64 `[n]`."""
        if self.pieces is None:
            return samples
        is_piece, whole = samples >= len(self.lengths), samples.copy()
        whole[is_piece] = self.pieces.samples[samples[is_piece] - len(self.lengths)]
        return whole

    @property
    def lengths_digest(self) -> str:
        """Sixteen hexadecimal digits that change when a length or a name of a source changes."""
        return self.mixed.lengths_digest

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when the sources' rows or the shares change."""
        return self.mixed.digest

    def rows_of_batches(self, batch_ids: Integers) -> BatchRows:
        """The rows of these batches, int64 `[n]`, at least one, in the order in which a collator cuts them."""
        samples, _ = self._batches.samples_of(batch_ids)
        return BatchRows(samples, *self._batches.documents_of(batch_ids))

    def share_rows_of(self, batch_ids: Integers, num_replicas: int) -> list[BatchRows]:
        """The rows of these batches in their order, a run of rows or a piece of one for each replica."""
        batches = self.rows_of_batches(batch_ids)
        rows = np.split(batches.samples, np.cumsum(batches.documents)[:-1])
        if len(rows) < num_replicas:
            parts = split_largest([len(row) for row in rows], num_replicas - len(rows))
            rows = [piece for row, count in zip(rows, parts, strict=True) for piece in np.array_split(row, count)]
        ends = len(rows) * np.arange(num_replicas + 1) // num_replicas
        shares = [rows[first:end] for first, end in pairwise(ends.tolist())]
        return [
            self.arrange(
                BatchRows(np.concatenate(share), np.array([len(row) for row in share]), np.array([len(share)]))
            )
            for share in shares
        ]

    def count_dropped(self, documents: int) -> int:
        """Documents of an epoch that `drop_last` leaves out, if it gives this many."""
        return len(self._batches.samples) - documents

    @property
    def _batches(self) -> MixedEpoch:
        """The batches of this table's epoch; those of epoch 0, if it belongs to none."""
        return self.for_epoch(self.mixed.stage.epoch, 1)._batches if self.epoch_batches is None else self.epoch_batches  # noqa: SLF001


class RowCutter:
    """Packs the documents of a window into rows again.

    Args:
        table: The limits of rows, and the lengths.
    """

    def __init__(self, table: MixedPackTable) -> None:
        self._table, self._limits = table, table.packs.limits
        self._offsets = np.array([stream.offset for stream in table.mixed.streams])

    def can_divide(self, epoch: MixedEpoch, positions: Integers) -> Integers:
        """All of these batches: int64 `[n]`."""
        del epoch
        return positions

    def divide(self, epoch: MixedEpoch, positions: Integers, key: int) -> MixedEpoch | None:
        """As many batches with the documents of these; None if more are needed."""
        given, _ = epoch.samples_of(positions)
        samples = given[permute(np.arange(len(given)), len(given), key)]
        rows = pack_rows(self._table.sample_lengths(samples)[:, 0], self._limits)
        batches, wanted = len(positions), int(epoch.rows[positions].sum())
        if len(rows) > wanted:
            return None
        rows = self._order(_split_rows(rows, batches), samples, key)
        counts = np.diff(len(rows) * np.arange(batches + 1) // batches)
        if int(counts.max()) > self._table.options.rows:
            return None
        documents = np.array([len(row) for row in rows])
        chosen = BatchRows(samples[np.concatenate(rows)], documents, counts)
        arranged = self._table.arrange(chosen)
        return MixedEpoch.lay(
            epoch.sources[positions],
            epoch.passes[positions],
            arranged.samples,
            arranged.sizes,
            arranged.documents,
            arranged.rows,
        )

    def _order(self, rows: list[Integers], samples: Integers, key: int) -> list[Integers]:
        """Rows by cost, where documents have some, else in random order; the last batch has the most documents."""
        if self._limits.cost is not None:
            costs = self._limits.costs(-(-self._table.sample_lengths(samples) // self._limits.multiple))
            order = np.argsort([costs[row].sum() for row in rows], kind="stable")
        else:
            sizes = np.array([len(row) for row in rows])
            order = permute(np.arange(len(rows)), len(rows), derive_key(key, ROWS))
            last = np.argsort(-sizes[order], kind="stable")[: self._table.options.rows]
            order = np.concatenate([np.delete(order, last), order[last]])
        return [rows[number] for number in order.tolist()]

    def units_by_source(self, batches: MixedEpoch) -> Integers:
        """Units of each source in each of these batches: int64 `[n, sources]`."""
        units = self._table.units_of(batches.samples, batches, np.arange(len(batches.sizes)))
        owners = np.searchsorted(self._offsets, self._table.whole_samples(batches.samples), side="right") - 1
        return batches.sum_by(owners, units, len(self._offsets))


def _split_rows(rows: list[Integers], count: int) -> list[Integers]:
    """At least this many rows: those of most documents are divided, if there are fewer."""
    while len(rows) < count:
        longest = max(range(len(rows)), key=lambda number: len(rows[number]))
        half = len(rows[longest]) // 2
        rows = [*rows[:longest], rows[longest][:half], *rows[longest + 1 :], rows[longest][half:]]
    return rows


def make_pack_mixture(mixture: Mixture, options: PackOptions, num_replicas: int) -> MixedPackTable:
    """The rows of a mixture, of one capacity.

    Args:
        mixture: The sources and their shares.
        options: The planner's; each source is packed with a seed of its own.
        num_replicas: W, for a mixture that stops after a number of steps.

    Raises:
        TypeError: A limit is not an int, lengths or indices are not integers, or `cost` is not a function.
        LengthError: A length is negative or above 2**40, or a document does not fit in a row, with `overlong="error"`.
        ValueError: A source has no sample left to plan, or needs more passes than it may have.
    """
    streams: list[PackStream] = []
    pieces = 0
    for source in options_of_sources(mixture, options):
        with named_errors(source.name):
            table = pack_batches(source.lengths, source.options)
        # Piece j of a source has the index N + j there, and follows those of the sources before in the mixture.
        streams.append(
            PackStream(source.name, table, mixture.unit, source.offset, mixture.size + pieces - len(table.lengths))
        )
        pieces += 0 if table.pieces is None else len(table.pieces.samples)
    fields = len(streams[0].table.packs.limits.capacity)
    if mixture.within == "sample" and fields > 1:
        raise ValueError(f"within='sample' must have documents of one field, got {fields}: use within='batch'")
    plan = make_plan(mixture, streams, num_replicas)
    return MixedPackTable(
        streams[0].table.packs,
        np.concatenate([as_length_array(each) for each in mixture.sources.values()]),
        options,
        sum(stream.table.too_short for stream in streams),
        mixed=plan,
        joined_pieces=_join_pieces(streams),
    )


def _join_pieces(streams: Sequence[PackStream]) -> Pieces | None:
    """The pieces of all sources, by the sample indices of the mixture."""
    parts = [(stream.table.pieces, stream.offset) for stream in streams if stream.table.pieces is not None]
    if not parts:
        return None
    return Pieces(
        np.concatenate([part.samples + offset for part, offset in parts]),
        np.concatenate([part.starts for part, _ in parts]),
        np.concatenate([part.stops for part, _ in parts]),
    )
