"""Files: what shards are called, bytes at any place of them, and new files that appear whole or not at all."""

import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise, repeat
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, TypeAlias

import fsspec
import fsspec.implementations.local
import numpy as np
import numpy.typing as npt

if sys.platform != "win32":
    import fcntl

# Ends the name of a file that is being written.
TEMPORARY: Final = ".tmp"

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

_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_COUNT: Final = re.compile(r"(\d+)\.\.(\d+)")
_WILD: Final = re.compile(r"[*?\[]")


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


def expand_shards(shards: Shards) -> list[str]:
    """The paths and URLs that are meant: braces are spelt out, wildcards looked up and sorted.

    Args:
        shards: a path, a URL, a folder of `.tar` files, a pattern such as `train-{000..017}.tar` or `train-*.tar`, or
            an iterable of these.

    Raises:
        FileNotFoundError: A wildcard matches nothing.
        ValueError: No shard is named.

    >>> expand_shards("train-{08..10}.tar")
    ['train-08.tar', 'train-09.tar', 'train-10.tar']
    """
    if not isinstance(shards, (str, os.PathLike)):
        paths = [path for pattern in shards for path in expand_shards(pattern)]
    else:
        paths = [path for pattern in _spell_out(os.fspath(shards)) for path in _look_up(pattern)]
    if not paths:
        raise ValueError("shards must name at least one shard, got none")
    return paths


class NewFile:
    """A file that is written beside its final name and appears under it complete, or not at all.

    While it is written it is locked, so that what a killed process left can be told from another's work.

    Attributes:
        path: the final name.
        stream: what to write to.
    """

    def __init__(self, path: Path, *, replace: bool = True) -> None:
        """Create the temporary file.

        Args:
            path: the final name.
            replace: take the place of a file of that name.

        Raises:
            FileExistsError: The temporary file exists: somebody else writes it, or was killed. Or the file itself does
                and is not to be replaced.
        """
        self.path = path
        self._temporary = path.with_name(path.name + TEMPORARY)
        try:
            self.stream = io.BufferedWriter(_NamedFile(self._temporary, "xb"))
        except FileExistsError:
            raise FileExistsError(
                f"{self._temporary} exists: another writer is at work, or was killed: delete it, or write elsewhere"
            ) from None
        _lock(self.stream)
        # Only who holds the temporary file gives the name away: from here on nobody else does.
        if not replace and path.exists():
            self.discard()
            raise FileExistsError(f"{path} exists: another writer is at work in this folder: write to another one")

    def commit(self) -> None:
        """Send everything to the disk, then give the file its final name."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        self._temporary.replace(self.path)
        # A name is safe only when its folder is.
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Remove what has been written."""
        # What is still in the buffer does not fit a full disk either.
        with suppress(OSError):
            self.stream.close()
        self._temporary.unlink(missing_ok=True)


def remove_leftover(temporary: Path) -> None:
    """Remove the temporary file of a killed process; nothing happens if there is none.

    Raises:
        FileExistsError: The process that writes it is alive.
    """
    try:
        stream = temporary.open("r+b")
    except FileNotFoundError:
        return
    with stream:
        if not _lock(stream):
            raise FileExistsError(f"{temporary} is being written: wait for the other writer, or write elsewhere")
        temporary.unlink(missing_ok=True)


def _lock(stream: BinaryIO) -> bool:
    # The system takes the lock back when the process ends, however it does. A file system without locks has no say.
    if sys.platform != "win32":
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


class _NamedFile(io.FileIO):
    """A file that names itself when the disk is full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.name)) from None


def _runs(arrays: Sequence[npt.NDArray[Any]], offsets: Sequence[int]) -> Iterable[tuple[int, int]]:
    """First and last of those that are read with one call."""
    starts = np.asarray(offsets)
    gaps = starts[1:] - starts[:-1] - np.fromiter((array.nbytes for array in arrays[:-1]), np.int64, len(arrays) - 1)
    apart = (gaps < 0) | (gaps > _GAP)
    apart[_LONGEST_RUN - 1 :: _LONGEST_RUN] = True
    return pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), len(arrays)])


def _spell_out(pattern: str) -> list[str]:
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    count = _COUNT.fullmatch(found[1])
    if count is None:
        parts = found[1].split(",")
    else:
        width = len(count[1]) if count[1].startswith("0") else 0
        parts = [f"{number:0{width}}" for number in range(int(count[1]), int(count[2]) + 1)]
    return [whole for part in parts for whole in _spell_out(before + part + after)]


def _look_up(pattern: str) -> list[str]:
    if "://" not in pattern and Path(pattern).is_dir():
        pattern = str(Path(pattern, "*.tar"))
    if not _WILD.search(pattern):
        return [pattern]
    if "://" in pattern:
        system, name = file_system(pattern)
        found = [system.unstrip_protocol(path) for path in system.glob(name)]
    else:
        # A file may have brackets in its name.
        found = [pattern] if Path(pattern).exists() else _glob(pattern)
    if not found:
        raise FileNotFoundError(f"no file matches {pattern}")
    return sorted(found)


def _glob(pattern: str) -> list[str]:
    root = Path(pattern).anchor
    return [str(path) for path in Path(root).glob(pattern.removeprefix(root))]


def _ended(path: str, size: int, offset: int, wanted: int) -> str:
    return f"{path}: ends at byte {size}, {wanted} bytes wanted at offset {offset}: the file is truncated"
