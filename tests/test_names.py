"""Names: one meaning for each public name of a module, short names of tests, and types in all tests."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Rooms whose names may be equal, because they mean the same: the methods of a padded and of a varlen batch; a command
# and the function in which it is done.
COUNTERPARTS = [
    {"collate/operations", "collate/varlen"},
    {"samplers/cli/commands.py", "samplers/cli/index_commands.py", "samplers/cli/sample_commands.py"},
]


def names_of(path: Path) -> list[str]:
    """The public names that a module makes at its top level."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def are_counterparts(modules: list[str]) -> bool:
    """Whether modules are in rooms whose names may be equal, each in another room."""
    for rooms in COUNTERPARTS:
        found = [next((room for room in rooms if module.startswith(room)), None) for module in modules]
        if None not in found and len(set(found)) == len(modules):
            return True
    return False


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """All functions in tests and their helpers, with the file of each."""
    return [
        (str(path.relative_to(ROOT)), node)
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def test_a_public_name_of_a_module_is_no_other_module_s() -> None:
    """Red before: `check_steps`, `COST_UNITS` and others stood in two modules with two meanings."""
    modules = defaultdict(list)
    for package in ("collate", "samplers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                for name in set(names_of(path)):
                    modules[name].append(path.relative_to(ROOT).as_posix())
    twice = {name: found for name, found in modules.items() if len(found) > 1 and not are_counterparts(found)}
    assert not twice, "rename one: a word has one meaning"


def test_names_of_tests_have_at_most_seventy_characters() -> None:
    """Red before: 60 names were longer, up to 92 characters."""
    long = [
        f"{path}: {node.name}" for path, node in functions() if node.name.startswith("test_") and len(node.name) > 70
    ]
    assert not long


def test_functions_of_tests_and_of_their_helpers_are_typed() -> None:
    """Red before: 1,295 of 2,031 functions had no types."""
    untyped = []
    for path, node in functions():
        given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        arguments = [argument for argument in given if argument.arg not in {"self", "cls"}]
        if node.returns is None or any(argument.annotation is None for argument in arguments):
            untyped.append(f"{path}:{node.lineno}: {node.name}")
    assert not untyped
