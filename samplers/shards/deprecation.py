"""Former names of arguments, which work for one more release."""

import warnings
from typing import TypeVar

ValueT = TypeVar("ValueT")


def renamed_argument(function: str, former: tuple[str, ValueT | None], current: tuple[str, ValueT]) -> ValueT:
    """The value of a renamed argument, under either name. The former name warns.

    Args:
        function: Name of the function, for the warning.
        former: Former name and its value. None if it was not given.
        current: Name and value now.
    """
    former_name, former_value = former
    name, value = current
    if former_value is None:
        return value
    warnings.warn(
        f"{function}({former_name}=) is now {name}=, and will go in the next release", DeprecationWarning, stacklevel=3
    )
    return former_value
