"""Make varlen batches: of parts that agree, of sequences, of a padded batch, and back to one."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from collate.batch import LengthTrackedBatch
from collate.errors import LengthError
from collate.lengths.validation import IntegersLike, check_declared
from collate.operations.construct import trusted_batch
from collate.padding.padding_value import check_padding_value, same_nan
from collate.padding.rows import measure_rows
from collate.tensors.numpy_view import Int64Array
from collate.tensors.steps import PaddingValue, flat_index, gather_steps, scatter_steps
from collate.tensors.to_device import to_device
from collate.varlen import values_of_rows
from collate.varlen.offsets import aligned_lengths
from collate.varlen.rows import RowOptions
from collate.varlen.spans import DocumentSpans, Offsets, check_arrays, check_fit, check_options
from collate.widths import Widths, check_widths, padded_width


class DocumentBatch(Protocol):
    """What this room needs to know of a varlen batch, which is defined above it."""

    @property
    def values(self) -> Tensor:
        """The rows `[R, C, *F]`."""

    @property
    def spans(self) -> DocumentSpans:
        """The host's integers."""

    @property
    def offsets(self) -> Offsets:
        """The table of offsets."""

    @property
    def padding_value(self) -> PaddingValue | None:
        """The value of all gaps."""

    @property
    def ignore_index(self) -> int | None:
        """The value of time steps without a label."""

    def check_unwritten(self) -> None:
        """Check that integers, mask and offsets were not written to."""


DocumentsT = TypeVar("DocumentsT", bound=DocumentBatch)


def trusted_documents(
    kind: type[DocumentsT],
    values: Tensor,
    spans: DocumentSpans,
    offsets: Offsets | None = None,
    *,
    padding_value: PaddingValue | None = None,
    ignore_index: int | None = None,
) -> DocumentsT:
    """Make a batch whose parts are known to agree, without reading them again; offsets are made when None."""
    batch = object.__new__(kind)
    offsets = send_offsets(spans, values.device) if offsets is None else offsets
    set_parts(batch, values, spans, offsets, padding_value=padding_value, ignore_index=ignore_index)
    return batch


def set_parts(
    batch: DocumentBatch,
    values: Tensor,
    spans: DocumentSpans,
    offsets: Offsets,
    *,
    padding_value: PaddingValue | None,
    ignore_index: int | None,
) -> None:
    """Give a new batch its parts; its class is frozen."""
    if padding_value is not None and not torch.compiler.is_compiling():
        padding_value = same_nan(padding_value)
    parts = {"values": values, "spans": spans, "offsets": offsets}
    for name, part in {**parts, "padding_value": padding_value, "ignore_index": ignore_index}.items():
        # Its class is frozen, and torch's compiler up to 2.9 cannot trace an update of `vars(batch)`.
        object.__setattr__(batch, name, part)


def check_documents(
    values: Tensor, integers: Mapping[str, IntegersLike | None], **options: int | None
) -> DocumentSpans:
    """The spans of a constructor's integers, checked against the values.

    Raises:
        LengthError: Documents do not fit their rows or caps, integers are not on the host, or R x C is beyond int32.
        TypeError: The values are no tensor, or integers are not integers.
        ValueError: The values have another shape, the permutation is not one, or an option has an impossible value.
    """
    rows, capacity = _shape_of_rows(values)
    if integers["lengths"] is None:
        raise TypeError(f"lengths must be integers, got None: give the steps of each document of {rows} rows")
    if integers["documents_per_row"] is None:
        if rows > 1:
            raise ValueError(f"documents_per_row must say how many of the documents each of the {rows} rows holds")
        integers = {**integers, "documents_per_row": [np.size(np.asarray(integers["lengths"]))]}
    checked = check_options(capacity=capacity, **options)  # type: ignore[arg-type]
    spans = DocumentSpans(check_arrays(integers, **checked), **checked)
    if spans.num_rows != rows:
        raise LengthError(f"documents_per_row must be one per row, [{rows}], got [{spans.num_rows}]")
    return spans


def join_sequences(
    kind: type[DocumentsT],
    sequences: Sequence[object],
    options: RowOptions,
    *,
    padding_value: PaddingValue,
    lengths: IntegersLike | None,
) -> DocumentsT:
    """Put a list of sequences into rows; what `VarlenBatch.from_sequences` does.

    Raises:
        LengthError: There is no sequence, a declared length is not the real one, or the rows do not hold them.
        TypeError: Dtypes differ, or a sequence is not one.
        ValueError: Feature shapes differ, or the dtype cannot hold the padding value.
    """
    items = measure_rows(sequences)
    if lengths is not None:
        check_declared(lengths, items.lengths)
    value = check_padding_value(padding_value, items.dtype)
    order, per_row = options.fill(aligned_lengths(items.lengths, options.align).tolist())
    spans = values_of_rows.make_spans(items.lengths[order], per_row, order, options)
    return trusted_documents(kind, values_of_rows.join_documents(items, spans, value), spans, padding_value=value)


def move_from_padded(
    kind: type[DocumentsT], batch: LengthTrackedBatch, options: RowOptions, documents_per_row: IntegersLike | None
) -> DocumentsT:
    """Put the rows of a padded batch into rows of documents; gradients flow.

    Raises:
        LengthError: The rows do not hold the documents.
    """
    lengths = batch.host_lengths()
    order, per_row = _rows_of_documents(lengths, options, documents_per_row)
    permutation = batch.permutation.numpy()[order]
    spans = values_of_rows.make_spans(lengths[order], per_row, permutation, options)
    if documents_per_row is not None:
        check_fit(lengths, per_row, **spans.options)
    width = batch.padded.shape[1]
    # Time steps are read document after document, in the order of the new rows.
    steps = gather_steps(batch.padded, flat_index(lengths[order], width, batch.device, firsts=order * width))
    value = 0 if batch.padding_value is None else batch.padding_value
    index = flat_index(lengths[order], spans.capacity, batch.device, firsts=spans.starts())
    values = scatter_steps(steps, index, (spans.num_rows, spans.capacity), value)
    return trusted_documents(kind, values, spans, padding_value=value)


def move_to_padded(batch: DocumentBatch, widths: Widths) -> LengthTrackedBatch:
    """A padded batch with a row for each document; gradients flow.

    Raises:
        LengthError: There is no document, or one is longer than all `widths`.
    """
    batch.check_unwritten()
    spans, values = batch.spans, batch.values
    lengths = spans.array("lengths")
    if len(lengths) == 0:
        raise LengthError("a padded batch needs at least one document, these rows are empty: leave them out")
    width = padded_width(int(lengths.max()), check_widths(widths))
    value = 0 if batch.padding_value is None else batch.padding_value
    steps = gather_steps(values, flat_index(lengths, spans.capacity, values.device, firsts=spans.starts()))
    return trusted_batch(
        LengthTrackedBatch,
        scatter_steps(steps, flat_index(lengths, width, values.device), (len(lengths), width), value),
        torch.from_numpy(lengths.copy()),
        mask=None,
        permutation=torch.from_numpy(spans.array("permutation").copy()),
        padding_value=value,
    )


def check_ignore_index(value: int, dtype: torch.dtype) -> int:
    """Check that a dtype can hold what a step without a label holds, and take it as a Python number.

    Raises:
        TypeError: It is no number.
        ValueError: The dtype cannot hold it.
    """
    try:
        return cast(int, check_padding_value(value, dtype))
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("padding_value", "ignore_index")) from None


def replace_documents(batch: DocumentsT, values: Tensor, padding_value: PaddingValue | None) -> DocumentsT:
    """The same documents with new values.

    Raises:
        LengthError: Rows or capacity differ.
        TypeError: The values are no tensor.
    """
    if not isinstance(values, Tensor):
        raise TypeError(
            f"new values must be a tensor {[*batch.offsets.shape]} and features, got {type(values).__name__}"
        )
    if tuple(values.shape[:2]) != batch.offsets.shape:
        raise LengthError(f"new values must be {[*batch.offsets.shape]} and features, got {list(values.shape)}")
    same = values.device == batch.values.device
    offsets = batch.offsets if same else send_offsets(batch.spans, values.device)
    return trusted_documents(type(batch), values, batch.spans, offsets, padding_value=padding_value)


def send_offsets(spans: DocumentSpans, device: torch.device) -> Offsets:
    """The offsets of spans on a device, sent in one piece."""
    table = torch.from_numpy(spans.make_table())
    return Offsets(table if device.type == "cpu" else to_device(table, device), (spans.num_rows, spans.capacity))


def _rows_of_documents(
    lengths: Int64Array, options: RowOptions, documents_per_row: IntegersLike | None
) -> tuple[Int64Array, Int64Array]:
    """The documents in row order, int64 `[N]`, and the number of each row, int64 `[R]`."""
    if documents_per_row is None:
        return options.fill(aligned_lengths(lengths, options.align).tolist())
    return np.arange(len(lengths)), np.asarray(documents_per_row, np.int64)


def _shape_of_rows(values: Tensor) -> tuple[int, int]:
    """Rows and capacity.

    Raises:
        TypeError: The values are no tensor.
        ValueError: They have fewer than two axes, no row or no time step.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a tensor [R, C, ...], got {type(values).__name__}: torch.as_tensor makes one")
    if values.dim() < 2 or values.shape[0] < 1 or values.shape[1] < 1:
        raise ValueError(
            f"values must be [R, C, ...] with at least one row and one step, got {list(values.shape)}: a flat form "
            "[T, ...] becomes one row by values[None]"
        )
    return values.shape[0], values.shape[1]
