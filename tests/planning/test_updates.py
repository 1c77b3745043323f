"""Optimizer steps: borders against a slow search, sums by hand, the same on all ranks, also after a resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import write
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from collate import PadCollator
from samplers import LengthBucketBatchSampler, PackingBatchSampler, ShardStream, plan_epoch
from samplers.planning.schedules.updates import ends_near

LENGTHS = np.random.default_rng(0).integers(1, 60, 500)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 300))
def test_each_update_ends_at_the_nearest_step(tokens: list[int], target: int) -> None:
    ends, first = ends_near(np.array(tokens), target).tolist(), 0
    for end in ends[:-1]:
        sums = {stop: abs(sum(tokens[first:stop]) - target) for stop in range(first + 1, len(tokens) + 1)}
        assert sums[end] == min(sums.values())
        assert sums[end] <= max(max(tokens) / 2, tokens[first] - target)
        first = end
    assert ends[-1] == len(tokens)
    assert first < len(tokens)


def by_hand(steps: list[list[list[int]]], updates: Any, labels: Any = None) -> list[tuple[int, int, int]]:
    """Batches, tokens and samples of each update, from the batches `[steps][W]` of samples."""
    found, first = [], 0
    for end in updates.ends.tolist():
        samples = [sample for step in steps[first:end] for batch in step for sample in batch]
        found.append(
            (end - first, sum(int((LENGTHS if labels is None else labels)[sample]) for sample in samples), len(samples))
        )
        first = end
    return found


def figures(updates: Any) -> list[tuple[int, int, int]]:
    return list(zip(updates.batches.tolist(), updates.tokens.tolist(), updates.documents.tolist(), strict=True))


@given(
    st.sampled_from([{"accumulate": 1}, {"accumulate": 3}, {"step_tokens": 900}, {"step_tokens": 10**9}]),
    st.integers(1, 4),
)
def test_figures_are_those_of_the_batches(options: dict[str, int], replicas: int) -> None:
    plan = plan_epoch(LENGTHS, max_tokens=200, num_replicas=replicas)
    steps = [plan.batches[first : first + replicas] for first in range(0, len(plan.batches), replicas)]
    updates = plan.updates(**options)
    assert figures(updates) == by_hand(steps, updates)
    assert sum(updates.tokens) == LENGTHS.sum()
    assert updates.rows.tolist() == updates.documents.tolist()
    labels = np.random.default_rng(1).integers(0, 9, 500)
    assert figures(plan.updates(labels=labels, accumulate=2)) == by_hand(
        steps, plan.updates(labels=labels, accumulate=2), labels
    )
    shifted = plan.updates(labels=lambda lengths: lengths - 1, **options)
    assert sum(shifted.tokens) == LENGTHS.sum() - 500
    weights = np.random.default_rng(2).random(500)
    assert updates.total(weights).sum() == pytest.approx(weights.sum())


def test_from_fifty_batches_an_update_is_within_one_percent() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 60_000)
    updates = plan_epoch(lengths, max_tokens=200, num_replicas=2).updates(step_tokens=50 * 2 * 200)
    assert len(updates) > 50
    assert np.abs(updates.tokens[:-1] / (50 * 2 * 200) - 1).max() <= 0.01


def pass_of(sampler: Any, updates: Any, used: int | None = None) -> list[Any]:
    """What the loop sees: each batch, with its update."""
    seen = []
    for number, batch in enumerate(sampler):
        seen.append((batch, updates.at(number)))
        if number + 1 == used:
            break
    return seen


@pytest.mark.parametrize("kind", ["buckets", "packs"])
def test_a_loop_asks_for_each_batch_in_every_epoch_and_on_every_rank(kind: str) -> None:
    def make(rank: int) -> Any:
        if kind == "buckets":
            return LengthBucketBatchSampler(LENGTHS, max_tokens=200, num_replicas=3, rank=rank)
        return PackingBatchSampler(LENGTHS, capacity=64, rows=2, num_replicas=3, rank=rank)

    samplers = [make(rank) for rank in range(3)]
    updates = [sampler.updates(step_tokens=2000) for sampler in samplers]
    for epoch in range(3):
        passes = [pass_of(sampler, update) for sampler, update in zip(samplers, updates, strict=True)]
        told = [[update for _, update in seen] for seen in passes]
        assert told[0] == told[1] == told[2]
        plan = samplers[0].plan(epoch).updates(step_tokens=2000)
        assert [number + 1 for number, update in enumerate(told[0]) if update.is_last] == plan.ends.tolist()
        tokens = [0] * len(plan)
        for seen in passes:
            for batch, update in seen:
                tokens[update.number] += int(LENGTHS[batch].sum())
        assert tokens == plan.tokens.tolist() == [update.tokens for update in told[0] if update.is_last]
        rows = samplers[0].plan(epoch).rows if kind == "packs" else samplers[0].plan(epoch).batches
        assert sum(plan.rows) == sum(map(len, rows))
        assert updates[0].at(0).token_scale == 3 / tokens[0]
        assert updates[0].at(0).document_scale == 3 / plan.documents[0]


@pytest.mark.parametrize("then", [1, 2, 5])
def test_a_resumed_loop_has_the_remaining_updates(then: int) -> None:
    """On the same ranks they are those of the whole pass; on others their tokens are counted again."""

    def make(replicas: int) -> Any:
        return LengthBucketBatchSampler(LENGTHS, max_tokens=200, num_replicas=replicas, rank=0)

    sampler = make(2)
    updates = sampler.updates(step_tokens=1500)
    whole = pass_of(sampler, updates)
    border = next(number + 1 for number, (_, update) in enumerate(whole) if update.is_last and update.number == 2)
    sampler.set_epoch(0)
    pass_of(sampler, updates, border)
    position = sampler.position(border)
    again = make(then)
    again.seek(position)
    counts = again.updates(step_tokens=1500)
    rest = pass_of(again, counts)
    if then == 2:
        assert [(batch, update.tokens) for batch, update in rest] == [
            (batch, update.tokens) for batch, update in whole[border:]
        ]
    before = sum(update.tokens for _, update in whole if update.is_last and update.number <= 2)
    assert sum(update.tokens for _, update in rest if update.is_last) == LENGTHS.sum() - before
    # The epoch after it begins with whole updates again.
    assert pass_of(again, counts)[0][1].number == 0
    assert counts.present.tokens.sum() == LENGTHS.sum()


def test_streams_with_workers_tell_the_same_as_their_plan(tmp_path: Path) -> None:
    samples = [{"__key__": f"{number:03}", "x": np.arange(length)} for number, length in enumerate(LENGTHS[:200])]
    write(tmp_path, samples)
    stream = ShardStream(tmp_path, max_tokens=200, collate_fn=PadCollator(), num_replicas=1, rank=0)
    updates = stream.updates(accumulate=3)
    for epoch in range(2):
        tokens = [0] * len(stream.plan(epoch).updates(accumulate=3))
        for number, batch in enumerate(DataLoader(stream, batch_size=None, num_workers=2)):
            tokens[updates.at(number).number] += batch["x"].num_tokens
        assert tokens == stream.plan(epoch).updates(accumulate=3).tokens.tolist()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, ValueError, "accumulate or step_tokens must be given, got neither"),
        ({"accumulate": 2, "step_tokens": 5}, ValueError, "got both"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1"),
        ({"step_tokens": 1.5}, TypeError, "step_tokens must be an int"),
        (
            {"accumulate": 1, "labels": [1, 2]},
            ValueError,
            r"labels must be one number for each of 500 samples, got \[2\]",
        ),
        ({"accumulate": 1, "labels": [-1] * 500}, ValueError, "labels must be 0 or more, got -1 for sample 0"),
        ({"accumulate": 1, "labels": [0.5] * 500}, ValueError, "labels must be integers"),
        ({"accumulate": 1, "labels": lambda lengths: lengths - 5}, ValueError, "got -[1-4] for a length of"),
        ({"accumulate": 1, "labels": lambda lengths: 7}, ValueError, "one number for each of"),
    ],
)
def test_what_cannot_be_an_update_is_refused(options: dict[str, Any], kind: Any, message: str) -> None:
    sampler = LengthBucketBatchSampler(LENGTHS, max_tokens=200)
    for place in (sampler, sampler.plan(0)):
        with pytest.raises(kind, match=message):
            place.updates(**options)


def test_batches_and_numbers_that_are_not_there_are_refused() -> None:
    sampler = LengthBucketBatchSampler(LENGTHS, max_tokens=200)
    updates = sampler.updates(accumulate=2)
    with pytest.raises(ValueError, match=f"batch must be below {len(sampler)}, .* got {len(sampler)}"):
        updates.at(len(sampler))
    with pytest.raises(TypeError, match="batch must be an int"):
        updates.at("1")
    with pytest.raises(ValueError, match="values must be finite, got nan for sample 3"):
        updates.present.total([1.0] * 3 + [float("nan")] * 497)
    assert repr(updates).startswith("LoopUpdates(of Updates(")


def test_labels_of_split_samples_are_those_of_their_pieces() -> None:
    """It was red: the error spoke of more samples than there are, and not of pieces."""
    sampler = PackingBatchSampler([50, 10], capacity=20, overlong="split")
    with pytest.raises(ValueError, match=r"each of 5 samples, with the 3 pieces of split ones after them, got \[2\]"):
        sampler.updates(accumulate=1, labels=[49, 9])
    tokens = sampler.updates(accumulate=1, labels=[0, 9, 19, 19, 9]).present.tokens
    assert tokens.sum() == sampler.updates(accumulate=1, labels=lambda lengths: lengths - 1).present.tokens.sum() == 56
