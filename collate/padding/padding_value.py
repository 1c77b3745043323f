"""The number that padding holds, and whether a dtype can hold it."""

import math
import warnings
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch

from collate.padding.rows import RaggedRows
from collate.tensors.numpy_view import bits_of
from collate.tensors.steps import PaddingValue


class _UnchosenZero(int):
    """The default 0, which can be told from a 0 that a user gives."""


# What collators pad with unless told otherwise.
UNCHOSEN: Final = _UnchosenZero(0)


def check_padding_value(value: PaddingValue, dtype: torch.dtype) -> PaddingValue:
    """Check that `dtype` can hold the padding value (a float may be rounded, an integer must be exact).

    Raises:
        TypeError: The value is not a number.
        ValueError: The dtype cannot hold it.
    """
    if not isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
        raise TypeError(f"padding_value must be a number, got {value!r} of type {type(value).__name__}")
    return _check_number(value, dtype)


def bits_of_number(value: PaddingValue, dtype: torch.dtype) -> Any:
    """The result of `bits_of` for a tensor of this dtype that holds the number; 0 has the bits 0 in all dtypes."""
    if type(value) is int and value == 0:
        return 0
    return bits_of(torch.full((1,), value, dtype=dtype, device="cpu"))[0]


@lru_cache(maxsize=512, typed=True)
def _check_number(value: PaddingValue, dtype: torch.dtype) -> PaddingValue:
    """A number as a Python number, if the dtype can hold it.

    Raises:
        ValueError: It cannot.
    """
    value = same_nan(value.item() if isinstance(value, np.generic) else value)
    if not _holds(value, dtype):
        raise ValueError(f"padding_value {value!r} cannot be held by {dtype}: choose one that can, or a wider dtype")
    return value


def warn_of_labels(name: str, rows: RaggedRows, width: int) -> None:
    """Warn of labels that are padded with 0, which is a class, if nobody chose 0.

    Warns:
        UserWarning: There is padding in a field of integers.
    """
    if rows.dtype.is_floating_point or rows.dtype.is_complex or not (rows.lengths < width).any():
        return
    warnings.warn(
        f"field {name!r} is padded with 0, which a loss counts as class 0: choose with padding_value, such as "
        f'PadCollator({{"{name}": -100, ...}}) for every field, or PadCollator(0) if 0 is meant',
        stacklevel=5,
    )


def cast_padding_value(value: PaddingValue | None, old: torch.dtype, new: torch.dtype) -> PaddingValue | None:
    """The value of padding after a conversion from one dtype to another; None stays None."""
    if value is None or new == old:
        return value
    return same_nan(torch.tensor(value, dtype=old, device="cpu").to(new).item())


def same_nan(value: PaddingValue) -> PaddingValue:
    """The value, and for every NaN one object, so that values that contain it are equal."""
    return math.nan if value != value else value


def _holds(value: PaddingValue, dtype: torch.dtype) -> bool:
    """Whether a dtype can hold a number: integers exactly, floats within range."""
    # Python's integers may be too large for every float.
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if dtype.is_floating_point and is_finite and abs(value) > torch.finfo(dtype).max:
        return False
    if dtype.is_floating_point and dtype.itemsize == 1:
        return _holds_in_a_byte(value, dtype)
    # torch.iinfo and finfo do not take complex dtypes; every float dtype can hold nan and inf.
    if dtype.is_complex or dtype.is_floating_point or not is_finite:
        return dtype.is_floating_point or dtype.is_complex
    if dtype == torch.bool:
        return value in (0, 1)
    bounds = torch.iinfo(dtype)
    return value == int(value) and bounds.min <= value <= bounds.max


def _holds_in_a_byte(value: PaddingValue, dtype: torch.dtype) -> bool:
    """As `_holds`, for floats of eight bits: some make nan of infinity, and one has no zero and no sign."""
    held = torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype).to(torch.float64).item()
    if not np.isfinite(value):
        return held == value or (held != held and value != value)
    return held * value >= 0 and (held == 0 or value != 0)
