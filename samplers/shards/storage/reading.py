"""Files of this machine and of others: bytes at any place of them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, repeat
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import fsspec
import fsspec.implementations.local
import numpy as np
import numpy.typing as npt

Shards: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

# fsspec leaves it without types.
_find: Callable[[str], tuple[Any, str]] = fsspec.core.url_to_fs
# File systems that were used. A forked worker that let go of its parent's would take their connections out of what the
# parent waits for, which both share, and the parent would wait for ever.
_KEPT: Final[dict[int, Any]] = {}

# Bytes that are read for nothing sooner than with a call of their own.
_GAP: Final = 2048
_FORGOTTEN: Final = memoryview(bytearray(_GAP))
# The system takes 1024 buffers a call, and each array may need another for the gap before it.
_LONGEST_RUN: Final = 500

# Bytes of a remote file that are read at least: twice as many each time where a read begins near the last one's end. To
# pass over what lies between costs no more than another request.
_LEAST_AHEAD: Final = 1 << 16
_MOST_AHEAD: Final = 1 << 22
_NEAR: Final = 1 << 19


class RandomAccess(Protocol):
    """A file that can be read at any place.

    Attributes:
        path: for messages.
        size: bytes.
    """

    path: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on: fewer only at the end of the file."""
        ...

    def fill(self, arrays: Sequence[npt.NDArray[Any]], offsets: Sequence[int]) -> None:
        """Overwrite each C-contiguous array with the bytes at its offset.

        Raises:
            ValueError: The file ends before an array is full.
        """
        ...


class LocalFile:
    """A file of this machine, read with `pread`: safe to share with threads and forked processes."""

    def __init__(self, path: str) -> None:
        self.path = path
        # A pipe would be waited for.
        if not Path(path).is_file() and Path(path).exists():
            raise ValueError(f"{path}: not a regular file")
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        # Closed with the last reader, so that a thread never reads from a descriptor that was given to another file.
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on."""
        data = os.pread(self._descriptor, size, offset)
        # One call gives at most 2 GiB.
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def fill(self, arrays: Sequence[npt.NDArray[Any]], offsets: Sequence[int]) -> None:
        """Overwrite each C-contiguous array with the bytes at its offset.

        Raises:
            ValueError: The file ends before an array is full.
        """
        buffers: Sequence[Any] = arrays
        # One call costs as much as some 2 KiB: neighbours are read together, with what lies between them.
        dense = len(buffers) > 1 and 0 <= offsets[-1] - offsets[0] <= len(buffers) * _GAP
        for first, last in _runs(arrays, offsets) if dense else ():
            self._fill_run(buffers[first:last], offsets[first:last])
        if not dense:
            # No read gives more than its array holds: if their sum is right, each is.
            read = sum(map(os.preadv, repeat(self._descriptor), zip(buffers, strict=True), offsets))
            if read != sum(map(attrgetter("nbytes"), buffers)):
                for buffer, offset in zip(buffers, offsets, strict=True):
                    self._fill_slowly(buffer, offset)

    def _fill_run(self, arrays: Sequence[Any], offsets: Sequence[int]) -> None:
        # What lies between the arrays is read too, and forgotten.
        buffers = []
        end = offsets[0]
        for array, offset in zip(arrays, offsets, strict=True):
            if offset > end:
                buffers.append(_FORGOTTEN[: offset - end])
            buffers.append(array)
            end = offset + array.nbytes
        if os.preadv(self._descriptor, buffers, offsets[0]) != end - offsets[0]:
            for array, offset in zip(arrays, offsets, strict=True):
                self._fill_slowly(array, offset)

    def _fill_slowly(self, array: npt.NDArray[Any], offset: int) -> None:
        # One call gives at most 2 GiB.
        rest: Any = array.reshape(-1).view(np.uint8)
        while len(rest):
            done = os.preadv(self._descriptor, (rest,), offset)
            if not done:
                raise ValueError(_ended(self.path, self.size, offset, len(rest)))
            rest, offset = rest[done:], offset + done


class RemoteFile:
    """A file of any fsspec file system; scattered reads are sent together, which object stores answer at once."""

    def __init__(self, url: str) -> None:
        self.path = url
        with naming(url):
            self._system, self._name = file_system(url)
            info = self._system.info(self._name)
        if info.get("size") is None or not info.get("partial", True):
            raise ValueError(f"{url}: its server gives no size, or no ranges, so that it cannot be read: copy the file")
        self.size = int(info["size"])
        # What was read last, where it begins, and how much is read at least.
        self._window, self._ahead = (0, b""), _LEAST_AHEAD
        self._gives_ranges = False

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; where reads follow each other, more and more is read ahead."""
        size = max(0, min(size, self.size - offset))
        start, data = self._window
        if not start <= offset <= start + len(data) - size:
            follows = start <= offset <= start + len(data) + _NEAR
            self._ahead = min(2 * self._ahead, _MOST_AHEAD) if follows else _LEAST_AHEAD
            [data] = self._fetch([offset], [min(self.size, offset + max(size, self._ahead))])
            start, self._window = offset, (offset, data)
        return data[offset - start : offset - start + size]

    def fill(self, arrays: Sequence[npt.NDArray[Any]], offsets: Sequence[int]) -> None:
        """Overwrite each C-contiguous array with the bytes at its offset.

        Raises:
            ValueError: The file ends before an array is full, or its server gives no ranges.
        """
        wanted = [(array, offset) for array, offset in zip(arrays, offsets, strict=True) if array.nbytes]
        # Without ranges a server sends the whole file for each: one shows it.
        for part in [wanted] if self._gives_ranges else [wanted[:1], wanted[1:]]:
            starts = [offset for _, offset in part]
            found = self._fetch(starts, [offset + array.nbytes for array, offset in part])
            for (array, offset), data in zip(part, found, strict=True):
                if len(data) != array.nbytes:
                    raise ValueError(_ended(self.path, self.size, offset, array.nbytes))
                array.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)

    def _fetch(self, starts: list[int], ends: list[int]) -> list[bytes]:
        with naming(self.path):
            parts: list[bytes] = self._system.cat_ranges([self._name] * len(starts), starts, ends, on_error="raise")
            for error in parts:
                # Old versions of fsspec give it back all the same.
                if isinstance(error, Exception):
                    raise error
        for start, end, data in zip(starts, ends, parts, strict=True):
            if len(data) > end - start:
                raise ValueError(
                    f"{self.path}: its server sent {len(data)} bytes for a range of {end - start}, and gives none: "
                    "copy the file, or use ShardStream, which fetches shards whole"
                )
            self._gives_ranges |= end - start < self.size
        return parts


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, kept for good, and the file's name there."""
    system, name = _find(url)
    _KEPT[id(system)] = system
    return system, name


@contextmanager
def naming(url: str) -> Iterator[None]:
    """Name the URL in what a file system raises, which may be of any library's making.

    Raises:
        FileNotFoundError: As raised within, with the URL.
        OSError: The same of all other errors.
    """
    try:
        yield
    except FileNotFoundError as error:
        # Over HTTP all that goes wrong is called so, and what it was is the cause.
        cause = error.__cause__
        if isinstance(cause, OSError) or getattr(cause, "status", 404) != 404:
            raise OSError(f"{url}: cannot be read: {type(cause).__name__}: {cause}") from error
        raise FileNotFoundError(f"{url}: there is no such file ({error})") from error
    except Exception as error:
        # Not its representation, which over HTTP has the headers sent, and what is secret in them.
        raise OSError(f"{url}: cannot be read: {type(error).__name__}: {error}") from error


def open_file(path: str) -> RandomAccess:
    """Open a path or fsspec URL for reading at any place.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be opened or, of a URL, reached.
        ValueError: It is not a regular file, or its server gives no size or no ranges.
    """
    system, name = (None, path) if "://" not in path else file_system(path)
    if system is not None and not isinstance(system, fsspec.implementations.local.LocalFileSystem):
        return RemoteFile(path)
    return LocalFile(name) if hasattr(os, "preadv") else RemoteFile(Path(name).absolute().as_uri())


def _runs(arrays: Sequence[npt.NDArray[Any]], offsets: Sequence[int]) -> Iterable[tuple[int, int]]:
    """First and last of those that are read with one call."""
    starts = np.asarray(offsets)
    gaps = starts[1:] - starts[:-1] - np.fromiter((array.nbytes for array in arrays[:-1]), np.int64, len(arrays) - 1)
    apart = (gaps < 0) | (gaps > _GAP)
    apart[_LONGEST_RUN - 1 :: _LONGEST_RUN] = True
    return pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), len(arrays)])


def _ended(path: str, size: int, offset: int, wanted: int) -> str:
    return f"{path}: ends at byte {size}, {wanted} bytes wanted at offset {offset}: the file is truncated"
