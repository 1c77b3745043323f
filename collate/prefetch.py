"""Host -> device, a few batches ahead of the step that uses them."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor

from collate.structure import map_parts

Batch = TypeVar("Batch")


class DevicePrefetcher(Generic[Batch]):
    """Wrap a loader so that its batches arrive on the device while the step before is still running.

    On the CPU batches pass straight through. On an accelerator each batch is pinned if the loader did not, copied on a
    stream of its own up to `depth` batches ahead, and handed over with an event for the current stream to wait on. What
    a loader calls `sampler`, `batch_sampler` or `dataset` stays reachable, so that a trainer's `set_epoch` finds it.

    Batches are tensors, objects that have `to` (`LengthTrackedBatch`, `PackedSequence`), mappings, tuples, named tuples
    and lists of these; anything else passes untouched.

    Args:
        loader: any iterable of batches.
        device: where to.
        depth: batches on the way at most; 0 copies when asked.

    Raises:
        TypeError: `depth` is not an int.
        ValueError: `depth` is negative.
    """

    def __init__(self, loader: Any, device: torch.device | str | int, *, depth: int = 2) -> None:
        if isinstance(depth, bool) or not isinstance(depth, int):
            raise TypeError(f"depth must be an int, got {depth!r} of type {type(depth).__name__}")
        if depth < 0:
            raise ValueError(f"depth must not be negative, got {depth}: 0 copies each batch when it is asked for")
        self.loader = loader
        self.device = torch.device(device)
        self.depth = depth
        self._state: Any = None
        self._running: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """One epoch; a pass that is still running is closed."""
        self.close()
        self._state = None
        self._running = self._straight() if self.device.type == "cpu" else self._ahead(Transfer(self.device))
        return self._running

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

    def close(self) -> None:
        """Drop what is on the way, and the loader's iterator with it."""
        if self._running is not None:
            cast("Any", self._running).close()
            self._running = None

    def state_dict(self) -> dict[str, Any]:
        """The loader's state after the last batch that was handed over; batches on the way do not count.

        Raises:
            TypeError: The loader has no state of its own.
        """
        self._check_stateful()
        return cast("dict[str, Any]", self.loader.state_dict() if self._state is None else self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the loader go on from a state; what is on the way is dropped.

        Raises:
            TypeError: The loader has no state of its own.
        """
        self._check_stateful()
        self.close()
        self._state = None
        self.loader.load_state_dict(state)

    def _check_stateful(self) -> None:
        if not hasattr(self.loader, "state_dict"):
            raise TypeError(
                f"a {type(self.loader).__name__} has no state: use a StatefulDataLoader, or the sampler's "
                "position and seek"
            )

    def _straight(self) -> Iterator[Batch]:
        for batch in self.loader:
            # Only looking ahead would make the loader's state differ from what was handed over.
            self._state = None
            yield batch

    def _ahead(self, transfer: "Transfer") -> Iterator[Batch]:
        stateful = hasattr(self.loader, "state_dict")
        waiting: deque[tuple[Batch, Any, Any]] = deque()
        for batch in self.loader:
            waiting.append((*transfer.send(batch), self.loader.state_dict() if stateful else None))
            if len(waiting) > self.depth:
                yield self._hand_over(transfer, *waiting.popleft())
        while waiting:
            yield self._hand_over(transfer, *waiting.popleft())

    def _hand_over(self, transfer: "Transfer", batch: Batch, arrived: Any, state: Any) -> Batch:
        self._state = state
        transfer.receive(batch, arrived)
        return batch


class Transfer:
    """Copies on a stream of their own: the only place that touches streams and events.

    Args:
        device: an accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device)

    def send(self, batch: Any) -> tuple[Any, torch.Event]:
        """Begin to copy a batch.

        Returns:
            The batch on the device, not to be read before the event.
        """
        with self.stream:
            moved = moved_to(batch, self.device)
        return moved, self.stream.record_event()

    def receive(self, batch: Any, arrived: torch.Event) -> None:
        """Let the current stream wait for the copy, and the allocator know that this stream uses the batch."""
        current = torch.accelerator.current_stream(self.device)
        current.wait_event(arrived)
        record_stream(batch, current)


def moved_to(batch: Any, device: torch.device) -> Any:
    """The batch on a device, copied without waiting; host tensors are pinned on the way."""
    if hasattr(batch, "to"):
        return (batch.pin_memory() if _can_be_pinned(batch, device) else batch).to(device, non_blocking=True)
    return map_parts(batch, lambda part: moved_to(part, device))


def record_stream(batch: Any, stream: torch.Stream) -> None:
    """Tell the allocator that `stream` uses every tensor of a batch."""
    if hasattr(batch, "record_stream"):
        batch.record_stream(stream)
    else:
        map_parts(batch, lambda part: record_stream(part, stream))


def _can_be_pinned(batch: Any, device: torch.device) -> bool:
    # Only an accelerator reads page-locked memory.
    if device.type in ("cpu", "meta") or not hasattr(batch, "pin_memory"):
        return False
    tensor = batch if isinstance(batch, Tensor) else getattr(batch, "padded", None)
    return not isinstance(tensor, Tensor) or (tensor.is_cpu and not tensor.is_pinned())
