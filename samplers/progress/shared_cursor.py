"""Where a stream's epochs stand, in memory that a loader's workers share."""

import os
from multiprocessing.reduction import ForkingPickler
from time import sleep
from typing import Any, Final, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import get_worker_info

from samplers.progress.position import Position
from samplers.shards.skip_counts import is_alive, shared_zeros

# Workers that a loader may have at most; what they share is 160 kB.
WORKERS: Final = 1024
# What a record tells of: a set epoch, one that the present iteration has too, a seek, an iteration, one after a seek.
_SET, _SET_AGAIN, _SEEK, _BEGUN, _BEGUN_SOUGHT = range(1, 6)
# A reader that finds a record half written looks again; a writer may have died amid it.
_LOOKS: Final = 1000
_PAUSE: Final = 1e-3
_NO_SEED: Final = -1


class Token(NamedTuple):
    """What tells the iteration of an iterator from others: those of one loader's workers differ in the process alone.

    Attributes:
        seed: that the loader drew for its workers; -1 in the main process, where an iterator is alone.
        turn: how many iterations this process has begun.
        process: its number.
    """

    seed: int
    turn: int
    process: int


class Record(NamedTuple):
    """What happened to a stream: an epoch was set, a position was sought, or an iteration began.

    Attributes:
        number: counts what happened; all workers of an iteration write the same.
        kind: which of these.
        epoch: that is set, sought or begun, and where in it.
        replicas: part of that position.
        batches: part of that position.
        seed: of the loader's iteration, the same for its workers.
        turn: how many iterations this worker has begun.
        process: the writer's.
        loaded: batches of the iteration that the writer's iterator was told, by a state, to have given already.
    """

    number: int
    kind: int
    epoch: int
    replicas: int
    batches: int
    seed: int = _NO_SEED
    turn: int = 0
    process: int = 0
    loaded: int = 0

    @property
    def token(self) -> Token:
        """What tells its iteration."""
        return Token(self.seed, self.turn, self.process)

    @property
    def start(self) -> Position:
        """The position."""
        return Position(self.epoch, self.replicas, self.batches)

    @property
    def is_begun(self) -> bool:
        """Whether an iteration began."""
        return self.kind >= _BEGUN

    @property
    def is_sought(self) -> bool:
        """Whether it is a seek, or an iteration that goes on from a saved position."""
        return self.kind in {_SEEK, _BEGUN_SOUGHT}


_NONE: Final = Record(0, 0, 0, 0, 0)
# Behind a record's numbers: their checksum, and the batches that its writer has taken.
_CHECK, _TAKEN = len(_NONE), len(_NONE) + 1
_MAIN, _TOLD, _FIRST_WORKER = range(3)


class SharedCursor:
    """Which epoch comes, where a seek leads, and where the last iteration began.

    A loader's workers never meet, may live on or be made anew for each epoch, and one may have ended its part of an
    iteration before another has begun it. So each writes down, in a place of its own, which iterations it has begun.
    It knows those that others of its loader have begun by the seed that the loader draws for each set of workers, and
    by how many it has begun itself, and takes up the same epoch. If nobody has, it begins what comes after the last
    thing that happened; two that find so at the same time come to the same.

    A copy stands where the original stood, and then goes its own way. What `torch.multiprocessing` sends to another
    process is no copy: a worker must share.

    Args:
        replicas: for which an epoch is laid out that begins at its first batch.
        cells: memory that is shared already; None for new memory.
    """

    def __init__(self, replicas: int, cells: torch.Tensor | None = None) -> None:
        # By writer: what began last and before in the main process, what was set or sought last, and the same as the
        # first of each worker.
        if cells is None:
            cells = shared_zeros((_FIRST_WORKER + WORKERS, 2, _TAKEN + 1), torch.int64)
        self._replicas = replicas
        self._cells = cells
        self._table = cells.numpy()
        self._begun = 0

    def __getstate__(self) -> dict[str, Any]:
        records = self._records()
        began, told = _began(records), _told(records)
        loaded = sum(record.loaded for record in records if record.number == began.number)
        kept = [record._replace(seed=_NO_SEED, turn=0, process=0, loaded=loaded) for record in (began, told)]
        return {"replicas": self._replicas, "records": [tuple(record) for record in kept if record.number]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["replicas"])  # type: ignore[misc]
        for record in (Record(*numbers) for numbers in state["records"]):
            self._write(_MAIN if record.is_begun else _TOLD, 0, record)

    def to_process(self) -> tuple[Any, ...]:
        """How it is sent to another process, which then shares it."""
        return SharedCursor, (self._replicas, self._cells)

    @property
    def coming(self) -> Position:
        """Where the next iteration begins."""
        return self._after(_newest(self._records()))

    @property
    def present(self) -> tuple[Position, int]:
        """Where the last iteration began, or if none has since a seek or another epoch, where the next will.

        Returns:
            The position, and the steps after it that were taken before the iteration was loaded from a state.
        """
        records = self._records()
        if not _is_present(records):
            return self._after(_newest(records)), 0
        began = _began(records)
        return began.start, sum(record.loaded for record in records if record.number == began.number)

    def peek(self) -> Position:
        """Where an iterator of this process would begin."""
        records = self._records()
        same = _same(records, self._new_token(self._begun + 1))
        return self._after(_newest(records)) if same is None else same.start

    def set_epoch(self, epoch: int) -> None:
        """Let another epoch come next, unless a seek that no iteration has followed leads into this one."""
        records = self._records()
        newest = _newest(records)
        if newest.kind == _SEEK and newest.epoch == epoch:
            return
        again = _is_present(records) and _began(records).epoch == epoch
        self._write(_TOLD, 0, Record(newest.number + 1, _SET_AGAIN if again else _SET, epoch, self._replicas, 0))

    def seek(self, position: Position) -> None:
        """Let the next iteration begin at a position."""
        number = _newest(self._records()).number + 1
        self._write(_TOLD, 0, Record(number, _SEEK, position.epoch, position.replicas, position.batches))

    def begin(self, loaded: "Run | None" = None) -> "Run":
        """Note that an iterator begins: what others of its loader have begun, or what comes, or what was loaded.

        Args:
            loaded: from `load`, which has noted it; since then another epoch may have been set.
        """
        if loaded is None:
            self._begun += 1
            return self._enter(None, self._new_token(self._begun), 0)
        return self._enter(loaded.record.start, loaded.record.token, loaded.record.loaded)

    def load(self, start: Position, taken: int) -> "Run":
        """Note that an iterator goes on with an iteration that began elsewhere, of which it has taken some batches."""
        self._begun += 1
        return self._enter(start, self._new_token(self._begun), taken)

    def note(self, run: "Run", taken: int) -> None:
        """Note how many batches an iterator has taken."""
        run.taken = taken
        if self._table[run.writer, run.slot, 0] == run.record.number:
            self._table[run.writer, run.slot, _TAKEN] = taken

    def dropped_before(self, run: "Run") -> tuple[Position, int, int] | None:
        """If the iteration before was sought and this one is not: where it began, and its batches.

        Returns:
            The position, the batches after it that were taken before, and those that the iteration has taken.
        """
        earlier = [record for record in self._records() if record.is_begun and record.number < run.record.number]
        last = max(earlier, default=_NONE)
        if run.record.is_sought or not last.is_sought:
            return None
        loaded = sum(record.loaded for record in earlier if record.number == last.number)
        return last.start, loaded, int(self._table[..., _TAKEN][self._table[..., 0] == last.number].sum()) - loaded

    def _enter(self, start: Position | None, token: Token, loaded: int) -> "Run":
        records = self._records()
        newest, record = _newest(records), _same(records, token)
        if record is None or (start is not None and record.number < _told(records).number):
            kind = _BEGUN_SOUGHT if start is not None or newest.kind == _SEEK else _BEGUN
            place = self._after(newest) if start is None else start
            record = Record(newest.number + 1, kind, place.epoch, place.replicas, place.batches)
        info = get_worker_info()
        writer = _MAIN if info is None else _FIRST_WORKER + info.id
        # The older of the two, unless one is this iterator's own.
        rows = [Record(*cells[:_CHECK].tolist()) for cells in self._table[writer]]
        slot = min((0, 1), key=lambda slot: (rows[slot].token != token, rows[slot].number))
        run = Run(record._replace(**token._asdict(), loaded=loaded), writer, slot)
        self._write(writer, slot, run.record)
        self.note(run, loaded)
        return run

    def _new_token(self, turn: int) -> Token:
        info = get_worker_info()
        return Token(_NO_SEED if info is None else info.seed - info.id, turn, os.getpid())

    def _after(self, newest: Record) -> Position:
        if newest.number == 0:
            return Position(0, self._replicas)
        return Position(newest.epoch + 1, self._replicas) if newest.is_begun else newest.start

    def _records(self) -> list[Record]:
        """All that was written, as of one moment: what is half written is read again."""
        for look in range(_LOOKS):
            if look:
                sleep(_PAUSE)
            table = self._table.copy()
            written = table[table[..., 0] > 0]
            torn = [cells for cells in written if cells[_CHECK] != crc32(cells[:_CHECK].tobytes())]
            if not torn:
                break
        return [
            Record(*cells[:_CHECK].tolist()) for cells in written if cells[_CHECK] == crc32(cells[:_CHECK].tobytes())
        ]

    def _write(self, writer: int, slot: int, record: Record) -> None:
        numbers = np.array(record)
        cells = self._table[writer, slot]
        cells[1:_CHECK] = numbers[1:]
        cells[_CHECK] = crc32(numbers.tobytes())
        cells[0] = record.number


class Run:
    """An iterator's part of an iteration.

    Args:
        record: what was written of it.
        writer: who wrote it.
        slot: in which of the writer's two places.
    """

    def __init__(self, record: Record, writer: int, slot: int) -> None:
        self.record, self.writer, self.slot, self.taken = record, writer, slot, 0


def _newest(records: list[Record]) -> Record:
    return max(records, default=_NONE)


def _began(records: list[Record]) -> Record:
    return max((record for record in records if record.is_begun), default=_NONE)


def _told(records: list[Record]) -> Record:
    return max((record for record in records if not record.is_begun), default=_NONE)


def _is_present(records: list[Record]) -> bool:
    """Whether the last iteration is the present one: nothing was sought and no other epoch was set since it began."""
    began, told = _began(records), _told(records)
    return began.number > 0 and (told.number < began.number or told.kind == _SET_AGAIN)


def _same(records: list[Record], token: Token) -> Record | None:
    """The record of this iterator, or of another worker's in its iteration."""
    same = [record for record in records if record.is_begun and record.token == token]
    # A loader may draw a seed a second time, after torch.manual_seed; the workers before are gone then.
    if not same and token.seed != _NO_SEED:
        same = [record for record in records if record.token[:2] == token[:2] and is_alive(record.process)]
    return max(same, default=None)


# For processes that are started, and queues between them: there a tensor in shared memory is sent as a handle.
ForkingPickler.register(SharedCursor, SharedCursor.to_process)
