"""How a varlen batch travels: through pickle, between processes, through weights-only loading, and pytrees.

One tensor is sent, and the small integers inline; the table of offsets is made again on arrival.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from collate.options import Number
from collate.serialization import fits_pipe, tensor_of, type_name, values_of, with_own_storage
from collate.varlen.layout import DocumentLayout, Offsets

_INTEGERS: Final = ("lengths", "documents_per_row", "permutation")


class Traveller(Protocol):
    """What a varlen batch must offer to travel."""

    @property
    def values(self) -> Tensor:
        """The rows `[R, C, *F]`."""

    @property
    def layout(self) -> DocumentLayout:
        """The host's integers."""

    @property
    def offsets(self) -> Offsets:
        """The table of offsets."""

    @property
    def padding_value(self) -> Number | None:
        """What the gaps hold."""

    @property
    def ignore_index(self) -> int | None:
        """What steps without a label hold."""

    @classmethod
    def trusted(
        cls,
        values: Tensor,
        layout: DocumentLayout,
        offsets: Offsets | None = None,
        *,
        padding_value: Number | None = None,
        ignore_index: int | None = None,
    ) -> Self:
        """Make a batch whose parts are known to agree."""


Batch = TypeVar("Batch", bound=Traveller)


def travels(cls: type[Batch]) -> type[Batch]:
    """Make a class of varlen batches known to pytrees and to `torch.load` at its weights-only default."""

    def unflatten(parts: Iterable[Any], context: Sequence[Any]) -> Batch:
        values, table, *integers = parts
        capacity, align, max_documents, max_seqlen, rows, padding_value, ignore_index = context
        layout = DocumentLayout(
            None,
            dict(zip((*_INTEGERS, "first_steps"), integers, strict=True)),
            capacity=capacity,
            align=align,
            max_documents=max_documents,
            max_seqlen=max_seqlen,
        )
        offsets = Offsets(table, (rows, capacity))
        return cls.trusted(values, layout, offsets, padding_value=padding_value, ignore_index=ignore_index)

    pytree.register_pytree_node(
        cls,
        _flatten,
        unflatten,
        serialized_type_name=type_name(cls),
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=_flatten_with_keys,
    )
    torch.serialization.add_safe_globals([cls, unreduce_documents])
    ForkingPickler.register(cls, send)
    return cls


def reduce(batch: Batch) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What pickle sends."""
    return unreduce_documents, (type(batch), with_own_storage(batch.values), *_facts(batch))


def unreduce_documents(
    cls: type[Batch],
    values: Tensor,
    integers: Mapping[str, bytes],
    options: dict[str, Any],
    marks: tuple[Number | None, int | None],
) -> Batch:
    """Make a batch from what `reduce` sent."""
    arrays = {name: np.frombuffer(part, np.int64) for name, part in integers.items()}
    layout = DocumentLayout(arrays, **options)
    return cls.trusted(values, layout, padding_value=marks[0], ignore_index=marks[1])


def send(batch: Batch) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What is sent to another process: as `reduce`, with the values of small rows inline."""
    rebuild, (kind, values, *facts) = reduce(batch)
    if not fits_pipe(values):
        return rebuild, (kind, values, *facts)
    return receive_documents, (kind, values_of(values), *facts)


def receive_documents(cls: type[Batch], values: tuple[Any, ...], *facts: Any) -> Batch:
    """Make a batch from what `send` sent."""
    return unreduce_documents(cls, tensor_of(*values), *facts)


def _facts(batch: Traveller) -> tuple[Any, ...]:
    layout = batch.layout
    names = (*_INTEGERS, "first_steps") if layout.has_first_steps else _INTEGERS
    integers = {name: layout.array(name).tobytes() for name in names}
    return integers, layout.options, (batch.padding_value, batch.ignore_index)


def _flatten(batch: Traveller) -> tuple[list[Any], tuple[Any, ...]]:
    layout = batch.layout
    integers = [layout.tensor(name) for name in (*_INTEGERS, "first_steps")]
    parts = [batch.values, batch.offsets.table, *integers]
    options = tuple(layout.options.values())
    return parts, (*options, batch.offsets.shape[0], batch.padding_value, batch.ignore_index)


def _flatten_with_keys(batch: Traveller) -> tuple[list[tuple[pytree.KeyEntry, Any]], tuple[Any, ...]]:
    parts, context = _flatten(batch)
    names = ("values", "offsets", *_INTEGERS, "first_steps")
    return [(pytree.GetAttrKey(name), part) for name, part in zip(names, parts, strict=True)], context
