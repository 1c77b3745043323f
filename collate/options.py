"""Options of how batches are padded, for all fields or each, checked where they are given."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias, TypeVar

import numpy as np
import torch

Number: TypeAlias = int | float | bool
Shape: TypeAlias = tuple[int, int | tuple[int, ...]]
Option = TypeVar("Option")
Checked = TypeVar("Checked")


def option_of(option: Option | Mapping[str, Option], name: str) -> Option:
    """What an option is for one field."""
    # To ask whether an int is a mapping takes longer than all else here.
    if option is None or type(option) is int:
        return option
    return option[name] if isinstance(option, Mapping) else option


def each_checked(
    option: Option | Mapping[str, Option], check: Callable[[Option], Checked]
) -> Checked | Mapping[str, Checked]:
    """Check an option, or each field's."""
    if isinstance(option, Mapping):
        return {name: check(value) for name, value in option.items()}
    return check(option)


def check_max_length(steps: int | None) -> int | None:
    """Check a `max_length` option.

    Raises:
        ValueError: It is not an int, or below one.
    """
    if steps is None:
        return None
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"max_length must be an int of at least 1, got {steps!r}")
    return int(steps)


def check_shape_list(shapes: Sequence[Shape]) -> list[Shape]:
    """Check a `shapes` option, and sort it by size.

    Raises:
        ValueError: There is none, or one is not a pair of whole numbers of at least one.
    """
    if len(shapes) == 0:
        raise ValueError("shapes must name at least one (rows, width), got none; None pads to the longest row")
    # Smallest block first, so that the first that holds a batch wastes least.
    return sorted(map(_check_shape, shapes), key=lambda shape: shape[0] * int(np.sum(shape[1])))


def _check_shape(shape: Shape) -> Shape:
    """A pair of Python's own ints, also where it comes from JSON, which has lists for tuples.

    Raises:
        ValueError: It is no pair of whole numbers of at least one.
    """
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError(f"shapes must be pairs (rows, width), got {shape!r}")
    rows, width = shape
    numbers = [rows, *(width if isinstance(width, (tuple, list)) else [width])]
    whole = all(isinstance(number, (int, np.integer)) and not isinstance(number, bool) for number in numbers)
    if not whole or min(numbers) < 1:
        raise ValueError(f"shapes must be pairs (rows, width) of ints of at least 1, got {(rows, width)!r}")
    return int(rows), tuple(map(int, width)) if isinstance(width, (tuple, list)) else int(width)


@lru_cache(maxsize=512, typed=True)
def check_padding_value(value: Number, dtype: torch.dtype) -> Number:
    """Check that `dtype` can hold the padding value (a float may be rounded, an integer must be exact).

    Raises:
        TypeError: The value is not a number.
        ValueError: The dtype cannot hold it.
    """
    if not isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
        raise TypeError(f"padding_value must be a number, got {value!r} of type {type(value).__name__}")
    value = same_nan(value.item() if isinstance(value, np.generic) else value)
    if not _holds(value, dtype):
        raise ValueError(f"padding_value {value!r} cannot be held by {dtype}: choose one that can, or a wider dtype")
    return value


def same_nan(value: Number) -> Number:
    """The value, and for every NaN one object, so that values that contain it are equal."""
    return math.nan if value != value else value


def _holds(value: Number, dtype: torch.dtype) -> bool:
    if dtype.is_complex or not np.isfinite(value):
        return dtype.is_floating_point or dtype.is_complex
    if dtype.is_floating_point:
        return abs(value) <= torch.finfo(dtype).max
    if dtype == torch.bool:
        return value in (0, 1)
    bounds = torch.iinfo(dtype)
    return value == int(value) and bounds.min <= value <= bounds.max
