"""Names of a package that are loaded when they are first used (PEP 562), so that a command need not import torch."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names are loaded when they are first used.

    Modules of the package are attributes of it too, as if it had imported them all.

    Args:
        package: Full name of the package.
        modules: For each public name the full name of its module.
    """
    namespace = vars(sys.modules[package])

    def load_name(name: str) -> Any:
        if name in modules:
            value = getattr(import_module(modules[name]), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}: its names are in {package}.__all__")
        namespace[name] = value
        return value

    def list_names() -> list[str]:
        modules_of_it = [name for name, value in namespace.items() if isinstance(value, ModuleType) and name != "sys"]
        return sorted({*namespace["__all__"], *modules_of_it, *filter(_is_dunder, namespace)})

    return load_name, list_names


def _is_dunder(name: str) -> bool:
    return name.startswith("__")
