"""Which documents go into which row: options that the collator and the constructors share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias, cast

import numpy as np

from collate.errors import LengthError
from collate.tensors.numpy_view import Int64Array
from collate.varlen.best_fit import cut_fields, cut_in_order, pack_best_fit, pack_fields
from collate.widths import check_count

Arrange: TypeAlias = Literal["best-fit", "given"]
"""How documents are arranged in rows: `"best-fit"` packs the list into few rows, `"given"` keeps its order."""
# The documents in row order, int64 `[N]`, and the number of documents of each row, int64 `[R]`.
DocumentOrder: TypeAlias = tuple[Int64Array, Int64Array]


@dataclass(frozen=True)
class RowOptions:
    """How documents are put into rows; see `VarlenCollator` for what each means."""

    capacity: int | None = None
    rows: int | None = None
    align: int = 1
    max_documents: int | None = None
    max_seqlen: int | None = None
    arrange: Arrange = "best-fit"

    def checked(self) -> Self:
        """The options, if they mean something.

        Raises:
            TypeError: A number is not an int.
            ValueError: A number is below one, capacity is no multiple of `align`, several rows have no capacity, or no
                arrangement of that name is known.
        """
        numbers = {name: getattr(self, name) for name in ("capacity", "rows", "align", "max_documents", "max_seqlen")}
        for name, value in numbers.items():
            if value is not None:
                numbers[name] = check_count(name, value, least=1, hint="leave it out, or give a whole number")
        if self.arrange not in ("best-fit", "given"):
            raise ValueError(f"arrange must be 'best-fit' or 'given', got {self.arrange!r}")
        if self.capacity is None and self.rows not in (None, 1):
            raise ValueError(f"rows={self.rows} need a capacity: give the steps that a row holds")
        if self.capacity is not None and self.capacity % self.align:
            raise ValueError(
                f"capacity must be a multiple of align, got {self.capacity} and {self.align}: "
                f"{-(-self.capacity // self.align) * self.align} is one"
            )
        return replace(self, **numbers)

    def fill(self, sizes: Sequence[int], name: str = "sequences") -> DocumentOrder:
        """Put documents into rows.

        Args:
            sizes: N steps with alignment, in source order, each of a document or of the longest field of a sample.
            name: The name of the documents in errors.

        Returns:
            The documents in row order, int64 `[N]`, and the number of documents of each row, int64 `[R]`.

        Raises:
            LengthError: A document is longer than a row, or the rows are too few.
        """
        if self.capacity is None:
            if self.max_documents is not None and len(sizes) > self.max_documents:
                raise LengthError(
                    f"{name}: a row without a capacity takes all {len(sizes)} documents, max_documents is "
                    f"{self.max_documents}: give a capacity, so that there are several rows, or smaller lists"
                )
            return np.arange(len(sizes)), np.array([len(sizes)])
        if max(sizes, default=0) > self.capacity:
            sample = max(range(len(sizes)), key=sizes.__getitem__)
            raise LengthError(
                f"{name}: sample {sample} takes {sizes[sample]} steps (align={self.align}), a row holds "
                f"{self.capacity}: cut with max_length, leave it out in the sampler, or raise the capacity"
            )
        pack = pack_best_fit if self.arrange == "best-fit" else cut_in_order
        order, per_row = _row_order(pack(sizes, self.capacity, self.max_documents))
        if self.rows is not None:
            what = f"{name}: {len(sizes)} documents of {sum(sizes)} steps"
            per_row = self._filled_up(per_row, what, self.capacity)
        return order, per_row

    def fill_fields(self, sizes: Int64Array, capacities: Int64Array) -> DocumentOrder:
        """The same for samples with several fields, which are to be in the same row in all of them.

        Args:
            sizes: int64 `[N, K]`, steps with alignment, each at most its field's capacity.
            capacities: int64 `[K]`.

        Raises:
            LengthError: The rows are too few.
        """
        pack = pack_fields if self.arrange == "best-fit" else cut_fields
        order, per_row = _row_order(pack(sizes, capacities, self.max_documents))
        if self.rows is not None:
            what = f"samples: {len(sizes)} of {sizes.sum(0).tolist()} steps in their fields"
            per_row = self._filled_up(per_row, what, capacities.tolist())
        return order, per_row

    def _filled_up(self, per_row: Int64Array, what: str, capacity: object) -> Int64Array:
        """Documents per row, with empty rows up to `rows`.

        Raises:
            LengthError: There are more rows.
        """
        missing = cast(int, self.rows) - len(per_row)
        if missing < 0:
            raise LengthError(
                f"{what} (align={self.align}, max_documents={self.max_documents}) take {len(per_row)} rows of "
                f"{capacity} steps, rows is {self.rows}: collate fewer samples, or raise rows or capacity"
            )
        return np.concatenate([per_row, np.zeros(missing, np.int64)]) if missing else per_row


def _row_order(rows: list[int]) -> DocumentOrder:
    """The row of each document -> documents in row order, and their number in each row.

    >>> _row_order([1, 0, 0, 1])
    (array([1, 2, 0, 3]), array([2, 2]))
    """
    numbers = np.array(rows, np.int64)
    return numbers.argsort(kind="stable"), np.bincount(numbers)
