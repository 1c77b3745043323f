"""Pack a stream: rows of a fixed capacity, filled from a buffer, the oldest sample first.

A row begins with the oldest sample. Then it takes, again and again, the longest sample that fits; if that leaves room,
the best of a few pairs. A buffer of 4 and rows of 10 steps, for the lengths 5, 4, 7, 1, 3:

>>> packer = Packer(10, buffer_size=4)
>>> for length in [5, 4, 7, 1]:
...     packer.push(length, length)
>>> packer.is_due, packer.pop()
(True, [5, 4, 1])
>>> packer.push(3, 3)
>>> packer.end()
>>> packer.pop()
[7, 3]
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from typing import Any, Final

import numpy as np

from collate.widths import check_count
from samplers.dynamic.buffer import SampleT, StreamBuffer
from samplers.planning.pack_batches.cut_rows import arrange_rows
from samplers.planning.packs.documents import RowLimits

# Pairs that are tried where no sample fills a row exactly.
PAIRS: Final = 8
# A row whose first sample has waited for this many buffers takes old samples until this share of it is left, and passes
# over this many that do not fit.
MOST_BUFFERS_WAITED: Final = 2
OLD_SHARE: Final = 4
PASSED_OVER: Final = 16


class Packer(StreamBuffer[SampleT]):
    """A buffer whose batches are full rows.

    Args:
        capacity: Steps of a row.
        rows: Rows of a batch; it has fewer where the buffer does not hold as many, and at the end.
        multiple: Samples take steps up to a multiple of it; `capacity` must be one.
        max_documents: Samples in a row at most. None is no limit.
        overlong: What to do with a sample that is longer than a row: `"error"` or `"drop"` (counted in `dropped`).
        options: Those of `StreamBuffer`.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below one, `capacity` is not a multiple of `multiple`, or `overlong` is unknown.
    """

    def __init__(
        self,
        capacity: int,
        *,
        rows: int = 1,
        multiple: int = 1,
        max_documents: int | None = None,
        overlong: str = "error",
        **options: Any,
    ) -> None:
        super().__init__(overlong=overlong, **options)
        self.rows = check_count("rows", rows, least=1, hint="give the rows of a batch")
        self.multiple = check_count("multiple", multiple, least=1, hint="give 1 for exact lengths")
        self.capacity = check_count("capacity", capacity, least=1, hint="give the steps that a row holds")
        if self.capacity % self.multiple:
            raise ValueError(f"capacity must be a multiple of multiple={multiple}, got {capacity}")
        if max_documents is not None:
            max_documents = check_count("max_documents", max_documents, least=1, hint="give None for no such limit")
        self.max_documents = max_documents
        # The sizes of the waiting samples, ascending, and the arrivals of each size, the oldest first: integers alone
        # are compared three times as fast as pairs.
        self._sizes: list[int] = []
        self._queues: dict[int, deque[int]] = {}
        self._limits = RowLimits(capacity=(self.capacity,), multiple=self.multiple, max_documents=max_documents)

    def pop(self) -> list[SampleT]:
        """The next batch: the samples of its rows, row after row.

        Raises:
            IndexError: No sample waits.
        """
        if not self._sizes:
            raise IndexError("no sample waits: push one before you pop")
        if self.rows == 1:
            return self._take([arrival for _, arrival in self._fill_row(self._oldest)])
        rows: list[list[tuple[int, int]]] = []
        oldest = iter(self._waiting)
        taken: set[int] = set()
        while self._sizes and len(rows) < self.rows:
            first = next(arrival for arrival in oldest if arrival not in taken)
            rows.append(self._fill_row(first))
            taken.update(arrival for _, arrival in rows[-1])
        return self._take(self._arrange(rows))

    def _sort_in(self, size: int, arrival: int) -> None:
        insort(self._sizes, size)
        if size in self._queues:
            self._queues[size].append(arrival)
        else:
            self._queues[size] = deque([arrival])

    def _clear(self) -> None:
        self._sizes, self._queues = [], {}

    def _take_size(self, size: int) -> tuple[int, int]:
        """Take the oldest sample of a size out of the order: its size and arrival."""
        del self._sizes[bisect_left(self._sizes, size)]
        queue = self._queues[size]
        arrival = queue.popleft()
        if not queue:
            del self._queues[size]
        return size, arrival

    def _size(self, length: int) -> int | None:
        """The steps that a sample takes, or None if a row does not hold it."""
        size = -(-length // self.multiple) * self.multiple
        return size if size <= self.capacity else None

    def _describe_limit(self) -> str:
        """The capacity and the ways out."""
        return (
            f"more than a row of capacity {self.capacity}: raise the capacity, cut the sample and give max_length, or "
            "set overlong to 'drop'"
        )

    def _fill_row(self, first: int) -> list[tuple[int, int]]:
        """Take the samples of a row out of the order: their sizes and arrivals; `first` is the oldest."""
        row = [self._take_size(self._waiting[first][0])]
        room = self.capacity - row[0][0]
        if self.arrivals - first > MOST_BUFFERS_WAITED * self.buffer_size:
            room = self._take_old(row, room)
        while room and (free := self._free(row)):
            chosen = self._longest_or_pair(room, free)
            if not chosen:
                break
            for size in chosen:
                # Of equal sizes the oldest.
                row.append(self._take_size(size))
                room -= size
        return row

    def _take_old(self, row: list[tuple[int, int]], room: int) -> int:
        """Take the oldest samples that fit, and return the room that is left."""
        passed = 0
        for arrival, (size, _, _) in self._waiting.items():
            if room <= self.capacity // OLD_SHARE or passed > PASSED_OVER or not self._free(row):
                break
            queue = self._queues.get(size)
            # One that is no longer in its queue is in a row of this batch. One behind others of its size was passed
            # over with them, as it does not fit either.
            if queue is None or arrival < queue[0]:
                continue
            if size > room:
                passed += 1
                continue
            row.append(self._take_size(size))
            room -= size
        return room

    def _free(self, row: list[tuple[int, int]]) -> int:
        """How many samples the row may still take."""
        return len(self._sizes) if self.max_documents is None else self.max_documents - len(row)

    def _longest_or_pair(self, room: int, free: int) -> list[int]:
        """The sizes that fill the room best: of one sample or of two; none if nothing fits."""
        sizes = self._sizes
        fitting = bisect_right(sizes, room)
        if fitting == 0:
            return []
        best = longest = sizes[fitting - 1]
        if longest == room or fitting == 1 or free < 2:
            return [longest]
        first, second = longest, -1
        for index in range(0, fitting, -(-fitting // PAIRS)):
            size = sizes[index]
            other = bisect_right(sizes, room - size, 0, fitting) - 1
            # A sample is no pair with itself.
            if other == index:
                other -= 1
            if other >= 0 and size + sizes[other] > best:
                first, second = size, sizes[other]
                best = first + second
                if best == room:
                    break
        # The longer one first.
        return [longest] if second < 0 else [second, first] if second > first else [first, second]

    def _arrange(self, rows: list[list[tuple[int, int]]]) -> list[int]:
        """The arrivals of a batch, in the order from which a collator cuts the same rows."""
        flat = [entry for row in rows for entry in row]
        sizes = np.array([size for size, _ in flat])
        # Indices, since arrivals may be of any size.
        order, _, _ = arrange_rows(
            np.arange(len(flat)),
            np.array([len(row) for row in rows]),
            np.array([len(rows)]),
            sizes[:, None],
            self._limits,
        )
        return [flat[index][1] for index in order.tolist()]
