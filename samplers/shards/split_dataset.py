"""Pieces of long samples: indices from N on, each a run of time steps of a sample that is longer than a row.

A packing sampler with `overlong="split"` numbers the pieces; here they are read. A sample of 5 steps in rows of 3:

>>> from types import SimpleNamespace
>>> pieces = SimpleNamespace(samples=np.array([1, 1]), starts=np.array([0, 3]), stops=np.array([3, 5]))
>>> dataset = SplitDataset([[7, 8], [1, 2, 3, 4, 5]], pieces)
>>> len(dataset), [dataset[index] for index in (0, 2, 3)]
(4, [[7, 8], [1, 2, 3], [4, 5]])
"""

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, cast

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from collate.errors import LengthError


class PieceTable(Protocol):
    """The pieces of split samples; those of one sample follow each other."""

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """The sample of each piece, int64 `[P]`."""
        ...

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Its first step, int64 `[P]`."""
        ...

    @property
    def stops(self) -> npt.NDArray[np.int64]:
        """The step after its last, int64 `[P]`."""
        ...


class PieceCutter:
    """Cuts pieces out of samples.

    Args:
        pieces: Where they are.
        size: N, samples of the dataset: piece j has the index N + j.
        fields: Fields that are cut; None where a sample is the sequence itself.

    Raises:
        TypeError: `fields` is a single string.
        ValueError: A piece is of a sample that the dataset does not have.
    """

    def __init__(self, pieces: PieceTable, size: int, fields: Collection[str | int] | None) -> None:
        if isinstance(fields, str):
            raise TypeError(f"fields must be a list of names, got the string {fields!r}")
        self._samples, self._starts, self._stops = pieces.samples, pieces.starts, pieces.stops
        if len(self._samples) and int(self._samples.max()) >= size:
            raise ValueError(
                f"pieces must be of the dataset's {size} samples, got one of sample {int(self._samples.max())}: give "
                "the dataset whose lengths the sampler has planned"
            )
        self._size, self._fields = size, fields
        # The last piece of a sample ends where the sample does.
        ends = np.flatnonzero(np.diff(self._samples, append=-1))
        self._planned = self._stops[ends[np.searchsorted(ends, np.arange(len(self._samples)))]]

    def __len__(self) -> int:
        """Pieces."""
        return len(self._samples)

    def sources(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The sample of each index `[n]`, of a sample or a piece, all in range."""
        is_piece = indices >= self._size
        sources = indices.copy()
        sources[is_piece] = self._samples[indices[is_piece] - self._size]
        return sources

    def cut(self, index: int, sample: Any) -> Any:
        """The sample itself, or the piece of this index of it.

        Raises:
            LengthError: A sequence has another length than it was planned with.
            TypeError: The sample is no sequence, and no fields are named.
        """
        if index < self._size:
            return sample
        piece = index - self._size
        if self._fields is None:
            if isinstance(sample, (Mapping, tuple, str, bytes)) or not hasattr(sample, "__getitem__"):
                raise TypeError(
                    f"fields must name the sequences that are cut, sample {self._samples[piece]} is a "
                    f"{type(sample).__name__}"
                )
            return self._cut(piece, sample, "")
        named = {field: self._cut(piece, sample[field], f", field {field!r}") for field in self._fields}
        if isinstance(sample, Mapping):
            return {**sample, **named}
        parts = list(sample)
        for number, part in named.items():
            parts[operator.index(cast(SupportsIndex, number))] = part
        return type(sample)(*parts) if hasattr(sample, "_fields") else type(sample)(parts)

    def _cut(self, piece: int, sequence: Any, field: str) -> Any:
        """The steps of a piece.

        Raises:
            LengthError: The sequence has another length than it was planned with.
        """
        if len(sequence) != self._planned[piece]:
            raise LengthError(
                f"sample {self._samples[piece]}{field}: {len(sequence)} steps, planned with {self._planned[piece]}: "
                "give the sampler the lengths of this dataset, and cut fields of that length only"
            )
        return sequence[int(self._starts[piece]) : int(self._stops[piece])]


class SplitDataset(Dataset[Any]):
    """A map-style dataset with the pieces of its long samples: indices from N on, as a packing sampler numbers them.

    A piece is its sample with some of the time steps: the fields that are named are cut, all others are whole. Long
    samples are read once for each batch. `ShardDataset` needs no wrapper: see its `with_pieces`.

    Args:
        dataset: N samples by index; with a method `__getitems__`, samples of a batch are read together.
        pieces: `sampler.pieces`; None where no sample is split.
        fields: Names (or indices, in a tuple) of the fields that are cut, each of the length with which the sample was
            planned. None (default) where a sample is the sequence itself: a tensor, an array or a list.

    Raises:
        TypeError: `fields` is a single string.
        ValueError: A piece is of a sample that the dataset does not have, or `fields` is empty.
    """

    def __init__(self, dataset: Any, pieces: PieceTable | None, *, fields: Collection[str | int] | None = None) -> None:
        if fields is not None and len(fields) == 0:
            raise ValueError("fields must name the sequences that are cut, got none: pieces would be whole samples")
        self.dataset = dataset
        self._cutter = None if pieces is None else PieceCutter(pieces, len(dataset), fields)

    def __repr__(self) -> str:
        pieces = 0 if self._cutter is None else len(self._cutter)
        return f"{type(self).__name__}({len(self) - pieces} samples, {pieces} pieces)"

    def __len__(self) -> int:
        """Samples and pieces."""
        return len(self.dataset) + (0 if self._cutter is None else len(self._cutter))

    def __getitem__(self, index: int) -> Any:
        """The sample or piece of one index. The errors are those of `__getitems__`."""
        return self.__getitems__([operator.index(index)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples and pieces of these indices, in this order.

        Raises:
            IndexError: An index is not in the dataset.
            LengthError: A sequence has another length than it was planned with.
            RuntimeError: The dataset leaves samples out, so that it is not known which.
            TypeError: A sample is no sequence, and no fields are named.
        """
        rows = check_range(indices, len(self))
        if self._cutter is None:
            return self._read(rows.tolist())
        sources, which = np.unique(self._cutter.sources(rows), return_inverse=True)
        samples = self._read(sources.tolist())
        pairs: Iterable[tuple[int, int]] = zip(rows.tolist(), which.reshape(-1).tolist(), strict=True)
        return [self._cutter.cut(row, samples[source]) for row, source in pairs]

    def _read(self, indices: list[int]) -> list[Any]:
        """Samples of the dataset.

        Raises:
            RuntimeError: It leaves some out.
        """
        if not hasattr(self.dataset, "__getitems__"):
            return [self.dataset[index] for index in indices]
        samples: list[Any] = self.dataset.__getitems__(indices)
        if len(samples) != len(indices):
            raise RuntimeError(
                f"the dataset gave {len(samples)} of {len(indices)} samples, and it is not known which: use "
                "ShardDataset.with_pieces, or let no handler skip samples"
            )
        return samples


def check_range(indices: Sequence[int], total: int) -> npt.NDArray[np.int64]:
    """Indices as int64 `[n]`; negative ones count from the end.

    Raises:
        IndexError: One is not in the range.
        TypeError: They are not integers.
    """
    rows = np.asarray(indices) if len(indices) else np.arange(0)
    if rows.dtype.kind not in "iu" or rows.ndim != 1:
        raise TypeError(f"indices must be a list of integers, got {rows.dtype} {list(rows.shape)}")
    if rows.dtype == np.uint64:
        # What 63 bits do not hold is not in the range either.
        rows = np.minimum(rows, np.uint64(np.iinfo(np.int64).max))
    rows = rows.astype(np.int64, copy=False)
    # Without a sign, negative ones are above all others.
    if not len(rows) or rows.view(np.uint64).max() < total:
        return rows
    rows = np.where(rows < 0, rows + total, rows)
    outside = np.flatnonzero((rows < 0) | (rows >= total))
    if len(outside):
        raise IndexError(f"index {indices[outside[0]]} is not among the {total} samples of the corpus")
    return rows
