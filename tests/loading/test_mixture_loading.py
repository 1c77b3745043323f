"""Mixtures through loaders: workers, saved states, positions, a spawned worker, and packed rows."""

import json
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import PadCollator, VarlenBatch, VarlenCollator
from samplers import LengthBucketBatchSampler, Mixture, PackingBatchSampler, SplitDataset

RNG = np.random.default_rng(7)
LENGTHS = {"web": RNG.integers(1, 30, 90), "books": RNG.integers(10, 60, 40), "code": RNG.integers(1, 9, 70)}
STARTS = {"web": 0, "books": 90, "code": 130}
WEIGHTS = {"web": 1, "books": 2, "code": 1}


class Source:
    """A map-style dataset whose samples hold their own index in the mixture, once for each step."""

    def __init__(self, name: str) -> None:
        self.lengths, self.first = LENGTHS[name], STARTS[name]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((int(self.lengths[index]),), self.first + index)}


def make(**options: Any) -> tuple[Any, Any]:
    """A sampler, and the data of its mixture."""
    mixture = Mixture(LENGTHS, weights=WEIGHTS, passes=dict.fromkeys(LENGTHS, 2), **options)
    sampler = LengthBucketBatchSampler(mixture, max_tokens=240)
    return sampler, mixture.concat({name: Source(name) for name in LENGTHS})


def rows_of(batch: Any) -> list[int]:
    return batch["x"].padded[:, 0].tolist()


def test_workers_read_the_planned_samples_of_every_source() -> None:
    sampler, data = make(within="sample")
    expected = [sorted(batch) for batch in sampler.plan(0).batches]
    collate = PadCollator.for_sampler(sampler)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=2)
    assert [sorted(rows_of(batch)) for batch in loader] == expected
    assert [sorted(rows_of(batch)) for batch in loader] == [sorted(batch) for batch in sampler.plan(1).batches]


def test_a_stateful_loader_resumes_a_mixture_in_the_middle() -> None:
    def loader() -> Any:
        sampler, data = make()
        return StatefulDataLoader(
            data, batch_sampler=sampler, collate_fn=PadCollator.for_sampler(sampler), num_workers=0
        )

    first = loader()
    batches = iter(first)
    taken = [rows_of(next(batches)) for _ in range(5)]
    saved, position = first.state_dict(), json.loads(json.dumps(first.batch_sampler.position(5)))
    rest = [rows_of(batch) for batch in batches]
    second, third = loader(), loader()
    second.load_state_dict(saved)
    third.batch_sampler.seek(position)
    assert [rows_of(batch) for batch in second] == rest
    assert [rows_of(batch) for batch in third] == rest
    assert len(taken) + len(rest) == len(first.batch_sampler)


def test_rows_of_several_sources_are_cut_as_planned() -> None:
    mixture = Mixture(LENGTHS, weights=WEIGHTS, within="sample", passes=dict.fromkeys(LENGTHS, 2))
    sampler = PackingBatchSampler(mixture, capacity=40, rows=2, overlong="split")
    data = SplitDataset(mixture.concat({name: Source(name) for name in LENGTHS}), sampler.pieces, fields=["x"])
    collate = VarlenCollator.for_sampler(sampler)
    plan = sampler.plan(0)
    mixed = 0
    for batch, rows in zip(DataLoader(data, batch_sampler=sampler, collate_fn=collate), plan.rows, strict=True):
        values: VarlenBatch = batch["x"]
        assert values.documents_per_row.tolist() == [len(row) for row in rows]
        owners = {int(each) for each in values.values[values.mask].unique()}
        mixed += len({sum(each >= start for start in STARTS.values()) for each in owners}) > 1
    # A source that ends its pass keeps rows of its own.
    assert mixed > len(sampler) // 3
    # Every step of every sample comes as often as its source was read.
    steps = sum(len(row) for rows in plan.rows for row in rows)
    assert steps == plan.report().documents
