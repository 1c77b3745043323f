"""The file descriptors of local shards, looked up for a whole batch at once."""

import numpy as np
import numpy.typing as npt

from samplers.shards.storage.reading import LocalFile, RandomAccess


class Descriptors:
    """The file descriptors of a corpus's local shards that are open; as long as this object lives, they stay open.

    Args:
        shards: S, the number of shards. 0 notes none.
    """

    def __init__(self, shards: int) -> None:
        # The last reader of a file closes it: the descriptor may then be that of another file.
        self._files: list[LocalFile] = []
        self._descriptors: npt.NDArray[np.int64] = np.full(shards, -1)

    def add(self, shard: int, file: RandomAccess) -> None:
        """Note the file of a shard, unless it is not read with a descriptor, or another one is noted."""
        if not isinstance(file, LocalFile) or file.mapping is not None or not len(self._descriptors):
            return
        if self._descriptors[shard] < 0:
            # The file first: another thread may look it up at once.
            self._files.append(file)
            self._descriptors[shard] = file.descriptor

    def find(self, shards: npt.NDArray[np.int64]) -> list[int] | None:
        """The descriptor of each shard of `[n]`; None if one of them is not known."""
        if not len(self._descriptors):
            return None
        found: list[int] = self._descriptors.take(shards).tolist()
        return None if -1 in found else found
