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

import sys
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from math import inf
from typing import Any, Final, Generic, TypeVar

import numpy as np

from collate.errors import LengthError
from collate.widths import check_count
from samplers.planning.budget import Budget
from samplers.planning.options import Overlong

SampleT = TypeVar("SampleT")
BucketerState = dict[str, Any]

BUCKETER_VERSION: Final = 1


class Bucketer(Generic[SampleT]):
    """A buffer of samples: push each sample, pop a batch whenever one is due, and pop all batches at the end.

    Args:
        budget: Limit of a batch. The width is that of its longest sample, or 1 if all are empty.
        buffer_size: Largest number of samples in the buffer.
        max_wait: Largest number of arrivals for which a sample waits. None is three times the buffer.
        max_bytes: Largest number of bytes in the buffer, as `bytes_of` counts them. None is no limit, and nothing is
            counted. The newest sample may exceed the limit until the batches it triggers are emitted.
        overlong: What to do with a sample that alone exceeds the budget: `"error"`, `"drop"` (counted in `dropped`)
            or `"alone"` (a batch of one, counted in `alone`).

    Attributes:
        arrivals: Number of samples that came from the source.
        dropped: Number of over-long samples that were left out.
        alone: Number of over-long samples in a batch of one.
        ended: Whether the source has ended.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below one, or `overlong` is unknown.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        buffer_size: int,
        max_wait: int | None = None,
        max_bytes: int | None = None,
        overlong: Overlong = "error",
    ) -> None:
        self.budget = budget
        self.buffer_size = check_count(
            "buffer_size", buffer_size, least=1, hint="the largest number of samples in the buffer"
        )
        wait = 3 * self.buffer_size if max_wait is None else max_wait
        self.max_wait = check_count(
            "max_wait", wait, least=1, hint="the largest number of arrivals for which a sample waits"
        )
        self.max_bytes = max_bytes
        if max_bytes is not None:
            self.max_bytes = check_count("max_bytes", max_bytes, least=1, hint="give None for no limit")
        if overlong not in {"error", "drop", "alone"}:
            raise ValueError(f"overlong must be 'error', 'drop' or 'alone', got {overlong!r}")
        self.overlong = overlong
        self.arrivals = self.dropped = self.alone = 0
        # The waiting samples: (length, arrival), sorted; and by arrival: length, sample, bytes (0 if not counted).
        self._order: list[tuple[int, int]] = []
        self._waiting: dict[int, tuple[int, SampleT, int]] = {}
        self._held = 0
        # When the source has ended: the shortest sample of each remaining batch, (length, arrival), ascending.
        self.ended = False
        self._edges: list[tuple[int, int]] = []
        # Byte i is 1 if arrival `_oldest + i` is out of the buffer. Byte 0 is always 0. After a state is loaded there
        # are bytes behind `arrivals`, until the source has repeated the samples that it gave before.
        self._oldest = 0
        self._out = bytearray()

    def __len__(self) -> int:
        return len(self._order)

    @property
    def oldest(self) -> int:
        """The arrival of the oldest waiting sample. The next arrival if none waits."""
        return self._oldest

    @property
    def held_bytes(self) -> int:
        """Bytes of the waiting samples. 0 without `max_bytes`."""
        return self._held

    @property
    def is_due(self) -> bool:
        """Whether a batch must be popped before the next sample is pushed."""
        if not self._order or self.arrivals < self._oldest + len(self._out):
            return False
        if len(self._order) >= self.buffer_size or self.arrivals - self._oldest >= self.max_wait:
            return True
        return self.max_bytes is not None and self._held > self.max_bytes

    @property
    def is_repeated(self) -> bool:
        """Whether the next sample was emitted before the state was saved, so that it must be skipped."""
        age = self.arrivals - self._oldest
        return age < len(self._out) and bool(self._out[age])

    def push(self, length: int, sample: SampleT) -> None:
        """Add a sample of `length` steps. After an error the sample does not count as an arrival.

        Raises:
            TypeError: The length is not an int.
            ValueError: The source has ended.
            LengthError: The length is negative, or the sample alone exceeds the budget and `overlong` is `"error"`. A
                `ValueError`.
            RuntimeError: With `max_bytes`: the sample has a sparse tensor, whose size torch does not report.
        """
        if self.ended:
            raise ValueError("a sample must be pushed before the end of its source, got one after end()")
        arrival = self.arrivals
        age = arrival - self._oldest
        is_new = age == len(self._out)
        if not is_new and self._out[age]:
            self.arrivals += 1
            return
        length = self._check_length(length, sample)
        size = 0 if self.max_bytes is None else bytes_of(sample)
        if self.budget.max_rows(length or 1) == 0:
            if self.overlong == "error":
                raise LengthError(self._describe_overlong(length, sample))
            if self.overlong == "drop":
                self.dropped += 1
                self.skip()
                return
            self.alone += is_new
        self.arrivals += 1
        if is_new:
            self._out.append(0)
        insort(self._order, (length, arrival))
        self._waiting[arrival] = length, sample, size
        self._held += size

    def skip(self) -> None:
        """Count a sample of the source that is left out."""
        if self.arrivals == self._oldest + len(self._out):
            self._out.append(0)
        self.arrivals += 1
        self._let_out([self.arrivals - 1])

    def pop(self) -> list[SampleT]:
        """The next batch, shortest sample first.

        Raises:
            IndexError: No sample waits.
        """
        if not self._order:
            raise IndexError("no sample waits: push one before you pop")
        start = bisect_left(self._order, (self._waiting[self._oldest][0], self._oldest))
        low, high = self._cut(start) if self.ended else self._grow(start)
        taken = [arrival for _, arrival in self._order[low:high]]
        del self._order[low:high]
        self._let_out(taken)
        if self._held:
            self._held -= sum(self._waiting[arrival][2] for arrival in taken)
        return [self._waiting.pop(arrival)[1] for arrival in taken]

    def batches_of(self, source: Iterable[tuple[int, SampleT]]) -> Iterator[list[SampleT]]:
        """All batches of a stream of (length, sample), also those of the samples that remain at its end.

        Yields:
            Batches, each as soon as it is due.
        """
        for length, sample in source:
            self.push(length, sample)
            while self.is_due:
                yield self.pop()
        self.end()
        while self._order:
            yield self.pop()

    def end(self) -> None:
        """Note the end of the source, and cut the remaining samples into batches, from the longest down."""
        self.ended = True
        first = len(self._order)
        starts = []
        while first > 0:
            longest = self._order[first - 1][0]
            first = max(0, first - max(1, self.budget.max_rows(longest or 1)))
            starts.append(self._order[first])
        self._edges = starts[::-1]

    def state_dict(self) -> BucketerState:
        """The state to resume from: small, primitive and a copy. It has no samples: the source must repeat them.

        With the arrivals 0 to 5, of which 0, 1 and 3 are emitted, `oldest` is 2, `arrivals` is 6, and `emitted` has
        the bits 0100 for the arrivals 2 to 5, padded with zeros to 0100 0000: "40".

        Returns:
            `oldest`, the arrival from which the source must repeat its samples; `arrivals`, their number so far; and
            `emitted`, a bit for each arrival between them, in hexadecimal: whether it is out.
        """
        return {
            "version": BUCKETER_VERSION,
            "oldest": self._oldest,
            "arrivals": self._oldest + len(self._out),
            "emitted": np.packbits(np.frombuffer(self._out, np.uint8)).tobytes().hex(),
            "dropped": self.dropped,
            "alone": self.alone,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state. The next sample to push must be the one of arrival `state["oldest"]`.

        With the same options the remaining batches are identical. With other options they have the same samples, each
        once.

        Raises:
            ValueError: The state is of another version, or damaged.
        """
        if state.get("version") != BUCKETER_VERSION:
            raise ValueError(
                f"the state must be of version {BUCKETER_VERSION}, got version {state.get('version')!r}: start without "
                "a state"
            )
        try:
            oldest, arrivals, dropped, alone = (int(state[name]) for name in ("oldest", "arrivals", "dropped", "alone"))
            bits = np.frombuffer(bytes.fromhex(state["emitted"]), np.uint8)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the state is not what state_dict gave: {error!r}") from None
        if not 0 <= oldest <= arrivals or len(bits) != -(-(arrivals - oldest) // 8):
            raise ValueError(
                f"the state must have a bit for each arrival {oldest} to {arrivals}, got {len(bits)} bytes"
            )
        self._order, self._waiting = [], {}
        self._held = 0
        self.ended = False
        self._oldest = self.arrivals = oldest
        self._out = bytearray(np.unpackbits(bits, count=arrivals - oldest))
        self.dropped, self.alone = dropped, alone

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
        order, max_rows = self._order, self.budget.max_rows
        low, high, end = start, start + 1, len(order)
        width = order[start][0]
        room = max_rows(width or 1)
        while True:
            rows = high - low
            left = width - order[low - 1][0] if low else inf
            right = (order[high][0] - width) * rows if high < end else inf
            if high < end and right <= left:
                wider = order[high][0]
                wider_room = max_rows(wider or 1)
                if rows < wider_room:
                    high, width, room = high + 1, wider, wider_room
                    continue
                # Wider samples do not fit later either, because the batch only grows.
                end = high
            if rows >= room or low == 0:
                return low, high
            low -= 1

    def _let_out(self, arrivals: list[int]) -> None:
        """Mark arrivals as out, and move `oldest` to the first that is not."""
        out, oldest = self._out, self._oldest
        for arrival in arrivals:
            out[arrival - oldest] = 1
        passed = out.find(0)
        passed = len(out) if passed < 0 else passed
        del out[:passed]
        self._oldest += passed

    def _check_length(self, length: int, sample: SampleT) -> int:
        """The length as a Python int.

        Raises:
            LengthError: It is negative.
        """
        # Not `least=0`, because a negative length is a `LengthError` everywhere.
        length = check_count("length", length, least=-sys.maxsize, hint="give the steps of a sample")
        if length < 0:
            raise LengthError(
                f"length must be at least 0, got {length} for the sample at arrival {self.arrivals}{_key(sample)}: "
                "give the steps of a sample"
            )
        return length

    def _describe_overlong(self, length: int, sample: SampleT) -> str:
        return (
            f"the sample at arrival {self.arrivals}{_key(sample)} has {length} steps, which alone exceeds the budget: "
            "raise the budget, cut the sample, or set overlong to 'drop' or 'alone'"
        )


def bytes_of(sample: object) -> int:
    """Memory of a sample in bytes.

    Counts `sys.getsizeof` of an object, or its `nbytes` if that is more (tensors). Adds the contents of mappings
    (without keys), lists, tuples, sets, dataclasses and object arrays at any depth, each object once. A view counts its
    own elements, not the memory that it keeps alive. The contents of other objects are not counted.

    >>> import numpy as np
    >>> bytes_of(np.zeros(1000)[:10]) < 1000 < bytes_of([np.zeros(1000)])
    True

    Raises:
        RuntimeError: A tensor is sparse.
    """
    total, stack = 0, [sample]
    # Keeps the objects alive, because Python gives the id of a dead object to a new one.
    seen: dict[int, object] = {}
    while stack:
        value = stack.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            total += max(sys.getsizeof(value), getattr(value, "nbytes", 0))
            stack += _contents(value)
    return total


def _key(sample: object) -> str:
    """The key of a sample for messages, if it has one."""
    return f" (key {sample['__key__']!r})" if isinstance(sample, Mapping) and "__key__" in sample else ""


def _contents(value: Any) -> Iterable[Any]:
    """The objects in a container."""
    # The most frequent types first, because a check against an abstract class is slow.
    if isinstance(value, (str, bytes, int, float)):
        return ()
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, np.ndarray):
        return value.ravel().tolist() if value.dtype.hasobject else ()
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return ()
