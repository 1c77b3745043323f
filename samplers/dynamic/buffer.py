"""StreamBuffer: samples of a stream that wait, sorted by size, and a small state to resume from."""

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Final, Generic, TypeVar

import numpy as np

from collate.errors import LengthError
from collate.widths import check_count

SampleT = TypeVar("SampleT")
BucketerState = dict[str, Any]

BUCKETER_VERSION: Final = 1


class StreamBuffer(ABC, Generic[SampleT]):
    """A buffer of samples: push each sample, pop a batch whenever one is due, and pop all batches at the end.

    Args:
        buffer_size: Largest number of samples in the buffer.
        max_wait: Largest number of arrivals for which a sample waits. None is three times the buffer.
        max_bytes: Largest number of bytes in the buffer, as `bytes_of` counts them. None is no limit, and nothing is
            counted. The newest sample may exceed the limit until the batches it triggers are emitted.
        min_length: Shorter samples are left out, counted in `too_short`.
        max_length: Longer samples count as this long.
        overlong: What to do with a sample that does not fit alone.

    Attributes:
        arrivals: Number of samples that came from the source.
        dropped: Number of over-long samples that were left out.
        alone: Number of over-long samples in a batch of one.
        too_short: Number of samples that `min_length` left out.
        ended: Whether the source has ended.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below one, or `overlong` is unknown.
    """

    # Pickles of earlier releases have none of these.
    min_length = 0
    max_length: int | None = None
    too_short = 0
    # What `overlong` may be.
    choices: ClassVar[tuple[str, ...]] = ("error", "drop")

    def __init__(
        self,
        *,
        buffer_size: int,
        max_wait: int | None = None,
        max_bytes: int | None = None,
        min_length: int = 0,
        max_length: int | None = None,
        overlong: str = "error",
    ) -> None:
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
        self.min_length = check_count("min_length", min_length, least=0, hint="0 keeps every sample")
        self.max_length = max_length
        if max_length is not None:
            self.max_length = check_count("max_length", max_length, least=1, hint="give None for no limit")
        if overlong not in self.choices:
            raise ValueError(f"overlong must be {_either(self.choices)}, got {overlong!r}")
        self.overlong = overlong
        self.arrivals = self.dropped = self.alone = self.too_short = 0
        # The waiting samples by arrival: size, sample, bytes (0 if not counted).
        self._waiting: dict[int, tuple[int, SampleT, int]] = {}
        self._held = 0
        self.ended = False
        # Byte i is 1 if arrival `_oldest + i` is out of the buffer. Byte 0 is always 0. After a state is loaded there
        # are bytes behind `arrivals`, until the source has repeated the samples that it gave before.
        self._oldest = 0
        self._out = bytearray()

    def __len__(self) -> int:
        return len(self._waiting)

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
        waiting = len(self._waiting)
        if not waiting or self.arrivals < self._oldest + len(self._out):
            return False
        if waiting >= self.buffer_size or self.arrivals - self._oldest >= self.max_wait:
            return True
        return self.max_bytes is not None and self._held > self.max_bytes

    @property
    def is_repeated(self) -> bool:
        """Whether the next sample was emitted before the state was saved, so that it must be skipped."""
        age = self.arrivals - self._oldest
        return age < len(self._out) and bool(self._out[age])

    @abstractmethod
    def pop(self) -> list[SampleT]:
        """The next batch.

        Raises:
            IndexError: No sample waits.
        """

    @abstractmethod
    def _size(self, length: int) -> int | None:
        """The size by which samples of this length are sorted; None if one alone is over-long."""

    @abstractmethod
    def _sort_in(self, size: int, arrival: int) -> None:
        """Add a new sample to those that are sorted by size."""

    @abstractmethod
    def _clear(self) -> None:
        """Forget the order of all samples."""

    @abstractmethod
    def _describe_limit(self) -> str:
        """What an over-long sample exceeds, and what to do, for its message."""

    def end(self) -> None:
        """Note the end of the source."""
        self.ended = True

    def push(self, length: int, sample: SampleT) -> None:
        """Add a sample of `length` steps. After an error the sample does not count as an arrival.

        Raises:
            TypeError: The length is not an int.
            ValueError: The source has ended.
            LengthError: The length is negative, or the sample does not fit alone and `overlong` is `"error"`. A
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
        # A call costs more than the check.
        if type(length) is not int or length < 0:
            length = self._check_length(length, sample)
        if length < self.min_length:
            self.too_short += 1
            self.skip()
            return
        if self.max_length is not None and length > self.max_length:
            length = self.max_length
        held = 0 if self.max_bytes is None else bytes_of(sample)
        size = self._size(length)
        if size is None:
            if self.overlong == "error":
                raise LengthError(
                    f"the sample at arrival {self.arrivals}{_key(sample)} has {length} steps, {self._describe_limit()}"
                )
            if self.overlong == "drop":
                self.dropped += 1
                self.skip()
                return
            self.alone += is_new
            size = length
        self.arrivals += 1
        if is_new:
            self._out.append(0)
        self._sort_in(size, arrival)
        self._waiting[arrival] = size, sample, held
        self._held += held

    def skip(self) -> None:
        """Count a sample of the source that is left out."""
        if self.arrivals == self._oldest + len(self._out):
            self._out.append(0)
        self.arrivals += 1
        self._let_out([self.arrivals - 1])

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
        while self._waiting:
            yield self.pop()

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
        } | ({"too_short": self.too_short} if self.min_length else {})

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
        self._waiting = {}
        self._clear()
        self._held = 0
        self.ended = False
        self._oldest = self.arrivals = oldest
        self._out = bytearray(np.unpackbits(bits, count=arrivals - oldest))
        self.dropped, self.alone = dropped, alone
        # States of earlier releases have none.
        self.too_short = int(state.get("too_short", 0))

    def _take(self, arrivals: list[int]) -> list[SampleT]:
        """Take samples that are no longer in the order out of the buffer."""
        self._let_out(arrivals)
        if self._held:
            self._held -= sum(self._waiting[arrival][2] for arrival in arrivals)
        return [self._waiting.pop(arrival)[1] for arrival in arrivals]

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


def _either(choices: tuple[str, ...]) -> str:
    """Choices as text: 'a', 'b' or 'c'."""
    return f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
