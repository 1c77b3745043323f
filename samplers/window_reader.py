"""Samples of planned steps, read a window at a time, in the order of the files."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Integers
from samplers.planning.sorting import Places
from samplers.planning.tables.window_table import WindowCourse
from samplers.shards.dataset import ShardDataset
from samplers.shards.format.samples import Sample
from samplers.shards.skipping import Failed
from samplers.shards.storage.reading import LocalFile, RandomAccess, file_system, naming


class StepReader:
    """The samples of some steps of a replica, a window's read together when the first of them is due.

    Args:
        data: the samples by place.
        course: whose steps.
        rank: of the replica.
        steps: to read, ascending: int64 `[n]`.
    """

    def __init__(self, data: "ShardsInTurn", course: WindowCourse, rank: int, steps: Integers) -> None:
        self._data, self._course = data, course
        self._numbers = steps * course.replicas + rank
        self._visits = course.visits_of(self._numbers)
        self._next = 0
        self._ready: dict[int, list[Any]] = {}

    def __len__(self) -> int:
        """Steps that are left."""
        return len(self._numbers) - self._next

    def take(self) -> list[Sample]:
        """The next step's samples, those of one field longest first.

        With a handler those that it skips are missing: it is asked when their step is taken.

        Raises:
            IndexError: All steps are taken.
            RuntimeError: All samples of the step were skipped, or too many in all.
        """
        if not len(self):
            raise IndexError("all steps are taken")
        if self._next not in self._ready:
            self._read(self._visits[self._next])
        samples = self._data.sift(self._ready[self._next])
        del self._ready[self._next]
        self._next += 1
        return samples

    def _read(self, visit: int) -> None:
        places = np.flatnonzero(self._visits == visit)
        samples, rows = self._course.samples_of(self._numbers[places])
        read, ends = self._data.read_in_turn(samples), np.cumsum(rows).tolist()
        for place, first, last in zip(places.tolist(), [0, *ends], ends, strict=False):
            self._ready[place] = read[first:last]


class ShardsInTurn(ShardDataset):
    """Samples of a shard at a time: of a local one by place, a remote one is fetched whole, since most are wanted."""

    def sift(self, found: list[Any]) -> list[Sample]:
        """The samples of a batch without those that could not be read; the errors are those of `__getitems__`.

        Args:
            found: part of what `read_in_turn` gives.
        """
        return found if self._skipping is None else self._skipping.sift(found)

    def read_in_turn(self, places: Places) -> list[Any]:
        """The samples at these places, read shard after shard, given in the order asked for.

        Args:
            places: integers `[n]`; the errors are those of `__getitems__`.

        Returns:
            Samples; with a handler, `Failed` in place of those that could not be read.
        """
        order = np.argsort(places, kind="stable")
        shards = np.searchsorted(self.index.starts, places[order], side="right")
        edges = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(places)]
        given: list[Any] = [None] * len(places)
        for first, last in pairwise(edges):
            part = order[first:last]
            for place, sample in zip(part.tolist(), self._find(places[part].tolist()), strict=True):
                given[place] = sample
            self._let_go()
        return given

    def _forget(self) -> None:
        super()._forget()
        self._let_go()

    def _fail(self, error: Exception, row: int) -> Failed:
        # A window waits for its steps, and tracebacks would keep in memory whatever was being read.
        each: BaseException | None = error
        while each is not None:
            each.__traceback__ = None
            each = each.__context__
        return super()._fail(error, row)

    def _let_go(self) -> None:
        self._fetched: FetchedFile | None = None

    def _file(self, shard: int) -> RandomAccess:
        file = super()._file(shard)
        if isinstance(file, LocalFile):
            return file
        # To find the samples that fail, a shard is read again and again, but fetched once.
        if self._fetched is None or self._fetched.path != file.path:
            self._fetched = FetchedFile(file)
        return self._fetched


class FetchedFile:
    """A remote file in memory, as long as it is read: one request in place of one for each sample.

    Args:
        file: the same file, opened.
    """

    def __init__(self, file: RandomAccess) -> None:
        self.path, self.size = file.path, file.size
        with naming(file.path):
            system, name = file_system(file.path)
            self._data = memoryview(system.cat_file(name))

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on: fewer only at the end of the file."""
        return bytes(self._data[offset : offset + size])

    def fill(self, arrays: Sequence[npt.NDArray[Any]], offsets: Sequence[int]) -> None:
        """Overwrite each C-contiguous array with the bytes at its offset.

        Raises:
            ValueError: The file ends before an array is full.
        """
        for array, offset in zip(arrays, offsets, strict=True):
            part = self._data[offset : offset + array.nbytes]
            if len(part) != array.nbytes:
                raise ValueError(
                    f"{self.path}: ends at byte {len(self._data)}, {array.nbytes} bytes wanted at offset {offset}: the "
                    "file is truncated"
                )
            array.reshape(-1).view(np.uint8)[:] = np.frombuffer(part, np.uint8)
