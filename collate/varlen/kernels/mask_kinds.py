"""Which pairs of time steps a kind of attention allows, as a function of indices and as a dense mask.

>>> ids = torch.tensor([[0, 0, 1, -1]])
>>> dense_mask(mask_function("causal", step_ids(ids)), 1, 4, torch.device("cpu"))[0, 0].int()
tensor([[1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1]], dtype=torch.int32)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from collate.errors import LengthError
from collate.tensors.numpy_view import Int64Array
from collate.widths import check_count

MaskKind: TypeAlias = Literal["causal", "bidirectional", "sliding", "prefix"]
"""Which steps of its own document a step attends to."""

# From row, head, query step and key step to whether the pair is allowed.
MaskFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MaskOptions:
    """A kind of mask with its option, checked.

    Attributes:
        kind: `"causal"`, `"bidirectional"`, `"sliding"` or `"prefix"`.
        window: of `"sliding"`: how many steps a step sees, itself and those before it; otherwise 0.
        prefix: of `"prefix"`: int64 `[N]`, the first steps of each document that all of its steps see; otherwise None.
    """

    kind: MaskKind
    window: int = 0
    prefix: Int64Array | None = None


def check_mask_options(
    kind: str, window: int | None, prefix: int | Sequence[int] | Tensor | None, lengths: Int64Array
) -> MaskOptions:
    """Check a kind of mask and its option.

    Args:
        kind: as in `MaskOptions`.
        window: for `"sliding"` only.
        prefix: for `"prefix"` only: one number for all documents, or one for each, on the host.
        lengths: int64 `[N]`.

    Raises:
        LengthError: There is not one prefix for each document, or one is negative or on a device.
        TypeError: The window or a prefix is not an integer.
        ValueError: There is no such kind, or its option is missing, or one that belongs to another kind is given.
    """
    if kind not in get_args(MaskKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(MaskKind))}, got {kind!r}")
    for name, value, needed in (("window", window, kind == "sliding"), ("prefix", prefix, kind == "prefix")):
        if (value is not None) != needed:
            word = "needs" if needed else "takes no"
            raise ValueError(f"kind={kind!r} {word} {name}, got {name}={value}")
    if window is not None:
        return MaskOptions("sliding", window=check_count("window", window, least=1, hint="give a number of steps"))
    if prefix is not None:
        return MaskOptions("prefix", prefix=_check_prefix(prefix, lengths))
    return MaskOptions("causal" if kind == "causal" else "bidirectional")


def step_ids(document_ids: Tensor) -> Tensor:
    """Document ids in which every step of a gap has an id of its own: int32 `[R, C]`."""
    steps = torch.arange(document_ids.shape[1], dtype=document_ids.dtype, device=document_ids.device)
    return torch.where(document_ids < 0, -1 - steps, document_ids)


def mask_function(kind: MaskKind, ids: Tensor, *, window: int = 0, prefix_ends: Tensor | None = None) -> MaskFunction:
    """A `mask_mod` as `flex_attention` takes it.

    Args:
        kind: as in `MaskOptions`.
        ids: `[R, C]`, equal for two steps of a row where they may see each other, as from `step_ids`.
        window: as in `MaskOptions`.
        prefix_ends: `[R, C]`, for each step where the prefix of its document ends in its row.
    """

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (ids[row, query] == ids[row, key]) & (query >= key)

    def bidirectional(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ids[row, query] == ids[row, key]

    def sliding(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (ids[row, query] == ids[row, key]) & (query >= key) & (query - key < window)

    if prefix_ends is None:
        return {"causal": causal, "bidirectional": bidirectional, "sliding": sliding}[kind]
    ends = prefix_ends

    def prefix(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (ids[row, query] == ids[row, key]) & ((query >= key) | (key < ends[row, key]))

    return prefix


def dense_mask(allowed: MaskFunction, rows: int, capacity: int, device: torch.device) -> Tensor:
    """All pairs of steps of each row, True where a query may see a key: bool `[R, 1, C, C]`."""
    row = torch.arange(rows, device=device)[:, None, None]
    steps = torch.arange(capacity, device=device)
    return allowed(row, row, steps[:, None], steps).unsqueeze(1)


def _check_prefix(prefix: int | Sequence[int] | Tensor, lengths: Int64Array) -> Int64Array:
    """The prefix of each document, no longer than the document: int64 `[N]`.

    Raises:
        LengthError: There is not one for each document, or one is negative or on a device.
        TypeError: They are not integers.
    """
    if isinstance(prefix, Tensor) and not prefix.is_cpu:
        raise LengthError(f"prefix must stay on the host, got a tensor on {prefix.device}: keep it on the CPU")
    values = np.asarray(prefix)
    # NumPy makes floats of an empty list.
    if values.size and values.dtype.kind not in "iu":
        raise TypeError(f"prefix must be whole numbers of steps, got {values.dtype}")
    if values.ndim and values.shape != lengths.shape:
        raise LengthError(f"prefix must be one number, or one per document, [{len(lengths)}], got {list(values.shape)}")
    if values.size and values.min() < 0:
        raise LengthError(f"prefix must not be negative, got {values.min()}")
    return np.minimum(values.astype(np.int64), lengths)
