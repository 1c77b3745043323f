"""MixedShards: the samples of a mixture of corpora in shards, by the sample indices of its plan."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, Final, Self

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.packs.documents import Pieces
from samplers.planning.sorting import IndexArray
from samplers.progress.window_reader import ShardsInOrder
from samplers.shards.format.samples import Sample
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.opening.open_shards import count_handles
from samplers.shards.opening.read_ahead import check_read_ahead
from samplers.shards.skipping import Handler, Skipping, make_skipping
from samplers.shards.split_dataset import check_range

# Shards that a source has open at least, when it is read: a batch may come from several of its window.
_FEWEST_OPEN: Final = 8


class MixedShards:
    """The samples of several corpora in shards; each is opened where it is read.

    Args:
        mixture: Its sources are indexes of shards.
        fields: The fields that samples hold; None for all.
        handler: What happens to samples that cannot be read.
        max_failed: The share of all samples that may be skipped.
        read_ahead_bytes: Bytes of remote shards that are fetched ahead, of all sources together; at least one shard of
            each, unless it is 0.
        **options: As for `ShardsInOrder`.

    Attributes:
        sources: The samples of each source by its name, as `ShardsInOrder`.
        skipping: What all of them count their skipped samples with; None without a handler.

    Raises:
        TypeError: A source is not an index of shards.
        ValueError: Sources have different fields of variable length, or a field does not exist.
    """

    def __init__(
        self,
        mixture: Mixture,
        fields: Collection[str] | None = None,
        *,
        handler: Handler | None,
        max_failed: float | None,
        read_ahead_bytes: int,
        **options: Any,
    ) -> None:
        indexes: Mapping[str, Any] = check_indexes(mixture)
        ahead = check_read_ahead(read_ahead_bytes)
        # Counted together: a batch of several sources lacks a sample of one, and a few of a small source may fail.
        skipping = make_skipping(handler, max_failed, mixture.size)
        self.sources = {
            name: ShardsInOrder(index, fields=fields, read_ahead_bytes=-(-ahead // len(indexes)), **options)
            for name, index in indexes.items()
        }
        remote = [source for source in self.sources.values() if not source.is_local]
        # By number, the one that was not read for longest first.
        self._open: dict[int, None] = {}
        self._count_with((remote or list(self.sources.values()))[0], skipping)
        self._starts, self._size = mixture.starts, mixture.size
        self._first_pieces: Integers = np.zeros(len(indexes), np.int64)
        self._pieces = 0

    def __len__(self) -> int:
        """Samples of all sources, and pieces of split ones."""
        return self._size + self._pieces

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} samples, {len(self.shards)} shards, sources={list(self.sources)})"

    @property
    def shards(self) -> list[str]:
        """The paths of the shards of all sources."""
        return [path for source in self.sources.values() for path in source.index.shards]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of variable length, the same in all sources."""
        return next(iter(self.sources.values())).fields

    @property
    def is_local(self) -> bool:
        """Whether no shard is remote, so that a batch can be read by itself."""
        return all(source.is_local for source in self.sources.values())

    @property
    def reads_ahead(self) -> bool:
        """Whether shards are fetched before they are read."""
        return next(iter(self.sources.values())).reads_ahead

    @property
    def has_room_ahead(self) -> bool:
        """Whether more shards of every source can be announced now."""
        return all(source.has_room_ahead for source in self.sources.values())

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Samples that were skipped so far, in all workers: `{shard: {reason: count}}`."""
        return {} if self.skipping is None else self.skipping.counts

    @property
    def transfers(self) -> dict[str, Any]:
        """What was transferred of remote shards so far, in all workers, as in `ShardDataset`."""
        return self._first.transfers

    def __getitem__(self, index: int) -> Sample:
        """The sample of one index; the errors are those of `ShardDataset`."""
        [(number, _, local)] = self._split(check_range([index], len(self)))
        return self._source(number)[int(local[0])]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices, in this order; the errors are those of `ShardDataset`."""
        rows = check_range(indices, len(self))
        parts = list(self._split(rows))
        if len(parts) == 1:
            number, _, local = parts[0]
            return self._source(number).__getitems__(local.tolist())
        return self.sift(self.read_in_order(rows))

    def sift(self, read: list[Any]) -> list[Sample]:
        """The samples of a batch without those that could not be read, as of `ShardsInOrder`."""
        return read if self.skipping is None else self.skipping.sift(read)

    def read_in_order(self, sample_indices: IndexArray) -> list[Any]:
        """These samples, read source after source and shard after shard, in the order in which they were asked for."""
        samples: list[Any] = [None] * len(sample_indices)
        for number, entries, local in self._split(sample_indices):
            for entry, sample in zip(entries.tolist(), self._source(number).read_in_order(local), strict=True):
                samples[entry] = sample
        return samples

    def read_soon(self, sample_indices: IndexArray) -> None:
        """Fetch the shards of these samples in the background, those of each source after its earlier ones."""
        for number, _, local in self._split(sample_indices):
            self._source(number).read_soon(local)

    def forget_ahead(self) -> None:
        """Forget what was announced: another iteration begins."""
        for source in self.sources.values():
            source.forget_ahead()

    def with_pieces(self, pieces: Pieces | None) -> Self:
        """The same samples with the pieces of split ones, whose indices follow; those of a source are neighbours."""
        new = copy(self)
        new._open = {}  # noqa: SLF001
        if pieces is None:
            return new
        borders = np.searchsorted(pieces.samples, [*self._starts.tolist(), self._size])
        new._first_pieces, new._pieces = borders[:-1], len(pieces.samples)  # noqa: SLF001
        new.sources = {
            name: source.with_pieces(
                Pieces(pieces.samples[first:end] - start, pieces.starts[first:end], pieces.stops[first:end])
            )
            for (name, source), start, first, end in zip(
                self.sources.items(), self._starts.tolist(), borders.tolist(), borders[1:].tolist(), strict=False
            )
        }
        return new

    @property
    def counts_of(self) -> ShardsInOrder | None:
        """A source whose counts of transfers are those of all; None if no shard is remote."""
        return None if self._first.is_local else self._first

    def count_on(self, before: "MixedShards") -> None:
        """Count what is skipped and transferred together with the samples of the mixture before."""
        counts = before.counts_of
        self._count_with(self._first if counts is None else counts, before.skipping)

    def _count_with(self, first: ShardsInOrder, skipping: Skipping | None) -> None:
        """Let all sources count together, and share the files that a process may have open."""
        self._first, self.skipping = first, skipping
        # Many sources take turns to have shards open, so that a process has no more files open than for one corpus.
        most = max(_FEWEST_OPEN, count_handles() // len(self.sources))
        self._most_sources = max(1, count_handles() // most)
        for source in self.sources.values():
            counts_of = None if source.is_local else first
            source.join_sources(skipping=skipping, counts_of=counts_of, most_open=most)

    def _source(self, number: int) -> ShardsInOrder:
        """A source that is read now; the one that was not read for longest closes its shards."""
        sources = list(self.sources.values())
        self._open.pop(number, None)
        self._open[number] = None
        while len(self._open) > self._most_sources:
            oldest = next(iter(self._open))
            self._open.pop(oldest, None)
            sources[oldest].close()
        return sources[number]

    def _split(self, sample_indices: IndexArray) -> Iterator[tuple[int, Integers, Integers]]:
        """The samples source by source.

        Yields:
            The number of a source, the entries of its samples, int64 `[n]`, and their indices in it, int64 `[n]`.
        """
        indices = np.asarray(sample_indices, np.int64)
        is_piece = indices >= self._size
        piece = np.where(is_piece, indices - self._size, 0)
        owners = np.where(
            is_piece,
            np.searchsorted(self._first_pieces, piece, side="right"),
            np.searchsorted(self._starts, indices, side="right"),
        )
        owners -= 1
        sizes = np.diff(self._starts, append=self._size)
        local = np.where(is_piece, sizes[owners] + piece - self._first_pieces[owners], indices - self._starts[owners])
        for number in np.unique(owners).tolist():
            entries = np.flatnonzero(owners == number)
            yield number, entries, local[entries]


def check_indexes(mixture: Mixture) -> Mapping[str, LengthIndex]:
    """The indexes of a mixture's sources by name.

    Raises:
        TypeError: A source is not an index of shards.
        ValueError: They have different fields of variable length.
    """
    indexes: dict[str, LengthIndex] = {}
    for name, lengths in mixture.sources.items():
        if not isinstance(lengths, LengthIndex):
            raise TypeError(
                f"source {name!r} of a stream must be a LengthIndex of shards, which tells where its samples are, got "
                f"lengths of type {type(lengths).__name__}: give LengthIndex.open(...) or build(...), or plan these "
                "lengths with a LengthBucketBatchSampler or a PackingBatchSampler, and read with mixture.concat"
            )
        indexes[name] = lengths
    fields = {name: index.fields for name, index in indexes.items()}
    if len(set(fields.values())) > 1:
        raise ValueError(f"sources of a stream must have the same fields of variable length, got {fields}")
    return indexes
