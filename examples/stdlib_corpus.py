"""A corpus that every machine has: the functions of Python's standard library, as byte sequences."""

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
    """Open the shards in `folder` and check them. If there are none, write them first.

    Args:
        folder: Folder of the shards; made if it does not exist.
        most: Largest number of functions to write; None writes all.
    """
    if folder.exists():
        dataset = ShardDataset(folder)
        dataset.index.verify()
        print(f"found {len(dataset):,} functions in {folder}, index and shards agree")
        return dataset
    # Write to a temporary folder and rename it: a killed run leaves no folder that looks like a corpus.
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
    """The model's input, uint8 `[L]`, and the target at each step, the next byte, int16 `[L]`."""
    tokens = np.frombuffer(text, np.uint8)
    return {"input": tokens[:-1], "target": tokens[1:].astype(np.int16)}


def functions() -> Iterator[tuple[str, bytes]]:
    """Every function of the standard library, with a progress bar over its files."""
    for path in tqdm(stdlib_files(), desc="to disk", unit="file"):
        yield from functions_in(path)


def stdlib_files() -> list[Path]:
    """The source files of the running interpreter, sorted, without installed packages."""
    return sorted(path for path in STDLIB.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))


def functions_in(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each outermost function or method of a file: its file and line, and its source as bytes."""
    source = path.read_bytes()
    try:
        with warnings.catch_warnings():
            # Old files contain escapes for which newer compilers warn.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        # Some test files of the library are invalid on purpose.
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
