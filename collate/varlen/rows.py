"""Which documents go into which row: options that the collator and the constructors share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import numpy as np

from collate.errors import LengthError
from collate.tensors.numpy_view import Int64Array
from collate.varlen.best_fit import cut_fields, cut_in_order, pack_best_fit, pack_fields
from collate.widths import check_count

Arrange: TypeAlias = Literal["best-fit", "given"]


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
        for name in ("capacity", "rows", "align", "max_documents", "max_seqlen"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=1, hint="leave it out, or give a whole number")
        if self.arrange not in ("best-fit", "given"):
            raise ValueError(f"arrange must be 'best-fit' or 'given', got {self.arrange!r}")
        if self.capacity is None and self.rows not in (None, 1):
            raise ValueError(f"rows={self.rows} need a capacity: give the steps that a row holds")
        if self.capacity is not None and self.capacity % self.align:
            raise ValueError(
                f"capacity must be a multiple of align, got {self.capacity} and {self.align}: "
                f"{-(-self.capacity // self.align) * self.align} is one"
            )
        return self

    def fill(self, sizes: Sequence[int], name: str = "sequences") -> tuple[Int64Array, Int64Array]:
        """Put documents into rows.

        Args:
            sizes: N steps with alignment, in source order, each of a document or of the longest field of a sample.
            name: what errors call them.

        Returns:
            The documents in row order, int64 `[N]`, and how many each row has, int64 `[R]`.

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
        packs = pack(sizes, self.capacity, self.max_documents)
        return self._counted(packs, f"{name}: {len(sizes)} documents of {sum(sizes)} steps", self.capacity)

    def fill_fields(self, sizes: Int64Array, capacities: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The same for samples with several fields, which are to be in the same row in all of them.

        Args:
            sizes: int64 `[N, K]`, steps with alignment, each at most its field's capacity.
            capacities: int64 `[K]`.

        Raises:
            LengthError: The rows are too few.
        """
        pack = pack_fields if self.arrange == "best-fit" else cut_fields
        packs = pack(sizes, capacities, self.max_documents)
        what = f"samples: {len(sizes)} of {sizes.sum(0).tolist()} steps in their fields"
        return self._counted(packs, what, capacities.tolist())

    def _counted(self, packs: list[list[int]], what: str, capacity: object) -> tuple[Int64Array, Int64Array]:
        if self.rows is not None:
            if len(packs) > self.rows:
                raise LengthError(
                    f"{what} (align={self.align}, max_documents={self.max_documents}) take {len(packs)} rows of "
                    f"{capacity} steps, rows is {self.rows}: collate fewer samples, or raise rows or capacity"
                )
            packs = packs + [[]] * (self.rows - len(packs))
        return np.array([item for items in packs for item in items], np.int64), np.array(list(map(len, packs)))
