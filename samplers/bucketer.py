"""Batches alike in length from a stream whose lengths are not known before: oldest first.

Samples wait in a buffer, sorted by length. When it is full, or when the oldest sample has waited long enough, the
oldest is taken together with its nearest neighbours in length, as many as the budget holds. Rare lengths cannot starve,
since every sample becomes the oldest in the end.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Literal, TypeVar

from collate.errors import LengthError
from samplers.budget import Budget, check_count

Sample = TypeVar("Sample")
State = dict[str, Any]
Overlong = Literal["error", "drop", "alone"]

VERSION = 1


class Bucketer(Generic[Sample]):
    """The buffer and its rule: push samples as they come, pop a batch whenever one is due, and all at the end.

    Args:
        budget: what a batch may cost; the width that counts is its longest sample.
        buffer_size: samples that wait at most.
        max_wait: arrivals for which a sample waits at most; None is three times the buffer.
        overlong: what becomes of a sample that alone exceeds the budget: `"error"`, `"drop"` (counted in `dropped`) or
            `"alone"` (a batch of one, counted in `alone`).

    Attributes:
        arrivals: samples that have come.
        dropped: over-long samples that were left out.
        alone: over-long samples that became a batch of one.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below one, or `overlong` is unknown.
    """

    def __init__(
        self, budget: Budget, *, buffer_size: int, max_wait: int | None = None, overlong: Overlong = "error"
    ) -> None:
        self.budget = budget
        self.buffer_size = check_count("buffer_size", buffer_size, least=1, hint="samples that wait at most")
        wait = 3 * self.buffer_size if max_wait is None else max_wait
        self.max_wait = check_count("max_wait", wait, least=1, hint="arrivals that a sample waits at most")
        if overlong not in ("error", "drop", "alone"):
            raise ValueError(f"overlong must be 'error', 'drop' or 'alone', got {overlong!r}")
        self.overlong = overlong
        self.arrivals = self.dropped = self.alone = 0
        # What waits, by length and arrival, and by arrival.
        self._order: list[tuple[int, int]] = []
        self._waiting: dict[int, tuple[int, Sample]] = {}
        self._urgent: int | None = None
        # Bit i tells whether arrival `_oldest + i` is out; the lowest bit is 0.
        self._oldest = 0
        self._out = 0
        # While a saved buffer is filled again: where it ends, and which arrivals were out then.
        self._replays_until = 0

    def __len__(self) -> int:
        return len(self._order)

    @property
    def oldest(self) -> int:
        """The arrival number of the oldest sample that waits; that of the next arrival if none does."""
        return self._oldest

    @property
    def is_due(self) -> bool:
        """Whether a batch must be popped before the next sample is pushed."""
        if not self._order or self.arrivals < self._replays_until:
            return False
        full = len(self._order) >= self.buffer_size
        return full or self._urgent is not None or self.arrivals - self._oldest >= self.max_wait

    def push(self, length: int, sample: Sample) -> None:
        """Take in a sample of `length` steps.

        Raises:
            TypeError: The length is not an int.
            ValueError: It is negative.
            LengthError: It alone exceeds the budget, and `overlong` is `"error"`.
        """
        length = check_count("length", length, least=0, hint="steps of a sample")
        arrival = self.arrivals
        self.arrivals += 1
        if arrival < self._replays_until and self._out >> (arrival - self._oldest) & 1:
            return
        if not self.budget.fits(1, (length,), length) and not self._keeps_overlong(length, arrival):
            return
        insort(self._order, (length, arrival))
        self._waiting[arrival] = length, sample

    def pop(self) -> list[Sample]:
        """The next batch, shortest sample first.

        Raises:
            IndexError: No sample waits.
        """
        if not self._order:
            raise IndexError("no sample waits: push one before you pop")
        anchor = self._oldest if self._urgent is None else self._urgent
        start = bisect_left(self._order, (self._waiting[anchor][0], anchor))
        low, high = (start, start + 1) if self._urgent is not None else self._grow(start)
        self._urgent = None
        taken = [arrival for _, arrival in self._order[low:high]]
        del self._order[low:high]
        self._mark_out(taken)
        return [self._waiting.pop(arrival)[1] for arrival in taken]

    def batches_of(self, source: Iterable[tuple[int, Sample]]) -> Iterator[list[Sample]]:
        """All batches of a stream of (length, sample), the rest of the buffer included.

        Yields:
            Batches, each as soon as it is due.
        """
        for length, sample in source:
            self.push(length, sample)
            while self.is_due:
                yield self.pop()
        while self._order:
            yield self.pop()

    def state_dict(self) -> State:
        """What is needed to go on: small, primitive and fresh. No sample is in it: the source must give them again.

        Returns:
            `oldest` is the arrival from which the source must be replayed, `emitted` which ones since then are out.
        """
        return {
            "version": VERSION,
            "oldest": self._oldest,
            "arrivals": max(self.arrivals, self._replays_until),
            "emitted": f"{self._out:x}",
            "dropped": self.dropped,
            "alone": self.alone,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a state; the next sample pushed must be the one that was arrival number `state["oldest"]`.

        Raises:
            ValueError: The state is of another version.
        """
        if state.get("version") != VERSION:
            raise ValueError(
                f"the state is of version {state.get('version')}, this bucketer reads {VERSION}: start anew"
            )
        self._order, self._waiting, self._urgent = [], {}, None
        self._oldest = self.arrivals = state["oldest"]
        self._replays_until, self._out = state["arrivals"], int(state["emitted"], 16)
        self.dropped, self.alone = state["dropped"], state["alone"]

    def _keeps_overlong(self, length: int, arrival: int) -> bool:
        if self.overlong == "error":
            raise LengthError(
                f"the sample at arrival {arrival} has {length} steps, which alone exceeds the budget: raise "
                "the budget, cut the sample, or set overlong to 'drop' or 'alone'"
            )
        if self.overlong == "drop":
            self.dropped += 1
            self._mark_out([arrival])
            return False
        self.alone += arrival >= self._replays_until
        self._urgent = arrival
        return True

    def _grow(self, start: int) -> tuple[int, int]:
        """The run of neighbours around a place that the budget holds; each step adds the side that pads less."""
        order, fits = self._order, self.budget.fits
        low, high = start, start + 1
        width = tokens = order[start][0]
        while True:
            # Padding that each side would add; a side that ends, or does not fit, ends for good.
            left = width - order[low - 1][0] if low else None
            right = (order[high][0] - width) * (high - low) if high < len(order) else None
            if right is not None and (left is None or right <= left):
                length = order[high][0]
                if fits(high - low + 1, (length,), tokens + length):
                    width, high, tokens = length, high + 1, tokens + length
                    continue
            if left is None:
                return low, high
            length = order[low - 1][0]
            if not fits(high - low + 1, (width,), tokens + length):
                return low, high
            low, tokens = low - 1, tokens + length

    def _mark_out(self, arrivals: list[int]) -> None:
        for arrival in arrivals:
            self._out |= 1 << (arrival - self._oldest)
        passed = (~self._out & (self._out + 1)).bit_length() - 1
        self._out >>= passed
        self._oldest += passed
