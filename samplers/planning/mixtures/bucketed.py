"""Mixtures of batches of similar lengths."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np

from collate.widths import padded_widths
from samplers.planning.budget import Floats, Integers
from samplers.planning.mixtures.blending import cut_evenly_into, order_equals
from samplers.planning.mixtures.mixed_plan import MixedPlan, PlannedSource, make_plan, options_of_sources
from samplers.planning.mixtures.mixed_table import MixedTable
from samplers.planning.mixtures.mixture import Mixture, named_errors
from samplers.planning.mixtures.sequence import MixedEpoch
from samplers.planning.mixtures.streams.buckets import BucketStream
from samplers.planning.mixtures.streams.source_stream import SourceStream
from samplers.planning.mixtures.streams.windows import WindowBucketStream
from samplers.planning.options import Options
from samplers.planning.sorting import IndexArray, Lengths, SortedLengths, as_length_array, sort_lengths
from samplers.planning.tables.batch_table import BatchSizes, BatchTable
from samplers.planning.tables.buckets import MANY_BATCHES, cut_buckets, estimate_batches, sort_buckets
from samplers.planning.tables.epoch_table import EpochTable, Shape
from samplers.planning.tables.last_step import split_batches
from samplers.planning.tables.pool_table import choose_table
from samplers.planning.tables.window_table import make_window_table

_EMPTY: Final = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class MixedBatchTable(MixedTable, BatchTable):
    """The batches of a mixture. Once an epoch is chosen, batch ids are positions in its order.

    Attributes:
        mixed: The sources, and what each epoch takes of them.
        epoch_batches: The batches of the epoch to which this table belongs; None before an epoch is chosen.
    """

    mixed: MixedPlan = field(kw_only=True)
    epoch_batches: MixedEpoch | None = field(default=None, kw_only=True)

    @property
    def dataset_size(self) -> int:
        """Samples of all sources, with those that are not planned."""
        return self.mixed.mixture.size

    @property
    def parts(self) -> list[SortedLengths]:
        """The samples of each source that is read."""
        return [table.sorted_lengths for table in self._tables]

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that hold every batch of any epoch, without repetition."""
        if self.mixed.mixture.within == "sample":
            return self._shapes_by_width
        shapes = {shape for table in self._tables for shape in table.shapes}
        return sorted(shapes, key=lambda shape: (-sum(shape[1]), shape))

    @cached_property
    def _shapes_by_width(self) -> list[Shape]:
        """The most rows of each width that a sample has."""
        lengths = [part.lengths_between(0, len(part))[:, 0] for part in self.parts]
        widths = np.unique(padded_widths(np.concatenate(lengths)[:, None], self.options.allowed_widths))
        most = [max(1, self.options.budget.max_rows(width)) for width in widths.tolist()]
        shapes: list[Shape] = [(rows, (width,)) for rows, width in zip(most, widths.tolist(), strict=True)]
        return shapes[::-1]

    def _padded_units(self, samples: Integers, batches: MixedEpoch, positions: Integers) -> Integers:
        """The padded time steps that each of the samples of these batches takes: int64 `[n]`."""
        rows = batches.sizes[positions]
        return np.repeat(self.measure_batches(samples, rows).widths.sum(1), rows)

    def batch_rows(self, batch_ids: Integers) -> Integers:
        """Rows of these batches: int64 `[n]`."""
        return self._batches.sizes[batch_ids]

    def batch_samples(self, batch_ids: Integers, key: int) -> tuple[IndexArray, Integers]:
        """The samples of these batches, one batch after the other, each longest first.

        Args:
            batch_ids: int64 `[n]`, each in `range(len(table))`.
            key: Not used: each pass of a source has keys of its own.

        Returns:
            Sample indices `[sum(rows)]`, and the rows of each batch, int64 `[n]`.
        """
        del key
        return self._batches.samples_of(batch_ids)

    def share_batches(self, batch_ids: Integers, key: int, num_replicas: int) -> list[IndexArray]:
        """Each batch of the last step in pieces of its own, so that no pass begins before the one before has ended."""
        samples, rows = self.batch_samples(batch_ids, key)
        return split_batches(np.split(samples, np.cumsum(rows)[:-1]), num_replicas)

    def shape_fill(self, sizes: BatchSizes) -> Floats:
        """Rows divided by the most rows of a shape that is wide enough, float64 `[n]`: above 1 if no shape holds it."""
        shapes = np.array([(*width, rows) for rows, width in self.shapes])
        most = np.array([np.where((shapes[:, :-1] >= width).all(1), shapes[:, -1], 0).max() for width in sizes.widths])
        return np.where(most > 0, sizes.rows / np.maximum(most, 1), np.inf)

    @property
    def _cutter(self) -> "LengthCutter":
        return LengthCutter(self)

    @property
    def _window_batches(self) -> int | None:
        """Batches of a window of the option's samples."""
        window = self.options.window
        return None if window is None else max(1, window * len(self) // self.planned)

    @property
    def _tables(self) -> list[BatchTable]:
        return [stream.table for stream in self.mixed.streams]  # type: ignore[misc]


class LengthCutter:
    """Divides the samples of a window into batches of neighbours in length.

    Args:
        table: The budget and the lengths.
    """

    def __init__(self, table: MixedBatchTable) -> None:
        self._table, self._options = table, table.options

    def can_divide(self, epoch: MixedEpoch, positions: Integers) -> Integers:
        """Those of these batches that are within the budget: int64 `[n]`."""
        if not self._table.sorted_lengths.overlong_alone or not len(positions):
            return positions
        sizes = self._table.measure_batches(*epoch.samples_of(positions))
        return positions[self._table.budget_use(sizes) <= 1]

    def divide(self, epoch: MixedEpoch, positions: Integers, key: int) -> MixedEpoch | None:
        """As many batches with the samples of these, widest first; None if more are needed."""
        samples, _ = epoch.samples_of(positions)
        widths = padded_widths(self._table.sorted_lengths.sample_lengths(samples), self._options.allowed_widths)[:, 0]
        order = order_equals(widths, key)
        distinct, owner = np.unique(widths[order], return_inverse=True)
        most = np.array([self._options.budget.max_rows(max(1, width)) for width in distinct.tolist()])
        rows = cut_evenly_into(np.minimum(most, len(samples))[owner], len(positions))
        if rows is None:
            return None
        chosen = samples[order]
        if self._options.allowed_widths is not None:
            chosen = self._table._sort_batches(chosen, rows).astype(np.int64)  # noqa: SLF001
        return MixedEpoch.lay(epoch.sources[positions], epoch.passes[positions], chosen, rows, _EMPTY, _EMPTY)


def make_bucket_mixture(
    mixture: Mixture, options: Options, num_replicas: int, *, in_windows: bool = False
) -> MixedBatchTable:
    """The batches of a mixture, under one budget.

    Args:
        mixture: The sources and their shares.
        options: The planner's; each source is planned with a seed of its own.
        num_replicas: W, for a mixture that stops after a number of steps.
        in_windows: Sources are indexes of shards, and are read window after window.

    Raises:
        TypeError: Lengths or indices are not integers; the message names the source.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: A source has no batch left to plan, or needs more passes than it may have.
    """
    streams: list[SourceStream] = []
    for source in options_of_sources(mixture, options):
        with named_errors(source.name):
            streams.append(_make_stream(source, mixture, in_windows=in_windows))
    if mixture.within == "sample":
        _check_divisible(streams[0].table, options)
    plan = make_plan(mixture, streams, num_replicas)
    return MixedBatchTable(_join(mixture, streams, options), (), options, mixed=plan)


def _make_stream(source: PlannedSource, mixture: Mixture, *, in_windows: bool) -> SourceStream:
    """The batches of a source."""
    name, lengths, options, offset = source
    if in_windows:
        index: Any = lengths
        return WindowBucketStream(name, make_window_table(index, index.starts, options), mixture.unit, offset)
    return BucketStream(name, _choose_table(lengths, options, mixture), mixture.unit, offset)


def _check_divisible(table: EpochTable, options: Options) -> None:
    """Check that the batches of a window can be divided again, and are then not too many.

    Raises:
        ValueError: They cannot.
    """
    fields = table.sorted_lengths.fields if isinstance(table, BatchTable) else 1
    if fields > 1 or options.count_tokens != "padded":
        raise ValueError(
            f"within='sample' must have samples of one field and a budget of padded tokens, got {fields} fields and "
            f"count_tokens={options.count_tokens!r}: use within='batch'"
        )


def _choose_table(lengths: Lengths, options: Options, mixture: Mixture) -> BatchTable:
    """The batches of a source: of a small one whose samples are divided again, as few as possible."""
    if mixture.within == "sample" and options.shuffle:
        sorted_lengths = sort_lengths(lengths, options)
        if estimate_batches(sorted_lengths, options) < MANY_BATCHES:
            buckets = sort_buckets(cut_buckets(sorted_lengths, options, 1), options)
            table = BatchTable(sorted_lengths, tuple(buckets), options)
            # Without a batch, the usual choice says why.
            if buckets and len(table):
                return table
    return choose_table(lengths, options, predicts=True)


def _join(mixture: Mixture, streams: list[SourceStream], options: Options) -> SortedLengths:
    """The samples of all sources, source after source, each longest first."""
    lengths = np.concatenate([as_length_array(each) for each in mixture.sources.values()])
    parts = [(stream.table.sorted_lengths, stream.offset) for stream in streams if isinstance(stream, BucketStream)]
    return SortedLengths(
        lengths,
        np.concatenate([part.order.astype(np.int64) + offset for part, offset in parts]),
        options.max_length,
        overlong_alone=sum(part.overlong_alone for part, _ in parts),
        too_short=sum(part.too_short for part, _ in parts),
        overlong_dropped=sum(part.overlong_dropped for part, _ in parts),
    )
