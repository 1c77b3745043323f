"""Rows of documents cut into pieces, by rows or along time, and joined again."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from collate.tensors.numpy_view import to_array
from collate.varlen.layout import DocumentLayout, check_int32


def split_rows(values: Tensor, layout: DocumentLayout, rows: int) -> Iterator[tuple[Tensor, DocumentLayout]]:
    """Pieces of at most `rows` rows.

    Yields:
        Values, and the layout of their documents.

    Raises:
        ValueError: `rows` is below one.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    per_row = layout.array("documents_per_row")
    bounds = np.append(0, np.cumsum(per_row))
    for start in range(0, len(per_row), rows):
        stop = min(start + rows, len(per_row))
        documents = slice(int(bounds[start]), int(bounds[stop]))
        names = ("lengths", "permutation", *(["first_steps"] if layout.has_first_steps else []))
        arrays = {name: layout.array(name)[documents] for name in names}
        arrays["documents_per_row"] = per_row[start:stop]
        part = DocumentLayout(arrays, **layout.options)
        yield values[start:stop], part


def split_steps(values: Tensor, layout: DocumentLayout, steps: int) -> Iterator[tuple[Tensor, DocumentLayout]]:
    """Chunks of at most `steps` steps of all rows, with the layout of each.

    A row of 6 steps holds documents of 2 and 4 steps. Its chunks of 3 steps hold 2 and 1 steps of them, then 0 and 3:

    >>> import torch
    >>> arrays = {"lengths": np.array([2, 4]), "documents_per_row": np.array([2]), "permutation": np.arange(2)}
    >>> layout = DocumentLayout(arrays, capacity=6)
    >>> chunks = split_steps(torch.arange(6)[None], layout, 3)
    >>> [(part.array("lengths").tolist(), part.array("first_steps").tolist()) for _, part in chunks]
    [([2, 1], [0, 0]), ([0, 3], [2, 1])]

    Yields:
        Values, and the layout of their documents.

    Raises:
        ValueError: `steps` is below one, or no multiple of the layout's `align`.
    """
    if steps < 1 or steps % layout.align:
        raise ValueError(f"steps must be a multiple of align={layout.align}, at least 1, got {steps}")
    starts = layout.starts() - layout.rows_of_documents() * layout.capacity
    lengths, first_steps = layout.array("lengths"), layout.array("first_steps")
    for start in range(0, layout.capacity, steps):
        width = min(steps, layout.capacity - start)
        before = np.clip(start - starts, 0, lengths)
        options = layout.options | {"capacity": width}
        if layout.max_seqlen is not None:
            options["max_seqlen"] = min(width, layout.max_seqlen)
        arrays = {
            "lengths": np.clip(start + width - starts, 0, lengths) - before,
            "documents_per_row": layout.array("documents_per_row"),
            "permutation": layout.array("permutation"),
            "first_steps": first_steps + before,
        }
        part = DocumentLayout(arrays, **options)
        yield values[:, start : start + width], part


def join(layouts: Sequence[DocumentLayout], places: Tensor) -> DocumentLayout:
    """The layout of all rows of several batches, one after the other.

    Args:
        layouts: at least one, of one capacity and `align`.
        places: int64 `[N]`, the permutation of the whole.

    Raises:
        LengthError: The rows have too many steps for int32 offsets.
    """
    check_int32(sum(layout.num_rows for layout in layouts), layouts[0].capacity)
    options = layouts[0].options
    for name in ("max_documents", "max_seqlen"):
        caps = [getattr(layout, name) for layout in layouts]
        options[name] = None if None in caps else max(caps)
    names = ["lengths", "documents_per_row"]
    if any(layout.has_first_steps for layout in layouts):
        names.append("first_steps")
    arrays = {name: np.concatenate([layout.array(name) for layout in layouts]) for name in names}
    return DocumentLayout({**arrays, "permutation": to_array(places)}, **options)
