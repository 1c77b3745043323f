"""Read and write single time steps of padded values by their flat index, with gradients.

The flat index of time step t of row r is `r * width + t`. Reading (`gather_steps`) and writing (`scatter_steps`) are
each other's derivative, so that a pass through both takes a number of launches that does not depend on T, nothing waits
for the device, and no cell is written twice. Rows of 2 and 1 real time steps, 3 wide, have the
flat indices 0, 1 and 3:

>>> padded = torch.tensor([[10, 11, 0], [20, 0, 0]])
>>> index = flat_index(np.array([2, 1]), 3, torch.device("cpu"))
>>> index, gather_steps(padded, index)
(tensor([0, 1, 3]), tensor([10, 11, 20]))
>>> scatter_steps(torch.tensor([5, 6, 7]), index, (2, 3), padding_value=-1)
tensor([[ 5,  6, -1],
        [ 7, -1, -1]])
"""

from collections.abc import Callable
from typing import Any, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import Function

from collate.tensors.numpy_view import CARRIERS, Int64Array, shares_memory
from collate.tensors.to_device import to_device

PaddingValue: TypeAlias = int | float | bool
"""What padding time steps hold: a number, or a bool for bool tensors."""

# From this many bytes on, time steps are copied as records on the host.
MANY_BYTES: Final = 1 << 17


def flat_index(lengths: Int64Array, width: int, device: torch.device, *, firsts: Int64Array | None = None) -> Tensor:
    """Flat index, in `[B * width]`, of every real time step in row order: int64 `[sum L]` on `device`.

    `firsts`, int64 `[B]`, are the flat indices of the sequences' first time steps, where several are in one row.
    """
    ends = np.cumsum(lengths)
    firsts = np.arange(len(lengths)) * width if firsts is None else firsts
    # Row r begins at cell r * width, its real time steps at the sum of earlier lengths: the difference is its shift.
    total, shifts = int(lengths.sum()), firsts - (ends - lengths)
    if device.type == "cpu":
        return torch.from_numpy(np.arange(total) + np.repeat(shifts, lengths))
    counts, moved = to_device(np.stack([lengths, shifts]), device)
    return torch.arange(total, device=counts.device).add_(moved.repeat_interleave(counts, output_size=total))


def gather_steps(padded: Tensor, index: Tensor) -> Tensor:
    """Read time steps of padded values by their flat index.

    Args:
        padded: `[B, T, *F]`.
        index: int64 `[M]` on the same device, in `[B * T]`, each at most once.

    Returns:
        `[M, *F]`. Its gradient flows back to those time steps, zero elsewhere.
    """
    return _gather(padded, index)


def scatter_steps(steps: Tensor, index: Tensor, shape: tuple[int, int], padding_value: PaddingValue = 0) -> Tensor:
    """Write time steps into new padded values by their flat index.

    Args:
        steps: `[M, *F]`.
        index: int64 `[M]` on the same device, in `[rows * width]`, each at most once.
        shape: Rows and width of the result.
        padding_value: What all other cells hold.

    Returns:
        `[rows, width, *F]`. Gradients flow back from the written time steps only.
    """
    return _scatter(steps, index, *shape, padding_value)


class _Gather(Function):
    # Both functions are linear, so that each is its own tangent function, and torch can vmap it.
    generate_vmap_rule = True

    @staticmethod
    def forward(padded: Tensor, index: Tensor) -> Tensor:
        steps = padded.flatten(0, 1)
        if _lacks_index(steps.dtype):
            return steps.view(CARRIERS[steps.dtype.itemsize]).index_select(0, index).view(steps.dtype)
        return steps.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        padded, index = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)
        ctx.shape = padded.shape[:2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return scatter_steps(grad, index, ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, change: Tensor, _: None) -> Tensor:
        (index,) = ctx.saved_tensors
        return gather_steps(change, index)


class _Scatter(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(steps: Tensor, index: Tensor, rows: int, width: int, padding_value: PaddingValue) -> Tensor:
        size = (rows * width, *steps.shape[1:])
        if steps.nbytes >= MANY_BYTES and _has_records(steps):
            padded = _write_records(steps, index.numpy(), size, padding_value)
        else:
            padded = _copy_steps(steps.new_full(size, padding_value), index, steps)
        return padded.view(rows, width, *steps.shape[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, PaddingValue], output: Tensor) -> None:
        _, index, *shape, _ = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)
        ctx.shape = tuple(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return gather_steps(grad, index), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, change: Tensor, *others: None) -> Tensor:
        (index,) = ctx.saved_tensors
        return scatter_steps(change, index, ctx.shape)


def _copy_steps(padded: Tensor, index: Tensor, steps: Tensor) -> Tensor:
    """Copy time steps into padded values at these indices, in place where torch allows it."""
    if _lacks_index(steps.dtype):
        carrier = CARRIERS[steps.dtype.itemsize]
        return _copy_steps(padded.view(carrier), index, steps.contiguous().view(carrier)).view(steps.dtype)
    # Writing in place takes half the memory, but vmap does not support it.
    return (padded.index_copy if is_batchedtensor(steps) else padded.index_copy_)(0, index, steps)


def _lacks_index(dtype: torch.dtype) -> bool:
    """Whether torch's indexing does not support a dtype."""
    # torch can copy and fill these dtypes, but has few other operations for them.
    return dtype in (torch.uint16, torch.uint32, torch.uint64) or (dtype.is_floating_point and dtype.itemsize == 1)


def _has_records(steps: Tensor) -> bool:
    """Whether NumPy can copy time steps as records: a plain tensor on the host that is not traced."""
    # A tensor that is being traced has no memory to copy.
    plain = (
        type(steps) is Tensor and steps.is_cpu and steps.layout == torch.strided and not torch.compiler.is_compiling()
    )
    return plain and not steps.is_conj() and not steps.is_neg() and shares_memory(steps)


def _write_records(steps: Tensor, index: Int64Array, size: tuple[int, ...], padding_value: PaddingValue) -> Tensor:
    """Do what filling and `index_copy_` do, but faster: NumPy copies each step once, as one record."""
    padded, padding = steps.new_empty(size), np.ones(size[0], bool)
    padding[index] = False
    _records(padded)[index] = _records(steps.contiguous())
    _records(padded)[padding] = _records(steps.new_full((1, *size[1:]), padding_value))
    return padded


def _records(tensor: Tensor) -> npt.NDArray[np.void]:
    """The steps of a contiguous tensor `[N, *F]` as a writable view of as many records: void `[N]`."""
    octets: npt.NDArray[np.uint8] = tensor.detach().reshape(len(tensor), -1).view(torch.uint8).numpy()
    return octets.view(np.dtype((np.void, octets.shape[1])))[:, 0]


_gather = cast("Callable[..., Tensor]", _Gather.apply)
_scatter = cast("Callable[..., Tensor]", _Scatter.apply)
