"""Reads the samples of planned steps: of local shards when a step is due, of remote shards a window at a time."""

from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.schedule import Schedule
from samplers.planning.sorting import IndexArray
from samplers.shards.dataset import ShardDataset
from samplers.shards.format.samples import Sample
from samplers.shards.open_shards import OpenShards
from samplers.shards.skipping import Failed
from samplers.shards.storage.reading import RandomAccess
from samplers.shards.storage.remote import FetchedFile, RemoteFile


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

    def __init__(self, data: "ShardsInOrder", schedule: Schedule, rank: int, steps: Integers) -> None:
        self._data, self._schedule = data, schedule
        self._slots = steps * schedule.num_replicas + rank
        self._read_groups = schedule.read_groups(self._slots)
        self._next = 0
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
        # A window of 10,000 samples is some hundred steps, of which each worker reads its own. The first batch of an
        # iteration must not wait for the plan of them all: 1 step, then 9, 81, ...
        ahead = 8 * self._next + 1 if self._data.is_local else None
        steps = self._next + np.flatnonzero(self._read_groups[self._next :] == group)[:ahead]
        samples, rows = self._schedule.batch_samples(self._slots[steps])
        found = samples if self._data.is_local else self._data.read_in_order(samples)
        ends = np.cumsum(rows).tolist()
        for step, first, last in zip(steps.tolist(), [0, *ends], ends, strict=False):
            self._ready[step] = found[first:last]


class ShardsInOrder(ShardDataset):
    """Samples by index, and of remote shards also one shard after the other, each fetched whole."""

    @cached_property
    def is_local(self) -> bool:
        """Whether no shard is remote, so that a batch can be read by itself."""
        return not any("://" in shard.path and not shard.path.startswith("file://") for shard in self._tables.shards)

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

    def _open_shards(self) -> OpenShards:
        """What opens the shards."""
        return FetchedShards(self._tables, memory_map=self._memory_map, transport=self._transport)

    def _fail(self, error: Exception, row: int) -> Failed:
        """The failure of a sample, without the traceback of its error."""
        # A window stays in memory until its steps are taken; tracebacks would keep all that was being read.
        cause: BaseException | None = error
        while cause is not None:
            cause.__traceback__ = None
            cause = cause.__context__
        return super()._fail(error, row)


class FetchedShards(OpenShards):
    """Opens local shards, and fetches a remote one whole: one at a time, until it is freed."""

    _fetched: FetchedFile | None = None

    def free(self) -> None:
        """Free the memory of a shard that was fetched whole."""
        self._fetched = None

    def open(self, shard: int) -> RandomAccess:
        """An open shard; a remote one is fetched whole. The errors are those of `OpenShards.open`."""
        file = super().open(shard)
        if not isinstance(file, RemoteFile):
            return file
        # To find the samples that fail, a shard is read many times, but fetched once.
        # Another thread may fetch or free a shard meanwhile.
        fetched = self._fetched
        if fetched is None or fetched.path != file.path:
            fetched = self._fetched = FetchedFile(file)
        return fetched
