"""The receiver's side of slabs: mapped once for each worker, and leased for each tensor that comes.

The process that started a worker keeps the worker's slabs mapped until it forgets the worker, as a loader does when its
iterator ends. Any other process maps a slab for one tensor.
"""

import os
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import RLock
from typing import Final
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

from torch import Tensor

from collate.tensors.slabs.slab import Loan, Slab, lease, tensor_of_lease


class _KeptSlab(Slab):
    """A worker's slab in another process.

    Attributes:
        worker: The worker, where this process has started it.
    """

    worker: "ref[BaseProcess] | None" = None
    _had_last = False

    @property
    def is_over(self) -> bool:
        """Whether nothing comes in it any more."""
        # The worker may retire a slab whose message is on its way.
        return self.is_retired and (self._had_last or not self.is_sent)

    def end(self) -> None:
        """Nothing in this process refers to its values any more: the worker may use it again."""
        # One that is retired stays as it was sent, so that the worker cannot see one change without the other.
        if self.is_retired:
            self._had_last = True
        else:
            self.is_sent = False


# By token, those that are mapped at all; and those that are kept mapped, by worker.
_slabs: Final[WeakValueDictionary[bytes, _KeptSlab]] = WeakValueDictionary()
_kept: Final[WeakKeyDictionary[BaseProcess, list[_KeptSlab]]] = WeakKeyDictionary()
# Loops in several threads may have a loader each. A collection of garbage may receive too, in a thread that holds it.
_lock = RLock()


def borrow(loan: Loan) -> Tensor:
    """The tensor that a worker has lent.

    Raises:
        OSError: The slab cannot be mapped.
        RuntimeError: The worker had ended before this process got the tensor, or the message was received before.
    """
    slab = _slabs.get(loan.token)
    if slab is None:
        slab = _map(loan)
        _keep(slab, loan.worker)
    elif loan.copy is not None:
        os.close(_detach(loan))
    if slab.is_received or slab.message != loan.message:
        raise RuntimeError(
            f"a batch from worker {loan.worker} was received before, and its memory may hold another one now: "
            "let a worker send it twice, or send what `pickle` makes of it"
        )
    slab.is_received = True
    _leave_retired(slab)
    values = tensor_of_lease(lease(slab, loan.size, slab.end), loan.dtype, loan.shape)
    return values.requires_grad_(loan.requires_grad)


def _map(loan: Loan) -> _KeptSlab:
    """Map a slab.

    Raises:
        OSError: It cannot be mapped.
        RuntimeError: Its file is not there.
    """
    file = _open(loan) if loan.copy is None else _detach(loan)
    try:
        slab = _KeptSlab.of_file(file)
    finally:
        os.close(file)
    if slab.token != loan.token:
        raise RuntimeError(_gone(loan))
    return slab


def _keep(slab: _KeptSlab, worker_id: int) -> None:
    """Keep a slab mapped if this process has started its worker."""
    _slabs[slab.token] = slab
    with _lock:
        children = active_children()
        worker = next((child for child in children if child.pid == worker_id), None)
        for ended in set(_kept).difference(children):
            # torchdata's loader, and torch's before 2.13, may hold the processes of workers for good.
            del _kept[ended]
        if worker is not None:
            slab.worker = ref(worker)
            _kept.setdefault(worker, []).append(slab)
            slab.keeper = os.getpid()


def _open(loan: Loan) -> int:
    """Open the file of a slab that another process than the keeper gets.

    Raises:
        RuntimeError: The worker has ended, or hides its files.
    """
    try:
        return os.open(Path("/proc", str(loan.worker), "fd", str(loan.file)), os.O_RDWR)
    except OSError as error:
        raise RuntimeError(_gone(loan)) from error


def _detach(loan: Loan) -> int:
    """The descriptor that a worker has sent along.

    Raises:
        RuntimeError: The worker has ended.
    """
    try:
        return int(loan.copy.detach())
    except (OSError, EOFError) as error:
        # A worker that is killed in between gives one of several errors of connections.
        raise RuntimeError(_gone(loan)) from error


def _gone(loan: Loan) -> str:
    return (
        f"the memory of a batch from worker {loan.worker} cannot be opened: the worker has ended, or was killed, "
        "before the batch was received"
    )


def _leave_retired(received: _KeptSlab) -> None:
    """Keep no slabs of the same worker that are used no more."""
    worker = received.worker and received.worker()
    with _lock:
        kept = _kept.get(worker, []) if worker else []
        if any(slab.is_over for slab in kept):
            kept[:] = [slab for slab in kept if not slab.is_over]


def _forget() -> None:
    global _lock
    # Another thread of the parent may hold it.
    _lock = RLock()
    # The memory of the slabs would last as long as the forked process.
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
