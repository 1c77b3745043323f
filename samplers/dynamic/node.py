"""Bucketing as a node of torchdata, with a state that is small and can be restored in the middle of an epoch."""

from collections import deque
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, Final, Generic, cast

from torchdata.nodes import BaseNode, IterableWrapper, SamplerWrapper
from torchdata.nodes.types import Stateful

from samplers.dynamic.buffer import SampleT
from samplers.dynamic.pack_stage import PacksRows, pack_by_length
from samplers.dynamic.packer import Packer
from samplers.dynamic.sample_length import Length
from samplers.dynamic.stage import StreamStage, bucket_by_length, report_overlong
from samplers.testing import same_items

# A source's state may be large. So it is taken once in 64 arrivals.
SNAPSHOT_EVERY: Final = 64

# Under these keys a wrapper of torchdata stores the state of its iterable or sampler.
_OF_ITERABLES: Final = frozenset({IterableWrapper.ITERABLE_KEY, SamplerWrapper.SAMPLER_KEY})
# Marks a state from which the epoch cannot resume.
_STALE: Final = "source_had_not_begun"
_UNKNOWN: Final = object()


class StreamNode(BaseNode[list[SampleT]], Generic[SampleT]):
    """A torchdata node that turns a node of samples into batches, through a buffer.

    Its state has no samples. It has the state of the source at a snapshot before the oldest waiting sample, and which
    later samples were emitted. After a restore the node reads the source again from the snapshot. So the source must
    give the same samples in the same order. If the source is a stateful iterable written as a generator, it does not
    know that an epoch has begun until it has given a sample. So a state that is saved before the first batch of a
    second or later epoch is refused. Put a `Prefetcher` behind this node, not before it.

    For example, with a snapshot at arrival 64, a state where the samples 70 and 75 of 80 still wait resumes so: the
    source starts at 64, the samples 64 to 69 are skipped, and of the samples from 70 on those that were emitted are
    skipped too.

    Args:
        source: A node of samples.
        stage: Makes the buffer.
    """

    def __init__(self, source: BaseNode[SampleT], stage: StreamStage[SampleT]) -> None:
        super().__init__()
        self.source = source
        self._stage = stage
        self._bucketer = self._stage.new_bucketer()
        # The source's state before its first sample. None if this node was first reset with a state.
        self._at_first: Any = _UNKNOWN
        # Parts of the source's state that, right after `reset`, still describe the end of the epoch before.
        self._stale: dict[tuple[Any, ...], Any] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.source).__name__}, {self._stage.describe()})"

    @property
    def dropped(self) -> int:
        """Number of over-long samples that this epoch has left out so far."""
        return self._bucketer.dropped

    @property
    def too_short(self) -> int:
        """Number of samples of this epoch so far that `min_length` has left out."""
        return self._bucketer.too_short

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Skipped samples so far, in all epochs: `{shard: {reason: count}}`."""
        return self._stage.skipped

    @property
    def alone(self) -> int:
        """Number of over-long samples of this epoch so far in a batch of one."""
        return self._bucketer.alone

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Begin a new epoch, or resume from a state.

        Raises:
            ValueError: The state is of another version or damaged, of a longer source, or was saved when the source did
                not know that the epoch had begun.
        """
        super().reset(initial_state)
        if initial_state is None:
            first, source = 0, self._begin_source()
            self._bucketer = self._stage.new_bucketer()
        else:
            _refuse_foreign(initial_state)
            _refuse_stale(initial_state)
            self._at_first = None if self._at_first is _UNKNOWN else self._at_first
            self._stale = {}
            self._bucketer = self._stage.new_bucketer()
            self._bucketer.load_state_dict(initial_state["bucketer"])
            first, source = initial_state["source_arrival"], deepcopy(initial_state["source"])
            # A copy for the source, because a source may change the state that it gets.
            self.source.reset(deepcopy(source))
            self._pass_over(self._bucketer.oldest - first)
        self._snapshots: deque[tuple[int, dict[str, Any]]] = deque([(first, source)])

    def _begin_source(self) -> dict[str, Any]:
        """Reset the source, and note which parts of its state are stale."""
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
            StopIteration: The source has ended, and all samples are emitted.
            KeyError: A sample lacks the field.
            TypeError: A length is not an int.
            LengthError: A length is negative, or a sample alone exceeds the budget and `overlong` is `"error"`.
            RuntimeError: Too many samples were skipped. The message lists them.
        """
        while not self._bucketer.ended and not self._bucketer.is_due:
            self._take_one()
        if not len(self._bucketer):
            raise StopIteration
        return self._bucketer.pop()

    def get_state(self) -> dict[str, Any]:
        """The state of the epoch. Its values are primitive, except for those in the source's own state."""
        self._keep_snapshot()
        self._forget_snapshots()
        arrival, source = self._snapshots[0]
        state = {"source_arrival": arrival, "source": deepcopy(source), "bucketer": self._bucketer.state_dict()}
        return state | ({_STALE: True} if self._stale and arrival == 0 else {})

    def _take_one(self) -> None:
        """Move the next sample of the source into the buffer."""
        self._keep_snapshot()
        try:
            sample = next(self.source)
        except StopIteration:
            report_overlong(self._bucketer)
            self._stage.end(self._bucketer)
            return
        if self._bucketer.is_repeated:
            self._bucketer.skip()
        else:
            self._stage.push(self._bucketer, sample)

    def _pass_over(self, count: int) -> None:
        """Skip samples of the source.

        Raises:
            ValueError: It ends before.
        """
        for passed in range(count):
            try:
                next(self.source)
            except StopIteration:
                raise ValueError(
                    "the source must repeat the samples that it gave before the state was saved, but ended "
                    f"{count - passed} samples before the oldest that waited: restore it with the source it was saved "
                    "with"
                ) from None

    def _keep_snapshot(self) -> None:
        """Take a snapshot of the source, if one is due."""
        arrivals, last = self._bucketer.arrivals, self._snapshots[-1][0]
        # A stale state cannot be resumed from. So take the first one that describes this epoch at once.
        replaces_stale = bool(self._stale) and last == 0 < arrivals
        if not replaces_stale and arrivals - last < SNAPSHOT_EVERY:
            return
        state = deepcopy(self.source.state_dict())
        if replaces_stale:
            now = _iterable_states(state)
            if any(path in now and same_items(part, now[path]) for path, part in self._stale.items()):
                return
        self._snapshots.append((arrivals, state))
        self._forget_snapshots()

    def _forget_snapshots(self) -> None:
        """Drop all snapshots before the last one that is not behind the oldest waiting sample."""
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= self._bucketer.oldest:
            self._snapshots.popleft()


class LengthBucketNode(StreamNode[SampleT]):
    """A torchdata node that turns a node of samples into batches of similar lengths.

    State and sources are those of `StreamNode`: its state has no samples, and the source must give the same samples in
    the same order after a restore. Put a `Prefetcher` behind this node, not before it.

    Args:
        source: A node of samples.
        length: As for `bucket_by_length`.
        options: As for `bucket_by_length`: `max_tokens`, `batch_size`, `cost`, `count_tokens`, `widths`,
            `buffer_size`, `max_wait`, `max_bytes`, `min_length`, `max_length`, `overlong`, `handler`, `max_failed`.

    Raises:
        TypeError: An option is unknown or has the wrong type.
        ValueError: No budget is given, or an option is out of its range.
    """

    def __init__(self, source: BaseNode[SampleT], length: Length, **options: Any) -> None:
        super().__init__(source, bucket_by_length(length, **options))


class PackingNode(PacksRows, StreamNode[SampleT]):
    """A torchdata node that turns a node of samples into batches of full rows.

    State and sources are those of `StreamNode`, as for `LengthBucketNode`.

    Args:
        source: A node of samples.
        length: As for `pack_by_length`.
        options: As for `pack_by_length`: `capacity`, `rows`, `multiple`, `max_documents`, `buffer_size`, `max_wait`,
            `max_bytes`, `min_length`, `max_length`, `overlong`, `handler`, `max_failed`.

    Raises:
        TypeError: An option is unknown or has the wrong type, or `capacity` is missing.
        ValueError: An option is out of its range.
    """

    def __init__(self, source: BaseNode[SampleT], length: Length, **options: Any) -> None:
        super().__init__(source, pack_by_length(length, **options))

    @property
    def _packer(self) -> Packer[SampleT]:
        return cast(Packer[SampleT], self._bucketer)


def _refuse_foreign(state: Mapping[str, Any]) -> None:
    """Refuse the state of something else.

    Raises:
        ValueError: It has not what `get_state` gives.
    """
    lacking = sorted({"source_arrival", "source", "bucketer"} - set(state))
    if lacking:
        raise ValueError(
            f"the state must be what this node's get_state gave, it lacks {', '.join(lacking)}: start without a state"
        )


def _refuse_stale(state: Mapping[str, Any]) -> None:
    """Refuse a state with a stale state of the source.

    Raises:
        ValueError: It has one.
    """
    if state.get(_STALE):
        raise ValueError(
            "the state was saved at the start of an epoch that the source had not begun: until its first sample is "
            "taken, a stateful iterable written as a generator has the state of the end of the epoch before. Save "
            "after some batches, or let the iterable's __iter__ reset its state at once, and yield the samples from "
            "another generator"
        )


def _states_below(source: BaseNode[Any]) -> Iterator[Any]:
    """The states of the iterables and samplers below a node, asked directly: nodes in between may have older ones.

    Yields:
        States.
    """
    nodes: list[Any] = [source]
    seen: set[int] = set()
    while nodes:
        node = nodes.pop()
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
            nodes += [part for part in parts if isinstance(part, BaseNode)]


def _iterable_states(state: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """The states of the iterables and samplers in the state of a node, by their path of keys in it."""
    states = {}
    if isinstance(state, Mapping):
        for key, value in state.items():
            if key in _OF_ITERABLES:
                states[*path, key] = value
            else:
                states |= _iterable_states(value, (*path, key))
    return states
