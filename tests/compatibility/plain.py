"""Loaded objects, told in plain values that JSON holds: what must come out is compared as such."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collate import LengthTrackedBatch, VarlenBatch


def tell(kind: str, value: Any) -> Any:
    """What an object of this kind holds and does."""
    return TOLD[kind](value)


def tell_batch(batch: Any) -> Any:
    """A collated batch: of each field all that it holds."""
    if isinstance(batch, Mapping):
        return {name: tell_batch(part) for name, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [tell_batch(part) for part in batch]
    if isinstance(batch, LengthTrackedBatch):
        return {
            "class": type(batch).__name__,
            "padded": tell_batch(batch.padded),
            "lengths": batch.lengths.tolist(),
            "mask": batch.mask.int().tolist(),
            "permutation": batch.permutation.tolist(),
            "padding_value": batch.padding_value,
            "first_step": batch.first_step,
        }
    if isinstance(batch, VarlenBatch):
        batch.verify()
        documents = [document.tolist() for document in batch.unsort()]
        return {"class": type(batch).__name__, "text": repr(batch), "values": tell_batch(batch.values)} | {
            "documents": documents
        }
    if isinstance(batch, torch.Tensor):
        return {"dtype": str(batch.dtype), "requires_grad": batch.requires_grad, "values": batch.tolist()}
    if isinstance(batch, (np.ndarray, np.generic)):
        return {"dtype": str(batch.dtype), "values": batch.tolist()}
    return batch


def tell_keys(batch: Any) -> Any:
    """Which samples a batch holds: their numbers, or the keys of a stream's."""
    return batch["__key__"] if isinstance(batch, Mapping) else list(batch)


def tell_samples(data: Any) -> list[Any]:
    """All samples of a dataset."""
    return [tell_batch(sample) for sample in data.__getitems__(range(len(data)))]


SAMPLES = [
    {"tokens": np.arange(4), "tags": [1, 2], "label": 3, "id": "a"},
    {"tokens": np.arange(7), "tags": [5], "label": 4, "id": "b"},
    {"tokens": np.arange(0), "tags": [6, 7, 8], "label": 5, "id": "c"},
]
WORDS = ["a", "bbb", "cc", "ddd", "e", "ffff", "gg", "hhhhh", "ii"]


def _tell_collator(collate: Any) -> Any:
    return tell_batch(collate(SAMPLES))


def _tell_facts(sampler: Any) -> Any:
    facts = {"len": len(sampler), "epoch": sampler.epoch, "remaining": sampler.remaining, "shapes": len(sampler.shapes)}
    return facts | {"position": sampler.position(1), "first": [sampler.plan(epoch).batches[0] for epoch in range(4)]}


def _tell_sampler(sampler: Any) -> Any:
    facts = {"len": len(sampler), "epoch": sampler.epoch, "remaining": sampler.remaining, "shapes": len(sampler.shapes)}
    present, coming = sampler.position(1), sampler.next_position
    passes = [[tell_keys(batch) for batch in sampler] for _ in range(2)]
    plan = [tell_keys(batch) for batch in sampler.plan(4).batches]
    return facts | {"position": present, "next_position": coming, "passes": passes, "plan": plan}


def _tell_plan(plan: Any) -> Any:
    facts = {"epoch": plan.epoch, "steps": plan.steps, "num_replicas": plan.num_replicas}
    sizes = {"widths": plan.widths.tolist(), "tokens": plan.tokens.tolist()}
    return facts | sizes | {"batches": list(plan.batches), "report": _tell_report(plan.report())}


def _tell_report(report: Any) -> Any:
    # Sums of floats may differ in their last bits between machines.
    values = {name: round(value, 9) if isinstance(value, float) else value for name, value in asdict(report).items()}
    return {"values": values, "text": str(report)}


def _tell_index(index: Any) -> Any:
    return {
        "lengths": index.lengths.tolist(),
        "fields": list(index.fields),
        "keys": list(index.keys),
        "order": index.order.tolist(),
        "shards": [Path(shard).name for shard in index.shards],
        "length_id": index.length_id,
        "fingerprint": index.fingerprint,
        "unmeasured": list(index.verify(checksums=True)),
    }


def _tell_node(node: Any) -> Any:
    node.reset()
    return list(node)


def _tell_step_report(report: Any) -> Any:
    return {"text": str(report), "ok": report.ok, "probes": [found.probe for found in report.findings]}


def _tell_error(error: Any) -> Any:
    return {"class": type(error).__name__, "is_value_error": isinstance(error, ValueError), "args": list(error.args)}


# What pages and examples read of an object, or what its class documents, beside what the class itself shows.
READ: dict[str, list[str]] = {
    "collator": ["padding_value", "sort_by", "stack", "widths", "shapes", "max_length", "length_field", "on_empty"],
    "sampler": ["num_replicas", "rank"],
    "stream": ["num_replicas", "rank", "data", "collate_fn", "interleave"],
    "plan": ["epoch", "num_replicas"],
    "dataset": ["index"],
    "prefetcher": ["loader", "device", "depth"],
}

TOLD: dict[str, Callable[[Any], Any]] = {
    "batch": tell_batch,
    "checkpoint": dict,
    "collator": _tell_collator,
    "varlen collator": lambda collator: tell_batch(
        collator([{"tokens": torch.arange(3)}, {"tokens": torch.arange(4)}])
    ),
    "sampler": _tell_sampler,
    "facts of a sampler": _tell_facts,
    "stream": _tell_sampler,
    "plan": _tell_plan,
    "plan report": _tell_report,
    "index": _tell_index,
    "dataset": tell_samples,
    "stage": lambda stage: list(stage(WORDS)),
    "node": _tell_node,
    "buffer": lambda bucketer: (bucketer.end(), [bucketer.pop() for _ in iter(lambda: len(bucketer), 0)])[1],
    "iterator": lambda iterator: [tell_keys(batch) for batch in iterator],
    "prefetcher": lambda loader: [tell_keys(batch) for batch in islice(loader, 4)],
    "step report": _tell_step_report,
    "error": _tell_error,
}
