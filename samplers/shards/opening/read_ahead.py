"""Calls that threads make in advance, in order, as long as their results fit into a number of bytes."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from time import perf_counter_ns
from typing import Any, Final, Generic, TypeAlias, TypeVar
from weakref import finalize

from collate.widths import check_count
from samplers.shards.storage.network.counts import HERE, Counts
from samplers.shards.storage.network.requests import wait_for

ReadResult = TypeVar("ReadResult")
# A thread ends at None.
_Queue: TypeAlias = "SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]"

# Bytes that are read ahead, if nothing else is asked for: 64 MiB.
READ_AHEAD_BYTES: Final = 1 << 26
# Calls at a time. Each waits for the network most of its time.
_THREADS: Final = 8


class ReadAhead(Generic[ReadResult]):
    """Results of calls that were made in advance. It belongs to the process that made it.

    Args:
        limit: Bytes of results that are ready or being made. One call is always made, however large its result.
        counts: Where the time is counted that `take` waits.
    """

    def __init__(self, limit: int, counts: Counts) -> None:
        self._limit, self._counts = limit, counts
        self._results: dict[Hashable, tuple[Future[ReadResult], int]] = {}
        self._bytes = 0
        self._lock = Lock()
        self._queue: _Queue = SimpleQueue()
        self._threads = 0
        finalize(self, _stop, self._queue)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._results

    def __len__(self) -> int:
        """Calls whose results were not taken."""
        return len(self._results)

    @property
    def free_bytes(self) -> int:
        """Room for further results."""
        return self._limit - self._bytes

    def start(self, key: Hashable, size: int, call: Callable[[], ReadResult]) -> bool:
        """Let a thread make a call.

        Args:
            key: By which its result is taken.
            size: Bytes of the result.
            call: The function.

        Returns:
            False if there is no room for its result: try again after the next `take`.
        """
        with self._lock:
            if self._results and self._bytes + size > self._limit:
                return False
            future: Future[ReadResult] = Future()
            self._results[key] = future, size
            self._bytes += size
            if self._threads < min(_THREADS, len(self._results)):
                self._threads += 1
                Thread(target=_call_all, args=(self._queue,), name="shards ahead", daemon=True).start()
        self._queue.put((call, future))
        return True

    def take(self, key: Hashable, call: Callable[[], ReadResult]) -> ReadResult:
        """The result of a call, which is forgotten; or its error. If it was not started, `call` is called here."""
        with self._lock:
            future, size = self._results.pop(key, (None, 0))
            self._bytes -= size
        if future is None:
            return call()
        begin = perf_counter_ns()
        try:
            return wait_for(future)
        finally:
            self._counts.add("waited", perf_counter_ns() - begin)

    def forget(self) -> None:
        """Forget all results. Calls that have not begun are not made."""
        with self._lock:
            for future, _ in self._results.values():
                future.cancel()
            self._results.clear()
            self._bytes = 0


def check_read_ahead(size: int) -> int:
    """Check a number of bytes to read ahead.

    Raises:
        TypeError: It is not an int.
        ValueError: It is negative.
    """
    return check_count("read_ahead_bytes", size, least=0, hint="0 reads nothing in advance")


def _call_all(queue: _Queue) -> None:
    """What a thread does. It does not know the object that started it, which could otherwise never be freed."""
    HERE.in_background = True
    while (job := queue.get()) is not None:
        call, future = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - `take` raises it
                future.set_exception(error)
        # Otherwise the last result would stay in memory while the thread waits.
        del job, call, future


def _stop(queue: _Queue) -> None:
    """End the threads, when the calls that they are in are done."""
    for _ in range(_THREADS):
        queue.put(None)
