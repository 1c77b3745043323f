"""Three corpora in one plan, by exact shares of tokens: code, its documentation, and made-up sums.

    python examples/mixture.py [--files 200]

The code and the documentation are those of the running Python. The shares change in the middle of the epoch, a new
process resumes from there, and the same mixture is packed into rows of several corpora.
"""

import argparse
import ast
import json
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from stdlib_corpus import STDLIB, stdlib_files
from torch.utils.data import DataLoader

from collate import PadCollator, VarlenCollator
from samplers import LengthBucketBatchSampler, Mixture, PackingBatchSampler

LONGEST = 4000


def read_texts(files: int) -> tuple[list[str], list[str]]:
    """Functions and docstrings of the standard library, at most 4,000 characters each."""
    functions, docstrings = [], []
    for path in stdlib_files()[:files]:
        text = path.read_text(errors="replace")
        lines = text.splitlines()
        for node in nodes_of(text):
            docstring = ast.get_docstring(node)
            functions.append("\n".join(lines[node.lineno - 1 : node.end_lineno])[:LONGEST])
            docstrings += [docstring[:LONGEST]] if docstring else []
    return functions, docstrings


def nodes_of(text: str) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The functions and classes of a file; none, if it is not of this version of Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return
    yield from (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)))


def make_sums(count: int) -> list[str]:
    """Sums with their results."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 10 ** rng.integers(1, 9, (count, 1)), (count, 2)).tolist()
    return [f"{first} + {second} = {first + second}" for first, second in pairs]


class Texts:
    """A map-style dataset of texts as bytes."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = [text.encode() for text in texts]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor(list(self.texts[index]))}


def main() -> None:
    """Plan, train half an epoch, change the shares, resume, and pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200, help="files of the standard library to read")
    arguments = parser.parse_args()
    code, text = read_texts(arguments.files)
    corpora = {"code": Texts(code), "text": Texts(text), "sums": Texts(make_sums(4000))}
    lengths = {name: [len(each) for each in corpus.texts] for name, corpus in corpora.items()}
    print(f"{len(code)} functions and {len(text)} docstrings from {STDLIB}, {len(corpora['sums'])} sums")

    # Half of all tokens are code, whatever the corpora's sizes; the documentation may come up to eight times.
    mixture = Mixture(lengths, weights={"code": 5, "text": 4, "sums": 1}, passes={"text": 8, "sums": 8})
    sampler = LengthBucketBatchSampler(mixture, max_tokens=16_384)
    loader: Any = DataLoader(
        mixture.concat(corpora), batch_sampler=sampler, collate_fn=PadCollator.for_sampler(sampler)
    )
    half = len(sampler) // 2
    tokens = [batch["tokens"].num_tokens for batch, _ in zip(loader, range(half), strict=False)]
    print(f"half an epoch: {half} batches, {sum(tokens):,} tokens\n{sampler.mixture_report(sampler.position(half))}")

    # More documentation from here on. Nothing that was read comes again before its corpus is through.
    later = Mixture(lengths, weights={"code": 2, "text": 7, "sums": 1}, passes={"text": 8, "sums": 8})
    sampler.seek(sampler.position(half), mixture=later)
    saved = json.dumps(sampler.position(0))
    resumed = LengthBucketBatchSampler(later, max_tokens=16_384)
    resumed.seek(json.loads(saved))
    batches = list(resumed)
    print(f"other shares: {len(batches)} batches\n{resumed.mixture_report()}")
    print(f"the resumed process has the same batches: {batches == list(sampler)}")

    # A corpus that is never repeated shares rows with others everywhere.
    mixed = Mixture(lengths, weights={"code": 5, "text": 4, "sums": 1}, within="sample")
    packing = PackingBatchSampler(mixed, capacity=8192)
    collate = VarlenCollator.for_sampler(packing)
    row = next(iter(DataLoader(mixed.concat(corpora), batch_sampler=packing, collate_fn=collate)))["tokens"]
    print(f"a row of {row.values.shape[1]:,} steps has {len(row.lengths)} documents")
    plan = packing.plan(0)
    corpora_of_rows = [len({name for name, _ in mixed.locate(row)}) for rows in plan.rows for row in rows]
    print(f"documents of {np.mean(corpora_of_rows):.1f} corpora share a row, {plan.report().waste:.2%} is empty")


if __name__ == "__main__":
    main()
