"""Call a function on a list of items in several processes: one error stops them all, and a killed process is an error.

`concurrent.futures` is not enough here: its pool cannot name the item at which a process was killed, and it waits for
running items after an error.
"""

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing, suppress
from itertools import islice
from multiprocessing import Pipe, Process, parent_process
from multiprocessing.connection import Connection, wait
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final, Generic, TypeVar

from tqdm import tqdm

from collate.widths import check_count
from samplers.shards.storage.network.counts import PROCESS, TransferBar


class ProcessKilledError(BrokenExecutor):
    """A process was killed while it was working, for example because memory ran out."""


ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_THREADS: Final = 8
# Characters of an item in a message.
_LONGEST_TEXT: Final = 300


def check_workers(workers: int) -> int:
    """Check a number of worker processes.

    Raises:
        TypeError: It is not an int.
        ValueError: It is negative.
    """
    return check_count("workers", workers, least=0, hint="processes that work, 0 for this one alone")


def run_in_processes(
    function: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    workers: int,
    *,
    unit: str = "item",
    progress: bool = False,
) -> Generator[tuple[int, ResultT], None, None]:
    """Call a function on every item.

    Worker processes are killed when the generator is closed or fails, and when the parent process exits.

    >>> sorted(run_in_processes(abs, [-3, 5], workers=0))
    [(0, 3), (1, 5)]

    Args:
        function: Picklable, if processes are not forked.
        items: Picklable, if there are worker processes.
        workers: Number of processes. 0 calls the function in this process.
        unit: Name of an item, for the progress bar.
        progress: Whether to show a progress bar.

    Yields:
        Index of an item and its result, in the order of completion.

    Raises:
        ProcessKilledError: A process was killed. The message has the item at which it was working. A `RuntimeError`.
        TypeError: An item cannot be sent to a process, or `workers` is not an int.
        ValueError: `workers` is negative.
    """
    workers = check_workers(workers)
    crew: list[_Worker[ItemT, ResultT]] = []
    try:
        crew.extend(_Worker(function) for _ in range(min(workers, len(items))))
        results = _deal(crew, items) if workers else ((index, function(item)) for index, item in enumerate(items))
        # tqdm starts a thread, and forking a process that has threads is unsafe. So the bar comes after the workers.
        with tqdm(total=len(items), unit=unit, disable=not progress) as bar:
            transfers = TransferBar(bar)
            for result in results:
                transfers.show()
                bar.update()
                yield result
            transfers.show(is_end=True)
    finally:
        for worker in crew:
            worker.stop()


def run_in_threads(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], *, unit: str = "item", progress: bool = False
) -> Generator[tuple[int, ResultT], None, None]:
    """The same as `call_in_threads`, with a progress bar.

    Args:
        function: Safe to be called by several threads.
        items: Its arguments.
        unit: Name of an item, for the progress bar.
        progress: Whether to show a progress bar.

    Yields:
        Index of an item and its result, in the order of completion.
    """
    with (
        tqdm(total=len(items), unit=unit, disable=not progress) as bar,
        closing(call_in_threads(function, items)) as results,
    ):
        transfers = TransferBar(bar)
        for index, result in results:
            transfers.show()
            bar.update()
            yield index, result
        transfers.show(is_end=True)


def call_in_threads(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT]
) -> Generator[tuple[int, ResultT], None, None]:
    """Call a function that waits for a network on every item, eight at a time.

    An error ends it: of several, that of the first item. It takes no lock of other libraries, such as that of progress
    bars, which a thread could hold while a process is forked.

    >>> sorted(call_in_threads(abs, [-3, 5]))
    [(0, 3), (1, 5)]

    Args:
        function: Safe to be called by several threads.
        items: Its arguments.

    Yields:
        Index of an item and its result, in the order of completion.

    Raises:
        KeyboardInterrupt: The program was interrupted; calls that wait for a network are left behind.
    """
    jobs: SimpleQueue[tuple[int, ItemT]] = SimpleQueue()
    done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()
    for job in enumerate(items):
        jobs.put(job)
    # The threads of `concurrent.futures` are waited for when the program ends, and after an interrupt: a server that
    # does not answer would hold it.
    threads = [
        Thread(target=_call_each, args=(function, jobs, done), name="side by side", daemon=True)
        for _ in range(min(_THREADS, len(items)))
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in items:
            index, result, error = _wait_for(done)
            if error is not None:
                # Calls that run are waited for in any case: of several errors, the first item's is the one to tell.
                _end(jobs, threads)
                raise min([(index, error), *_errors(done)], key=lambda each: each[0])[1]
            yield index, result
    except KeyboardInterrupt:
        threads = []
        raise
    finally:
        _end(jobs, threads)


def _end(jobs: "SimpleQueue[Any]", threads: list[Thread]) -> None:
    """Let threads end with the calls that they run now."""
    with suppress(Empty):
        while True:
            jobs.get_nowait()
    for thread in threads:
        # The system may have refused to start it.
        if thread.ident is not None:
            thread.join()


def _errors(done: "SimpleQueue[Any]") -> Iterator[tuple[int, BaseException]]:
    """The errors among the results that are there.

    Yields:
        The index of an item, and its error.
    """
    with suppress(Empty):
        while True:
            index, _, error = done.get_nowait()
            if error is not None:
                yield index, error


def _call_each(
    function: Callable[[ItemT], ResultT],
    jobs: "SimpleQueue[tuple[int, ItemT]]",
    done: "SimpleQueue[tuple[int, Any, BaseException | None]]",
) -> None:
    """What a thread does, until no item is left."""
    with suppress(Empty):
        while True:
            index, item = jobs.get_nowait()
            try:
                done.put((index, function(item), None))
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                done.put((index, None, error))


def _wait_for(done: "SimpleQueue[Any]") -> Any:
    """The next result."""
    while True:
        with suppress(Empty):
            # Not for ever: Windows would not hear an interrupt.
            return done.get(timeout=1)


def shorten(value: object) -> str:
    """The representation of a value, cut to 300 characters for messages."""
    text = repr(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


class _Worker(Generic[ItemT, ResultT]):
    """A process that works on one item at a time. `index` is the item's index, None while the process is idle."""

    def __init__(self, function: Callable[[ItemT], ResultT]) -> None:
        self.connection, child_end = Pipe()
        self.index: Any = None
        self._item: Any = None
        self._process = Process(target=_work, args=(function, child_end))
        self._process.start()
        # The child must have the only open copy of its end: then its death ends the connection.
        child_end.close()

    def give(self, index: int, item: ItemT) -> None:
        """Send an item to the process.

        Raises:
            TypeError: It cannot be pickled.
        """
        self.index, self._item = index, item
        try:
            # A send to a dead process fails with an OSError. `take` reports the death.
            with suppress(OSError):
                self.connection.send((item,))
        except (TypeError, AttributeError, pickle.PickleError) as error:
            raise TypeError(
                f"{shorten(item)} cannot be sent to another process ({error}): give names or numbers, and open what "
                "they stand for in the function"
            ) from None

    def take(self) -> tuple[int, ResultT]:
        """Wait for the result of the item. Returns the item's index and its result.

        Raises:
            ProcessKilledError: The process was killed.
        """
        try:
            value, error, transferred = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ProcessKilledError(
                f"{shorten(self._item)}: its process {_describe_exit(self._process.exitcode)}; memory may have run "
                "out: give fewer workers"
            ) from None
        index, self.index = self.index, None
        PROCESS.add_all(transferred)
        if error is not None:
            raise error
        return index, value

    def stop(self) -> None:
        """Kill the process if it is working, else end it."""
        if self.index is not None:
            self._process.kill()
        with suppress(OSError):
            self.connection.send(None)
        self._process.join()
        self.connection.close()


def _deal(crew: Sequence[_Worker[ItemT, ResultT]], items: Sequence[ItemT]) -> Iterator[tuple[int, ResultT]]:
    """Give each idle worker the next item.

    Yields:
        Index of an item and its result.
    """
    queue = iter(enumerate(items))
    # There are at most as many workers as items, so every worker gets one.
    for worker, (index, item) in zip(crew, queue, strict=False):
        worker.give(index, item)
    while busy := [worker for worker in crew if worker.index is not None]:
        ready = wait([worker.connection for worker in busy])
        for worker in busy:
            if worker.connection in ready:
                yield worker.take()
                for index, item in islice(queue, 1):
                    worker.give(index, item)


def _work(function: Callable[[ItemT], ResultT], connection: Connection) -> None:
    """The main loop of a worker process."""
    Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches all processes. The parent alone reports it.
    with suppress(KeyboardInterrupt):
        while (message := connection.recv()) is not None:
            answer: tuple[ResultT | None, Exception | None]
            try:
                answer = (function(*message), None)
            except Exception as error:  # noqa: BLE001 (the parent raises it)
                answer = (None, _portable(error))
            connection.send((*answer, PROCESS.take()))


def _portable(error: Exception) -> Exception:
    """The error, with the traceback as text. A `RuntimeError` instead if it does not survive pickling."""
    note = "in a worker process:\n" + "".join(traceback.format_exception(error))
    copied: Exception = RuntimeError(f"{type(error).__name__}: {error}")
    with suppress(Exception):
        copied = pickle.loads(pickle.dumps(error))
    copied.add_note(note)
    return copied


def _end_with_parent() -> None:
    """Wait for the end of the parent process, then end this one."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _describe_exit(code: int | None) -> str:
    """How a process ended, as text."""
    # Python reports a process killed by signal 9 with the exit code -9.
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
