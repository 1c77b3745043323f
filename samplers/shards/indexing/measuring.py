"""Lengths that a user's function measures, and the name by which the index knows that function.

A later process must know whether the lengths in an index come from the same function. So each function gets a name. It
is made from its source without comments and blank lines, which is the same in every version of Python, and from what
the source refers to: constants, bound arguments, and functions of the same module.

>>> def steps(field, data):
...     return len(data)
>>> identify(steps).startswith("steps:")
True
"""

import ast
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import partial
from hashlib import blake2b
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

from samplers.shards.format.header_lengths import HeaderLength
from samplers.sources.masked import refuse_masked

LengthOf: TypeAlias = Callable[[str, bytes], int]
"""From a field and the bytes of its member to the length in time steps."""
Decoder: TypeAlias = Callable[[bytes], Any]
"""From the bytes of a member to a value."""


@dataclass(frozen=True)
class Measure:
    """Measures the steps of a field: by its decoder if there is one, by the length function, or from headers.

    Attributes:
        length: `(field, bytes) -> steps`.
        decode: Functions from bytes to a sequence, by field.
        header: Measures the fields that no function measures.
    """

    length: LengthOf | None = None
    decode: Mapping[str, Decoder] = dataclass_field(default_factory=dict)
    header: HeaderLength | None = None

    def __call__(self, field: str, data: bytes) -> int:
        """Steps of a field. 0 if nothing measures it."""
        if field in self.decode:
            value = self.decode[field](data)
            refuse_masked(value, f"steps of field {field!r}", "let decode= drop them with .compressed()")
            return len(value)
        return 0 if self.length is None else self.length(field, data)

    def measures(self, field: str) -> bool:
        """Whether this measures the field."""
        return self.calls(field) or self.header is not None

    def calls(self, field: str) -> bool:
        """Whether a function measures the field."""
        return self.length is not None or field in self.decode


def identify(function: Callable[..., Any]) -> str | None:
    """A short name `NAME:DIGEST` that changes when the function changes.

    Without source (a function that was typed into the interpreter), it is made from the compiled code, and differs
    between versions of Python.

    Returns:
        The name. None if the function refers to objects that no text describes.
    """
    if isinstance(function, Measure):
        parts = {"": function.length, **dict(sorted(function.decode.items()))}
        names = {field: identify(part) for field, part in parts.items() if part is not None}
        return None if None in names.values() else " ".join(f"{field}={name}" for field, name in names.items())
    try:
        text = "\n".join(_describe_function(function, _module_of(function), set()))
    except _UnknownError:
        return None
    return f"{_name_of(function)}:{blake2b(text.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()}"


class _UnknownError(Exception):
    """An object that no text describes."""


def _describe_function(function: Any, module: str, seen: set[int]) -> Iterator[str]:
    """Describe a function: its source, its defaults, and the values that it refers to.

    Yields:
        Lines of text.
    """
    # Functions may call each other in a circle.
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, partial):
        yield from _describe_function(function.func, module, seen)
        yield from _describe_value((function.args, dict(function.keywords)), module, seen)
    elif isinstance(function, MethodType):
        yield from _describe_function(function.__func__, module, seen)
        yield from _describe_value(function.__self__, module, seen)
    elif isinstance(function, FunctionType):
        yield from _read_source(function) or _describe_code(function.__code__)
        yield from _describe_value((function.__defaults__, function.__kwdefaults__), module, seen)
        yield from _describe_names(function, module, seen)
    elif inspect.isroutine(function) or isinstance(function, type):
        yield f"{function.__module__}.{function.__qualname__}"
    else:
        yield from _describe_function(type(function).__call__, module, seen)
        yield from _describe_value(function, module, seen)


def _describe_names(function: FunctionType, module: str, seen: set[int]) -> Iterator[str]:
    """Describe the global and outer variables that a function uses, as far as text can.

    Yields:
        Lines of text.
    """
    variables = inspect.getclosurevars(function)
    for name, value in sorted({**variables.globals, **variables.nonlocals}.items()):
        yield name
        if isinstance(value, ModuleType):
            yield value.__name__
            continue
        try:
            yield from list(_describe_value(value, module, seen))
        except _UnknownError:
            yield type(value).__qualname__


def _describe_value(value: Any, module: str, seen: set[int]) -> Iterator[str]:
    """Describe a value that a function uses.

    Yields:
        Lines of text.

    Raises:
        _UnknownError: No text describes it.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, PurePath)):
        yield repr(value)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _describe_value(each, module, seen)
    elif isinstance(value, (set, frozenset)):
        # A set has another order in every process.
        yield from sorted(line for each in value for line in _describe_value(each, module, seen))
    elif isinstance(value, Mapping):
        for key, each in sorted(value.items(), key=repr):
            yield from _describe_value(key, module, seen)
            yield from _describe_value(each, module, seen)
    elif isinstance(value, FunctionType) and value.__module__ == module:
        yield from _describe_function(value, module, seen)
    elif inspect.isroutine(value) or isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}"
    elif hasattr(value, "__dict__") and type(value).__module__ == module:
        yield type(value).__qualname__
        yield from _describe_value(vars(value), module, seen)
    else:
        raise _UnknownError(type(value).__qualname__)


def _read_source(function: FunctionType) -> list[str]:
    """The source of a function without comments and blank lines. Empty if it cannot be found."""
    try:
        lines, _ = inspect.findsource(function)
        nodes = list(_find_nodes(ast.parse("".join(lines)), function.__code__))
        # Not found, or several definitions fit, such as two equal lambdas in one call.
        if len(nodes) != 1:
            return []
        text = textwrap.dedent("".join(lines[nodes[0].lineno - 1 : nodes[0].end_lineno]))
        if isinstance(nodes[0], ast.Lambda):
            # The lambda alone, in brackets: the code around it does not change what it does.
            text = f"({ast.get_source_segment(''.join(lines), nodes[0])})"
        return _strip_comments(text)
    except (OSError, TypeError, ValueError, SyntaxError, tokenize.TokenError):
        return []


def _find_nodes(tree: ast.Module, code: CodeType) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda]:
    """The definitions in a module that the code may come from: by name and line, a lambda by the span of its body.

    Yields:
        Nodes of the tree.
    """
    spans = {(first, last, start, end) for first, last, start, end in code.co_positions() if start is not None}
    for node in ast.walk(tree):
        if isinstance(node, ast.Lambda) and code.co_name == "<lambda>":
            body = node.body
            if (body.lineno, body.end_lineno, body.col_offset, body.end_col_offset) in spans:
                yield node
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == code.co_name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first == code.co_firstlineno:
                yield node


def _strip_comments(text: str) -> list[str]:
    """Python source without comments and blank lines."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return [line.rstrip() for line in lines if line.strip()]


def _describe_code(code: CodeType) -> Iterator[str]:
    """Describe compiled code, which depends on the version of Python.

    Yields:
        Lines of text.
    """
    yield f"Python {sys.version_info.major}.{sys.version_info.minor}"
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _describe_code(constant)
        else:
            yield repr(constant)


def _module_of(function: Any) -> str:
    """The module in which a function was defined."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__module__", None) or type(function).__module__)


def _name_of(function: Any) -> str:
    """The name of a function, without the functions around it."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__).rpartition("<locals>.")[2]
