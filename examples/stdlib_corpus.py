"""A corpus that every machine has: the functions of Python's own standard library, as byte sequences."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path


def stdlib_files() -> list[Path]:
    """The running interpreter's own source files, in one order on every machine; installed packages are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))


def functions_in(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each outermost function or method of a file: its name with its line, and its source text as bytes."""
    source = path.read_bytes()
    try:
        with warnings.catch_warnings():
            # Old files hold escapes that newer compilers warn of.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        # Some of the library's own test files are broken on purpose.
        return
    lines = source.splitlines(keepends=True)
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = b"".join(lines[node.lineno - 1 : node.end_lineno])
            yield f"{path.stem}.{node.name}:{node.lineno}", text
        else:
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))
