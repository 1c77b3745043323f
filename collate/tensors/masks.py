"""The mask that lengths make: True at each row's first `length` time steps.

>>> length_mask(np.array([2, 0]), 3)
array([[ True,  True, False],
       [False, False, False]])
"""

from typing import Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collate.tensors.numpy_view import Int64Array, to_array
from collate.tensors.to_device import to_device

BoolArray: TypeAlias = npt.NDArray[np.bool_]

# From this width on steps do not fit int16, and filling a mask row by row takes a sixth of comparing int64.
WIDE: Final = 1 << 15


def length_mask(lengths: Int64Array, width: int) -> BoolArray:
    """The mask that lengths int64 `[B]`, each at most `width`, make on the host: bool `[B, width]`."""
    if width >= WIDE:
        mask = np.zeros((len(lengths), width), np.bool_)
        for row, length in zip(mask, lengths.tolist(), strict=True):
            row[:length] = True
        return mask
    # Comparing small integers takes a quarter of the time.
    return cast(BoolArray, np.less(np.arange(width, dtype=np.int16), lengths.astype(np.int16)[:, None]))


def device_mask(lengths: Tensor, width: int, device: torch.device | None = None) -> Tensor:
    """The mask that lengths int64 `[B]` make: bool `[B, width]` on `device`, True where a step is real."""
    device = device or lengths.device
    if device.type == "cpu" and type(lengths) is Tensor and not torch.compiler.is_compiling():
        return torch.from_numpy(length_mask(to_array(lengths), width))
    sent = lengths.to(device, non_blocking=True) if torch.compiler.is_compiling() else to_device(lengths, device)
    return torch.arange(width, device=device) < sent[:, None]


def expand_like(rows: Tensor, values: Tensor) -> Tensor:
    """Give `rows` (`[B]` or `[B, T]`) as many trailing axes of one as `values` `[B, ..., *F]` has more."""
    return rows.reshape(*rows.shape, *[1] * (values.dim() - rows.dim()))
