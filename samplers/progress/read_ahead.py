"""ReadAheadLoader: a DataLoader whose batches are made by a thread while the training step before is still running."""

import os
from collections.abc import Iterator, Mapping
from queue import SimpleQueue
from threading import Event, Semaphore, Thread, current_thread
from typing import Any, Final
from weakref import finalize

from torch.utils.data import DataLoader

from collate.widths import check_count

_END: Final = object()


class ReadAheadLoader(DataLoader[Any]):
    """A `DataLoader` without workers that makes its next batches in a thread.

    Reading and checking release Python's lock, and no batch is sent between processes. What a dataset computes in
    Python still needs workers. A dataset that draws random numbers shares them with the training loop,
    which makes them depend on timing: let it draw from a seed of the sample instead.

    With a sampler or stream of this package it has the state of what the loop has used, whatever the thread has read
    ahead, on any number of replicas: `state_dict` is the sampler's `position`, and `load_state_dict` seeks it.

    Args:
        dataset: As of a `DataLoader`, and so are all other options.
        batch_sampler: Or a `ShardStream` as the dataset, with `batch_size=None`.
        collate_fn: Makes a batch from a list of samples; it runs in the thread.
        prefetch_batches: Batches that are ready or being made, next to the one that the loop has.

    Raises:
        TypeError: `prefetch_batches` is not an int.
        ValueError: It is less than 1, or workers are asked for.

    Examples:
        >>> from collate import PadCollator
        >>> from samplers import LengthBucketBatchSampler, ReadAheadLoader
        >>> data = [[1, 2, 3], [4], [5, 6]]
        >>> sampler = LengthBucketBatchSampler([3, 1, 2], batch_size=2, shuffle=False)
        >>> for batch in ReadAheadLoader(data, batch_sampler=sampler, collate_fn=PadCollator()):
        ...     print(len(batch), "rows,", batch.num_tokens, "tokens")
        1 rows, 3 tokens
        2 rows, 3 tokens
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        *,
        batch_sampler: Any = None,
        collate_fn: Any = None,
        prefetch_batches: int = 2,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        if num_workers:
            raise ValueError(
                f"num_workers must be 0, got {num_workers}: a thread makes the batches; use a DataLoader for workers"
            )
        self.prefetch_batches = check_count(
            "prefetch_batches", prefetch_batches, least=1, hint="a DataLoader makes each batch when it is asked for"
        )
        super().__init__(dataset, batch_size, batch_sampler=batch_sampler, collate_fn=collate_fn, **options)
        parts = [getattr(self, name, None) for name in ("batch_sampler", "sampler", "dataset")]
        # Last, because a DataLoader guards its attributes.
        self._planned = next((part for part in parts if hasattr(part, "next_position")), None)
        # Batches of the last pass that were handed over, and where it began and the next will begin.
        self._used: tuple[int, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """One epoch. The thread starts with its first batch, and ends with the iterator."""
        return ReadAheadIterator(self)

    def __repr__(self) -> str:
        part = next(part for part in (self._planned, self.batch_sampler, self.dataset) if part is not None)
        return f"{type(self).__name__}({type(part).__name__}, prefetch_batches={self.prefetch_batches})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_used": None}

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands after the batches that were handed over, in fresh primitive values.

        Raises:
            TypeError: Neither the batch sampler nor the dataset has a position.
        """
        planned = self._check_planned()
        # If another epoch was set or a position was sought since, the next pass does not continue the last one.
        if self._used is None or self._used[1] != _mark(planned):
            return dict(planned.next_position)
        return dict(planned.position(self._used[0]))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass resume from a state; the errors are those of the sampler's `seek`.

        Raises:
            TypeError: Neither the batch sampler nor the dataset has a position.
        """
        self._check_planned().seek(state)
        self._used = None

    def source(self) -> Iterator[Any]:
        """The batches of an epoch as a `DataLoader` makes them, without a thread."""
        return super().__iter__()

    def note_used(self, batches: int) -> None:
        """Note how many batches the present pass has handed over. The position is made when it is asked for."""
        if self._planned is not None:
            start = _mark(self._planned) if batches == 1 or self._used is None else self._used[1]
            self._used = batches, start

    def _check_planned(self) -> Any:
        """What has the position.

        Raises:
            TypeError: Nothing has one, or it counts the batches of all replicas.
        """
        if self._planned is None or getattr(self._planned, "rank", 0) == "all":
            raise TypeError(
                f"a {type(self.batch_sampler or self.dataset).__name__} has no position that one process could resume "
                "from: give the loader a LengthBucketBatchSampler, a PackingBatchSampler or a ShardStream with a rank"
            )
        return self._planned


class ReadAheadIterator(Iterator[Any]):
    """One pass over a loader, whose batches a thread makes.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: ReadAheadLoader) -> None:
        self._loader, self._source = loader, loader.source()
        self._process, self._used = os.getpid(), 0
        self._thread: _ReadingThread | None = None
        self._ended = False

    def __next__(self) -> Any:
        if self._process != os.getpid():
            raise RuntimeError("a pass over a ReadAheadLoader belongs to the process that began it: iterate anew here")
        if self._ended:
            raise StopIteration
        if self._thread is None:
            self._thread = _ReadingThread(self._source, self._loader.prefetch_batches)
            # Also when the program ends: a thread that computes then would end it with an error.
            finalize(self, self._thread.stop)
        batch, error = self._thread.take()
        if error is not None or batch is _END:
            self._ended = True
            self._thread.stop()
            if error is not None:
                raise error
            raise StopIteration
        self._used += 1
        self._loader.note_used(self._used)
        return batch

    def __len__(self) -> int:
        return len(self._loader)


class _ReadingThread:
    """A thread that takes batches from an iterator, and stops when it is told to.

    It does not know the iterator that uses it, which could otherwise never be freed.
    """

    def __init__(self, source: Iterator[Any], ahead: int) -> None:
        self._free, self._stopped = Semaphore(ahead), Event()
        self._ready: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._thread = Thread(
            target=_make_batches, args=(source, self._free, self._stopped, self._ready), name="read ahead", daemon=True
        )
        self._thread.start()

    def take(self) -> tuple[Any, BaseException | None]:
        """The next batch, the end, or the error that ended the thread."""
        made = self._ready.get()
        self._free.release()
        return made

    def stop(self) -> None:
        """End the thread, when the batch that it makes is complete."""
        self._stopped.set()
        self._free.release()
        # The collector may free the iterator in any thread.
        if self._thread is not current_thread():
            self._thread.join()


def _make_batches(
    source: Iterator[Any], free: Semaphore, stopped: Event, ready: "SimpleQueue[tuple[Any, BaseException | None]]"
) -> None:
    """What the thread does."""
    while True:
        free.acquire()
        if stopped.is_set():
            return
        try:
            batch = next(source, _END)
        except BaseException as error:  # noqa: BLE001 - the loop raises it
            ready.put((None, error))
            return
        ready.put((batch, None))
        if batch is _END:
            return
        # Otherwise the last batch would stay in memory while the thread waits.
        del batch


def _mark(planned: Any) -> tuple[Any, Any]:
    """Where the present pass began and where the next one will; `set_epoch` and `seek` change the latter."""
    return planned.position(0), planned.next_position
