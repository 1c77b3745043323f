"""How a varlen batch travels: through pickle, between processes, through weights-only loading, and pytrees.

One tensor is sent, and the small integers inline; the table of offsets is made again on arrival.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from collate.operations.serialization import (
    fits_pipe,
    inline_values,
    register_sender,
    tensor_of,
    type_name,
    with_own_storage,
)
from collate.tensors.slabs.receiving import borrow
from collate.tensors.slabs.sending import lend
from collate.tensors.slabs.slab import Loan
from collate.tensors.steps import PaddingValue
from collate.varlen.construct import DocumentBatch, DocumentsT, trusted_documents
from collate.varlen.spans import DocumentSpans, Offsets

_INTEGERS: Final = ("lengths", "documents_per_row", "permutation")


def travels(cls: type[DocumentsT]) -> type[DocumentsT]:
    """Make a class of varlen batches known to pytrees and to `torch.load` at its weights-only default."""

    def unflatten(parts: Iterable[Any], context: Sequence[Any]) -> DocumentsT:
        values, table, *integers = parts
        capacity, align, max_documents, max_seqlen, rows, padding_value, ignore_index = context
        spans = DocumentSpans(
            None,
            dict(zip((*_INTEGERS, "first_steps"), integers, strict=True)),
            capacity=capacity,
            align=align,
            max_documents=max_documents,
            max_seqlen=max_seqlen,
        )
        offsets = Offsets(table, (rows, capacity))
        return trusted_documents(cls, values, spans, offsets, padding_value=padding_value, ignore_index=ignore_index)

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
    register_sender(cls, send)
    return cls


def reduce(batch: DocumentsT) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What pickle sends."""
    return unreduce_documents, (type(batch), with_own_storage(batch.values), *_facts(batch))


def unreduce_documents(
    cls: type[DocumentsT],
    values: Tensor,
    integers: Mapping[str, bytes],
    options: dict[str, Any],
    marks: tuple[PaddingValue | None, int | None],
) -> DocumentsT:
    """Make a batch from what `reduce` sent."""
    arrays = {name: np.frombuffer(part, np.int64) for name, part in integers.items()}
    spans = DocumentSpans(arrays, **options)
    return trusted_documents(cls, values, spans, padding_value=marks[0], ignore_index=marks[1])


def send(batch: DocumentsT) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What is sent to another process: as `reduce`, with the values of small rows inline, or left in their slab."""
    rebuild, (kind, values, *facts) = reduce(batch)
    if (loan := lend(values)) is not None:
        return receive_slab, (kind, loan, *facts)
    if not fits_pipe(values):
        return rebuild, (kind, values, *facts)
    return receive_documents, (kind, inline_values(values), *facts)


def receive_documents(cls: type[DocumentsT], values: tuple[Any, ...], *facts: Any) -> DocumentsT:
    """Make a batch from what `send` sent."""
    return unreduce_documents(cls, tensor_of(*values), *facts)


def receive_slab(cls: type[DocumentsT], loan: Loan, *facts: Any) -> DocumentsT:
    """Make a batch whose values are in a slab."""
    return unreduce_documents(cls, borrow(loan), *facts)


def _facts(batch: DocumentBatch) -> tuple[Any, ...]:
    spans = batch.spans
    names = (*_INTEGERS, "first_steps") if spans.has_first_steps else _INTEGERS
    integers = {name: spans.array(name).tobytes() for name in names}
    return integers, spans.options, (batch.padding_value, batch.ignore_index)


def _flatten(batch: DocumentBatch) -> tuple[list[Any], tuple[Any, ...]]:
    spans = batch.spans
    integers = [spans.tensor(name) for name in (*_INTEGERS, "first_steps")]
    parts = [batch.values, batch.offsets.table, *integers]
    options = tuple(spans.options.values())
    return parts, (*options, batch.offsets.shape[0], batch.padding_value, batch.ignore_index)


def _flatten_with_keys(batch: DocumentBatch) -> tuple[list[tuple[pytree.KeyEntry, Any]], tuple[Any, ...]]:
    parts, context = _flatten(batch)
    names = ("values", "offsets", *_INTEGERS, "first_steps")
    return [(pytree.GetAttrKey(name), part) for name, part in zip(names, parts, strict=True)], context
