"""A list of variable-length rows -> one padded block.

Short rows are joined once and scattered once; long rows are copied slice by slice into an uninitialised block of
which only the tails are filled.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collate.errors import LengthError

Array: TypeAlias = npt.NDArray[np.generic]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Number: TypeAlias = int | float | bool
Widths: TypeAlias = int | Sequence[int] | None

# Below this many bytes a row one scatter beats a slice copy per row: 256 rows of 30 int64 (240 bytes) take a third
# of the time, 512 rows of 200 (1,600 bytes) break even, 64 rows of 100 x 40 float32 (16,000 bytes) take twice as long.
SHORT_ROW_BYTES = 2048

# NumPy has no name for bfloat16 and its like: their bits cross it as integers of the same size.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Rows:
    """A field's samples, checked: B rows `[L_i, *F]` of one kind, dtype and feature shape.

    Attributes:
        items: B tensors (device of the first) or B arrays, in source order.
        lengths: int64 `[B]`, steps, in source order.
        features: the feature axes F.
        dtype: the rows' torch dtype.
    """

    items: Sequence[Tensor] | Sequence[Array]
    lengths: Int64Array
    features: tuple[int, ...]
    dtype: torch.dtype

    @property
    def on_host(self) -> bool:
        """Whether the rows can go through NumPy: on the CPU, and with no gradient to carry."""
        if isinstance(self.items[0], np.ndarray):
            return True
        tensors = cast("Sequence[Tensor]", self.items)
        return {row.is_cpu for row in tensors} == {True} and {row.requires_grad for row in tensors} == {False}

    def clipped(self, max_length: int) -> "Rows":
        """The same rows, cut to their first `max_length` steps."""
        if int(self.lengths.max()) <= max_length:
            return self
        items = [row[:max_length] for row in self.items]
        return Rows(cast("list[Tensor]", items), np.minimum(self.lengths, max_length), self.features, self.dtype)


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
    shapes = [row.shape for row in items]
    _check_dtypes(items, name)
    _check_shapes(shapes, name)
    lengths = np.array([shape[0] for shape in shapes])
    return Rows(items, lengths, tuple(shapes[0][1:]), _torch_dtype(items[0], name))


def pad_rows(rows: Rows, order: Int64Array, shape: tuple[int, int], padding_value: Number) -> Tensor:
    """Copy host rows into one padded block.

    Args:
        rows: B rows on the host.
        order: int64 `[B]`, the row of `rows` that each row of the block takes.
        shape: rows (at least B) and steps of the block; rows beyond B hold padding only.
        padding_value: what the padding holds; the dtype must be able to hold it (`check_padding_value`).

    Returns:
        `[*shape, *F]` on the CPU, memory of its own.
    """
    lengths = rows.lengths[order]
    itemsize = rows.dtype.itemsize * int(np.prod(rows.features, dtype=np.int64))
    if int(lengths.sum()) * itemsize < SHORT_ROW_BYTES * len(order):
        return _scatter_short(rows, order, shape, padding_value)
    return _copy_long(rows, order, shape, padding_value)


def padded_width(longest: int, widths: Widths) -> int:
    """The steps a batch is padded to: the longest row's, rounded up by `widths`, and never less than one.

    Args:
        longest: steps of the longest row.
        widths: None (no rounding), an int (the next multiple of it) or the allowed widths in ascending order.

    Raises:
        LengthError: The longest row is longer than every allowed width.
    """
    longest = max(longest, 1)
    if widths is None:
        return longest
    if isinstance(widths, int):
        return -(-longest // widths) * widths
    place = bisect_left(widths, longest)
    if place == len(widths):
        raise LengthError(
            f"a row of {longest} steps is longer than every allowed width (at most {widths[-1]}): "
            "add a width, or cut rows with max_length"
        )
    return widths[place]


def check_widths(widths: Widths) -> Widths:
    """Check a `widths` option; ascending tuples are what `padded_width` searches.

    Raises:
        TypeError: A width is not an int.
        ValueError: A width is below one, or there is none.
    """
    if widths is None:
        return None
    given = [widths] if isinstance(widths, int) else list(widths)
    for width in given:
        if isinstance(width, bool) or not isinstance(width, (int, np.integer)):
            raise TypeError(f"widths must be ints, got {width!r} of type {type(width).__name__}")
        if width < 1:
            raise ValueError(f"widths must be at least 1, got {width}")
    if not given:
        raise ValueError("widths must name at least one width, got an empty sequence; None pads to the longest row")
    return int(widths) if isinstance(widths, int) else tuple(sorted({int(width) for width in given}))


@lru_cache(maxsize=512, typed=True)
def check_padding_value(value: Number, dtype: torch.dtype) -> Number:
    """Check that `dtype` can hold the padding value (a float may be rounded, an integer must be exact).

    Raises:
        TypeError: The value is not a number.
        ValueError: The dtype cannot hold it.
    """
    if not isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
        raise TypeError(f"padding_value must be a number, got {value!r} of type {type(value).__name__}")
    value = value.item() if isinstance(value, np.generic) else value
    if not _holds(value, dtype):
        raise ValueError(f"padding_value {value!r} cannot be held by {dtype}: choose one that can, or a wider dtype")
    return value


def _holds(value: Number, dtype: torch.dtype) -> bool:
    if dtype.is_complex or not np.isfinite(value):
        return dtype.is_floating_point or dtype.is_complex
    if dtype.is_floating_point:
        return abs(value) <= torch.finfo(dtype).max
    if dtype == torch.bool:
        return value in (0, 1)
    bounds = torch.iinfo(dtype)
    return value == int(value) and bounds.min <= value <= bounds.max


def _of_one_kind(values: Sequence[object], name: str) -> list[Tensor] | list[Array]:
    kinds = set(map(type, values))
    if all(issubclass(kind, Tensor) for kind in kinds):
        return cast("list[Tensor]", values)
    if all(issubclass(kind, np.ndarray) for kind in kinds):
        return cast("list[Array]", values)
    if all(issubclass(kind, list) for kind in kinds):
        return _arrays_of_lists(cast("Sequence[list[Number]]", values), name)
    return [_array_of(value, place, name) for place, value in enumerate(values)]


def _array_of(value: object, place: int, name: str) -> Array:
    if isinstance(value, Tensor):
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


def _check_dtypes(items: Sequence[Tensor] | Sequence[Array], name: str) -> None:
    dtypes = [row.dtype for row in items]
    if len(set(dtypes)) > 1:
        place = next(i for i, dtype in enumerate(dtypes) if dtype != dtypes[0])
        raise TypeError(
            f"{name}: all samples must have one dtype, got {dtypes[0]} in sample 0 and "
            f"{dtypes[place]} in sample {place}: convert them before collating"
        )


def _check_shapes(shapes: Sequence[tuple[int, ...]], name: str) -> None:
    # Rows without features are told by their number of axes alone: a third of the time of comparing shapes.
    if set(map(len, shapes)) == {1} or (() not in shapes and len({shape[1:] for shape in shapes}) == 1):
        return
    for place, shape in enumerate(shapes):
        if not shape:
            raise ValueError(f"{name}: sample {place} has no axis, so it has no length: give it shape [L, *F]")
        if shape[1:] != shapes[0][1:]:
            raise ValueError(
                f"{name}: all samples must have one feature shape, got {list(shapes[0])} in sample 0 and "
                f"{list(shape)} in sample {place}: only the first axis may differ"
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


def _bits(tensor: Tensor) -> Array:
    """A contiguous CPU tensor's memory as an array; dtypes NumPy lacks appear as integers of their size."""
    try:
        return cast(Array, tensor.numpy())
    except TypeError:
        return cast(Array, tensor.view(_CARRIERS[tensor.dtype.itemsize]).numpy())


def _scatter_short(rows: Rows, order: Int64Array, shape: tuple[int, int], padding_value: Number) -> Tensor:
    block = torch.full((*shape, *rows.features), padding_value, dtype=rows.dtype)
    items = [rows.items[i] for i in order.tolist()]
    if isinstance(items[0], Tensor):
        steps = _bits(torch.cat(cast("list[Tensor]", items)))
    else:
        steps = np.concatenate(cast("list[Array]", items))
    real = np.arange(shape[1]) < rows.lengths[order][:, None]
    _bits(block)[: len(items)][real] = steps
    return block


def _copy_long(rows: Rows, order: Int64Array, shape: tuple[int, int], padding_value: Number) -> Tensor:
    block = torch.empty((*shape, *rows.features), dtype=rows.dtype)
    if isinstance(rows.items[0], Tensor):
        _fill(block, cast("Sequence[Tensor]", rows.items), order, padding_value)
    else:
        _fill(block.numpy(), cast("Sequence[Array]", rows.items), order, padding_value)
    return block


def _fill(block: Tensor | Array, items: Sequence[Tensor] | Sequence[Array], order: Int64Array, value: Number) -> None:
    for row, i in zip(block, order.tolist(), strict=False):
        steps = len(items[i])
        row[:steps] = items[i]
        row[steps:] = value
    block[len(order) :] = value
