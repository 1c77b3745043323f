"""A worker's side of slabs: memory for values, and what is sent instead of them.

In a worker of a loader, large values are made in a slab that nothing uses. A slab that is used, by the worker, by a
message or by the receiver, is passed over; if there is no other, a new one is made. Outside of workers, where the
system has no such memory, and where there is none left, `new_values` is `torch.empty`.
"""

import math
import os
from multiprocessing import parent_process, reduction
from threading import Lock
from typing import Final

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from collate.tensors.slabs.slab import Loan, Slab, lease, tensor_of_lease

# Smaller values go through the pipe as fast.
SMALLEST: Final = 1 << 18
# Slabs of a worker. A loop that keeps all of its batches gets the others as if there were no slabs.
MOST: Final = 32
# A slab is given back when it has not been used for the last values, this many.
IDLE: Final = 128

# Users may switch slabs off.
_IS_ON: Final = os.environ.get("LENGTHTRACK_SLABS") != "0"
_HAS_SLABS: Final = _IS_ON and hasattr(os, "memfd_create") and hasattr(os, "posix_fallocate")


def new_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for values of a batch, on the CPU, which the caller overwrites; in a slab where that is of use."""
    values = values_in_slab(shape, dtype)
    return torch.empty(shape, dtype=dtype, device="cpu") if values is None else values


def values_in_slab(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The same in a slab; None where a slab is of no use, or there is none."""
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST or not _HAS_SLABS or get_worker_info() is None:
        return None
    return _pool.take(size, shape, dtype)


def lend(values: Tensor) -> Loan | None:
    """What is sent instead of values, in one message; None if they are not alone in a slab that can be lent."""
    is_plain = type(values) is Tensor and values.is_cpu and values.layout == torch.strided and values.is_contiguous()
    slab = _pool.slab_of.get(values.data_ptr()) if is_plain and _pool.slab_of else None
    if slab is None or slab.size != values.nbytes or values.is_conj() or values.is_neg():
        return None
    return _pool.lend(slab, values)


class _WorkersSlab(Slab):
    """A slab of this worker.

    Attributes:
        size: Bytes of the last values.
        is_leased: Whether this worker has a lease.
        used: When it was leased last, counted in values.
    """

    size = 0
    is_leased = False
    used = 0

    @property
    def is_free(self) -> bool:
        """Whether nobody has its values, or will."""
        return not (self.is_leased or self.is_sent or self.is_retired)

    def is_over(self, now: int) -> bool:
        """Whether the pool leaves it: it is idle, or of no use any more."""
        if self.is_retired:
            # A receiver to come may open its file.
            return self.is_received or not self.is_sent
        return self.is_free and now - self.used > IDLE

    def lend(self, values: Tensor) -> Loan:
        """Have the receiver lease its values.

        Raises:
            OSError: There is no descriptor for a receiver that has it not mapped.
        """
        parent = parent_process()
        is_kept = parent is not None and self.keeper == parent.pid
        copy = None if is_kept else reduction.DupFd(self.file)
        self.message, self.is_received = self.message + 1, False
        self.is_sent = True
        facts = values.dtype, tuple(values.shape), values.requires_grad
        return Loan(self.token, self.message, os.getpid(), self.file, copy, *facts)


class _Pool:
    """The slabs of this worker.

    Attributes:
        slab_of: Leased slabs, by the address of their values.
    """

    def __init__(self) -> None:
        self.slab_of: dict[int, _WorkersSlab] = {}
        self._slabs: list[_WorkersSlab] = []
        self._values = 0
        # Threads of a worker may collate too. The end of a lease takes no lock: it may come at any time, in any thread.
        self._lock = Lock()

    def take(self, size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Memory for values of `size` bytes; None if there is none."""
        with self._lock:
            self._values += 1
            try:
                slab = self._free_slab(size)
                if slab is None:
                    return None
                slab.reserve(size)
            except OSError:
                # No memory of this kind is left, or no descriptor.
                return None
            slab.is_leased, slab.used, slab.size = True, self._values, size

        def end() -> None:
            del self.slab_of[address]
            slab.is_leased = False

        array = lease(slab, size, end)
        address = array.ctypes.data
        self.slab_of[address] = slab
        return tensor_of_lease(array, dtype, shape)

    def lend(self, slab: _WorkersSlab, values: Tensor) -> Loan | None:
        """Lend the values of a slab, if nobody else has them."""
        # Each queue of a worker has a thread that sends.
        with self._lock:
            # The receiver of the message before may still have it, or will.
            if slab.is_sent or slab.is_retired:
                return None
            try:
                return slab.lend(values)
            except OSError:
                # No descriptor is left.
                return None

    def _free_slab(self, size: int) -> _WorkersSlab | None:
        """The smallest free slab of about this size, or a new one; None if there are too many."""
        capacity = _capacity(size)
        free = self._leave_idle()
        fitting = [slab for slab in free if size <= slab.capacity <= 2 * capacity]
        chosen = min(fitting, key=lambda slab: (slab.capacity, -slab.used)) if fitting else None
        self._leave_spare([slab for slab in free if slab is not chosen], size)
        if chosen is None and len(self._slabs) < MOST:
            chosen = _WorkersSlab.make(capacity)
            self._slabs.append(chosen)
        return chosen

    def _leave_spare(self, spare: list[_WorkersSlab], size: int) -> None:
        """Leave free slabs, oldest first, until they have no more bytes than are in use with these `size`."""
        used = size + sum(slab.reserved for slab in self._slabs if not slab.is_free)
        total = sum(slab.reserved for slab in spare)
        for slab in sorted(spare, key=lambda slab: slab.used):
            if total <= used and len(self._slabs) < MOST:
                return
            self._leave(slab)
            total -= slab.reserved

    def _leave_idle(self) -> list[_WorkersSlab]:
        """Leave slabs that are idle, or of which a forked process may have a copy; those that are free remain."""
        for slab in self._slabs:
            if slab.is_over(self._values):
                self._leave(slab)
        return [slab for slab in self._slabs if slab.is_free]

    def _leave(self, slab: _WorkersSlab) -> None:
        slab.retire()
        self._slabs = [other for other in self._slabs if other is not slab]


def _capacity(size: int) -> int:
    """Bytes of a new slab for values of this size: one of four sizes for each power of two.

    >>> _capacity(1 << 20), _capacity((1 << 20) + 1), _capacity(15 << 17)
    (1048576, 1310720, 2097152)
    """
    quarter = 1 << max((size - 1).bit_length() - 3, 12)
    return -(-size // quarter) * quarter


_pool = _Pool()


def _forget() -> None:
    """A forked process has no slabs: those of its parent are still the parent's."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
