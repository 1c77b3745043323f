"""The public surface as plain text: names, parameters and attributes, without annotations, which may be moved."""

import inspect
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Unpack, get_origin

PACKAGES = ("collate", "samplers")

# Where users read how to import; of packages' own roots `__all__` tells.
_READ = ("README.md", "CONTRIBUTING.md", "docs", "examples", "benchmarks")
_IMPORT = re.compile(r"from ((?:collate|samplers)\.[\w.]+) import (\w+(?:, \w+)*)")
_REFERENCE = re.compile(r"::: ((?:collate|samplers)\.\w[\w.]*)\.(\w+)")


def find_surface(root: Path) -> dict[str, Any]:
    """Every name of each `__all__`, and every deeper one that a page, an example or a benchmark imports."""
    names = [f"{package}.{name}" for package in PACKAGES for name in import_module(package).__all__]
    return {name: describe(name) for name in [*names, *sorted(_deep_names(root))]}


def resolve(name: str) -> Any:
    """What a dotted name stands for, imported as a user imports it."""
    module, _, last = name.rpartition(".")
    return getattr(import_module(module), last)


def describe(name: str) -> dict[str, Any]:
    """A function's signature, or a class's with those of its public methods and the names of its other attributes.

    Parameters are told as name, kind and default.
    """
    value = resolve(name)
    if not isinstance(value, type):
        return _signature(value)
    own = {key: found for key, found in inspect.getmembers_static(value) if _is_own(value, key)}
    methods = {
        key: _signature(getattr(value, key))
        for key, found in own.items()
        if inspect.isfunction(found) or isinstance(found, (classmethod, staticmethod))
    }
    fields = getattr(value, "__dataclass_fields__", {})
    attributes = sorted((own.keys() - methods.keys()) | {field for field in fields if not field.startswith("_")})
    return _signature(value) | {"methods": methods, "attributes": attributes}


def _signature(value: Any) -> dict[str, Any]:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        # An error takes what every error takes, and a name for types takes nothing.
        return {"signature": None, "parameters": []}
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    parameters = [_parameter(parameter) for parameter in _expanded(signature.parameters.values())]
    parameters = [parameter for parameter in parameters if parameter[0] != "self"]
    return {"signature": str(inspect.Signature(bare)), "parameters": parameters}


def _expanded(parameters: Iterable[inspect.Parameter]) -> Iterator[inspect.Parameter]:
    """Parameters, with those of a typed dict in place of the `**options` that take them."""
    for parameter in parameters:
        if get_origin(parameter.annotation) is Unpack:
            (options,) = parameter.annotation.__args__
            for key in options.__annotations__:
                yield inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=...)
        else:
            yield parameter


def _parameter(parameter: inspect.Parameter) -> list[str | None]:
    """Name, kind and default; `...` for a keyword of a typed dict, whose default stands elsewhere."""
    default = None if parameter.default is parameter.empty else repr(parameter.default)
    return [parameter.name, parameter.kind.description, "..." if default == "Ellipsis" else default]


def _is_own(value: type, key: str) -> bool:
    """Whether a public name is a class's, and not that of a base from another library."""
    owners = [base for base in value.__mro__ if key in vars(base)]
    return not key.startswith("_") and bool(owners) and owners[0].__module__.split(".")[0] in PACKAGES


def _deep_names(root: Path) -> set[str]:
    texts = [path.read_text() for path in _pages(root)]
    imported = {
        f"{module}.{name}" for text in texts for module, names in _IMPORT.findall(text) for name in names.split(", ")
    }
    return imported | {f"{module}.{name}" for text in texts for module, name in _REFERENCE.findall(text)}


def _pages(root: Path) -> Iterator[Path]:
    for name in _READ:
        path = root / name
        yield from [path] if path.is_file() else sorted([*path.rglob("*.md"), *path.rglob("*.py")])
