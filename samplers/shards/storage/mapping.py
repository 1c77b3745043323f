"""Copies from mapped files into memory: one system call for many ranges, and an error where a file has become shorter.

Reading a mapping behind the end of its file would end the process by a signal. So Python does not read it: Linux copies
from it (`process_vm_readv`, of this process from itself), and stops at a page that the file no longer has.
"""

import ctypes
import mmap
import os
from functools import cache
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Addresses: TypeAlias = npt.NDArray[np.int64]

# Linux takes at most 1024 ranges in one call.
_RANGES_OF_A_CALL: Final = 1024


class FileMapping:
    """A file in the address space of this process, until the object is freed.

    Attributes:
        address: Where its first byte is.

    Args:
        descriptor: The open file.
        size: Its size in bytes.

    Raises:
        OSError: The file system has no mappings.
        ValueError: The file is empty.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        # The mapping has a descriptor of its own, which it closes.
        self._memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        self._size = size
        self.address = _address_of(np.frombuffer(self._memory, np.uint8))

    @property
    def is_whole(self) -> bool:
        """Whether the file is still as long as it was when it was opened."""
        return self._memory.size() >= self._size


def map_file(descriptor: int, size: int) -> FileMapping | None:
    """The mapping of an open file. None if its file system has none, or the system cannot copy from it."""
    if not can_copy():
        return None
    try:
        return FileMapping(descriptor, size)
    except (OSError, ValueError):
        return None


@cache
def can_copy() -> bool:
    """Whether this system copies from mappings: Linux does, unless a container forbids it."""
    source, target, one = np.array([7], np.uint8), np.zeros(1, np.uint8), np.ones(1, np.int64)
    try:
        return copy_ranges(_address_of(source) * one, _address_of(target) * one, one) and target[0] == 7
    except AttributeError:
        return False


def copy_ranges(sources: Addresses, targets: Addresses, sizes: Addresses) -> bool:
    """Copy ranges of this process's memory, until one cannot be read.

    Args:
        sources: Addresses, int64 `[n]`.
        targets: Addresses of memory that can be written to, int64 `[n]`.
        sizes: Bytes, int64 `[n]`.

    Returns:
        Whether all bytes were copied.

    Raises:
        AttributeError: The system has no such call.
    """
    # Rows of address and size, as the system wants them.
    local, remote = np.stack([targets, sizes], axis=1), np.stack([sources, sizes], axis=1)
    for first in range(0, len(sizes), _RANGES_OF_A_CALL):
        count = min(_RANGES_OF_A_CALL, len(sizes) - first)
        copied = _process_vm_readv()(
            os.getpid(), _address_of(local[first:]), count, _address_of(remote[first:]), count, 0
        )
        if copied != sizes[first : first + count].sum():
            return False
    return True


@cache
def _process_vm_readv() -> Any:
    """The function of the C library.

    Raises:
        AttributeError: It has none of this name.
    """
    function = ctypes.CDLL(None).process_vm_readv
    function.restype = ctypes.c_ssize_t
    ranges: list[Any] = [ctypes.c_void_p, ctypes.c_ulong]
    function.argtypes = [ctypes.c_int, *ranges, *ranges, ctypes.c_ulong]
    return function


def _address_of(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data
