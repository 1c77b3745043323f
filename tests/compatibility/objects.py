"""The objects that are pickled or given to `torch.save`."""

from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import torch
import webdataset
from torch.utils.data import DataLoader
from torchdata.nodes import IterableWrapper

import collate
import samplers
from compatibility import loaders, plain
from compatibility.recipes import sampler_recipe, stream_recipe, take
from compatibility.surface import resolve


def batches() -> dict[str, Any]:
    """Batches of many kinds."""
    rows = [torch.arange(3), torch.arange(5) + 10, torch.arange(0)]
    frames = [torch.full((length, 2), length / 4) for length in (2, 4)]
    one = collate.LengthTrackedBatch.from_sequences(rows, padding_value=-1)
    leaf = collate.LengthTrackedBatch(torch.ones(2, 3, requires_grad=True), torch.tensor([3, 1]))
    floats = collate.LengthTrackedBatch.from_sequences(frames)
    return {
        "a batch": one,
        "a batch of floats": floats,
        "a batch in bfloat16": floats.to(torch.bfloat16),
        "a batch in the order given": collate.LengthTrackedBatch.from_sequences(rows, order="given", widths=8),
        "a batch whose padding is unknown": leaf,
        "the second part of a batch": one.split(2)[1],
        "the second chunk of a batch": list(one.split_steps(2))[1],
        "a collated batch": collate.PadCollator({"tokens": 0, "tags": -100})(plain.SAMPLES),
    }


def collators() -> dict[str, collate.PadCollator]:
    """Collators, with each option."""
    sampler = samplers.LengthBucketBatchSampler([3, 4], max_tokens=8, max_length=3, widths=4)
    return {
        "a collator": collate.PadCollator(),
        "a collator with values by field": collate.PadCollator({"tokens": 0, "tags": -100}, sort_by="tags"),
        "a collator with widths": collate.PadCollator(widths={"tokens": 8, "tags": (4, 16)}, sort_by=False),
        "a collator with shapes": collate.PadCollator(shapes=[(4, 8), (8, 8)]),
        "a collator that cuts": collate.PadCollator(max_length={"tokens": 3, "tags": 2}, on_empty="keep"),
        "a collator for a sampler": collate.PadCollator.for_sampler(sampler),
    }


def varlen_batches() -> dict[str, Any]:
    """Batches of several sequences in a row: since 0.2."""
    rows = [torch.arange(3), torch.arange(5) + 10, torch.arange(2)]
    one = collate.VarlenBatch.from_sequences(rows, capacity=8)
    return {
        "a varlen batch": one,
        "a varlen batch of floats": one.map(lambda values: values.float().unsqueeze(-1) / 4),
        "a part of a varlen batch": one.split_rows(1)[0],
        "a chunk of a varlen batch": list(one.split_steps(4))[1],
        "a collated varlen batch": collate.VarlenCollator(capacity=8, padding_value={"tokens": 0, "tags": -100})(
            plain.SAMPLES[:1]
        ),
    }


def objects(shards: Path) -> Iterator[tuple[str, str, str, Any]]:
    """Form, kind, description and object of all that is saved."""
    for name, batch in batches().items():
        yield "torch.save", "batch", name, batch
        yield "pickle", "batch", name, batch
    for name, varlen in varlen_batches().items():
        yield "torch.save", "batch", name, varlen
        yield "pickle", "batch", name, varlen
    yield "pickle", "varlen collator", "a varlen collator", collate.VarlenCollator(capacity=8)
    for name, collator in collators().items():
        yield "pickle", "collator", name, collator
    yield from (("pickle", *found) for found in _planned(shards))
    yield from (("pickle", *found) for found in _read(shards))
    yield from (("pickle", *found) for found in _small())
    sampler = loaders.make(sampler_recipe("small") | {"replicas": 1, "rank": 0}, shards)
    yield "torch.save", "checkpoint", "a checkpoint with a position", {"position": sampler.next_position, "step": 3}


def _planned(shards: Path) -> Iterator[tuple[str, str, Any]]:
    widths = loaders.make(sampler_recipe("small, widths as list") | {"replicas": 1, "rank": 0}, shards)
    yield "sampler", "a sampler with widths", widths
    yield "plan report", "the report of a plan", widths.plan(3).report()
    for name in ("small", "two fields"):
        sampler = loaders.make(sampler_recipe(name) | {"replicas": 2, "rank": 1}, shards)
        running = iter(sampler)
        take(running, 2)
        yield "sampler", f"a sampler, {name}, in the middle of an epoch", sampler
        yield "iterator", f"an iterator of a sampler, {name}", running
        yield "plan", f"a plan, {name}", sampler.plan(3)
    # Enough batches for edges that take turns; of what it plans, little is told here.
    many = {"lengths": {"count": 800}, "options": {"batch_size": 4}, "replicas": 1, "rank": 0}
    yield "facts of a sampler", "a sampler of many batches", loaders.make({"kind": "sampler"} | many, shards)


def _read(shards: Path) -> Iterator[tuple[str, str, Any]]:
    index = samplers.LengthIndex.open(shards / "blocks" / "shard.ltx")
    yield "index", "an index that was opened", index
    yield "index", "an index that was built", samplers.LengthIndex.build(shards / "plain", ["tokens"], checksums=True)
    yield "index", "an index that was moved", index.moved_to(shards / "blocks")
    for layout in ("blocks", "plain"):
        yield "dataset", f"a dataset of {layout}", samplers.ShardDataset(shards / layout)
    skips = samplers.ShardDataset(shards / "blocks", handler=webdataset.warn_and_continue, max_failed=0.5)
    yield "dataset", "a dataset that skips", skips
    data = samplers.ShardDataset(shards / "blocks", fields=["tokens"], checksums=False)
    yield "dataset", "a dataset of one field", data
    sampler = samplers.LengthBucketBatchSampler(index, max_tokens=16)
    yield "sampler", "a sampler of an index", sampler
    for layout in ("blocks", "plain"):
        stream = loaders.make(stream_recipe(layout) | {"replicas": 1, "rank": 0}, shards)
        yield "stream", f"a stream of {layout}", copy(stream)
        take(iter(stream), 2)
        yield "stream", f"a stream of {layout}, in the middle of an epoch", stream
    yield "plan", "the plan of a stream", stream.plan(2)


def _small() -> Iterator[tuple[str, str, Any]]:
    yield "stage", "a stage of a pipeline", samplers.bucket_by_length(len, max_tokens=6, buffer_size=4)
    node = samplers.LengthBucketNode(IterableWrapper(plain.WORDS), len, max_tokens=6, buffer_size=4)
    yield "node", "a node", node
    budget = resolve("samplers.budget.Budget")(max_tokens=6)
    bucketer = resolve("samplers.bucketer.Bucketer")(budget, buffer_size=4)
    for word in plain.WORDS[:3]:
        bucketer.push(len(word), word)
    yield "buffer", "a buffer with samples", bucketer
    loader = DataLoader(list(range(8)), batch_size=2, collate_fn=list)
    yield "prefetcher", "a prefetcher", collate.DevicePrefetcher(loader, "cpu")
    yield "error", "an error", collate.LengthError("row 3 has 4 steps, 5 were declared")
    rows = collate.LengthTrackedBatch.from_sequences([torch.ones(4), torch.ones(2)])
    yield "step report", "the report of a step", collate.check_step(lambda batch: batch.padded.mean(), rows)
