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
        serialized_type_name=type_name(cls),
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=_flatten_with_keys,
    )
    # Files of release 0.1 name the former module.
    torch.serialization.add_safe_globals([cls, unreduce, (unreduce, "collate.transport.unreduce")])
    ForkingPickler.register(cls, send)
    return cls


def type_name(cls: type) -> str | None:
    """What an exported program calls the class; one made in a function has no name that is its own."""
    if cls.__module__.split(".")[0] == _PACKAGE:
        return f"lengthtrack.{cls.__name__}"
    return None if "<locals>" in cls.__qualname__ else f"{cls.__module__}.{cls.__qualname__}"


def reduce(batch: BatchT) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What pickle sends: one tensor, and the small integers inline; the mask is derived again on arrival.

    A graph cannot travel, so values that were computed from other tensors are sent without its history.
    """
    padded = with_own_storage(batch.padded)
    lengths, indices = host_lengths(batch).tobytes(), to_array(batch.permutation).tobytes()
    return unreduce, (type(batch), padded, lengths, indices, batch.padding_value, batch.first_step)


def with_own_storage(tensor: Tensor) -> Tensor:
    """The tensor as it can be sent: without its history, and in storage that holds nothing else."""
    tensor = tensor if tensor.is_leaf else tensor.detach()
    # torch's queues between processes forget what is conjugated or negated lazily.
    tensor = tensor.resolve_conj().resolve_neg()
    # A view would ship the whole storage it looks into.
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


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
    if not fits_pipe(padded):
        return rebuild, parts
    return receive, (kind, *inline_values(padded), *rest)


def receive(
    cls: type[BatchT], values: bytearray, dtype: torch.dtype, shape: torch.Size, requires_grad: object, *rest: Any
) -> BatchT:
    """Make a batch from what `send` sent."""
    return unreduce(cls, tensor_of(values, dtype, shape, requires_grad), *rest)


def inline_values(tensor: Tensor) -> tuple[bytearray, torch.dtype, torch.Size, bool]:
    """What a tensor that fits the pipe is sent as; `tensor_of` makes it again."""
    values = bytearray(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return values, tensor.dtype, tensor.shape, tensor.requires_grad


def tensor_of(values: bytearray, dtype: torch.dtype, shape: torch.Size, requires_grad: object) -> Tensor:
    """Make a tensor from what `inline_values` sent."""
    tensor = torch.frombuffer(values, dtype=torch.uint8).view(dtype).view(shape)
    return tensor.requires_grad_(bool(requires_grad))


def fits_pipe(padded: Tensor) -> bool:
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
