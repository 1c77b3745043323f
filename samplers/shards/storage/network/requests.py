"""Many requests at a time, each tried again where another try may help.

fsspec is the client, not obstore: at 20 ms latency 25 ranges of 20 files take 28 ms (3.2 ms of processor) with fsspec
and 27 ms (2.9 ms) with obstore, so that there is little to gain. But a forked worker waits for ever in obstore if its
parent has read, and fsspec's file systems take credentials as their users know them.

All requests run on fsspec's own thread. A forked process has a new one.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Final, Generic, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import fsspec.asyn

from samplers.shards.storage.network.counts import HERE, UNCOUNTED, Counts
from samplers.shards.storage.network.failures import failure, is_transient, retry_after, status_of
from samplers.shards.storage.network.transport import Transport
from samplers.shards.storage.network.usual_times import UsualTimes

Answer = TypeVar("Answer")
# fsspec has no type hints for it.
_get_loop: Callable[[], asyncio.AbstractEventLoop] = fsspec.asyn.get_loop

# The longest wait before another try, in seconds, unless the server asks for more.
_LONGEST_WAIT: Final = 20.0
# How many requests may be sent at a time, by loop and by what they share. A forked process has another loop.
_GATES: Final[WeakKeyDictionary[Any, dict[Hashable, asyncio.Semaphore]]] = WeakKeyDictionary()
# By server. Used on fsspec's thread alone.
_USUAL: Final[dict[str, UsualTimes]] = {}


@dataclass(frozen=True)
class Request(Generic[Answer]):
    """A request that can be tried several times.

    Attributes:
        url: URL of the file, for messages.
        what: The bytes asked for, for messages.
        begin: Makes what sends it once, each time that it is called. It may keep what it has received.
        size: Bytes asked for, 0 if only for a header. None: the request is never sent twice at once.
        counts: Where it is counted.
        verb: What cannot be done if it fails, for messages.
        sent: Bytes that it sends.
    """

    url: str
    what: str
    begin: Callable[[], Callable[[], Awaitable[Answer]]]
    size: int | None = None
    counts: Counts = UNCOUNTED
    verb: str = "read"
    sent: int = 0


def send_all(requests: Sequence[Request[Answer]], transport: Transport) -> list[Answer]:
    """Send requests together, and wait for all answers.

    Raises:
        FileNotFoundError: A file does not exist.
        OSError: A request failed. The message has the URL, the bytes, the number of tries and the last cause.
        ValueError: A server sends something else than it was asked for.
    """
    if not requests:
        return []
    begin = perf_counter_ns()
    # On fsspec's thread.
    future = asyncio.run_coroutine_threadsafe(_gather(requests, transport), _get_loop())
    try:
        return wait_for(future)
    finally:
        # An interrupted read must not continue in the background.
        future.cancel()
        if not HERE.in_background:
            requests[0].counts.add("waited", perf_counter_ns() - begin)


def wait_for(future: "Future[Answer]") -> Answer:
    """The result of a future, or its error. An interrupt ends the wait on every system."""
    while True:
        try:
            # Without a limit, Windows would not deliver an interrupt.
            return future.result(1)
        except TimeoutError:
            # It may also be the error of the future.
            if future.done():
                return future.result()


def gate_of(shared: Hashable, count: int) -> asyncio.Semaphore:
    """The semaphore that lets `count` coroutines of this loop through at a time. To be called on the loop.

    Args:
        shared: What they share, such as a file system.
        count: How many may pass.
    """
    gates = _GATES.setdefault(asyncio.get_running_loop(), {})
    return gates.setdefault(shared, asyncio.Semaphore(count))


async def _gather(requests: Sequence[Request[Answer]], transport: Transport) -> list[Answer]:
    """All answers, or the first error."""
    loop = asyncio.get_running_loop()
    gate = gate_of(("connections", transport.connections), transport.connections)
    end = loop.time() + transport.deadline
    tasks = [asyncio.ensure_future(_persist(request, transport, gate, end)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        # Their errors are of no interest any more.
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _persist(request: Request[Answer], transport: Transport, gate: asyncio.Semaphore, end: float) -> Answer:
    """The answer to a request, after as many tries as it takes.

    Args:
        request: The request.
        transport: How often, and how long.
        gate: Limits the requests at a time.
        end: Time of the loop when all must be done.

    Raises:
        Exception: It failed, see `failure`.
    """
    loop = asyncio.get_running_loop()
    attempt = request.begin()
    tries, last = 0, None
    while True:
        try:
            async with asyncio.timeout_at(end), gate:
                tries += 1
                request.counts.add("requests")
                answer = await _send(request, attempt, transport, gate)
        except Exception as error:  # noqa: BLE001
            # Clients raise the errors of any library. `failure` makes one of them that names the file.
            cause: Exception = error
        else:
            for name, size in {"bytes": request.size, "bytes_sent": request.sent}.items():
                if size:
                    request.counts.add(name, size)
            return answer
        wait = max(_draw_wait(tries, cause, transport), retry_after(cause))
        is_late = loop.time() + wait >= end
        if is_late or not is_transient(cause) or tries > transport.retries:
            # After the deadline, the timeout itself says less than the error before it.
            cause = last if loop.time() >= end and last is not None else cause
            too_late = transport.deadline if is_late and is_transient(cause) and tries <= transport.retries else None
            failed = failure(request.url, (request.verb, request.what), tries, cause, too_late=too_late)
            raise failed from None
        last = cause
        request.counts.add("retries")
        await asyncio.sleep(wait)


async def _send(
    request: Request[Answer], attempt: Callable[[], Awaitable[Answer]], transport: Transport, gate: asyncio.Semaphore
) -> Answer:
    """The answer to one try, or to a second request, if the first takes much longer than usual."""
    usual = _USUAL.setdefault(urlsplit(request.url).netloc, UsualTimes())
    limit = None if request.size is None else usual.limit(request.size, transport.patience)
    begin = perf_counter_ns()
    answer = await (attempt() if limit is None else _race(request, attempt, limit, gate))
    if request.size is not None:
        usual.note(request.size, (perf_counter_ns() - begin) / 1e9)
    return answer


async def _race(
    request: Request[Answer], attempt: Callable[[], Awaitable[Answer]], limit: float, gate: asyncio.Semaphore
) -> Answer:
    """The first of two answers, the second asked for after `limit` seconds.

    Raises:
        Exception: Both requests failed; the error is that of the first.
    """
    tasks = [asyncio.ensure_future(attempt())]
    try:
        await asyncio.wait(tasks, timeout=limit)
        usual = _USUAL[urlsplit(request.url).netloc]
        if tasks[0].done() or not usual.take():
            return await tasks[0]
        request.counts.add("second_requests")
        if gate.locked():
            # It never waits for a connection, because those that have one may all wait for such an answer. It takes
            # that of the first, and continues what has come.
            tasks[0].cancel()
            await asyncio.wait(tasks)
            # The answer may come in this moment: `wait_for` of Python 3.11 then hands it on.
            is_there = not tasks[0].cancelled() and tasks[0].exception() is None
            return tasks[0].result() if is_there else await attempt()
        async with gate:
            tasks.append(asyncio.ensure_future(request.begin()()))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            done = next((task for task in tasks if task.done() and task.exception() is None), None)
            if done is None:
                await asyncio.wait(tasks)
                done = next((task for task in tasks if task.exception() is None), tasks[0])
            return await done
    finally:
        # Nearly always there is one, and it has answered.
        if len(tasks) > 1 or not tasks[0].done():
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _draw_wait(tries: int, cause: BaseException, transport: Transport) -> float:
    """Seconds before the next try: at random, so that many clients do not come back together.

    None before the second try after a fault of the connection, which says nothing of the server. A server that answers
    with an error has too much to do.
    """
    if tries <= 1 and status_of(cause) is None:
        return 0.0
    return random.uniform(0, min(_LONGEST_WAIT, transport.backoff * 2 ** (max(tries, 1) - 1)))
