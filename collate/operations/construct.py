"""Make batches from parts, without the checks that the constructor makes."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from collate.errors import LengthError
from collate.lengths.tracking import (
    TrackedBatch,
    check_permutation_unwritten,
    check_unwritten,
    host_lengths,
    keep_lengths,
    keep_lengths_that_fit,
)
from collate.lengths.validation import (
    IntegersLike,
    check_batch_lengths,
    check_first_step,
    check_mask,
    check_permutation,
    copied_if_same,
)
from collate.padding.join import join_rows, pad_short_rows
from collate.padding.padding_value import check_padding_value, same_nan
from collate.padding.rows import RaggedRows
from collate.padding.unread import UnreadRows
from collate.tensors.masks import WIDE, device_mask, length_mask
from collate.tensors.numpy_view import Int64Array
from collate.tensors.steps import PaddingValue

BatchT = TypeVar("BatchT", bound=TrackedBatch)

TENSOR_FIELDS = ("padded", "lengths", "mask", "permutation")


class DerivedMask:
    """The mask of a batch that has none yet: made at its first use and kept by the batch."""

    def __get__(self, batch: TrackedBatch | None, owner: type) -> Tensor | None:
        if batch is None:
            return None
        width, device = batch.padded.shape[1], batch.padded.device
        if torch.compiler.is_compiling():
            return device_mask(batch.lengths, width, device)
        mask = torch.from_numpy(length_mask(host_lengths(batch), width))
        # `setdefault`, so that two threads get one mask.
        result: Tensor = vars(batch).setdefault("mask", mask)
        return result


def check_parts(batch: TrackedBatch, rows: int, width: int) -> None:
    """Check the parts that a constructor was given, and copy those that the caller may write to later.

    Raises:
        LengthError: Lengths or mask do not agree with the values.
        TypeError: Lengths or permutation are not integers, or the mask is not bool.
        ValueError: The permutation is not one, the dtype cannot hold the padding value, or `first_step` is negative.
    """
    check_first_step(batch.first_step)
    lengths = copied_if_same(check_batch_lengths(batch.lengths, rows, width), batch.lengths)
    object.__setattr__(batch, "lengths", lengths)
    if batch.mask is not None:
        check_mask(batch.mask, lengths, batch.padded)
    if batch.permutation is not None:
        permutation = copied_if_same(check_permutation(batch.permutation, rows), batch.permutation)
        object.__setattr__(batch, "permutation", permutation)
    if batch.padding_value is not None:
        object.__setattr__(batch, "padding_value", check_padding_value(batch.padding_value, batch.padded.dtype))


def trusted_batch(
    kind: type[BatchT],
    padded: Tensor,
    lengths: Tensor,
    *,
    mask: Tensor | None,
    permutation: Tensor,
    padding_value: PaddingValue | None,
    first_step: int = 0,
) -> BatchT:
    """Make a batch whose parts are known to agree, without reading them; the parts are those of the class."""
    if mask is None:
        mask = device_mask(lengths, padded.shape[1], padded.device)
    batch = _assemble(kind, (padded, lengths, mask, permutation), padding_value, first_step)
    if not torch.compiler.is_compiling():
        keep_lengths(batch)
    return batch


def unchecked_batch(
    kind: type[BatchT], parts: Sequence[Any], padding_value: PaddingValue | None, first_step: int
) -> BatchT:
    """Make a batch of a pytree's leaves (padded, lengths, mask and permutation), which may be anything."""
    batch = _assemble(kind, parts, padding_value, first_step)
    if not torch.compiler.is_compiling():
        keep_lengths_that_fit(batch)
    return batch


def changed_batch(batch: BatchT, **parts: Any) -> BatchT:
    """The batch with some parts replaced, unchecked; the mask is made again if the values are on another device."""
    # Parts that are kept would carry a write into the new batch, whose snapshot would then confirm it.
    check_unwritten(batch)
    names = (*TENSOR_FIELDS, "padding_value", "first_step")
    present = {name: getattr(batch, name) for name in names}
    if "padded" in parts and parts["padded"].device != batch.padded.device:
        present["mask"] = None
    return trusted_batch(type(batch), **{**present, **parts})


def replace_values(batch: BatchT, padded: Tensor, lengths: IntegersLike | None, first_step: int | None) -> BatchT:
    """The same rows with new values; what `with_padded` does.

    Raises:
        LengthError: Rows or width differ without new lengths, or the new lengths do not fit.
        TypeError: The values are no tensor, or lengths or `first_step` are not integers.
        ValueError: `first_step` is negative.
    """
    if not isinstance(padded, Tensor):
        raise TypeError(
            f"new values must be a tensor [B, T, ...], got {type(padded).__name__}: of a module that returns more, "
            "keep the tensor alone; run a recurrent module with apply_rnn(rnn, batch)"
        )
    if first_step is None:
        first_step = batch.first_step
    elif not torch.compiler.is_compiling():
        check_first_step(first_step)
    rows, width = batch.padded.shape[:2]
    if padded.shape[:2] != (rows, width) and (lengths is None or len(padded) != rows):
        raise LengthError(
            f"new values must be [{rows}, {width}, ...] like the batch, got {list(padded.shape)}: pass lengths= where "
            "the number of steps changes, keep all rows"
        )
    if lengths is None:
        return changed_batch(batch, padded=padded, padding_value=None, first_step=first_step)
    check_permutation_unwritten(batch)
    # New lengths are the user's, and are checked as a constructor's are.
    kind: Any = type(batch)
    result: BatchT = kind(padded, lengths, permutation=batch.permutation, first_step=first_step)
    return result


def padded_batch(
    kind: type[BatchT], rows: RaggedRows, order: Int64Array, *, shape: tuple[int, int], padding_value: PaddingValue
) -> BatchT:
    """Pad rows that `measure_rows` has checked; `from_sequences` and the collator share it.

    Args:
        kind: Class of the batch.
        rows: B rows.
        order: int64 `[B]`, a permutation.
        shape: Rows (B, or more to add empty rows) and width.
        padding_value: What the padding holds.

    Raises:
        ValueError: The dtype cannot hold the padding value, or feature shapes differ.
    """
    value = check_padding_value(padding_value, rows.dtype)
    lengths, indices = rows.lengths[order], order
    # Rows that fill a shape are empty; their sample indices follow those of the real rows.
    if shape[0] > len(order):
        lengths = np.append(lengths, np.zeros(shape[0] - len(order), np.int64))
        indices = np.append(order, np.arange(len(order), shape[0]))
    counts, permutation = torch.from_numpy(lengths), torch.from_numpy(indices)
    if shape[1] >= WIDE and (isinstance(rows, UnreadRows) or not rows.are_short):
        padded = rows.pad(order, shape, value) if isinstance(rows, UnreadRows) else join_rows(rows, order, shape, value)
        if padded.is_cpu:
            # The mask of a wide batch takes a tenth of the whole time: `DerivedMask` makes it when it is used.
            batch = _assemble(kind, (padded, counts, None, permutation), value, 0)
            del vars(batch)["mask"]
            keep_lengths(batch)
            return batch
        return trusted_batch(kind, padded, counts, mask=None, permutation=permutation, padding_value=value)
    real = length_mask(lengths, shape[1])
    if isinstance(rows, UnreadRows):
        padded = rows.pad(order, shape, value)
    else:
        padded = pad_short_rows(rows, order, real, value) if rows.are_short else join_rows(rows, order, shape, value)
    mask = torch.from_numpy(real) if padded.is_cpu else None
    return trusted_batch(kind, padded, counts, mask=mask, permutation=permutation, padding_value=value)


def _assemble(kind: type[BatchT], parts: Sequence[Any], padding_value: PaddingValue | None, first_step: int) -> BatchT:
    """A batch of these parts, made without the constructor, which would check them."""
    batch = object.__new__(kind)
    for name, part in zip(TENSOR_FIELDS, parts, strict=True):
        object.__setattr__(batch, name, part)
    object.__setattr__(batch, "padding_value", padding_value)
    object.__setattr__(batch, "first_step", first_step)
    if padding_value is not None and not torch.compiler.is_compiling():
        object.__setattr__(batch, "padding_value", same_nan(padding_value))
    return batch
