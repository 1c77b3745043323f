"""A batch in the forms that torch and trainers take: packed, flat, nested, masks and offsets, a plain dict.

Rows of 2 and 1 real time steps have the offsets 0, 2 and 3 among the flat time steps:

>>> row_offsets(np.array([2, 1]))
array([0, 2, 3])
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from collate.errors import LengthError
from collate.lengths.tracking import TrackedBatch, check_unwritten, host_lengths
from collate.packing import PackingMap
from collate.tensors.numpy_view import Int64Array
from collate.tensors.steps import flat_index, gather_steps
from collate.tensors.to_device import refuse_capture, to_device

# Attention kernels take offsets as int32.
_LARGEST_OFFSET: Final = 2**31 - 1

_EXPORTED: Final = ("padded", "lengths", "mask", "permutation", "key_padding_mask", "cu_seqlens", "position_ids")


# What `left_padded` gives by default, under the names of transformers.
LEFT_PADDED: Final = {"input_ids": "values", "attention_mask": "mask", "position_ids": "position_ids"}

# What `packing_map` keeps with the batch; copies make their own.
PACKING_MAP: Final = "_packing_map"


def packing_map(batch: TrackedBatch, device: torch.device) -> PackingMap:
    """The index map between padded and packed; the batch keeps it, since `unpack` usually follows `pack`."""
    refuse_capture(device)
    lengths, width = host_lengths(batch), batch.padded.shape[1]
    # A frozen dataclass is written to through its dictionary.
    cached: PackingMap | None = vars(batch).get(PACKING_MAP)
    if cached is None or not cached.fits(lengths, device):
        cached = vars(batch)[PACKING_MAP] = PackingMap.of(lengths, width, device)
    return cached


def real_step_index(batch: TrackedBatch) -> Tensor:
    """Flat index of every real time step, row after row: int64 `[M]` on the batch's device."""
    return flat_index(host_lengths(batch), batch.padded.shape[1], batch.padded.device)


def row_offsets(lengths: Int64Array) -> Int64Array:
    """Where each row starts and ends among the flat time steps: int64 `[B + 1]`."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def cumulative_lengths(batch: TrackedBatch) -> Tensor:
    """The offsets as int32 `[B + 1]` on the batch's device.

    Raises:
        LengthError: The real time steps are more than int32 can count.
    """
    device = batch.padded.device
    if torch.compiler.is_compiling():
        return torch.nn.functional.pad(batch.lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    offsets = row_offsets(host_lengths(batch))
    if offsets[-1] > _LARGEST_OFFSET:
        raise LengthError(
            f"cu_seqlens are int32, and the batch's {len(batch.padded)} rows have {offsets[-1]} real steps, more than "
            f"{_LARGEST_OFFSET}: split(rows) makes smaller batches"
        )
    return to_device(offsets.astype(np.int32), device)


def nested_tensor(batch: TrackedBatch) -> Tensor:
    """The rows as a jagged nested tensor `[B, j, *F]`."""
    lengths = host_lengths(batch)
    offsets = to_device(row_offsets(lengths), batch.padded.device)
    return torch.nested.nested_tensor_from_jagged(
        gather_steps(batch.padded, real_step_index(batch)),
        offsets,
        min_seqlen=int(lengths.min()),
        max_seqlen=max(int(lengths.max()), 1),
    )


def hidden_keys(batch: TrackedBatch) -> Tensor:
    """The mask for attention, True = padding."""
    check_unwritten(batch)
    hidden = ~batch.mask
    # Attention over no key at all gives NaN, so that an empty row keeps its first step.
    hidden[:, 0] = False
    return hidden


def named_tensors(batch: TrackedBatch, names: Mapping[str, str]) -> dict[str, Tensor]:
    """A dict of attributes by the keys that a trainer wants.

    Raises:
        ValueError: There is no such attribute.
    """
    check_unwritten(batch)
    for key, attribute in names.items():
        if attribute not in _EXPORTED:
            raise ValueError(f"{key!r} names {attribute!r}, which is none of {', '.join(_EXPORTED)}")
    return {key: getattr(batch, attribute) for key, attribute in names.items()}


def left_padded_tensors(batch: TrackedBatch, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Values, mask and position ids of rows whose padding is on the left.

    Raises:
        ValueError: A key names something else.
    """
    check_unwritten(batch)
    for key, name in names.items():
        if name not in LEFT_PADDED.values():
            raise ValueError(f"{key!r} names {name!r}, which is none of {', '.join(LEFT_PADDED.values())}")
    steps = torch.arange(batch.padded.shape[1], device=batch.padded.device)
    # From the mask, which is on the values' device: a row of 2 real time steps among 5 turns by 3.
    index = steps - (len(steps) - batch.mask.sum(1, keepdim=True))
    rows = torch.arange(len(batch.padded), device=batch.padded.device)[:, None]
    made = {
        "values": lambda: batch.padded[rows, index % len(steps)],
        "mask": lambda: index >= 0,
        "position_ids": lambda: (index + batch.first_step) * (index >= 0),
    }
    return {key: made[name]() for key, name in names.items()}


def describe_batch(batch: TrackedBatch) -> str:
    """One line: shape, dtype, device, up to seven lengths and the fraction of padding."""
    if not isinstance(batch.padded, Tensor) or not isinstance(batch.lengths, Tensor):
        # A pytree function may put objects other than tensors into a batch.
        return f"LengthTrackedBatch({batch.padded!r}, {batch.lengths!r}, {batch.mask!r}, {batch.permutation!r})"
    lengths = batch.lengths.tolist()
    shown = str(lengths) if len(lengths) <= 8 else f"[{', '.join(map(str, lengths[:6]))}, ... {lengths[-1]}]"
    dtype = str(batch.padded.dtype).removeprefix("torch.")
    padding = 1 - sum(lengths) / (batch.padded.shape[0] * batch.padded.shape[1])
    return (
        f"LengthTrackedBatch({list(batch.padded.shape)} {dtype} on {batch.padded.device}, lengths={shown}, "
        f"padding {padding:.1%})"
    )


def missing_attribute(batch: object, name: str) -> str:
    """What to tell a user who takes a batch for a tensor."""
    message = f"{type(batch).__name__!r} object has no attribute {name!r}"
    if not hasattr(Tensor, name):
        return message
    return (
        f"{message}: a batch is no tensor. Run a recurrent module with apply_rnn(rnn, batch), and a module that works "
        "on every step alone with batch.map(module); .padded is the tensor"
    )
