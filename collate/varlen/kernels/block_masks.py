"""Block masks of `flex_attention` in closed form, from host lengths: no mask of all pairs of steps is ever made.

A document is a run of neighbouring steps. Therefore the key blocks that one query block sees are a run as well, and
those that it sees as a whole are a run inside of it. Four numbers describe each query block; the index tables are
filled from these. The same holds for the query blocks that see one key block, which the backward pass needs.

One row of 16 steps in blocks of 4, with documents of 10 and 5 steps and a gap of one. Query block 2 (steps 8 to 11)
begins in the first document, and sees its key blocks 0 to 2. It does not lie in one document, so none of them is full.
Query block 1 sees block 0 as a whole:

>>> rows = BlockRows.of(np.array([10, 5]), np.array([0, 10]), np.array([2]), capacity=16, block_size=4)
>>> ranges = key_ranges(rows, MaskOptions("causal"))
>>> ranges.first.tolist(), ranges.last.tolist()
([[0, 0, 0, 2]], [[0, 1, 2, 3]])
>>> (ranges.full_last - ranges.full_first + 1).tolist()
[[0, 1, 0, 0]]
"""

from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from collate.tensors.numpy_view import Int64Array
from collate.tensors.to_device import to_device
from collate.varlen.kernels.mask_kinds import MaskFunction, MaskOptions

# Rows of a table with more indices than this are filled one by one, the others in columns.
_SHORT: Final = 8


@dataclass(frozen=True)
class BlockRows:
    """For each block of each row: the documents of its first and of its last step; arrays are int64 `[R, blocks]`.

    Attributes:
        block_size: steps of a block, along queries and along keys.
        index: the index of the block in its row, `[blocks]`.
        start: first step, in the row, of the document that holds the block's first step; that step itself in a gap.
        end: behind that document; `start` where the first step is in a gap.
        prefix_end: behind that document's prefix.
        last_end: behind the document that holds the block's last step; behind the block where that is in a gap.
        last_prefix_end: behind that document's prefix.
    """

    block_size: int
    index: Int64Array
    start: Int64Array
    end: Int64Array
    prefix_end: Int64Array
    last_end: Int64Array
    last_prefix_end: Int64Array

    @classmethod
    def of(
        cls,
        lengths: Int64Array,
        starts: Int64Array,
        per_row: Int64Array,
        *,
        capacity: int,
        block_size: int,
        prefix: Int64Array | None = None,
    ) -> "BlockRows":
        """Find the documents of each block.

        Args:
            lengths: int64 `[N]`, documents in row order.
            starts: int64 `[N]`, in `[0, R * C]`.
            per_row: int64 `[R]`.
            capacity: C.
            block_size: steps of a block.
            prefix: int64 `[N]`; None is no prefix.
        """
        blocks = -(-capacity // block_size)
        index, row_starts = np.arange(blocks), np.arange(len(per_row))[:, None] * capacity
        first = index * block_size
        # An empty document holds no step.
        real = lengths > 0
        starts, ends = starts[real], (starts + lengths)[real]
        prefix_ends = starts if prefix is None else starts + prefix[real]
        if not len(starts):
            starts = ends = prefix_ends = np.zeros(1, np.int64)
        holder = np.maximum(np.searchsorted(starts, row_starts + first, "right") - 1, 0)
        # Before the first document, where the first rows are empty, there is none to look at.
        held = (starts[holder] <= row_starts + first) & (ends[holder] > row_starts + first)
        last = row_starts + first + block_size - 1
        last_holder = np.maximum(np.searchsorted(starts, last, "right") - 1, 0)
        # A block that reaches beyond the row ends in no document.
        last_held = (starts[last_holder] <= last) & (ends[last_holder] > last) & (first + block_size <= capacity)
        behind = first + block_size
        return cls(
            block_size,
            index,
            np.where(held, starts[holder] - row_starts, first),
            np.where(held, ends[holder] - row_starts, first),
            np.where(held, prefix_ends[holder] - row_starts, 0),
            np.where(last_held, ends[last_holder] - row_starts, behind),
            np.where(last_held, prefix_ends[last_holder] - row_starts, 0),
        )

    @property
    def is_whole(self) -> Int64Array:
        """Whether all steps of a block are in one document."""
        return cast(Int64Array, self.end >= (self.index + 1) * self.block_size)


@dataclass(frozen=True)
class BlockRanges:
    """The blocks that each block sees, or is seen by: from `first` to `last`, of them full from `full_first` on.

    A block that sees none as a whole has `full_first = last + 1` and `full_last = last`. Arrays are int64
    `[R, blocks]`.
    """

    first: Int64Array
    last: Int64Array
    full_first: Int64Array
    full_last: Int64Array

    @classmethod
    def of(
        cls, bounds: tuple[Int64Array, Int64Array], full: tuple[Int64Array, Int64Array], is_whole: Int64Array
    ) -> "BlockRanges":
        """Ranges in which a block that is not in one document as a whole has no full ones."""
        shape = is_whole.shape
        first, last = (np.broadcast_to(bound, shape) for bound in bounds)
        has_full = is_whole & (full[0] <= full[1])
        return cls(first, last, np.where(has_full, full[0], last + 1), np.where(has_full, full[1], last))


def key_ranges(rows: BlockRows, options: MaskOptions) -> BlockRanges:
    """The key blocks that each query block sees."""
    size, index = rows.block_size, rows.index
    first, full_first = rows.start // size, -(-rows.start // size)
    last, full_last = index, index - 1
    if options.kind == "sliding":
        # Key block j ends size * (i - j - 1) + 1 steps before query block i begins, and begins size * (i - j + 1) - 1
        # before that ends.
        first = np.maximum(first, index - 1 - (options.window - 2) // size)
        full_first = np.maximum(full_first, index + 1 - options.window // size)
    elif options.kind == "bidirectional":
        last, full_last = (rows.last_end - 1) // size, rows.end // size - 1
    elif options.kind == "prefix":
        last = np.maximum(index, (rows.last_prefix_end - 1) // size)
        full_last = np.maximum(index - 1, rows.prefix_end // size - 1)
    return BlockRanges.of((first, last), (full_first, full_last), rows.is_whole)


def query_ranges(rows: BlockRows, options: MaskOptions) -> BlockRanges:
    """The query blocks that see each key block."""
    size, index = rows.block_size, rows.index
    last, full_last = (rows.last_end - 1) // size, rows.end // size - 1
    first, full_first = index, index + 1
    if options.kind == "sliding":
        last = np.minimum(last, index + 1 + (options.window - 2) // size)
        full_last = np.minimum(full_last, index - 1 + options.window // size)
    elif options.kind == "bidirectional":
        first, full_first = rows.start // size, -(-rows.start // size)
    elif options.kind == "prefix":
        first = np.where(rows.prefix_end > index * size, rows.start // size, index)
        full_first = np.where(rows.prefix_end >= (index + 1) * size, -(-rows.start // size), index + 1)
    return BlockRanges.of((first, last), (full_first, full_last), rows.is_whole)


def make_block_mask(
    rows: BlockRows, options: MaskOptions, allowed: MaskFunction, *, capacity: int, device: torch.device
) -> BlockMask:
    """The block mask of a batch, as `create_block_mask` makes it of all pairs of steps.

    Args:
        rows: the documents of each block.
        options: the kind of mask.
        allowed: which pairs of steps are allowed, for the partial blocks.
        capacity: C.
        device: where the tables are made; only the ranges of the blocks are sent there.

    Returns:
        Tables `[R, 1, blocks, blocks]`, whose shapes depend on R, C and the size of a block only.
    """
    fill = _fill_on_host if device.type == "cpu" else _fill_on_device
    keys = fill(key_ranges(rows, options), device)
    queries = fill(query_ranges(rows, options), device)
    size = rows.block_size
    return BlockMask((capacity, capacity), *keys, *queries, BLOCK_SIZE=(size, size), mask_mod=allowed)


def _fill_on_host(ranges: BlockRanges, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and indices of partial blocks, then of full ones: int32 `[R, 1, blocks]` and `[R, 1, blocks, blocks]`."""
    shape = ranges.first.shape
    before = (ranges.full_first - ranges.first).ravel()
    counts = (before + (ranges.last - ranges.full_last).ravel(), (ranges.full_last - ranges.full_first + 1).ravel())
    first, full_first, behind = ranges.first.ravel(), ranges.full_first.ravel(), ranges.full_last.ravel() + 1
    partial = _fill_table(shape[1], (first, before), (behind, counts[0]))
    full = _fill_table(shape[1], (full_first, counts[1]), (full_first, counts[1]))
    tables = (counts[0], partial, counts[1], full)
    wide, narrow = (shape[0], 1, shape[1], shape[1]), (shape[0], 1, shape[1])
    made = [torch.from_numpy(np.ascontiguousarray(table, np.int32)) for table in tables]
    return (made[0].view(narrow), made[1].view(wide), made[2].view(narrow), made[3].view(wide))


def _fill_table(
    blocks: int, one: tuple[Int64Array, Int64Array], other: tuple[Int64Array, Int64Array]
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """Two runs of indices in each row of a table int32 `[rows, blocks]`, the second behind the first.

    Args:
        blocks: columns of the table.
        one: the first index of the first run, and its count.
        other: the first index of the second run, and the count of both.
    """
    (first, before), (second, total) = one, other
    # Memory that is zero already is touched only where it is written.
    table = np.zeros((len(first), blocks), np.int32)
    columns = np.arange(min(blocks, _SHORT, int(total.max())))
    values = np.where(columns < before[:, None], first[:, None], (second - before)[:, None]) + columns
    table[:, : len(columns)] = np.where(columns < total[:, None], values, 0)
    steps = np.arange(blocks, dtype=np.int32)
    for row in np.flatnonzero(total > _SHORT).tolist():
        middle, count, begin, again = int(before[row]), int(total[row]), int(first[row]), int(second[row])
        table[row, :middle] = steps[begin : begin + middle]
        table[row, middle:count] = steps[again : again + count - middle]
    return table


def _fill_on_device(ranges: BlockRanges, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same on any device: the ranges are sent in one piece, and nothing waits."""
    table = np.stack([ranges.first, ranges.last, ranges.full_first, ranges.full_last]).astype(np.int32)
    first, last, full_first, full_last = to_device(table, device)[..., None].unbind()
    columns = torch.arange(table.shape[2], dtype=torch.int32, device=device)
    before, full_count = full_first - first, full_last - full_first + 1
    count = before + last - full_last
    partial = torch.where(columns < before, first, full_last + 1 - before) + columns
    partial = torch.where(columns < count, partial, 0)
    full = torch.where(columns < full_count, full_first + columns, 0)
    counts = [number.squeeze(-1).unsqueeze(1).contiguous() for number in (count, full_count)]
    return counts[0], partial.unsqueeze(1), counts[1], full.unsqueeze(1)
