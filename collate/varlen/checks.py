"""What a varlen batch says of itself: its `repr`, hints on missing attributes, a plain dict, and `verify`."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from collate.errors import LengthError
from collate.lengths.validation import check_padding_intact
from collate.varlen.construct import DocumentBatch
from collate.varlen.offsets import spread_on_host
from collate.varlen.spans import check_arrays

_EXPORTED: Final = (
    *("values", "lengths", "mask", "document_ids", "position_ids", "permutation", "documents_per_row"),
    *("cu_seqlens", "cu_seqlens_padded", "cu_seqlens_real", "max_seqlen"),
)


def missing_attribute(batch: object, name: str) -> str:
    """The message for an attribute that does not exist."""
    message = f"{type(batch).__name__!r} object has no attribute {name!r}"
    if hasattr(Tensor, name):
        message += (
            ": a batch is no tensor. A recurrent module runs on it by apply_rnn(rnn, batch), a module that works on "
            "every time step alone by batch.map(module); .values are its rows"
        )
    return message


def describe_documents(batch: DocumentBatch) -> str:
    """One line: shape, dtype, device, the number of documents and the fraction of gaps."""
    lengths = batch.spans.tensor("lengths")
    if not isinstance(batch.values, Tensor) or not isinstance(lengths, Tensor):
        # A pytree of something else.
        return f"VarlenBatch({batch.values!r}, {lengths!r})"
    dtype = str(batch.values.dtype).removeprefix("torch.")
    rows, capacity = batch.offsets.shape
    gaps = 1 - lengths.sum().item() / (rows * capacity)
    return (
        f"VarlenBatch({list(batch.values.shape)} {dtype} on {batch.values.device}, {len(lengths)} documents, "
        f"gaps {gaps:.1%}, align={batch.spans.align})"
    )


def verify_documents(batch: DocumentBatch) -> None:
    """Check the host's integers and the offsets against each other, and what the gaps hold.

    Raises:
        LengthError: They do not agree, or a gap holds a real value.
        TypeError: Lengths or permutation are not integers.
        ValueError: The permutation is not one.
    """
    spans = batch.spans
    names = ("lengths", "documents_per_row", "permutation")
    check_arrays({name: spans.array(name) for name in names}, **spans.options)
    table = spans.make_table()
    if not np.array_equal(table, batch.offsets.table.cpu().numpy()):
        raise LengthError("the offsets are not those of the lengths: make a new batch of the sequences")
    documents, positions = spread_on_host(table, batch.offsets.shape)
    expected = {"mask": documents >= 0, "document_ids": documents, "position_ids": positions}
    for (name, values), present in zip(expected.items(), batch.offsets.spread(), strict=True):
        if not torch.equal(values, present.cpu()):
            row = int((values != present.cpu()).any(1).nonzero()[0])
            raise LengthError(
                f"the {name} of row {row} are not those of its lengths: make a new batch of the sequences"
            )
    if batch.padding_value is not None:
        check_padding_intact(batch.values, batch.offsets.spread()[0], batch.padding_value)


def check_entries(entries: object, dim: int, count: int) -> None:
    """Check that something has one entry per document.

    Raises:
        TypeError: It is neither a tensor nor a list.
        ValueError: It has another number of entries, or no such axis.
    """
    if not isinstance(entries, (Tensor, list)):
        raise TypeError(
            f"unsort takes a tensor or a list with one entry per document, got a {type(entries).__name__}: make a "
            "tensor or a list of it"
        )
    if isinstance(entries, list):
        got: object = len(entries) if len(entries) != count else None
    else:
        has_axis = -entries.dim() <= dim < entries.dim()
        got = None if has_axis and entries.shape[dim] == count else f"shape {list(entries.shape)} with dim={dim}"
    if got is not None:
        raise ValueError(f"there must be one entry for each of the {count} documents, got {got}")


def named_attributes(batch: DocumentBatch, names: Mapping[str, str]) -> dict[str, Any]:
    """A dict of attributes by the keys that a trainer wants.

    Raises:
        ValueError: There is no such attribute.
    """
    for key, attribute in names.items():
        if attribute not in _EXPORTED:
            raise ValueError(f"{key!r} names {attribute!r}, which is none of {', '.join(_EXPORTED)}")
    return {key: getattr(batch, attribute) for key, attribute in names.items()}
