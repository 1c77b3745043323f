"""The training step of the main job on bucketed and on random batches of the same budget: real tokens per second."""

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from harness import save

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from stdlib_corpus import open_corpus
from train_language_model import PADDING, ByteModel, loss_of

from collate import LengthTrackedBatch, PadCollator
from samplers import LengthBucketBatchSampler

MAX_TOKENS, STEPS = 16_384, 30


def random_batches(lengths: np.ndarray) -> Iterator[list[int]]:
    """Shuffled samples, each batch filled up to the budget."""
    batch: list[int] = []
    for index in np.random.default_rng(0).permutation(np.flatnonzero(lengths <= MAX_TOKENS)).tolist():
        if batch and (len(batch) + 1) * max(lengths[batch].max(), lengths[index]) > MAX_TOKENS:
            yield batch
            batch = []
        batch.append(index)


def main() -> None:
    """Train on both kinds of batches alternately; print and save padding and speed."""
    dataset = open_corpus(Path("runs/stdlib"))
    lengths = dataset.index.lengths[:, 0]
    kinds = {
        "bucketed": iter(LengthBucketBatchSampler(lengths, max_tokens=MAX_TOKENS, overlong="drop")),
        "random": random_batches(lengths),
    }
    collate = PadCollator(PADDING)
    models = {kind: ByteModel() for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    seen: dict[str, list[LengthTrackedBatch]] = {kind: [] for kind in kinds}
    for step in range(STEPS + 1):
        for kind, batches in kinds.items():
            batch = collate(dataset.__getitems__(next(batches)))
            optimizer = torch.optim.SGD(models[kind].parameters(), lr=0.1)
            start = time.perf_counter()
            loss_of(models[kind], batch).backward()
            optimizer.step()
            if step:
                seconds[kind].append(time.perf_counter() - start)
                seen[kind].append(batch["input"])
    results = {
        kind: {
            "padding": 1 - sum(b.num_tokens for b in seen[kind]) / sum(b.mask.numel() for b in seen[kind]),
            "real tokens a second": sum(b.num_tokens for b in seen[kind]) / sum(seconds[kind]),
            "median step in ms": 1000 * statistics.median(seconds[kind]),
        }
        for kind in kinds
    }
    for kind, row in results.items():
        print(f"{kind:<10}" + "".join(f"{name}: {value:,.3f}   " for name, value in row.items()))
    save("language_model", results)


if __name__ == "__main__":
    main()
