"""No object of ours that has a size is asked whether it is true: an empty one would be taken for none."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for package in ("collate", "samplers", "examples", "benchmarks")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def find_sized() -> set[str]:
    """The classes with `__len__`, and those that inherit it; one with `__bool__` says itself what is true."""
    classes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    sized: set[str] = set()
    for _ in classes:
        for node in classes:
            methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            bases = {name for base in node.bases for name in names_in(base)}
            if "__bool__" not in methods and ("__len__" in methods or bases & sized):
                sized.add(node.name)
    return sized


def names_in(node: ast.AST | None) -> set[str]:
    """The names in an annotation, also in one that is text."""
    if node is None:
        return set()
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            found |= names_in(ast.parse(part.value, mode="eval")) if part.value.isidentifier() else set()
    return found


def known_as(tree: ast.AST, sized: set[str]) -> set[str]:
    """Variables, attributes and functions that are annotated with a sized class, or made by calling one."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and is_one(node.annotation, sized):
            found.add(node.arg)
        elif isinstance(node, ast.AnnAssign) and is_one(node.annotation, sized):
            found.add(name_of(node.target))
        elif isinstance(node, ast.FunctionDef) and is_one(node.returns, sized):
            found.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and name_of(node.value.func) in sized:
            found |= {name_of(target) for target in node.targets}
    return found - {""}


def is_one(annotation: ast.AST | None, sized: set[str]) -> bool:
    """Whether it is a sized class, or that or None: not a list of them, or a function that gives one."""
    if isinstance(annotation, ast.BinOp):
        return is_one(annotation.left, sized) or is_one(annotation.right, sized)
    if isinstance(annotation, ast.Subscript):
        return name_of(annotation.value) in sized or (
            name_of(annotation.value) == "Optional" and is_one(annotation.slice, sized)
        )
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return is_one(ast.parse(annotation.value, mode="eval").body, sized)
    return name_of(annotation) in sized


def name_of(node: ast.AST | None) -> str:
    if isinstance(node, ast.Call):
        return name_of(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def truths(tree: ast.AST) -> Iterator[ast.expr]:
    """Whatever is asked whether it is true."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield node.test
        elif isinstance(node, ast.BoolOp):
            yield from node.values[:-1]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.operand
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Call) and name_of(node.func) in {"bool", "any", "all"}:
            yield from node.args


def findings(trees: dict[str, ast.AST], sized: set[str]) -> list[str]:
    # An attribute is asked for elsewhere than where it is annotated, a variable is not.
    known = {name: known_as(tree, sized) for name, tree in trees.items()}
    everywhere = set().union(*known.values())
    return [
        f"{name}:{node.lineno}: {ast.unparse(node)}"
        for name, tree in trees.items()
        for node in truths(tree)
        if name_of(node) in (known[name] if isinstance(node, ast.Name) else everywhere)
    ]


def test_no_sized_object_of_ours_is_asked_whether_it_is_true() -> None:
    sized = find_sized()
    assert {"LengthBucketBatchSampler", "ShardStream", "LengthTrackedBatch", "Bucketer", "BatchTable"} <= sized
    assert findings(TREES, sized) == []


@pytest.mark.parametrize(
    "code",
    [
        # As it stood in the cursor, where it let a state of an epoch's end begin the epoch again.
        "def begin(self, course: Course | None): self._began = course or self.coming",
        "def save(self, x: Course | None): return x and x.taken",
        "def f(self):\n    self._course: 'Course | None' = None\n    return 1 if self._course else 2",
        "def coming(self) -> Course: ...\ndef f(self): return not self.coming",
        "def f():\n    course = Course()\n    while course: pass",
        "def f(rows, course: Course): return [row for row in rows if course]",
    ],
)
def test_the_pattern_is_found_wherever_it_stands(code: str) -> None:
    assert len(findings({"x.py": ast.parse(code)}, {"Course"})) == 1
