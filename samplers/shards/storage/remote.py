"""Remote files, read through fsspec: scattered ranges with one request each, or the whole file at once."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import fsspec
import fsspec.asyn
import numpy as np
import numpy.typing as npt

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


class RemoteFile:
    """A file of any fsspec file system. Scattered ranges are requested together, which object stores serve at once."""

    def __init__(self, url: str) -> None:
        self.path = url
        with errors_name_url(url):
            self._system, self._name = file_system(url)
            info = self._system.info(self._name)
        if info.get("size") is None or not info.get("partial", True):
            raise ValueError(f"{url}: its server gives no size, or no ranges, so that it cannot be read: copy the file")
        self.size = int(info["size"])
        # Offset and bytes of the last read, and the size of the read-ahead.
        self._window, self._ahead = (0, b""), _LEAST_AHEAD
        self._gives_ranges = False

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on. Reads that follow each other read further and further ahead."""
        size = max(0, min(size, self.size - offset))
        if not size:
            # Past the end there is no range to ask for, and servers refuse one.
            return b""
        start, data = self._window
        if not start <= offset <= start + len(data) - size:
            follows = start <= offset <= start + len(data) + _NEAR
            self._ahead = min(2 * self._ahead, _MOST_AHEAD) if follows else _LEAST_AHEAD
            [data] = self._fetch([offset], [min(self.size, offset + max(size, self._ahead))])
            start, self._window = offset, (offset, data)
        return data[offset - start : offset - start + size]

    def fill(self, buffers: Sequence[Any], offsets: Sequence[int]) -> None:
        """Overwrite each buffer, see `RandomAccess.fill`.

        Raises:
            ValueError: The file ends before a buffer is full, or its server gives no ranges.
        """
        wanted = [(buffer, offset) for buffer, offset in zip(buffers, offsets, strict=True) if buffer.nbytes]
        # A server without ranges sends the whole file for each range. So the first range goes alone, to find out.
        for part in [wanted] if self._gives_ranges else [wanted[:1], wanted[1:]]:
            starts = [offset for _, offset in part]
            ranges = self._fetch(starts, [offset + buffer.nbytes for buffer, offset in part])
            for (buffer, offset), data in zip(part, ranges, strict=True):
                if len(data) != buffer.nbytes:
                    raise ValueError(truncated(self.path, self.size, offset, buffer.nbytes))
                as_bytes(buffer)[:] = np.frombuffer(data, np.uint8)

    def _fetch(self, starts: list[int], ends: list[int]) -> list[bytes]:
        """The bytes of these ranges.

        Raises:
            ValueError: The server sent more, so it has no ranges.
        """
        with errors_name_url(self.path):
            ranges: list[bytes] = self._system.cat_ranges([self._name] * len(starts), starts, ends, on_error="raise")
            for error in ranges:
                # Old versions of fsspec return errors even with on_error="raise".
                if isinstance(error, Exception):
                    raise error
        for start, end, data in zip(starts, ends, ranges, strict=True):
            if len(data) > end - start:
                raise ValueError(
                    f"{self.path}: its server sent {len(data)} bytes for a range of {end - start}, and gives none: "
                    "copy the file, or use ShardStream, which fetches shards whole"
                )
            self._gives_ranges |= end - start < self.size
        return ranges


class FetchedFile:
    """A remote file in memory: one request for all of it, instead of one for each sample.

    Args:
        url: URL of the file.
        size: Its size in bytes.
    """

    def __init__(self, url: str, size: int) -> None:
        self.path, self.size = url, size
        with errors_name_url(url):
            system, name = file_system(url)
            self._data = memoryview(system.cat_file(name))

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on, fewer only at the end of the file."""
        return bytes(self._data[offset : offset + size])

    def fill(self, buffers: Sequence[Any], offsets: Sequence[int]) -> None:
        """Overwrite each buffer, see `RandomAccess.fill`.

        Raises:
            ValueError: The file ends before a buffer is full.
        """
        for buffer, offset in zip(buffers, offsets, strict=True):
            part = self._data[offset : offset + buffer.nbytes]
            if len(part) != buffer.nbytes:
                raise ValueError(truncated(self.path, len(self._data), offset, buffer.nbytes))
            as_bytes(buffer)[:] = np.frombuffer(part, np.uint8)


def as_bytes(buffer: Any) -> npt.NDArray[np.uint8]:
    """The bytes of a C-contiguous buffer, uint8 `[n]`, in its memory."""
    return np.asarray(buffer).reshape(-1).view(np.uint8)


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, which stays alive, and the name of the file in it."""
    system, name = _url_to_fs(url)
    _FILE_SYSTEMS[id(system)] = system
    return system, name


@contextmanager
def errors_name_url(url: str) -> Iterator[None]:
    """Put the URL into every error of a file system, which may raise the errors of any library.

    Raises:
        FileNotFoundError: The file does not exist.
        OSError: Any other error.
    """
    try:
        yield
    except FileNotFoundError as error:
        # Over HTTP, fsspec raises FileNotFoundError for every failure. Its cause is the real one.
        cause = error.__cause__
        if isinstance(cause, OSError) or getattr(cause, "status", 404) != 404:
            raise OSError(f"{url}: cannot be read: {type(cause).__name__}: {cause}") from error
        raise FileNotFoundError(f"{url}: there is no such file ({error})") from error
    except Exception as error:
        # Use str, not repr: over HTTP, repr contains the headers that were sent, with secrets in them.
        raise OSError(f"{url}: cannot be read: {type(error).__name__}: {error}") from error


def truncated(path: str, size: int, offset: int, missing: int) -> str:
    """The message for a file that ends too early."""
    return f"{path}: ends at byte {size}, {missing} bytes wanted at offset {offset}: the file is truncated"
