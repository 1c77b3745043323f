"""The model of `examples/finetune_packed.py` on packed, bucketed and random padded batches: real tokens per second."""

import statistics
import sys
import time
from itertools import cycle
from pathlib import Path

import torch
from harness import save
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from finetune_packed import CAPACITY, FILL, LOSS, ROWS, Model, documents_of, losses_of

from collate import PadCollator, VarlenCollator, sequence_loss
from samplers import LengthBucketBatchSampler, PackingBatchSampler

DOCUMENTS, STEPS = 2_000, 40


def main() -> None:
    """Train on all kinds of batches alternately; print and save padding, speed and the losses of documents."""
    torch.set_num_threads(1)
    documents = documents_of(DOCUMENTS)
    lengths = [len(document["tokens"]) for document in documents]
    pad, pack = PadCollator(FILL), VarlenCollator(FILL, capacity=CAPACITY, arrange="given")
    packed = PackingBatchSampler(lengths, capacity=CAPACITY, rows=ROWS)
    bucketed = LengthBucketBatchSampler(lengths, max_tokens=CAPACITY * ROWS)
    torch.manual_seed(0)
    loaders = {
        "packed": DataLoader(documents, batch_sampler=packed, collate_fn=pack),
        "bucketed": DataLoader(documents, batch_sampler=bucketed, collate_fn=pad),
        "random": DataLoader(documents, batch_size=ROWS, shuffle=True, collate_fn=pad),
    }
    models = {kind: Model() for kind in loaders}
    optimizers = {kind: torch.optim.Adam(model.parameters()) for kind, model in models.items()}
    batches = {kind: cycle(loader) for kind, loader in loaders.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in loaders}
    counts: dict[str, list[tuple[int, int]]] = {kind: [] for kind in loaders}
    for step in range(STEPS + 1):
        for kind, model in models.items():
            batch = next(batches[kind])
            # Other programs on the machine do not count in processor time.
            start = time.process_time()
            sequence_loss(LOSS, model(batch["tokens"]), batch["labels"]).backward()
            optimizers[kind].step()
            optimizers[kind].zero_grad()
            # The first step also loads code.
            if step:
                seconds[kind].append(time.process_time() - start)
                counts[kind].append((batch["tokens"].num_tokens, batch["tokens"].mask.numel()))
    model, some = models["packed"].eval(), documents[:200]
    together = VarlenCollator(FILL, capacity=CAPACITY)(some)
    difference = float((losses_of(model, together) - losses_of(model, pad(some))).abs().max().detach())
    results = {
        kind: {
            "padding": 1 - sum(real for real, _ in counts[kind]) / sum(steps for _, steps in counts[kind]),
            "real tokens a second": sum(real for real, _ in counts[kind]) / sum(seconds[kind]),
            "median step in ms": 1000 * statistics.median(seconds[kind]),
        }
        for kind in loaders
    }
    for kind, row in results.items():
        print(f"{kind:<10}" + "".join(f"{name}: {value:,.3f}   " for name, value in row.items()))
    print(f"losses of {len(some)} documents, packed and padded, differ by {difference:.1e} at most")
    save("packed_training", {"kinds": results, "largest difference of losses": difference})


if __name__ == "__main__":
    main()
