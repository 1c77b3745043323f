"""Padded <-> packed, by an index map.

A `PackedSequence` holds the real time steps of all rows time-major: first every row's step 0, longest row first, then
every row's step 1, and so on. The map is the flat index of each of them in the padded values. Rows of 1, 3 and 2 real
time steps, 3 wide, lie at the flat indices 0; 3, 4, 5 and 6, 7. Row 1 is the longest, then row 2, then row 0:

>>> packing = PackingMap.of(np.array([1, 3, 2]), 3, torch.device("cpu"))
>>> packing.order, packing.sizes
(array([1, 2, 0]), array([3, 2, 1]))
>>> packing.index
tensor([3, 6, 0, 4, 7, 5])

On the host NumPy makes the map; for an accelerator a few integers for each row and step are sent, pinned, and the map
is made there.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from collate.errors import LengthError
from collate.tensors.numpy_view import Int64Array, to_array
from collate.tensors.steps import gather_steps, scatter_steps
from collate.tensors.to_device import to_device


@dataclass(frozen=True)
class PackingMap:
    """Index map from padded values to a `PackedSequence`, empty rows left out.

    Attributes:
        lengths: int64 `[B]` on the host, a copy.
        shape: Rows and width of the padded values.
        index: int64 `[M]` on the device: flat index, in `[rows * width]`, of each packed time step.
        sizes: int64 `[max L]` on the host: rows still running at each time step.
        order: int64 `[B']` on the host: the B' rows that are not empty, longest first, counted among those only.
        sorted_indices: The order on the device; None where the rows already are longest first.
        unsorted_indices: Its inverse.
    """

    lengths: Int64Array
    shape: tuple[int, int]
    index: Tensor
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
        num_rows: int | None = None,
    ) -> Self:
        """Make the map for rows of these lengths.

        Args:
            lengths: int64 `[B]`, in any order, each at most `width`.
            width: T of the padded values.
            device: Where the padded values are.
            firsts: int64 `[B]`, flat index of each sequence's first time step, where several are in one row.
            num_rows: Rows of the padded values, where they are not B.

        Raises:
            LengthError: Every row is empty, which a `PackedSequence` cannot hold.
        """
        if not lengths.any():
            raise LengthError(
                f"all {len(lengths)} rows have length 0, and a PackedSequence cannot hold an empty batch: "
                "leave the batch out, or let apply_rnn run it"
            )
        firsts = np.arange(len(lengths)) * width if firsts is None else firsts
        filled = np.flatnonzero(lengths)
        # Stable, as in torch: rows of equal length keep their order.
        order = np.argsort(-lengths[filled], kind="stable")
        rows = filled[order]
        # Indices among the rows that are not empty: a packed batch does not know the others.
        in_order = np.array_equal(order, np.arange(len(order)))
        both = [] if in_order else [order, np.argsort(order)]
        if device.type == "cpu":
            index, sizes = _index_and_sizes(lengths[rows], firsts[rows])
            indices = [torch.from_numpy(part) for part in both]
        else:
            sizes = rows_running(lengths[rows])
            # One array, one copy to the device: B' + 2 max L integers, or 3 B' + 2 max L if rows are reordered.
            parts = [firsts[rows], sizes, np.cumsum(sizes) - sizes, *both]
            begins, counts, starts, *indices = to_device(np.concatenate(parts), device).split(list(map(len, parts)))
            index = spread_steps(begins, counts, starts, total=int(sizes.sum()))
        shape = (len(lengths) if num_rows is None else num_rows, width)
        return cls(lengths.copy(), shape, index, sizes, order, *(indices or (None, None)))

    def fits(self, lengths: Int64Array, device: torch.device) -> bool:
        """Whether the map is of rows of these lengths, on this device."""
        return self.index.device == device and np.array_equal(self.lengths, lengths)

    def pack(self, padded: Tensor) -> PackedSequence:
        """The real time steps of `[B, T, *F]`, time-major, as torch packs them."""
        data = gather_steps(padded, self.index)
        return PackedSequence(data, torch.from_numpy(self.sizes), self.sorted_indices, self.unsorted_indices)

    def unpack(self, packed: PackedSequence) -> Tensor:
        """Padded values `[B, T, *G]` with data `[M, *G]` at the real time steps and 0 in the padding.

        Raises:
            LengthError: The packed time steps are not those of this map.
        """
        self._check(packed)
        return scatter_steps(packed.data, self.index, self.shape)

    def _check(self, packed: PackedSequence) -> None:
        """Check that a packed batch has this map's sizes, time steps and row order.

        Raises:
            LengthError: It has others.
        """
        if not np.array_equal(to_array(packed.batch_sizes), self.sizes):
            raise LengthError(
                f"the packed batch holds {packed.batch_sizes.tolist()} rows at each step, these lengths make "
                f"{self.sizes.tolist()}: unpack with the batch that was packed"
            )
        if len(packed.data) != len(self.index):
            raise LengthError(
                f"the packed batch holds {len(packed.data)} steps, its batch sizes sum to {len(self.index)}: "
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


def _index_and_sizes(lengths: Int64Array, firsts: Int64Array) -> tuple[Tensor, Int64Array]:
    """The index as of `spread_steps`, and the sizes, computed on the host; rows are longest first.

    Nothing here has B x T entries: one long row among many short ones costs no more than its own time steps. Rows of 3
    and 1 time steps that start at 3 and 0 (two rows, 3 wide) have sizes 2, 1, 1 and starts 0, 2, 3:

    >>> _index_and_sizes(np.array([3, 1]), np.array([3, 0]))
    (tensor([3, 0, 4, 5]), array([2, 1, 1]))
    """
    sizes, steps = rows_running(lengths), np.arange(lengths[0])
    # Rows are equally long: packed steps are the padded values, transposed.
    if lengths[-1] == lengths[0]:
        return torch.from_numpy((firsts + steps[:, None]).ravel()), sizes
    starts = np.cumsum(sizes) - sizes
    # Packed step i of time step t belongs to the row of rank i - starts[t], and lies at that row's first index + t.
    ranks = np.arange(int(sizes.sum())) - np.repeat(starts, sizes)
    return torch.from_numpy(firsts[ranks] + np.repeat(steps, sizes)), sizes


def rows_running(lengths: Int64Array) -> Int64Array:
    """The number of rows that are longer than each step: int64 `[max L]`.

    >>> rows_running(np.array([3, 1]))
    array([2, 1, 1])
    """
    return len(lengths) - np.cumsum(np.bincount(lengths))[:-1]


def spread_steps(firsts: Tensor, sizes: Tensor, starts: Tensor, *, total: int) -> Tensor:
    """Make the index of each packed time step, on the tensors' own device and without waiting for it.

    Args:
        firsts: int64 `[B']`, flat index of each row's first time step, longest row first.
        sizes: int64 `[max L]`, rows still running at each time step.
        starts: int64 `[max L]`, packed steps before each time step.
        total: M, the sum of sizes.

    Returns:
        int64 `[M]`.
    """
    # With `output_size` known on the host, torch need not read the sum of `sizes` from the device.
    steps = torch.repeat_interleave(sizes, output_size=total)
    ranks = torch.arange(total, device=steps.device) - starts.index_select(0, steps)
    return firsts.index_select(0, ranks) + steps
