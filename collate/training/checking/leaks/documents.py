"""A batch of documents with other contents, or with its documents in another order."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from collate.errors import LengthError
from collate.lengths.validation import as_int64
from collate.tensors.masks import expand_like
from collate.tensors.nested import labelled_parts, map_parts
from collate.tensors.numpy_view import Int64Array, to_array
from collate.training.checking.leaks.contents import are_positions, other_contents
from collate.training.checking.leaks.layouts import DocumentLayout, distinct_layouts
from collate.training.checking.rerun import with_other_values
from collate.varlen.batch import VarlenBatch
from collate.varlen.offsets import document_starts


class DocumentCases(Protocol):
    """What probes need of a batch of documents.

    Attributes:
        whole: what the step takes.
        count: N.
        layouts: where documents are, in each field whose lengths differ.
        lengths: the most steps that each document has in any field, int64 `[N]`.
        fields: the fields with contents, by name.
        notes: what is not changed, and why.
    """

    whole: Any
    count: int
    layouts: list[DocumentLayout]
    lengths: Int64Array
    fields: dict[str, Tensor]
    notes: list[str]

    def changed(self, documents: Collection[int]) -> Any:
        """The batch with other contents in these documents, the same ones whenever they are changed."""

    def redrawn(self, seed: int) -> Self:
        """The same batch, for which `changed` gives other contents again."""

    def with_leaves(self, batch: Any) -> tuple[Any, dict[str, tuple[Tensor, DocumentLayout]]]:
        """A batch whose float fields are leaves that take gradients, and these leaves."""

    def reversed(self) -> tuple[Any, list[DocumentLayout], Int64Array] | str:
        """The batch with the documents of each row in reverse, their layouts, and which document each now is.

        Where that cannot be made, the reason.
        """

    def is_silent(self, document: int) -> bool:
        """Whether labels say that no step of a document counts, so that it may have no result."""


class VarlenCases:
    """Cases of a batch that holds `VarlenBatch`es."""

    def __init__(self, batch: Any, seed: int) -> None:
        self.whole = batch
        self.parts = dict(_varlen_parts(batch))
        self.count = len(next(iter(self.parts.values())))
        for name, part in self.parts.items():
            if len(part) != self.count:
                raise LengthError(
                    f"field {name!r} has {len(part)} documents, the first field has {self.count}: collate all fields "
                    "of the batch together"
                )
        self._layout_of = {name: DocumentLayout.of(part) for name, part in self.parts.items()}
        self.layouts = distinct_layouts(self._layout_of.values())
        self.lengths = np.max([part.host_lengths() for part in self.parts.values()], axis=0)
        self.fields = {name: part.values for name, part in self.parts.items()}
        steps = {name: (part.values.flatten(0, 1), self._layout_of[name].ids) for name, part in self.parts.items()}
        contents, self.notes = _other_contents(steps, seed)
        self.contents = {name: contents[name].view_as(field) for name, field in self.fields.items()}

    def changed(self, documents: Collection[int]) -> Any:
        """As in `DocumentCases`."""
        others = {}
        for name, part in self.parts.items():
            selected = _selected(part.document_ids, documents)
            values = torch.where(expand_like(selected, part.values), self.contents[name], part.values)
            others[id(part)] = with_other_values(part, values)
        return _replaced(self.whole, others)

    def redrawn(self, seed: int) -> "VarlenCases":
        """As in `DocumentCases`."""
        return VarlenCases(self.whole, seed)

    def with_leaves(self, batch: Any) -> tuple[Any, dict[str, tuple[Tensor, DocumentLayout]]]:
        """As in `DocumentCases`."""
        leaves, others = {}, {}
        for name, part in _varlen_parts(batch):
            if part.values.is_floating_point():
                leaf = part.values.detach().requires_grad_()
                leaves[name] = leaf, self._layout_of[name]
                others[id(part)] = with_other_values(part, leaf)
        return _replaced(batch, others), leaves

    def reversed(self) -> tuple[Any, list[DocumentLayout], Int64Array] | str:
        """As in `DocumentCases`."""
        per_row = to_array(next(iter(self.parts.values())).documents_per_row)
        if per_row.max() < 2:
            return "no row holds two documents"
        ends = np.cumsum(per_row)
        order = np.concatenate(
            [np.arange(end - 1, end - size - 1, -1) for end, size in zip(ends, per_row, strict=True)]
        )
        turned = {id(part): _reordered(part, order) for part in self.parts.values()}
        for name, part in _walk(self.whole):
            if not _follows_documents(part, self.layouts, self.count, len(per_row)):
                return f"{name!r} may say where documents are, and cannot be turned: make it from the batch in the step"
        batch = _replaced(_documents_in_order(self.whole, order, self.count), turned)
        return batch, distinct_layouts(DocumentLayout.of(part) for part in turned.values()), order

    def is_silent(self, document: int) -> bool:
        """As in `DocumentCases`."""
        parts = [(part.values.flatten(0, 1), part.document_ids.flatten()) for part in self.parts.values()]
        return any(_is_negative(values[ids == document]) for values, ids in parts)


class PlainCases:
    """Cases of plain tensors whose documents are given by their bounds."""

    def __init__(self, batch: Any, names: Collection[str], cu_seqlens: Any, seed: int) -> None:
        bounds = _check_bounds(cu_seqlens)
        self.whole, starts, self.lengths = batch, bounds[:-1], np.diff(bounds)
        self.fields = _plain_fields(batch, names)
        self.count = len(self.lengths)
        end = int(bounds[-1])
        steps, shapes = _steps_of(self.fields, end)
        self.layouts = [DocumentLayout(starts, self.lengths, [(1, steps), *shapes])]
        ids = self.layouts[0].ids
        contents, self.notes = _other_contents({name: (self._flat(f), ids) for name, f in self.fields.items()}, seed)
        self.contents = {name: contents[name].view_as(field) for name, field in self.fields.items()}

    def changed(self, documents: Collection[int]) -> Any:
        """As in `DocumentCases`."""
        others = {}
        for name, field in self.fields.items():
            selected = expand_like(_selected(self.layouts[0].ids.to(field.device), documents), self._flat(field))
            values = torch.where(selected, self._flat(self.contents[name]), self._flat(field))
            others[id(field)] = values.view_as(field)
        return _replaced(self.whole, others)

    def redrawn(self, seed: int) -> "PlainCases":
        """As in `DocumentCases`."""
        bounds = np.append(self.layouts[0].starts, self.layouts[0].starts[-1] + self.lengths[-1])
        return PlainCases(self.whole, list(self.fields), bounds, seed)

    def with_leaves(self, batch: Any) -> tuple[Any, dict[str, tuple[Tensor, DocumentLayout]]]:
        """As in `DocumentCases`."""
        leaves, others = {}, {}
        for name in self.fields:
            field = batch[name]
            if field.is_floating_point():
                leaf = field.detach().requires_grad_()
                leaves[name], others[id(field)] = (leaf, self.layouts[0]), leaf
        return _replaced(batch, others), leaves

    def reversed(self) -> tuple[Any, list[DocumentLayout], Int64Array] | str:
        """As in `DocumentCases`."""
        return "the step knows the offsets of plain tensors itself; a VarlenBatch is tried with its documents reversed"

    def is_silent(self, document: int) -> bool:
        """As in `DocumentCases`."""
        here = self.layouts[0].ids == document
        return any(_is_negative(self._flat(field)[here.to(field.device)]) for field in self.fields.values())

    def _flat(self, field: Tensor) -> Tensor:
        """A field as `[steps, ...]`."""
        steps = self.layouts[0].as_steps(field)
        return field if steps is None else steps


def holds_documents(batch: Any) -> bool:
    """Whether there is a `VarlenBatch` in a nested batch."""
    return any(True for _ in _varlen_parts(batch))


def _walk(batch: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All parts of a nested batch by dotted names.

    Yields:
        Pairs of a name and a part.
    """
    parts = labelled_parts(batch)
    if not parts:
        yield name, batch
    for label, part in parts:
        yield from _walk(part, f"{name}.{label}" if name else label)


def _varlen_parts(batch: Any) -> Iterator[tuple[str, VarlenBatch]]:
    """The varlen batches in a nested batch.

    Yields:
        Pairs of a name and a batch.
    """
    for name, part in _walk(batch):
        if isinstance(part, VarlenBatch):
            yield name or "the batch", part


def _follows_documents(part: Any, layouts: Sequence[DocumentLayout], count: int, rows: int) -> bool:
    """Whether a part of a batch is as right as before when documents move within their rows.

    Numbers, and what has an entry per row, stay right; what has an entry per document is turned as well. Other tensors
    may be masks, positions or offsets, except for a list of float numbers, such as weights of classes.
    """
    if not isinstance(part, (Tensor, np.ndarray)):
        return not isinstance(part, BlockMask)
    shape = tuple(part.shape)
    steps = {size for layout in layouts for pair in layout.shapes for size in (pair[1], pair[0] * pair[1])} - {1}
    if not shape or shape == (1,) or (shape == (rows,) and rows not in steps):
        return True
    if shape[0] == count and count not in steps:
        return all(shape[:2] != pair for layout in layouts for pair in layout.shapes)
    return len(shape) == 1 and shape[0] not in steps and torch.as_tensor(part).is_floating_point()


def _other_contents(fields: Mapping[str, tuple[Tensor, Tensor]], seed: int) -> tuple[dict[str, Tensor], list[str]]:
    """Other contents of fields `[steps, *F]` with the ids of their steps; and notes on positions, which stay."""
    positions = [name for name, (steps, ids) in fields.items() if are_positions(name, steps, ids)]
    if len(positions) == len(fields):
        positions = []
    contents = {
        name: steps if name in positions else other_contents(steps, ids, seed) for name, (steps, ids) in fields.items()
    }
    notes = [f"other contents of {name!r}: it counts the steps of each document, as positions do" for name in positions]
    return contents, notes


def _replaced(batch: Any, others: Mapping[int, Any]) -> Any:
    """The batch with other parts instead of those with these ids."""
    if id(batch) in others:
        return others[id(batch)]
    return map_parts(batch, lambda part: _replaced(part, others))


def _documents_in_order(batch: Any, order: Int64Array, count: int) -> Any:
    """The batch in which tensors, arrays and lists with an entry per document follow another order."""
    if isinstance(batch, Tensor) and batch.dim() and len(batch) == count:
        return batch.index_select(0, torch.from_numpy(order).to(batch.device))
    if isinstance(batch, np.ndarray) and batch.ndim and len(batch) == count:
        return batch[order]
    if isinstance(batch, list) and len(batch) == count and not any(isinstance(part, VarlenBatch) for part in batch):
        return [batch[index] for index in order.tolist()]
    return map_parts(batch, lambda part: _documents_in_order(part, order, count))


def _reordered(part: VarlenBatch, order: Int64Array) -> VarlenBatch:
    """A varlen batch whose documents follow another order, as many in each row as before."""
    layout, lengths = DocumentLayout.of(part), part.host_lengths()[order]
    rows, capacity = part.values.shape[:2]
    per_row = to_array(part.documents_per_row)
    starts = document_starts(lengths, per_row, capacity, part.align)
    source = torch.from_numpy(np.flatnonzero(layout.ids.numpy() < 0))
    index = torch.full((rows * capacity,), -1)
    for document, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        begin = int(layout.starts[order[document]])
        index[start : start + length] = torch.arange(begin, begin + length)
    # Gaps are as many as before.
    index[index < 0] = source
    values = part.values.flatten(0, 1).index_select(0, index.to(part.device)).view_as(part.values)
    return VarlenBatch(
        values,
        lengths,
        per_row,
        to_array(part.permutation)[order],
        padding_value=part.padding_value,
        align=part.align,
        max_documents=part.max_documents,
        max_seqlen=part.max_seqlen,
        ignore_index=part.ignore_index,
    )


def _selected(ids: Tensor, documents: Collection[int]) -> Tensor:
    """Which steps are of these documents: bool like `ids`."""
    return torch.isin(ids, torch.tensor(sorted(documents), dtype=ids.dtype, device=ids.device))


def _is_negative(steps: Tensor) -> bool:
    """Whether whole numbers are negative at every step but the first, which has no label where targets are shifted."""
    if steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool:
        return False
    return bool((steps[1:] < 0).all() or (steps[:-1] < 0).all())


def _check_bounds(cu_seqlens: Any) -> Int64Array:
    """Offsets of documents, checked: int64 `[N + 1]`.

    Raises:
        LengthError: They do not begin at 0, or they fall.
    """
    on_host = cu_seqlens.cpu() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    bounds = to_array(as_int64(on_host, "cu_seqlens"))
    if bounds.ndim != 1 or len(bounds) < 2 or bounds[0] != 0 or (np.diff(bounds) < 0).any():
        raise LengthError(f"cu_seqlens must begin at 0 and never fall, [documents + 1], got {bounds.tolist()}")
    return bounds


def _plain_fields(batch: Any, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors with these names.

    Raises:
        LengthError: The batch has no such tensor.
    """
    fields = {}
    for name in names:
        field = batch.get(name) if isinstance(batch, Mapping) else None
        if not isinstance(field, Tensor):
            raise LengthError(f"fields must name tensors of the batch, {name!r} is {type(field).__name__}")
        fields[name] = field
    return fields


def _steps_of(fields: Mapping[str, Tensor], end: int) -> tuple[int, list[tuple[int, int]]]:
    """How many steps the fields have, and the rows and steps of a row in which they come.

    Raises:
        LengthError: A field has no entry per step, or not as many as another.
    """
    counts: dict[str, int] = {}
    shapes = []
    for name, field in fields.items():
        flat = field.shape[0] if field.dim() else 0
        both = flat * field.shape[1] if field.dim() > 1 else flat
        # `[T, F]` begins with the steps, `[R, C]` has them in both axes.
        counts[name] = flat if flat >= end else both
        if flat < end and field.dim() > 1:
            shapes.append((field.shape[0], field.shape[1]))
    sizes = set(counts.values())
    if len(sizes) != 1 or min(sizes) < end:
        raise LengthError(
            f"cu_seqlens ends at step {end}, the fields have {counts} steps: each field must be [steps, ...] or "
            "[rows, steps, ...], with all documents in it"
        )
    return sizes.pop(), shapes
