"""The widths that batches are padded to: one rule for the plan and for the batch.

A `widths` option is None (the longest row decides), a multiple (an int), or the allowed widths. With multiples of 8 a
longest row of 13 steps is padded to 16; of the allowed widths 10, 20 and 40 it gets 20:

>>> padded_width(13, check_widths(8)), padded_width(13, check_widths([40, 10, 20]))
(16, 20)
"""

from bisect import bisect_left
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from collate.errors import LengthError

Widths: TypeAlias = int | Sequence[int] | None
"""Padded widths: None (the longest row decides), an int (a multiple of it), or the allowed widths."""
# What `check_widths` makes of them: ascending, Python ints.
AllowedWidths: TypeAlias = int | tuple[int, ...] | None
PaddedShape: TypeAlias = tuple[int, int | tuple[int, ...]]
"""Rows and width of a batch; with several fields a width for each."""

_WIDEST: Final = 1 << 62
_HINT: Final = "give a multiple (an int), the allowed widths (ints), or None to pad to the longest row"


def check_count(name: str, value: object, *, least: int, hint: str) -> int:
    """Check an option that counts something, and return it as a Python int.

    Args:
        name: Name of the option, for the message.
        value: What the user gave.
        least: The smallest allowed value.
        hint: What to do instead, for the message.

    Raises:
        TypeError: It is not an integer (a bool is not one).
        ValueError: It is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}: {hint}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}: {hint}")
    return int(value)


def check_widths(widths: Widths) -> AllowedWidths:
    """Check a `widths` option; the allowed widths come back in ascending order.

    Raises:
        TypeError: A width is not an int.
        ValueError: A width is below one or above 2**62, or the sequence is empty.
    """
    if widths is None:
        return None
    if isinstance(widths, str) or not isinstance(widths, (Sequence, AbstractSet, np.ndarray)):
        return _check_width(widths)
    if len(widths) == 0:
        raise ValueError(f"widths must name at least one width, got an empty sequence: {_HINT}")
    return tuple(sorted({_check_width(width) for width in widths}))


def _check_width(width: object) -> int:
    """Check one width.

    Raises:
        ValueError: It is below one or above 2**62.
    """
    width = check_count("widths", width, least=1, hint=_HINT)
    if width > _WIDEST:
        raise ValueError(f"widths must be at most 2**62, got {width}: {_HINT}")
    return width


def padded_width(longest: int, widths: AllowedWidths) -> int:
    """The width of a batch whose longest row has this many steps; never less than one.

    Args:
        longest: Steps of the longest row.
        widths: The option, as `check_widths` returns it.

    Raises:
        LengthError: The row is longer than every allowed width.
    """
    longest = max(longest, 1)
    if widths is None:
        return longest
    if isinstance(widths, int):
        return -(-longest // widths) * widths
    index = bisect_left(widths, longest)
    if index == len(widths):
        raise LengthError(_too_long(longest, widths))
    return widths[index]


def padded_widths(longest: npt.NDArray[np.int64], widths: AllowedWidths) -> npt.NDArray[np.int64]:
    """The same for many batches: int64 arrays of any shape.

    Raises:
        LengthError: A row is longer than every allowed width.
    """
    longest = np.maximum(longest, 1)
    if widths is None:
        return longest
    if isinstance(widths, int):
        return -(-longest // widths) * widths
    allowed = np.array(widths, np.int64)
    indices = np.searchsorted(allowed, longest)
    if indices.size and indices.max() == len(allowed):
        raise LengthError(_too_long(int(longest.max()), widths))
    return allowed[indices]


def _too_long(longest: int, widths: tuple[int, ...]) -> str:
    """The message for a row that no width holds."""
    return (
        f"widths must reach the longest sequence, {longest} steps, got at most {widths[-1]}: "
        "add a width, or cut sequences with max_length"
    )
