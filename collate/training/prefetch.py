"""Host -> device, a few batches ahead of the training step that uses them.

The hand-over between streams, with `depth=1`. The copy stream begins to copy batch 1 while the current stream still
computes on batch 0. When batch 1 is asked for, three things happen, in this order:

1. The iterator takes batch 2 from the loader and starts its copy, and records an event behind it.
2. The current stream waits for batch 1's event, which is long over in the normal case; the host never waits.
3. `record_stream` tells the allocator that the current stream uses batch 1. Its memory belongs to the copy stream:
   otherwise a later copy could overwrite batch 1 as soon as Python drops it, before its kernels have run.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any, Generic, Self, TypeVar, cast
from weakref import ref

import torch
from torch import Tensor

from collate.tensors.nested import labelled_parts, map_parts
from collate.widths import check_count

LoaderBatch = TypeVar("LoaderBatch")

_EXHAUSTED: Any = object()


class DevicePrefetcher(Generic[LoaderBatch]):
    """Wrap a loader so that its batches arrive on the device while the training step before is still running.

    On the CPU batches pass straight through. On an accelerator each batch is pinned if the loader did not do it, copied
    on a separate stream up to `depth` batches ahead, and handed over with an event that the current stream waits on.
    The loader's `sampler`, `batch_sampler` and `dataset` stay reachable, so that a trainer's `set_epoch` finds them.
    An error of the loader comes after the batches before it, as it does without the prefetcher. One pass runs at a
    time: when another begins, the earlier one raises a `RuntimeError` at its next batch.

    Batches are tensors, objects that have `to(device, non_blocking=...)` (`LengthTrackedBatch`, `PackedSequence`),
    mappings, tuples, named tuples and lists of these; anything else passes untouched.

    Args:
        loader: Any iterable of batches.
        device: The target.
        depth: Batches on the way at most; 0 copies each batch when it is asked for.

    Raises:
        TypeError: `depth` is not an int.
        ValueError: `depth` is negative.
    """

    def __init__(self, loader: Any, device: torch.device | str | int, *, depth: int = 2) -> None:
        self.loader = loader
        self.device = torch.device(device)
        self.depth = check_count("depth", depth, least=0, hint="0 copies each batch when it is asked for")
        self._loader_position = LoaderPosition(loader)
        self._copies: CopyStream | None = None
        # Weak: an iterator that its user has dropped, as after a break, drops the batches on the way too.
        self._running: ref[PrefetchIterator[LoaderBatch]] | None = None

    def __iter__(self) -> Iterator[LoaderBatch]:
        """One epoch, which begins at its first batch; a pass that is still running is closed, and raises if asked."""
        earlier = None if self._running is None else self._running()
        if earlier is not None:
            earlier.give_way()
        if self.device.type == "cpu":
            running = PrefetchIterator[LoaderBatch](self.loader, self._loader_position, None, 0)
        else:
            # One stream for all epochs: the allocator keeps memory for each stream that it has seen.
            self._copies = self._copies or CopyStream(self.device)
            running = PrefetchIterator[LoaderBatch](self.loader, self._loader_position, self._copies, self.depth)
        self._running = ref(running)
        return running

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.loader).__name__}, {str(self.device)!r}, depth={self.depth})"

    def __len__(self) -> int:
        """The loader's own length."""
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name in ("sampler", "batch_sampler", "dataset"):
            return getattr(self.loader, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # A pass that is under way stays with the original, and so does its stream.
        return self.__dict__ | {"_running": None, "_copies": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles up to release 0.2 have these two under other names.
        former = {"_bookmark": "_loader_position", "_transfer": "_copies"}
        self.__dict__.update({former.get(name, name): value for name, value in state.items()})

    def close(self) -> None:
        """Drop the batches on the way, and the loader's iterator with them."""
        running = None if self._running is None else self._running()
        if running is not None:
            running.close()

    def state_dict(self) -> dict[str, Any]:
        """The loader's state after the last batch that was handed over; batches on the way do not count.

        It is the loader's own state, as of a `StatefulDataLoader`. For a plain loader it is the `position` of its batch
        sampler or dataset, such as `LengthBucketBatchSampler` or `ShardStream`; after an epoch's last batch that leads
        to an empty pass, and then to the next epoch.

        Raises:
            TypeError: The loader has neither a state nor a position.
        """
        return self._loader_position.read()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the loader resume from a state; batches on the way are dropped.

        Raises:
            TypeError: The loader cannot resume from a state.
        """
        self.close()
        self._loader_position.load(state)


class PrefetchIterator(Iterator[LoaderBatch]):
    """One pass over a loader: batches are taken ahead and handed over in order.

    It raises what the loader raises, and a `RuntimeError` where another pass has begun.

    Args:
        loader: Source of the batches; it is opened for the first one.
        loader_position: Learns the loader's state whenever a batch is handed over.
        copies: Sends batches to a device; None leaves them as they are.
        depth: Batches taken ahead.
    """

    def __init__(
        self, loader: Iterable[LoaderBatch], loader_position: "LoaderPosition", copies: "CopyStream | None", depth: int
    ) -> None:
        self._loader = loader
        self._loader_position = loader_position
        self._copies = copies
        self._depth = depth
        self._source: Iterator[LoaderBatch] | None = None
        self._taken = 0
        self._queue: deque[tuple[LoaderBatch, Any, Any]] = deque()
        self._error: Exception | None = None
        self._finished = False
        self._gave_way = False
        self._handed_over = 0

    def __next__(self) -> LoaderBatch:
        if self._gave_way:
            raise RuntimeError(
                f"this pass ended after {self._handed_over} batches, because another pass over the same prefetcher "
                "began, and one runs at a time: wrap the loader once for each loop, or keep what is needed twice in a "
                "list"
            )
        self._fill()
        if not self._queue:
            self._end()
        batch, arrived, state = self._queue.popleft()
        self._handed_over += 1
        if self._copies is not None:
            self._copies.receive(batch, arrived)
        self._loader_position.state = state
        return batch

    def give_way(self) -> None:
        """End the pass here, for another: its next batch raises, unless it has given all."""
        self._gave_way = not self._finished or bool(self._queue) or self._error is not None
        self.close()

    def close(self) -> None:
        """End the pass here; batches on the way are dropped."""
        self._queue.clear()
        # Dropping a loader's iterator ends its workers.
        self._source = self._error = None
        self._finished = True

    def _fill(self) -> None:
        """Take batches until `depth` are waiting behind the next one."""
        while not self._finished and self._error is None and len(self._queue) <= self._depth:
            try:
                self._take()
            except Exception as error:
                if not self._queue:
                    raise
                self._error = error

    def _take(self) -> None:
        """Take one batch from the loader and start its copy."""
        if self._source is None:
            self._source = iter(self._loader)
        batch = next(self._source, _EXHAUSTED)
        if batch is _EXHAUSTED:
            self._finished = True
            return
        self._taken += 1
        state = self._loader_position.after(self._taken, ahead=self._depth > 0)
        arrived = None
        if self._copies is not None:
            batch, arrived = self._copies.send(batch)
        self._queue.append((batch, arrived, state))

    def _end(self) -> None:
        """Raise the loader's error, or the end of the pass.

        Raises:
            StopIteration: The loader has no more batches.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._source is not None:
            self._source = None
            self._loader_position.finish()
        raise StopIteration


class LoaderPosition:
    """The loader's position after the batches that were handed over, which are fewer than it has given.

    Args:
        loader: It has `state_dict`, or a batch sampler or dataset with `position`, `next_position` and `seek`, or
            neither.

    Attributes:
        state: The state after the last batch that was handed over, or the position and where its pass began; None if
            the loader itself has the state.
    """

    def __init__(self, loader: Any) -> None:
        self.state: Any = None
        self._start: Any = None
        self._loader = loader
        self._stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        parts = [loader, *(getattr(loader, name, None) for name in ("batch_sampler", "sampler", "dataset"))]
        self._seekable: Any = next((part for part in parts if hasattr(part, "next_position")), None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_seekable" if name == "_placed" else name: value for name, value in state.items()})

    def after(self, taken: int, *, ahead: bool) -> Any:
        """The state after the batch that the loader has just given, its `taken`-th of this pass."""
        if self._stateful:
            # A loader without workers may return an object that its dataset changes later.
            return deepcopy(self._loader.state_dict()) if ahead else None
        if self._seekable is None:
            return None
        if taken == 1:
            self._start = self._mark()
        return self._seekable.position(taken), self._start

    def finish(self) -> None:
        """Note that all batches were handed over: a loader with a state of its own knows what comes next."""
        if self._stateful:
            self.state = None

    def read(self) -> dict[str, Any]:
        """The state after the last batch that was handed over.

        Raises:
            TypeError: There is none.
        """
        self._check()
        if self._stateful:
            state = self._loader.state_dict() if self.state is None else deepcopy(self.state)
        else:
            # If another epoch was set or a position was sought since, the next pass does not continue the last one.
            resumes = self.state is not None and self.state[1] == self._mark()
            state = dict(self.state[0]) if resumes else self._seekable.next_position
        return cast("dict[str, Any]", state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Let the loader resume from a state.

        Raises:
            TypeError: It cannot.
        """
        self._check()
        self.state = None
        if self._stateful:
            self._loader.load_state_dict(state)
        else:
            self._seekable.seek(state)

    def _mark(self) -> tuple[Any, Any]:
        """Where the present pass began and where the next one will; `set_epoch` and `seek` change the latter."""
        return self._seekable.position(0), self._seekable.next_position

    def _check(self) -> None:
        """Check that there is a state to read.

        Raises:
            TypeError: There is none.
        """
        if not self._stateful and self._seekable is None:
            raise TypeError(
                f"a {type(self._loader).__name__} has no state, nor has its batch sampler or dataset a position: use a "
                "StatefulDataLoader, or a LengthBucketBatchSampler"
            )


# The class's name in pickles of releases 0.1 and 0.2.
Bookmark = LoaderPosition


class CopyStream:
    """Copies on a separate stream: the only class that touches streams and events.

    Args:
        device: An accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.Stream(device)
        # The stream's device has an index, so that it stays the same when the current device changes.
        self.device = self.stream.device

    def send(self, batch: Any) -> tuple[Any, torch.Event]:
        """Start to copy a batch.

        Returns:
            The batch on the device, not to be read before the event.
        """
        with self.stream:
            moved = moved_to(batch, self.device)
        return moved, self.stream.record_event()

    def receive(self, batch: Any, arrived: torch.Event) -> None:
        """Make the current stream wait for the copy, and tell the allocator that this stream uses the batch."""
        current = torch.accelerator.current_stream(self.device)
        # An accelerator with a single stream keeps the order by itself.
        if current != self.stream:
            current.wait_event(arrived)
            record_stream(batch, current)


def moved_to(batch: Any, device: torch.device) -> Any:
    """The batch on a device, copied without waiting; host tensors are pinned on the way."""
    if hasattr(batch, "to"):
        return (batch.pin_memory() if _can_be_pinned(batch, device) else batch).to(device, non_blocking=True)
    return map_parts(batch, lambda part: moved_to(part, device))


def record_stream(batch: Any, stream: torch.Stream) -> None:
    """Tell the allocator that `stream` uses every tensor of a batch; tensors on the host do not need it."""
    if hasattr(batch, "record_stream") and not (isinstance(batch, Tensor) and batch.is_cpu):
        batch.record_stream(stream)
    else:
        for part in _parts_in(batch):
            record_stream(part, stream)


def _can_be_pinned(batch: Any, device: torch.device) -> bool:
    """Whether a batch is on the host, not pinned, and its target reads page-locked memory."""
    # Only an accelerator reads page-locked memory; torch does not copy tensors that are pinned already.
    if device.type in ("cpu", "meta") or not hasattr(batch, "pin_memory"):
        return False
    first = next(_tensors_of(batch), None)
    return first is not None and first.is_cpu


def _tensors_of(batch: Any) -> Iterator[Tensor]:
    """All tensors in a batch.

    Yields:
        The tensors.
    """
    if isinstance(batch, Tensor):
        yield batch
    else:
        for part in _parts_in(batch):
            yield from _tensors_of(part)


def _parts_in(batch: Any) -> Iterable[Any]:
    """The parts of a container, or of an object with `to`; a tensor or any other object has none."""
    if isinstance(batch, Tensor):
        return ()
    if isinstance(batch, (Mapping, tuple, list)):
        return [part for _, part in labelled_parts(batch)]
    if not hasattr(batch, "to"):
        return ()
    if is_dataclass(batch):
        return [getattr(batch, field.name) for field in fields(batch)]
    return vars(batch).values() if hasattr(batch, "__dict__") else ()
