"""The length of a sample of a stream: by a function, or from a field."""

from collections.abc import Callable, Mapping, Sized
from typing import Any, TypeAlias

from samplers.shards.skipping import MissingFieldError

Length: TypeAlias = Callable[[Any], int] | str | int
"""Length of a sample: a function, or the field that holds the sequence or its length."""


def length_of(sample: Any, length: Length) -> int:
    """The length of a sample in steps: by a function, or from the field that holds the sequence or its length.

    >>> length_of({"tokens": [7, 8, 9]}, "tokens"), length_of({"length": 5}, "length"), length_of("abc", len)
    (3, 5, 3)

    Raises:
        MissingFieldError: The sample has no such field. A `KeyError`.
    """
    if callable(length):
        return length(sample)
    try:
        value = sample[length]
    except (KeyError, IndexError):
        fields = list(sample) if isinstance(sample, Mapping) else f"0 to {len(sample) - 1}"
        raise MissingFieldError(f"length names the field {length!r}, the sample has {fields}") from None
    # An array without an axis is a number, but its `len` raises. The bucketer checks whether a number is a length.
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return len(value) if isinstance(value, Sized) else value
