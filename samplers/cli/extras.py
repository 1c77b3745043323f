"""Modules that only an extra installs, loaded when they are needed."""

from importlib import import_module
from typing import Any


def load_extra(module: str, extra: str) -> Any:
    """A module that needs an extra.

    Args:
        module: its full name.
        extra: of this distribution, for the message.

    Raises:
        ModuleNotFoundError: What it needs is not installed; the command that installs it is named.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed: pip install 'lengthtrack[{extra}]'") from error
