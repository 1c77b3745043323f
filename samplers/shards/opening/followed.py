"""Batches that are read ahead, in the order in which a sampler has planned them."""

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from torch.utils.data import get_worker_info

from samplers.shards.format.npy import AnyArray
from samplers.shards.opening.read_ahead import ReadAhead
from samplers.shards.storage.network.counts import Counts

# Batches that are read ahead at most, however small they are.
_MOST: Final = 64
# The step of a batch, and its indices as bytes: a step of the same number in another epoch has other samples.
_Key: TypeAlias = tuple[int, bytes]


class Follower(Protocol):
    """What finds batches in a plan: `samplers.progress.plan_follower.PlanFollower`."""

    def find(self, batch: AnyArray, every: int) -> int | None:
        """The step of a batch; None if it is not found."""
        ...

    def batch_at(self, step: int, every: int) -> AnyArray | None:
        """The batch of a step; None behind the end of the epoch."""
        ...


class FollowedBatches:
    """Reads batches, and those that come next in the background.

    Args:
        follower: Finds them in the plan.
        read: Reads the samples of a batch, given its indices.
        size_of: Bytes of these samples.
        limit: Bytes to read ahead.
        counts: Where waiting is counted.
    """

    def __init__(
        self,
        follower: Follower,
        read: Callable[[AnyArray], list[Any]],
        size_of: Callable[[AnyArray], int],
        limit: int,
        counts: Counts,
    ) -> None:
        self._follower, self._read, self._size_of = follower, read, size_of
        self._ahead: ReadAhead[list[Any]] = ReadAhead(limit, counts)
        # The first step that is not being read.
        self._next = 0
        # Two threads may read from one dataset.
        self._lock = Lock()

    def take(self, batch: AnyArray) -> list[Any]:
        """The samples of a batch."""
        info = get_worker_info()
        with self._lock:
            key = self._read_on(batch, 1 if info is None else info.num_workers)
        return self._read(batch) if key is None else self._ahead.take(key, partial(self._read, batch))

    def _read_on(self, batch: AnyArray, every: int) -> _Key | None:
        """Begin to read a batch and those behind it. None if the plan does not have it."""
        step = self._follower.find(batch, every)
        key = None if step is None else _key_of(step, batch)
        if step is None or key not in self._ahead:
            # Another epoch, or a jump.
            self._ahead.forget()
            if step is None:
                return None
            self._next = step
        while len(self._ahead) < _MOST and (planned := self._follower.batch_at(self._next, every)) is not None:
            call = partial(self._read, planned)
            if not self._ahead.start(_key_of(self._next, planned), self._size_of(planned), call):
                break
            self._next += every
        return key


def _key_of(step: int, batch: AnyArray) -> _Key:
    return step, np.asarray(batch, np.int64).tobytes()
