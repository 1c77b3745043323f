"""Bytes of a file over HTTP, received by as many requests as it takes: a body that breaks off is continued."""

from typing import Any, Final

from samplers.shards.storage.network.failures import ShortBodyError, shown

_PLAIN: Final = frozenset(["", "identity"])


class HttpBody:
    """The bytes `[first, end)` of a file.

    Args:
        system: fsspec's file system over HTTP, whose session and options are used.
        path: Path or URL of the file, for messages.
        span: First byte and end.
        size: Size of the file in bytes.
        whole: Ask for the whole file without a range, which servers without ranges answer too.
        is_assumed: The server was not asked for the size: another one is an error at once.
        may_be_encoded: The bytes are wanted as they are stored, whatever the server says of their encoding.
    """

    def __init__(
        self,
        system: Any,
        path: str,
        span: tuple[int, int],
        size: int,
        *,
        whole: bool = False,
        is_assumed: bool = False,
        may_be_encoded: bool = False,
    ) -> None:
        self._system, self._path, self._size, self._whole = system, path, size, whole
        self._is_assumed, self._may_be_encoded = is_assumed, may_be_encoded
        self._first, self._end = span
        self._version: str | None = None
        self.data = bytearray()

    async def receive(self, url: Any, timeout: float) -> None:
        """Receive the bytes that are missing.

        Args:
            url: URL of the file, as the system or aiohttp names it.
            timeout: Seconds without a byte after which to give up.

        Raises:
            FileNotFoundError: The file does not exist.
            ClientResponseError: The server refuses, or sends a redirect that leads nowhere.
            OSError: An error of the connection.
            ShortBodyError: The body ended too early. The next call continues it.
            ValueError: The server sends something else than the bytes asked for.
        """
        # Installed, since fsspec's file system needs it.
        import aiohttp  # noqa: PLC0415

        start = self._first + len(self.data)
        if start >= self._end:
            # The try before was given up in the moment in which the last byte came.
            return
        options = dict(self._system.kwargs)
        # A compressed body would have other offsets.
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
        ranged = not self._whole or len(self.data) > 0
        if ranged:
            headers["Range"] = f"bytes={start}-{self._end - 1}"
        # No limit on the whole: a large shard may take as long as bytes arrive.
        options["timeout"] = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=timeout, sock_read=timeout)
        session = await self._system.set_session()
        async with session.get(self._system.encode_url(url), headers=headers, **options) as response:
            if response.status == 404:
                raise FileNotFoundError(shown(self._path))
            response.raise_for_status()
            if response.status >= 300:
                # A redirect that leads nowhere.
                raise aiohttp.ClientResponseError(
                    response.request_info, response.history, status=response.status, message=response.reason or ""
                )
            self._check(response, start, ranged=ranged)
            async for piece in response.content.iter_any():
                self.data += piece
                if len(self.data) > self._end - self._first:
                    raise ValueError(self._changed(f"sends more than {self._end - self._first} bytes"))
        if len(self.data) < self._end - self._first:
            raise ShortBodyError(f"the body ended after {len(self.data)} of {self._end - self._first} bytes")

    def _check(self, response: Any, start: int, *, ranged: bool) -> None:
        """Refuse an answer that is not the bytes asked for.

        Raises:
            ShortBodyError: The file changed after the first part was received. The next try begins again.
            ValueError: The answer is compressed, or another range.
        """
        if not self._may_be_encoded and response.headers.get("Content-Encoding", "").lower() not in _PLAIN:
            raise ValueError(
                f"{shown(self._path)}: its server compresses it ({response.headers['Content-Encoding']}), and then "
                "no range of it can be asked for: store it without Content-Encoding"
            )
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        before, self._version = self._version, version
        if len(self.data) > 0 and before != version:
            self.data.clear()
            raise ShortBodyError("the file changed while it was received")
        if ranged and response.status != 206:
            self._begin_again(response.content_length, start)
        elif ranged:
            self._check_range(response.headers.get("Content-Range", ""), start)
        elif self._is_assumed and response.content_length not in {None, self._size}:
            raise ValueError(self._changed(f"has {response.content_length} bytes"))

    def _begin_again(self, length: int | None, start: int) -> None:
        """A server without ranges sends the whole file.

        Raises:
            ValueError: Only a part is wanted.
        """
        if (self._first, self._end) != (0, self._size):
            raise ValueError(
                f"{shown(self._path)}: its server sent {self._size if length is None else length} bytes for a range of "
                f"{self._end - start}, and gives none: copy the file, or use ShardStream, which fetches shards whole"
            )
        self.data.clear()

    def _check_range(self, said: str, start: int) -> None:
        """Compare the range that the server says it sends.

        Raises:
            ValueError: It is another one, or that of a file of another size.
        """
        span, _, size = said.removeprefix("bytes").strip().partition("/")
        # A few servers say nothing, or no size.
        if span and span != f"{start}-{self._end - 1}":
            raise ValueError(
                f"{shown(self._path)}: its server sent the bytes {span} for {start}-{self._end - 1}: it has another "
                "file, or a fault of its own: copy the file"
            )
        if size.isdigit() and int(size) != self._size:
            raise ValueError(self._changed(f"has {size} bytes"))

    def _changed(self, now: str) -> str:
        before = f"it had {self._size} when it was opened"
        return f"{shown(self._path)}: {now}, {before}: changed while it was read, start again"
