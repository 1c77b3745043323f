"""Numbers from lists as arrays, and from one dtype to another: each stays what it was, or an error names it."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def as_numbers(value: Any, context: str) -> Array:
    """A number or a list of numbers, or of lists that are alike, as an array of NumPy's choice.

    Args:
        value: what JSON holds, or an array.
        context: it stands, for messages.

    Raises:
        ValueError: It holds no numbers, lists of different lengths, true or false beside numbers, or a whole number
            that none of NumPy's dtypes holds as it is.
    """
    try:
        array = np.asarray(value)
    except OverflowError:
        raise ValueError(f"{context}: holds a whole number of more than 64 bits, and no dtype does") from None
    except ValueError:
        raise ValueError(f"{context}: is a list of lists of different lengths: steps must be alike in shape") from None
    if array.dtype.kind not in "biuf":
        big = next(
            (number for number in _numbers_in([value]) if type(number) is int and not -(2**63) <= number < 2**64), ""
        )
        what = f"the whole number {big}, of more than 64 bits" if big else "values that are not numbers"
        raise ValueError(f"{context}: holds {what}: choose fields with --fields")
    if isinstance(value, list):
        _check_leaves(value, array, context)
    return array


def cast_exactly(array: Array, dtype: np.dtype[Any], context: str, *, rounds: bool = False, hint: str = "") -> Array:
    """The same numbers in another dtype.

    Args:
        array: of numbers.
        dtype: of numbers.
        context: it stands, for messages.
        rounds: numbers may become the nearest ones of a dtype of floats.
        hint: the way out, for messages.

    Raises:
        ValueError: A number would become another one; both are named.
    """
    with np.errstate(all="ignore"):
        cast = array.astype(dtype)
    if array.dtype == dtype or not array.size:
        return cast
    lost = np.isinf(cast) & np.isfinite(array) if rounds and dtype.kind == "f" else _changed(array, cast)
    if lost.any():
        value, other = array[lost].flat[0].item(), cast[lost].flat[0].item()
        raise ValueError(f"{context}: {value} does not fit {dtype}, in which it would be {other}{hint}")
    return cast


def _check_leaves(value: list[Any], array: Array, context: str) -> None:
    kinds = set(map(type, _numbers_in(value)))
    if bool in kinds and len(kinds) > 1:
        raise ValueError(f"{context}: mixes true or false with numbers: write 1 and 0, or true and false alone")
    # Whole numbers beside fractions, or beyond both kinds of 64 bits, become floats.
    if array.dtype.kind == "f" and int in kinds:
        for number in _numbers_in(value):
            if type(number) is int and float(number) != number:
                raise ValueError(
                    f"{context}: {number} does not fit float64, in which it would be {float(number):.0f} beside fractions"
                )


def _numbers_in(value: Iterable[Any]) -> Iterator[Any]:
    for each in value:
        if isinstance(each, list):
            yield from _numbers_in(each)
        else:
            yield each


def _changed(array: Array, cast: Array) -> Any:
    """Where numbers are others than they were: bool, of the array's shape."""
    floats = array.dtype.kind == "f", cast.dtype.kind == "f"
    if floats == (True, True):
        return (cast.astype(np.result_type(array, cast)) != array) & ~np.isnan(array)
    if floats == (False, True):
        return _changed_to_floats(array, cast)
    if floats == (True, False):
        # In float64, for the limits of most dtypes are infinite in float16.
        array = array.astype(np.float64)
        low, high = (0, 2) if cast.dtype.kind == "b" else (np.iinfo(cast.dtype).min, np.iinfo(cast.dtype).max + 1)
        return ~(np.isfinite(array) & (array == np.floor(array)) & (array >= float(low)) & (array < float(high)))
    # Both ways, for a sign may be lost and come back.
    return (cast.astype(array.dtype) != array) | ((cast < 0) != (array < 0))


def _changed_to_floats(array: Array, cast: Array) -> Any:
    # Numbers of few bits are exact; the rest are few, and Python compares them exactly.
    exact = 1 << (np.finfo(cast.dtype).nmant + 1)
    changed = np.zeros(array.shape, np.bool_)
    if array.dtype.kind != "b":
        far = (array > exact) if array.dtype.kind == "u" else (array > exact) | (array < -exact)
        pairs = zip(array[far].tolist(), cast[far].tolist(), strict=True)
        changed[far] = [float(after) != before for before, after in pairs]
    return changed
