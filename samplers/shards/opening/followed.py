"""Batches that are read ahead, in the order in which a sampler has planned them."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

from torch.utils.data import get_worker_info

from samplers.shards.format.npy import AnyArray
from samplers.shards.opening.read_ahead import ReadAhead
from samplers.shards.storage.network.counts import Counts

# Batches that are read ahead at most, however small they are.
_MOST: Final = 64


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

    def take(self, batch: AnyArray) -> list[Any]:
        """The samples of a batch."""
        info = get_worker_info()
        every = 1 if info is None else info.num_workers
        step = self._follower.find(batch, every)
        if step is None or step not in self._ahead:
            # Another epoch, or a jump.
            self._ahead.forget()
            if step is None:
                return self._read(batch)
            self._next = step
        while len(self._ahead) < _MOST and (planned := self._follower.batch_at(self._next, every)) is not None:
            if not self._ahead.start(self._next, self._size_of(planned), partial(self._read, planned)):
                break
            self._next += every
        return self._ahead.take(step, partial(self._read, batch))
