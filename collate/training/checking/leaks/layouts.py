"""Where documents are among the time steps of a field."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from collate.tensors.numpy_view import Int64Array, to_array
from collate.varlen.batch import VarlenBatch
from collate.varlen.offsets import document_starts


class DocumentLayout:
    """Where N documents are among the time steps of a field.

    Args:
        starts: first step of each, int64 `[N]`, rows one after the other.
        lengths: int64 `[N]`.
        shapes: the rows and steps of a row that tensors with these steps may have; the first one is the batch's own.
    """

    def __init__(self, starts: Int64Array, lengths: Int64Array, shapes: Sequence[tuple[int, int]]) -> None:
        self.starts, self.lengths, self.shapes = starts, lengths, list(dict.fromkeys(shapes))
        self.steps = shapes[0][0] * shapes[0][1]
        ids = np.full(self.steps, -1)
        for document, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            ids[start : start + length] = document
        # The document of each step, -1 in gaps: int64 `[steps]`.
        self.ids = torch.from_numpy(ids)

    @classmethod
    def of(cls, field: VarlenBatch) -> "DocumentLayout":
        """The layout of a varlen batch."""
        rows, capacity = field.values.shape[:2]
        lengths, per_row = field.host_lengths(), to_array(field.documents_per_row)
        starts = document_starts(lengths, per_row, capacity, field.align)
        return cls(starts, lengths, [(rows, capacity)])

    def as_steps(self, tensor: Tensor, *, steps_last: bool = False) -> Tensor | None:
        """A tensor that has an entry per step, as `[steps, ...]`; None where it has none.

        Args:
            tensor: `[R, C, ...]`, `[R * C, ...]` or `[1, R * C, ...]`.
            steps_last: take `[R, ..., C]` as well, as convolutions have it.
        """
        shape = tuple(tensor.shape)
        if shape[:1] == (self.steps,):
            return tensor
        if shape[:2] == (1, self.steps):
            return tensor[0]
        for rows, capacity in self.shapes:
            if shape[:2] == (rows, capacity):
                return tensor.flatten(0, 1)
            if steps_last and len(shape) > 2 and (shape[0], shape[-1]) == (rows, capacity):
                return tensor.movedim(-1, 1).flatten(0, 1)
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DocumentLayout) and self.shapes == other.shapes and torch.equal(self.ids, other.ids)

    __hash__ = None  # type: ignore[assignment]


def distinct_layouts(layouts: Iterable[DocumentLayout]) -> list[DocumentLayout]:
    """DocumentLayout without repetition."""
    found: list[DocumentLayout] = []
    for layout in layouts:
        if layout not in found:
            found.append(layout)
    return found
