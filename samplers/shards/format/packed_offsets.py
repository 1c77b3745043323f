"""Offsets of samples in four bytes: 64 rows have a base, to which each adds a difference.

>>> offsets = np.array([[1664], [1676], [1680], [9000]])
>>> packed = PackedOffsets(bases=np.array([[1664]]), differences=(offsets - 1664).astype("<u4"))
>>> packed[np.array([3, 0]), 0].tolist(), packed.differences.nbytes
([9000, 1664], 16)
"""

from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from samplers.shards.format.npy import AnyArray

# 64 rows have a base.
_SHIFT: Final = 6
_MOST: Final = np.iinfo(np.uint32).max


class PackedOffsets:
    """The offsets of N samples in M fields, as an array `[N, M]`: added up row by row, because it is a memory map.

    Args:
        bases: int64 `[ceil(N / 64), M]`.
        differences: uint32 `[N, M]`.
    """

    def __init__(self, bases: AnyArray, differences: AnyArray) -> None:
        self.bases, self.differences = bases, differences
        self.dtype = np.dtype(np.int64)
        self.shape: tuple[int, ...] = differences.shape
        # To cut a column costs as much as to look up 64 rows of it.
        self._columns = [(bases[:, column], differences[:, column]) for column in range(differences.shape[1])]

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedOffsets, (self.bases, self.differences)

    def __getitem__(self, key: Any) -> Any:
        rows, column = key if isinstance(key, tuple) else (key, slice(None))
        # NumPy refuses rows out of range in `differences`, and only there.
        return (self.bases[self._as_indices(rows) >> _SHIFT] + self.differences[rows])[..., column]

    def at(self, rows: AnyArray, column: int) -> AnyArray:
        """The offsets of a field, for rows that are not negative: int64 `[n]`."""
        bases, differences = self._columns[column]
        offsets: AnyArray = bases[rows >> _SHIFT] + differences[rows]
        return offsets

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> AnyArray:  # noqa: FBT001 (NumPy's protocol)
        offsets: AnyArray = self[:]
        return offsets if dtype is None else offsets.astype(dtype)

    def _as_indices(self, rows: Any) -> AnyArray:
        """Rows in any form that NumPy takes, as indices that are not negative."""
        if isinstance(rows, slice):
            return np.arange(*rows.indices(len(self)))
        indices = np.asarray(rows)
        if indices.dtype == np.bool_:
            return np.flatnonzero(indices)
        return np.where(indices < 0, indices + len(self), indices)


def group_count(samples: int) -> int:
    """The number of bases for some samples."""
    return -(-samples >> _SHIFT)


def find_bases(parts: Iterable[AnyArray], samples: int, fields: int) -> AnyArray | None:
    """The bases of offsets that come in parts `[n, M]`. None if a difference needs more than four bytes.

    Args:
        parts: The offsets.
        samples: N, the rows of all parts.
        fields: M.
    """
    groups = group_count(samples)
    lowest = np.full((groups, fields), np.iinfo(np.int64).max)
    highest = np.full((groups, fields), np.iinfo(np.int64).min)
    row = 0
    for offsets in parts:
        if not len(offsets):
            continue
        # The groups that begin in this part, and the one that began before it.
        first, last = row >> _SHIFT, (row + len(offsets) - 1) >> _SHIFT
        starts = np.maximum((np.arange(first, last + 1) << _SHIFT) - row, 0)
        lowest[first : last + 1] = np.minimum(lowest[first : last + 1], np.minimum.reduceat(offsets, starts))
        highest[first : last + 1] = np.maximum(highest[first : last + 1], np.maximum.reduceat(offsets, starts))
        row += len(offsets)
    return None if (highest - lowest > _MOST).any() else lowest


def subtract_bases(parts: Iterable[AnyArray], bases: AnyArray) -> Iterable[AnyArray]:
    """The differences of offsets to their bases, part by part.

    Yields:
        uint32 `[n, M]`.
    """
    row = 0
    for offsets in parts:
        yield (offsets - bases[np.arange(row, row + len(offsets)) >> _SHIFT]).astype("<u4")
        row += len(offsets)
