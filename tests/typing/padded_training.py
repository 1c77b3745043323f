"""A user's script: shards, sampler, collator and loop, with the batch as a TypedDict, so that editors complete it."""

from typing import TypedDict, assert_type

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from collate import LengthTrackedBatch, PadCollator, apply_rnn, last_step, masked_mean, sequence_loss
from samplers import BatchPlan, LengthBucketBatchSampler, LengthIndex, ShardDataset, run_in_order


class Batch(TypedDict):
    """What the collator makes of a sample."""

    tokens: LengthTrackedBatch
    tags: LengthTrackedBatch
    label: Tensor


def train(folder: str) -> float:
    data = ShardDataset(folder)
    sampler = LengthBucketBatchSampler(data.index, max_tokens=4096)
    assert_type(sampler.plan(0), BatchPlan)
    assert_type(data.index, LengthIndex)
    collate = PadCollator.for_sampler(sampler, {"tokens": 0, "tags": -100})
    assert_type(collate, PadCollator)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate)
    embed, rnn, head = nn.Embedding(50, 16), nn.LSTM(16, 32), nn.Linear(32, 5)
    total = 0.0
    batch: Batch
    for batch in loader:
        hidden, _ = apply_rnn(rnn, batch["tokens"].map(embed))
        assert_type(hidden, LengthTrackedBatch)
        loss = sequence_loss(nn.CrossEntropyLoss(reduction="none"), hidden.map(head), batch["tags"])
        loss = loss + head(last_step(hidden)).sum() + masked_mean(hidden).sum()
        assert_type(batch["tokens"].lengths, Tensor)
        total += loss.item()
    sampler.seek(sampler.position(1))
    return total


def collate_by_hand(rows: list[list[int]]) -> Tensor:
    batch = LengthTrackedBatch.from_sequences([torch.tensor(row) for row in rows])
    assert_type(batch.unsort(), LengthTrackedBatch)
    assert_type(batch.unsort(batch.padded), Tensor)
    assert_type(batch.sequences(), list[Tensor])
    assert_type(batch.num_tokens, int)
    return batch.padded


def embed_in_order(folder: str) -> object:
    def step(batch: Batch) -> Tensor:
        assert_type(batch["tokens"].left_padded(), dict[str, Tensor])
        return batch["tokens"].padded.float().mean(1)

    return run_in_order(step, ShardDataset(folder), collate_fn=PadCollator(), max_tokens=4096, out="vectors.npy")
