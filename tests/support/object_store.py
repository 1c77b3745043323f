"""An S3 server on loopback, and a slow and faulty proxy before it, in a process of their own.

The server is moto's, and keeps objects in memory. The proxy waits, limits the rate of each answer, and makes faults by
a fixed schedule: `Manner` of `faulty` says which. `log` tells the requests in the order of their arrival.
"""

import asyncio
import logging
import os
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import fsspec
from aiohttp import ClientSession, DummyCookieJar, web
from faulty import Answering, Manner, ServerProcess, cut, serve, span_of

BUCKET: Final = "corpus"
# Of one connection, not of the message.
_HOPS: Final = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class ObjectStore(ServerProcess):
    """The proxy's process; `environment` is what a client needs.

    Its log has method, path, range and status, and whether the URL was signed.
    """

    def __init__(self) -> None:
        super().__init__(__file__)
        self.environment = {
            "AWS_ENDPOINT_URL": self.root,
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, name: str = "") -> str:
        return f"s3://{BUCKET}/{name}"


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A store that clients of this process, and of those that it starts, find. It ends with the block."""
    store = ObjectStore()
    before = {name: os.environ.get(name) for name in store.environment}
    os.environ.update(store.environment)
    # Former file systems know another server.
    _forget_clients()
    try:
        yield store
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _forget_clients()
        store.stop()


def _forget_clients() -> None:
    s3: Any = fsspec.get_filesystem_class
    s3("s3").clear_instance_cache()


class Proxy(Answering):
    """Hands requests on to a server."""

    def __init__(self, server: str) -> None:
        super().__init__(Manner())
        self.server = server
        self.session: ClientSession | None = None
        # Objects, if the manner says so: their bytes and headers, by path.
        self.kept: dict[str, tuple[bytes, dict[str, str]]] = {}

    def routes(self) -> web.Application:
        app = super().routes()
        app.router.add_route("*", "/{path:.*}", self.answer)
        return app

    async def answer(self, request: web.Request) -> web.StreamResponse:
        manner, number = self.manner, self.number
        self.number += 1
        is_signed = "X-Amz-Signature" in request.query
        entry = {
            "method": request.method,
            "path": request.path,
            "range": request.headers.get("Range"),
            "status": 0,
            "signed": is_signed,
        }
        self.requests.append(entry)
        body = await request.read()
        await asyncio.sleep(manner.latency)
        fault = manner.fault(number)
        if manner.refused and request.path.endswith(f"/{manner.refused}"):
            fault = manner.faults.get("refused", "403")
        if is_signed and manner.signed:
            fault = manner.signed
        if is_signed and request.query["X-Amz-Date"] <= manner.ended:
            fault = "403"
        if fault is not None and fault.isdigit():
            entry["status"] = int(fault)
            return web.Response(status=int(fault))
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "drop" or request.transport is None:
            return cut(request)
        return await self._hand_on(request, body, fault, entry)

    async def _hand_on(
        self, request: web.Request, body: bytes, fault: str | None, entry: dict[str, Any]
    ) -> web.StreamResponse:
        """Ask the server, and send its answer, or half of it."""
        if self.session is None:
            self.session = ClientSession(auto_decompress=False, cookie_jar=DummyCookieJar())
        if request.method in {"PUT", "POST", "DELETE"}:
            self.kept.pop(request.path, None)
        elif self.manner.keep and request.method == "GET" and all(name.startswith("X-Amz-") for name in request.query):
            return await self._answer_kept(request, entry)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOPS}
        async with self.session.request(
            request.method, self.server + request.raw_path, data=body, headers=headers, allow_redirects=False
        ) as answer:
            data = await answer.read()
            if fault == "lost":
                return cut(request)
            entry["status"] = answer.status
            response = web.StreamResponse(status=answer.status, reason=answer.reason)
            response.headers.update(
                {name: value for name, value in answer.headers.items() if name.lower() not in _HOPS}
            )
            response.content_length = int(answer.headers.get("Content-Length", len(data)))
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        sent = data[: len(data) // 2] if fault in {"break", "hang"} else data
        return await self.send_body(request, response, sent, fault)

    async def _answer_kept(self, request: web.Request, entry: dict[str, Any]) -> web.StreamResponse:
        """Answer from memory. An object that is not there comes from the server."""
        if request.path not in self.kept:
            headers = {name: value for name, value in request.headers.items() if name.lower() not in {*_HOPS, "range"}}
            assert self.session is not None
            async with self.session.get(self.server + request.raw_path, headers=headers) as answer:
                data = await answer.read()
                if answer.status != 200:
                    entry["status"] = answer.status
                    return web.Response(status=answer.status, body=data)
                # A checksum would be that of the whole.
                wanted = {"etag", "last-modified", "content-type", "accept-ranges"}
                kept = {name: value for name, value in answer.headers.items() if name.lower() in wanted}
                self.kept[request.path] = data, kept
        data, headers = self.kept[request.path]
        span = span_of(request.headers.get("Range"), len(data))
        first, last = span or (0, len(data) - 1)
        entry["status"] = 200 if span is None else 206
        response = web.StreamResponse(status=entry["status"])
        response.headers.update(headers)
        if span is not None:
            response.headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        response.content_length = last + 1 - first
        await response.prepare(request)
        return await self.send_body(request, response, data[first : last + 1], None)


def _serve_objects() -> str:
    """Start moto in a thread. Returns its root, which has an empty bucket."""
    # Only the server's process has the time for them.
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app  # noqa: PLC0415
    from werkzeug.serving import make_server  # noqa: PLC0415

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    urllib.request.urlopen(urllib.request.Request(f"{root}/{BUCKET}", method="PUT")).close()
    return root


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    proxy = Proxy(_serve_objects())
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    serve(proxy.routes(), listening)
