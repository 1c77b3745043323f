"""Counts of transfers, in memory that a loader's workers share."""

import os
import threading
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from samplers.shards.skip_counts import MAX_PROCESSES, claim_row, shared_zeros
from samplers.shards.storage.network.counts import NAMES, Counts


class Transfers(Counts):
    """Counts of all processes that share this memory, each in a row of its own.

    A copy or a pickle of these counts starts from zero, so those of `copy.deepcopy(dataset)` do. A shallow copy of a
    dataset (`copy.copy`, `with_pieces`) has the same counts as the dataset. `torch.multiprocessing` shares the memory
    with the process to which it sends them.

    Args:
        cells: Shared memory, int64 `[MAX_PROCESSES, 1 + len(NAMES)]`: the process of a row, and its counts. None for
            new memory.
    """

    def __init__(self, cells: torch.Tensor | None = None) -> None:
        super().__init__()
        self._shared = shared_zeros((MAX_PROCESSES, 1 + len(NAMES)), torch.int64) if cells is None else cells
        self._table: npt.NDArray[np.int64] = self._shared.numpy()
        self._process, self._number = 0, 0

    def add(self, name: str, count: int = 1) -> None:
        """Add to a count, see `Counts`."""
        if self._process != os.getpid():
            # The lock too: a thread of the parent may have held it when this process was forked.
            self._lock = threading.Lock()
            self._number = claim_row(self._table[:, 0], os.getpid())
            self._process = os.getpid()
        super().add(name, count)

    def __reduce__(self) -> tuple[Any, ...]:
        return Transfers, ()

    def to_process(self) -> tuple[Any, ...]:
        """The pickle for another process, which shares the memory."""
        return Transfers, (self._shared,)

    def _row(self) -> npt.NDArray[np.int64]:
        return self._table[self._number, 1:]

    def _totals(self) -> npt.NDArray[np.int64]:
        return np.asarray(self._table[:, 1:].sum(axis=0), np.int64)


# Used when processes are started and in queues between them: these send a tensor in shared memory as a handle.
ForkingPickler.register(Transfers, Transfers.to_process)
