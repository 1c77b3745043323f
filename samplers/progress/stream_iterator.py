"""StreamIterator: one worker's part of an epoch of a stream of collated batches."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from collate.widths import check_count
from samplers.progress.mixtures.mixed_shards import MixedShards
from samplers.progress.mixtures.staged import StagedLoader
from samplers.progress.position import warn_of_drop
from samplers.progress.shared_cursor import WORKERS, SharedEpochCursor, WorkerIteration
from samplers.progress.window_reader import ShardsInOrder, StepReader


class ReadingLoader(StagedLoader):
    """A loader that reads the samples of its batches.

    Attributes:
        data: The samples by index.
        collate_fn: Makes a batch from a list of samples.
        rank: Rank of this process.
    """

    data: ShardsInOrder | MixedShards
    collate_fn: Callable[[list[Any]], Any]
    rank: int


class StreamIterator(Iterator[Any]):
    """One worker's part of an iteration over an epoch, or over the remainder of one.

    Args:
        stream: The stream whose batches it gives.
        cursor: The stream's, shared with its other iterators.

    Raises:
        ValueError: The loader has more than 1024 workers.
    """

    def __init__(self, stream: ReadingLoader, cursor: SharedEpochCursor) -> None:
        info = get_worker_info()
        self._stream, self._cursor = stream, cursor
        self._worker, self._workers = (info.id, info.num_workers) if info else (0, 1)
        if self._workers > WORKERS:
            raise ValueError(f"a loader must have at most {WORKERS} workers, got {self._workers}: use fewer")
        self._iteration: WorkerIteration | None = None
        self._reader: StepReader | None = None
        # Of this worker, from the start of the iteration on.
        self._steps = 0

    def __next__(self) -> Any:
        if self._iteration is None or self._reader is None:
            # Only now: a loader makes iterators that it never uses, and they must not take an epoch.
            self._iteration = self._cursor.begin(self._iteration)
            self._warn_of_drop(self._iteration)
            self._reader = self._open(self._iteration)
            self._steps = self._iteration.taken + len(self._reader)
        if len(self._reader) == 0:
            raise StopIteration
        batch = self._stream.collate_fn(self._reader.take())
        # After the collator, which reads local samples: a batch that failed must not be missing after a resume.
        self._cursor.note_taken(self._iteration, self._steps - len(self._reader))
        return batch

    def state_dict(self) -> dict[str, int | str]:
        """Where the epoch stands for this worker, in fresh primitive values, under 1 kB (of a mixture more)."""
        iteration = self._iteration
        start, taken = (self._cursor.peek(), 0) if iteration is None else (iteration.record.start, iteration.taken)
        return self._stream.state_of(start) | self._worker_numbers | {"taken": taken}

    @property
    def _worker_numbers(self) -> dict[str, int]:
        """The numbers on which a state depends, by name."""
        return {"worker": self._worker, "workers": self._workers, "num_replicas": self._stream.num_replicas}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state of the same worker, of as many workers and replicas; the next epoch comes after it.

        Raises:
            TypeError: The state is not a mapping, or one of its values has the wrong type.
            ValueError: It is of other lengths, options, seed, version, workers or replicas.
        """
        start = self._stream.read_position(state)
        # `taken` counts this worker's batches; with other numbers of workers or replicas they would be different
        # batches.
        saved = {name: state.get(name) for name in self._worker_numbers}
        if saved != self._worker_numbers:
            raise ValueError(
                f"a state must be of the same worker, and of as many workers and replicas, got {saved}, this is "
                f"{self._worker_numbers}: keep these numbers, or use position and seek, which take any"
            )
        taken = check_count("taken", state.get("taken"), least=0, hint="it is part of every state")
        self._iteration, self._reader = self._cursor.load(start, taken), None

    def _open(self, iteration: WorkerIteration) -> StepReader:
        """A reader of this worker's remaining steps: worker w of n takes steps w, w + n, w + 2 n, ..."""
        schedule = self._stream.schedule_from(iteration.record.start)
        steps = np.arange(self._worker + iteration.taken * self._workers, schedule.steps, self._workers)
        return StepReader(self._stream.data, schedule, self._stream.rank, steps)

    def _warn_of_drop(self, iteration: WorkerIteration) -> None:
        """Log that the previous iteration resumed from a position and was dropped; one worker logs it for all."""
        dropped = self._cursor.dropped_before(iteration) if self._worker == 0 else None
        if dropped is not None:
            start, before, taken = dropped
            warn_of_drop(start.epoch, taken, self._stream.schedule_from(start).steps - before)
