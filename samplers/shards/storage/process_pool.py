"""A function over a list in several processes: an error ends all of it at once, and a killed process is an error."""

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing import Pipe, Process, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from tqdm import tqdm


class ProcessKilledError(RuntimeError):
    """A process ended in the midst of its work, as where memory runs out."""


T = TypeVar("T")
R = TypeVar("R")

# Characters of an item in a message.
_LONGEST_TEXT: Final = 300


def run(
    function: Callable[[T], R], items: Sequence[T], workers: int, *, unit: str, progress: bool
) -> Generator[tuple[int, R], None, None]:
    """Call a function with every item.

    Closed early, or after an error, it kills its processes in the midst of their work; when this process ends, however
    it does, so do they.

    Args:
        function: picklable, where processes are not forked.
        items: picklable, where there are processes.
        workers: processes; 0 stays in this one.
        unit: what an item is, for the bar.
        progress: show a bar.

    Yields:
        Place and result, as they come.

    Raises:
        RuntimeError: A process was killed; the item at which it worked is named.
        TypeError: An item cannot be sent to a process.
        ValueError: `workers` is out of range.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(f"workers must be an int of at least 0, got {workers!r}")
    crew: list[_Worker[T, R]] = []
    try:
        crew.extend(_Worker(function) for _ in range(min(workers, len(items))))
        every = _deal(crew, items) if workers else ((place, function(item)) for place, item in enumerate(items))
        # The bar has a thread of its own: processes are forked before.
        with tqdm(total=len(items), unit=unit, disable=not progress) as bar:
            for done in every:
                bar.update()
                yield done
    finally:
        for worker in crew:
            worker.stop()


def cut(value: object) -> str:
    """A value as text, for messages."""
    text = repr(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


class _Worker(Generic[T, R]):
    """A process that does one thing at a time; `place` is None while it does nothing."""

    def __init__(self, function: Callable[[T], R]) -> None:
        self.connection, theirs = Pipe()
        self.place: Any = None
        self._item: Any = None
        self._process = Process(target=_work, args=(function, theirs))
        self._process.start()
        # When the process holds the only other end, its death can be read here.
        theirs.close()

    def give(self, place: int, item: T) -> None:
        self.place, self._item = place, item
        try:
            # A process that has died is noticed when its result is taken.
            with suppress(OSError):
                self.connection.send((item,))
        except (TypeError, AttributeError, pickle.PickleError) as error:
            raise TypeError(
                f"{cut(item)} cannot be sent to another process ({error}): give names or numbers, and open what they "
                "stand for in the function"
            ) from None

    def take(self) -> tuple[int, R]:
        """Wait for what came of the item, and give its place and the value.

        Raises:
            ProcessKilledError: The process was killed.
        """
        try:
            value, error = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ProcessKilledError(
                f"{cut(self._item)}: its process {_describe(self._process.exitcode)}; memory may have run out: give "
                "fewer workers"
            ) from None
        place, self.place = self.place, None
        if error is not None:
            raise error
        return place, value

    def stop(self) -> None:
        if self.place is not None:
            self._process.kill()
        with suppress(OSError):
            self.connection.send(None)
        self._process.join()
        self.connection.close()


def _deal(crew: Sequence[_Worker[T, R]], items: Sequence[T]) -> Iterator[tuple[int, R]]:
    rest = iter(enumerate(items))
    # There are no more workers than items.
    for worker, (place, item) in zip(crew, rest, strict=False):
        worker.give(place, item)
    while busy := [worker for worker in crew if worker.place is not None]:
        ready = wait([worker.connection for worker in busy])
        for worker in busy:
            if worker.connection in ready:
                yield worker.take()
                for place, item in islice(rest, 1):
                    worker.give(place, item)


def _work(function: Callable[[T], R], connection: Connection) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    # The process that started this one tells of an interrupt.
    with suppress(KeyboardInterrupt):
        while (message := connection.recv()) is not None:
            with _Report(connection) as report:
                report.value = function(*message)


class _Report:
    """Sends what came of an item: a value, or the error that was raised instead."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.value: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or isinstance(error, Exception):
            self.connection.send((self.value, error and _portable(error)))
        return isinstance(error, Exception)


def _portable(error: Exception) -> Exception:
    # The error itself if it survives the way, with its traceback as text.
    told = "in a worker process:\n" + "".join(traceback.format_exception(error))
    again: Exception = RuntimeError(f"{type(error).__name__}: {error}")
    with suppress(Exception):
        again = pickle.loads(pickle.dumps(error))
    again.add_note(told)
    return again


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _describe(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
