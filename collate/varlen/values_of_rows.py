"""A list of documents -> rows of values: everything is joined once, gaps between."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from collate.padding.rows import RaggedRows, check_shapes
from collate.padding.unread import UnreadRows
from collate.tensors.numpy_view import Int64Array
from collate.tensors.steps import PaddingValue
from collate.varlen.offsets import aligned_lengths, row_end_gaps
from collate.varlen.rows import RowOptions
from collate.varlen.spans import DocumentSpans, check_fit, check_int32


def make_spans(lengths: Int64Array, per_row: Int64Array, permutation: Int64Array, options: RowOptions) -> DocumentSpans:
    """The spans of documents that `RowOptions.fill` has put into rows.

    Args:
        lengths: int64 `[N]`, in row order.
        per_row: int64 `[R]`.
        permutation: int64 `[N]`.
        options: what the rows were made with; without a capacity a row is as long as it must be.

    Raises:
        LengthError: A document is longer than `max_seqlen`, or the rows have too many steps for int32 offsets.
    """
    capacity = options.capacity
    if capacity is None:
        capacity = max(sum(aligned_lengths(lengths, options.align).tolist()), options.align)
    check_int32(len(per_row), capacity)
    caps: dict[str, Any] = {"max_documents": options.max_documents, "max_seqlen": options.max_seqlen}
    if options.max_seqlen is not None:
        check_fit(lengths, per_row, capacity=capacity, align=options.align, **caps)
    arrays = {"lengths": lengths, "documents_per_row": per_row, "permutation": permutation}
    return DocumentSpans(arrays, capacity=capacity, align=options.align, **caps)


def join_documents(rows: RaggedRows, spans: DocumentSpans, padding_value: PaddingValue) -> Tensor:
    """Join documents and the gaps between them: every step of the rows is written once.

    Args:
        rows: N documents in source order, on one device; gradients flow back to tensors that require them.
        spans: where they go; its permutation says which each is.
        padding_value: what the gaps hold; the dtype must be able to hold it (`check_padding_value`).

    Returns:
        `[R, C, *F]` on the documents' device, memory of its own.

    Raises:
        ValueError: Numbers of axes or feature shapes differ.
    """
    if isinstance(rows, UnreadRows):
        first_steps = np.empty(len(rows.lengths), np.int64)
        first_steps[spans.array("permutation")] = spans.starts()
        return rows.pad_documents(first_steps, (spans.num_rows, spans.capacity), padding_value)
    # For the few integers of a batch, Python's own functions take a fifth of the time of NumPy's.
    counts = rows.lengths.tolist()
    has_empty = 0 in counts
    if has_empty:
        # An empty document is left out below, so that joining does not compare its shape with the others'.
        check_shapes(rows.items, rows.name)
    shape = spans.num_rows, spans.capacity
    total = shape[0] * shape[1]
    order = spans.array("permutation").tolist()
    pieces: list[Any] = [rows.items[index] for index in order]
    if sum(counts) < total:
        gaps = gaps_of(spans)
        padding = _padding_of(rows, set(gaps.values()), padding_value)
        # From the end on, so that earlier indices stay as they are.
        for index, gap in reversed(gaps.items()):
            pieces.insert(index, padding[gap])
    if has_empty:
        # torch joins one by one as soon as one piece is empty; what is differentiated stays in the graph nevertheless.
        pieces = [piece for piece in pieces if len(piece) or (isinstance(piece, Tensor) and piece.requires_grad)]
    return rows.join(pieces, total).view(*shape, *rows.features)


def gaps_of(spans: DocumentSpans) -> dict[int, int]:
    """The steps of each gap, by the document that it is before; N for the gap at the end, what is empty left out.

    Rows of 8 steps, with documents of 3 and 2 steps in the first and of 4 in the second, each from a multiple of 4 on:

    >>> arrays = {"lengths": np.array([3, 2, 4]), "documents_per_row": np.array([2, 1]), "permutation": np.arange(3)}
    >>> gaps_of(DocumentSpans(arrays, capacity=8, align=4)), gaps_of(DocumentSpans(arrays, capacity=8))
    ({1: 1, 2: 2, 3: 4}, {2: 3, 3: 4})
    """
    lengths, per_row = spans.array("lengths"), spans.array("documents_per_row")
    if spans.align == 1:
        gaps: dict[int, int] = {}
        for through, gap in zip(per_row.cumsum().tolist(), row_end_gaps(lengths, per_row, spans.capacity), strict=True):
            if gap:
                # The gap of an empty row continues the one before it.
                gaps[through] = gaps.get(through, 0) + gap
        return gaps
    starts = spans.starts()
    steps = np.append(starts, spans.num_rows * spans.capacity) - np.append(0, starts + lengths)
    return {index: gap for index, gap in enumerate(steps.tolist()) if gap}


def _padding_of(rows: RaggedRows, sizes: set[int], padding_value: PaddingValue) -> dict[int, Any]:
    """What gaps of each size hold, of the rows' own kind."""
    like = rows.items[0]
    device = like.device if isinstance(like, Tensor) else "cpu"
    filled = torch.full((max(sizes), *rows.features), padding_value, dtype=rows.dtype, device=device)
    padding: Any = filled if isinstance(like, Tensor) else filled.numpy()
    return {size: padding[:size] for size in sizes}
