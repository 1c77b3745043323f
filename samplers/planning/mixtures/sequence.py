"""An epoch of a mixture: the batches of all sources in the order in which replicas take them.

A turn is W batches of one source, alike in width, so that replicas finish together. Batches that are left without a
turn, fewer than W of each source, are the last of the epoch; the one with the most rows is the very last, because other
replicas may have to share it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from samplers.planning.budget import Floats, Integers
from samplers.planning.mixtures.shares import take_turns
from samplers.planning.mixtures.streams.source_stream import LoadedBatches, SourceStream
from samplers.planning.tables.pool_table import concatenate_ranges


class MixedEpoch(NamedTuple):
    """The batches of an epoch by position.

    Attributes:
        sources: The number of each batch's source; with batches of several sources, of the source in whose stead it
            is: int64 `[B]`.
        passes: The pass of that source, int64 `[B]`.
        starts: Where the samples of each batch begin in `samples`, int64 `[B]`.
        sizes: How many they are, int64 `[B]`.
        samples: Sample indices of all batches, int64 `[sum(sizes)]`.
        row_starts: Where the rows of each batch begin in `documents`, int64 `[B]`; empty where there are none.
        rows: Rows of each batch, int64 `[B]`; or empty.
        documents: Documents of each row, int64 `[sum(rows)]`; or empty.
        borders: Positions at which the batches before hold what the streams have given, where batches hold samples of
            several sources, int64 `[n]`; None where that is so at all positions.
        groups: The read group of each batch, for sources that are read in windows, int64 `[B]`; else None.
    """

    sources: Integers
    passes: Integers
    starts: Integers
    sizes: Integers
    samples: Integers
    row_starts: Integers
    rows: Integers
    documents: Integers
    borders: Integers | None = None
    groups: Integers | None = None

    def check_whole(self, taken: int) -> None:
        """Check that the first `taken` batches hold what the streams have given.

        Raises:
            ValueError: They lie within batches that hold samples of several sources.
        """
        if self.borders is None or taken in self.borders:
            return
        nearest = self.borders[np.abs(self.borders - taken).argsort()[:2]].tolist()
        raise ValueError(
            f"a mixture must be changed where the samples of no batch were exchanged with later ones, got {taken} "
            f"batches, which lie within a window of within='sample': change it after {sorted(nearest)} batches"
        )

    def take(self, positions: Integers) -> "MixedEpoch":
        """These batches alone, in this order."""
        samples, sizes = self.samples_of(positions)
        documents, rows = self.documents_of(positions) if len(self.rows) else (self.documents, self.rows)
        return MixedEpoch.lay(self.sources[positions], self.passes[positions], samples, sizes, documents, rows)

    def sum_by(self, owners: Integers, values: Integers, count: int) -> Integers:
        """Sums of values `[n]` of samples by their owner, for each of batches as `lay` leaves them: int64 `[B, count]`.

        Args:
            owners: Of each sample, int64 `[n]`, each in `range(count)`.
            values: int64 `[n]`.
            count: How many owners there are.
        """
        cells = np.repeat(np.arange(len(self.sizes)), self.sizes) * count + owners
        sums = np.bincount(cells, values.astype(np.float64), minlength=len(self.sizes) * count)
        return sums.astype(np.int64).reshape(-1, count)

    @classmethod
    def join(cls, parts: Sequence["MixedEpoch"]) -> "MixedEpoch":
        """Batches one after the other; those of each part lie in its order, as `take` and `lay` leave them."""
        columns = [
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("sources", "passes", "samples", "sizes", "documents", "rows")
        ]
        return cls.lay(*columns)

    @classmethod
    def lay(  # noqa: PLR0917
        cls,
        sources: Integers,
        passes: Integers,
        samples: Integers,
        sizes: Integers,
        documents: Integers,
        rows: Integers,
    ) -> "MixedEpoch":
        """Batches whose samples, and documents, lie one batch after the other."""
        starts, row_starts = np.cumsum(sizes) - sizes, np.cumsum(rows) - rows
        return cls(sources, passes, starts, sizes, samples, row_starts, rows, documents)

    def samples_of(self, positions: Integers) -> tuple[Integers, Integers]:
        """The samples of these batches, one after the other, and how many each has: int64."""
        sizes = self.sizes[positions]
        return self.samples[concatenate_ranges(self.starts[positions], sizes)], sizes

    def documents_of(self, positions: Integers) -> tuple[Integers, Integers]:
        """The documents of the rows of these batches, and the rows of each: int64."""
        rows = self.rows[positions]
        return self.documents[concatenate_ranges(self.row_starts[positions], rows)], rows


def lay_out(
    streams: Sequence[SourceStream], shares: Floats, first: Integers, end: Integers, *, epoch: int, num_replicas: int
) -> MixedEpoch:
    """The batches of an epoch, in its order.

    Args:
        streams: Of the sources.
        shares: Share of each, float64 `[sources]`.
        first: Where each stream stands when the epoch begins, int64 `[sources]`.
        end: Where it stands when the epoch ends, int64 `[sources]`.
        epoch: Which epoch.
        num_replicas: W.
    """
    parts, sources, passes, windows = [], [], [], []
    groups = 0
    for number, stream in enumerate(streams):
        segments = stream.segments(int(first[number]), int(end[number]), epoch=epoch, num_replicas=num_replicas)
        for segment in segments:
            parts.append(stream.load(segment.pass_number, segment.batch_ids))
            sources.append(np.full(len(segment.batch_ids), number))
            passes.append(np.full(len(segment.batch_ids), segment.pass_number))
            if stream.reads_windows:
                windows.append(stream.windows_of(segment.pass_number, segment.batch_ids) + groups)
                groups = int(windows[-1].max(initial=groups)) + 1
    batches = LoadedBatches(*map(np.concatenate, zip(*parts, strict=True)))
    of_source, of_pass = np.concatenate(sources), np.concatenate(passes)
    taken = np.array([stream.units_before(count) for stream, count in zip(streams, first.tolist(), strict=True)])
    order = _order_batches(batches, of_source, shares, taken=taken, num_replicas=num_replicas)
    starts = np.cumsum(batches.sizes) - batches.sizes
    row_starts = np.cumsum(batches.rows) - batches.rows
    has_rows = len(batches.rows) > 0
    return MixedEpoch(
        of_source[order],
        of_pass[order],
        starts[order],
        batches.sizes[order],
        batches.samples,
        row_starts[order] if has_rows else row_starts,
        batches.rows[order] if has_rows else batches.rows,
        batches.documents,
        groups=np.concatenate(windows)[order] if windows else None,
    )


def _order_batches(
    batches: LoadedBatches, sources: Integers, shares: Floats, *, taken: Floats, num_replicas: int
) -> Integers:
    """The index of each batch in the order of the epoch: int64 `[B]`.

    Args:
        batches: Source after source, each in its own order.
        sources: The source of each.
        shares: Share of each source.
        taken: Units of each source before the epoch.
        num_replicas: W.
    """
    counts = np.bincount(sources, minlength=len(shares))
    whole = counts // num_replicas
    begins = np.cumsum(counts) - counts
    turns = [
        batches.units[begin : begin + number * num_replicas].reshape(number, num_replicas).sum(1)
        for begin, number in zip(begins.tolist(), whole.tolist(), strict=True)
    ]
    owners = take_turns(shares, taken, turns)
    if (counts == whole * num_replicas).all():
        gone = taken + np.array([turn.sum() for turn in turns])
        last_rows = np.where((whole > 0) & (gone >= shares * gone.sum()), batches.sizes[begins + counts - 1], 0)
        owners = _end_with(owners, last_rows)
    # The turns of a source come in their order.
    numbers = np.empty_like(owners)
    numbers[np.argsort(owners, kind="stable")] = concatenate_ranges(np.zeros_like(whole), whole)
    starts = begins[owners] + numbers * num_replicas
    order = (starts[:, None] + np.arange(num_replicas)).ravel()
    rest = concatenate_ranges(begins + whole * num_replicas, counts - whole * num_replicas)
    return np.concatenate([order, _order_rest(rest, batches.sizes, sources)])


def _end_with(owners: Integers, last_rows: Integers) -> Integers:
    """The order of turns with the last turn of that source last whose last batch has the most rows.

    A source that has had its share when the epoch ends may have its last turn as late as that: before it, the source
    lacks less than a turn.

    Args:
        owners: The source of each turn.
        last_rows: Rows of the last batch of each source that may be last, int64 `[sources]`; 0 for the others.
    """
    best = int(last_rows.argmax())
    if last_rows[best] <= last_rows[owners[-1]]:
        return owners
    last = int(np.flatnonzero(owners == best)[-1])
    return np.concatenate([owners[:last], owners[last + 1 :], owners[last : last + 1]])


def _order_rest(rest: Integers, sizes: Integers, sources: Integers) -> Integers:
    """The batches without a turn by rows, so that neighbours are alike; those of a source stay in their order."""
    by_rows = rest[np.argsort(sizes[rest], kind="stable")]
    # A source's batches must not change places: its places take them in their order.
    for source in np.unique(sources[rest]).tolist():
        places = np.flatnonzero(sources[by_rows] == source)
        by_rows[places] = np.sort(by_rows[places])
    return by_rows
