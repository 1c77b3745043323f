"""Files that can be read at any offset, local or remote."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise, repeat
from mmap import ACCESS_READ, mmap
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import fsspec.implementations.local
import numpy as np
import numpy.typing as npt

from samplers.shards.storage.network.counts import UNCOUNTED, Counts
from samplers.shards.storage.network.remote import RemoteFile, Wanted, as_bytes, fetch_into, file_system, truncated
from samplers.shards.storage.network.transport import DEFAULT, Transport

Shards: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""A folder, an index file, or shards: paths, brace patterns, wildcards or URLs; one or several."""

# Gaps up to this size (bytes) are read and discarded; a second read call costs more.
READ_THROUGH: Final = 2048
_DISCARDED: Final = memoryview(bytearray(READ_THROUGH))
# Linux reads at most 2 GiB in one call, and macOS refuses more.
_MOST_AT_ONCE: Final = 1 << 30
# Linux takes at most 1024 buffers in one call, and each array may need a second buffer for the gap before it.
_LONGEST_RUN: Final = 500


# Memory that is filled from a file: C-contiguous and writable.
Buffer: TypeAlias = npt.NDArray[Any] | memoryview


class RandomAccess(Protocol):
    """A file that can be read at any offset.

    Attributes:
        path: Path or URL, for messages.
        size: Size in bytes.
    """

    path: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on, fewer only at the end of the file."""
        ...

    def fill(self, buffers: Sequence[Buffer], offsets: Sequence[int]) -> None:
        """Overwrite each buffer with the bytes at its offset.

        Raises:
            ValueError: The file ends before a buffer is full.
        """
        ...


@runtime_checkable
class Refetchable(Protocol):
    """A file whose bytes may be damaged on their way from a server, or in a cache."""

    def fill_again(self, buffers: Sequence[Buffer], offsets: Sequence[int]) -> None:
        """Overwrite each buffer, as `RandomAccess.fill` does, with bytes that are asked for again."""
        ...


class LocalFile:
    """A local file, read with `pread`, which has no file position: safe to share with threads and forked processes.

    Attributes:
        path: Its path.
        size: Its size in bytes when it was opened.
        descriptor: Its file descriptor.
        mapping: Its bytes, mapped. None if it is not mapped.
    """

    def __init__(self, path: str, *, memory_map: bool = False) -> None:
        self.path = path
        # Opening a named pipe would wait for its writer.
        if not Path(path).is_file() and Path(path).exists():
            raise ValueError(f"{path}: not a regular file")
        self.descriptor = os.open(path, os.O_RDONLY)
        self.size = self.find_size()
        self.mapping = _map(self.descriptor, self.size) if memory_map else None

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # The last reader closes the file. If the cache closed it, a thread could read from a descriptor that the
        # system has already given to another file. `close` is a default: when the program ends, `os` may be gone.
        if hasattr(self, "descriptor"):
            close(self.descriptor)

    def find_size(self) -> int:
        """The size that the file has now."""
        return os.fstat(self.descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on."""
        data = b""
        while (missing := min(size - len(data), _MOST_AT_ONCE)) > 0:
            more = os.pread(self.descriptor, missing, offset + len(data))
            if not more:
                break
            data += more
        return data

    def fill(self, buffers: Sequence[Any], offsets: Sequence[int]) -> None:
        """Overwrite each buffer, see `RandomAccess.fill`. Neighbours in the file are read with one call.

        Raises:
            ValueError: The file ends before a buffer is full.
        """
        # Dense arrays are read in runs, with the gaps between them.
        if are_dense(offsets, 0, len(offsets)):
            for first, last in _read_runs(buffers, offsets):
                self._fill_run(buffers[first:last], offsets[first:last])
        elif not fill_each(repeat(self.descriptor), buffers, offsets, sum(map(attrgetter("nbytes"), buffers))):
            for buffer, offset in zip(buffers, offsets, strict=True):
                self._fill_slowly(buffer, offset)

    def _fill_run(self, arrays: Sequence[Any], offsets: Sequence[int]) -> None:
        """Fill arrays with one call. The bytes between them are read into a buffer that is discarded."""
        buffers = []
        end = offsets[0]
        for array, offset in zip(arrays, offsets, strict=True):
            if offset > end:
                buffers.append(_DISCARDED[: offset - end])
            buffers.append(array)
            end = offset + array.nbytes
        size = 0
        with suppress(OSError):
            size = os.preadv(self.descriptor, buffers, offsets[0])
        if size != end - offsets[0]:
            for array, offset in zip(arrays, offsets, strict=True):
                self._fill_slowly(array, offset)

    def _fill_slowly(self, buffer: Buffer, offset: int) -> None:
        """Fill one buffer with as many calls as it needs: a call reads at most 1 GiB.

        Raises:
            ValueError: The file ends before the buffer is full.
        """
        remainder: Any = as_bytes(buffer)
        while len(remainder):
            size = os.preadv(self.descriptor, (remainder[:_MOST_AT_ONCE],), offset)
            if not size:
                raise ValueError(truncated(self.path, self.size, offset, len(remainder)))
            remainder, offset = remainder[size:], offset + size


def are_dense(offsets: Sequence[int], first: int, last: int) -> bool:
    """Whether so many of the ranges from `first` to `last` lie near each other that they are read in runs.

    One call costs as much as reading 2 KiB.
    """
    return last - first > 1 and 0 <= offsets[last - 1] - offsets[first] <= (last - first) * READ_THROUGH


def fill_each(descriptors: Iterable[int], buffers: Sequence[Any], offsets: Iterable[int], size: int) -> bool:
    """Fill each buffer with a call of its own. False if they do not have `size` bytes together afterwards."""
    # A buffer over 2 GiB is an error on macOS. A disk that fails gives its error again where each is read slowly.
    with suppress(OSError):
        # A call never reads more than its buffer holds. So if the sum is right, every buffer is full.
        return sum(map(os.preadv, descriptors, zip(buffers, strict=True), offsets)) == size
    return False


def fill_all(
    files: Sequence[tuple[RandomAccess, slice]], columns: Sequence[tuple[Sequence[Any], Sequence[int]]]
) -> None:
    """Fill the arrays of a whole batch, of all its columns and files; those of remote files with one round of requests.

    Args:
        files: Files, and the part of the n arrays that lies in each.
        columns: For each column n arrays, and the offset of each.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file ends before an array is full.
    """
    remote: list[Wanted] = []
    for arrays, offsets in columns:
        for file, part in files:
            if isinstance(file, RemoteFile):
                remote.append((file, arrays[part], offsets[part]))
            else:
                file.fill(arrays[part], offsets[part])
    if remote:
        fetch_into(remote)


def fill_again(file: RandomAccess, buffer: Any, offset: int) -> bool:
    """Ask a remote file for a range once more. False for a local file, which would give the same bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: It ends before the buffer is full, or its server gives no ranges.
    """
    if not isinstance(file, Refetchable):
        return False
    file.fill_again([buffer], [offset])
    return True


def is_remote(path: str) -> bool:
    """Whether a path is read over a network: all URLs but those of local files."""
    return "://" in path and not isinstance(file_system(path)[0], fsspec.implementations.local.LocalFileSystem)


def open_file(
    path: str,
    *,
    memory_map: bool = False,
    transport: Transport = DEFAULT,
    info: dict[str, Any] | None = None,
    counts: Counts = UNCOUNTED,
) -> RandomAccess:
    """Open a path or fsspec URL for reading at any offset.

    Args:
        path: Path or URL.
        memory_map: Map a local file, where the system can copy from mappings.
        transport: How a remote file is read.
        info: What `find_infos` has found out about a remote file. None asks for it.
        counts: Where the requests of a remote file are counted.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be opened, or a URL cannot be reached.
        ValueError: It is not a regular file, or its server gives no size or no ranges.
    """
    system, name = (None, path) if "://" not in path else file_system(path)
    if system is not None and not isinstance(system, fsspec.implementations.local.LocalFileSystem):
        return RemoteFile(path, transport, info, counts)
    # Windows has no preadv. There fsspec reads local files.
    return (
        LocalFile(name, memory_map=memory_map) if hasattr(os, "preadv") else RemoteFile(Path(name).absolute().as_uri())
    )


def _map(descriptor: int, size: int) -> memoryview | None:
    """A file's mapping. None if its file system has none, or it is empty."""
    try:
        return memoryview(mmap(descriptor, size, access=ACCESS_READ))
    except (OSError, ValueError):
        return None


def _read_runs(arrays: Sequence[Buffer], offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split arrays into runs that are read with one call each: (first, last) indices.

    A run ends before a gap of more than 2 KiB, before an offset that goes back, and after 500 arrays.

    >>> arrays = [np.empty(100, np.uint8)] * 4
    >>> list(_read_runs(arrays, [0, 150, 5000, 5100]))
    [(0, 2), (2, 4)]
    """
    starts = np.asarray(offsets)
    gaps = starts[1:] - starts[:-1] - np.fromiter((array.nbytes for array in arrays[:-1]), np.int64, len(arrays) - 1)
    apart = (gaps < 0) | (gaps > READ_THROUGH)
    apart[_LONGEST_RUN - 1 :: _LONGEST_RUN] = True
    return pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), len(arrays)])
