"""A web server over a folder, in a process of its own: slow as a network, with faults by a fixed schedule.

`Faulty(folder, options)` starts it. Options are those of `Manner`. `log` tells the requests in the order of their
arrival. Faults come by the number of the request, so that a test meets the same ones each time.
"""

import asyncio
import json
import selectors
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from aiohttp import web

# Bytes that are sent at once where the rate is limited.
_PIECE: Final = 1 << 16


@dataclass(frozen=True)
class Manner:
    """How the server answers.

    Attributes:
        latency: Seconds before each answer.
        rate: Bytes a second of each answer. 0 for no limit.
        faults: What happens to a request, by its number: `drop` closes the connection without an answer, `break` after
            half of the body, `short` sends half of the body as if it were all, `stall` never answers, `hang` stops
            after half of the body, `flip` changes the first byte, `shift` sends the range after the one asked for,
            `gzip` says that the body is compressed, `lost` (of a store) does what is asked for and closes the
            connection, a number is the status of an answer without content.
        every: Schedule that repeats instead: kind to (n, first): each n-th request from `first` on.
        retry_after: Value of that header in answers 429 and 503.
        together: Range requests that must be in flight before one of them is answered. 0 for any. Counted from the
            first request after `/together/N` was asked for.
        head: Whether HEAD is allowed.
        ranges: Whether ranges are answered.
        keep: Whether the proxy of a store answers for files that it has seen from memory: moto takes 5 ms for each.
        refused: Name of a file for which the answer is 403, or the fault `refused`.
        signed: Status of the answer to URLs that are signed, of a store. Empty for the usual answer.
        ended: Date of the last signature that has ended, as signatures have it: those until then are refused.
    """

    latency: float = 0.0
    rate: float = 0.0
    faults: dict[str, str] = field(default_factory=dict)
    every: dict[str, tuple[int, int]] = field(default_factory=dict)
    retry_after: str = ""
    head: bool = True
    ranges: bool = True
    keep: bool = False
    refused: str = ""
    signed: str = ""
    ended: str = ""

    def fault(self, number: int) -> str | None:
        """What happens to a request."""
        for kind, (period, first) in self.every.items():
            if number >= first and (number - first) % period == 0:
                return kind
        return self.faults.get(str(number))


class ServerProcess:
    """A process with a server that answers in some manner, as a test sees it.

    Args:
        program: The file that it runs. It prints its port, and has the routes of `Answering`.
        *arguments: Its arguments.
    """

    def __init__(self, program: str, *arguments: str) -> None:
        self.process = subprocess.Popen([sys.executable, program, *arguments], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.root = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def log(self) -> Any:
        """What it has noted since this was last asked: a dict for each request, unless a server does otherwise."""
        return self._ask("log")

    def behave(self, **options: Any) -> None:
        """Answer in another manner from now on, and count requests from 0 again."""
        self._ask("manner", json.dumps(asdict(Manner(**options))))

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)

    def _ask(self, path: str, data: str | None = None) -> Any:
        request = urllib.request.Request(f"{self.root}/-/{path}", None if data is None else data.encode())
        with urllib.request.urlopen(request) as response:
            return json.load(response)


class Faulty(ServerProcess):
    """The web server's process. Its log has method, name, range (first and last byte, or None) and status."""

    def __init__(self, folder: Path, manner: Manner | None = None) -> None:
        super().__init__(__file__, str(folder), json.dumps(asdict(manner or Manner())))

    def url(self, name: str) -> str:
        return f"{self.root}/files/{name}"

    def gather(self, count: int) -> None:
        """Answer no range until this many have been asked for; after 20 seconds each is answered with 500."""
        self._ask(f"gather/{count}")


@contextmanager
def faulty(folder: Path, **options: Any) -> Iterator[Faulty]:
    """A server that ends with the block."""
    server = Faulty(folder, Manner(**options))
    try:
        yield server
    finally:
        server.stop()


class Answering:
    """What a server does in its process: it answers in its manner, and tells its requests."""

    def __init__(self, manner: Manner) -> None:
        self.manner, self.number = manner, 0
        self.requests: list[dict[str, Any]] = []

    def routes(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/-/log", self.tell)
        app.router.add_post("/-/manner", self.change)
        return app

    async def tell(self, _: web.Request) -> web.Response:
        told, self.requests = self.requests, []
        return web.json_response(told)

    async def change(self, request: web.Request) -> web.Response:
        self.manner, self.number = Manner(**await request.json()), 0
        return web.json_response(None)

    async def send_body(
        self, request: web.Request, response: web.StreamResponse, data: bytes | bytearray, fault: str | None
    ) -> web.StreamResponse:
        """Send a body, or the part of it that comes before a fault, at the rate of the manner."""
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            await response.write(piece)
            if self.manner.rate:
                await asyncio.sleep(len(piece) / self.manner.rate)
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "break":
            return cut(request)
        await response.write_eof()
        return response


class Application(Answering):
    """The web server."""

    def __init__(self, folder: Path, manner: Manner) -> None:
        super().__init__(manner)
        self.folder = folder
        self.awaited, self.all_there = 0, asyncio.Event()

    def routes(self) -> web.Application:
        app = super().routes()
        app.router.add_get("/-/gather/{count}", self.gather)
        app.router.add_get("/files/{name}", self.answer)
        return app

    async def gather(self, request: web.Request) -> web.Response:
        self.awaited, self.all_there = int(request.match_info["count"]), asyncio.Event()
        return web.json_response(None)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        manner, number, name = self.manner, self.number, request.match_info["name"]
        self.number += 1
        path = self.folder / name
        size = path.stat().st_size if path.exists() else 0
        span = span_of(request.headers.get("Range"), size) if manner.ranges else None
        entry = {"method": request.method, "name": name, "range": span, "status": 0}
        self.requests.append(entry)
        await asyncio.sleep(manner.latency)
        if self.awaited and request.method == "GET" and not await self._meet():
            return web.Response(status=500)
        fault = manner.fault(number)
        if fault is None and not path.exists():
            fault = "404"
        if name == manner.refused:
            fault = manner.faults.get("refused", "403")
        if request.method == "HEAD" and not manner.head:
            fault = "405"
        if fault is not None and fault.isdigit():
            entry["status"] = int(fault)
            headers = {"Retry-After": manner.retry_after} if manner.retry_after else {}
            return web.Response(status=int(fault), headers=headers)
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "drop" or request.transport is None:
            return cut(request)
        first, last = span or (0, size - 1)
        entry["status"] = 200 if span is None else 206
        return await self._send(request, path, (first, last + 1, size), fault)

    async def _meet(self) -> bool:
        """Wait until all requests are there."""
        self.awaited -= 1
        if not self.awaited:
            self.all_there.set()
        try:
            await asyncio.wait_for(self.all_there.wait(), 20)
        except TimeoutError:
            return False
        return True

    async def _send(
        self, request: web.Request, path: Path, span: tuple[int, int, int], fault: str | None
    ) -> web.StreamResponse:
        """Send bytes of a file, wholly or not."""
        first, end, size = span
        partial = end - first < size or ("Range" in request.headers and self.manner.ranges)
        if fault == "shift":
            first, end = first + 1, min(size, end + 1)
        response = web.StreamResponse(status=206 if partial else 200)
        if self.manner.ranges:
            response.headers["Accept-Ranges"] = "bytes"
        if partial:
            response.headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        if fault == "gzip":
            response.headers["Content-Encoding"] = "gzip"
        half = first + (end - first) // 2
        response.content_length = half - first if fault == "short" and request.method == "GET" else end - first
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        with path.open("rb") as file:
            file.seek(first)
            data = bytearray(file.read((half if fault in {"break", "short", "hang"} else end) - first))
        if fault == "flip" and data:
            data[0] ^= 1
        return await self.send_body(request, response, data, fault)


def cut(request: web.Request) -> web.Response:
    """Close the connection."""
    if request.transport is not None:
        request.transport.close()
    return web.Response()


def serve(app: web.Application, listening: socket.socket) -> None:
    """Serve until the process ends."""
    # Its waits are as long as they should be: the usual loop, of epoll, rounds them up to milliseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    web.run_app(app, sock=listening, print=None, handler_cancellation=True, shutdown_timeout=0.1, loop=loop)


def span_of(header: str | None, size: int) -> tuple[int, int] | None:
    """First and last byte of a range."""
    if not header:
        return None
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(first), min(int(last or size - 1), size - 1)


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    served = Application(Path(sys.argv[1]), Manner(**json.loads(sys.argv[2])))
    serve(served.routes(), listening)
