"""A list of variable-length rows -> padded values `[B, T, *F]`, written once.

There are three ways, chosen by speed. Short rows are joined once, and all real time steps are scattered at once by the
mask. Long rows are joined together with their tails of padding: rows [1, 2] and [3] at width 3 are the one
concatenation [1, 2 | 0 | 3 | 0, 0], viewed as 2 x 3. Very long rows are copied one by one into uninitialised memory.

>>> from collate.padding.rows import measure_rows
>>> from collate.tensors.masks import length_mask
>>> rows = measure_rows([np.array([1, 2]), np.array([3])])
>>> join_rows(rows, np.array([0, 1]), (2, 3), padding_value=0)
tensor([[1, 2, 0],
        [3, 0, 0]])
>>> scatter_by_mask(torch.tensor([3, 1, 2]), length_mask(np.array([1, 2]), 3), padding_value=-1)
tensor([[ 3, -1, -1],
        [ 1,  2, -1]])
"""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from collate.padding.padding_value import bits_of_number
from collate.padding.rows import RaggedRows, Row, check_shapes
from collate.tensors.masks import BoolArray
from collate.tensors.numpy_view import Int64Array, bits_of, shares_memory
from collate.tensors.slabs.sending import new_values
from collate.tensors.steps import PaddingValue, scatter_steps
from collate.tensors.to_device import to_device


def pad_short_rows(rows: RaggedRows, order: Int64Array, mask: BoolArray, padding_value: PaddingValue) -> Tensor:
    """Join rows once and scatter all their time steps; arguments and result as of `join_rows`, with a mask `[B, T]`."""
    steps = rows.join(rows.in_order(order), rows.total)
    if _is_differentiated(steps) or not steps.is_cpu:
        return scatter_steps(steps, to_device(np.flatnonzero(mask), steps.device), mask.shape, padding_value)
    return scatter_by_mask(steps, mask, padding_value)


def scatter_by_mask(steps: Tensor, mask: BoolArray, padding_value: PaddingValue) -> Tensor:
    """Spread joined time steps over new padded values, through NumPy.

    Args:
        steps: `[sum L, *F]` on the host, row after row.
        mask: bool `[rows, T]`, where they go.
        padding_value: What all other cells hold; the dtype must be able to hold it (`check_padding_value`).

    Returns:
        `[rows, T, *F]` on the CPU, in new memory.
    """
    padded = new_values((*mask.shape, *steps.shape[1:]), steps.dtype).fill_(padding_value)
    bits_of(padded)[mask] = bits_of(steps)
    return padded


def join_rows(rows: RaggedRows, order: Int64Array, shape: tuple[int, int], padding_value: PaddingValue) -> Tensor:
    """Join rows and their tails of padding: every cell of the result is written once.

    Args:
        rows: B rows, on one device; gradients flow back to tensors that require them.
        order: int64 `[B]`, the index in `rows` of each row of the result.
        shape: Rows (at least B) and width of the result; rows beyond B hold padding only.
        padding_value: What the padding holds; the dtype must be able to hold it (`check_padding_value`).

    Returns:
        `[*shape, *F]` on the rows' device, in new memory.

    Raises:
        ValueError: Numbers of axes or feature shapes differ.
    """
    if rows.are_huge and (filled := _copy_each_row(rows, order, shape, padding_value)) is not None:
        return filled
    if not rows.lengths.all():
        # An empty row is left out below, so that joining does not compare its shape with the others'.
        check_shapes(rows.items, rows.name)
    lengths = rows.lengths[order].tolist()
    first = rows.items[0]
    device = first.device if isinstance(first, Tensor) else "cpu"
    padding = torch.full((shape[1], *rows.features), padding_value, dtype=rows.dtype, device=device)
    tails: Row = padding if isinstance(first, Tensor) else padding.numpy()
    # There are few distinct lengths, and a slice costs as much as joining a short row.
    tail_of = {length: tails[length:] for length in {0, *lengths}}
    pieces: list[Row] = []
    for index, length in zip(order.tolist(), lengths, strict=True):
        row = rows.items[index]
        # torch takes a slow path as soon as one piece is empty; one that requires gradients must stay in the graph.
        if length or (isinstance(row, Tensor) and row.requires_grad):
            pieces.append(row)
        if length < shape[1]:
            pieces.append(tail_of[length])
    pieces += [tails] * (shape[0] - len(order))
    return rows.join(pieces, shape[0] * shape[1]).view(*shape, *rows.features)


def _copy_each_row(
    rows: RaggedRows, order: Int64Array, shape: tuple[int, int], padding_value: PaddingValue
) -> Tensor | None:
    """Write rows and tails one by one through NumPy; None where gradients flow or no memory can be shared."""
    if any(isinstance(row, Tensor) and _must_stay_in_torch(row) for row in rows.items):
        return None
    # Between copies, Python code runs at half its speed: the copied rows fill the processor's caches.
    if rows.features or {row.ndim for row in rows.items} != {1}:
        check_shapes(rows.items, rows.name)
    padded = new_values((*shape, *rows.features), rows.dtype)
    cells, padding = bits_of(padded), bits_of_number(padding_value, rows.dtype)
    try:
        for target, index, length in zip(cells, order.tolist(), rows.lengths[order].tolist(), strict=False):
            row = rows.items[index]
            target[:length] = bits_of(row) if isinstance(row, Tensor) else row
            if length < len(target):
                target[length:] = padding
    except RuntimeError:
        # torch shows no memory of tensors that are lazily conjugated, or wrapped for torch.func.
        return None
    cells[len(order) :] = padding
    return padded


def _must_stay_in_torch(row: Tensor) -> bool:
    """Whether NumPy cannot copy a row: it is on a device, not a plain dense tensor, or differentiated."""
    plain = row.is_cpu and type(row) is Tensor and row.layout == torch.strided
    return not plain or row.requires_grad or unpack_dual(row).tangent is not None


def _is_differentiated(steps: Tensor) -> bool:
    """Whether a gradient or tangent must flow through a tensor; NumPy would drop it."""
    return steps.requires_grad or not shares_memory(steps) or unpack_dual(steps).tangent is not None
