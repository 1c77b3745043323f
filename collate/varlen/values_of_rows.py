"""A list of documents -> rows of values: everything is joined once, gaps between."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from collate.options import Number
from collate.padding import Rows, check_shapes
from collate.tensors.numpy_view import Int64Array
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
        capacity = max(int(aligned_lengths(lengths, options.align).sum()), options.align)
    check_int32(len(per_row), capacity)
    limits = {"max_documents": options.max_documents, "max_seqlen": options.max_seqlen}
    if options.max_seqlen is not None:
        check_fit(lengths, per_row, capacity=capacity, align=options.align, **limits)
    return DocumentLayout.of_arrays(
        lengths, per_row, permutation, None, capacity=capacity, align=options.align, **limits
    )


def join_documents(rows: Rows, layout: DocumentLayout, padding_value: Number) -> Tensor:
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
    if not rows.lengths.all():
        # An empty document is left out below, so that joining does not compare its shape with the others'.
        check_shapes(rows.items, rows.name)
    total = layout.num_rows * layout.capacity
    order, lengths, starts = layout.array("permutation"), layout.array("lengths"), layout.starts()
    # The gap before each document, and the one behind the last.
    gaps = np.append(starts, total) - np.append(0, starts + lengths)
    items = rows.in_order(order)
    if gaps.any() or not lengths.all():
        items = _with_gaps(rows, items, gaps.tolist(), padding_value)
    return rows.join(items, total).view(layout.num_rows, layout.capacity, *rows.features)


def _with_gaps(rows: Rows, items: list[Any], gaps: list[int], padding_value: Number) -> list[Any]:
    like = rows.items[0]
    device = like.device if isinstance(like, Tensor) else None
    padding = torch.full((max(gaps), *rows.features), padding_value, dtype=rows.dtype, device=device)
    steps: Any = padding if isinstance(like, Tensor) else padding.numpy()
    pieces: list[Any] = []
    for gap, item in zip(gaps, [*items, None], strict=True):
        if gap:
            pieces.append(steps[:gap])
        # torch joins one by one as soon as one piece is empty; what is differentiated stays in the graph nevertheless.
        if item is not None and (len(item) or (isinstance(item, Tensor) and item.requires_grad)):
            pieces.append(item)
    return pieces
