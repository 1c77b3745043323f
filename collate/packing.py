"""Padded <-> packed, by index maps.

Each map is a list of places in the padded block. On the host it is made by NumPy; for an accelerator a few integers for
each row and step are sent, once and pinned, and the map is spread out there. Reading by it (`gather_steps`) and writing
by it (`scatter_steps`) are each other's derivative, so that a pass through both takes a number of launches that does
not depend on T, nothing waits for the device, and no place is ever written twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from collate.errors import LengthError
from collate.options import Number
from collate.tensors.numpy_view import CARRIERS, Int64Array, shares_memory, to_array
from collate.tensors.to_device import to_device

# Steps of so many bytes together are copied as records, on the host.
MANY_BYTES: Final = 1 << 17


def flat_places(lengths: Int64Array, width: int, device: torch.device, *, firsts: Int64Array | None = None) -> Tensor:
    """Places of the real steps in row order, in a block of `[B * width]` steps: int64 `[sum L]` on `device`.

    `firsts`, int64 `[B]`, are the places of the first steps, where sequences lie otherwise than one in a row.
    """
    ends = np.cumsum(lengths)
    firsts = np.arange(len(lengths)) * width if firsts is None else firsts
    total, shifts = int(lengths.sum()), firsts - (ends - lengths)
    if device.type == "cpu":
        return torch.from_numpy(np.arange(total) + np.repeat(shifts, lengths))
    counts, moved = to_device(np.stack([lengths, shifts]), device)
    return torch.arange(total, device=counts.device).add_(moved.repeat_interleave(counts, output_size=total))


@dataclass(frozen=True)
class Layout:
    """How the real steps of a padded block lie in a `PackedSequence`, empty rows left out.

    Attributes:
        lengths: int64 `[B]` on the host, a copy.
        shape: rows and width of the block.
        places: int64 `[sum L]` on the device: the block's place, in `[rows * width]`, of each packed step.
        sizes: int64 `[max L]` on the host: rows still running at each step.
        order: int64 `[B']` on the host: the B' rows that are not empty, longest first, counted among those only.
        sorted_indices: the order on the device; None where the rows already are longest first.
        unsorted_indices: its inverse.
    """

    lengths: Int64Array
    shape: tuple[int, int]
    places: Tensor
    sizes: Int64Array
    order: Int64Array
    sorted_indices: Tensor | None
    unsorted_indices: Tensor | None

    @classmethod
    def of(
        cls,
        lengths: Int64Array,
        width: int,
        device: torch.device,
        *,
        firsts: Int64Array | None = None,
        rows: int | None = None,
    ) -> Self:
        """Find the layout of rows of these lengths in a block of this width.

        Args:
            lengths: int64 `[B]`, in any order, each at most `width`.
            width: T of the padded block.
            device: where the block is.
            firsts: int64 `[B]`, place of each sequence's first step, where they lie otherwise than one in a row.
            rows: rows of the block, where they are not B.

        Raises:
            LengthError: Every row is empty, which a `PackedSequence` cannot say.
        """
        if not lengths.any():
            raise LengthError(
                f"all {len(lengths)} rows have length 0, and a PackedSequence cannot hold an empty batch: "
                "leave the batch out, or let apply_rnn run it"
            )
        firsts = np.arange(len(lengths)) * width if firsts is None else firsts
        filled = np.flatnonzero(lengths)
        order = np.argsort(-lengths[filled], kind="stable")
        present = filled[order]
        in_order = np.array_equal(order, np.arange(len(order)))
        both = [] if in_order else [order, np.argsort(order)]
        if device.type == "cpu":
            places, sizes = _places_and_sizes(lengths[present], firsts[present])
            indices = [torch.from_numpy(part) for part in both]
        else:
            sizes = rows_running(lengths[present])
            parts = [firsts[present], sizes, np.cumsum(sizes) - sizes, *both]
            begins, counts, starts, *indices = to_device(np.concatenate(parts), device).split(list(map(len, parts)))
            places = spread_steps(begins, counts, starts, total=int(sizes.sum()))
        shape = (len(lengths) if rows is None else rows, width)
        return cls(lengths.copy(), shape, places, sizes, order, *(indices or (None, None)))

    def is_of(self, lengths: Int64Array, device: torch.device) -> bool:
        """Whether it is the layout of rows of these lengths, on this device."""
        return self.places.device == device and np.array_equal(self.lengths, lengths)

    def pack(self, padded: Tensor) -> PackedSequence:
        """The real steps of a block `[B, T, *F]`, time-major, as torch packs them."""
        data = gather_steps(padded, self.places)
        return PackedSequence(data, torch.from_numpy(self.sizes), self.sorted_indices, self.unsorted_indices)

    def unpack(self, packed: PackedSequence) -> Tensor:
        """A block `[B, T, *G]` with data `[M, *G]` at the real steps and 0 in the padding.

        Raises:
            LengthError: The packed steps are not those of this layout.
        """
        self._check(packed)
        return scatter_steps(packed.data, self.places, self.shape)

    def _check(self, packed: PackedSequence) -> None:
        if not np.array_equal(to_array(packed.batch_sizes), self.sizes):
            raise LengthError(
                f"the packed batch holds {packed.batch_sizes.tolist()} rows at each step, these lengths make "
                f"{self.sizes.tolist()}: unpack with the batch that was packed"
            )
        if len(packed.data) != len(self.places):
            raise LengthError(
                f"the packed batch holds {len(packed.data)} steps, its batch sizes sum to {len(self.places)}: "
                "it was packed with a length beyond the padded width"
            )
        # The row order is only read where reading it does not make an accelerator wait.
        indices = packed.sorted_indices
        if indices is not None and not indices.is_cpu:
            return
        order = np.arange(len(self.order)) if indices is None else to_array(indices)
        if not np.array_equal(order, self.order):
            raise LengthError(
                f"the packed batch's rows come as {order.tolist()}, these lengths order them as "
                f"{self.order.tolist()}: unpack with the batch that was packed"
            )


def _places_and_sizes(lengths: Int64Array, firsts: Int64Array) -> tuple[Tensor, Int64Array]:
    """What `spread_steps` gives, and the sizes, where memory is close: for rows that are sorted, longest first.

    Nothing here is as large as rows x steps: one long row among many short ones costs no more than its steps.
    """
    sizes, steps = rows_running(lengths), np.arange(lengths[0])
    if lengths[-1] == lengths[0]:
        return torch.from_numpy((firsts + steps[:, None]).ravel()), sizes
    starts = np.cumsum(sizes) - sizes
    # A packed step's place is its row's first place and its step, its row is its number less those of earlier steps.
    ranks = np.arange(int(sizes.sum())) - np.repeat(starts, sizes)
    return torch.from_numpy(firsts[ranks] + np.repeat(steps, sizes)), sizes


def rows_running(lengths: Int64Array) -> Int64Array:
    """Rows that are longer than each step: int64 `[max L]`.

    >>> rows_running(np.array([3, 1]))
    array([2, 1, 1])
    """
    return len(lengths) - np.cumsum(np.bincount(lengths))[:-1]


def spread_steps(firsts: Tensor, sizes: Tensor, starts: Tensor, *, total: int) -> Tensor:
    """Spread a layout out to one place for each packed step, on the tensors' own device and without waiting for it.

    Args:
        firsts: int64 `[B']`, place of each row's first step, longest row first.
        sizes: int64 `[max L]`, rows still running at each step.
        starts: int64 `[max L]`, packed steps before each step.
        total: M, the sum of sizes.

    Returns:
        int64 `[M]`.
    """
    steps = torch.repeat_interleave(sizes, output_size=total)
    ranks = torch.arange(total, device=steps.device) - starts.index_select(0, steps)
    return firsts.index_select(0, ranks) + steps


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
    return _scatter(steps, index, *shape, padding_value)


class _Gather(Function):
    # Each of the two is linear, so that its change is itself, and torch can map it over further axes.
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
    def jvp(ctx: Any, change: Tensor, index: None) -> Tensor:
        (places,) = ctx.saved_tensors
        return gather_steps(change, places)


class _Scatter(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(steps: Tensor, index: Tensor, rows: int, width: int, padding_value: Number) -> Tensor:
        size = (rows * width, *steps.shape[1:])
        if steps.nbytes >= MANY_BYTES and _has_records(steps):
            block = _write_records(steps, index.numpy(), size, padding_value)
        else:
            block = _copy_steps(steps.new_full(size, padding_value), index, steps)
        return block.view(rows, width, *steps.shape[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, Number], output: Tensor) -> None:
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


def _copy_steps(block: Tensor, index: Tensor, steps: Tensor) -> Tensor:
    if _lacks_index(steps.dtype):
        carrier = CARRIERS[steps.dtype.itemsize]
        return _copy_steps(block.view(carrier), index, steps.contiguous().view(carrier)).view(steps.dtype)
    # In place it takes half the memory, but torch cannot map that over further axes.
    return (block.index_copy if is_batchedtensor(steps) else block.index_copy_)(0, index, steps)


def _lacks_index(dtype: torch.dtype) -> bool:
    # torch moves bits of these types, but for few operations.
    return dtype in (torch.uint16, torch.uint32, torch.uint64) or (dtype.is_floating_point and dtype.itemsize == 1)


def _has_records(steps: Tensor) -> bool:
    # Of a tensor that is being traced there is nothing to copy.
    plain = (
        type(steps) is Tensor and steps.is_cpu and steps.layout == torch.strided and not torch.compiler.is_compiling()
    )
    return plain and not steps.is_conj() and not steps.is_neg() and shares_memory(steps)


def _write_records(steps: Tensor, index: Int64Array, size: tuple[int, ...], padding_value: Number) -> Tensor:
    """What `index_copy_` makes in a block that is filled before; NumPy copies a step as one record, and each once."""
    block, padding = steps.new_empty(size), np.ones(size[0], bool)
    padding[index] = False
    _records(block)[index] = _records(steps.contiguous())
    _records(block)[padding] = _records(steps.new_full((1, *size[1:]), padding_value))
    return block


def _records(tensor: Tensor) -> npt.NDArray[np.void]:
    """The steps of a contiguous tensor `[N, *F]` as a writable view of as many records: void `[N]`."""
    octets: npt.NDArray[np.uint8] = tensor.detach().reshape(len(tensor), -1).view(torch.uint8).numpy()
    return octets.view(np.dtype((np.void, octets.shape[1])))[:, 0]


_gather = cast("Callable[..., Tensor]", _Gather.apply)
_scatter = cast("Callable[..., Tensor]", _Scatter.apply)
