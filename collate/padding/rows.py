"""A field's samples as rows `[L_i, *F]`: checked, and their lengths measured."""

import math
from array import array as PythonArray
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils.data import get_worker_info

from collate.errors import LengthError
from collate.tensors.numpy_view import HostArray, Int64Array
from collate.tensors.slabs.sending import new_values, values_in_slab
from collate.tensors.steps import PaddingValue

Row: TypeAlias = Tensor | HostArray

# Below this mean length, one scatter of all time steps is faster than a piece per row: 256 rows of 30 int64 take half
# the time, and rows of 400 about the same. Time steps with feature axes are scattered six times as slowly; torch's
# pieces cost twice as much as NumPy's.
SHORT_STEPS, SHORT_STEPS_WITH_FEATURES = 400, 12

# From this mean number of bytes per row on, a call for each row costs less than the extra work of joining.
HUGE_ROW: Final = 1 << 16

_TENSORS: Final = {Tensor}

# Through `map` it takes two thirds of the time of a comprehension.
_DTYPE: Final = attrgetter("dtype")


@dataclass(frozen=True, eq=False)
class RaggedRows:
    """A field's samples: B rows `[L_i, *F]` of one kind and dtype, their lengths read.

    Attributes:
        items: B tensors or B arrays, in source order.
        lengths: int64 `[B]`, time steps, in source order.
        features: The feature axes F of the first row; one-dimensional rows are compared with it when they are joined.
        dtype: the rows' torch dtype.
        name: The field's name in errors.
    """

    items: Sequence[Row]
    lengths: Int64Array
    features: tuple[int, ...]
    dtype: torch.dtype
    name: str

    @cached_property
    def total(self) -> int:
        """Steps of all rows together."""
        return int(self.lengths.sum())

    @property
    def step_bytes(self) -> int:
        """Bytes of a time step."""
        return math.prod(self.features) * self.dtype.itemsize

    @property
    def are_short(self) -> bool:
        """Whether one scatter of all steps is faster than joining row by row."""
        limit = SHORT_STEPS_WITH_FEATURES if self.features else SHORT_STEPS
        of_tensors = isinstance(self.items[0], Tensor)
        return self.total < (2 * limit if of_tensors else limit) * len(self.items)

    @property
    def are_huge(self) -> bool:
        """Whether writing row by row is faster than joining, which makes another row of padding and slices of it."""
        return self.total * self.step_bytes >= HUGE_ROW * len(self.items)

    def clipped(self, max_length: int) -> "RaggedRows":
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

    def in_order(self, order: Int64Array) -> list[Row]:
        """The items in another order, int64 `[B]`."""
        return [self.items[index] for index in order.tolist()]

    def join(self, pieces: list[Row], steps: int) -> Tensor:
        """Join pieces of the items' type, one after the other; gradients flow.

        Args:
            pieces: Tensors or arrays `[L_i, *F]`, as the items are.
            steps: The sum of their lengths.

        Returns:
            `[steps, *F]` on the rows' device, in new memory.

        Raises:
            ValueError: Numbers of axes or feature shapes of the items differ.
            RuntimeError: torch cannot join the pieces for another reason, such as different devices.
        """
        try:
            if isinstance(pieces[0], Tensor):
                joined = self._join_tensors(cast("list[Tensor]", pieces), steps)
            else:
                # NumPy gets new memory pages for each large array, which takes half as long again.
                joined = new_values((steps, *self.features), self.dtype)
                np.concatenate(pieces, out=joined.numpy())
        except (ValueError, RuntimeError):
            check_shapes(self.items, self.name)
            raise
        if tuple(joined.shape[1:]) != self.features:
            # torch takes a row of shape [0] for an empty one of any number of axes.
            check_shapes(self.items, self.name)
        return joined

    def _join_tensors(self, pieces: list[Tensor], steps: int) -> Tensor:
        """Join tensors, into memory that a worker can send if they are plain ones."""
        if get_worker_info() is not None and all(_is_plain(piece, self.features) for piece in pieces):
            values = values_in_slab((steps, *self.features), self.dtype)
            if values is not None:
                return torch.cat(pieces, out=values)
        return torch.cat(pieces)


def _is_plain(piece: Tensor, features: tuple[int, ...]) -> bool:
    """Whether torch can write a piece to given memory: no gradient flows, and it is dense, on the CPU, and fits."""
    plain = type(piece) is Tensor and piece.is_cpu and piece.layout == torch.strided and not piece.requires_grad
    return plain and piece.shape[1:] == features and unpack_dual(piece).tangent is None


def measure_rows(values: Sequence[object], name: str = "sequences", kinds: set[type] | None = None) -> RaggedRows:
    """Check a field's values and measure their lengths.

    Args:
        values: B >= 1 tensors or arrays `[L_i, *F]`, or lists of numbers.
        name: The field's name in errors.
        kinds: The types of the values; None is read from them.

    Returns:
        The rows; only lists of numbers are copied.

    Raises:
        LengthError: There is no row.
        TypeError: A row is not a sequence of numbers, or is sparse or nested; or dtypes differ.
        ValueError: Numbers of axes or feature shapes differ.
    """
    if len(values) == 0:
        raise LengthError(f"{name} must hold at least one row, got an empty list: leave the batch out instead")
    items = _of_one_kind(values, set(map(type, values)) if kinds is None else kinds, name)
    # As with shapes below: among dense one-dimensional rows, a row that is not dense fails when they are joined.
    if isinstance(items[0], Tensor):
        refuse_layout(items[0], 0, name)
    _check_dtypes(items, name)
    dtype = _torch_dtype(items[0], name)
    # One-dimensional rows are many and small, so that their shapes are not compared: joining them fails if one differs.
    if items[0].ndim != 1:
        check_shapes(items, name)
    return RaggedRows(items, _measure_lengths(items, name), tuple(items[0].shape[1:]), dtype, name)


def _of_one_kind(values: Sequence[object], kinds: set[type], name: str) -> Sequence[Row]:
    """All tensors or all arrays; lists become arrays, tensors among arrays too."""
    if kinds == _TENSORS:
        return cast("list[Tensor]", values)
    if any(issubclass(kind, np.ma.MaskedArray) for kind in kinds):
        refuse_masked_arrays(values, name)
    if all(issubclass(kind, Tensor) for kind in kinds):
        return cast("list[Tensor]", values)
    if all(issubclass(kind, np.ndarray) for kind in kinds):
        return cast("list[HostArray]", values)
    if all(issubclass(kind, list) for kind in kinds):
        return _arrays_of_lists(cast("Sequence[list[PaddingValue]]", values), name)
    return [_array_of(value, index, name) for index, value in enumerate(values)]


def refuse_masked_arrays(values: Sequence[object], name: str) -> None:
    """Refuse masked arrays: torch knows no mask, so that masked values would become real ones.

    Raises:
        TypeError: There is one; the message names the first.
    """
    for index, value in enumerate(values):
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(
                f"{name}: sample {index} is a masked array, whose masked values would become real steps: drop them "
                "with .compressed(), or replace them with .filled(value)"
            )


def refuse_layout(value: Tensor, index: int, name: str) -> None:
    """Refuse a sample that is a sparse or a nested tensor: neither can be joined with others to dense values.

    Raises:
        TypeError: It is one; the message names it.
    """
    if value.is_nested:
        raise TypeError(
            f"{name}: sample {index} is a nested tensor, which holds several sequences: give each of them, as "
            ".unbind() lists them, as a sample"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{name}: sample {index} is a sparse tensor ({value.layout}): make it dense with .to_dense() before "
            "collating"
        )


def _array_of(value: object, index: int, name: str) -> HostArray:
    """A tensor or an array as an array.

    Raises:
        TypeError: It is neither, or requires gradients.
    """
    if isinstance(value, Tensor):
        refuse_layout(value, index, name)
        if value.requires_grad:
            raise TypeError(
                f"{name}: sample {index} requires gradients, which would end here: make tensors of the arrays among "
                "the samples, or detach it"
            )
        return cast(HostArray, value.numpy(force=True))
    if isinstance(value, np.ndarray):
        return value
    raise TypeError(f"{name}: sample {index} must be a tensor or an array like the others, got {type(value).__name__}")


def _arrays_of_lists(values: Sequence[list[PaddingValue]], name: str) -> list[HostArray]:
    """Lists of numbers as arrays; an empty list takes the dtype and features of the others, int64 if all are empty."""
    filled = [_array_of_list(value, index, name) for index, value in enumerate(values) if value]
    first = filled[0] if filled else np.empty(0, np.int64)
    empty = np.empty((0, *first.shape[1:]), first.dtype)
    nonempty = iter(filled)
    return [next(nonempty) if value else empty for value in values]


def _array_of_list(value: list[PaddingValue], index: int, name: str) -> HostArray:
    """A list of numbers as an array of the dtype that torch would choose.

    Raises:
        TypeError: It holds something else.
        ValueError: It is ragged.
    """
    if type(value[0]) is int:
        try:
            # NumPy would read all numbers twice, for their dtype first.
            return np.frombuffer(PythonArray("q", value), np.int64)
        except (TypeError, OverflowError):
            # Floats or lists are among them, or numbers beyond int64.
            pass
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: the list in sample {index} is ragged: its items differ in length") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: the list in sample {index} must hold numbers, got {array.dtype}")
    # What torch.tensor would make of the same list.
    default: npt.DTypeLike = torch.empty(0, device="cpu").numpy().dtype
    return array.astype(default) if array.dtype.kind == "f" else array


def _measure_lengths(items: Sequence[Row], name: str) -> Int64Array:
    """The length of each row: int64 `[B]`.

    Raises:
        IndexError: A row has no axis, and was not noticed before.
        TypeError: A row has no length, and was not noticed before.
    """
    try:
        if not isinstance(items[0], Tensor):
            return np.fromiter(map(len, items), np.int64, len(items))
        # len() of a tensor takes eight times as long as its number of elements, four times as long as its shape.
        tensors = cast("Sequence[Tensor]", items)
        counts = map(Tensor.numel, tensors) if items[0].ndim == 1 else (row.shape[0] for row in tensors)
        return np.fromiter(counts, np.int64, len(tensors))
    except (TypeError, IndexError):
        check_shapes(items, name)
        raise


def _check_dtypes(items: Sequence[Row], name: str) -> None:
    """Check that all rows have the first one's dtype.

    Raises:
        TypeError: One has another.
    """
    if len(set(map(_DTYPE, items))) > 1:
        dtypes = [row.dtype for row in items]
        index = next(i for i, dtype in enumerate(dtypes) if dtype != dtypes[0])
        raise TypeError(
            f"{name}: all samples must have one dtype, got {dtypes[0]} in sample 0 and "
            f"{dtypes[index]} in sample {index}: convert them before collating"
        )


def check_shapes(items: Sequence[Row], name: str) -> None:
    """Check that rows are dense, have an axis, and the feature shape of the first.

    Raises:
        TypeError: One is sparse or nested.
        ValueError: One has another shape; the message names the first sample that differs.
    """
    for index, row in enumerate(items):
        if isinstance(row, Tensor):
            refuse_layout(row, index, name)
    shapes = [tuple(row.shape) for row in items]
    if () not in shapes and len({shape[1:] for shape in shapes}) == 1:
        return
    for index, shape in enumerate(shapes):
        if not shape:
            raise ValueError(f"{name}: sample {index} has no axis, so it has no length: give it shape [L, *F]")
        if shape[1:] != shapes[0][1:]:
            raise ValueError(
                f"{name}: all samples must have one feature shape, got {list(shapes[0])} in sample 0 and "
                f"{list(shape)} in sample {index}: only the first axis may differ, and it is time; where time comes "
                "last, transpose each sample to [T, F]"
            )


def _torch_dtype(row: Row, name: str) -> torch.dtype:
    """The torch dtype of rows like this one.

    Raises:
        TypeError: torch has none.
    """
    if isinstance(row, Tensor):
        return row.dtype
    try:
        return torch.from_numpy(np.empty(0, _native(row.dtype))).dtype
    except TypeError:
        raise TypeError(
            f"{name}: torch has no dtype for arrays of {row.dtype}: convert them before collating"
        ) from None


def _native(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The dtype in the machine's byte order."""
    return dtype.newbyteorder("=")
