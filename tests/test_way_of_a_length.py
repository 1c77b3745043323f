"""Law 10 from a shard to the batch: one number on disk, in the index, the plan, the batch, and in what is packed."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import LengthError, PadCollator
from samplers import LengthBucketBatchSampler, ShardDataset, ShardWriter


def write(folder: Path, layout: str, lengths: Any) -> None:
    with ShardWriter(folder, layout=layout, max_samples=7, block_size=4) as writer:
        for index, length in enumerate(lengths):
            values = np.full(length, index, np.int32)
            writer.write({"__key__": f"k{index}", "x": values, "steps": np.int64(length)})


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=25).filter(any),
    st.sampled_from(["blocks", "plain"]),
    st.none() | st.integers(1, 40),
    st.integers(30, 90),
)
def test_a_length_is_the_same_number_everywhere(lengths: Any, layout: str, max_length: Any, max_tokens: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(folder, layout, lengths)
        data = ShardDataset(folder)
        assert data.index.lengths.reshape(-1).tolist() == lengths
        sampler = LengthBucketBatchSampler(data.index, max_tokens=max_tokens, max_length=max_length)
        collate = PadCollator(-1, max_length=max_length, length_field={"x": "steps"})
        seen = []
        for batch in DataLoader(data, batch_sampler=sampler, collate_fn=collate):
            field = batch["x"]
            field.verify()
            indices = [int(key[1:]) for key in batch["__key__"]]
            assert field.lengths.tolist() == [min(lengths[p], max_length or 99) for p in indices]
            assert field.padded.shape[0] * field.lengths.max() <= max_tokens
            assert all((row == p).all() for row, p in zip(field.sequences(), indices, strict=True))
            if field.num_tokens:
                assert len(field.pack().data) == field.num_tokens
            seen += indices
        assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_the_same_through_workers(tmp_path: Path, kind: type[Any], workers: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 60).tolist()
    write(tmp_path, "blocks", lengths)
    data = ShardDataset(tmp_path)
    sampler = LengthBucketBatchSampler(data.index, max_tokens=120)
    loader = kind(data, batch_sampler=sampler, num_workers=workers, collate_fn=PadCollator(-1))
    seen = {}
    for batch in loader:
        seen |= dict(zip(batch["__key__"], batch["x"].lengths.tolist(), strict=True))
    assert seen == {f"k{index}": length for index, length in enumerate(lengths)}


def test_a_declared_length_that_is_not_the_real_one_is_named_on_its_way(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write({"__key__": "a", "x": np.arange(3), "steps": np.int64(5)})
    loader = DataLoader(ShardDataset(tmp_path), collate_fn=PadCollator(length_field={"x": "steps"}))
    with pytest.raises(LengthError, match=r"field 'x': sample 0 \(key 'a'\) has 3 steps, its declared length is 5"):
        next(iter(loader))


def test_source_order_comes_back_after_a_whole_epoch(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(1, 20, 50).tolist()
    write(tmp_path, "blocks", lengths)
    data = ShardDataset(tmp_path)
    plan = LengthBucketBatchSampler(data.index, max_tokens=90).plan(0)
    collate = PadCollator(sort_by=False)
    outputs = [[int(row[0]) for row in collate(data.__getitems__(batch))["x"].sequences()] for batch in plan.batches]
    assert plan.unsort(outputs) == list(range(50))
    assert torch.tensor(plan.tokens).sum() == sum(lengths)
