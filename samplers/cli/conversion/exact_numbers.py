"""Convert numbers from lists to arrays and between dtypes exactly: a number that would change is an error."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from samplers.shards.format.npy import AnyArray


def as_numbers(value: Any, context: str) -> AnyArray:
    """A number, a list of numbers, or nested lists of one shape, as an array of NumPy's choice.

    Args:
        value: A value from JSON, or an array.
        context: Origin of the value, for messages.

    Raises:
        ValueError: It has values that are not numbers, lists of different lengths, booleans mixed with numbers, or an
            integer that no dtype stores exactly.
    """
    try:
        array = np.asarray(value)
    except OverflowError:
        raise ValueError(f"{context}: holds an integer of more than 64 bits, and no dtype does") from None
    except ValueError:
        raise ValueError(f"{context}: is a list of lists of different lengths: steps must have one shape") from None
    if array.dtype.kind not in "biuf":
        big = next(
            (number for number in _numbers_in([value]) if type(number) is int and not -(2**63) <= number < 2**64), ""
        )
        what = f"the integer {big}, of more than 64 bits" if big else "values that are not numbers"
        raise ValueError(f"{context}: holds {what}: choose fields with --fields")
    if isinstance(value, list):
        _check_numbers(value, array, context)
    return array


def cast_exactly(
    array: AnyArray, dtype: np.dtype[Any], context: str, *, rounds: bool = False, hint: str = ""
) -> AnyArray:
    """The same numbers in another dtype.

    Args:
        array: Array of numbers.
        dtype: Numeric dtype.
        context: Origin of the array, for messages.
        rounds: Whether numbers may be rounded to a dtype of floats.
        hint: The remedy, for messages.

    Raises:
        ValueError: A number would change. The message has both values.
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


def _check_numbers(value: list[Any], array: AnyArray, context: str) -> None:
    """Check the numbers of nested lists against the array that NumPy has made.

    Raises:
        ValueError: Booleans are mixed with numbers, or an integer was rounded.
    """
    types = set(map(type, _numbers_in(value)))
    if bool in types and len(types) > 1:
        raise ValueError(f"{context}: mixes true or false with numbers: write 1 and 0, or true and false alone")
    # NumPy makes floats of integers that are mixed with fractions, or that fit neither int64 nor uint64.
    if array.dtype.kind == "f" and int in types:
        for number in _numbers_in(value):
            if type(number) is int and float(number) != number:
                raise ValueError(
                    f"{context}: {number} does not fit float64, in which it would be {float(number):.0f}, and next to "
                    "fractions integers become floats"
                )


def _numbers_in(value: Iterable[Any]) -> Iterator[Any]:
    """The numbers in nested lists.

    Yields:
        Numbers.
    """
    for each in value:
        if isinstance(each, list):
            yield from _numbers_in(each)
        else:
            yield each


def _changed(array: AnyArray, cast: AnyArray) -> Any:
    """Which numbers a cast has changed: bool, of the array's shape."""
    floats = array.dtype.kind == "f", cast.dtype.kind == "f"
    if floats == (True, True):
        return (cast.astype(np.result_type(array, cast)) != array) & ~np.isnan(array)
    if floats == (False, True):
        return _changed_to_floats(array, cast)
    if floats == (True, False):
        # In float64, because the limits of most dtypes are infinite in float16.
        array = array.astype(np.float64)
        low, high = (0, 2) if cast.dtype.kind == "b" else (np.iinfo(cast.dtype).min, np.iinfo(cast.dtype).max + 1)
        return ~(np.isfinite(array) & (array == np.floor(array)) & (array >= float(low)) & (array < float(high)))
    # Compare signs too: int64 -1 becomes uint64 2**64 - 1, and back again -1.
    return (cast.astype(array.dtype) != array) | ((cast < 0) != (array < 0))


def _changed_to_floats(array: AnyArray, cast: AnyArray) -> Any:
    """Which integers a cast to floats has changed."""
    # float32 has 24 bits: every integer up to 2**24 is exact. The few others are compared exactly, in Python.
    exact = 1 << (np.finfo(cast.dtype).nmant + 1)
    changed = np.zeros(array.shape, np.bool_)
    if array.dtype.kind != "b":
        far = (array > exact) if array.dtype.kind == "u" else (array > exact) | (array < -exact)
        pairs = zip(array[far].tolist(), cast[far].tolist(), strict=True)
        changed[far] = [float(after) != before for before, after in pairs]
    return changed
