"""What a caller writes to lengths after planning changes no plan: a sampler computes epochs when they are needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from samplers import LengthBucketBatchSampler, PackingBatchSampler, plan_epoch

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
