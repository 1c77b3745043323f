"""SharedEpochCursor: which epoch a stream's next iteration begins, in memory that a loader's workers share.

Two workers, one epoch. Worker 0 begins first: it finds no record, and writes "iteration 1 began: epoch 0". Worker 1
finds that record, of the same loader's iteration, and joins it. In the next pass both have begun one iteration, so that
the first to come writes "iteration 2 began: epoch 1".

>>> cursor = SharedEpochCursor(num_replicas=1)
>>> iteration = cursor.begin()
>>> cursor.next_start.epoch, cursor.last_start
(1, (Position(epoch=0, replicas=1, batches=0), 0))
"""

import os
import re
from multiprocessing import current_process
from multiprocessing.reduction import ForkingPickler
from time import sleep
from typing import Any, Final, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import get_worker_info

from samplers.progress.position import Position
from samplers.shards.skip_counts import is_alive, shared_zeros

# A loader may have up to this many workers; their shared memory is 160 kB.
WORKERS: Final = 1024
# The events of records: an epoch was set; the present iteration's epoch was set again; a position was sought; an
# iteration began; an iteration began after a seek.
_SET, _SET_AGAIN, _SEEK, _BEGUN, _BEGUN_SOUGHT = range(1, 6)
# A reader that finds a half-written record reads it again, but only this often: its writer may have died.
_LOOKS: Final = 1000
_PAUSE_SECONDS: Final = 1e-3
_NO_SEED: Final = -1


class Token(NamedTuple):
    """Identifies the iteration of an iterator; the tokens of one loader's workers differ in the process only.

    Attributes:
        seed: Seed that the loader drew for its workers; -1 in the main process, where an iterator is alone.
        begun: Iterations that this process has begun.
        process: Process id.
        worker: Number of the worker in its loader.
        birth: How many processes the loader's process had started before this loader's first worker.
    """

    seed: int
    begun: int
    process: int
    worker: int = 0
    birth: int = 0


class Record(NamedTuple):
    """An event of a stream: an epoch was set, a position was sought, or an iteration began.

    Attributes:
        number: Number of the event; all workers of an iteration write the same.
        event: Which of these it is.
        epoch: The epoch that is set, sought or begun.
        replicas: Replicas with which that epoch began.
        batches: Batches of that epoch that were taken before.
        seed: Seed of the loader's iteration, the same for all its workers.
        begun: Iterations that this worker has begun.
        process: Process id of the writer.
        loaded: Batches of the iteration that its iterator had given before, as a loaded state says.
        worker: Number of the writer in its loader.
        birth: As in `Token`, for the writer's loader.
    """

    number: int
    event: int
    epoch: int
    replicas: int
    batches: int
    seed: int = _NO_SEED
    begun: int = 0
    process: int = 0
    loaded: int = 0
    worker: int = 0
    birth: int = 0

    @property
    def token(self) -> Token:
        """The token of its iteration."""
        return Token(self.seed, self.begun, self.process, self.worker, self.birth)

    @property
    def start(self) -> Position:
        """Where the iteration begins."""
        return Position(self.epoch, self.replicas, self.batches)

    @property
    def is_begun(self) -> bool:
        """Whether an iteration began."""
        return self.event >= _BEGUN

    @property
    def is_sought(self) -> bool:
        """Whether it is a seek, or an iteration that resumes from a saved position."""
        return self.event in {_SEEK, _BEGUN_SOUGHT}


_NO_RECORD: Final = Record(0, 0, 0, 0, 0)
# After a record's numbers: their checksum, and the batches that its writer has taken.
_CHECK, _TAKEN = len(_NO_RECORD), len(_NO_RECORD) + 1
_MAIN, _REQUESTS, _FIRST_WORKER = range(3)


class SharedEpochCursor:
    """State that a stream's iterators share: the next epoch, a position that was sought, the last iteration.

    Workers do not communicate, and may be persistent or restarted every epoch; one may have ended its part of an
    iteration before another has begun it. So each worker writes the iterations that it has begun into memory of its
    own, which the others read. A worker recognises the iterations of its loader by the seed that the loader draws for
    each set of workers, and by the number of iterations that it has begun, and joins the same epoch. If there is none,
    it begins what comes after the last event; two workers that do so at the same time decide the same. If two loaders
    have drawn the same seed, a worker knows its loader by the order in which processes were started.

    A copy begins where the original stands, and then moves independently. What `torch.multiprocessing` sends to another
    process is no copy: it shares the memory, as a worker must.

    Args:
        num_replicas: Replicas that share an epoch.
        cells: Memory that is shared already; None for new memory.
    """

    def __init__(self, num_replicas: int, cells: torch.Tensor | None = None) -> None:
        # By writer, two records each: the last two iterations of the main process, the last request (an epoch that was
        # set, or a seek), and the last two iterations of each worker.
        if cells is None:
            cells = shared_zeros((_FIRST_WORKER + WORKERS, 2, _TAKEN + 1), torch.int64)
        self._num_replicas = num_replicas
        self._cells = cells
        self._numbers = cells.numpy()
        self._begun = 0

    def __getstate__(self) -> dict[str, Any]:
        records = self._records()
        began, request = _last_begun(records), _last_request(records)
        loaded = sum(record.loaded for record in records if record.number == began.number)
        copied = [
            record._replace(seed=_NO_SEED, begun=0, process=0, loaded=loaded, worker=0, birth=0)
            for record in (began, request)
        ]
        return {"replicas": self._num_replicas, "records": [tuple(record) for record in copied if record.number]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["replicas"])  # type: ignore[misc]
        for record in (Record(*numbers) for numbers in state["records"]):
            self._write(_MAIN if record.is_begun else _REQUESTS, 0, record)

    def to_process(self) -> tuple[Any, ...]:
        """The parts to send to another process, which then shares the memory."""
        return SharedEpochCursor, (self._num_replicas, self._cells)

    @property
    def next_start(self) -> Position:
        """Where the next iteration begins."""
        return self._after(_newest(self._records()))

    @property
    def last_start(self) -> tuple[Position, int]:
        """Where the last iteration began, and steps that were taken before it was loaded from a state.

        If no iteration has begun since `seek` or `set_epoch` to another epoch: where the next one begins.
        """
        records = self._records()
        if not _is_present(records):
            return self._after(_newest(records)), 0
        began = _last_begun(records)
        return began.start, sum(record.loaded for record in records if record.number == began.number)

    def peek(self) -> Position:
        """Where a new iterator of this process would begin."""
        records = self._records()
        joined = _find_iteration(records, self._new_token(self._begun + 1))
        return self._after(_newest(records)) if joined is None else joined.start

    def set_epoch(self, epoch: int) -> None:
        """Make another epoch the next; a position that was sought in this epoch is kept."""
        records = self._records()
        newest = _newest(records)
        if newest.event == _SEEK and newest.epoch == epoch:
            return
        again = _is_present(records) and _last_begun(records).epoch == epoch
        self._write(
            _REQUESTS, 0, Record(newest.number + 1, _SET_AGAIN if again else _SET, epoch, self._num_replicas, 0)
        )

    def seek(self, position: Position) -> None:
        """Let the next iteration begin at a position."""
        number = _newest(self._records()).number + 1
        self._write(_REQUESTS, 0, Record(number, _SEEK, position.epoch, position.replicas, position.batches))

    def begin(self, loaded: "WorkerIteration | None" = None) -> "WorkerIteration":
        """Note that an iterator begins: the iteration of the loader's other workers, the next one, or a loaded one.

        Args:
            loaded: What `load` returned; another epoch may have been set since then.
        """
        if loaded is None:
            self._begun += 1
            return self._enter(None, self._new_token(self._begun), 0)
        return self._enter(loaded.record.start, loaded.record.token, loaded.record.loaded)

    def load(self, start: Position, taken: int) -> "WorkerIteration":
        """Note that an iterator resumes an iteration that began elsewhere, of which it has taken some batches."""
        self._begun += 1
        return self._enter(start, self._new_token(self._begun), taken)

    def note_taken(self, iteration: "WorkerIteration", taken: int) -> None:
        """Note how many batches an iterator has taken."""
        iteration.taken = taken
        if self._numbers[iteration.writer, iteration.entry, 0] == iteration.record.number:
            self._numbers[iteration.writer, iteration.entry, _TAKEN] = taken

    def dropped_before(self, iteration: "WorkerIteration") -> tuple[Position, int, int] | None:
        """If the iteration before was resumed and this one is not: where it began, and its batches.

        Returns:
            The position, the batches after it that were taken before, and those that the iteration has taken.
        """
        earlier = [record for record in self._records() if record.is_begun and record.number < iteration.record.number]
        last = max(earlier, default=_NO_RECORD)
        if iteration.record.is_sought or not last.is_sought:
            return None
        loaded = sum(record.loaded for record in earlier if record.number == last.number)
        return last.start, loaded, int(self._numbers[..., _TAKEN][self._numbers[..., 0] == last.number].sum()) - loaded

    def _enter(self, start: Position | None, token: Token, loaded: int) -> "WorkerIteration":
        """Join the iteration of this token, or begin one; and write a record of it."""
        records = self._records()
        newest, record = _newest(records), _find_iteration(records, token)
        if record is None or (start is not None and record.number < _last_request(records).number):
            event = _BEGUN_SOUGHT if start is not None or newest.event == _SEEK else _BEGUN
            position = self._after(newest) if start is None else start
            record = Record(newest.number + 1, event, position.epoch, position.replicas, position.batches)
        info = get_worker_info()
        writer = _MAIN if info is None else _FIRST_WORKER + info.id
        # Overwrite the older of the writer's two records, unless one is this iterator's.
        written = [Record(*cells[:_CHECK].tolist()) for cells in self._numbers[writer]]
        entry = min((0, 1), key=lambda entry: (written[entry].token != token, written[entry].number))
        iteration = WorkerIteration(record._replace(**token._asdict(), loaded=loaded), writer, entry)
        self._write(writer, entry, iteration.record)
        self.note_taken(iteration, loaded)
        return iteration

    def _new_token(self, begun: int) -> Token:
        """The token of this process' iteration of that number."""
        info = get_worker_info()
        if info is None:
            return Token(_NO_SEED, begun, os.getpid())
        return Token(info.seed - info.id, begun, os.getpid(), info.id, _count_started() - info.id)

    def _after(self, newest: Record) -> Position:
        """Where the iteration after an event begins."""
        if newest.number == 0:
            return Position(0, self._num_replicas)
        return Position(newest.epoch + 1, self._num_replicas) if newest.is_begun else newest.start

    def _records(self) -> list[Record]:
        """All records, as of one moment; a half-written record is read again."""
        for look in range(_LOOKS):
            if look:
                sleep(_PAUSE_SECONDS)
            numbers = self._numbers.copy()
            written = numbers[numbers[..., 0] > 0]
            torn = [cells for cells in written if cells[_CHECK] != crc32(cells[:_CHECK].tobytes())]
            if not torn:
                break
        return [
            Record(*cells[:_CHECK].tolist()) for cells in written if cells[_CHECK] == crc32(cells[:_CHECK].tobytes())
        ]

    def _write(self, writer: int, entry: int, record: Record) -> None:
        """Write a record and its checksum, and the number that makes it valid last."""
        numbers = np.array(record)
        cells = self._numbers[writer, entry]
        cells[1:_CHECK] = numbers[1:]
        cells[_CHECK] = crc32(numbers.tobytes())
        cells[0] = record.number


class WorkerIteration:
    """A worker's part of an iteration.

    Args:
        record: Its record.
        writer: Who wrote it: index into the shared memory.
        entry: Which of the writer's two records it is.
    """

    def __init__(self, record: Record, writer: int, entry: int) -> None:
        self.record, self.writer, self.entry, self.taken = record, writer, entry, 0


def _newest(records: list[Record]) -> Record:
    """The last event."""
    return max(records, default=_NO_RECORD)


def _last_begun(records: list[Record]) -> Record:
    """The last iteration that began."""
    return max((record for record in records if record.is_begun), default=_NO_RECORD)


def _last_request(records: list[Record]) -> Record:
    """The last epoch that was set, or seek."""
    return max((record for record in records if not record.is_begun), default=_NO_RECORD)


def _is_present(records: list[Record]) -> bool:
    """Whether the last iteration is the present one: nothing was sought and no other epoch was set since it began."""
    began, request = _last_begun(records), _last_request(records)
    return began.number > 0 and (request.number < began.number or request.event == _SET_AGAIN)


def _find_iteration(records: list[Record], token: Token) -> Record | None:
    """The record of this iterator, or of another worker in its iteration."""
    begun = [record for record in records if record.is_begun and record.token[:2] == token[:2]]
    own = [record for record in begun if record.process == token.process]
    if own or token.seed == _NO_SEED:
        return max(own, default=None)
    # After torch.manual_seed a loader may draw a seed a second time. Its earlier workers are gone by then, unless their
    # iterator still lives: then they were started earlier, and one of them had this worker's number.
    alive = [record for record in begun if is_alive(record.process)]
    siblings = [record for record in alive if record.birth == token.birth]
    # Threads that start processes at the same time mix up the births of one loader's workers, but not their numbers.
    other_loaders = {record.number for record in begun if record.worker == token.worker}
    return max(siblings or (record for record in alive if record.number not in other_loaders), default=None)


def _count_started() -> int:
    """How many processes the parent has started, with this one; 0 if the process has a custom name."""
    # Python names a process after its number among its parent's children, with its parent's number before it, and so
    # on: the second child of the third process is "Process-3:2".
    match = re.fullmatch(r".*-(?:\d+:)*(\d+)", current_process().name)
    return int(match[1]) if match else 0


# For processes that are started, and queues between them: there a tensor in shared memory is sent as a handle.
ForkingPickler.register(SharedEpochCursor, SharedEpochCursor.to_process)
