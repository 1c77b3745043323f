"""Defaults in the signatures of the reference: as values, where the code has names or a mapping of options.

griffe's own extension spells out `**options: Unpack[...]`, but with `...` for each default, and with an empty
description of each.
"""

import re
from typing import Any, Final

from griffe import Class, DocstringSectionKind, ExprName, Function, Module, UnpackTypedDictExtension

CONSTANT: Final = re.compile(r"[A-Z][A-Z_]+")
# A marker of a class of our own stands for the value that it has.
MARKER: Final = re.compile(r"_\w+\((.+)\)")


class OptionsWithDefaults(UnpackTypedDictExtension):
    """Spells options out: defaults from the class next to them, descriptions from the docstring.

    A default that is a constant is replaced by its value.
    """

    def on_function(self, *, func: Function, **kwargs: Any) -> None:
        """Change a function that takes such options."""
        for parameter in func.parameters:
            if isinstance(parameter.default, ExprName) and CONSTANT.fullmatch(parameter.default.name):
                parameter.default = value_of(func, parameter.default)
        described = parameters_of(func)
        items = [list(section.value) for section in described]
        unpacked = next((each for each in func.parameters if "Unpack[" in str(each.annotation)), None)
        super().on_function(func=func, **kwargs)
        if unpacked is None:
            return
        for section, before in zip(described, items, strict=True):
            section.value[:] = before
        for added in parameters_of(func):
            if not any(added is section for section in described):
                func.docstring.parsed.remove(added)
        module = func.modules_collection[unpacked.annotation.slice.canonical_path].module
        for parameter in func.parameters:
            if parameter.default == "...":
                parameter.default = default_in(module, parameter.name)


def value_of(func: Function, constant: ExprName) -> Any:
    """The value of a constant as text; the constant itself where it is of another project."""
    try:
        value = str(func.modules_collection[constant.canonical_path].value)
    except (KeyError, AttributeError):
        return constant
    marked = MARKER.fullmatch(value)
    return marked[1] if marked else value


def parameters_of(func: Function) -> list[Any]:
    """The sections of a docstring that describe parameters."""
    sections = func.docstring.parsed if func.docstring else []
    return [section for section in sections if section.kind is DocstringSectionKind.parameters]


def default_in(module: Module, name: str) -> Any:
    """The default of an option: an attribute of a class of the module, or a parameter of its `__init__`."""
    for each in module.classes.values():
        found = value_in(each, name)
        if found is not None:
            return found
    return "..."


def value_in(options: Class, name: str) -> Any:
    """The default that one class gives to an option."""
    if name in options.members and getattr(options.members[name], "value", None) is not None:
        return options.members[name].value
    init = options.members.get("__init__")
    return init.parameters[name].default if init is not None and name in init.parameters else None
