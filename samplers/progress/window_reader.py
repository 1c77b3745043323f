"""Reads the samples of planned steps: of local shards when a step is due, of remote shards a window at a time."""

from collections import deque
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any, Protocol, TypeAlias, cast

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.schedules.schedule import Schedule
from samplers.planning.sorting import IndexArray
from samplers.shards.dataset import ShardDataset
from samplers.shards.format.samples import Sample
from samplers.shards.indexing.tables import Tables
from samplers.shards.opening.open_shards import OpenShards
from samplers.shards.opening.read_ahead import ReadAhead
from samplers.shards.skipping import Failed, Skipping
from samplers.shards.storage.reading import RandomAccess, is_remote

# Steps, the sample indices of all, and for each step the end of its samples in them.
_Plan: TypeAlias = tuple[list[int], Any, list[int]]


class StepReader:
    """The samples of some steps of a replica, in order.

    Samples of local shards are read when their step is due. Those of remote shards are read with all others of their
    read group when the first is due, so that each shard is fetched once.

    Args:
        data: The samples by index.
        schedule: The batches of the epoch.
        rank: Rank of the replica.
        steps: Steps to read, ascending: int64 `[n]`.
    """

    def __init__(self, data: "SamplesInOrder", schedule: Schedule, rank: int, steps: Integers) -> None:
        self._data, self._schedule = data, schedule
        self._slots = steps * schedule.num_replicas + rank
        self._read_groups = schedule.read_groups(self._slots)
        self._next = 0
        # What is planned of remote read groups whose shards are being fetched, and those that come after them.
        self._announced: dict[int, _Plan] = {}
        self._coming: deque[int] = deque()
        if not data.is_local and data.reads_ahead:
            _, firsts = np.unique(self._read_groups, return_index=True)
            self._coming.extend(self._read_groups[np.sort(firsts)].tolist())
            data.forget_ahead()
        # Of the steps in the present read group: their sample indices, or the samples that were read.
        self._ready: dict[int, Any] = {}

    def __len__(self) -> int:
        """Steps that remain."""
        return len(self._slots) - self._next

    def take(self) -> list[Sample]:
        """The next step's samples, those of one field longest first.

        With a handler, the samples that it skips are missing; it is called when their step is taken.

        Raises:
            IndexError: All steps are taken.
            RuntimeError: All samples of the step were skipped, or too many in all.
        """
        if not len(self):
            raise IndexError("all steps are taken")
        if self._next not in self._ready:
            self._begin(self._read_groups[self._next])
        ready = self._ready[self._next]
        samples = self._data.__getitems__(ready) if self._data.is_local else self._data.sift(ready)
        del self._ready[self._next]
        self._next += 1
        return samples

    def _begin(self, group: int) -> None:
        """Find the samples of a read group's next steps; of all, and read them, if shards are fetched whole."""
        if self._data.is_local:
            # A window of 10,000 samples is some hundred steps, of which each worker reads its own. The first batch of
            # an iteration must not wait for the plan of them all: 1 step, then 9, 81, ...
            steps, samples, ends = self._plan(group, 8 * self._next + 1)
        else:
            self._announce(group)
            if group not in self._announced:
                self._announced[group] = self._plan(group)
            steps, samples, ends = self._announced.pop(group)
            samples = self._data.read_in_order(samples)
        for step, first, last in zip(steps, [0, *ends], ends, strict=False):
            self._ready[step] = samples[first:last]

    def _plan(self, group: int, most: int | None = None) -> "_Plan":
        """The next steps of a read group, their samples, and where those of each step end."""
        steps = self._next + np.flatnonzero(self._read_groups[self._next :] == group)[:most]
        samples, rows = self._schedule.batch_samples(self._slots[steps])
        return steps.tolist(), samples, np.cumsum(rows).tolist()

    def _announce(self, group: int) -> None:
        """Let the shards of a read group be fetched, and those of further ones, as far as there is room for them."""
        # Always the next group too: there will be room for its shards when those of this one are read.
        while self._coming and (group in self._coming or len(self._announced) < 2 or self._data.has_room_ahead):
            coming = self._coming.popleft()
            self._announced[coming] = plan = self._plan(coming)
            self._data.read_soon(plan[1])


class SamplesInOrder(Protocol):
    """Samples by index, which a reader of steps takes: of one corpus, or of several."""

    @property
    def is_local(self) -> bool:
        """Whether no shard is remote."""
        ...

    @property
    def reads_ahead(self) -> bool:
        """Whether shards are fetched before they are read."""
        ...

    @property
    def has_room_ahead(self) -> bool:
        """Whether more shards can be announced now."""
        ...

    def __getitems__(self, indices: Any) -> list[Sample]:
        """These samples, in this order."""
        ...

    def sift(self, read: list[Any]) -> list[Sample]:
        """The samples of a batch without those that could not be read."""
        ...

    def read_in_order(self, sample_indices: IndexArray) -> list[Any]:
        """These samples, read shard after shard."""
        ...

    def read_soon(self, sample_indices: IndexArray) -> None:
        """Fetch the shards of these samples in the background."""
        ...

    def forget_ahead(self) -> None:
        """Forget what was announced."""
        ...


class ShardsInOrder(ShardDataset):
    """Samples by index, and of remote shards also one shard after the other, each fetched whole."""

    # Shards that are open at a time; None for as many as a process keeps open.
    _most_open: int | None = None

    @property
    def shards(self) -> list[str]:
        """The paths of the shards."""
        return self.index.shards

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of variable length."""
        return self.index.fields

    @property
    def reads_ahead(self) -> bool:
        """Whether shards are fetched before they are read."""
        return self._read_ahead_bytes > 0

    @property
    def has_room_ahead(self) -> bool:
        """Whether more shards can be announced now."""
        return self._fetched_shards.has_room

    def read_soon(self, sample_indices: IndexArray) -> None:
        """Fetch the shards of these samples in the background, in ascending order, after those announced before.

        Args:
            sample_indices: Integers `[n]`.
        """
        rows = self._sources(sample_indices)
        shards = np.unique(np.searchsorted(self.index.starts, rows, side="right") - 1)
        self._fetched_shards.read_soon(shards.tolist())

    def forget_ahead(self) -> None:
        """Forget what was announced: another iteration begins."""
        self._fetched_shards.forget_ahead()

    @property
    def _fetched_shards(self) -> "FetchedShards":
        return cast(FetchedShards, self._here().shards)

    def sift(self, read: list[Any]) -> list[Sample]:
        """The samples of a batch without those that could not be read; the errors are those of `__getitems__`.

        Args:
            read: Part of what `read_in_order` returns.
        """
        return read if self._skipping is None else self._skipping.sift(read)

    def read_in_order(self, sample_indices: IndexArray) -> list[Any]:
        """These samples, read shard after shard, in the order in which they were asked for.

        Args:
            sample_indices: Integers `[n]`; the errors are those of `__getitems__`.

        Returns:
            Samples; with a handler, `Failed` instead of those that could not be read.
        """
        # Samples 7, 2 and 9 of shards with 5 samples each: in the order 2 | 7 9, with borders 0, 1 and 3.
        sources = self._sources(sample_indices)
        order = np.argsort(sources, kind="stable")
        shards = np.searchsorted(self.index.starts, sources[order], side="right")
        borders = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(order)]
        samples: list[Any] = [None] * len(order)
        for first, last in pairwise(borders):
            part = order[first:last]
            for entry, sample in zip(part.tolist(), self._read_in_order(sample_indices[part]), strict=True):
                samples[entry] = sample
            self._here().shards.free()
        return samples

    def join_sources(self, *, skipping: Skipping | None, counts_of: "ShardsInOrder | None", most_open: int) -> None:
        """Read as one of several sources.

        Args:
            skipping: What all sources count their skipped samples with.
            counts_of: The source with which transfers are counted; None to count alone.
            most_open: Shards that are open at a time.
        """
        self._skipping, self._most_open = skipping, most_open
        if counts_of is not None:
            self._counts = counts_of._counts  # noqa: SLF001
        self._forget()

    def close(self) -> None:
        """Close all shards; they are opened again when they are read."""
        self._here().shards.close()

    def _open_shards(self) -> OpenShards:
        """What opens the shards."""
        return FetchedShards(
            self._tables,
            most=self._most_open,
            memory_map=self._memory_map,
            transport=self._transport,
            counts=self._counts,
            cache=self._make_cache(),
            read_ahead_bytes=self._read_ahead_bytes,
        )

    def _fail(self, error: Exception, row: int) -> Failed:
        """The failure of a sample, without the traceback of its error."""
        # A window stays in memory until its steps are taken; tracebacks would keep all that was being read.
        cause: BaseException | None = error
        while cause is not None:
            cause.__traceback__ = None
            cause = cause.__context__
        return super()._fail(error, row)


class FetchedShards(OpenShards):
    """Opens local shards, and fetches a remote one whole: one at a time, until it is freed, and others ahead.

    Args:
        tables: Tables of the corpus.
        read_ahead_bytes: Bytes of shards that are fetched before they are read. 0 fetches none.
        **options: As for `OpenShards`.
    """

    _fetched: RandomAccess | None = None

    def __init__(self, tables: Tables, *, read_ahead_bytes: int = 0, **options: Any) -> None:
        super().__init__(tables, **options)
        self._ahead: ReadAhead[RandomAccess] = ReadAhead(read_ahead_bytes, self._counts)
        self._coming: deque[int] = deque()
        self._coming_lock = Lock()

    @property
    def has_room(self) -> bool:
        """Whether the announced shards leave room for more."""
        return sum(self._tables.shards[shard].size for shard in list(self._coming)) < self._ahead.free_bytes

    def read_soon(self, shards: list[int]) -> None:
        """Fetch these shards in the background, after those announced before."""
        self._coming.extend(shards)
        self._start_fetches()

    def forget_ahead(self) -> None:
        """Forget what was announced and fetched."""
        with self._coming_lock:
            self._coming.clear()
            self._ahead.forget()

    def free(self) -> None:
        """Free the memory of a shard that was fetched whole."""
        self._fetched = None

    def open(self, shard: int) -> RandomAccess:
        """An open shard; a remote one is fetched whole. The errors are those of `OpenShards.open`."""
        path = self._tables.shards[shard].path
        if not is_remote(path):
            return super().open(shard)
        # To find the samples that fail, a shard is read many times, but fetched once.
        # Another thread may fetch or free a shard meanwhile.
        fetched = self._fetched
        if fetched is None or fetched.path != path:
            try:
                fetched = self._fetched = self._ahead.take(shard, partial(self._fetch, shard))
            finally:
                self._start_fetches()
        return fetched

    def _fetch(self, shard: int) -> RandomAccess:
        """A whole shard, in memory or in the cache."""
        return self.fetch(shard) if self._cache is None else super().open(shard)

    def _start_fetches(self) -> None:
        """Begin to fetch as many shards as there is room for."""
        # Two threads may iterate over one stream.
        with self._coming_lock:
            while self._coming and (shard := self._coming[0]) not in self._ahead:
                indexed = self._tables.shards[shard]
                if is_remote(indexed.path) and not self._ahead.start(shard, indexed.size, partial(self._fetch, shard)):
                    break
                self._coming.popleft()
