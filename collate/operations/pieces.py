"""Rows and chunks of a batch, and batches joined to one.

A row of 5 real time steps that is split into chunks of 2 has 2, 2 and 1 of them, and a row of 3 has 2, 1 and 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from collate.errors import LengthError
from collate.lengths.permutation import join_permutations
from collate.lengths.tracking import TrackedBatch, check_tracked, check_unwritten
from collate.operations.construct import BatchT, changed_batch, trusted_batch
from collate.padding.padding_value import cast_padding_value
from collate.tensors.steps import PaddingValue
from collate.tensors.to_device import to_device
from collate.widths import check_count


def select_rows(batch: BatchT, rows: Tensor) -> BatchT:
    """The rows of these indices, int64 `[R]` on the host, in this order."""
    index = to_device(rows, batch.padded.device)
    padded, mask = batch.padded.index_select(0, index), batch.mask.index_select(0, index)
    return changed_batch(
        batch, padded=padded, lengths=batch.lengths[rows], mask=mask, permutation=batch.permutation[rows]
    )


def split_rows(batch: BatchT, rows: int) -> list[BatchT]:
    """Pieces of at most `rows` rows, in batch order.

    Raises:
        TypeError: `rows` is not an int.
        ValueError: `rows` is below one.
    """
    size = check_count("rows", rows, least=1, hint="give the rows of one piece")
    return [select_rows(batch, part) for part in torch.arange(len(batch.padded), device="cpu").split(size)]


def split_time_steps(batch: BatchT, steps: int) -> list[BatchT]:
    """Chunks of at most `steps` time steps, each with all rows.

    Raises:
        TypeError: `steps` is not an int.
        ValueError: `steps` is below one.
    """
    size, width = check_count("steps", steps, least=1, hint="give the time steps of one chunk"), batch.padded.shape[1]
    return [_chunk(batch, start, min(start + size, width)) for start in range(0, width, size)]


def concat_batches(kind: type[BatchT], batches: Sequence[TrackedBatch]) -> BatchT:
    """One batch of all rows, as wide as the widest.

    Raises:
        LengthError: There is no batch.
        TypeError: One is a tensor.
        ValueError: Dtypes, devices, feature shapes or first steps differ.
    """
    batches = list(batches)
    if not batches:
        raise LengthError("concat needs at least one batch, got none")
    check_tracked("concat", *batches)
    kinds = {(b.padded.dtype, b.padded.device, b.padded.shape[2:], b.first_step) for b in batches}
    if len(kinds) > 1:
        raise ValueError(
            f"batches must share dtype, device, feature shape and first step, got {sorted(map(str, kinds))}"
        )
    values = {b.padding_value for b in batches}
    # Pieces with different padding values: the joined padding is unspecified.
    value = values.pop() if len(values) == 1 else None
    width = max(b.padded.shape[1] for b in batches)
    padded = torch.cat([pad_to_width(b.padded, width, 0 if value is None else value) for b in batches])
    # Lengths that were written to would be copied into the new batch as if they were right.
    for batch in batches:
        check_unwritten(batch)
    return trusted_batch(
        kind,
        padded,
        torch.cat([b.lengths for b in batches]),
        mask=None,
        permutation=join_permutations([b.permutation for b in batches]),
        padding_value=value,
        first_step=batches[0].first_step,
    )


def pad_to_width(padded: Tensor, width: int, value: PaddingValue) -> Tensor:
    """Padded values `[B, T, *F]` with padding up to this width, at least T."""
    missing = width - padded.shape[1]
    if not missing:
        return padded
    return torch.cat([padded, padded.new_full((len(padded), missing, *padded.shape[2:]), value)], 1)


def _chunk(batch: BatchT, start: int, stop: int) -> BatchT:
    """The time steps from `start` to `stop` of all rows."""
    # Ended rows stay, with length 0: states that are carried from chunk to chunk keep their rows.
    lengths = (batch.lengths - start).clamp(0, stop - start)
    padded, mask = batch.padded[:, start:stop], batch.mask[:, start:stop]
    return changed_batch(batch, padded=padded, lengths=lengths, mask=mask, first_step=batch.first_step + start)


def move_batch(
    batch: BatchT,
    device: torch.device | torch.dtype | str | int | None,
    dtype: torch.dtype | None,
    non_blocking: bool | None,  # noqa: FBT001 - internal, as `Tensor.to` has it
) -> BatchT:
    """The batch on another device or of another dtype; the batch itself where nothing changes."""
    if isinstance(device, torch.dtype):
        device, dtype = None, device
    if non_blocking is None:
        non_blocking = not batch.padded.is_cuda and batch.padded.is_pinned()
    padded = batch.padded.to(device=device, dtype=dtype, non_blocking=non_blocking)
    if padded is batch.padded:
        return batch
    # Float padding 0.5 is 0 after a conversion to int64.
    value = cast_padding_value(batch.padding_value, batch.padded.dtype, padded.dtype)
    return changed_batch(batch, padded=padded, padding_value=value)
