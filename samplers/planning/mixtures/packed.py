"""Mixtures of full rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, permute
from samplers.planning.mixtures.mixed_plan import MixedPlan, PlannedSource, make_plan, options_of_sources
from samplers.planning.mixtures.mixed_table import MixedTable
from samplers.planning.mixtures.mixture import Mixture, named_errors
from samplers.planning.mixtures.sequence import MixedEpoch
from samplers.planning.mixtures.streams.packs import PackStream
from samplers.planning.mixtures.streams.windows import WindowPackStream
from samplers.planning.pack_batches.options import PackOptions
from samplers.planning.pack_batches.packed_table import BatchRows, PackedTable
from samplers.planning.pack_batches.table import pack_batches
from samplers.planning.pack_batches.window_packs import make_window_packs
from samplers.planning.packs.documents import Pieces
from samplers.planning.packs.one_list import pack_rows
from samplers.planning.sorting import as_length_array
from samplers.planning.tables.last_step import split_largest

# Batches of a window of packs, whose rows are full however many there are.
WINDOW_BATCHES: Final = 128
# Purpose of a key: the order of rows of several sources.
ROWS: Final = 67


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

    @property
    def pieces(self) -> Pieces | None:
        """The pieces of the split samples of all sources, or None."""
        return self.joined_pieces

    @property
    def longest_units(self) -> Integers:
        """The longest document of all sources in each field, in units of `multiple`: int64 `[K]`."""
        longest: Integers = np.max([stream.table.longest_units for stream in self._pack_streams], 0)
        return longest

    @property
    def dropped(self) -> int:
        """Samples that `overlong="drop"` leaves out."""
        return sum(stream.table.dropped for stream in self._pack_streams)

    @property
    def _pack_streams(self) -> list[PackStream]:
        return [stream for stream in self.mixed.streams if isinstance(stream, PackStream)]

    def _padded_units(self, samples: Integers, batches: MixedEpoch, positions: Integers) -> Integers:
        """The steps of rows that each of the documents of these batches stands for: int64 `[n]`."""
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

    @property
    def _window_batches(self) -> int:
        return WINDOW_BATCHES

    @property
    def _cutter(self) -> "RowCutter":
        return RowCutter(self)


class WindowOptions(NamedTuple):
    """How sources in shards are read.

    Attributes:
        samples: Of a window at least; None for the default.
    """

    samples: int | None = None


class RowCutter:
    """Packs the documents of a window into rows again.

    Args:
        table: The limits of rows, and the lengths.
    """

    def __init__(self, table: MixedPackTable) -> None:
        self._table, self._limits = table, table.packs.limits

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


def _split_rows(rows: list[Integers], count: int) -> list[Integers]:
    """At least this many rows: those of most documents are divided, if there are fewer."""
    while len(rows) < count:
        longest = max(range(len(rows)), key=lambda number: len(rows[number]))
        half = len(rows[longest]) // 2
        rows = [*rows[:longest], rows[longest][:half], *rows[longest + 1 :], rows[longest][half:]]
    return rows


def make_pack_mixture(
    mixture: Mixture, options: PackOptions, num_replicas: int, *, windows: WindowOptions | None = None
) -> MixedPackTable:
    """The rows of a mixture, of one capacity.

    Args:
        mixture: The sources and their shares.
        options: The planner's; each source is packed with a seed of its own.
        num_replicas: W, for a mixture that stops after a number of steps.
        windows: How sources in shards, whose lengths are indexes, are read; None for others.

    Raises:
        TypeError: A limit is not an int, lengths or indices are not integers, or `cost` is not a function.
        LengthError: A length is negative or above 2**40, or a document does not fit in a row, with `overlong="error"`.
        ValueError: A source has no sample left to plan, or needs more passes than it may have.
    """
    streams: list[PackStream] = []
    pieces = 0
    for source in options_of_sources(mixture, options):
        with named_errors(source.name):
            kind, table = _make_table(source, windows)
        # Piece j of a source has the index N + j there, and follows those of the sources before in the mixture.
        first_piece = mixture.size + pieces - len(table.lengths)
        streams.append(kind(source.name, table, mixture.unit, source.offset, first_piece))
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


def _make_table(source: PlannedSource, windows: WindowOptions | None) -> tuple[type[PackStream], PackedTable]:
    """The rows of a source, and what makes a stream of them."""
    if windows is None:
        return PackStream, pack_batches(source.lengths, source.options, is_brief=True)
    index: Any = source.lengths
    return WindowPackStream, make_window_packs(index, index.starts, source.options, window=windows.samples)


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
