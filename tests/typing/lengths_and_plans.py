"""A user's script: every form of lengths that a sampler takes, and what plans, streams and writers give."""

from collections.abc import Iterator
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import lengthtrack as lt
from collate import DevicePrefetcher, PadCollator, VarlenBatch, VarlenCollator
from samplers import (
    LengthBucketBatchSampler,
    LengthIndex,
    ShardStream,
    ShardWriter,
    bucket_by_length,
    lengths_of,
    optimal_widths,
    plan_epoch,
)


def samplers_of(dataset: Any, array: npt.NDArray[np.int32]) -> list[LengthBucketBatchSampler]:
    lengths = lengths_of(dataset, "input_ids")
    assert_type(lengths, npt.NDArray[np.int64])
    return [
        LengthBucketBatchSampler(lengths, max_tokens=4096, widths=optimal_widths(lengths, 6)),
        LengthBucketBatchSampler([3, 4, 5], batch_size=8, overlong="drop", num_replicas=2, rank=1),
        LengthBucketBatchSampler(array, max_tokens=4096, count_tokens="real", rank="all"),
        LengthBucketBatchSampler(torch.tensor([3, 4]), max_tokens=4096, indices=range(2)),
        lt.LengthBucketBatchSampler(LengthIndex.open("corpus.ltx"), max_tokens=4096),
    ]


def batches_of(sampler: LengthBucketBatchSampler) -> Iterator[list[int]]:
    for batch in sampler:
        assert_type(batch, list[int])
        yield batch
    plan = plan_epoch([3, 4], max_tokens=9)
    assert_type(plan.steps, int)
    assert_type(plan.report().padding, float)


def stream(folder: str) -> ShardStream:
    loader = ShardStream(folder, collate_fn=PadCollator(), max_tokens=4096, interleave=2)
    for batch in DevicePrefetcher[dict[str, Tensor]](loader, "cpu"):
        assert_type(batch, dict[str, Tensor])
    return loader


def write(folder: str) -> LengthIndex:
    with ShardWriter(folder, layout="plain", stack=["image"]) as writer:
        writer.write({"__key__": "a", "tokens": np.arange(3), "image": np.zeros((2, 2))})
    index = LengthIndex.build(folder, ["wav"], length_field="json.num_samples", resume=True)
    assert_type(index.rates, dict[str, tuple[int, ...]])
    assert_type(index.fields, tuple[str, ...])
    assert_type(index.fingerprint, str)
    return index


def rows(samples: list[list[int]]) -> VarlenBatch:
    batch: VarlenBatch = VarlenCollator(capacity=128)(samples)
    stage = bucket_by_length(len, max_tokens=4096)
    for bucket in stage(samples):
        batch = VarlenCollator(capacity=128)(bucket)
    return batch
