"""Modules of optional dependencies (extras), imported when they are used."""

from importlib import import_module
from typing import Any


def load_extra(module: str, extra: str) -> Any:
    """Import a module that needs an extra.

    Args:
        module: Full name of the module.
        extra: Extra of this distribution, for the message.

    Raises:
        ModuleNotFoundError: A dependency is not installed. The message has the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed: pip install 'lengthtrack[{extra}]'") from error
