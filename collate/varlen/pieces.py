"""Rows of documents cut into pieces, by rows or along time, and joined again."""

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from collate.errors import LengthError
from collate.lengths.permutation import join_permutations
from collate.padding.padding_value import cast_padding_value
from collate.tensors.numpy_view import to_array
from collate.tensors.to_device import to_device
from collate.varlen.construct import DocumentBatch, DocumentsT, trusted_documents
from collate.varlen.spans import DocumentSpans, Offsets, check_int32
from collate.widths import check_count


def split_rows(values: Tensor, spans: DocumentSpans, rows: int) -> Iterator[tuple[Tensor, DocumentSpans]]:
    """Pieces of at most `rows` rows.

    Yields:
        Values, and the spans of their documents.

    Raises:
        TypeError: `rows` is not an int.
        ValueError: `rows` is below one.
    """
    check_count("rows", rows, least=1, hint="give the rows of one piece")
    per_row = spans.array("documents_per_row")
    bounds = np.append(0, np.cumsum(per_row))
    for start in range(0, len(per_row), rows):
        stop = min(start + rows, len(per_row))
        documents = slice(int(bounds[start]), int(bounds[stop]))
        names = ("lengths", "permutation", *(["first_steps"] if spans.has_first_steps else []))
        arrays = {name: spans.array(name)[documents] for name in names}
        arrays["documents_per_row"] = per_row[start:stop]
        part = DocumentSpans(arrays, **spans.options)
        yield values[start:stop], part


def split_steps(values: Tensor, spans: DocumentSpans, steps: int) -> Iterator[tuple[Tensor, DocumentSpans]]:
    """Chunks of at most `steps` steps of all rows, with the spans of each.

    A row of 6 steps holds documents of 2 and 4 steps. Its chunks of 3 steps hold 2 and 1 steps of them, then 0 and 3:

    >>> import torch
    >>> arrays = {"lengths": np.array([2, 4]), "documents_per_row": np.array([2]), "permutation": np.arange(2)}
    >>> spans = DocumentSpans(arrays, capacity=6)
    >>> chunks = split_steps(torch.arange(6)[None], spans, 3)
    >>> [(part.array("lengths").tolist(), part.array("first_steps").tolist()) for _, part in chunks]
    [([2, 1], [0, 0]), ([0, 3], [2, 1])]

    Yields:
        Values, and the spans of their documents.

    Raises:
        TypeError: `steps` is not an int.
        ValueError: `steps` is below one, or no multiple of the spans' `align`.
    """
    check_count("steps", steps, least=1, hint="give the steps of one chunk")
    if steps % spans.align:
        raise ValueError(f"steps must be a multiple of align={spans.align}, got {steps}: documents start at multiples")
    starts = spans.starts() - spans.rows_of_documents() * spans.capacity
    lengths, first_steps = spans.array("lengths"), spans.array("first_steps")
    for start in range(0, spans.capacity, steps):
        width = min(steps, spans.capacity - start)
        before = np.clip(start - starts, 0, lengths)
        options = spans.options | {"capacity": width}
        if spans.max_seqlen is not None:
            options["max_seqlen"] = min(width, spans.max_seqlen)
        arrays = {
            "lengths": np.clip(start + width - starts, 0, lengths) - before,
            "documents_per_row": spans.array("documents_per_row"),
            "permutation": spans.array("permutation"),
            "first_steps": first_steps + before,
        }
        part = DocumentSpans(arrays, **options)
        yield values[:, start : start + width], part


def join_spans(all_spans: Sequence[DocumentSpans], permutation: Tensor) -> DocumentSpans:
    """The spans of all rows of several batches, one after the other.

    Args:
        all_spans: at least one, of one capacity and `align`.
        permutation: int64 `[N]`, of the whole.

    Raises:
        LengthError: The rows have too many steps for int32 offsets.
    """
    check_int32(sum(spans.num_rows for spans in all_spans), all_spans[0].capacity)
    options = all_spans[0].options
    for name in ("max_documents", "max_seqlen"):
        caps = [getattr(spans, name) for spans in all_spans]
        options[name] = None if None in caps else max(caps)
    names = ["lengths", "documents_per_row"]
    if any(spans.has_first_steps for spans in all_spans):
        names.append("first_steps")
    arrays = {name: np.concatenate([spans.array(name) for spans in all_spans]) for name in names}
    return DocumentSpans({**arrays, "permutation": to_array(permutation)}, **options)


def as_batches(batch: DocumentsT, parts: Iterator[tuple[Tensor, DocumentSpans]]) -> list[DocumentsT]:
    """Pieces of a batch as batches of its kind."""
    batch.check_unwritten()
    marks = {"padding_value": batch.padding_value, "ignore_index": batch.ignore_index}
    return [trusted_documents(type(batch), values, spans, **marks) for values, spans in parts]  # type: ignore[arg-type]


def concat_documents(kind: type[DocumentsT], batches: Sequence[DocumentBatch]) -> DocumentsT:
    """One batch of all rows, in the order given.

    Raises:
        LengthError: There is no batch.
        TypeError: One of them is no `VarlenBatch`.
        ValueError: They differ in what must be the same.
    """
    if len(batches) == 0:
        raise LengthError("concat needs at least one batch, got none")
    strangers = [type(batch).__name__ for batch in batches if not getattr(batch, "is_varlen", False)]
    if strangers:
        raise TypeError(
            f"concat takes VarlenBatch objects, got a {strangers[0]}: to_varlen() makes one of a padded batch"
        )
    kinds = {(b.values.dtype, b.values.device, b.values.shape[1:], b.spans.align, b.ignore_index) for b in batches}
    if len(kinds) > 1:
        raise ValueError(
            "batches must share dtype, device, capacity, features, align and ignore_index, got "
            f"{sorted(map(str, kinds))}"
        )
    for batch in batches:
        batch.check_unwritten()
    padding_values = {b.padding_value for b in batches}
    permutation = join_permutations([b.spans.tensor("permutation") for b in batches])
    return trusted_documents(
        kind,
        torch.cat([b.values for b in batches]),
        join_spans([b.spans for b in batches], permutation),
        # Gaps of different values are unspecified.
        padding_value=padding_values.pop() if len(padding_values) == 1 else None,
        ignore_index=batches[0].ignore_index,
    )


def move_documents(
    batch: DocumentsT,
    device: torch.device | torch.dtype | str | int | None,
    dtype: torch.dtype | None,
    non_blocking: bool | None,  # noqa: FBT001 - internal, as `Tensor.to` has it
) -> DocumentsT:
    """The batch on another device or of another dtype; the batch itself where nothing changes."""
    if isinstance(device, torch.dtype):
        device, dtype = None, device
    if non_blocking is None:
        non_blocking = not batch.values.is_cuda and batch.values.is_pinned()
    batch.check_unwritten()
    values = batch.values.to(device=device, dtype=dtype, non_blocking=non_blocking)
    if values is batch.values:
        return batch
    offsets = batch.offsets
    if values.device != batch.values.device:
        table = offsets.table
        # From pageable memory the copy would wait for the device, so that a small table is pinned in any case.
        pinned = not table.is_cpu or table.is_pinned()
        table = table.to(values.device, non_blocking=non_blocking) if pinned else to_device(table, values.device)
        offsets = Offsets(table, offsets.shape)
    return trusted_documents(
        type(batch),
        values,
        batch.spans,
        offsets,
        padding_value=cast_padding_value(batch.padding_value, batch.values.dtype, values.dtype),
        ignore_index=cast("int | None", cast_padding_value(batch.ignore_index, batch.values.dtype, values.dtype)),
    )


def pin_documents(batch: DocumentsT) -> DocumentsT:
    """The batch in page-locked memory."""
    return trusted_documents(
        type(batch),
        batch.values.pin_memory(),
        batch.spans,
        Offsets(batch.offsets.table.pin_memory(), batch.offsets.shape),
        padding_value=batch.padding_value,
        ignore_index=batch.ignore_index,
    )
