"""Options that a function takes by `**options: Unpack[...]`, in its signature with their defaults.

griffe's own extension spells them out, but with `...` for each default, and with an empty description of each.
"""

from typing import Any

from griffe import Class, DocstringSectionKind, Function, Module, UnpackTypedDictExtension


class OptionsWithDefaults(UnpackTypedDictExtension):
    """Spells options out: defaults from the class next to them, descriptions from the docstring."""

    def on_function(self, *, func: Function, **kwargs: Any) -> None:
        """Change a function that takes such options."""
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
