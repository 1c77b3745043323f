"""A list of documents -> rows of values: everything is joined once, gaps between."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from collate.padding.rows import RaggedRows, check_shapes
from collate.tensors.numpy_view import Int64Array
from collate.tensors.steps import PaddingValue
from collate.varlen.layout import DocumentLayout, check_fit, check_int32
from collate.varlen.offsets import aligned_lengths
from collate.varlen.rows import RowOptions


def make_layout(
    lengths: Int64Array, per_row: Int64Array, permutation: Int64Array, options: RowOptions
) -> DocumentLayout:
    """The layout of documents that `RowOptions.fill` has put into rows.

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
    return DocumentLayout(arrays, capacity=capacity, align=options.align, **caps)


def join_documents(rows: RaggedRows, layout: DocumentLayout, padding_value: PaddingValue) -> Tensor:
    """Join documents and the gaps between them: every step of the rows is written once.

    Args:
        rows: N documents in source order, on one device; gradients flow back to tensors that require them.
        layout: where they go; its permutation says which each is.
        padding_value: what the gaps hold; the dtype must be able to hold it (`check_padding_value`).

    Returns:
        `[R, C, *F]` on the documents' device, memory of its own.

    Raises:
        ValueError: Numbers of axes or feature shapes differ.
    """
    # For the few integers of a batch, Python's own sum takes a fifth of NumPy's time.
    counts = rows.lengths.tolist()
    has_empty = 0 in counts
    if has_empty:
        # An empty document is left out below, so that joining does not compare its shape with the others'.
        check_shapes(rows.items, rows.name)
    shape = layout.num_rows, layout.capacity
    total, steps = shape[0] * shape[1], sum(counts)
    order = layout.array("permutation").tolist()
    all_items: Any = rows.items
    items = [all_items[place] for place in order]
    if has_empty or steps < total:
        padding = _padding_of(rows, gaps_of(layout).tolist(), padding_value)
        items = _with_gaps(items, [counts[place] for place in order], padding)
    return rows.join(items, total).view(*shape, *rows.features)


def gaps_of(layout: DocumentLayout) -> Int64Array:
    """Steps before each document that belong to none, and behind the last one: int64 `[N + 1]`."""
    starts, total = layout.starts(), layout.num_rows * layout.capacity
    ends = starts + layout.array("lengths")
    gaps = np.empty(len(starts) + 1, np.int64)
    gaps[:-1], gaps[-1] = starts, total
    gaps[1:] -= ends
    return gaps


def _padding_of(rows: RaggedRows, gaps: list[int], padding_value: PaddingValue) -> list[Any]:
    """What each gap holds, of the rows' own kind; None where it has no steps."""
    like = rows.items[0]
    device = like.device if isinstance(like, Tensor) else None
    filled = torch.full((max(gaps), *rows.features), padding_value, dtype=rows.dtype, device=device)
    padding: Any = filled if isinstance(like, Tensor) else filled.numpy()
    return [padding[:gap] if gap else None for gap in gaps]


def _with_gaps(items: list[Any], lengths: list[int], padding: list[Any]) -> list[Any]:
    """Items with a gap before each and behind the last, what is empty left out."""
    pieces: list[Any] = []
    for item, length, gap in zip(items, lengths, padding, strict=False):
        if gap is not None:
            pieces.append(gap)
        # torch joins one by one as soon as one piece is empty; what is differentiated stays in the graph nevertheless.
        if length or (isinstance(item, Tensor) and item.requires_grad):
            pieces.append(item)
    return pieces if padding[-1] is None else [*pieces, padding[-1]]
