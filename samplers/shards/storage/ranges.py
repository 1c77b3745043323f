"""Ranges of local and remote files that are read into the memory of a batch, all fields and files together."""

from collections.abc import Sequence
from operator import gt
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from samplers.shards.storage.network.remote import RemoteFile, Wanted, fetch_into
from samplers.shards.storage.reading import READ_THROUGH, LocalFile, RandomAccess, are_dense, fill_each

# One range in four may have a neighbour, and all are read one by one.
_FEW_NEIGHBOURS: Final = 4
# Of files up to 8 TiB, offsets of different files are never near each other, in one number for both.
_OFFSET_BITS: Final = 43


class Ranges:
    """Where n ranges lie in their files, and where their bytes go.

    Args:
        memory: Memory of the process, uint8 `[bytes]`, C-contiguous and writable.
        starts: First byte in the memory, int64 `[n]`.
        offsets: First byte in the file, int64 `[n]`.
        sizes: Bytes, int64 `[n]`.

    Attributes:
        offsets: First byte in the file, int64 `[n]`.
        sizes: Bytes, int64 `[n]`.
        views: The memory of each range.
        nbytes: Bytes of all ranges.
    """

    def __init__(
        self,
        memory: npt.NDArray[np.uint8],
        starts: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
    ) -> None:
        self.offsets, self.sizes = offsets, sizes
        self._size, self._starts, self._ends = memory.size, starts.tolist(), (starts + sizes).tolist()
        # To cut a `memoryview` takes less time than an array.
        whole = memoryview(cast(Any, memory))
        self.views = [whole[start:end] for start, end in zip(self._starts, self._ends, strict=True)]
        self.nbytes = sum(self._ends) - sum(self._starts)

    def check(self) -> None:
        """Refuse ranges outside the memory.

        Raises:
            ValueError: There is one.
        """
        if min(self._starts) < 0 or max(self._ends) > self._size or any(map(gt, self._starts, self._ends)):
            raise ValueError(f"ranges must lie in the memory of {self._size} bytes, got {self._starts}")


def read_ranges(files: Sequence[tuple[RandomAccess, slice]], fields: Sequence[Ranges]) -> None:
    """Read the ranges of a whole batch, of all its fields and files, into memory.

    Args:
        files: Files, and the part of the n ranges that lies in each.
        fields: The ranges of each field, n each.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file ends before a range does.
    """
    for ranges in fields:
        ranges.check()
    if _copy_mapped(files, fields) or _read_apart(files, fields):
        return
    remote: list[Wanted] = []
    for file, part in files:
        for ranges in fields:
            if isinstance(file, RemoteFile):
                remote.append((file, ranges.views[part], ranges.offsets[part].tolist()))
            else:
                file.fill(ranges.views[part], ranges.offsets[part].tolist())
    if remote:
        fetch_into(remote)


def are_scattered(files: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> bool:
    """Whether few ranges have a neighbour, with which they would better be read in one call.

    Args:
        files: The number of each range's file, int64 `[n]`.
        offsets: Its offset, int64 `[n]`.

    >>> are_scattered(np.array([0, 1, 0]), np.array([0, 100, 90_000]))
    True
    >>> are_scattered(np.array([0, 1, 0]), np.array([0, 100, 90]))
    False
    """
    places = (files << _OFFSET_BITS) + offsets
    places.sort()
    gaps = places[1:] - places[:-1]
    return bool(np.count_nonzero(gaps <= READ_THROUGH) * _FEW_NEIGHBOURS < len(places))


def read_scattered(descriptors: Sequence[int], ranges: Ranges) -> bool:
    """Read ranges, each with one call.

    Args:
        descriptors: The descriptor of the local file in which each of the n ranges lies.
        ranges: The ranges, in any order.

    Returns:
        False if a read has failed.

    Raises:
        ValueError: A range is outside the memory.
    """
    ranges.check()
    return fill_each(descriptors, ranges.views, ranges.offsets.tolist(), ranges.nbytes)


def _copy_mapped(files: Sequence[tuple[RandomAccess, slice]], fields: Sequence[Ranges]) -> bool:
    """Copy ranges from the files' mappings. A program that cuts a file during the copy ends this process by a signal.

    Returns:
        False if it was not done: a file has no mapping, or no longer has all of its ranges.
    """
    mappings: list[memoryview] = []
    sizes = []
    for file, part in files:
        if not isinstance(file, LocalFile) or file.mapping is None:
            return False
        mappings += [file.mapping] * (part.stop - part.start)
        sizes.append(file.find_size())
    for ranges in fields:
        starts, ends = ranges.offsets.tolist(), (ranges.offsets + ranges.sizes).tolist()
        if min(starts) < 0 or any(max(ends[part]) > size for (_, part), size in zip(files, sizes, strict=True)):
            return False
        for view, mapping, start, end in zip(ranges.views, mappings, starts, ends, strict=True):
            view[:] = mapping[start:end]
    return True


def _read_apart(files: Sequence[tuple[RandomAccess, slice]], fields: Sequence[Ranges]) -> bool:
    """Read ranges of local files that are no neighbours, those of all files in one pass.

    Returns:
        False if it was not done: a file is not local, ranges are neighbours, or a read has failed.
    """
    descriptors: list[int] = []
    for file, part in files:
        if not isinstance(file, LocalFile):
            return False
        descriptors += [file.descriptor] * (part.stop - part.start)
    for ranges in fields:
        offsets = ranges.offsets.tolist()
        if any(are_dense(offsets, part.start, part.stop) for _, part in files):
            return False
        if not fill_each(descriptors, ranges.views, offsets, ranges.nbytes):
            return False
    return True
