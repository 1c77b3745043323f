"""What a varlen batch says of itself: its `repr`, hints on missing attributes, a plain dict, and `verify`."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from torch import Tensor

from collate.errors import LengthError
from collate.lengths.validation import check_padding_intact
from collate.varlen.construct import DocumentBatch
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
    if not np.array_equal(spans.make_table(), batch.offsets.table.cpu().numpy()):
        raise LengthError("the offsets are not those of the lengths: make a new batch of the sequences")
    if batch.padding_value is not None:
        check_padding_intact(batch.values, batch.offsets.spread()[0], batch.padding_value)


def named_attributes(batch: DocumentBatch, names: Mapping[str, str]) -> dict[str, Any]:
    """A dict of attributes by the keys that a trainer wants.

    Raises:
        ValueError: There is no such attribute.
    """
    for key, attribute in names.items():
        if attribute not in _EXPORTED:
            raise ValueError(f"{key!r} names {attribute!r}, which is none of {', '.join(_EXPORTED)}")
    return {key: getattr(batch, attribute) for key, attribute in names.items()}
