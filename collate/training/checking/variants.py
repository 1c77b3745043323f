"""A batch with other rows, other values or other lengths: what the probes of `check_step` give to a step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, cast

import numpy as np
import torch
from torch import Tensor

from collate.batch import LengthTrackedBatch
from collate.errors import LengthError
from collate.operations.construct import changed_batch
from collate.operations.pieces import select_rows
from collate.tensors.masks import expand_like
from collate.tensors.nested import labelled_parts, map_parts


class Variants(Protocol):
    """What probes need of a batch, or of the samples that a batch is made of.

    Attributes:
        whole: what the step takes.
        kind: what one entry is called, `"row"` or `"sample"`.
        rows: B, how many there are.
        lengths: the lengths `[B]` of each variable-length field.
    """

    whole: Any
    kind: str
    rows: int
    lengths: dict[str, list[int]]

    def of(self, whole: Any) -> Self:
        """The variants of a changed whole."""

    def chosen(self, rows: Sequence[int]) -> Any:
        """The same with these rows only, in this order."""

    def alone(self, row: int) -> Any:
        """One row, no wider than it is long."""

    def counts(self, row: int) -> list[float]:
        """Every count that a mean over this row alone may divide by; nan where there is none."""

    def is_alike(self, name: str) -> bool:
        """Whether a field of whole numbers holds the same one everywhere, so that there is no other one to try."""

    def changed(self, name: str, row: int | None, steps: slice, *, wild: bool) -> Any:
        """Other values at some real steps of a row, or of all rows.

        Args:
            name: The field.
            row: None for all.
            steps: The real steps to change.
            wild: Values far from those of real steps; otherwise values of other real steps.
        """

    def cut(self, name: str, row: int, steps: int) -> Self:
        """The same with a row that ends earlier, in this field and in those of the same length."""


class BatchVariants:
    """Variants of a batch that holds `LengthTrackedBatch`es."""

    kind = "row"

    def __init__(self, batch: Any, generator: torch.Generator) -> None:
        self.whole, self.generator = batch, generator
        self.fields = dict(fields_of(batch))
        self.rows = len(next(iter(self.fields.values()))) if self.fields else 0
        # Fields with another number of rows, such as flattened sentences, stay as they are.
        self.fields = {name: field for name, field in self.fields.items() if len(field) == self.rows}
        self.lengths = {name: cast("list[int]", field.lengths.tolist()) for name, field in self.fields.items()}

    @property
    def has_padding(self) -> bool:
        """Whether any field has padding, so that there is something to try."""
        return any(min(lengths) < self.fields[name].padded.shape[1] for name, lengths in self.lengths.items())

    def of(self, whole: Any) -> "BatchVariants":
        """As in `Variants`."""
        return BatchVariants(whole, self.generator)

    def chosen(self, rows: Sequence[int]) -> Any:
        """As in `Variants`; whatever has an entry per row goes with the rows."""
        return rows_of(self.whole, torch.tensor(rows, device="cpu"), self.rows)

    def alone(self, row: int) -> Any:
        """As in `Variants`."""
        return mapped(self.chosen([row]), trimmed)

    def counts(self, row: int) -> list[float]:
        """As in `Variants`."""
        return counts_of(self.alone(row))

    def is_alike(self, name: str) -> bool:
        """As in `Variants`."""
        return holds_one_number(self.fields[name].flat())

    def changed(self, name: str, row: int | None, steps: slice, *, wild: bool) -> Any:
        """As in `Variants`."""
        field = self.fields[name]
        selected = torch.zeros_like(field.mask)
        selected[slice(None) if row is None else row, steps] = True
        return self.with_values(name, selected & field.mask, wild=wild)

    def with_values(self, name: str, selected: Tensor, *, wild: bool) -> Any:
        """Other values at these steps `[B, T]` of a field; see `drawn`."""
        field = self.fields[name]
        other = drawn(field.flat(), field.padded, self.generator, wild=wild)
        return self.swapped({name: field.with_padded(torch.where(expand_like(selected, other), other, field.padded))})

    def swapped(self, others: Mapping[str, LengthTrackedBatch]) -> Any:
        """The batch with other fields of these names."""
        replacements = {id(self.fields[name]): other for name, other in others.items()}
        return mapped(self.whole, lambda part: replacements.get(id(part), part))

    def cut(self, name: str, row: int, steps: int) -> "BatchVariants":
        """As in `Variants`; real values are left as they are."""
        others = {}
        for other, field in self.fields.items():
            if self.lengths[other] == self.lengths[name]:
                lengths = field.lengths.clone()
                lengths[row] -= steps
                # Steps that were real become padding, so that the value of padding is no longer known.
                others[other] = changed_batch(field, lengths=lengths, mask=None, padding_value=None)
        return self.of(self.swapped(others))

    def taken_along(self) -> list[str]:
        """Tensors that are selected with the rows only because they have as many entries as there are rows."""
        return [name for name, part in parts_of(self.whole) if isinstance(part, Tensor) and _is_column(part, self.rows)]


def parts_of(batch: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The parts of a nested batch by their dotted names; lists without tensors are parts themselves.

    Yields:
        Pairs of a name and a part.
    """
    if isinstance(batch, Mapping) or (isinstance(batch, (tuple, list)) and any(map(_is_structure, batch))):
        for label, part in labelled_parts(batch):
            yield from parts_of(part, f"{name}.{label}" if name else label)
    else:
        yield name, batch


def fields_of(batch: Any) -> Iterator[tuple[str, LengthTrackedBatch]]:
    """The variable-length fields of a nested batch, by their dotted names.

    Yields:
        Pairs of a name and a field.
    """
    for name, part in parts_of(batch):
        if isinstance(part, LengthTrackedBatch):
            yield name or "the batch", part


def mapped(batch: Any, change: Callable[[LengthTrackedBatch], LengthTrackedBatch]) -> Any:
    """The batch with every `LengthTrackedBatch` in it changed."""
    if isinstance(batch, LengthTrackedBatch):
        return change(batch)
    return map_parts(batch, lambda part: mapped(part, change))


def rows_of(batch: Any, rows: Tensor, of: int) -> Any:
    """Some rows int64 `[R]` of a batch of `of` rows: of its fields and of whatever else has an entry per row."""
    if isinstance(batch, LengthTrackedBatch):
        if len(batch) != of:
            return batch
        return select_rows(batch, rows)
    if not _is_column(batch, of):
        return map_parts(batch, lambda part: rows_of(part, rows, of))
    if isinstance(batch, Tensor):
        return batch.index_select(0, rows.to(batch.device))
    if isinstance(batch, np.ndarray):
        return batch[rows.numpy()]
    return type(batch)(batch[row] for row in rows.tolist())


def widened(field: LengthTrackedBatch, steps: int = 3) -> LengthTrackedBatch:
    """The same field with more steps of padding."""
    # An unspecified value may be anything, so that 0 is as good as any.
    value = 0 if field.padding_value is None else field.padding_value
    more = field.padded.new_full((len(field), steps, *field.padded.shape[2:]), value)
    return _as_wide(field, torch.cat([field.padded, more], 1))


def trimmed(field: LengthTrackedBatch) -> LengthTrackedBatch:
    """The same field, no wider than its longest row."""
    return _as_wide(field, field.padded[:, : max(int(field.lengths.max()), 1)])


def holds_one_number(steps: Tensor) -> bool:
    """Whether whole numbers are all the same."""
    return not _is_inexact(steps) and steps.dtype != torch.bool and len(torch.unique(steps)) < 2


def drawn(real: Tensor, present: Tensor, generator: torch.Generator, *, wild: bool) -> Tensor:
    """Draw values that differ from the present ones and that real steps could hold.

    Args:
        real: `[M, *F]`, all real steps.
        present: `[..., *F]`.
        generator: Source of the random choices.
        wild: Normal numbers of four times the standard deviation instead; whole numbers are never wild.

    Returns:
        A tensor like `present`.
    """
    real, shape = real.detach().cpu(), tuple(present.shape)
    if not len(real):
        return present
    if real.dtype == torch.bool:
        return ~present
    if not _is_inexact(real):
        values: Tensor = torch.unique(real)
        # With two classes an independent draw repeats the value half the time, and four repeats in a row are common.
        indices = torch.searchsorted(values.long(), present.detach().cpu().long().contiguous())
        shift = torch.randint(1, max(len(values), 2), shape, generator=generator, device="cpu")
        return values[(indices + shift) % len(values)].to(present.device)
    if not wild and bool((real != real[:1]).any()):
        # Whole steps are copied: probabilities still sum to one, and unit vectors keep their length.
        axes = shape[: present.dim() - real.dim() + 1]
        steps = torch.randint(len(real), axes, generator=generator, device="cpu")
        return real[steps].to(present.device)
    exact = torch.complex128 if real.is_complex() else torch.float64
    center = real.to(exact).mean()
    spread = (real.to(exact) - center).abs().square().mean().sqrt() + 1
    wild_values: Tensor = center + 4 * spread * torch.randn(shape, generator=generator, dtype=exact, device="cpu")
    return wild_values.to(device=present.device, dtype=real.dtype)


def counts_of(batch: Any) -> list[float]:
    """Every count that a mean over a batch of one row may divide by: steps, steps - 1, pairs, targets, weights."""
    counts: list[float] = []
    for _, part in parts_of(batch):
        if isinstance(part, LengthTrackedBatch):
            # The square is the number of attention scores, one for each pair of steps.
            counts += [float(part.num_tokens), float(part.num_tokens - 1), float(part.num_tokens**2)]
            counts += _weights(part.flat())
        elif isinstance(part, Tensor) and part.dim() and len(part) == 1:
            counts += [float(part.numel()), float(part.numel() - 1), *_weights(part[0] if part.dim() > 1 else part)]
            counts += [float(part)] if part.dim() == 1 and not part.is_complex() else []
    return counts


def shares_of(counts: Sequence[Sequence[float]]) -> list[list[float]]:
    """Weights `[B]` of the rows' means in a batch's mean: one list for each kind of count."""
    columns = {tuple(column) for column in zip(*counts, strict=True)}
    return [
        [count / sum(column) for count in column]
        for column in sorted(columns)
        if all(0 <= count < np.inf for count in column) and sum(column) > 0
    ]


def _weights(steps: Tensor) -> list[float]:
    """The total weight of steps `[M, *F]`: of all, and without the first, which shifted targets leave out."""
    steps = steps.detach()
    if steps.is_complex() or (steps.is_floating_point() and bool((steps < 0).any())):
        return [np.nan, np.nan]
    # A negative number means "no target", as -100 does.
    weights = steps if steps.is_floating_point() or steps.dtype == torch.bool else steps >= 0
    return [float(weights.double().sum()), float(weights[1:].double().sum())]


def _as_wide(field: LengthTrackedBatch, padded: Tensor) -> LengthTrackedBatch:
    """The same field with values of another width."""
    return changed_batch(field, padded=padded, mask=None)


def _is_inexact(values: Tensor) -> bool:
    """Whether values are floats or complex."""
    return values.is_floating_point() or values.is_complex()


def _is_structure(part: object) -> bool:
    """Whether a list that holds such a part is a container, and not a part itself."""
    return isinstance(part, (LengthTrackedBatch, Tensor, np.ndarray, Mapping, tuple, list))


def _is_column(part: object, rows: int) -> bool:
    """Whether a part has one entry per row: a tensor, an array, or a list or tuple that is no container of fields."""
    if isinstance(part, (Tensor, np.ndarray)):
        return part.ndim > 0 and len(part) == rows
    if not isinstance(part, (list, tuple)) or hasattr(part, "_fields") or len(part) != rows:
        return False
    if any(isinstance(entry, (LengthTrackedBatch, Mapping)) for entry in part) and any(True for _ in fields_of(part)):
        return False
    # A pair of tensors of two rows each is a pair of columns, not a column of two entries.
    columns = (Tensor, np.ndarray, list, tuple) if isinstance(part, tuple) else (Tensor, np.ndarray)
    return not all(isinstance(entry, columns) and _is_column(entry, rows) for entry in part)


def check_fields(variants: BatchVariants) -> None:
    """Refuse a batch with nothing to check.

    Raises:
        LengthError: It holds no `LengthTrackedBatch`, or none with padding to try.
    """
    if not variants.fields:
        raise LengthError(
            "the batch holds no LengthTrackedBatch: collate it with PadCollator, or pass samples= and collate= to "
            "check it together with your own collate function"
        )
    if not variants.has_padding:
        raise LengthError("no field has padding: check with rows of different lengths")
