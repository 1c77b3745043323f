"""Bucket a stream: batches of similar lengths, the oldest sample first.

Samples wait in a buffer, sorted by length. A batch is due when the buffer is full, in samples or in bytes, or when the
oldest sample has waited for `max_wait` arrivals. The batch is the oldest sample with its nearest neighbours in length,
as many as the budget allows. So rare lengths cannot starve: every sample becomes the oldest at some time.

A budget of 8 padded tokens and a buffer of 4, for the lengths 5, 1, 4, 2, 2, 1:

>>> bucketer = Bucketer(Budget(max_tokens=8), buffer_size=4)
>>> for length in [5, 1, 4, 2]:
...     bucketer.push(length, length)
>>> bucketer.is_due, bucketer.pop()
(True, [5])

The oldest sample, of 5 steps, is alone: with 4 it would take 2 x 5 = 10 tokens. Next comes the sample of 1 step:

>>> bucketer.push(2, 2), bucketer.is_due, bucketer.pop()
(None, True, [1, 2, 2])

Three rows of 2 steps are 6 tokens. A fourth row, of 4 steps, would make it 4 x 4 = 16.

When the source has ended, no new sample fills the gaps between neighbours. The remaining samples are cut from the
longest down, each batch as large as the budget allows. These batches come oldest first as well:

>>> bucketer.push(1, 1)
>>> bucketer.end()
>>> bucketer.pop()
[1, 4]
"""

from bisect import bisect_left, bisect_right, insort
from math import inf
from typing import ClassVar

import numpy as np

from collate.widths import AllowedWidths, padded_widths
from samplers.dynamic.buffer import SampleT, StreamBuffer
from samplers.planning.budget import Budget
from samplers.planning.options import Overlong


class Bucketer(StreamBuffer[SampleT]):
    """A buffer whose batches are the oldest sample and its nearest neighbours in length.

    Args:
        budget: Limit of a batch. The width is that of its longest sample, or 1 if all are empty.
        widths: Padded widths, checked by `check_widths`. None pads to the longest row.
        buffer_size, max_wait, max_bytes, min_length, max_length: As for `StreamBuffer`.
        overlong: What to do with a sample that alone exceeds the budget: `"error"`, `"drop"` (counted in `dropped`)
            or `"alone"` (a batch of one, counted in `alone`).

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below one, or `overlong` is unknown.
    """

    choices: ClassVar[tuple[str, ...]] = ("error", "drop", "alone")

    # Pickles of earlier releases have none.
    widths: AllowedWidths = None

    def __init__(
        self,
        budget: Budget,
        *,
        buffer_size: int,
        max_wait: int | None = None,
        max_bytes: int | None = None,
        overlong: Overlong = "error",
        widths: AllowedWidths = None,
        min_length: int = 0,
        max_length: int | None = None,
    ) -> None:
        super().__init__(
            buffer_size=buffer_size,
            max_wait=max_wait,
            max_bytes=max_bytes,
            min_length=min_length,
            max_length=max_length,
            overlong=overlong,
        )
        self.budget, self.widths = budget, widths
        # The waiting samples: (length, arrival), ascending.
        self._order: list[tuple[int, int]] = []
        # When the source has ended: the shortest sample of each remaining batch, (length, arrival), ascending.
        self._edges: list[tuple[int, int]] = []
        # The padded width of each length.
        self._padded: dict[int, int] = {}

    def pop(self) -> list[SampleT]:
        """The next batch, shortest sample first.

        Raises:
            IndexError: No sample waits.
        """
        if not self._order:
            raise IndexError("no sample waits: push one before you pop")
        start = bisect_left(self._order, (self._waiting[self._oldest][0], self._oldest))
        if self.ended:
            low, high = self._cut(start)
        else:
            low, high = self._grow_real(start) if self.budget.count_tokens == "real" else self._grow(start)
        taken = [arrival for _, arrival in self._order[low:high]]
        del self._order[low:high]
        return self._take(taken)

    def end(self) -> None:
        """Note the end of the source, and cut the remaining samples into batches, from the longest down."""
        super().end()
        first = len(self._order)
        starts = []
        while first > 0:
            longest = self._order[first - 1][0]
            first = max(0, first - max(1, self._max_rows(longest)))
            starts.append(self._order[first])
        self._edges = starts[::-1]

    def _sort_in(self, size: int, arrival: int) -> None:
        insort(self._order, (size, arrival))

    def _clear(self) -> None:
        self._order = []

    def _size(self, length: int) -> int | None:
        """The length, or None if a sample alone exceeds the budget."""
        return None if self._max_rows(length) == 0 else length

    def _max_rows(self, length: int) -> int:
        """The largest number of rows whose longest sample has this length."""
        if self.widths is None or self.budget.count_tokens == "real":
            return self.budget.max_rows(length or 1)
        if length not in self._padded:
            self._padded[length] = int(padded_widths(np.array([[max(1, length)]]), self.widths)[0, 0])
        return self.budget.max_rows(self._padded[length])

    def _describe_limit(self) -> str:
        """The budget and the ways out."""
        return "which alone exceeds the budget: raise the budget, cut the sample, or set overlong to 'drop' or 'alone'"

    def _cut(self, start: int) -> tuple[int, int]:
        """The remaining batch that contains the sample at `start` in the order: (first, last).

        All of these batches but the shortest are full. So after a resume the remaining samples are cut at the same
        borders, and the state needs no borders.
        """
        order, edges = self._order, self._edges
        following = bisect_right(edges, order[start])
        high = bisect_left(order, edges[following]) if following < len(edges) else len(order)
        return bisect_left(order, edges[following - 1]), high

    def _grow(self, start: int) -> tuple[int, int]:
        """The neighbours of the sample at `start` that fit the budget: (first, last). Takes the side that pads less.

        With the lengths 1, 4, 5, 9 around 5: on the left, 4 in width 5 pads 1 step. On the right, 9 would pad the
        rows of width 5 by 9 - 5 = 4 steps each. So 4 comes first.
        """
        order, max_rows = self._order, self._max_rows
        low, high, end = start, start + 1, len(order)
        width = order[start][0]
        room = max_rows(width)
        while True:
            rows = high - low
            left = width - order[low - 1][0] if low else inf
            right = (order[high][0] - width) * rows if high < end else inf
            if high < end and right <= left:
                wider = order[high][0]
                wider_room = max_rows(wider)
                if rows < wider_room:
                    high, width, room = high + 1, wider, wider_room
                    continue
                # Wider samples do not fit later either, because the batch only grows.
                end = high
            if rows >= room or low == 0:
                return low, high
            low -= 1

    def _grow_real(self, start: int) -> tuple[int, int]:
        """The same under a budget of real tokens: neighbours as long as their sum fits, the nearer side first."""
        order, low, high = self._order, start, start + 1
        tokens, width = order[start][0], order[start][0]
        while low or high < len(order):
            left = order[start][0] - order[low - 1][0] if low else inf
            right = order[high][0] - order[start][0] if high < len(order) else inf
            size = order[high][0] if right <= left else order[low - 1][0]
            if not self.budget.fits(high - low + 1, [max(width, size)], tokens + size):
                break
            tokens, width = tokens + size, max(width, size)
            low, high = (low, high + 1) if right <= left else (low - 1, high)
        return low, high
