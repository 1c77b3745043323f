"""A list of variable-length rows -> one padded block.

Short rows are joined once and scattered once; long rows are written into an uninitialised block with their tails of
padding between them, in one pass, and very long ones one by one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from collate.errors import LengthError
from collate.options import Number
from collate.tensors.numpy_view import Array, Int64Array, bits_of

Mask: TypeAlias = npt.NDArray[np.bool_]

# Below this mean length one scatter of all steps beats a piece per row: 256 rows of 30 int64 take half the time, of
# 400 about the same. Steps with feature axes are scattered six times as slowly; torch's pieces cost twice NumPy's.
SHORT_STEPS, SHORT_STEPS_WITH_FEATURES = 400, 12

# Bytes of a row, on average, from which on a call for each row costs less than what joining does besides.
HUGE_ROW: Final = 1 << 16

# From this width on steps do not fit int16, and filling a mask row by row takes a sixth of comparing int64.
WIDE: Final = 1 << 15


@dataclass(frozen=True, eq=False)
class Rows:
    """A field's samples: B rows `[L_i, *F]` of one kind and dtype, their lengths read.

    Attributes:
        items: B tensors or B arrays, in source order.
        lengths: int64 `[B]`, steps, in source order.
        features: the feature axes F, of the first row; rows without any are held against it when they are joined.
        dtype: the rows' torch dtype.
        name: what errors call the field.
    """

    items: Sequence[Tensor] | Sequence[Array]
    lengths: Int64Array
    features: tuple[int, ...]
    dtype: torch.dtype
    name: str

    @property
    def are_short(self) -> bool:
        """Whether one scatter of all steps is faster than joining row by row."""
        limit = SHORT_STEPS_WITH_FEATURES if self.features else SHORT_STEPS
        of_tensors = isinstance(self.items[0], Tensor)
        return int(self.lengths.sum()) < (2 * limit if of_tensors else limit) * len(self.items)

    @property
    def are_huge(self) -> bool:
        """Whether writing row by row is faster than joining, which makes another row of padding and slices of it."""
        steps = int(self.lengths.sum()) * math.prod(self.features)
        return steps * self.dtype.itemsize >= HUGE_ROW * len(self.items)

    def clipped(self, max_length: int) -> "Rows":
        """The same rows, cut to their first `max_length` steps.

        Raises:
            ValueError: A row has no axis to be cut along.
        """
        if int(self.lengths.max()) <= max_length:
            return self
        if 0 in {row.ndim for row in self.items}:
            check_shapes(self.items, self.name)
        items = [row[:max_length] for row in self.items]
        return replace(self, items=cast("list[Tensor]", items), lengths=np.minimum(self.lengths, max_length))

    def in_order(self, order: Int64Array) -> list[Any]:
        """The items in another order, int64 `[B]`."""
        return [self.items[place] for place in order.tolist()]

    def join(self, pieces: list[Any], steps: int) -> Tensor:
        """Items, and whatever else is of their kind, one after the other; gradients flow.

        Args:
            pieces: tensors or arrays `[L_i, *F]`, as the items are.
            steps: their lengths' sum.

        Returns:
            `[steps, *F]` on the rows' device, memory of its own.

        Raises:
            ValueError: Numbers of axes or feature shapes of the items differ.
            RuntimeError: torch cannot join the pieces for another reason, such as different devices.
        """
        try:
            if isinstance(pieces[0], Tensor):
                joined = torch.cat(pieces)
            else:
                # Large blocks from NumPy's own allocator are new pages each time, and take half as long again.
                joined = torch.empty((steps, *self.features), dtype=self.dtype)
                np.concatenate(pieces, out=joined.numpy())
        except (ValueError, RuntimeError):
            check_shapes(self.items, self.name)
            raise
        if tuple(joined.shape[1:]) != self.features:
            # torch takes a row of shape [0] for an empty one of any number of axes.
            check_shapes(self.items, self.name)
        return joined


def read_rows(values: Sequence[object], name: str = "sequences") -> Rows:
    """Check a field's values and measure their lengths.

    Args:
        values: B >= 1 tensors or arrays `[L_i, *F]`, or lists of numbers.
        name: what errors call the field.

    Returns:
        The rows; only lists of numbers are copied.

    Raises:
        LengthError: There is no row.
        TypeError: A row is not a sequence of numbers, or dtypes differ.
        ValueError: Numbers of axes or feature shapes differ.
    """
    if len(values) == 0:
        raise LengthError(f"{name} must hold at least one row, got an empty list: leave the batch out instead")
    items = _of_one_kind(values, name)
    _check_dtypes(items, name)
    dtype = _torch_dtype(items[0], name)
    # One-dimensional rows are many and small; what differs from them shows when they are joined.
    if items[0].ndim != 1:
        check_shapes(items, name)
    return Rows(items, _lengths(items, name), tuple(items[0].shape[1:]), dtype, name)


def place_steps(steps: Tensor, real: Mask, dtype: torch.dtype, padding_value: Number) -> Tensor:
    """Spread joined steps over a new padded block.

    Args:
        steps: `[sum L, *F]` on the host, row after row.
        real: bool `[rows, T]`, where they go.
        dtype: the block's.
        padding_value: what all other places hold; the dtype must be able to hold it (`check_padding_value`).

    Returns:
        `[rows, T, *F]` on the CPU, memory of its own.
    """
    block = torch.full((*real.shape, *steps.shape[1:]), padding_value, dtype=dtype)
    bits_of(block)[real] = bits_of(steps)
    return block


def join_rows(rows: Rows, order: Int64Array, shape: tuple[int, int], padding_value: Number) -> Tensor:
    """Join rows and their tails of padding: every place of the block is written once.

    Args:
        rows: B rows, on one device; gradients flow back to tensors that require them.
        order: int64 `[B]`, the row of `rows` that each row of the block takes.
        shape: rows (at least B) and steps of the block; rows beyond B hold padding only.
        padding_value: what the padding holds; the dtype must be able to hold it (`check_padding_value`).

    Returns:
        `[*shape, *F]` on the rows' device, memory of its own.

    Raises:
        ValueError: Numbers of axes or feature shapes differ.
    """
    if not rows.lengths.all():
        # An empty row is left out below, so that joining does not compare its shape with the others'.
        check_shapes(rows.items, rows.name)
    filled = _fill_rows(rows, order, shape, padding_value) if rows.are_huge else None
    if filled is not None:
        return filled
    lengths = rows.lengths[order].tolist()
    like = rows.items[0]
    device = like.device if isinstance(like, Tensor) else None
    padding = torch.full((shape[1], *rows.features), padding_value, dtype=rows.dtype, device=device)
    tails: Any = padding if isinstance(like, Tensor) else padding.numpy()
    # Few lengths are different, and a slice costs as much as joining a short row.
    tail_of = {length: tails[length:] for length in {0, *lengths}}
    pieces: list[Any] = []
    for place, length in zip(order.tolist(), lengths, strict=True):
        row = rows.items[place]
        # torch joins one by one as soon as one piece is empty; what is differentiated stays in the graph nevertheless.
        if length or (isinstance(row, Tensor) and row.requires_grad):
            pieces.append(row)
        if length < shape[1]:
            pieces.append(tail_of[length])
    pieces += [tails] * (shape[0] - len(order))
    return rows.join(pieces, shape[0] * shape[1]).view(*shape, *rows.features)


def _fill_rows(rows: Rows, order: Int64Array, shape: tuple[int, int], padding_value: Number) -> Tensor | None:
    """Write rows and tails into a new block through NumPy; None where gradients flow or nothing shares its memory."""
    if any(isinstance(row, Tensor) and _must_stay_in_torch(row) for row in rows.items):
        return None
    check_shapes(rows.items, rows.name)
    block = torch.empty((*shape, *rows.features), dtype=rows.dtype)
    cells, padding = bits_of(block), bits_of(torch.full((1,), padding_value, dtype=rows.dtype))[0]
    try:
        for cell, place in zip(cells, order.tolist(), strict=False):
            row, length = rows.items[place], int(rows.lengths[place])
            cell[:length] = bits_of(row) if isinstance(row, Tensor) else row
            cell[length:] = padding
    except RuntimeError:
        # torch lets nobody look into what it has conjugated lazily, or wrapped for torch.func.
        return None
    cells[len(order) :] = padding
    return block


def _must_stay_in_torch(row: Tensor) -> bool:
    return not row.is_cpu or row.requires_grad or type(row) is not Tensor or unpack_dual(row).tangent is not None


def real_places(lengths: Int64Array, width: int) -> Mask:
    """The mask that lengths int64 `[B]`, each at most `width`, make on the host: bool `[B, width]`."""
    if width >= WIDE:
        mask = np.zeros((len(lengths), width), np.bool_)
        for row, length in zip(mask, lengths.tolist(), strict=True):
            row[:length] = True
        return mask
    # Comparing small integers takes a quarter of the time.
    return cast(Mask, np.less(np.arange(width, dtype=np.int16), lengths.astype(np.int16)[:, None]))


def _of_one_kind(values: Sequence[object], name: str) -> list[Tensor] | list[Array]:
    kinds = set(map(type, values))
    if any(issubclass(kind, np.ma.MaskedArray) for kind in kinds):
        refuse_masked(values, name)
    if all(issubclass(kind, Tensor) for kind in kinds):
        return cast("list[Tensor]", values)
    if all(issubclass(kind, np.ndarray) for kind in kinds):
        return cast("list[Array]", values)
    if all(issubclass(kind, list) for kind in kinds):
        return _arrays_of_lists(cast("Sequence[list[Number]]", values), name)
    return [_array_of(value, place, name) for place, value in enumerate(values)]


def refuse_masked(values: Sequence[object], name: str) -> None:
    """Refuse masked arrays: torch knows no mask, so that masked values would become real ones.

    Raises:
        TypeError: There is one; the message names the first.
    """
    for place, value in enumerate(values):
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(
                f"{name}: sample {place} is a masked array, whose masked values would become real steps: drop them "
                "with .compressed(), or replace them with .filled(value)"
            )


def _array_of(value: object, place: int, name: str) -> Array:
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(
                f"{name}: sample {place} requires gradients, which would end here: make tensors of the arrays among "
                "the samples, or detach it"
            )
        return cast(Array, value.numpy(force=True))
    if isinstance(value, np.ndarray):
        return value
    raise TypeError(f"{name}: sample {place} must be a tensor or an array like the others, got {type(value).__name__}")


def _arrays_of_lists(values: Sequence[list[Number]], name: str) -> list[Array]:
    """Lists of numbers as arrays; an empty list takes the dtype and features of the others, int64 if all are empty."""
    filled = [_array_of_list(value, place, name) for place, value in enumerate(values) if value]
    like = filled[0] if filled else np.empty(0, np.int64)
    empty = np.empty((0, *like.shape[1:]), like.dtype)
    rest = iter(filled)
    return [next(rest) if value else empty for value in values]


def _array_of_list(value: list[Number], place: int, name: str) -> Array:
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: the list in sample {place} is ragged: its items differ in length") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: the list in sample {place} must hold numbers, got {array.dtype}")
    # What torch.tensor would make of the same list.
    default: npt.DTypeLike = torch.empty(0).numpy().dtype
    return array.astype(default) if array.dtype.kind == "f" else array


def _lengths(items: Sequence[Tensor] | Sequence[Array], name: str) -> Int64Array:
    try:
        if not isinstance(items[0], Tensor):
            return np.fromiter(map(len, items), np.int64, len(items))
        # len() of a tensor takes six times as long as its number of elements, four times as long as its shape.
        tensors = cast("Sequence[Tensor]", items)
        counts = [row.numel() for row in tensors] if items[0].ndim == 1 else [row.shape[0] for row in tensors]
        return np.fromiter(counts, np.int64, len(counts))
    except (TypeError, IndexError):
        check_shapes(items, name)
        raise


def _check_dtypes(items: Sequence[Tensor] | Sequence[Array], name: str) -> None:
    if len({row.dtype for row in items}) > 1:
        dtypes = [row.dtype for row in items]
        place = next(i for i, dtype in enumerate(dtypes) if dtype != dtypes[0])
        raise TypeError(
            f"{name}: all samples must have one dtype, got {dtypes[0]} in sample 0 and "
            f"{dtypes[place]} in sample {place}: convert them before collating"
        )


def check_shapes(items: Sequence[Tensor] | Sequence[Array], name: str) -> None:
    """Check that rows have an axis, and the feature shape of the first.

    Raises:
        ValueError: One has not; the message names the first sample that differs.
    """
    shapes = [tuple(row.shape) for row in items]
    if () not in shapes and len({shape[1:] for shape in shapes}) == 1:
        return
    for place, shape in enumerate(shapes):
        if not shape:
            raise ValueError(f"{name}: sample {place} has no axis, so it has no length: give it shape [L, *F]")
        if shape[1:] != shapes[0][1:]:
            raise ValueError(
                f"{name}: all samples must have one feature shape, got {list(shapes[0])} in sample 0 and "
                f"{list(shape)} in sample {place}: only the first axis may differ, and it is time; where time comes "
                "last, transpose each sample to [T, F]"
            )


def _torch_dtype(row: Tensor | Array, name: str) -> torch.dtype:
    if isinstance(row, Tensor):
        return row.dtype
    try:
        return torch.from_numpy(np.empty(0, _native(row.dtype))).dtype
    except TypeError:
        raise TypeError(
            f"{name}: torch has no dtype for arrays of {row.dtype}: convert them before collating"
        ) from None


def _native(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    return dtype.newbyteorder("=")
