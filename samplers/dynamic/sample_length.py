"""The length of a sample of a stream: by a function, or by a field."""

from collections.abc import Callable, Mapping, Sized
from typing import Any, TypeAlias

from samplers.shards.skipping import MissingFieldError

Length: TypeAlias = Callable[[Any], int] | str | int


def length_of(sample: Any, length: Length) -> int:
    """A sample's steps, by a function or by the field that holds its sequence or its length.

    Raises:
        MissingFieldError: The sample has no such field: a `KeyError`.
    """
    if callable(length):
        return length(sample)
    try:
        value = sample[length]
    except (KeyError, IndexError):
        known = list(sample) if isinstance(sample, Mapping) else f"0 to {len(sample) - 1}"
        raise MissingFieldError(f"length names the field {length!r}, the sample has {known}") from None
    # Whether a number is one of steps is for the bucketer to say; a 0-d array has a length that raises.
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return len(value) if isinstance(value, Sized) else value
