"""Bucketing streams that have no index: a stage for webdataset pipelines and a node for torchdata."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any, Generic, TypeAlias, TypeVar

from torchdata.nodes import BaseNode

from samplers.bucketer import Bucketer, Overlong
from samplers.budget import Budget, Cost

Sample = TypeVar("Sample")
Length: TypeAlias = Callable[[Any], int] | str | int

# Of a sequence's state nothing is known but that it may be large: it is taken once in so many arrivals.
SNAPSHOT_EVERY = 64


def bucket_by_length(
    length: Length,
    *,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    cost: Cost | None = None,
    buffer_size: int = 1000,
    max_wait: int | None = None,
    overlong: Overlong = "error",
) -> "BucketStage[Any]":
    """Make a stage that turns a stream of samples into batches alike in length.

    Args:
        length: a sample's steps: a function, or the field of the sample that holds the sequence (or the number).
        max_tokens: rows x longest row of a batch, at most.
        batch_size: rows of a batch, at most.
        cost: `cost(rows, width)`, vectorised and monotone; a batch fits where it is at most 1.
        buffer_size: samples that wait at most; more pads less.
        max_wait: arrivals for which a sample waits at most; None is three times the buffer.
        overlong: what becomes of a sample that alone exceeds the budget: `"error"`, `"drop"` or `"alone"`.

    Returns:
        For `wds.DataPipeline` and `.compose`: called with an iterable of samples it gives an iterator of lists. It can
        be pickled, and keeps nothing between runs. Every sample comes out once, the rest of the buffer at the end.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: No budget is given, or an option is out of its range.

    Example:
        >>> stage = bucket_by_length(len, max_tokens=6, buffer_size=4)
        >>> list(stage(["a", "bbb", "cc", "ddd", "e"]))
        [['a', 'cc'], ['bbb', 'ddd'], ['e']]
    """
    budget = Budget(max_tokens=max_tokens, batch_size=batch_size, cost=cost)
    return BucketStage(length, budget, buffer_size=buffer_size, max_wait=max_wait, overlong=overlong)


class BucketStage(Generic[Sample]):
    """What `bucket_by_length` makes.

    Args:
        length: a sample's steps, as there.
        budget: what a batch may cost.
        options: those of `Bucketer`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range.
    """

    def __init__(self, length: Length, budget: Budget, **options: Any) -> None:
        self.length, self.budget, self.options = length, budget, options
        # A wrong option is an error here, not in a worker.
        self.new_bucketer()

    def __call__(self, source: Iterable[Sample]) -> Iterator[list[Sample]]:
        """Bucket a stream.

        Raises:
            LengthError: A sample alone exceeds the budget, and `overlong` is `"error"`.
        """
        return self.new_bucketer().batches_of((length_of(sample, self.length), sample) for sample in source)

    def new_bucketer(self) -> Bucketer[Sample]:
        """An empty buffer with these options."""
        return Bucketer(self.budget, **self.options)


class LengthBucketNode(BaseNode[list[Sample]], Generic[Sample]):
    """The same as a node of torchdata: batches alike in length from a node of samples.

    Its state holds no sample, but the source's state a little before the oldest sample that waits, and which samples
    since then are out: restored, it reads these again.

    Args:
        source: a node of samples.
        length: as in `bucket_by_length`, and all options as there.
        options: `max_tokens`, `batch_size`, `cost`, `buffer_size`, `max_wait`, `overlong`.

    Raises:
        TypeError: An option is unknown or has the wrong type.
        ValueError: No budget is given, or an option is out of its range.
    """

    def __init__(self, source: BaseNode[Sample], length: Length, **options: Any) -> None:
        super().__init__()
        self.source = source
        self._stage: BucketStage[Sample] = bucket_by_length(length, **options)

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Begin a new epoch, or go on from a state."""
        super().reset(initial_state)
        self._bucketer = self._stage.new_bucketer()
        if initial_state is None:
            self.source.reset()
            self._snapshots: deque[tuple[int, dict[str, Any]]] = deque([(0, self._source_state())])
            return
        self.source.reset(initial_state["source"])
        self._bucketer.load_state_dict(initial_state["bucketer"])
        self._snapshots = deque([(initial_state["source_arrival"], deepcopy(initial_state["source"]))])
        for _ in range(self._bucketer.oldest - initial_state["source_arrival"]):
            next(self.source)

    def next(self) -> list[Sample]:
        """The next batch.

        Raises:
            StopIteration: The source has ended, and all samples are out.
            LengthError: A sample alone exceeds the budget, and `overlong` is `"error"`.
        """
        while not self._bucketer.is_due:
            self._keep_snapshots()
            try:
                sample = next(self.source)
            except StopIteration:
                break
            self._bucketer.push(length_of(sample, self._stage.length), sample)
        if not len(self._bucketer):
            raise StopIteration
        return self._bucketer.pop()

    def get_state(self) -> dict[str, Any]:
        """Where the epoch stands; primitive but for what the source's own state holds."""
        self._forget_snapshots()
        arrival, source = self._snapshots[0]
        return {"source_arrival": arrival, "source": deepcopy(source), "bucketer": self._bucketer.state_dict()}

    def _source_state(self) -> dict[str, Any]:
        return deepcopy(self.source.state_dict())

    def _keep_snapshots(self) -> None:
        arrivals = self._bucketer.arrivals
        if arrivals - self._snapshots[-1][0] >= SNAPSHOT_EVERY:
            self._snapshots.append((arrivals, self._source_state()))
            self._forget_snapshots()

    def _forget_snapshots(self) -> None:
        """Drop the snapshots that a later one makes needless: the last one before the oldest sample is enough."""
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= self._bucketer.oldest:
            self._snapshots.popleft()


def length_of(sample: Any, length: Length) -> int:
    """A sample's steps, by a function or by the field that holds its sequence or its length.

    Raises:
        KeyError: The sample has no such field.
    """
    if callable(length):
        return length(sample)
    try:
        value = sample[length]
    except (KeyError, IndexError):
        known = list(sample) if isinstance(sample, dict) else f"0 to {len(sample) - 1}"
        raise KeyError(f"length names the field {length!r}, the sample has {known}") from None
    return int(value) if isinstance(value, int) or getattr(value, "shape", None) == () else len(value)
