"""A web server over a folder, in a process of its own: it serves files in several manners and tells what it has sent.

`/ranges/NAME` answers ranges; `/whole/NAME` sends the whole file whatever is asked for; `/denied/NAME` does so too and
says that it takes no ranges; `/moved/NAME` redirects; `/busy/NAME` is always 503; `/signed/NAME` wants `?token=1`.
"""

import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from faulty import ServerProcess


class Served(ServerProcess):
    """The server's process, as a test sees it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(__file__, str(folder))

    def url(self, name: str, manner: str = "ranges") -> str:
        return f"{self.root}/{manner}/{name}"

    def log(self) -> dict[str, int]:
        """Requests by status and by name, and bytes sent, since it was last asked."""
        # A response is counted before its first byte is sent, so all that was received is in it.
        return Counter(self._ask("log"))


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A server that ends with the block."""
    server = Served(folder)
    try:
        yield server
    finally:
        server.stop()


def application(folder: Path) -> web.Application:
    """The server."""
    counts: Counter[str] = Counter()

    async def count(request: web.Request, response: web.StreamResponse) -> None:
        if request.path != "/-/log":
            sent = 0 if request.method == "HEAD" else response.content_length or 0
            counts.update({"requests": 1, "bytes": sent, f"{request.method} {response.status}": 1, request.path: 1})

    async def log(request: web.Request) -> web.Response:
        told = dict(counts)
        counts.clear()
        return web.json_response(told)

    async def answer(request: web.Request) -> web.StreamResponse:
        return respond(request.match_info["manner"], folder / request.match_info["name"], request.query)

    app = web.Application()
    app.on_response_prepare.append(count)
    app.router.add_get("/-/log", log)
    app.router.add_get("/{manner}/{name}", answer)
    return app


def respond(manner: str, path: Path, query: Any) -> web.StreamResponse:
    if manner == "moved":
        return web.Response(status=302, headers={"Location": f"/ranges/{path.name}"})
    status = {"busy": 503, "signed": 200 if query.get("token") == "1" else 403}.get(manner, 200)
    if status != 200 or not path.exists():
        return web.Response(status=404 if status == 200 else status)
    if manner in {"whole", "denied"}:
        return web.Response(body=path.read_bytes(), headers={"Accept-Ranges": "none"} if manner == "denied" else {})
    return web.FileResponse(path)


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    web.run_app(application(Path(sys.argv[1])), sock=listening, print=None)
