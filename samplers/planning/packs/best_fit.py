"""Best-fit decreasing on counts: how many rows documents need, without looking at each document.

Documents go longest first, each into the open row with the least room that holds it. Rows with equal room are alike, so
that only their number is kept. Six documents of 5, 3, 3, 3, 2 and 1 units in rows of 8:

>>> count_rows([5, 3, 2, 1], [1, 3, 1, 1], 8)
3
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def count_rows(sizes: Sequence[int], counts: Sequence[int], capacity: int) -> int:
    """The rows that best-fit decreasing takes.

    Its cost depends on the number of sizes, not of documents.

    Args:
        sizes: In units, descending, each 1 to `capacity`.
        counts: Documents of each size.
        capacity: Of a row, in units.
    """
    rooms = OpenRows(capacity)
    for size, count in zip(sizes, counts, strict=True):
        rooms.place(size, count)
    return rooms.rows


class OpenRows:
    """Open rows by the room that is left in them.

    Attributes:
        rows: All rows so far, full ones too.
    """

    def __init__(self, capacity: int) -> None:
        self.rows = 0
        self._capacity = capacity
        self._rooms: list[int] = []
        self._counts: dict[int, int] = {}

    def place(self, size: int, count: int) -> None:
        """Place that many documents of one size."""
        rooms, counts = self._rooms, self._counts
        first = index = bisect_left(rooms, size)
        changed: list[tuple[int, int]] = []
        while count and index < len(rooms):
            room = rooms[index]
            rows = counts[room]
            # A row that took one document of this size has the least room for the next: it is filled up first.
            each = room // size
            if count < each:
                changed.append((room - count * size, 1))
                taken, count = 1, 0
            else:
                taken = min(rows, count // each)
                changed.append((room - each * size, taken))
                count -= taken * each
            if taken == rows:
                index += 1
            counts[room] = rows - taken
        for room in rooms[first:index]:
            del counts[room]
        del rooms[first:index]
        if count:
            changed += self._open(size, count)
        for room, rows in changed:
            self._add(room, rows)

    def _open(self, size: int, count: int) -> list[tuple[int, int]]:
        """New rows for documents that no open row holds: their rooms, and how many have each."""
        each = self._capacity // size
        full, rest = divmod(count, each)
        self.rows += full + (rest > 0)
        return [(self._capacity - each * size, full), (self._capacity - rest * size, int(rest > 0))]

    def _add(self, room: int, rows: int) -> None:
        if room == 0 or rows == 0:
            return
        if room not in self._counts:
            insort(self._rooms, room)
            self._counts[room] = 0
        self._counts[room] += rows
