"""SharedText: a text that all copies of a stream in a loader's workers know."""

from multiprocessing.reduction import ForkingPickler
from time import sleep
from typing import Any, Final
from zlib import crc32

import numpy as np
import torch

from samplers.shards.skip_counts import shared_zeros

# A reader that finds a half-written text reads it again, but only this often: its writer may have died.
_LOOKS: Final = 1000
_PAUSE_SECONDS: Final = 1e-3


class SharedText:
    """A short text that a stream and its copies in workers share; a copy has the text, and then changes alone.

    >>> from copy import copy
    >>> first = SharedText(100)
    >>> first.write("a stage")
    >>> second = copy(first)
    >>> second.write("another")
    >>> first.read(), second.read(), first.version != second.version
    ('a stage', 'another', True)

    Args:
        size: Bytes that it may have.
        cells: Memory that is shared already, uint8 `[8 + size]`; None for new memory, with an empty text.
    """

    def __init__(self, size: int, cells: torch.Tensor | None = None) -> None:
        self._size = size
        self._cells = shared_zeros((8 + size,), torch.uint8) if cells is None else cells
        self._bytes = self._cells.numpy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _copy_text, (self._size, self.read())

    def to_process(self) -> tuple[Any, ...]:
        """The parts to send to another process, which then shares the memory."""
        return SharedText, (self._size, self._cells)

    @property
    def version(self) -> bytes:
        """What changes with the text."""
        return self._bytes[:8].tobytes()

    def read(self) -> str:
        """The text; one that is being written is read again."""
        for look in range(_LOOKS):
            if look:
                sleep(_PAUSE_SECONDS)
            head = self._bytes[:8].view(np.uint32).tolist()
            data = self._bytes[8 : 8 + head[1]].tobytes()
            if head[0] == crc32(data):
                break
        return data.decode()

    def write(self, text: str) -> None:
        """Change the text, unless it is the same.

        Raises:
            ValueError: It is too long.
        """
        data = text.encode()
        if len(data) > self._size:
            raise ValueError(
                f"what a mixture's workers share must have at most {self._size} bytes, got {len(data)}: change the "
                "mixture less often within a pass, or make a new stream, and let it seek the position"
            )
        head = np.array([crc32(data), len(data)], np.uint32).view(np.uint8)
        if head.tobytes() != self.version:
            self._bytes[8 : 8 + len(data)] = np.frombuffer(data, np.uint8)
            self._bytes[:8] = head


def _copy_text(size: int, text: str) -> SharedText:
    """Unpickle a text, into memory of its own."""
    new = SharedText(size)
    new.write(text)
    return new


# For processes that are started, and queues between them: there a tensor in shared memory is sent as a handle.
ForkingPickler.register(SharedText, SharedText.to_process)
