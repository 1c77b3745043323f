"""Padded <-> packed, by index maps.

Each map is a list of places in the padded block, made on the host from the lengths and sent to the device once.
Reading by it (`gather_steps`) and writing by it (`scatter_steps`) are each other's derivative, so that a pass through
both takes a number of launches that does not depend on T, and no place is ever written twice.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from collate.errors import LengthError
from collate.padding import Int64Array, Number


def flat_index(lengths: Int64Array, width: int) -> Int64Array:
    """Places of the real steps in row order, in a block of `[B * width]` steps: int64 `[sum L]`."""
    ends = np.cumsum(lengths)
    shift = np.arange(len(lengths)) * width - (ends - lengths)
    return cast(Int64Array, np.arange(ends[-1]) + np.repeat(shift, lengths))


def time_major_index(lengths: Int64Array, width: int) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Places of the real steps in the order of a `PackedSequence`, empty rows left out.

    Args:
        lengths: int64 `[B]`, in any order, at least one above zero.
        width: T of the padded block.

    Returns:
        Places int64 `[sum L]`; batch sizes int64 `[max L]`, rows still running at each step; and the order int64 `[B']`
        of the B' rows that are not empty, longest first, counted among those rows only.
    """
    filled = np.flatnonzero(lengths)
    order = np.argsort(-lengths[filled], kind="stable")
    rows = filled[order]
    running = np.arange(lengths[rows[0]])[:, None] < lengths[rows]
    places = rows * width + np.arange(len(running))[:, None]
    return places[running], running.sum(1), order


def gather_steps(padded: Tensor, index: Tensor) -> Tensor:
    """Read steps of a padded block by their places.

    Args:
        padded: `[B, T, *F]`.
        index: int64 `[M]` on the same device, places in `[B * T]`, each at most once.

    Returns:
        `[M, *F]`. Its gradient flows back to those places, zero elsewhere.
    """
    return _gather(padded, index)


def scatter_steps(steps: Tensor, index: Tensor, shape: tuple[int, int], padding_value: Number = 0) -> Tensor:
    """Write steps into a new padded block by their places.

    Args:
        steps: `[M, *F]`.
        index: int64 `[M]` on the same device, places in `[rows * width]`, each at most once.
        shape: rows and width of the block.
        padding_value: what all other places hold.

    Returns:
        `[rows, width, *F]`. Gradients flow back from the written places only.
    """
    return _scatter(steps, index, shape, padding_value)


def to_device(places: Int64Array | Tensor, device: torch.device) -> Tensor:
    """Send an index map to the device without waiting for it: int64, pinned on the way to an accelerator."""
    index = torch.as_tensor(places)
    if device.type == "cpu":
        return index
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


def pack(padded: Tensor, lengths: Int64Array) -> PackedSequence:
    """Pack the rows that are not empty.

    Args:
        padded: `[B, T, *F]`, any device.
        lengths: int64 `[B]`, on the host, each at most T.

    Returns:
        The rows time-major, as `torch.nn.utils.rnn.pack_padded_sequence(..., enforce_sorted=False)` gives them;
        `sorted_indices` are None where the rows already are longest first.

    Raises:
        LengthError: Every row is empty, which a `PackedSequence` cannot say.
    """
    if not lengths.any():
        raise LengthError(
            f"all {len(lengths)} rows have length 0, and a PackedSequence cannot hold an empty batch: "
            "leave the batch out, or let apply_rnn run it"
        )
    places, sizes, order = time_major_index(lengths, padded.shape[1])
    data = gather_steps(padded, to_device(places, padded.device))
    if np.array_equal(order, np.arange(len(order))):
        return PackedSequence(data, torch.from_numpy(sizes))
    indices = np.stack([order, np.argsort(order)])
    by_length, back = to_device(indices, padded.device)
    return PackedSequence(data, torch.from_numpy(sizes), by_length, back)


def unpack(packed: PackedSequence, lengths: Int64Array, width: int) -> Tensor:
    """Put a packed result back: `[B, width, *G]`, rows in the order they were packed from, zeros where none was.

    Args:
        packed: what `pack` gave for the same lengths, or a module's output for it.
        lengths: int64 `[B]`, on the host.
        width: T of the block to make.

    Raises:
        LengthError: The packed steps are not those of these lengths.
    """
    if not lengths.any():
        raise LengthError("a packed batch cannot come from rows that are all empty: these are not its lengths")
    places, sizes, order = time_major_index(lengths, width)
    _check_layout(packed, sizes, order)
    return scatter_steps(packed.data, to_device(places, packed.data.device), (len(lengths), width))


def _check_layout(packed: PackedSequence, sizes: Int64Array, order: Int64Array) -> None:
    if not np.array_equal(packed.batch_sizes.numpy(), sizes):
        raise LengthError(
            f"the packed batch holds {packed.batch_sizes.tolist()} rows at each step, these lengths make "
            f"{sizes.tolist()}: unpack with the batch that was packed"
        )
    if len(packed.data) != sizes.sum():
        raise LengthError(
            f"the packed batch holds {len(packed.data)} steps, its batch sizes sum to {sizes.sum()}: "
            "it was packed with a length beyond the padded width"
        )
    # The row order is only read where reading it does not make an accelerator wait.
    indices = packed.sorted_indices
    if indices is None:
        indices = torch.arange(len(order))
    if indices.is_cpu and not np.array_equal(indices.numpy(), order):
        raise LengthError(
            f"the packed batch's rows come as {indices.tolist()}, these lengths order them as {order.tolist()}: "
            "unpack with the batch that was packed"
        )


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = padded.shape[:2]
        return padded.flatten(0, 1).index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return scatter_steps(grad, index, ctx.shape), None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, steps: Tensor, index: Tensor, shape: tuple[int, int], padding_value: Number) -> Tensor:
        ctx.save_for_backward(index)
        block = steps.new_full((shape[0] * shape[1], *steps.shape[1:]), padding_value)
        return block.index_copy_(0, index, steps).view(*shape, *steps.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        return gather_steps(grad, index), None, None, None


_gather = cast("Callable[..., Tensor]", _Gather.apply)
_scatter = cast("Callable[..., Tensor]", _Scatter.apply)
