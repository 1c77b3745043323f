"""The shards of a corpus that a process has open, each compared with the index when it is opened."""

import os
from collections.abc import Callable
from contextlib import closing, suppress
from errno import EMFILE, ENFILE
from functools import lru_cache, partial
from importlib import import_module
from itertools import pairwise
from threading import Lock
from time import perf_counter_ns
from typing import Any, Final, TypeAlias, cast

import numpy as np

from samplers.shards.format.npy import AnyArray
from samplers.shards.indexing.index_file import REBUILD
from samplers.shards.indexing.tables import Tables
from samplers.shards.opening.descriptors import Descriptors
from samplers.shards.storage.network.counts import HERE, UNCOUNTED, Counts
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.network.fetched import PART, FetchedFile
from samplers.shards.storage.network.remote import RemoteFile, find_infos
from samplers.shards.storage.network.transport import DEFAULT, Transport
from samplers.shards.storage.process_pool import call_in_threads
from samplers.shards.storage.reading import RandomAccess, is_remote, open_file
from samplers.shards.storage.shard_cache import CachedFile, ShardCache

# Shards that a process keeps open: 128, but at most an eighth of the files that it may open, because the program opens
# other files too.
HANDLES: Final = 128
_SHARE: Final = 8

# Open shards, and the part of a batch that is read from each.
Files: TypeAlias = list[tuple[RandomAccess, slice]]


class OpenShards:
    """Opens shards when they are read, and keeps the latest open. It is not shared with another process.

    Args:
        tables: Tables of the corpus.
        memory_map: Map local shards.
        transport: How remote shards are read.
        counts: Where what is transferred is counted.
        cache: Where remote shards are kept whole. None keeps none.
        most: Shards that are open at a time; None for as many as a process keeps open.

    Attributes:
        process: The process that opens them.
        most: Shards that are open at a time.
        descriptors: Descriptors of the open ones, where all shards are local and can be open together.
    """

    def __init__(
        self,
        tables: Tables,
        *,
        memory_map: bool = False,
        transport: Transport = DEFAULT,
        counts: Counts = UNCOUNTED,
        cache: ShardCache | None = None,
        most: int | None = None,
    ) -> None:
        self.process = os.getpid()
        self.most = count_handles() if most is None else most
        self._tables, self._ends = tables, tables.starts[1:]
        self._transport, self._counts, self._cache = transport, counts, cache
        self._lock = Lock()
        # What is known of remote shards stays when they are closed, so that each is asked for its size once.
        self._infos: dict[str, Any] = {}
        self._has_urls = any("://" in shard.path for shard in tables.shards)
        self.descriptors = self._no_descriptors()
        open_one = partial(open_file, memory_map=memory_map)
        if self._has_urls:
            open_one = partial(_open_known, self._infos, partial(open_one, transport=transport, counts=counts))
        # By number, the one that was not used for longest first.
        self._cached_files: dict[int, CachedFile] = {}
        self._files = lru_cache(maxsize=self.most)(open_one)

    def shards_of(self, rows: AnyArray) -> AnyArray:
        """The shard of each row, int64 `[n]`."""
        return self._ends.searchsorted(rows, side="right")

    def path_of(self, row: int) -> str:
        """The path of the shard of a row, for messages."""
        return self._tables.shards[int(self.shards_of(np.array([row]))[0])].path

    def find_one(self, rows: AnyArray) -> int | None:
        """The shard of all of these rows (at least one); None if they are of several shards."""
        if len(self._ends) == 1:
            return 0
        first, last = self.shards_of(np.array([rows.min(), rows.max()])).tolist()
        return first if first == last else None

    def split(self, rows: AnyArray) -> list[tuple[AnyArray, list[int], list[int]]]:
        """Ascending rows, divided so that the shards of each part can be open together.

        Returns:
            For each part: its rows, its shards, and the borders of the shards in it. Rows 3, 5 and 9 of the shards 0, 0
            and 2 are one part with the shards [0, 2] and the borders [0, 2, 3].
        """
        shards = self.shards_of(rows)
        borders = [0, *((shards[1:] != shards[:-1]).nonzero()[0] + 1).tolist(), len(rows)]
        parts = []
        # A batch of short samples may come from a thousand shards.
        for first in range(0, len(borders) - 1, self.most):
            part = borders[first : first + self.most + 1]
            within = slice(part[0], part[-1])
            parts.append((rows[within], shards[part[:-1]].tolist(), [border - part[0] for border in part]))
        return parts

    def open_all(self, shards: list[int], borders: list[int]) -> Files:
        """Open shards, with the part of the rows that lies in each. The errors are those of `open`."""
        if self._has_urls and self._cache is not None:
            # Shards that are not in the cache are fetched side by side.
            begin = perf_counter_ns()
            # The first that cannot be opened ends it, and is not tried again: it has had as long as a read may take.
            with closing(call_in_threads(self._open_in_background, shards)) as opened:
                files = dict(opened)
            if not HERE.in_background:
                self._counts.add("waited", perf_counter_ns() - begin)
            return [(files[position], slice(*part)) for position, part in enumerate(pairwise(borders))]
        if self._has_urls:
            self._find_sizes([self._tables.shards[shard].path for shard in shards])
        return [(self.open(shard), slice(*part)) for shard, part in zip(shards, pairwise(borders), strict=True)]

    def open(self, shard: int) -> RandomAccess:
        """An open shard.

        Raises:
            FileNotFoundError: It is absent.
            OSError: It cannot be opened.
            ValueError: Its size differs from the index.
        """
        if self._cache is None or not is_remote(self._tables.shards[shard].path):
            return self._open_checked(shard)
        indexed = self._tables.shards[shard]
        file = self._cached_files.pop(shard, None)
        if file is not None and file.touch():
            self._counts.add("cache_hits")
        else:
            version = f"{indexed.digest} {indexed.fingerprint}"
            if self._tables.crcs is None:
                # No checksum would tell the shards /get?file=a and /get?file=b from each other.
                version += indexed.path.partition("?")[2]
            opened = self._cache.open(indexed.path, version, indexed.size, partial(self.fetch, shard))
            if not isinstance(opened, CachedFile):
                return opened
            file = opened
        # Those that were used last are at the end.
        self._cached_files[shard] = file
        while len(self._cached_files) > self.most:
            # Another thread may do the same.
            with suppress(KeyError, StopIteration, RuntimeError):
                del self._cached_files[next(iter(self._cached_files))]
        return file

    def fetch(self, shard: int) -> RandomAccess:
        """A whole remote shard in memory. The errors are those of `open`.

        A shard that is one request is not asked for its size before, which would take as long again.

        Raises:
            FileNotFoundError: It is absent.
        """
        indexed = self._tables.shards[shard]
        if indexed.path not in self._infos and 0 < indexed.size <= PART:
            assumed = {"size": indexed.size, "assumed": True}
            try:
                fetched = FetchedFile(RemoteFile(indexed.path, self._transport, assumed, self._counts))
            except FileNotFoundError:
                raise FileNotFoundError(_absent(indexed.path)) from None
            except ValueError:
                # It may be another file now: its size tells.
                pass
            else:
                self._infos[indexed.path] = {"size": indexed.size}
                return fetched
        return FetchedFile(cast(RemoteFile, self._open_checked(shard)))

    def _open_in_background(self, shard: int) -> RandomAccess:
        """An open shard, for a thread that keeps nobody waiting. The errors are those of `open`."""
        HERE.in_background = True
        return self.open(shard)

    def _open_checked(self, shard: int) -> RandomAccess:
        """An open shard that is not in the cache. The errors are those of `open`.

        Raises:
            FileNotFoundError: It is absent.
            ValueError: Its size differs from the index.
        """
        indexed = self._tables.shards[shard]
        try:
            file = self._open(indexed.path)
        except FileNotFoundError:
            raise FileNotFoundError(_absent(indexed.path)) from None
        if file.size != indexed.size:
            raise ValueError(
                f"{shown(indexed.path)}: {file.size} bytes, the index says {indexed.size}: changed since it was "
                f"indexed; {REBUILD}"
            )
        self.descriptors.add(shard, file)
        return file

    def free(self) -> None:
        """Free the memory of shards that were fetched whole. Here there is none."""

    def close(self) -> None:
        """Close all files, after the reads that use them; they are opened again when they are needed."""
        self._forget_files()
        self._cached_files.clear()

    def _forget_files(self) -> None:
        """Close the files, after the reads that use them."""
        self._files.cache_clear()
        self.descriptors = self._no_descriptors()

    def _no_descriptors(self) -> Descriptors:
        """Where open shards are noted, if all shards can be open together: then none is closed for another."""
        return Descriptors(len(self._ends) if len(self._ends) <= self.most else 0)

    def _find_sizes(self, paths: list[str]) -> None:
        """Ask for the sizes of remote shards together.

        Raises:
            OSError: A server does not answer, or refuses.
        """
        # Several threads that read ahead would ask for the same ones.
        with self._lock:
            unknown = [path for path in paths if path not in self._infos and is_remote(path)]
            if len(unknown) > 1:
                # What is wrong with one shard is raised where it is opened.
                with suppress(FileNotFoundError, ValueError):
                    self._infos.update(zip(unknown, find_infos(unknown, self._transport, self._counts), strict=True))

    def _open(self, path: str) -> RandomAccess:
        """Open a file, or take it from the cache.

        Raises:
            OSError: It cannot be opened.
        """
        try:
            return self._files(path)
        except OSError as error:
            if error.errno not in {EMFILE, ENFILE}:
                raise
            # The rest of the program has more files open than expected. Close the shards that are not in use.
            self._forget_files()
            return self._files(path)


def _absent(path: str) -> str:
    return f"no shard {shown(path)}, which the index lists: put it back, give shards= their new paths, or {REBUILD}"


def _open_known(infos: dict[str, Any], open_one: Callable[..., RandomAccess], path: str) -> RandomAccess:
    """Open a file with what is known of it. What is found out is noted."""
    file = open_one(path, info=infos.get(path))
    if isinstance(file, RemoteFile):
        infos[path] = {"size": file.size}
    return file


def count_handles() -> int:
    """Number of files that a process keeps open for shards."""
    try:
        # Windows has no such limit, and no such module.
        limit = import_module("resource").getrlimit(import_module("resource").RLIMIT_NOFILE)[0]
    except ImportError:
        return HANDLES
    return HANDLES if limit < 0 else max(1, min(HANDLES, limit // _SHARE))
