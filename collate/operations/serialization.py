"""How a batch is sent and saved: pickle, queues between processes, weights-only loading, pytrees."""

from collections.abc import Callable, Iterable
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from pickle import HIGHEST_PROTOCOL
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from collate.lengths.tracking import TrackedBatch, host_lengths
from collate.operations.construct import TENSOR_FIELDS, BatchT, trusted_batch, unchecked_batch
from collate.tensors.numpy_view import to_array
from collate.tensors.slabs.receiving import borrow
from collate.tensors.slabs.sending import lend
from collate.tensors.slabs.slab import Loan
from collate.tensors.steps import PaddingValue

# Up to this many bytes, values go to another process through the pipe itself. Sharing memory and passing its descriptor
# takes half a millisecond, in which a pipe carries more than this.
THROUGH_PIPE: Final = 1 << 19


# Classes of batches, which a trial asks for their plain parts: sending would lend a slab to nobody.
_SENT: Final[set[type]] = set()

_PACKAGE: Final = __name__.split(".")[0]


def travels(cls: type[BatchT]) -> type[BatchT]:
    """Register a class of batches with pytrees and with `torch.load` at its weights-only default."""

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
    # Files of release 0.1 contain the former module's name.
    torch.serialization.add_safe_globals([cls, unreduce, (unreduce, "collate.transport.unreduce")])
    register_sender(cls, send)
    return cls


def register_sender(cls: type[Any], send_batch: Callable[[Any], Any]) -> None:
    """Have batches of a class sent to other processes by this function."""
    ForkingPickler.register(cls, send_batch)
    _SENT.add(cls)


def type_name(cls: type) -> str | None:
    """The class's name in an exported program; a class made in a function has no unique name."""
    if cls.__module__.split(".")[0] == _PACKAGE:
        return f"lengthtrack.{cls.__name__}"
    return None if "<locals>" in cls.__qualname__ else f"{cls.__module__}.{cls.__qualname__}"


def reduce(batch: BatchT) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The parts that pickle sends: one tensor, and the small integers inline; the mask is derived again on arrival.

    An autograd graph cannot be sent, so that values which were computed from other tensors lose it.
    """
    padded = with_own_storage(batch.padded)
    # As bytes: each tensor in a queue between processes needs a file descriptor of its own.
    lengths, indices = host_lengths(batch).tobytes(), to_array(batch.permutation).tobytes()
    return unreduce, (type(batch), padded, lengths, indices, batch.padding_value, batch.first_step)


def with_own_storage(tensor: Tensor) -> Tensor:
    """The tensor as it can be sent: without its graph, and in storage that holds nothing else."""
    tensor = tensor if tensor.is_leaf else tensor.detach()
    # torch's queues between processes lose a lazy conjugation or negation.
    tensor = tensor.resolve_conj().resolve_neg()
    # A view would send the whole storage that it is part of.
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
    """The parts that are sent to another process: as in `reduce`, but small values go inline, values in a slab stay."""
    rebuild, parts = reduce(batch)
    kind, padded, *rest = parts
    if (loan := lend(padded)) is not None:
        return receive_slab, (kind, loan, *rest)
    if not fits_pipe(padded):
        return rebuild, parts
    return receive, (kind, *inline_values(padded), *rest)


def receive_slab(cls: type[BatchT], loan: Loan, *rest: Any) -> BatchT:
    """Make a batch whose values are in a slab."""
    return unreduce(cls, borrow(loan), *rest)


def receive(
    cls: type[BatchT], values: bytearray, dtype: torch.dtype, shape: torch.Size, requires_grad: object, *rest: Any
) -> BatchT:
    """Make a batch from what `send` sent."""
    return unreduce(cls, tensor_of(values, dtype, shape, requires_grad), *rest)


def inline_values(tensor: Tensor) -> tuple[bytearray, torch.dtype, torch.Size, bool]:
    """The parts that a small tensor is sent as; `tensor_of` makes it from them again."""
    # A bytearray, because torch.frombuffer warns of memory that cannot be written to.
    values = bytearray(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return values, tensor.dtype, tensor.shape, tensor.requires_grad


def tensor_of(values: bytearray, dtype: torch.dtype, shape: torch.Size, requires_grad: object) -> Tensor:
    """Make a tensor from what `inline_values` sent."""
    tensor = torch.frombuffer(values, dtype=torch.uint8).view(dtype).view(shape)
    return tensor.requires_grad_(bool(requires_grad))


def fits_pipe(padded: Tensor) -> bool:
    """Whether values go through the pipe inline."""
    # A tensor that the user put into shared memory must stay shared.
    plain = type(padded) is Tensor and padded.is_cpu and padded.layout == torch.strided and not padded.is_shared()
    return plain and not padded.is_conj() and not padded.is_neg() and 0 < padded.nbytes <= THROUGH_PIPE


def try_to_send(value: object) -> None:
    """Pickle a value as the queue between a worker and its loader does, but without the memory of tensors.

    Raises:
        TypeError: A tensor in it has an autograd graph, which cannot leave the process.
        Exception: Pickling fails for another reason.
    """
    _Trial(BytesIO()).dump(value)


class _Trial(ForkingPickler):
    """A pickler that tries everything but the memory of tensors."""

    def reducer_override(self, value: object) -> Any:
        """Replace a tensor by a value that pickles at once, and let no batch wait for a receiver.

        Raises:
            TypeError: The tensor has an autograd graph.
        """
        if not isinstance(value, Tensor):
            return value.__reduce_ex__(HIGHEST_PROTOCOL) if type(value) in _SENT else NotImplemented
        if value.requires_grad and not value.is_leaf:
            raise TypeError("a tensor that was computed from others that require gradients: detach() it")
        # The pickle is thrown away, so that any callable without arguments will do.
        return bool, ()


def _flatten(batch: TrackedBatch) -> tuple[list[Tensor], tuple[PaddingValue | None, int]]:
    """The leaves and the context of a batch as a pytree."""
    return [getattr(batch, name) for name in TENSOR_FIELDS], (batch.padding_value, batch.first_step)


def _flatten_with_keys(
    batch: TrackedBatch,
) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], tuple[PaddingValue | None, int]]:
    """The same, each leaf with its attribute's name."""
    parts, context = _flatten(batch)
    return [(pytree.GetAttrKey(name), part) for name, part in zip(TENSOR_FIELDS, parts, strict=True)], context
