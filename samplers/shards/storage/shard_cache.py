"""A folder with whole remote shards, which the processes of a machine share.

The shard `s3://bucket/a.tar` of 3 MB is the file `2f6c...-a.tar`. The process that wants it first writes it under a
temporary name, which is locked; others wait. Before that, the files that were not used for longest are removed, until 3
MB are free. A process that is killed leaves a temporary file without a lock, which the next one replaces.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, Final

from collate.widths import check_count
from samplers.shards.storage.atomic import TEMPORARY, AtomicFile, local_path, remove_leftover
from samplers.shards.storage.locks import lock, unlock
from samplers.shards.storage.network.counts import Counts
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.reading import RandomAccess, open_file
from samplers.shards.storage.untrusted import file_name_of

_logger = logging.getLogger(__name__)
# Bytes of a cache, if nothing else is asked for: 10 GiB.
CACHE_BYTES: Final = 10 << 30
_LOCK: Final = "lock"
# How often a process looks whether another one has written the shard that both want.
_LOOK_SECONDS: Final = 0.02
# How long it waits for another one that makes room.
_LOCK_SECONDS: Final = 10.0
_READ_AT_ONCE: Final = 1 << 24
# Folders in which shards could not be kept, and why: what was logged.
_WARNED: Final[dict[tuple[str, int | None], object]] = {}


@dataclass(frozen=True)
class ShardCache:
    """Whole shards in a folder.

    Attributes:
        folder: The folder, which nothing else uses.
        limit: Bytes that its files may have together.
        patience: Seconds to wait for another process that fetches the same shard.
        counts: Where hits and misses are counted.
    """

    folder: Path
    limit: int
    patience: float
    counts: Counts

    def open(self, url: str, version: str, size: int, fetch: Callable[[], RandomAccess]) -> RandomAccess:
        """A shard: from the cache, or fetched and put there.

        Args:
            url: URL of the shard.
            version: What tells it from a former shard of the same URL.
            size: Bytes of the shard.
            fetch: Opens the remote shard. It is called if the cache does not have it.

        Returns:
            The file in the cache; what `fetch` returns if there is no room for it.

        Raises:
            OSError: It cannot be fetched.
        """
        path = self.folder / _name(url, version, size)
        give_up = time.monotonic() + self.patience
        while size <= self.limit:
            if _has_size(path, size):
                self.counts.add("cache_hits")
                return self._use(path, url, fetch)
            with suppress(FileExistsError):
                return self._store(path, url, size, fetch)
            # Another process is fetching it. Or the file system has no locks, and one was killed while it did.
            if time.monotonic() > give_up:
                break
            time.sleep(_LOOK_SECONDS)
        self.counts.add("cache_misses")
        return fetch()

    def _use(self, path: Path, url: str, fetch: Callable[[], RandomAccess]) -> RandomAccess:
        """Open a cached shard, and note that it was used."""
        try:
            _note_use(path)
            return CachedFile(open_file(str(path)), path, url, fetch)
        except FileNotFoundError:
            # Another process has removed it in this moment, to make room.
            return fetch()

    def _store(self, path: Path, url: str, size: int, fetch: Callable[[], RandomAccess]) -> RandomAccess:
        """Fetch a shard and put it into the cache.

        Raises:
            FileExistsError: Another process is doing it, or has done it.
        """
        try:
            # Somebody may have removed the folder to make room.
            self.folder.mkdir(parents=True, exist_ok=True)
            file = AtomicFile(path, replace=False)
        except FileExistsError:
            raise
        except OSError as error:
            # It may be read only. A run needs no cache.
            self._warn(url, error)
            self.counts.add("cache_misses")
            return fetch()
        fetched = None
        try:
            self.counts.add("cache_misses")
            fetched = fetch()
            # The full size is seen by others that make room.
            if not self._make_room(size, file.temporary):
                file.discard()
                return fetched
            file.stream.truncate(size)
            for offset in range(0, size, _READ_AT_ONCE):
                file.stream.write(fetched.read(offset, _READ_AT_ONCE))
            # Not to the disk: what a crash damages is found by its checksum, and fetched again.
            file.stream.flush()
            file.rename()
        except BaseException as error:
            file.discard()
            if fetched is None or not isinstance(error, OSError):
                raise
            # The disk is full, or a file may not be so large.
            self._warn(url, error)
            return fetched
        return self._use(path, url, fetch)

    def _warn(self, url: str, error: OSError) -> None:
        """Log once for each cause that shards are not kept."""
        # Several threads may fail at the same time.
        first = object()
        if _WARNED.setdefault((str(self.folder), error.errno), first) is first:
            _logger.warning(
                "%s: %s: not kept in the cache %s, and so are others: make room, lower cache_bytes, or give a folder "
                "that may be written",
                *(shown(url), error, self.folder),
            )

    def _make_room(self, size: int, temporary: Path) -> bool:
        """Remove files until there is room for another one. False if the others are all being written."""
        with _locked(self.folder / _LOCK):
            files = []
            total = 0
            for path in self.folder.iterdir():
                if path.name == _LOCK or path == temporary:
                    continue
                if path.name.endswith(TEMPORARY):
                    with suppress(FileExistsError):
                        remove_leftover(path)
                        continue
                with suppress(FileNotFoundError):
                    status = path.stat()
                    total += status.st_size
                    files.append((status.st_mtime_ns, status.st_size, path))
            for _, length, path in sorted(files, key=lambda each: each[0]):
                if total + size <= self.limit:
                    break
                # Windows removes no open file.
                with suppress(OSError):
                    if not path.name.endswith(TEMPORARY):
                        path.unlink()
                        total -= length
            return total + size <= self.limit


class CachedFile:
    """A shard in the cache. If its bytes turn out to be damaged, it is removed there, and read where it came from.

    Args:
        file: The open file.
        path: Its path.
        url: URL of the shard, for messages.
        fetch: Opens the remote shard.
    """

    def __init__(self, file: RandomAccess, path: Path, url: str, fetch: Callable[[], RandomAccess]) -> None:
        self.path, self.size = url, file.size
        self._file, self._cached, self._fetch = file, path, fetch
        self._is_dropped = False
        self._lock = Lock()

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on, fewer only at the end of the file."""
        return self._file.read(offset, size)

    def fill(self, buffers: Sequence[Any], offsets: Sequence[int]) -> None:
        """Overwrite each buffer, see `RandomAccess.fill`."""
        self._file.fill(buffers, offsets)

    def fill_again(self, buffers: Sequence[Any], offsets: Sequence[int]) -> None:
        """Overwrite each buffer with bytes that are not from the cache."""
        self.drop()
        self._file.fill(buffers, offsets)

    def touch(self) -> bool:
        """Note that it is used. False if it is no longer in the cache, and should be closed to free the disk."""
        try:
            _note_use(self._cached)
        except FileNotFoundError:
            return False
        return True

    def drop(self) -> None:
        """Remove a damaged file from the cache, and read the remote one from now on."""
        # Of several threads that find the damage, one fetches the shard, and all read it.
        with self._lock:
            if not self._is_dropped:
                with suppress(OSError):
                    self._cached.unlink(missing_ok=True)
                self._file = self._fetch()
                self._is_dropped = True


def make_cache(folder: str | os.PathLike[str] | None, limit: int, patience: float, counts: Counts) -> ShardCache | None:
    """The cache in a folder, which is made if it does not exist. None without a folder.

    Raises:
        OSError: The folder cannot be made.
        TypeError: The limit is not an int.
        ValueError: The folder is a URL, or the limit negative.
    """
    limit = check_count("cache_bytes", limit, least=1, hint="bytes of the cache folder")
    if folder is None:
        return None
    path = local_path(folder, "cache").absolute()
    path.mkdir(parents=True, exist_ok=True)
    return ShardCache(path, limit, patience, counts)


def _name(url: str, version: str, size: int) -> str:
    """The name of a shard's file."""
    # Without the query, which may be a signature that is another one next time.
    plain = url.partition("?")[0]
    digest = blake2b(f"{plain}\n{version}\n{size}".encode(), digest_size=12).hexdigest()
    return f"{digest}-{file_name_of(plain)[-100:]}"


def _has_size(path: Path, size: int) -> bool:
    """Whether a file exists. One of another size is damaged, and removed."""
    try:
        has_size = path.stat().st_size == size
    except FileNotFoundError:
        return False
    if not has_size:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return has_size


def _note_use(path: Path) -> None:
    """Note that a file was used: its time of change tells which one was not used for longest.

    Raises:
        FileNotFoundError: It is no longer there.
    """
    try:
        os.utime(path)
    except FileNotFoundError:
        raise
    except OSError:
        # It may be read only, or of another user.
        return


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, which is waited for. Where there are no locks, or it takes too long, without one.

    Yields:
        Nothing.
    """
    with path.open("ab") as stream:
        give_up = time.monotonic() + _LOCK_SECONDS
        while lock(stream) is False and time.monotonic() < give_up:
            time.sleep(_LOOK_SECONDS)
        try:
            yield
        finally:
            unlock(stream)
