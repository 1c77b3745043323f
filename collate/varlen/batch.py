"""VarlenBatch: rows that hold several documents each, with their lengths, offsets and permutation.

Axes: R rows, C steps of a row (its capacity), N documents, F feature axes, M real steps (`sum(lengths)`).
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast, overload

import numpy as np
import torch
from torch import Tensor

from collate.batch import LengthTrackedBatch
from collate.lengths.validation import IntegersLike
from collate.padding.padding_value import check_padding_value
from collate.tensors.graphs import outside_graphs
from collate.tensors.masks import expand_like
from collate.tensors.steps import PaddingValue
from collate.tensors.to_device import to_device
from collate.varlen import checks, pieces
from collate.varlen.construct import (
    check_documents,
    check_ignore_index,
    join_sequences,
    move_from_padded,
    move_to_padded,
    replace_documents,
    send_offsets,
    set_parts,
    trusted_documents,
)
from collate.varlen.context_parallel import ContextParallel
from collate.varlen.kernels.views import KernelViews
from collate.varlen.rows import Arrange, RowOptions
from collate.varlen.serialization import reduce, travels
from collate.varlen.spans import DocumentSpans, Offsets
from collate.widths import Widths


@travels
@dataclass(frozen=True, eq=False, repr=False, init=False)
class VarlenBatch(KernelViews):
    """Several sequences ("documents") in each row, with their lengths, rows, offsets and permutation.

    Documents follow each other, and each starts at a multiple of `align`; all other steps of a row are gaps. Lengths,
    documents per row and permutation stay on the host, wherever the values are. Do not write to them, to the mask or
    to the offsets: a write is noticed where they are used. The offsets for kernels are made from the host's integers
    when the batch is made, and sent as one small tensor; nothing is ever read back. A subclass may add methods, but no
    fields.

    Args:
        values: `[R, C, *F]`, any dtype and device. One row is the padding-free form, and `values[0]` its flat form.
        lengths: int64 `[N]` on the host, documents in row order; a document may be empty.
        documents_per_row: int64 `[R]` on the host; may be left out for one row.
        permutation: int64 `[N]` on the host; document i was sample `permutation[i]` of the list that was collated; the
            given order when None. A piece made by `split_rows` keeps the indices of its documents.
        padding_value: The value of all gaps; None where that is unspecified, as after `with_values`.
        align: Documents start at its multiples: 1, 8, or twice the size of a context-parallel group.
        max_documents: Documents that a row may have. It fixes the number of slots of `cu_seqlens`, so that compiled
            code sees one shape; None takes the largest number in this batch.
        max_seqlen: Upper bound of all lengths for kernels, fixed for a run; None is C. See `longest`.
        ignore_index: The value of steps without a label, where the values are labels; see `next_step_labels`.

    Raises:
        LengthError: Documents do not fit their rows or caps, integers are not on the host, or R x C is beyond int32.
        TypeError: The values are no tensor, or lengths and permutation are not integers.
        ValueError: The values have fewer than two axes, no row or no step; the permutation is not one; the dtype
            cannot hold the padding value; or C is no multiple of `align`.

    Examples:
        >>> import torch
        >>> from collate import VarlenBatch
        >>> samples = [torch.tensor([1, 2]), torch.tensor([3, 4, 5]), torch.tensor([6])]
        >>> batch = VarlenBatch.from_sequences(samples, capacity=4)
        >>> batch.values
        tensor([[3, 4, 5, 6],
                [1, 2, 0, 0]])
        >>> batch.lengths, batch.documents_per_row, batch.cu_seqlens
        (tensor([3, 1, 2]), tensor([2, 1]), tensor([0, 3, 4, 6, 8, 8, 8], dtype=torch.int32))
        >>> batch.unsort()
        [tensor([1, 2]), tensor([3, 4, 5]), tensor([6])]
    """

    values: Tensor
    spans: DocumentSpans
    offsets: Offsets
    padding_value: PaddingValue | None
    ignore_index: int | None

    def __init__(
        self,
        values: Tensor,
        lengths: IntegersLike,
        documents_per_row: IntegersLike | None = None,
        permutation: IntegersLike | None = None,
        *,
        padding_value: PaddingValue | None = None,
        align: int = 1,
        max_documents: int | None = None,
        max_seqlen: int | None = None,
        ignore_index: int | None = None,
    ) -> None:
        integers = {"lengths": lengths, "documents_per_row": documents_per_row, "permutation": permutation}
        caps = {"max_documents": max_documents, "max_seqlen": max_seqlen}
        spans = check_documents(values, integers, align=align, **caps)
        if padding_value is not None:
            padding_value = check_padding_value(padding_value, values.dtype)
        if ignore_index is not None:
            ignore_index = check_ignore_index(ignore_index, values.dtype)
        offsets = send_offsets(spans, values.device)
        set_parts(self, values, spans, offsets, padding_value=padding_value, ignore_index=ignore_index)

    @classmethod
    @outside_graphs
    def from_sequences(
        cls,
        sequences: Sequence[object],
        *,
        padding_value: PaddingValue = 0,
        capacity: int | None = None,
        rows: int | None = None,
        align: int = 1,
        max_documents: int | None = None,
        max_seqlen: int | None = None,
        arrange: Arrange = "best-fit",
        lengths: IntegersLike | None = None,
    ) -> Self:
        """Put a list of sequences into rows.

        Args:
            sequences: N >= 1 tensors or arrays `[L_i, *F]` of one dtype and feature shape, or lists of numbers; L_i
                may be 0. Gradients flow back to tensors that require them.
            padding_value: The value of all gaps; the dtype must be able to hold it.
            capacity: C; None puts all sequences into one row, as long as they need.
            rows: R, filled up with empty rows; None is as few as hold the documents.
            align: As in the class.
            max_documents: As in the class; no row gets more.
            max_seqlen: As in the class.
            arrange: `"best-fit"`, or `"given"` for rows that are cut from the list in its order; see `VarlenCollator`.
            lengths: Declared lengths `[N]` in source order, checked against the real ones.

        Raises:
            LengthError: There is no sequence, a declared length is not the real one, or the rows do not hold them.
            TypeError: Dtypes differ, or a sequence is not one.
            ValueError: Feature shapes differ, an option is impossible, or the dtype cannot hold the padding value.
        """
        options = RowOptions(capacity, rows, align, max_documents, max_seqlen, arrange).checked()
        return join_sequences(cls, sequences, options, padding_value=padding_value, lengths=lengths)

    @classmethod
    @outside_graphs
    def from_padded(
        cls, batch: LengthTrackedBatch, row_options: Mapping[str, Any], documents_per_row: IntegersLike | None = None
    ) -> Self:
        """Put the rows of a padded batch into rows of documents; what `LengthTrackedBatch.to_varlen` calls.

        Args:
            batch: Values `[B, T, *F]`; gradients flow back to real steps.
            row_options: As in `from_sequences`.
            documents_per_row: int64 `[R]`: take the rows of the batch in their order, that many for each row.

        Raises:
            LengthError: The rows do not hold the documents.
            ValueError: An option has an impossible value.
        """
        return move_from_padded(cls, batch, RowOptions(**row_options).checked(), documents_per_row)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        travels(cls)

    if not TYPE_CHECKING:
        # A type checker would take it as a promise that every attribute exists.
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(checks.missing_attribute(self, name))

    # --- what it holds

    def __repr__(self) -> str:
        return checks.describe_documents(self)

    @outside_graphs
    def verify(self) -> None:
        """Check lengths, rows, permutation, offsets and the values of gaps; this waits for an accelerator.

        Raises:
            LengthError: They do not agree, or a real value in a gap shows that a length is too small.
            TypeError: Lengths or permutation are not integers.
            ValueError: The permutation is not one.
        """
        self.check_unwritten()
        checks.verify_documents(self)

    # --- new values, same documents

    def with_values(self, values: Tensor) -> Self:
        """The same documents with new values.

        Args:
            values: `[R, C, *G]` on any device, each document computed from itself; the values of gaps are unspecified.

        Raises:
            LengthError: Rows or capacity differ.
            TypeError: The values are no tensor.
        """
        return replace_documents(self, values, None)

    def with_step_values(self, values: Tensor, padding_value: PaddingValue | None) -> Self:
        """As `with_values`, with the value of all gaps.

        Raises:
            LengthError: Rows or capacity differ.
        """
        return replace_documents(self, values, padding_value)

    def map(self, module: Callable[[Tensor], Tensor]) -> Self:
        """The same documents after a module that works on every step alone, such as an embedding or a linear layer.

        Raises:
            LengthError: The module changed the number of rows or steps.
            TypeError: It did not return a tensor.
        """
        return self.with_values(module(self.values))

    def next_step_labels(self, ignore_index: int = -100) -> Self:
        """The label of each step: the next step of its own document.

        Args:
            ignore_index: The value of the last step of each document, and of all gaps.

        Returns:
            Values `[R, C, *F]`. `sequence_loss` counts only the steps that have labels; its loss function must return 0
            for `ignore_index`, as `torch.nn.functional.cross_entropy` does for -100.

        Raises:
            ValueError: The dtype cannot hold `ignore_index`.
        """
        if not torch.compiler.is_compiling():
            ignore_index = check_ignore_index(ignore_index, self.values.dtype)
        ids = self.document_ids
        goes_on = torch.zeros_like(ids, dtype=torch.bool)
        goes_on[:, :-1] = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
        labels = torch.where(expand_like(goes_on, self.values), self.values.roll(-1, 1), ignore_index)
        return trusted_documents(
            type(self), labels, self.spans, self.offsets, padding_value=ignore_index, ignore_index=ignore_index
        )

    @outside_graphs
    def to_padded(self, widths: Widths = None) -> LengthTrackedBatch:
        """A padded batch with a row for each document, in the same order; gradients flow.

        Args:
            widths: The allowed padded widths, as in `LengthTrackedBatch.from_sequences`.

        Raises:
            LengthError: There is no document, or one is wider than `widths`.
        """
        return move_to_padded(self, widths)

    @overload
    def unsort(self, entries: None = None, dim: int = 0) -> list[Tensor]: ...
    @overload
    def unsort(self, entries: Tensor, dim: int = 0) -> Tensor: ...
    @overload
    def unsort(self, entries: list[Any], dim: int = 0) -> list[Any]: ...
    def unsort(self, entries: Tensor | list[Any] | None = None, dim: int = 0) -> Tensor | list[Any]:
        """Anything with one entry per document, in source order.

        Args:
            entries: A tensor `[..., N, ...]`, or a list of N; None is `sequences()`, the documents themselves.
            dim: The axis of the documents.

        Raises:
            TypeError: The entries are neither a tensor nor a list.
            ValueError: There is not one entry per document.
        """
        entries = self.sequences() if entries is None else entries
        checks.check_entries(entries, dim, len(self))
        back = np.argsort(self.spans.array("permutation"), kind="stable")
        if isinstance(entries, Tensor):
            return entries.index_select(dim, to_device(back, entries.device))
        return [entries[index] for index in back.tolist()]

    # --- in pieces

    @outside_graphs
    def split_rows(self, rows: int) -> list[Self]:
        """Pieces of at most `rows` rows, as for gradient accumulation; `concat` joins them again.

        Raises:
            TypeError: `rows` is not an int.
            ValueError: `rows` is below one.
        """
        return pieces.as_batches(self, pieces.split_rows(self.values, self.spans, rows))

    @outside_graphs
    def split_steps(self, steps: int) -> list[Self]:
        """Chunks of at most `steps` steps of all rows, for truncated back-propagation through time.

        Every chunk has all documents, with length 0 where they have no steps in it, so that states that `apply_rnn`
        carries from chunk to chunk equal those of whole documents. Positions continue. Make labels before splitting.

        Raises:
            TypeError: `steps` is not an int.
            ValueError: `steps` is below one, or no multiple of `align`.
        """
        return pieces.as_batches(self, pieces.split_steps(self.values, self.spans, steps))

    @classmethod
    @outside_graphs
    def concat(cls, batches: Sequence["VarlenBatch"]) -> Self:
        """One batch of all rows, in the order given.

        Pieces of a split batch keep their indices, and the result has the permutation of the whole; otherwise source
        orders follow each other, as in `LengthTrackedBatch.concat`.

        Args:
            batches: at least one, of one capacity, `align`, dtype, device and feature shape.

        Raises:
            LengthError: There is no batch.
            TypeError: One of them is no `VarlenBatch`.
            ValueError: They differ in what must be the same.
        """
        return pieces.concat_documents(cls, batches)

    def context_parallel(self, rank: int, size: int) -> ContextParallel:
        """The steps of each row that one rank of a context-parallel group computes: equal work for every rank.

        Each document, with the gap that alignment leaves behind it, is cut into `2 * size` equal pieces; rank r takes
        pieces r and `2 * size - 1 - r`.

        Raises:
            ValueError: `align` is no multiple of `2 * size`, or there is no such rank.
        """
        return ContextParallel.of(self.offsets, self.align, rank, size)

    # --- elsewhere

    def to(
        self,
        device: torch.device | torch.dtype | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool | None = None,
    ) -> Self:
        """The batch with its values and offsets on another device, or values of another dtype; lengths stay.

        Args:
            device: The target; a dtype is taken here as well, as in `Tensor.to`.
            dtype: The new dtype of the values.
            non_blocking: None copies without waiting where the values are pinned.

        Returns:
            The batch itself where nothing changes.
        """
        return pieces.move_documents(self, device, dtype, non_blocking)

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, from where `to(device)` copies without waiting.

        Raises:
            RuntimeError: There is no accelerator to pin memory for.
        """
        return pieces.pin_documents(self)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the values and the offsets, as `Tensor.record_stream` does."""
        for tensor in (self.values, self.offsets.table):
            tensor.record_stream(cast("torch.cuda.Stream", stream))

    def as_dict(self, names: Mapping[str, str]) -> dict[str, Any]:
        """A plain dict, for trainers that accept only mappings.

        Args:
            names: The attribute of each key, such as `{"input_ids": "values", "position_ids": "position_ids"}`.

        Raises:
            ValueError: There is no such attribute.
        """
        self.check_unwritten()
        return checks.named_attributes(self, names)

    def __reduce__(self) -> tuple[object, ...]:
        return reduce(self)

    def __copy__(self) -> Self:
        self.check_unwritten()
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self.check_unwritten()
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update({name: deepcopy(part, memo) for name, part in self.__dict__.items()})
        return copied
