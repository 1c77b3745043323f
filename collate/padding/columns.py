"""A field's values as a column of the batch: numbers, or samples of one shape, stacked to one tensor."""

from collections.abc import Iterable
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from collate.padding.rows import RaggedRows, refuse_masked_arrays
from collate.tensors.numpy_view import CARRIERS, Int64Array

# Variable-length rows, one tensor `[B, ...]`, or a list of anything else.
Column: TypeAlias = RaggedRows | Tensor | list[object]

# None is torch's default float.
NUMBER_DTYPES: dict[type, torch.dtype | None] = {bool: torch.bool, int: torch.int64, float: None}
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_SCALARS = (int, float, np.number, np.bool_)


def titled(name: str) -> str:
    """A field's name for messages."""
    return f"field {name!r}" if name else "samples"


def declared_numbers(column: Column, name: str) -> Tensor:
    """One number for each sample, of any dtype: `[B]`.

    Raises:
        TypeError: The samples hold something else.
    """
    if isinstance(column, RaggedRows) and not column.features and (column.lengths == 1).all():
        return column.join(list(column.items), len(column.items))
    if isinstance(column, Tensor):
        return column.flatten() if column.numel() == len(column) else column
    kind = "LengthTrackedBatch" if isinstance(column, RaggedRows) else "list"
    raise TypeError(f"declared lengths of {name} must be integers, got {kind}: one whole number for each sample")


def stack_numbers(name: str, values: list[object], kinds: set[type]) -> Tensor:
    """One number per sample as a tensor `[B]`.

    Raises:
        TypeError: They are of several types.
    """
    if len(kinds) > 1:
        raise TypeError(f"{titled(name)} must be numbers of one kind, got {sorted(kind.__name__ for kind in kinds)}")
    return torch.tensor(values, dtype=NUMBER_DTYPES[kinds.pop()], device="cpu")


def stack_samples(name: str, values: list[object]) -> Tensor:
    """Samples of one shape as a tensor `[B, ...]`.

    Raises:
        TypeError: torch has no such dtype.
        ValueError: Samples differ in type, dtype or shape.
    """
    refuse_masked_arrays(values, titled(name))
    rows = [value if isinstance(value, Tensor) else np.asarray(value) for value in values]
    first = rows[0]
    for index, row in enumerate(rows):
        if (type(row), row.dtype, tuple(row.shape)) != (type(first), first.dtype, tuple(first.shape)):
            raise ValueError(
                f"{titled(name)} is stacked, so all samples must be alike, got {list(first.shape)} {first.dtype} in "
                f"sample 0 and {list(row.shape)} {row.dtype} in sample {index}"
            )
    if isinstance(first, Tensor):
        stacked = torch.stack(cast("list[Tensor]", rows))
        # A tensor with an autograd graph cannot be sent from a worker.
        return stacked if get_worker_info() is None else stacked.detach()
    array = np.stack(rows)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{titled(name)} cannot be stacked: torch has no dtype for {array.dtype}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(
        array.astype(np.float32) if type(values[0]) in (float, list) and array.dtype.kind == "f" else array
    )


def take_rows(column: Tensor, order: Int64Array) -> Tensor:
    """The rows of a tensor in another order, int64 `[n]`; of any dtype."""
    if column.dtype in _UNSIGNED:
        # torch knows these dtypes, but does not index them.
        signed = column.view(CARRIERS[column.dtype.itemsize])
        return signed.index_select(0, torch.from_numpy(order)).view(column.dtype)
    return column.index_select(0, torch.from_numpy(order))


def are_numbers(values: Iterable[Iterable[object]]) -> bool:
    """Whether lists, nested or not, hold numbers only."""
    kinds = {kind for value in values for kind in set(map(type, value))}
    if list in kinds:
        rows = (row for value in values for row in value if isinstance(row, list))
        return all(issubclass(kind, (list, *_SCALARS)) for kind in kinds) and are_numbers(list(rows))
    return all(issubclass(kind, _SCALARS) for kind in kinds)
