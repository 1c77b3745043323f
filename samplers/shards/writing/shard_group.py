"""Finished shards that get their names together: to flush a thousand small shards one by one takes most of the time.

A shard and its index are two files, and a flush of each and of their folder may take ten times as long as a small shard
itself. So after a group has got its names, shards are collected for ten times as long as that took, and then get their
names together. They are complete and read back before, and keep their locks until then. A large shard never waits.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from weakref import WeakSet

from samplers.shards.opening.open_shards import count_handles
from samplers.shards.storage.atomic import AtomicFile, commit_in_stages

# Shards and bytes of a group.
MOST_SHARDS: Final = 16
MOST_BYTES: Final = 1 << 26
# How many times as long as giving names takes, shards are collected. So giving names takes a tenth of the time.
PATIENCE = 10.0


# By identity, to be a member of a set.
@dataclass(frozen=True, eq=False)
class FinishedShard:
    """A complete shard under its temporary name.

    Attributes:
        file: The shard.
        index: Its index.
        samples: Number of samples.
        nbytes: Bytes of the shard.
    """

    file: AtomicFile
    index: AtomicFile
    samples: int
    nbytes: int


# Waiting shards of all writers of the process, which may write to many folders. Each shard keeps two files open.
_WAITING: Final[WeakSet[FinishedShard]] = WeakSet()


class ShardGroup:
    """Finished shards that wait for their names.

    Args:
        on_named: Called with the paths of shards that have got their names.

    Attributes:
        lost_samples: Samples of shards that could not get their names.
    """

    def __init__(self, on_named: Callable[[list[Path]], None]) -> None:
        self.lost_samples = 0
        self._on_named = on_named
        self._waiting: list[FinishedShard] = []
        self._not_before = 0.0

    def add(self, shard: FinishedShard) -> None:
        """Add a shard, and give all their names if it is time.

        Raises:
            OSError: A file cannot be flushed or renamed.
        """
        self._waiting.append(shard)
        _WAITING.add(shard)
        most = min(MOST_SHARDS, len(self._waiting) + count_handles() // 2 - len(_WAITING))
        full = len(self._waiting) >= most or sum(each.nbytes for each in self._waiting) >= MOST_BYTES
        if full or time.monotonic() >= self._not_before:
            self.commit()

    def commit(self) -> None:
        """Give all shards their names, then all indexes.

        Raises:
            OSError: A file cannot be flushed or renamed. Shards without their names are removed.
        """
        shards, self._waiting = self._waiting, []
        if not shards:
            return
        started = time.monotonic()
        try:
            commit_in_stages([[each.file for each in shards], [each.index for each in shards]])
        finally:
            _WAITING.difference_update(shards)
            self.lost_samples += sum(each.samples for each in shards if not each.file.committed)
            # After an error, a shard may have its name and its index not: then a writer that continues indexes it.
            self._tell([each for each in shards if each.file.committed])
        ended = time.monotonic()
        self._not_before = ended + PATIENCE * (ended - started)

    def _tell(self, shards: Sequence[FinishedShard]) -> None:
        """Tell of shards that have their names. If that fails, their samples are lost."""
        try:
            self._on_named([each.file.path for each in shards])
        except BaseException:
            self.lost_samples += sum(each.samples for each in shards)
            raise
