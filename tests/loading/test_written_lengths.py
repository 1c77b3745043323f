"""What a caller writes to lengths or options after planning changes no plan: epochs are computed when they are due."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from corpora import tokens, write

from collate import VarlenCollator
from samplers import LengthBucketBatchSampler, PackingBatchSampler, ShardStream, plan_epoch

Array = npt.NDArray[np.int64]

SAMPLERS: dict[str, Callable[[Any], Any]] = {
    "buckets": lambda lengths: LengthBucketBatchSampler(lengths, max_tokens=600),
    "packs": lambda lengths: PackingBatchSampler(lengths, capacity=200 if lengths.ndim == 1 else (200, 200)),
}
KINDS: dict[str, Callable[[Array], Any]] = {
    "array": np.array,
    "tensor": torch.tensor,
    "uint16": lambda lengths: lengths.astype(np.uint16),
    "two fields": lambda lengths: np.stack([lengths, lengths], 1),
    "view": lambda lengths: np.stack([lengths, lengths], 1)[:, 0],
}


@pytest.mark.parametrize("samples", [300, 30_000])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_writes_to_the_lengths_after_planning_change_nothing(
    make: Callable[[Any], Any], kind: Callable[[Array], Any], samples: int
) -> None:
    """Red before: a position had the fingerprint of other lengths, and the epochs of a larger corpus changed."""
    drawn = np.random.default_rng(0).integers(1, 60, samples)
    lengths = kind(drawn)
    expected, sampler = make(kind(drawn)), make(lengths)
    lengths[:] = 1
    assert sampler.position(1) == expected.position(1)
    assert list(sampler) == list(expected)


def test_writes_to_the_lengths_of_a_plan_change_nothing() -> None:
    drawn = np.random.default_rng(0).integers(1, 60, 30_000)
    lengths = drawn.copy()
    plan, expected = plan_epoch(lengths, max_tokens=600), plan_epoch(drawn, max_tokens=600)
    lengths[:] = 1
    assert list(plan.batches) == list(expected.batches)
    assert plan.report() == expected.report()


def test_a_memory_map_and_a_read_only_array_are_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "lengths.npy", np.arange(1, 50))
    fixed = np.arange(1, 50)
    fixed.flags.writeable = False
    for lengths in (np.load(tmp_path / "lengths.npy", mmap_mode="r"), fixed):
        sampler = LengthBucketBatchSampler(lengths, max_tokens=100)
        assert np.shares_memory(sampler._table.sorted_lengths.lengths, lengths)


INDICES: dict[str, Callable[[Array], Any]] = {
    "array": np.array,
    "tensor": torch.tensor,
    "list": np.ndarray.tolist,
}


@pytest.mark.parametrize("kind", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("budget", [{"max_tokens": 60}, {"capacity": 60}], ids=SAMPLERS)
def test_writes_to_the_indices_after_planning_change_nothing(
    kind: Callable[[Array], Any], budget: dict[str, int], tmp_path: Path
) -> None:
    """Red before: packs had no position any more, and a pickled stream had the batches of the other samples."""
    lengths = np.random.default_rng(0).integers(1, 60, 80)
    write(tmp_path, tokens(lengths.tolist()), max_samples=30, block_size=16)
    chosen = np.arange(0, 80, 2)
    sampler_type: Any = PackingBatchSampler if "capacity" in budget else LengthBucketBatchSampler
    makers: list[Callable[[Any], Any]] = [
        lambda indices: sampler_type(lengths, indices=indices, **budget),
        lambda indices: ShardStream(tmp_path, collate_fn=list, indices=indices, **budget),
    ]
    for make in makers:
        given = kind(chosen)
        expected, changed = make(kind(chosen)), make(given)
        for entry in range(len(given)):
            given[entry] = entry
        assert changed.position(1) == expected.position(1)
        again = pickle.loads(pickle.dumps(changed))
        assert list(again.plan(3).batches) == list(expected.plan(3).batches)


def test_a_write_to_the_capacity_after_planning_changes_nothing() -> None:
    """Red before: the collator for the sampler had rows of the other capacity."""
    capacity = [60]
    sampler = PackingBatchSampler([20, 30, 40], capacity=capacity)
    capacity[0] = 40
    assert sampler.capacity == (60,)
    assert VarlenCollator.for_sampler(sampler).capacity == 60


def test_a_capacity_of_a_numpy_integer_makes_a_collator() -> None:
    """Red before: its collator was a TypeError about an object that is not iterable."""
    sampler = PackingBatchSampler([20, 30, 40], capacity=np.int64(60))
    assert VarlenCollator.for_sampler(sampler).capacity == 60
