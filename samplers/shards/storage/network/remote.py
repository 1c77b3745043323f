"""Remote files, read through fsspec: ranges of many files in one round of requests, or a whole file at once."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any, Final, TypeAlias

import fsspec
import fsspec.asyn
import numpy as np
import numpy.typing as npt

from samplers.shards.storage.network.counts import UNCOUNTED, Counts
from samplers.shards.storage.network.failures import ShortBodyError, is_refusal, shown, status_of
from samplers.shards.storage.network.http_body import HttpBody
from samplers.shards.storage.network.requests import Request, gate_of, send_all
from samplers.shards.storage.network.signed_urls import SignedUrls, signed_urls
from samplers.shards.storage.network.transport import DEFAULT, Transport, timeout_of

# fsspec has no type hints for it.
_url_to_fs: Callable[[str], tuple[Any, str]] = fsspec.core.url_to_fs
# Keep every file system alive. Freeing one in a forked worker unregisters sockets that the parent process still waits
# on, and the parent would hang.
_FILE_SYSTEMS: Final[dict[int, Any]] = {}
if hasattr(os, "register_at_fork") and not hasattr(fsspec.asyn, "reset_after_fork"):
    # Before 2025.5, fsspec's thread is missing in a forked worker, which would wait for it for ever.
    os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)

# Bytes of read-ahead: 64 KiB at first, twice as many for each read that continues the one before, up to 4 MiB.
_LEAST_AHEAD: Final = 1 << 16
_MOST_AHEAD: Final = 1 << 22
# Up to this gap (512 KiB) a read continues the one before: reading the gap costs no more than another request.
_NEAR: Final = 1 << 19
# Of ranges that are asked for together, a gap costs bandwidth only, and another request 0.13 ms of processor: what a
# connection of 1 Gbit/s takes for 16 KiB.
_MERGED_GAP: Final = 1 << 14
# Merged ranges end at this size (4 MiB), so that several connections share a long run.
_MOST_MERGED: Final = 1 << 22
# Folders whose server has answered a range.
_GIVE_RANGES: Final[set[str]] = set()

# Ranges of a remote file: the memory to fill, and the offset of each.
Wanted: TypeAlias = tuple["RemoteFile", Sequence[Any], Sequence[int]]


@dataclass
class _Span:
    """Neighbouring ranges of a file that are one request: bytes `[first, end)`, and the memory that they fill."""

    file: "RemoteFile"
    first: int
    end: int
    parts: list[tuple[Any, int]] = field(default_factory=list)

    def copy(self, data: bytes | bytearray) -> None:
        """Fill the memory."""
        view = np.frombuffer(data, np.uint8)
        for buffer, offset in self.parts:
            start = offset - self.first
            as_bytes(buffer)[:] = view[start : start + buffer.nbytes]


class RemoteFile:
    """A file of any fsspec file system.

    Args:
        url: URL of the file.
        transport: How it is read.
        info: What `find_infos` found, to open many files with one round of requests. None asks for it. With `assumed`
            nobody has asked for the size: another one is found out when the whole file is read.
        counts: Where its requests are counted.
    """

    def __init__(
        self,
        url: str,
        transport: Transport = DEFAULT,
        info: dict[str, Any] | None = None,
        counts: Counts = UNCOUNTED,
    ) -> None:
        self.path, self.transport, self.counts = url, transport, counts
        if info is None:
            [info] = find_infos([url], transport, counts)
        if isinstance(info, Exception):
            raise info
        if info.get("size") is None or not info.get("partial", True):
            raise ValueError(
                f"{shown(url)}: its server gives no size, or no ranges, so that it cannot be read: copy the file"
            )
        self.system, self.name = file_system(url)
        self.size = int(info["size"])
        self.size_is_assumed = bool(info.get("assumed", False))
        # Offset and bytes of the last read, and the size of the read-ahead.
        self._window, self._ahead = (0, b""), _LEAST_AHEAD
        self._held: dict[int, list[tuple[int, bytes]]] = {}

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on. Reads that follow each other read further and further ahead."""
        size = max(0, min(size, self.size - offset))
        if not size:
            # Past the end there is no range to ask for, and servers refuse one.
            return b""
        for start, data in self._held.get(get_ident(), ()):
            if start <= offset and offset + size <= start + len(data):
                return data[offset - start : offset - start + size]
        start, data = self._window
        if not start <= offset <= start + len(data) - size:
            follows = start <= offset <= start + len(data) + _NEAR
            self._ahead = min(2 * self._ahead, _MOST_AHEAD) if follows else _LEAST_AHEAD
            data = self._fetch(offset, min(self.size, offset + max(size, self._ahead)))
            start, self._window = offset, (offset, data)
        return data[offset - start : offset - start + size]

    def fill(self, buffers: Sequence[Any], offsets: Sequence[int]) -> None:
        """Overwrite each buffer, see `RandomAccess.fill`.

        Raises:
            ValueError: The file ends before a buffer is full, or its server gives no ranges.
        """
        fetch_into([(self, buffers, offsets)])

    def fill_again(self, buffers: Sequence[Any], offsets: Sequence[int]) -> None:
        """Overwrite each buffer with bytes that are asked for again. The errors are those of `fill`."""
        self.fill(buffers, offsets)

    def hold(self, pieces: list[tuple[int, bytes]]) -> None:
        """Keep pieces (offset and bytes) for the reads of this thread that come next. None forgets them."""
        self._held[get_ident()] = pieces
        if not pieces:
            del self._held[get_ident()]

    @property
    def gives_ranges(self) -> bool:
        """Whether its server is known to answer ranges. Object stores do."""
        return not is_http(self.system) or _folder_of(self.path) in _GIVE_RANGES

    def note_ranges(self) -> None:
        """Remember that the server has answered a range."""
        _GIVE_RANGES.add(_folder_of(self.path))

    def request(self, first: int, end: int) -> Request[bytes | bytearray]:
        """The request for the bytes `[first, end)`."""
        begin = partial(attempts, self, (first, end), whole=False)
        return Request(self.path, f"bytes {first} to {end}", begin, end - first, self.counts)

    def _fetch(self, first: int, end: int) -> bytes:
        [data] = send_all([self.request(first, end)], self.transport)
        if end - first < self.size:
            self.note_ranges()
        return bytes(data)


def fetch_into(wanted: Iterable[Wanted]) -> None:
    """Read ranges of many files into memory, with one round of requests.

    The memory is written when all bytes are there. The first range of a server that is not known to answer ranges goes
    alone: without them it would send the whole file for each.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file ends before a buffer is full, or a server gives no ranges.
    """
    # Fields of a sample may be neighbours in the file.
    by_file: dict[int, tuple[RemoteFile, list[Any], list[int]]] = {}
    for file, buffers, offsets in wanted:
        _, all_buffers, all_offsets = by_file.setdefault(id(file), (file, [], []))
        all_buffers += buffers
        all_offsets += offsets
    spans = [span for file, buffers, offsets in by_file.values() for span in _merge(file, buffers, offsets)]
    firsts: dict[str, _Span] = {}
    for span in spans:
        if not span.file.gives_ranges:
            firsts.setdefault(_folder_of(span.file.path), span)
    alone = {id(span) for span in firsts.values()}
    for part in (list(firsts.values()), [span for span in spans if id(span) not in alone]):
        if part:
            received = send_all([span.file.request(span.first, span.end) for span in part], part[0].file.transport)
            for span, data in zip(part, received, strict=True):
                if span.end - span.first < span.file.size:
                    span.file.note_ranges()
                span.copy(data)


def prefetch(wanted: Iterable[tuple[RemoteFile, list[tuple[int, int]]]]) -> None:
    """Fetch pieces of many files with one round of requests, for the reads that come next.

    Args:
        wanted: Files, each with offsets and sizes. What lies behind the end of a file is left out.
    """
    taken: list[tuple[RemoteFile, list[Any], list[int]]] = []
    for file, pieces in wanted:
        within = [(offset, min(size, file.size - offset)) for offset, size in pieces if 0 <= offset < file.size]
        buffers = [np.empty(size, np.uint8) for _, size in within]
        taken.append((file, buffers, [offset for offset, _ in within]))
    fetch_into(taken)
    for file, buffers, offsets in taken:
        file.hold([(offset, buffer.tobytes()) for buffer, offset in zip(buffers, offsets, strict=True)])


def find_infos(urls: Sequence[str], transport: Transport, counts: Counts = UNCOUNTED) -> list[Any]:
    """The size of each file, and whether it gives ranges, with one round of requests.

    Args:
        urls: URLs of the files.
        transport: How they are asked for.
        counts: Where the requests are counted.

    Returns:
        For each URL what fsspec's `info` says, or the error.
    """

    async def find(url: str) -> Any:
        system, name = file_system(url)
        # Clients remember the lists of folders: a file that another machine has written since would be missing, and one
        # that it has replaced would have its former size.
        system.invalidate_cache(name.rpartition("/")[0])
        if is_async(system):
            return await asyncio.wait_for(system._info(name), transport.timeout)  # noqa: SLF001
        return await asyncio.to_thread(system.info, name)

    # A try needs nothing of the one before.
    requests = [Request(url, "its size", partial(partial, find, url), size=0, counts=counts) for url in urls]
    return send_all(requests, transport)


def _merge(file: RemoteFile, buffers: Sequence[Any], offsets: Sequence[int]) -> list[_Span]:
    """The requests for ranges of a file. Neighbours are one request.

    Raises:
        ValueError: The file ends before a range does.
    """
    spans: list[_Span] = []
    ranges = [(offset, buffer) for buffer, offset in zip(buffers, offsets, strict=True) if buffer.nbytes]
    for offset, buffer in sorted(ranges, key=lambda each: each[0]):
        end = offset + buffer.nbytes
        if offset < 0 or end > file.size:
            raise ValueError(truncated(file.path, file.size, offset, buffer.nbytes))
        last = spans[-1] if spans else None
        if last is None or offset > last.end + _MERGED_GAP or end - last.first > _MOST_MERGED:
            spans.append(last := _Span(file, offset, end))
        last.end = max(last.end, end)
        last.parts.append((buffer, offset))
    return spans


def attempts(file: RemoteFile, span: tuple[int, int], *, whole: bool) -> Callable[[], Awaitable[bytes | bytearray]]:
    """The tries for a range of a file. Bytes that were received stay for the next one."""
    if is_http(file.system):
        body = HttpBody(file.system, file.name, span, file.size, whole=whole, is_assumed=file.size_is_assumed)

        async def receive() -> bytearray:
            await body.receive(file.name, file.transport.timeout)
            return body.data

        return receive
    by_client = _client_attempts(file, span)
    signed = signed_urls(file.system)
    return by_client if signed is None else _signed_attempts(signed, file, span, by_client, whole=whole)


def _signed_attempts(
    signed: SignedUrls,
    file: RemoteFile,
    span: tuple[int, int],
    by_client: Callable[[], Awaitable[bytearray]],
    *,
    whole: bool,
) -> Callable[[], Awaitable[bytearray]]:
    """The tries for a range of an object with a signed URL. If it is refused, the client asks, and has the errors."""
    options = {"whole": whole, "is_assumed": file.size_is_assumed, "may_be_encoded": True}
    body = HttpBody(signed.http, file.path, span, file.size, **options)
    timeout = file.transport.timeout

    async def receive() -> bytearray:
        # One that was used for some time may be refused because credentials have ended, and is signed again once.
        for _ in range(2):
            # To sign may ask for credentials, over a network.
            url = signed.known(file.name) or await asyncio.wait_for(signed.find(file.name), timeout)
            if url is None:
                return await by_client()
            try:
                await body.receive(url.url, timeout)
            except Exception as error:
                # Of a store that has never answered, it may be the host of the URL that is out of reach.
                if not is_refusal(error) and (signed.have_worked or status_of(error) is not None):
                    raise
            else:
                signed.note_success()
                return body.data
            signed.forget(file.name, url)
            file.counts.add("requests")
            if url.is_new:
                break
        received = await by_client()
        signed.note_refusal()
        return received

    return receive


def _client_attempts(file: RemoteFile, span: tuple[int, int]) -> Callable[[], Awaitable[bytearray]]:
    """The tries for a range of a file by its client."""
    transport, (first, end) = file.transport, span
    received = bytearray()

    async def fetch() -> bytearray:
        start = first + len(received)
        if received and start >= end:
            return received
        if is_async(file.system):
            patience = timeout_of(transport, end - start)
            # One byte more shows that the file is longer than was assumed.
            asked = end + 1 if file.size_is_assumed else end
            data = await asyncio.wait_for(file.system._cat_file(file.name, start=start, end=asked), patience)  # noqa: SLF001
            if file.size_is_assumed and len(data) < end - start:
                raise ValueError(truncated(file.path, start + len(data), first, end - first))
        else:
            # Most of these may not be used by two threads at a time.
            async with gate_of(id(file.system), 1):
                data = await asyncio.to_thread(file.system.cat_file, file.name, start=start, end=end)
            if len(data) < end - start:
                # A disk gives all that there is. On Windows, local files are read here.
                raise ValueError(truncated(file.path, start + len(data), first, end - first))
        if len(data) > end - start:
            raise ValueError(
                f"{shown(file.path)}: its server sent {len(data)} bytes for a range of {end - start}, and gives none: "
                "copy the file"
            )
        received.extend(data)
        if len(received) < end - first:
            raise ShortBodyError(f"the body ended after {len(received)} of {end - first} bytes")
        return received

    return fetch


def is_async(system: Any) -> bool:
    """Whether a file system has coroutines, so that many requests can wait side by side."""
    return isinstance(system, fsspec.asyn.AsyncFileSystem)


def is_http(system: Any) -> bool:
    """Whether a file system is fsspec's own for HTTP."""
    # By name: its module needs aiohttp.
    return f"{type(system).__module__}.{type(system).__name__}" == "fsspec.implementations.http.HTTPFileSystem"


def as_bytes(buffer: Any) -> npt.NDArray[np.uint8]:
    """The bytes of a C-contiguous buffer, uint8 `[n]`, in its memory."""
    return np.asarray(buffer).reshape(-1).view(np.uint8)


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, which stays alive, and the name of the file in it."""
    system, name = _url_to_fs(url)
    _FILE_SYSTEMS[id(system)] = system
    return system, name


def find_matches(pattern: str, transport: Transport) -> list[str]:
    """The URLs that match a pattern with wildcards. The errors are those of `send_all`."""
    system, name = file_system(pattern)

    async def find() -> list[str]:
        # In a thread: its own call waits for this loop.
        return list(await asyncio.to_thread(system.glob, name))

    [paths] = send_all([Request(pattern, "the list of its folder", lambda: find)], transport)
    return [system.unstrip_protocol(path) for path in paths]


def _folder_of(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[0]


def truncated(path: str, size: int, offset: int, missing: int) -> str:
    """The message for a file that ends too early."""
    return f"{shown(path)}: ends at byte {size}, {missing} bytes wanted at offset {offset}: the file is truncated"
