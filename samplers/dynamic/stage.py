"""Bucketing streams that have no index: a stage for webdataset pipelines and a node for torchdata."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, Final, Generic, TypeVar

from torchdata.nodes import BaseNode, IterableWrapper, SamplerWrapper
from torchdata.nodes.types import Stateful

from samplers.dynamic.bucketer import Bucketer
from samplers.dynamic.sample_length import Length, length_of
from samplers.planning.budget import Budget, Cost
from samplers.planning.options import Overlong
from samplers.shards.skipping import Failed, Handler, make_skipping
from samplers.testing import same_items

SampleT = TypeVar("SampleT")

# Of a source's state nothing is known but that it may be large: it is taken once in so many arrivals.
SNAPSHOT_EVERY: Final = 64

# Under these a wrapper of torchdata keeps the state of what it wraps.
_OF_ITERABLES: Final = frozenset({IterableWrapper.ITERABLE_KEY, SamplerWrapper.SAMPLER_KEY})
# In a state from which the epoch cannot be gone on with.
_STALE: Final = "source_had_not_begun"
_UNKNOWN: Final = object()

_logger = logging.getLogger(__name__)


def bucket_by_length(
    length: Length,
    *,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    cost: Cost | None = None,
    buffer_size: int = 1000,
    max_wait: int | None = None,
    max_bytes: int | None = None,
    overlong: Overlong = "error",
    handler: Handler | None = None,
    max_failed: float | None = None,
) -> "BucketStage[Any]":
    """Make a stage that turns a stream of samples into batches alike in length.

    Args:
        length: a sample's steps: a function, or the field of the sample that holds the sequence (or the number). The
            budget counts what it gives: where a collator pads to a multiple, give a function that rounds up as well.
        max_tokens: rows x longest row of a batch, at most.
        batch_size: rows of a batch, at most.
        cost: a measure of one's own: `cost(rows, width) <= 1` fits. It is called with int64 arrays `[n]`, returns `[n]`
            numbers, and must not fall as rows or width grow.
        buffer_size: samples that wait at most; more pads less.
        max_wait: arrivals for which a sample waits at most; None is three times the buffer.
        max_bytes: bytes of the samples that wait, at most: when they are more, a batch is given though the buffer is
            not full. Arrays and tensors count as their `nbytes`, other objects as `sys.getsizeof`, with all that
            mappings, lists, tuples, sets and dataclasses hold. None counts nothing.
        overlong: what becomes of a sample that alone exceeds the budget: `"error"`, `"drop"` or `"alone"` (a batch of
            one); how many is logged when the stream ends.
        handler: what becomes of a sample without a length, or over the budget with `overlong="error"`: a function from
            the error to True to skip it, or False to raise, as `webdataset.warn_and_continue`; None raises. Errors of
            the source are raised in any case: the stages before take handlers of their own.
        max_failed: the share of samples that may be skipped, 0 to 1; None is a tenth, but no fewer than 99.

    Returns:
        For `wds.DataPipeline` and `.compose`: called with an iterable of samples it gives an iterator of lists, each
        shortest first. It can be pickled, and keeps nothing between runs but `skipped`. Every sample comes out once,
        the rest of the buffer at the end; `with_epoch` of the same pipeline counts batches and cuts that off, wherever
        it is called; of a pipeline that comes before it, it counts samples.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: No budget is given, or an option is out of its range.

    Example:
        >>> stage = bucket_by_length(len, max_tokens=6, buffer_size=4)
        >>> list(stage(["a", "bbb", "cc", "ddd", "e"]))
        [['a', 'cc'], ['bbb', 'ddd'], ['e']]
    """
    budget = Budget(max_tokens=max_tokens, batch_size=batch_size, cost=cost)
    options = {"buffer_size": buffer_size, "max_wait": max_wait, "max_bytes": max_bytes, "overlong": overlong}
    return BucketStage(length, budget, handler=handler, max_failed=max_failed, **options)


class BucketStage(Generic[SampleT]):
    """What `bucket_by_length` makes.

    Args:
        length: a sample's steps, as there.
        budget: what a batch may cost.
        handler: what becomes of a sample without a length.
        max_failed: the share of samples that may be skipped.
        options: those of `Bucketer`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        length: Length,
        budget: Budget,
        *,
        handler: Handler | None = None,
        max_failed: float | None = None,
        **options: Any,
    ) -> None:
        if isinstance(length, bool) or not (callable(length) or isinstance(length, (str, int))):
            raise TypeError(f"length must be a function or the name or number of a field, got {length!r}")
        self.length, self.budget, self.options = length, budget, options
        self._skipping = make_skipping(handler, max_failed)
        # A wrong option is an error here, not in a worker.
        self.new_bucketer()

    def __call__(self, source: Iterable[SampleT]) -> Iterator[list[SampleT]]:
        """Bucket a stream.

        Yields:
            Batches, each as soon as it is due.

        Raises:
            KeyError: A sample lacks the field.
            TypeError: A length is not an int.
            ValueError: A length is negative.
            LengthError: A sample alone exceeds the budget, and `overlong` is `"error"`.
            RuntimeError: Too many samples were skipped; they are listed.
        """
        bucketer = self.new_bucketer()
        try:
            if self._skipping is None:
                yield from bucketer.batches_of((length_of(sample, self.length), sample) for sample in source)
            else:
                yield from self._sift(bucketer, source)
        finally:
            _report(bucketer)
            if len(bucketer):
                _logger.info("the stream was closed with %d samples in the buffer, which no batch held", len(bucketer))

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Samples that were skipped so far, in all workers: `{shard: {reason: count}}`, as in `ShardDataset`.

        The shard is a sample's `__url__`, or "".
        """
        return {} if self._skipping is None else self._skipping.counts

    def new_bucketer(self) -> Bucketer[SampleT]:
        """An empty buffer with these options."""
        return Bucketer(self.budget, **self.options)

    def push(self, bucketer: Bucketer[SampleT], sample: SampleT) -> None:
        """Put a sample into a buffer, or skip it; it has come in any case. The errors are those of a stream."""
        try:
            bucketer.push(length_of(sample, self.length), sample)
        except Exception as error:
            # The source has gone on; whoever goes on after the error must count with it.
            bucketer.skip()
            if self._skipping is None:
                raise
            about = sample if isinstance(sample, Mapping) else {}
            self._skipping.skip(Failed(error, str(about.get("__key__", "")), str(about.get("__url__", ""))))
        else:
            if self._skipping is not None:
                self._skipping.take()

    def end(self, bucketer: Bucketer[SampleT]) -> None:
        """Tell a buffer that its source has ended.

        Raises:
            RuntimeError: Too many samples were skipped; they are listed.
        """
        bucketer.end()
        if self._skipping is not None:
            self._skipping.finish()

    def _sift(self, bucketer: Bucketer[SampleT], source: Iterable[SampleT]) -> Iterator[list[SampleT]]:
        for sample in source:
            self.push(bucketer, sample)
            while bucketer.is_due:
                yield bucketer.pop()
        self.end(bucketer)
        while len(bucketer):
            yield bucketer.pop()


class LengthBucketNode(BaseNode[list[SampleT]], Generic[SampleT]):
    """The same as a node of torchdata: batches alike in length from a node of samples.

    Its state holds no sample, but the source's state a little before the oldest sample that waits, and which samples
    since then are out: restored, it reads these again. The source must give the same samples in the same order. A
    stateful iterable that is written as a generator cannot tell that an epoch has begun before it has given a sample: a
    state that was saved before the first batch of any epoch but the first is refused. A `Prefetcher` stands behind this
    node, not before it.

    Args:
        source: a node of samples.
        length: as in `bucket_by_length`, and all options as there.
        options: `max_tokens`, `batch_size`, `cost`, `buffer_size`, `max_wait`, `max_bytes`,
            `overlong`, `handler`, `max_failed`.

    Raises:
        TypeError: An option is unknown or has the wrong type.
        ValueError: No budget is given, or an option is out of its range.
    """

    def __init__(self, source: BaseNode[SampleT], length: Length, **options: Any) -> None:
        super().__init__()
        self.source = source
        self._stage: BucketStage[SampleT] = bucket_by_length(length, **options)
        self._bucketer = self._stage.new_bucketer()
        # The source's state before it gave anything; None where this node's life began with a state.
        self._at_first: Any = _UNKNOWN
        # What in the source's state, right after `reset`, still tells where the epoch before stopped.
        self._stale: dict[tuple[Any, ...], Any] = {}

    @property
    def dropped(self) -> int:
        """Over-long samples that this epoch has left out so far."""
        return self._bucketer.dropped

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Samples that were skipped so far, in all epochs: `{shard: {reason: count}}`."""
        return self._stage.skipped

    @property
    def alone(self) -> int:
        """Over-long samples of this epoch so far that are a batch of one."""
        return self._bucketer.alone

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Begin a new epoch, or go on from a state.

        Raises:
            ValueError: The state is of another version or damaged, of a longer source, or was saved when the source
                could not tell that it had begun the epoch.
        """
        super().reset(initial_state)
        if initial_state is None:
            first, source = 0, self._begin_source()
            self._bucketer = self._stage.new_bucketer()
        else:
            _refuse_stale(initial_state)
            self._at_first = None if self._at_first is _UNKNOWN else self._at_first
            self._stale = {}
            self._bucketer = self._stage.new_bucketer()
            self._bucketer.load_state_dict(initial_state["bucketer"])
            first, source = initial_state["source_arrival"], deepcopy(initial_state["source"])
            # A copy of its own, since a source may go on writing in what it is given.
            self.source.reset(deepcopy(source))
            self._pass_over(self._bucketer.oldest - first)
        self._snapshots: deque[tuple[int, dict[str, Any]]] = deque([(first, source)])

    def _begin_source(self) -> dict[str, Any]:
        """Let the source begin an epoch, and note whether its state tells so."""
        before = [] if self._at_first is _UNKNOWN else [deepcopy(state) for state in _states_below(self.source)]
        self.source.reset()
        state = deepcopy(self.source.state_dict())
        if self._at_first is _UNKNOWN:
            self._at_first = state
        first, new = _iterable_states(self._at_first), _iterable_states(state)
        self._stale = {
            path: part
            for path, part in new.items()
            if any(same_items(part, old) for old in before) and not (path in first and same_items(part, first[path]))
        }
        return state

    def next(self) -> list[SampleT]:
        """The next batch, shortest sample first.

        Raises:
            StopIteration: The source has ended, and all samples are out.
            KeyError: A sample lacks the field.
            TypeError: A length is not an int.
            ValueError: A length is negative.
            LengthError: A sample alone exceeds the budget, and `overlong` is `"error"`.
            RuntimeError: Too many samples were skipped; they are listed.
        """
        while not self._bucketer.ended and not self._bucketer.is_due:
            self._take_one()
        if not len(self._bucketer):
            raise StopIteration
        return self._bucketer.pop()

    def get_state(self) -> dict[str, Any]:
        """Where the epoch stands; primitive but for what the source's own state holds."""
        self._keep_snapshot()
        self._forget_snapshots()
        arrival, source = self._snapshots[0]
        state = {"source_arrival": arrival, "source": deepcopy(source), "bucketer": self._bucketer.state_dict()}
        return state | ({_STALE: True} if self._stale and arrival == 0 else {})

    def _take_one(self) -> None:
        self._keep_snapshot()
        try:
            sample = next(self.source)
        except StopIteration:
            _report(self._bucketer)
            self._stage.end(self._bucketer)
            return
        if self._bucketer.is_repeated:
            self._bucketer.skip()
        else:
            self._stage.push(self._bucketer, sample)

    def _pass_over(self, count: int) -> None:
        for passed in range(count):
            try:
                next(self.source)
            except StopIteration:
                raise ValueError(
                    f"the source must give again what it gave before the state was saved, but ended {count - passed} "
                    "samples before the oldest that waited: restore it with the source it was saved with"
                ) from None

    def _keep_snapshot(self) -> None:
        arrivals, last = self._bucketer.arrivals, self._snapshots[-1][0]
        # The state at the start leads nowhere: the first one that tells of this epoch is wanted at once.
        wanted = bool(self._stale) and last == 0 < arrivals
        if not wanted and arrivals - last < SNAPSHOT_EVERY:
            return
        state = deepcopy(self.source.state_dict())
        if wanted:
            now = _iterable_states(state)
            if any(path in now and same_items(part, now[path]) for path, part in self._stale.items()):
                return
        self._snapshots.append((arrivals, state))
        self._forget_snapshots()

    def _forget_snapshots(self) -> None:
        """Drop the snapshots that a later one makes needless: the last one before the oldest sample is enough."""
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= self._bucketer.oldest:
            self._snapshots.popleft()


def _refuse_stale(state: Mapping[str, Any]) -> None:
    if state.get(_STALE):
        raise ValueError(
            "the state was saved at the start of an epoch that the source had not begun: a stateful iterable written "
            "as a generator tells, until its first sample is taken, where the epoch before stopped. Save after some "
            "batches, or let the iterable's __iter__ set its state back at once, and give the samples from a generator "
            "of its own"
        )


def _states_below(source: BaseNode[Any]) -> Iterator[Any]:
    """What the iterables and samplers below a node tell of themselves, whatever the nodes between remember.

    Yields:
        A state.
    """
    ahead: list[Any] = [source]
    seen: set[int] = set()
    while ahead:
        node = ahead.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        wrapped = getattr(node, "iterable", getattr(node, "sampler", None))
        if isinstance(node, (IterableWrapper, SamplerWrapper)) and isinstance(wrapped, Stateful):
            yield wrapped.state_dict()
        for value in vars(node).values():
            parts = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            ahead += [part for part in parts if isinstance(part, BaseNode)]


def _iterable_states(state: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """What the iterables and samplers below a node tell of themselves, by where it stands in the node's state."""
    found = {}
    if isinstance(state, Mapping):
        for key, value in state.items():
            if key in _OF_ITERABLES:
                found[*path, key] = value
            else:
                found |= _iterable_states(value, (*path, key))
    return found


def _report(bucketer: Bucketer[Any]) -> None:
    """Say what a named option has left out or set apart."""
    if bucketer.dropped or bucketer.alone:
        _logger.warning(
            "of %d samples %d over the budget were dropped, and %d are a batch of one",
            bucketer.arrivals,
            bucketer.dropped,
            bucketer.alone,
        )
