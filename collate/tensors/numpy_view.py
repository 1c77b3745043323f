"""The memory of tensors on the host, as NumPy sees it."""

from typing import Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HostArray: TypeAlias = npt.NDArray[np.generic]
Int64Array: TypeAlias = npt.NDArray[np.int64]

# NumPy has no dtype for bfloat16 and similar ones: their bits are taken as integers of the same size.
CARRIERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def to_array(integers: Tensor) -> Int64Array:
    """An int64 tensor on the host as an array that shares its memory.

    Within `torch.func` nothing shares memory, and a copy is made.
    """
    try:
        return cast(Int64Array, integers.numpy())
    except RuntimeError:
        # Number by number: before torch 2.10, tolist within `torch.func` wants memory too.
        numbers = [int(number) for number in integers.flatten()]
        return np.array(numbers, np.int64).reshape(integers.shape)


def shares_memory(tensor: Tensor) -> bool:
    """Whether NumPy can look into the memory of a tensor on the host: not within `torch.func`."""
    try:
        tensor.detach().flatten()[:0].view(torch.uint8).numpy()
    except RuntimeError:
        return False
    return True


def bits_of(tensor: Tensor) -> HostArray:
    """A contiguous CPU tensor's memory as an array; dtypes NumPy lacks appear as integers of their size."""
    try:
        return cast(HostArray, tensor.numpy())
    except TypeError:
        return cast(HostArray, tensor.view(CARRIERS[tensor.dtype.itemsize]).numpy())
