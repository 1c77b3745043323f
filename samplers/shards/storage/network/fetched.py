"""Whole remote files in memory."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from samplers.shards.storage.network.remote import RemoteFile, as_bytes, attempts, truncated
from samplers.shards.storage.network.requests import Request, send_all

# Larger files are fetched in parts of this size (16 MiB), side by side: a request takes as long as 1 MiB.
PART: Final = 1 << 24
# Parts that are asked for together, 1 GiB: a server that claims far more than it sends fails at the first ones.
_PARTS_AT_ONCE: Final = 64


class FetchedFile:
    """A remote file in memory: one request for all of it, or for each 16 MiB, instead of one for each sample.

    Args:
        file: The file.
    """

    def __init__(self, file: RemoteFile) -> None:
        self.path, self.size, self._file = file.path, file.size, file
        self._starts, self._parts = range(0, file.size, max(1, file.size)), [memoryview(b"")]
        if file.size > PART and _is_divisible(file):
            self._starts = range(0, file.size, PART)
            self._parts = []
            for first in range(0, len(self._starts), _PARTS_AT_ONCE):
                starts = self._starts[first : first + _PARTS_AT_ONCE]
                requests = [file.request(start, min(start + PART, file.size)) for start in starts]
                self._parts += map(memoryview, send_all(requests, file.transport))
        elif file.size:
            begin = partial(attempts, file, (0, file.size), whole=True)
            request = Request(file.path, f"all {file.size} bytes", begin, file.size, file.counts)
            self._parts = [memoryview(data) for data in send_all([request], file.transport)]
        # Most shards are one part.
        self._whole = np.frombuffer(self._parts[0], np.uint8) if len(self._parts) == 1 else None

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on, fewer only at the end of the file."""
        return b"".join(self._pieces(offset, size))

    def fill(self, buffers: Sequence[Any], offsets: Sequence[int]) -> None:
        """Overwrite each buffer, see `RandomAccess.fill`.

        Raises:
            ValueError: The file ends before a buffer is full.
        """
        for buffer, offset in zip(buffers, offsets, strict=True):
            end = offset + buffer.nbytes
            if offset < 0 or end > self.size:
                raise ValueError(truncated(self.path, self.size, offset, buffer.nbytes))
            target, done = as_bytes(buffer), 0
            if self._whole is not None:
                # Half of the time of a small sample is saved.
                target[:] = self._whole[offset:end]
                continue
            for piece in self._pieces(offset, buffer.nbytes):
                target[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
                done += len(piece)

    def _pieces(self, offset: int, size: int) -> Iterator[memoryview]:
        """The bytes of a range, part by part.

        Yields:
            Bytes that follow each other.
        """
        end = min(offset + size, self.size)
        while offset < end:
            number = offset // self._starts.step
            start = self._starts[number]
            piece = self._parts[number][offset - start : end - start]
            yield piece
            offset += len(piece)

    def fill_again(self, buffers: Sequence[Any], offsets: Sequence[int]) -> None:
        """Overwrite each buffer with bytes that are asked for again. The errors are those of `RemoteFile`."""
        self._file.fill(buffers, offsets)


def _is_divisible(file: RemoteFile) -> bool:
    """Whether a file's server gives ranges. If it is not known, one is asked for."""
    if not file.gives_ranges:
        try:
            send_all([file.request(0, 1)], file.transport)
        except ValueError:
            return False
        file.note_ranges()
    return True
