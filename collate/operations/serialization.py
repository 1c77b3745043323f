"""How a batch is sent and saved: pickle, queues between processes, weights-only loading, pytrees."""

from collections.abc import Callable, Iterable
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from collate.lengths.tracking import TrackedBatch, host_lengths
from collate.operations.construct import TENSOR_FIELDS, BatchT, trusted_batch, unchecked_batch
from collate.tensors.numpy_view import to_array
from collate.tensors.steps import PaddingValue

# Bytes of values that are sent to another process through the pipe itself. To share memory and hand over its descriptor
# takes half a millisecond, in which a pipe carries more than this.
THROUGH_PIPE: Final = 1 << 19


_PACKAGE: Final = __name__.split(".")[0]


def travels(cls: type[BatchT]) -> type[BatchT]:
    """Make a class of batches known to pytrees and to `torch.load` at its weights-only default."""

    def unflatten(parts: Iterable[object], context: tuple[PaddingValue | None, int]) -> BatchT:
        return unchecked_batch(cls, tuple(parts), *context)

    pytree.register_pytree_node(
        cls,
        _flatten,
        unflatten,
        serialized_type_name=_type_name(cls),
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=_flatten_with_keys,
    )
    # Files of release 0.1 name the former module.
    torch.serialization.add_safe_globals([cls, unreduce, (unreduce, "collate.transport.unreduce")])
    ForkingPickler.register(cls, send)
    return cls


def _type_name(cls: type) -> str | None:
    """What an exported program calls the class; one made in a function has no name that is its own."""
    if cls.__module__.split(".")[0] == _PACKAGE:
        return f"lengthtrack.{cls.__name__}"
    return None if "<locals>" in cls.__qualname__ else f"{cls.__module__}.{cls.__qualname__}"


def reduce(batch: BatchT) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What pickle sends: one tensor, and the small integers inline; the mask is derived again on arrival.

    A graph cannot travel, so values that were computed from other tensors are sent without its history.
    """
    padded = batch.padded if batch.padded.is_leaf else batch.padded.detach()
    # torch's queues between processes forget what is conjugated or negated lazily.
    padded = padded.resolve_conj().resolve_neg()
    # A view would ship the whole storage it looks into.
    if padded.untyped_storage().nbytes() != padded.nbytes:
        padded = padded.clone(memory_format=torch.contiguous_format)
    lengths, indices = host_lengths(batch).tobytes(), to_array(batch.permutation).tobytes()
    return unreduce, (type(batch), padded, lengths, indices, batch.padding_value, batch.first_step)


def unreduce(cls: type[BatchT], padded: Tensor, lengths: bytes, indices: bytes, *rest: int | float | None) -> BatchT:
    """Make a batch from what `reduce` sent."""
    counts, permutation = (torch.frombuffer(bytearray(part), dtype=torch.int64) for part in (lengths, indices))
    value, first_step = rest
    return trusted_batch(
        cls,
        padded,
        counts,
        mask=None,
        permutation=permutation,
        padding_value=value,
        first_step=cast(int, first_step),
    )


def send(batch: BatchT) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What is sent to another process: as `reduce`, with small values inline."""
    rebuild, parts = reduce(batch)
    kind, padded, *rest = parts
    if not _fits_pipe(padded):
        return rebuild, parts
    values = bytearray(padded.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return receive, (kind, values, padded.dtype, padded.shape, padded.requires_grad, *rest)


def receive(
    cls: type[BatchT], values: bytearray, dtype: torch.dtype, shape: torch.Size, requires_grad: object, *rest: Any
) -> BatchT:
    """Make a batch from what `send` sent."""
    padded = torch.frombuffer(values, dtype=torch.uint8).view(dtype).view(shape)
    return unreduce(cls, padded.requires_grad_(bool(requires_grad)), *rest)


def _fits_pipe(padded: Tensor) -> bool:
    """Whether values go through the pipe inline."""
    # What was put into shared memory is meant to be shared.
    plain = type(padded) is Tensor and padded.is_cpu and padded.layout == torch.strided and not padded.is_shared()
    return plain and not padded.is_conj() and not padded.is_neg() and 0 < padded.nbytes <= THROUGH_PIPE


def try_to_send(value: object) -> None:
    """Pickle a value as the queue between a worker and its loader does, tensors' own memory left out.

    Raises:
        TypeError: A tensor in it has a history of operations, which cannot leave the process.
        Exception: Whatever else pickling it raises.
    """
    _Trial(BytesIO()).dump(value)


class _Trial(ForkingPickler):
    """A pickler that tries everything but the memory of tensors."""

    def reducer_override(self, value: object) -> Any:
        """Stand in for a tensor: a value that pickles at once.

        Raises:
            TypeError: The tensor has a history of operations.
        """
        if not isinstance(value, Tensor):
            return NotImplemented
        if value.requires_grad and not value.is_leaf:
            raise TypeError("a tensor that was computed from others that require gradients: detach() it")
        return bool, ()


def _flatten(batch: TrackedBatch) -> tuple[list[Tensor], tuple[PaddingValue | None, int]]:
    """A pytree's leaves and its context."""
    return [getattr(batch, name) for name in TENSOR_FIELDS], (batch.padding_value, batch.first_step)


def _flatten_with_keys(
    batch: TrackedBatch,
) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], tuple[PaddingValue | None, int]]:
    """The same, each leaf with its attribute's name."""
    parts, context = _flatten(batch)
    return [(pytree.GetAttrKey(name), part) for name, part in zip(TENSOR_FIELDS, parts, strict=True)], context
