"""A slab, and its leases: who uses the memory, told by the memory itself.

The first page of a slab has a byte `is_sent`, and a byte `is_retired`. The worker that made the slab sets `is_sent`
when it sends a tensor, the receiver resets it when its lease ends. At any time only one of the two may write it, so
that no lock is needed. Either may set `is_retired`, after which no value is written to the slab again. The number of
the last message and the byte `is_received` tell a message that is on its way from one that somebody has had.

>>> slab = Slab.make(1 << 16)
>>> slab.reserve(16)
>>> values = lease(slab, 16, on_end=lambda: print("the lease ends"))
>>> half = torch.from_numpy(values)[8:]
>>> del values
>>> del half
the lease ends
"""

import errno
import math
import os
import secrets
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Self
from weakref import finalize

import numpy as np
import numpy.typing as npt
import torch

# Bytes in front of the values: a page, so that these are aligned as torch aligns large tensors.
HEADER: Final = 4096
# Descriptors that a process keeps for other things: torch's own way of sending needs some.
SPARE_FILES: Final = 16
_SENT, _RETIRED, _RECEIVED, _KEEPER, _TOKEN, _MESSAGE = 0, 1, 2, slice(8, 16), slice(16, 32), slice(32, 40)


class Slab:
    """A file in shared memory, as one process has it mapped.

    Attributes:
        memory: The header and the values, uint8.
        token: 16 random bytes that name the slab.
        file: Descriptor of the file in the process that made it; -1 in others.
        reserved: Bytes of values for which there is memory, as that process knows.
    """

    file = -1
    reserved = 0

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self.memory = memory
        self.token = memory[_TOKEN].tobytes()

    @classmethod
    def make(cls, capacity: int) -> Self:
        """A new slab for values of at most this many bytes, for which `reserve` takes the memory.

        Raises:
            OSError: There is no memory of this kind, or no descriptor.
        """
        file = os.memfd_create("lengthtrack", os.MFD_CLOEXEC)
        try:
            # Descriptors are numbered from the lowest that is free.
            if file + SPARE_FILES > os.sysconf("SC_OPEN_MAX") >= 0:
                raise OSError(errno.EMFILE, "no descriptor is left for a slab")
            os.posix_fallocate(file, 0, HEADER)
            os.ftruncate(file, HEADER + capacity)
            os.pwrite(file, secrets.token_bytes(16), _TOKEN.start)
            made = cls.of_file(file)
        except BaseException:
            os.close(file)
            raise
        made.file = file
        finalize(made, os.close, file).atexit = False
        return made

    def reserve(self, size: int) -> None:
        """Take the memory for values of `size` bytes: a page that is missing later would end the process by a signal.

        Raises:
            OSError: There is not enough.
        """
        if size > self.reserved:
            os.posix_fallocate(self.file, HEADER + self.reserved, size - self.reserved)
            self.reserved = size

    @classmethod
    def of_file(cls, file: int) -> Self:
        """The slab in a file, mapped; the descriptor may be closed afterwards.

        Raises:
            OSError: It cannot be mapped.
        """
        path, size = f"/proc/self/fd/{file}", os.fstat(file).st_size
        # Python's maps hold a descriptor each, of which a loop that keeps batches would need too many.
        try:
            return cls(torch.from_file(path, shared=True, size=size, dtype=torch.uint8).numpy())
        except RuntimeError as error:
            raise OSError(f"a slab cannot be mapped: {error}") from error

    @property
    def capacity(self) -> int:
        """Bytes of values."""
        return len(self.memory) - HEADER

    @property
    def is_sent(self) -> bool:
        """Whether a tensor was sent whose lease at the receiver has not ended."""
        return bool(self.memory[_SENT])

    @is_sent.setter
    def is_sent(self, value: bool) -> None:
        # The last reference to a tensor is given up by an atomic operation, so that reads come before this.
        self.memory[_SENT] = value

    @property
    def is_retired(self) -> bool:
        """Whether no value may be written to it again."""
        return bool(self.memory[_RETIRED])

    def retire(self) -> None:
        """Leave its memory to the leases that last."""
        self.memory[_RETIRED] = 1

    @property
    def message(self) -> int:
        """Number of the last message."""
        return int(self.memory[_MESSAGE].view(np.int64)[0])

    @message.setter
    def message(self, number: int) -> None:
        self.memory[_MESSAGE].view(np.int64)[0] = number

    @property
    def is_received(self) -> bool:
        """Whether the last message has come."""
        return bool(self.memory[_RECEIVED])

    @is_received.setter
    def is_received(self, value: bool) -> None:
        self.memory[_RECEIVED] = value

    @property
    def keeper(self) -> int:
        """Number of the process that keeps it mapped between leases; 0 is none."""
        return int(self.memory[_KEEPER].view(np.int64)[0])

    @keeper.setter
    def keeper(self, process: int) -> None:
        self.memory[_KEEPER].view(np.int64)[0] = process


class Loan(NamedTuple):
    """What is sent instead of a tensor's values.

    Attributes:
        token: Names the slab.
        message: Number of the message, counted in the slab.
        worker: The process that sends it.
        file: Descriptor of the slab's file in that process.
        copy: A copy of the descriptor that is sent; None where the keeper has the slab mapped.
        dtype: Dtype of the tensor.
        shape: Its shape.
        requires_grad: Whether it requires gradients.
    """

    token: bytes
    message: int
    worker: int
    file: int
    copy: Any
    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Lease:
    """The use of a slab by one tensor.

    Attributes:
        process: The process that has the tensor. A forked one has a copy, which must not end the lease.
        was_forked: Whether there is such a copy. No process knows when it is used no more, so that the slab is retired.
    """

    def __init__(self, slab: Slab, on_end: Callable[[], None]) -> None:
        self.slab = slab
        self.process = os.getpid()
        self.was_forked = bool(_forks)
        self._on_end = on_end

    def end(self) -> None:
        """Nothing refers to the memory any more."""
        _leases.discard(self)
        if self.process != os.getpid():
            return
        if self.was_forked:
            self.slab.retire()
        self._on_end()


_leases: set[_Lease] = set()
# An entry for each thread that forks now.
_forks: list[None] = []


def lease(slab: Slab, size: int, on_end: Callable[[], None]) -> npt.NDArray[np.uint8]:
    """The first bytes of a slab's values.

    Args:
        slab: Nobody else uses it.
        size: Number of bytes.
        on_end: Called once, in the process that has the lease, when neither the array nor a tensor or array made of it
            refers to the memory.

    Returns:
        uint8 `[size]`.
    """
    values = slab.memory[HEADER : HEADER + size]
    made = _Lease(slab, on_end)
    _leases.add(made)
    # A tensor of the array refers to it as long as any of its views does.
    finalize(values, made.end).atexit = False
    return values


def tensor_of_lease(values: npt.NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor in leased bytes."""
    # Detached: torch refuses some operations on views, such as `detach_`.
    tensor = torch.from_numpy(values).view(dtype).view(shape).detach()
    # `share_memory_` and queues give the storage other memory; arrays that were made before still have this.
    tensor.untyped_storage().lease = values  # type: ignore[attr-defined]
    return tensor


def _begin_fork() -> None:
    # Other threads may lease until the fork is over.
    _forks.append(None)
    for made in list(_leases):
        made.was_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_begin_fork, after_in_parent=_forks.pop, after_in_child=_forks.clear)
