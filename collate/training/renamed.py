"""Former names of parameters, which work for one release with a `DeprecationWarning`."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

CallParams = ParamSpec("CallParams")
CallResult = TypeVar("CallResult")


def renamed_parameters(**names: str) -> Callable[[Callable[CallParams, CallResult]], Callable[CallParams, CallResult]]:
    """Let a function take arguments by these old names; each leads to the new name."""

    def decorate(call: Callable[CallParams, CallResult]) -> Callable[CallParams, CallResult]:
        @wraps(call)
        def with_old_names(*args: CallParams.args, **options: CallParams.kwargs) -> CallResult:
            renamed: dict[str, Any] = {}
            for name, value in options.items():
                new = names.get(name, name)
                if new != name:
                    message = f"{call.__name__}({name}=) is now {new}=, and the old name goes with the next release"
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                if new in renamed or (new != name and new in options):
                    raise TypeError(f"{call.__name__} got {new}= by its old name as well: give it once")
                renamed[new] = value
            return call(*args, **renamed)

        return with_old_names

    return decorate
