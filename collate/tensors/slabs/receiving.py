"""The receiver's side of slabs: mapped once for each worker, and leased for each tensor that comes.

The process that started a worker keeps the worker's slabs mapped until it forgets the worker, as a loader does when its
iterator ends. Any other process maps a slab for one tensor.
"""

import os
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
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

    def end(self) -> None:
        """Nothing in this process refers to its values any more: the worker may use it again."""
        # One that is retired stays as it was sent, so that the worker cannot see one change without the other.
        if not self.is_retired:
            self.is_sent = False


# By token, those that are mapped at all; and those that are kept mapped, by worker.
_slabs: Final[WeakValueDictionary[bytes, _KeptSlab]] = WeakValueDictionary()
_kept: Final[WeakKeyDictionary[BaseProcess, list[_KeptSlab]]] = WeakKeyDictionary()


def borrow(loan: Loan) -> Tensor:
    """The tensor that a worker has lent.

    Raises:
        OSError: The slab cannot be mapped.
        RuntimeError: Another process than the keeper gets the tensor after the worker has ended.
    """
    slab = _slabs.get(loan.token)
    if slab is None:
        slab = _map(loan)
    elif loan.copy is not None:
        os.close(loan.copy.detach())
    _leave_retired(slab)
    values = tensor_of_lease(lease(slab, loan.size, slab.end), loan.dtype, loan.shape)
    return values.requires_grad_(loan.requires_grad)


def _map(loan: Loan) -> _KeptSlab:
    """Map a slab, and keep it if this process has started its worker.

    Raises:
        RuntimeError: Its file is not there.
    """
    file = _open(loan) if loan.copy is None else loan.copy.detach()
    try:
        slab = _KeptSlab.of_file(file)
    finally:
        os.close(file)
    if slab.token != loan.token:
        raise RuntimeError(_gone(loan))
    _slabs[loan.token] = slab
    worker = next((child for child in active_children() if child.pid == loan.worker), None)
    if worker is not None:
        slab.worker = ref(worker)
        _kept.setdefault(worker, []).append(slab)
        slab.keeper = os.getpid()
    return slab


def _open(loan: Loan) -> int:
    """Open the file of a slab that another process than the keeper gets.

    Raises:
        RuntimeError: The worker has ended, or hides its files.
    """
    try:
        return os.open(Path("/proc", str(loan.worker), "fd", str(loan.file)), os.O_RDWR)
    except OSError as error:
        raise RuntimeError(_gone(loan)) from error


def _gone(loan: Loan) -> str:
    return (
        f"the memory of a batch from worker {loan.worker} cannot be opened: a process other than the loader's must "
        "receive a batch before the worker that has sent it ends"
    )


def _leave_retired(received: _KeptSlab) -> None:
    """Keep no slabs of the same worker that are used no more."""
    worker = received.worker and received.worker()
    kept = _kept.get(worker, []) if worker else []
    if any(slab.is_retired for slab in kept):
        kept[:] = [slab for slab in kept if not slab.is_retired]


if hasattr(os, "register_at_fork"):
    # The memory of the slabs would last as long as the forked process.
    os.register_at_fork(after_in_child=_kept.clear)
