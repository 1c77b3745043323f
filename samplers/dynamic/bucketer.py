"""Batches alike in length from a stream whose lengths are not known before: oldest first.

Samples wait in a buffer, sorted by length. When it is full, in samples or in bytes, or when the oldest sample has
waited long enough, the oldest is taken together with its nearest neighbours in length, as many as the budget holds.
Rare lengths cannot starve, since every sample becomes the oldest in the end. When the source has ended, nothing new
will fill the gaps that neighbours leave: what still waits is cut from the longest down, each batch as long as the
budget holds, and these batches come oldest first as well.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from math import inf
from sys import getsizeof
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
    """The buffer and its rule: push samples as they come, pop a batch whenever one is due, and all at the end.

    Args:
        budget: what a batch may cost; the width that counts is its longest sample, or 1 if all are empty.
        buffer_size: samples that wait at most.
        max_wait: arrivals for which a sample waits at most; None is three times the buffer.
        max_bytes: bytes of the samples that wait, at most, as `bytes_of` counts them; None for no such limit, and
            nothing is counted. The newest sample comes on top until the batches that it makes due are out.
        overlong: what becomes of a sample that alone exceeds the budget: `"error"`, `"drop"` (counted in `dropped`) or
            `"alone"` (a batch of one, counted in `alone`).

    Attributes:
        arrivals: samples that have come.
        dropped: over-long samples that were left out.
        alone: over-long samples that are a batch of one.
        ended: whether the source has ended.

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
        self.buffer_size = check_count("buffer_size", buffer_size, least=1, hint="samples that wait at most")
        wait = 3 * self.buffer_size if max_wait is None else max_wait
        self.max_wait = check_count("max_wait", wait, least=1, hint="arrivals that a sample waits at most")
        self.max_bytes = max_bytes
        if max_bytes is not None:
            self.max_bytes = check_count("max_bytes", max_bytes, least=1, hint="give None for no such limit")
        if overlong not in {"error", "drop", "alone"}:
            raise ValueError(f"overlong must be 'error', 'drop' or 'alone', got {overlong!r}")
        self.overlong = overlong
        self.arrivals = self.dropped = self.alone = 0
        # What waits, by length and arrival, and by arrival, with its bytes where they are counted.
        self._order: list[tuple[int, int]] = []
        self._waiting: dict[int, tuple[int, SampleT, int]] = {}
        self._held = 0
        # The shortest of each batch that is left when the source has ended, by length and arrival, ascending.
        self.ended = False
        self._edges: list[tuple[int, int]] = []
        # Byte i tells whether arrival `_oldest + i` is out; the first is 0. After a state is loaded they reach further
        # than `arrivals`, until the source has given again what it had given before.
        self._oldest = 0
        self._out = bytearray()

    def __len__(self) -> int:
        return len(self._order)

    @property
    def oldest(self) -> int:
        """The arrival number of the oldest sample that waits; that of the next arrival if none does."""
        return self._oldest

    @property
    def held_bytes(self) -> int:
        """Bytes of the samples that wait; 0 without `max_bytes`."""
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
        """Whether the next sample to come was out before the state was saved: it need only be skipped."""
        place = self.arrivals - self._oldest
        return place < len(self._out) and bool(self._out[place])

    def push(self, length: int, sample: SampleT) -> None:
        """Take in a sample of `length` steps; after an error it has not come.

        Raises:
            TypeError: The length is not an int.
            ValueError: It is negative, or the source has ended.
            LengthError: It alone exceeds the budget, and `overlong` is `"error"`.
            RuntimeError: There is `max_bytes`, and the sample holds a sparse tensor, whose bytes torch does not tell.
        """
        if self.ended:
            raise ValueError("a sample must be pushed before the end of its source, got one after end()")
        arrival = self.arrivals
        place = arrival - self._oldest
        is_new = place == len(self._out)
        if not is_new and self._out[place]:
            self.arrivals += 1
            return
        length = check_count("length", length, least=0, hint="steps of a sample")
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
        """Count a sample that has come from the source, but is left out."""
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
        """All batches of a stream of (length, sample), the rest of the buffer included.

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
        """Know that no sample will come any more: the rest is popped in batches that leave no gaps."""
        self.ended = True
        first = len(self._order)
        edges = []
        while first > 0:
            longest = self._order[first - 1][0]
            first = max(0, first - max(1, self.budget.max_rows(longest or 1)))
            edges.append(self._order[first])
        self._edges = edges[::-1]

    def state_dict(self) -> BucketerState:
        """What is needed to go on: small, primitive and fresh. No sample is in it: the source must give them again.

        Returns:
            `oldest` is the arrival from which the source must be replayed, `arrivals` how many had come, and `emitted`
            holds a bit, in hexadecimal, for each between them: whether it is out.
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
        """Go on from a state; the next sample pushed must be the one that was arrival number `state["oldest"]`.

        With the same options the rest is identical; with others it is the same samples, each once.

        Raises:
            ValueError: The state is of another version, or damaged.
        """
        if state.get("version") != BUCKETER_VERSION:
            raise ValueError(
                f"the state must be of version {BUCKETER_VERSION}, got version {state.get('version')!r}: start anew"
            )
        try:
            oldest, arrivals, dropped, alone = (int(state[name]) for name in ("oldest", "arrivals", "dropped", "alone"))
            bits = np.frombuffer(bytes.fromhex(state["emitted"]), np.uint8)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the state is not what state_dict gave: {error!r}") from None
        if not 0 <= oldest <= arrivals or len(bits) != -(-(arrivals - oldest) // 8):
            raise ValueError(f"the state must tell of arrivals {oldest} to {arrivals}, got {len(bits)} bytes of them")
        self._order, self._waiting = [], {}
        self._held = 0
        self.ended = False
        self._oldest = self.arrivals = oldest
        self._out = bytearray(np.unpackbits(bits, count=arrivals - oldest))
        self.dropped, self.alone = dropped, alone

    def _cut(self, start: int) -> tuple[int, int]:
        """The batch around a place, of those into which the rest was cut.

        All but the shortest are full, so that what is left of a rest is cut where the whole was: a state needs no cuts.
        """
        order, edges = self._order, self._edges
        following = bisect_right(edges, order[start])
        high = bisect_left(order, edges[following]) if following < len(edges) else len(order)
        return bisect_left(order, edges[following - 1]), high

    def _grow(self, start: int) -> tuple[int, int]:
        """The run of neighbours around a place that the budget holds; each step takes the side that pads less."""
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
                # What does not fit now fits no better later.
                end = high
            if rows >= room or low == 0:
                return low, high
            low -= 1

    def _let_out(self, arrivals: list[int]) -> None:
        out, oldest = self._out, self._oldest
        for arrival in arrivals:
            out[arrival - oldest] = 1
        passed = out.find(0)
        passed = len(out) if passed < 0 else passed
        del out[:passed]
        self._oldest += passed

    def _describe_overlong(self, length: int, sample: SampleT) -> str:
        key = f" (key {sample['__key__']!r})" if isinstance(sample, Mapping) and "__key__" in sample else ""
        return (
            f"the sample at arrival {self.arrivals}{key} has {length} steps, which alone exceeds the budget: raise the "
            "budget, cut the sample, or set overlong to 'drop' or 'alone'"
        )


def bytes_of(sample: object) -> int:
    """Memory that a sample takes, in bytes.

    What Python says that an object takes (`sys.getsizeof`), or its `nbytes` where that is more, as with tensors; so too
    for all that mappings (their keys apart), lists, tuples, sets, dataclasses and arrays of objects hold, however deep,
    each object once. A view counts as what it shows, not as what it keeps alive; what other objects hold is not seen.

    Raises:
        RuntimeError: A tensor is sparse.
    """
    total, ahead = 0, [sample]
    # The objects themselves: the numbers of those that are gone would be given to others.
    seen: dict[int, object] = {}
    while ahead:
        value = ahead.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            total += max(getsizeof(value), getattr(value, "nbytes", 0))
            ahead += _contents(value)
    return total


def _contents(value: Any) -> Iterable[Any]:
    # First what most values are: to ask for an abstract type takes its time.
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
