"""Offsets of documents and gaps, in closed form from host integers.

Two rows of capacity 8, with documents of 3, 2 and 4 steps that start at multiples of 4. The first row holds two
documents, the second one, and each document has a gap behind it:

>>> lengths, per_row = np.array([3, 2, 4]), np.array([2, 1])
>>> starts = document_starts(lengths, per_row, capacity=8, align=4)
>>> starts
array([0, 4, 8])
>>> table = offset_table(lengths, per_row, capacity=8, align=4, slots=8)
>>> table[CU_SEQLENS]
array([ 0,  3,  4,  6,  8, 12, 16, 16, 16], dtype=int32)
>>> table[DOCUMENT]
array([ 0, -1,  1, -1,  2, -1, -1, -1, -1], dtype=int32)
>>> table[CU_SEQLENS_PADDED], table[CU_SEQLENS_REAL]
(array([ 0,  4,  8, 12, 16, 16, 16, 16, 16], dtype=int32), array([0, 3, 5, 9, 9, 9, 9, 9, 9], dtype=int32))
"""

from itertools import accumulate
from typing import Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collate.tensors.numpy_view import Int64Array

Int32Array: TypeAlias = npt.NDArray[np.int32]

# Rows of the table of offsets, which is sent to a device as one tensor.
CU_SEQLENS, CU_SEQLENS_PADDED, CU_SEQLENS_REAL, DOCUMENT, FIRST_POSITION = range(5)

# Kernels take offsets as int32.
MOST_STEPS: Final = (1 << 31) - 1


def aligned_lengths(lengths: Int64Array, align: int) -> Int64Array:
    """Lengths rounded up to multiples of `align`: int64 `[N]`."""
    return lengths if align == 1 else -(-lengths // align) * align


def document_starts(lengths: Int64Array, per_row: Int64Array, capacity: int, align: int) -> Int64Array:
    """First step of each document in rows laid one after the other: int64 `[N]`, in `[0, R * C]`.

    Args:
        lengths: int64 `[N]`, documents in row order.
        per_row: int64 `[R]`, documents in each row.
        capacity: C.
        align: documents start at its multiples within their row.
    """
    before = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(aligned_lengths(lengths, align), out=before[1:])
    if len(per_row) == 1:
        return before[:-1]
    row_starts = np.arange(len(per_row)) * capacity - before[np.cumsum(per_row) - per_row]
    return cast(Int64Array, before[:-1] + np.repeat(row_starts, per_row))


def count_slots(rows: int, max_documents: int, align: int) -> int:
    """Slots of a table: as many segments as `rows` rows can have with at most `max_documents` documents each.

    Without alignment only the end of a row is a gap; otherwise each document may have one behind it.
    """
    return rows * (max_documents + 1 if align == 1 else 2 * max(max_documents, 1))


def offset_table(
    lengths: Int64Array,
    per_row: Int64Array,
    *,
    first_steps: Int64Array | None = None,
    capacity: int,
    align: int,
    slots: int,
) -> Int32Array:
    """All offsets of a batch in one array.

    Args:
        lengths: int64 `[N]`, documents in row order.
        per_row: int64 `[R]`.
        first_steps: int64 `[N]`, the position of each document's first step; None is all 0.
        capacity: C.
        align: documents start at its multiples within their row.
        slots: S, at least the number of segments.

    Returns:
        int32 `[5, S + 1]`. `CU_SEQLENS`: bounds of all segments. `DOCUMENT`: which document each segment is, -1 for a
        gap. `FIRST_POSITION`: position of each segment's first step. `CU_SEQLENS_PADDED`: bounds of documents together
        with the gap that alignment leaves behind them, and of the remainder of a row; `CU_SEQLENS_REAL`: real steps
        before each of these. Slots that are not used repeat the last offset.
    """
    table = np.empty((5, slots + 1), np.int32)
    if align == 1 and len(per_row) == 1:
        _fill_one_row(table, lengths, capacity)
    elif align == 1:
        _fill_unaligned(table, lengths, per_row, capacity)
    else:
        _fill_aligned(table, lengths, per_row, capacity, align)
    table[FIRST_POSITION] = 0
    if first_steps is not None:
        table[FIRST_POSITION, document_slots(table)] = first_steps
    return table


def _fill_one_row(table: Int32Array, lengths: Int64Array, capacity: int) -> None:
    """What `_fill_unaligned` does, for one row."""
    size = len(lengths)
    table[CU_SEQLENS, 0] = 0
    np.add.accumulate(lengths, dtype=np.int32, out=table[CU_SEQLENS, 1 : size + 1])
    end = table[CU_SEQLENS, size]
    table[CU_SEQLENS, size + 1 :] = end
    table[CU_SEQLENS_PADDED : CU_SEQLENS_REAL + 1] = table[CU_SEQLENS]
    if end < capacity:
        table[:CU_SEQLENS_REAL, size + 1 :] = capacity
    table[DOCUMENT, :size], table[DOCUMENT, size:] = np.arange(size), -1


def _fill_unaligned(table: Int32Array, lengths: Int64Array, per_row: Int64Array, capacity: int) -> None:
    """Fill the table where documents follow each other: gaps are at the ends of rows only, and both bounds are equal.

    Rows of 4 steps with documents of 3 and 4 steps have one gap, in slot 1; the second document is in slot 2:

    >>> table = np.empty((5, 5), np.int32)
    >>> _fill_unaligned(table, np.array([3, 4]), np.array([1, 1]), 4)
    >>> table[:4].tolist()
    [[0, 3, 4, 8, 8], [0, 3, 4, 8, 8], [0, 3, 3, 7, 7], [0, -1, 1, -1, -1]]
    """
    # Lists take two thirds of the time of arrays: rows are few, and their documents too.
    counts, bounds, real, documents = lengths.tolist(), list[int](), list[int](), list[int]()
    first = row_start = waste = 0
    for count in per_row.tolist():
        through, row_end = first + count, row_start + capacity
        ends = list(accumulate(counts[first:through], initial=row_start))
        gap = row_end - ends[-1]
        documents += range(first, through)
        if gap:
            documents.append(-1)
        else:
            ends.pop()
        bounds += ends
        # Before a step are the real steps and the gaps of earlier rows.
        real += [end - waste for end in ends]
        first, row_start, waste = through, row_end, waste + gap
    used = len(bounds)
    table[CU_SEQLENS_PADDED : DOCUMENT + 1, :used] = bounds, real, documents
    table[CU_SEQLENS_PADDED, used:], table[CU_SEQLENS_REAL, used:] = row_start, row_start - waste
    table[DOCUMENT, used:] = -1
    table[CU_SEQLENS] = table[CU_SEQLENS_PADDED]


def row_end_gaps(lengths: Int64Array, per_row: Int64Array, capacity: int) -> list[int]:
    """Steps behind the documents of each row, where documents follow each other.

    >>> row_end_gaps(np.array([3, 1, 2]), np.array([2, 1]), capacity=4)
    [0, 2]
    """
    counts, first, gaps = lengths.tolist(), 0, list[int]()
    for count in per_row.tolist():
        gaps.append(capacity - sum(counts[first : first + count]))
        first += count
    return gaps


def _fill_aligned(table: Int32Array, lengths: Int64Array, per_row: Int64Array, capacity: int, align: int) -> None:
    """Fill the table where each document may have a gap behind it."""
    starts = document_starts(lengths, per_row, capacity, align)
    bounds, documents = segments(starts, starts + lengths, per_row, capacity)
    table[CU_SEQLENS], table[DOCUMENT] = len(per_row) * capacity, -1
    table[CU_SEQLENS, : len(bounds)] = bounds
    table[DOCUMENT, : len(bounds)] = documents
    bounds, documents = segments(starts, starts + aligned_lengths(lengths, align), per_row, capacity)
    table[CU_SEQLENS_PADDED] = len(per_row) * capacity
    table[CU_SEQLENS_PADDED, : len(bounds)] = bounds
    steps = np.zeros(table.shape[1] + 1, np.int64)
    steps[1 : len(bounds) + 1][documents >= 0] = lengths
    np.cumsum(steps[:-1], out=table[CU_SEQLENS_REAL])


def segments(starts: Int64Array, ends: Int64Array, per_row: Int64Array, capacity: int) -> tuple[Int64Array, Int64Array]:
    """All segments in order: where each begins, and which document it is (-1 for a gap); gaps of no steps are left out.

    Args:
        starts: int64 `[N]`, as from `document_starts`.
        ends: int64 `[N]`, behind each document, or behind its alignment.
        per_row: int64 `[R]`.
        capacity: C.
    """
    size, rows, through = len(starts), len(per_row), np.cumsum(per_row)
    # A document is followed by its gap, and a row begins with one, which has steps only where the row is empty.
    width = 2 * size + rows
    bounds, documents, has_steps = np.empty(width, np.int64), np.full(width, -1), np.ones(width, np.bool_)
    first = 2 * (through - per_row) + np.arange(rows)
    place = 2 * np.arange(size) + np.repeat(np.arange(1, rows + 1), per_row)
    bounds[first], has_steps[first] = np.arange(0, rows * capacity, capacity), per_row == 0
    bounds[place], documents[place] = starts, np.arange(size)
    # The next document begins where the gap ends; behind the last one of a row that is the row's end.
    following = np.empty(size, np.int64)
    following[:-1] = starts[1:]
    ending = per_row > 0
    following[through[ending] - 1] = np.arange(capacity, (rows + 1) * capacity, capacity)[ending]
    bounds[place + 1], has_steps[place + 1] = ends, ends < following
    return bounds[has_steps], documents[has_steps]


def spread_on_host(table: Int32Array, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Document ids int32 and position ids int64, both `[R, C]`, from a table on the host."""
    counts = np.diff(table[CU_SEQLENS])
    documents = np.repeat(table[DOCUMENT, :-1], counts)
    shifts = table[FIRST_POSITION, :-1].astype(np.int64) - table[CU_SEQLENS, :-1]
    positions = np.arange(len(documents)) + np.repeat(shifts, counts)
    positions[documents < 0] = 0
    return torch.from_numpy(documents).view(shape), torch.from_numpy(positions).view(shape)


def spread_on_device(table: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same from a table on any device: shapes are fixed, so that it can be compiled, and nothing waits."""
    steps = torch.arange(shape[0] * shape[1], device=table.device, dtype=torch.int32)
    slot = torch.searchsorted(table[CU_SEQLENS, 1:].contiguous(), steps, right=True, out_int32=True)
    documents = table[DOCUMENT].index_select(0, slot)
    shifts = (table[FIRST_POSITION] - table[CU_SEQLENS]).index_select(0, slot)
    positions = torch.where(documents < 0, 0, steps + shifts).to(torch.int64)
    return documents.view(shape), positions.view(shape)


def document_slots(table: Int32Array) -> Int64Array:
    """The slot of `CU_SEQLENS` that each document has: int64 `[N]`."""
    return cast(Int64Array, np.flatnonzero(table[DOCUMENT] >= 0))
