"""Where a stream's epochs stand, in memory that a loader's workers share."""

from typing import Final

import torch

from samplers.cursor import Position

# Workers that a loader may have at most; the cells are 8 kB.
WORKERS: Final = 1024
_NONE: Final = Position(-1, 0)
_SOUGHT, _BEGAN, _NEXT = slice(0, 3), slice(3, 6), slice(6, None)


class SharedCursor:
    """Which epoch comes, where a seek leads, and where the last iteration began.

    A loader's workers never meet, may live on or be made anew for each epoch, and one may have read its part of an
    epoch before another has begun it. So each has a cell for the epoch that it will begin next, written when it has
    read its last batch, and the epoch that comes is the least of all cells: nobody can begin a later one while somebody
    still has to begin this one. A plain attribute would not reach workers that live on.

    Args:
        replicas: for which an epoch is laid out that begins at its first batch.
    """

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._cells = torch.zeros(6 + WORKERS, dtype=torch.int64).share_memory_()
        self._write(_SOUGHT, _NONE)
        self._write(_BEGAN, _NONE)

    @property
    def coming(self) -> Position:
        """Where the next iteration begins."""
        epoch = int(self._cells[_NEXT].min())
        sought = self._read(_SOUGHT)
        return sought if sought.epoch == epoch else Position(epoch, self._replicas)

    @property
    def present(self) -> Position:
        """Where the last iteration began, or if none has since a seek or another epoch, where the next will."""
        began = self._read(_BEGAN)
        return self.coming if began == _NONE else began

    def set_epoch(self, epoch: int) -> None:
        """Let another epoch come next, unless a seek that no iteration has followed leads into this one."""
        began = self._read(_BEGAN)
        if self._read(_SOUGHT).epoch != epoch or began != _NONE:
            self._write(_SOUGHT, _NONE)
        if began.epoch != epoch:
            self._write(_BEGAN, _NONE)
        self._cells[_NEXT] = epoch

    def seek(self, position: Position) -> None:
        """Let the next iteration begin at a position."""
        self._write(_SOUGHT, position)
        self._write(_BEGAN, _NONE)
        self._cells[_NEXT] = position.epoch

    def begin(self) -> Position:
        """Note, in any worker, that an iteration begins, and where."""
        start = self.coming
        self._write(_BEGAN, start)
        return start

    def resume(self, start: Position, worker: int, workers: int) -> None:
        """Note that a worker goes on with an iteration that began elsewhere; the next epoch comes after it."""
        self._write(_BEGAN, start)
        self._cells[_cells_of(worker, workers)] = start.epoch + 1

    def end(self, start: Position, worker: int, workers: int) -> None:
        """Note that a worker has read its last batch, unless another epoch was set meanwhile."""
        if int(self._cells[_cells_of(worker, workers)][0]) == start.epoch:
            self._cells[_cells_of(worker, workers)] = start.epoch + 1

    def _read(self, cells: slice) -> Position:
        return Position(*self._cells[cells].tolist())

    def _write(self, cells: slice, position: Position) -> None:
        self._cells[cells] = torch.tensor([position.epoch, position.replicas, position.batches])


def _cells_of(worker: int, workers: int) -> slice:
    # The last worker writes for those that there are not, since a later loader may have more.
    return slice(6 + worker, None if worker == workers - 1 else 7 + worker)
