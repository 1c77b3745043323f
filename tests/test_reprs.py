"""Every public object has a short `repr` that says what it is, and never the values of a tensor."""

import numpy as np
import pytest
import torch
from torchdata.nodes import IterableWrapper

import collate
import samplers
from collate import (
    DevicePrefetcher,
    LengthTrackedBatch,
    PadCollator,
    VarlenBatch,
    VarlenCollator,
    check_step,
    masked_mean,
)
from samplers import (
    LengthBucketBatchSampler,
    LengthBucketNode,
    LengthIndex,
    Mixture,
    PackingBatchSampler,
    PackingNode,
    ReadAheadLoader,
    ShardDataset,
    ShardStream,
    ShardWriter,
    SplitDataset,
    Transport,
    bucket_by_length,
    plan_epoch,
)

# What has no instance of its own: functions, errors.
FUNCTIONS = {name for package in (collate, samplers) for name in package.__all__ if name[0].islower()}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, str]]:
    """An object of each public class, and what its `repr` says."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, max_samples=6) as writer:
        for number in range(10):
            writer.write({"__key__": f"k{number}", "tokens": np.arange(number + 1)})
    batch = LengthTrackedBatch.from_sequences([torch.arange(900.0), torch.arange(3.0)])
    report = check_step(lambda each: masked_mean(each).sum(), batch)
    varlen = VarlenCollator(capacity=16)([[1, 2, 3], [4]])
    return {
        "LengthTrackedBatch": (batch, "[2, 900] float32"),
        "VarlenBatch": (varlen, "VarlenBatch("),
        "PadCollator": (PadCollator({"x": -100}, widths=8), "PadCollator(padding_value={'x': -100}, widths=8)"),
        "VarlenCollator": (VarlenCollator(capacity=16, align=2), "VarlenCollator(capacity=16, align=2, PadCollator("),
        "DevicePrefetcher": (DevicePrefetcher([batch], "cpu"), "DevicePrefetcher(list, 'cpu', depth=2)"),
        "StepReport": (report, ""),
        "LengthBucketBatchSampler": (
            LengthBucketBatchSampler([3, 4], max_tokens=9, indices=np.arange(2)),
            "LengthBucketBatchSampler(2 samples, max_tokens=9, indices=<2>, num_replicas=1, rank=0, batches=1)",
        ),
        "PackingBatchSampler": (
            PackingBatchSampler([3, 4], capacity=9),
            "PackingBatchSampler(2 samples, capacity=9, num_replicas=1, rank=0, batches=1)",
        ),
        "Mixture": (
            Mixture({"a": [3, 4], "b": [5]}, weights={"a": 1, "b": 2}),
            "Mixture(a=2 samples, b=1 samples, weights={'a': 1.0, 'b': 2.0})",
        ),
        "SplitDataset": (
            SplitDataset([[1] * 15], PackingBatchSampler([15], capacity=8, overlong="split").pieces),
            "SplitDataset(1 samples, 2 pieces)",
        ),
        "ReadAheadLoader": (
            ReadAheadLoader([[1], [2]], batch_sampler=LengthBucketBatchSampler([1, 1], batch_size=2)),
            "ReadAheadLoader(LengthBucketBatchSampler, prefetch_batches=2)",
        ),
        "PackingNode": (
            PackingNode(IterableWrapper([]), len, capacity=8, buffer_size=10),
            "PackingNode(IterableWrapper, length=len, capacity=8, buffer_size=10",
        ),
        "BatchPlan": (plan_epoch([3, 4], max_tokens=9), "BatchPlan(epoch=0, batches=1, num_replicas=1)"),
        "LengthIndex": (
            LengthIndex.open(folder / "shard.ltx"),
            "LengthIndex(10 samples, 2 shards, fields=('tokens',))",
        ),
        "ShardDataset": (ShardDataset(folder), "ShardDataset(10 samples, 2 shards, fields=['tokens'])"),
        "ShardStream": (
            ShardStream(folder, collate_fn=PadCollator(), max_tokens=30),
            "ShardStream(10 samples, 2 shards, max_tokens=30, num_replicas=1, rank=0, batches=",
        ),
        "Transport": (Transport(retries=8), "Transport(connections=32, timeout=30.0, retries=8, deadline=600.0"),
        "ShardWriter": (writer, "prefix='shard', layout='blocks', 10 samples, 2 finished shards)"),
        "BucketStage": (bucket_by_length("x", max_tokens=9), "BucketStage(length='x', max_tokens=9, buffer_size=1000"),
        "LengthBucketNode": (
            LengthBucketNode(IterableWrapper([]), len, batch_size=2),
            "LengthBucketNode(IterableWrapper, length=len, batch_size=2, buffer_size=1000",
        ),
    }


def test_every_public_class_has_a_short_repr(objects: dict[str, tuple[object, str]]) -> None:
    # Red: it was the address of a PadCollator, sampler, dataset, stream, prefetcher, node and writer.
    classes = {*collate.__all__, *samplers.__all__} - FUNCTIONS - {"LengthError"}
    assert classes <= set(objects)
    for name, (value, says) in objects.items():
        assert type(value).__name__ == name
        assert says in repr(value)
        assert " at 0x" not in repr(value)
        assert len(repr(value)) <= 300, name


def test_a_repr_names_the_type_of_a_subclass() -> None:
    class MyCollator(PadCollator):
        pass

    assert repr(MyCollator()) == "MyCollator(padding_value=0)"
    assert isinstance(VarlenBatch, type)
