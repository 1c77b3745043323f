"""Former names of arguments and attributes: they still work for one release, with a DeprecationWarning."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

CallParams = ParamSpec("CallParams")
CallResult = TypeVar("CallResult")


def with_present_names(
    arguments: dict[str, Any], renamed: Mapping[str, str], owner: str, *, stacklevel: int
) -> dict[str, Any]:
    """Keyword arguments under their present names, with a warning for each that was given by its former name.

    Args:
        arguments: Name to value; changed in place.
        renamed: Former name to present name.
        owner: What takes the arguments, for messages.
        stacklevel: Frames between `warnings.warn` and the user's line.

    Raises:
        TypeError: An argument is given by both names.
    """
    for former in renamed.keys() & arguments.keys():
        present = renamed[former]
        if present in arguments:
            raise TypeError(
                f"{owner} takes {present}= once, got its former name {former}= as well: leave {former}= out"
            )
        _warn(f"{former}= of {owner} is now called {present}=", stacklevel)
        arguments[present] = arguments.pop(former)
    return arguments


def renamed_arguments(**renamed: str) -> Callable[[Callable[CallParams, CallResult]], Callable[CallParams, CallResult]]:
    """A decorator: the function also takes some keyword arguments by their former names.

    Args:
        renamed: Former name to present name. The signature that users see has the present names only.

    Examples:
        >>> @renamed_arguments(steps="batches")
        ... def double(batches: int) -> int:
        ...     return 2 * batches
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     double(steps=3)
        6
        >>> print(caught[0].message)
        steps= of double is now called batches=; the former name goes in the next release
    """

    # `functools.wraps` keeps the signature and the docstring that users see.
    def decorate(function: Callable[CallParams, CallResult]) -> Callable[CallParams, CallResult]:
        # A constructor is known by its class: "ShardDataset.__init__" is "ShardDataset" in messages.
        owner = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

        @functools.wraps(function)
        def with_former_names(*args: CallParams.args, **kwargs: CallParams.kwargs) -> CallResult:
            if renamed.keys() & kwargs.keys():
                with_present_names(kwargs, renamed, owner, stacklevel=4)
            return function(*args, **kwargs)

        return with_former_names

    return decorate


def renamed_attribute(former: str, present: str) -> property:
    """A property that gives an attribute by its former name.

    Args:
        former: Name of the property.
        present: Name of the attribute.
    """

    def read(instance: Any) -> Any:
        _warn(f"{type(instance).__name__}.{former} is now called {present}", 3)
        return getattr(instance, present)

    return property(read, doc=f"Former name of `{present}`.")


def _warn(what: str, stacklevel: int) -> None:
    """Warn at the user's line."""
    warnings.warn(f"{what}; the former name goes in the next release", DeprecationWarning, stacklevel=stacklevel)
