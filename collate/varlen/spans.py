"""Where the documents of a batch lie: host integers, checked, and the table of offsets that is made from them."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from collate.errors import LengthError
from collate.lengths.tracking import version_of
from collate.lengths.validation import IntegersLike, as_int64, check_permutation
from collate.tensors.graphs import is_making_graph, refuse_export
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


class DocumentSpans:
    """The row, start and length of each document: host integers, shared by all batches of the same documents.

    The integers are private arrays. Users get tensors that are copies, made on request, so that a write to one is
    noticed.

    Args:
        arrays: Int64 `lengths` and `permutation` `[N]` and `documents_per_row` `[R]`, known to be right, which become
            the object's own; in a later chunk also `first_steps` `[N]`, the steps of each document in earlier chunks.
        tensors: The same as unchecked tensors, in place of arrays.
        capacity: C, steps of a row.
        align: Documents start at its multiples within their row.
        max_documents: Documents that a row may have, which fixes the number of slots; None is as many as there are.
        max_seqlen: Upper bound of the lengths, for kernels; None is C.
    """

    def __init__(
        self,
        arrays: Mapping[str, Int64Array] | None = None,
        tensors: Mapping[str, Any] | None = None,
        *,
        capacity: int,
        align: int = 1,
        max_documents: int | None = None,
        max_seqlen: int | None = None,
    ) -> None:
        self._arrays = dict(arrays or {})
        self._tensors = dict(tensors or {})
        self.capacity = capacity
        self.align = align
        self.max_documents = max_documents
        self.max_seqlen = max_seqlen
        self._starts: Int64Array | None = None

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self._arrays["documents_per_row"] if self._arrays else self.array("documents_per_row"))

    @property
    def options(self) -> dict[str, Any]:
        """Capacity, alignment and caps."""
        return {name: getattr(self, name) for name in ("capacity", "align", "max_documents", "max_seqlen")}

    @property
    def has_first_steps(self) -> bool:
        """Whether these are rows of a chunk, some of whose documents may have begun before."""
        return "first_steps" in self._arrays or "first_steps" in self._tensors

    def tensor(self, name: str) -> Tensor:
        """One of the arrays as a tensor for users, the same whenever it is asked for; `first_steps` may be zeros."""
        if name not in self._tensors:
            self._tensors[name] = torch.from_numpy(self.array(name).copy())
        return cast(Tensor, self._tensors[name])

    def arrays(self) -> Mapping[str, Int64Array]:
        """The arrays, by name, which are not to be written to.

        Raises:
            LengthError: The tensor of one was written to since the batch was made; or a pytree's leaves were put
                together, and do not fit; or a program is being exported.
        """
        refuse_export()
        if not self._arrays:
            # A pytree may be put together from any leaves, which are checked when they are first used.
            self._arrays = check_arrays(self._tensors, **self.options)
        for name, shown in self._tensors.items():
            kept = self._arrays.get(name)
            if kept is not None and not np.array_equal(kept, to_array(shown)):
                raise LengthError(
                    f"the batch was made with {name} {kept.tolist()}, and they were written to: they now are "
                    f"{shown.tolist()}, which its rows do not follow. Make a new batch of the sequences"
                )
        return self._arrays

    def array(self, name: str) -> Int64Array:
        """One of the arrays; `first_steps` may be zeros.

        Raises:
            LengthError: As `arrays`.
        """
        arrays = self.arrays()
        return arrays[name] if name in arrays else np.zeros(len(arrays["lengths"]), np.int64)

    def starts(self) -> Int64Array:
        """First step of each document in `[0, R * C]`: int64 `[N]`."""
        arrays = self.arrays()
        if self._starts is None:
            per_row = arrays["documents_per_row"]
            self._starts = document_starts(arrays["lengths"], per_row, self.capacity, self.align)
        return self._starts

    def rows_of_documents(self) -> Int64Array:
        """The row of each document: int64 `[N]`."""
        return np.repeat(np.arange(self.num_rows), self.array("documents_per_row"))

    def make_table(self) -> Int32Array:
        """The table of offsets: int32 `[5, slots + 1]`."""
        arrays = self.arrays()
        per_row = arrays["documents_per_row"]
        most = max(per_row.tolist()) if self.max_documents is None else self.max_documents
        return offset_table(
            arrays["lengths"],
            per_row,
            first_steps=arrays.get("first_steps"),
            capacity=self.capacity,
            align=self.align,
            slots=count_slots(len(per_row), most, self.align),
        )


class Offsets:
    """A table of offsets on a device, and the mask and ids of all steps that are made from it there.

    Args:
        table: int32 `[5, slots + 1]`; its rows are named in `collate.varlen.offsets`.
        shape: R and C.
    """

    def __init__(self, table: Tensor, shape: tuple[int, int]) -> None:
        self.table = table
        self.shape = shape
        self._spread: tuple[Tensor, Tensor, Tensor] | None = None
        self._versions = _versions_of(table)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Offsets":
        # torch writes to a tensor when it copies it, and the versions of the original would say that a user did.
        return Offsets(deepcopy(self.table, memo), self.shape)

    def spread(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mask bool, document ids int32 and position ids int64, all `[R, C]` on the table's device; made once.

        In compiled code, and in a CUDA graph, they are made in the graph, whose shapes do not depend on lengths.
        """
        if is_making_graph(self.table):
            documents, positions = spread_on_device(self.table, self.shape)
            return documents >= 0, documents, positions
        if self._spread is None:
            on_host = type(self.table) is Tensor and self.table.is_cpu
            spread = (
                spread_on_host(self.table.numpy(), self.shape) if on_host else spread_on_device(self.table, self.shape)
            )
            self._spread = (spread[0] >= 0, *spread)
            self._versions = _versions_of(self.table, *self._spread)
        return self._spread

    def check_unwritten(self) -> None:
        """Check that torch has not written to the table, the mask or the ids; a write through NumPy is for `verify`.

        Raises:
            LengthError: It has.
        """
        names = ("offsets", "mask", "document_ids", "position_ids")
        present = _versions_of(self.table, *(self._spread or ()))
        for name, before, now in zip(names, self._versions, present, strict=False):
            if before != now:
                raise LengthError(
                    f"the batch's {name} were written to {now - before} times since they were made: lengths do not "
                    "follow. Clone them before you change them, and give weights= to leave steps out of a loss"
                )

    def cu_seqlens(self, row: int = CU_SEQLENS) -> Tensor:
        """One row of the table: int32 `[slots + 1]`."""
        return self.table[row]


def _versions_of(*tensors: Tensor) -> list[int]:
    """How often torch has written to each tensor; 0 where it does not count."""
    return [0] * len(tensors) if torch.compiler.is_compiling() else [version_of(tensor) or 0 for tensor in tensors]


def check_arrays(
    integers: Mapping[str, IntegersLike | None],
    *,
    capacity: int,
    align: int,
    max_documents: int | None,
    max_seqlen: int | None,
) -> dict[str, Int64Array]:
    """Check the integers of spans against each other, and copy them to int64 arrays.

    Args:
        integers: `lengths`, `documents_per_row`, and `permutation` and `first_steps`, which may be None.
        capacity: as in `DocumentSpans`, as are the others.
        align: a divisor of the capacity.
        max_documents: a cap.
        max_seqlen: a cap.

    Raises:
        LengthError: Integers are not on the host, a length is negative, documents do not fit their rows or are more
            than `max_documents` or longer than `max_seqlen`, documents per row do not sum to N, or offsets exceed
            int32.
        TypeError: They are not integers.
        ValueError: The permutation is none.
    """
    arrays = {name: _whole(part, name) for name, part in integers.items() if part is not None and name != "permutation"}
    lengths, per_row = arrays["lengths"], arrays["documents_per_row"]
    check_int32(len(per_row), capacity)
    if per_row.sum() != len(lengths):
        raise LengthError(
            f"documents_per_row sums to {per_row.sum()}, there are {len(lengths)} lengths: each document is in one row"
        )
    arrays["permutation"] = np.arange(len(lengths))
    permutation = integers["permutation"]
    if permutation is not None and len(lengths):
        arrays["permutation"] = to_array(check_permutation(permutation, len(lengths))).copy()
    check_fit(lengths, per_row, capacity=capacity, align=align, max_documents=max_documents, max_seqlen=max_seqlen)
    return arrays


def check_options(*, capacity: int, align: int, max_documents: int | None, max_seqlen: int | None) -> dict[str, Any]:
    """Check the options of spans, and return them as Python ints.

    Raises:
        TypeError: An option is not an int.
        ValueError: An option is below one, or capacity is no multiple of `align`.
    """
    options: dict[str, Any] = {"capacity": capacity, "align": align}
    options |= {"max_documents": max_documents, "max_seqlen": max_seqlen}
    for name, value in options.items():
        if value is not None:
            options[name] = check_count(name, value, least=1, hint="give a number of steps or documents")
    if options["capacity"] % options["align"]:
        raise ValueError(
            f"capacity must be a multiple of align, got {capacity} and {align}: documents of a full row would not "
            f"start at multiples; {-(-capacity // align) * align} is one"
        )
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
    if len(lengths) and lengths.max() > capacity:
        # Sums of such lengths might overflow.
        document = int(lengths.argmax())
        raise LengthError(
            f"document {document} in row {rows[document]} has {lengths[document]} steps, the capacity is {capacity}: "
            "cut it, or make longer rows"
        )
    ends = document_starts(lengths, per_row, capacity, align) + lengths - rows * capacity
    beyond = np.flatnonzero(ends > capacity)
    if len(beyond):
        row = int(rows[beyond[0]])
        raise LengthError(
            f"the documents of row {row} have {lengths[rows == row].tolist()} steps and end at step "
            f"{ends[rows == row][-1]} (align={align}), the capacity is {capacity}: put fewer into the row"
        )


def _whole(integers: IntegersLike, name: str) -> Int64Array:
    """Integers of at least 0 on the host, copied to an array.

    Raises:
        LengthError: They are on a device, negative, or not one-dimensional.
    """
    if isinstance(integers, Tensor) and not integers.is_cpu:
        raise LengthError(f"{name} must stay on the host, got a tensor on {integers.device}: keep them on the CPU")
    values = to_array(as_int64(integers, name)).copy()
    if values.ndim != 1:
        raise LengthError(f"{name} must be one-dimensional, got shape {list(values.shape)}: give a list of integers")
    if len(values) and values.min() < 0:
        place = int(values.argmin())
        raise LengthError(f"{name} must not be negative, got {values[place]} at index {place}")
    return values
