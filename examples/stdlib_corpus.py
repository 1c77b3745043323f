"""A corpus that every machine has: the functions of Python's own standard library, as byte sequences."""

import ast
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from samplers import ShardDataset, ShardWriter

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def open_corpus(folder: Path, most: int | None = None) -> ShardDataset:
    """Open the shards in `folder` and check them; write them first where there are none.

    Args:
        folder: where the shards are, or will be.
        most: write only so many functions; None writes all.
    """
    if folder.exists():
        dataset = ShardDataset(folder)
        dataset.index.verify()
        print(f"found {len(dataset):,} functions in {folder}, index and shards agree")
        return dataset
    # Written beside its place and then renamed: what a kill leaves is never taken for a corpus.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with ShardWriter(partial, max_samples=10_000) as writer:
        for key, text in islice(functions(), most):
            writer.write({"__key__": key, **next_byte(text)})
    partial.rename(folder)
    dataset = ShardDataset(folder)
    print(f"wrote {len(dataset):,} functions to {folder}")
    return dataset


def next_byte(text: bytes) -> dict[str, np.ndarray]:
    """A sequence of bytes as what a model reads, uint8 `[L]`, and what it should say next, int16 `[L]`."""
    tokens = np.frombuffer(text, np.uint8)
    return {"input": tokens[:-1], "target": tokens[1:].astype(np.int16)}


def functions() -> Iterator[tuple[str, bytes]]:
    """Every function of the standard library, with a progress bar over its files."""
    for path in tqdm(stdlib_files(), desc="to disk", unit="file"):
        yield from functions_in(path)


def stdlib_files() -> list[Path]:
    """The running interpreter's own source files, in one order on every machine; installed packages are left out."""
    return sorted(path for path in STDLIB.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))


def functions_in(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each outermost function or method of a file: where it stands, and its source text as bytes."""
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
            yield f"{path.relative_to(STDLIB).as_posix()}:{node.lineno}", text
        else:
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))
