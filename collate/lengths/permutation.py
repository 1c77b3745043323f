"""The order of rows: which sample of the collated list each row of a batch was.

Rows of two fields that are collated together follow one field's lengths, here those of the first, longest first:

>>> tokens, tags = np.array([1, 3, 2]), np.array([4, 0, 0])
>>> order = row_order(tokens, "longest")
>>> order, tokens[order], tags[order]
(array([1, 2, 0]), array([3, 2, 1]), array([0, 0, 4]))
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from collate.lengths.tracking import TrackedBatch, check_unwritten
from collate.lengths.validation import IntegersLike, as_int64
from collate.tensors.numpy_view import Int64Array, to_array
from collate.tensors.to_device import to_device

Order: TypeAlias = Literal["longest", "given"] | IntegersLike
"""Order of rows: `"longest"` first, `"given"`, or a permutation `[B]`, whose row i is sample `order[i]`."""


def row_order(lengths: Int64Array, order: Order) -> Int64Array:
    """The sample that each row of a batch takes: int64 `[B]`.

    Args:
        lengths: int64 `[B]` in source order.
        order: `"longest"`, `"given"` or a permutation.

    Raises:
        TypeError: The permutation is not made of integers.
        ValueError: It is not a permutation of the rows, or no order of that name is known.
    """
    if isinstance(order, str):
        if order == "longest":
            return np.argsort(-lengths, kind="stable")
        if order == "given":
            return np.arange(len(lengths))
        raise ValueError(f"order must be 'longest', 'given' or a permutation, got {order!r}")
    indices = to_array(as_int64(order, "order"))
    if not np.array_equal(np.sort(indices), np.arange(len(lengths))):
        raise ValueError(f"order must be a permutation of the {len(lengths)} rows, got {indices.tolist()}")
    return indices


def join_permutations(permutations: Sequence[Tensor]) -> Tensor:
    """The permutation of several batches joined to one.

    Pieces of one batch hold each index from 0 once, and keep them. Other batches follow each other:

    >>> join_permutations([torch.tensor([2, 0]), torch.tensor([1])])
    tensor([2, 0, 1])
    >>> join_permutations([torch.tensor([1, 0]), torch.tensor([1, 0])])
    tensor([1, 0, 3, 2])
    """
    joined = torch.cat(list(permutations))
    if np.array_equal(np.sort(to_array(joined)), np.arange(len(joined))):
        return joined
    # A piece of a larger batch has gaps in its indices: ranks close them.
    starts = np.cumsum([0, *map(len, permutations)])
    ranks = [np.argsort(np.argsort(to_array(permutation))) for permutation in permutations]
    return torch.from_numpy(np.concatenate([rank + start for rank, start in zip(ranks, starts, strict=False)]))


def unsort_tensor(batch: TrackedBatch, tensor: Tensor, dim: int) -> Tensor:
    """A tensor with one entry per row on axis `dim`, in source order.

    Raises:
        LengthError: The batch was written to.
        TypeError: It is no tensor.
        ValueError: The axis does not hold one entry per row.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"unsort takes a tensor with one entry per row, got {_unsort_hint(tensor)}")
    check_unwritten(batch)
    if tensor.shape[dim] != len(batch.padded):
        raise ValueError(
            f"axis {dim} must hold the batch's {len(batch.padded)} rows, got shape {list(tensor.shape)}: "
            "pass dim=, the axis of the rows"
        )
    return tensor.index_select(dim, to_device(batch.permutation.argsort(stable=True), tensor.device))


def _unsort_hint(value: object) -> str:
    """The type of an argument that is no tensor, and what to do instead."""
    kind = type(value).__name__
    if hasattr(value, "unsort"):
        return f"a {kind}: call its own unsort()"
    if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
        return f"a {kind} of tensors: unsort each of them, or torch.stack them first"
    return f"a {kind}: make a tensor of it, or take [values[row] for row in batch.permutation.argsort().tolist()]"
