"""The checks of a batch's parts against each other.

Parts on the host (`check_batch_lengths`, `check_permutation`, `check_mask` on the CPU) are checked whenever a batch is
made; the padding (`check_padding_intact`) only by `verify`, since it may wait for a device.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from collate.errors import LengthError
from collate.tensors.masks import device_mask
from collate.tensors.numpy_view import HostArray, Int64Array, to_array
from collate.tensors.steps import PaddingValue
from collate.widths import check_count

IntegersLike: TypeAlias = Tensor | HostArray | Sequence[int]
"""Integers, as lengths are given: a tensor, a NumPy array or a list."""


def check_batch_lengths(lengths: IntegersLike, rows: int, width: int) -> Tensor:
    """Check lengths, and return them as int64 `[rows]` on the host, each from 0 to `width`.

    Raises:
        TypeError: They are not integers.
        LengthError: They are on a device, of the wrong number, negative, or beyond the padded width.
    """
    if isinstance(lengths, Tensor) and not lengths.is_cpu:
        raise LengthError(f"lengths must stay on the host, got a tensor on {lengths.device}: keep them on the CPU")
    counts = as_int64(lengths, "lengths")
    if counts.shape != (rows,):
        raise LengthError(f"lengths must be one per row, [{rows}], got shape {list(counts.shape)}")
    if type(counts) is not Tensor:
        # A fake tensor has a shape and no values.
        return counts
    values = to_array(counts)
    outside = np.flatnonzero((values < 0) | (values > width))
    if len(outside):
        row = int(outside[0])
        raise LengthError(
            f"the length of row {row} is {values[row]}, it must be from 0 to the padded width {width}: "
            "take lengths from the sequences themselves"
        )
    return counts


def check_permutation(permutation: IntegersLike, rows: int) -> Tensor:
    """Check a permutation, and return it as int64 `[rows]` on the host: distinct sample indices from 0.

    In a batch as collated the indices are exactly `range(rows)`; a piece of a batch keeps the indices its rows had.

    Raises:
        TypeError: It does not hold integers.
        ValueError: It has another number of indices, a negative index, or an index twice.
    """
    indices = as_int64(permutation.cpu() if isinstance(permutation, Tensor) else permutation, "permutation")
    if indices.shape != (rows,):
        raise ValueError(f"permutation must be one sample index per row, [{rows}], got shape {list(indices.shape)}")
    if type(indices) is not Tensor:
        return indices
    # Sorted, duplicates are neighbours: [2, 0, 2] becomes [0, 2, 2].
    ordered = np.sort(to_array(indices))
    if (ordered[0] < 0) or (ordered[1:] == ordered[:-1]).any():
        raise ValueError(f"permutation must hold distinct indices of at least 0, got {indices.tolist()}")
    return indices


def check_mask(mask: Tensor, lengths: Tensor, padded: Tensor) -> Tensor:
    """Check a user's mask: bool `[B, T]` on the device of `padded`; its values are read on the host only.

    Raises:
        TypeError: It is no tensor, or not bool.
        ValueError: It has another shape or device.
        LengthError: It does not agree with the lengths.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor, True where a step is real, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a step is real, got {mask.dtype}")
    if mask.shape != padded.shape[:2] or mask.device != padded.device:
        raise ValueError(
            f"mask must be {list(padded.shape[:2])} on {padded.device}, got {list(mask.shape)} on {mask.device}"
        )
    if mask.is_cpu and type(mask) is Tensor:
        check_mask_values(mask, lengths)
    return mask


def check_mask_values(mask: Tensor, lengths: Tensor) -> None:
    """Check every value of a mask `[B, T]` against the lengths; on an accelerator this waits for the device.

    Raises:
        LengthError: They differ in a row; the message names the first one.
    """
    wrong = (mask.cpu() != device_mask(lengths, mask.shape[1])).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise LengthError(
            f"the mask of row {row} marks {int(mask[row].sum())} steps, its length is {int(lengths[row])}: "
            "a mask is the first `length` steps and nothing else; pass mask=None to derive it"
        )


def check_padding_intact(padded: Tensor, mask: Tensor, padding_value: PaddingValue) -> None:
    """Check that all padding still holds `padding_value`; a real value there reveals a length that is too small.

    Raises:
        LengthError: A padding step holds something else; the message names row, step and value.
    """
    # NaN is the one value that does not equal itself.
    same = padded.isnan() if padding_value != padding_value else padded == padding_value
    # A trailing axis of one, so that there always is a feature axis to reduce.
    touched = ~(same[..., None].flatten(2).all(2) | mask)
    if touched.any():
        row, step = touched.nonzero()[0].tolist()
        values = padded[row, step].flatten()
        value = values[~same[row, step].flatten()][0].item()
        raise LengthError(
            f"row {row} has {int(mask[row].sum())} steps, but its padding at step {step} holds {value!r} instead of "
            f"padding_value {padding_value!r}: the length is too small, or the batch was written to after padding"
        )


def check_declared(
    declared: IntegersLike, lengths: Int64Array, name: str = "sequences", keys: Sequence[object] = ()
) -> None:
    """Check declared lengths `[B]` against the real ones, both in source order.

    Args:
        declared: The declared lengths.
        lengths: The real ones, int64 `[B]`.
        name: What errors call the sequences.
        keys: The samples' names, if they have any, for the error.

    Raises:
        LengthError: They differ; the message names the first sample and both numbers.
        TypeError: The declared lengths are not integers.
    """
    counts = to_array(as_int64(declared, f"declared lengths of {name}"))
    if counts.shape != lengths.shape:
        raise LengthError(f"{name}: {len(lengths)} samples came with declared lengths of shape {list(counts.shape)}")
    wrong = np.flatnonzero(counts != lengths)
    if len(wrong):
        index = int(wrong[0])
        key = f" (key {keys[index]!r})" if keys and keys[index] is not None else ""
        kind = "inflated" if counts[index] > lengths[index] else "deflated"
        raise LengthError(
            f"{name}: sample {index}{key} has {lengths[index]} steps, its declared length is {counts[index]} ({kind}; "
            f"{len(wrong)} of {len(lengths)} samples differ): correct the lengths where they were written, or leave "
            "them out"
        )


def as_int64(values: IntegersLike, name: str) -> Tensor:
    """Integers of any kind as an int64 tensor on the host; floats and bools are refused, not truncated.

    Raises:
        TypeError: They are not integers.
    """
    if isinstance(values, Tensor):
        if values.dtype == torch.int64:
            return values
        integral = not (values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool)
        kind: object = values.dtype
    elif isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name} must be integers, got a masked array: masked values would count as well")
    else:
        values = np.asarray(values)
        # An empty list is allowed, although NumPy makes it float64.
        integral, kind = values.dtype.kind in "iu" or values.size == 0, values.dtype
    if not integral:
        raise TypeError(f"{name} must be integers, got {kind}: a length or an index is a whole number")
    return values.to(torch.int64) if isinstance(values, Tensor) else torch.from_numpy(values.astype(np.int64))


def copied_if_same(checked: Tensor, original: object) -> Tensor:
    """Checked integers in memory of their own: a check that has nothing to convert returns the caller's tensor."""
    return checked.clone() if checked is original else checked


def check_first_step(steps: object) -> None:
    """Check how many time steps come before a batch.

    Raises:
        TypeError: It is not an int.
        ValueError: It is negative.
    """
    check_count("first_step", steps, least=0, hint="give the time steps of the sequences before these")


def check_padded(padded: Tensor) -> tuple[int, int]:
    """Rows and width of padded values.

    Raises:
        TypeError: They are no tensor.
        ValueError: They have fewer than two axes, no row or no time step.
    """
    if not isinstance(padded, Tensor):
        raise TypeError(f"padded must be a tensor [B, T, ...], got {type(padded).__name__}: torch.as_tensor makes one")
    if padded.dim() < 2 or padded.shape[0] < 1 or padded.shape[1] < 1:
        raise ValueError(f"padded must be [B, T, ...] with at least one row and one step, got {list(padded.shape)}")
    return padded.shape[0], padded.shape[1]
