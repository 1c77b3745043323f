"""What the host knows of a batch's documents, checked, and the table of offsets that is made of it."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from collate.errors import LengthError
from collate.lengths.validation import Integers, as_int64, check_permutation
from collate.tensors.graphs import refuse_export
from collate.tensors.numpy_view import Int64Array, to_array
from collate.varlen.offsets import (
    CU_SEQLENS,
    MOST_STEPS,
    Int32Array,
    count_slots,
    document_starts,
    offset_table,
    spread_on_device,
    spread_on_host,
)
from collate.widths import check_count


@dataclass(frozen=True, eq=False)
class DocumentLayout:
    """Which documents are where: host integers only, shared by all batches of the same documents.

    Attributes:
        lengths: int64 `[N]` on the host, in row order.
        documents_per_row: int64 `[R]` on the host.
        permutation: int64 `[N]` on the host.
        first_steps: int64 `[N]` on the host, the steps of each document before this chunk; None is all 0.
        capacity: C, steps of a row.
        align: documents start at its multiples within their row.
        max_documents: documents that a row may have, which fixes the number of slots; None is as many as there are.
        max_seqlen: bound of the lengths that is given to kernels; None is C.
    """

    lengths: Tensor
    documents_per_row: Tensor
    permutation: Tensor
    first_steps: Tensor | None
    capacity: int
    align: int = 1
    max_documents: int | None = None
    max_seqlen: int | None = None
    # Copies, so that a write to the tensors is noticed; empty where nothing was checked yet.
    copies: dict[str, Int64Array] = field(default_factory=dict, repr=False)

    @classmethod
    def of_arrays(
        cls,
        lengths: Int64Array,
        per_row: Int64Array,
        permutation: Int64Array,
        first_steps: Int64Array | None,
        **options: Any,
    ) -> Self:
        """A layout of integers that are known to be right; options as in the class."""
        arrays = {"lengths": lengths, "documents_per_row": per_row, "permutation": permutation}
        if first_steps is not None:
            arrays["first_steps"] = first_steps
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        parts: dict[str, Any] = {"first_steps": None, **tensors, **options}
        return cls(**parts, copies=arrays)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.documents_per_row.shape[0]

    @property
    def options(self) -> dict[str, Any]:
        """What is no tensor."""
        return {name: getattr(self, name) for name in ("capacity", "align", "max_documents", "max_seqlen")}

    def array(self, name: str) -> Int64Array:
        """One of the tensors as an array that is not to be written to: int64 `[N]`, or `[R]` documents per row.

        Raises:
            LengthError: It was written to since the batch was made; or the layout was put together from a pytree's
                leaves and its parts do not fit; or a program is being exported.
        """
        refuse_export()
        if not self.copies:
            # A pytree is put together from any leaves, and looked at only when somebody needs them.
            checked = check_layout(self)
            self.copies.update(checked.copies)
        if name == "first_steps" and name not in self.copies:
            return np.zeros(len(self.copies["lengths"]), np.int64)
        kept, present = self.copies[name], to_array(getattr(self, name))
        if not np.array_equal(kept, present):
            raise LengthError(
                f"the batch was made with {name} {kept.tolist()}, and they were written to: they now are "
                f"{present.tolist()}, which its rows do not follow. Make a new batch of the sequences"
            )
        return kept

    def starts(self) -> Int64Array:
        """First step of each document in `[0, R * C]`: int64 `[N]`."""
        return document_starts(self.array("lengths"), self.array("documents_per_row"), self.capacity, self.align)

    def rows_of_documents(self) -> Int64Array:
        """The row of each document: int64 `[N]`."""
        return np.repeat(np.arange(self.num_rows), self.array("documents_per_row"))

    def make_table(self) -> Int32Array:
        """The table of offsets: int32 `[5, slots + 1]`."""
        per_row = self.array("documents_per_row")
        most = int(per_row.max()) if self.max_documents is None else self.max_documents
        return offset_table(
            self.array("lengths"),
            per_row,
            None if self.first_steps is None else self.array("first_steps"),
            capacity=self.capacity,
            align=self.align,
            slots=count_slots(len(per_row), most, self.align),
        )

    def changed(self, **parts: Any) -> Self:
        """The layout with other parts, to be checked when they are used."""
        return replace(self, **parts, copies={})


class Offsets:
    """A table of offsets on a device, and what is spread out of it there.

    Args:
        table: int32 `[5, slots + 1]`; its rows are named in `collate.varlen.offsets`.
        shape: R and C.
    """

    def __init__(self, table: Tensor, shape: tuple[int, int]) -> None:
        self.table = table
        self.shape = shape
        self._spread: tuple[Tensor, Tensor, Tensor] | None = None

    def spread(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mask bool, document ids int32 and position ids int64, all `[R, C]` on the table's device; made once.

        In compiled code they are made in the graph, whose shapes do not depend on lengths.
        """
        if torch.compiler.is_compiling():
            documents, positions = spread_on_device(self.table, self.shape)
            return documents >= 0, documents, positions
        if self._spread is None:
            on_host = type(self.table) is Tensor and self.table.is_cpu
            spread = (
                spread_on_host(self.table.numpy(), self.shape) if on_host else spread_on_device(self.table, self.shape)
            )
            self._spread = (spread[0] >= 0, *spread)
        return self._spread

    def cu_seqlens(self, row: int = CU_SEQLENS) -> Tensor:
        """One row of the table: int32 `[slots + 1]`."""
        return self.table[row]


def check_layout(layout: DocumentLayout) -> DocumentLayout:
    """Check host integers against each other, and take them as int64 tensors in memory of their own.

    Raises:
        LengthError: Integers are not on the host, a length is negative, documents do not fit their rows or are more
            than `max_documents` or longer than `max_seqlen`, documents per row do not sum to N, or offsets exceed
            int32.
        TypeError: They are not integers.
        ValueError: An option has a value that means nothing, or the permutation is none.
    """
    options = check_options(layout)
    lengths = _whole(layout.lengths, "lengths")
    per_row = _whole(layout.documents_per_row, "documents_per_row")
    if per_row.sum() != len(lengths):
        raise LengthError(
            f"documents_per_row sums to {per_row.sum()}, there are {len(lengths)} lengths: each document is in one row"
        )
    permutation = np.arange(len(lengths))
    if layout.permutation is not None and len(lengths):
        permutation = to_array(check_permutation(layout.permutation, len(lengths))).copy()
    first_steps = None if layout.first_steps is None else _whole(layout.first_steps, "first_steps")
    checked = DocumentLayout.of_arrays(lengths, per_row, permutation, first_steps, **options)
    check_fit(lengths, per_row, **options)
    return checked


def check_options(layout: DocumentLayout) -> dict[str, Any]:
    """Check the options of a layout, and take them as Python ints.

    Raises:
        LengthError: The rows have too many steps for int32 offsets.
        ValueError: An option is below one, or capacity is no multiple of `align`.
        TypeError: An option is not an int.
    """
    options: dict[str, Any] = {"capacity": layout.capacity, "align": layout.align}
    options |= {"max_documents": layout.max_documents, "max_seqlen": layout.max_seqlen}
    for name, value in options.items():
        if value is not None:
            options[name] = check_count(name, value, least=1, hint="give a number of steps or documents")
    if options["capacity"] % options["align"]:
        raise ValueError(
            f"capacity must be a multiple of align, got {layout.capacity} and {layout.align}: documents of a full row "
            f"would not start at multiples; {-(-layout.capacity // layout.align) * layout.align} is one"
        )
    check_int32(layout.num_rows, layout.capacity)
    return options


def check_int32(rows: int, capacity: int) -> None:
    """Check that offsets into all rows fit int32.

    Raises:
        LengthError: They do not.
    """
    if rows * capacity > MOST_STEPS:
        raise LengthError(
            f"{rows} rows of {capacity} steps are {rows * capacity} steps, offsets are int32 and reach {MOST_STEPS}: "
            "make batches of fewer rows"
        )


def check_fit(
    lengths: Int64Array,
    per_row: Int64Array,
    *,
    capacity: int,
    align: int,
    max_documents: int | None = None,
    max_seqlen: int | None = None,
) -> None:
    """Check that documents fit their rows and caps.

    Raises:
        LengthError: They do not; the message names the first row or document.
    """
    if max_documents is not None and per_row.max() > max_documents:
        row = int(per_row.argmax())
        raise LengthError(
            f"row {row} holds {per_row[row]} documents, max_documents is {max_documents}: raise it, or plan with it"
        )
    if max_seqlen is not None and len(lengths) and lengths.max() > max_seqlen:
        document = int(lengths.argmax())
        raise LengthError(
            f"document {document} has {lengths[document]} steps, max_seqlen is {max_seqlen}: raise it, or cut with "
            "max_length"
        )
    rows = np.repeat(np.arange(len(per_row)), per_row)
    ends = document_starts(lengths, per_row, capacity, align) + lengths - rows * capacity
    beyond = np.flatnonzero(ends > capacity)
    if len(beyond):
        row = int(rows[beyond[0]])
        raise LengthError(
            f"the documents of row {row} have {lengths[rows == row].tolist()} steps and end at step "
            f"{ends[rows == row][-1]} (align={align}), the capacity is {capacity}: put fewer into the row"
        )


def _whole(integers: Integers, name: str) -> Int64Array:
    """Integers of at least 0 on the host, as an array of their own.

    Raises:
        LengthError: They are on a device, negative, or not one-dimensional.
    """
    if isinstance(integers, Tensor) and not integers.is_cpu:
        raise LengthError(f"{name} must stay on the host, got a tensor on {integers.device}: keep them on the CPU")
    values = to_array(as_int64(integers, name)).copy()
    if values.ndim != 1:
        raise LengthError(f"{name} must be one-dimensional, got shape {list(values.shape)}")
    if len(values) and values.min() < 0:
        place = int(values.argmin())
        raise LengthError(f"{name} must not be negative, got {values[place]} at index {place}")
    return values
