r"""The shards of a corpus in memory: each is read whole when one of its samples is first needed.

>>> memory = ShardMemory([3, 5])
>>> memory.missing(np.array([1, 1])), memory.part(1).nbytes
([1], 5)
>>> memory.part(1)[:] = b"whole"
>>> memory.note_read(1)
>>> memory.missing(np.array([1, 1])), bytes(memory.bytes), memory.starts.tolist()
([], b'\x00\x00\x00whole', [0, 3])
"""

from collections.abc import Sequence
from mmap import mmap

import numpy as np
import numpy.typing as npt


class ShardMemory:
    """Memory for whole shards. Forked processes share it, so that workers have one copy and read each shard once.

    Two processes may read a shard at the same time. They write the same bytes.

    Args:
        sizes: Bytes of each of the S shards.

    Attributes:
        bytes: The memory of all shards. The system provides a page when it is first written.
        starts: First byte of each shard in it, int64 `[S]`.
        sizes: Bytes of each shard, int64 `[S]`.

    Raises:
        OSError: The system has no such memory.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        # Before arrays are made of them: sizes that an index invents may not fit into 64 bits.
        total = sum(sizes)
        try:
            block = memoryview(mmap(-1, total + len(sizes)))
        except (OSError, OverflowError) as error:
            raise OSError(
                f"in_memory=True needs {total} bytes for the shards, and the system does not give them: {error}"
            ) from None
        self.sizes = np.array(sizes, np.int64)
        self.starts: npt.NDArray[np.int64] = np.cumsum(self.sizes) - self.sizes
        self.bytes = block[:total]
        self._is_read = np.frombuffer(block, np.bool_, offset=total)
        self._all_are_read = False

    def missing(self, shards: npt.NDArray[np.int64]) -> list[int]:
        """Those of these shards, int64 `[n]`, that are not read yet."""
        if self._all_are_read:
            return []
        self._all_are_read = bool(self._is_read.all())
        missing: list[int] = np.unique(shards[~self._is_read[shards]]).tolist()
        return missing

    def part(self, shard: int) -> memoryview:
        """The memory of a shard, to be read into. `note_read` says that it is complete."""
        start = int(self.starts[shard])
        return self.bytes[start : start + int(self.sizes[shard])]

    def note_read(self, shard: int) -> None:
        """Note that a shard is in its memory, for all processes that share it."""
        self._is_read[shard] = True
