"""Mixtures: exact shares, strict passes, even steps, whatever replicas take them, and whatever batches are."""

import json
import pickle
from collections import Counter
from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mixture_oracles import Case, cases, check_passes, measure_errors

# An example plans several epochs on several replicas.
EXAMPLES = max(5, settings().max_examples // 12)


def shares_of(case: Case) -> list[float]:
    total = sum(case.weights.values())
    return [weight / total for weight in case.weights.values()]


def make(case: Case, num_replicas: int = 1) -> Any:
    try:
        return case.sampler(num_replicas)
    except ValueError as error:
        # Few rows in all, and many replicas.
        assume("last step" not in str(error) and "a batch for each" not in str(error))
        raise


@settings(max_examples=EXAMPLES)
@given(cases(units=("tokens", "samples", "padded")), st.integers(1, 4))
def test_every_prefix_holds_its_shares_and_no_pass_is_broken(case: Case, num_replicas: int) -> None:
    # Red with turns by largest weight, with random turns, and where a pass began before the one before had ended.
    assume(not (case.packs and case.mixture_options["unit"] == "padded"))
    sampler = make(case, num_replicas)
    seen: Counter[int] = Counter()
    whole: list[list[int]] = []
    for epoch in range(3):
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert len(batches) % num_replicas == 0
        check_passes(case, batches, seen)
        whole += batches
        assert sampler.epoch == epoch + 1
    errors, largest = measure_errors(case, whole, shares_of(case))
    within = case.mixture_options["within"]
    assert np.abs(errors).max() <= {"batch": 1, "sample": 2}[within] * num_replicas * largest + 1e-6
    if within == "batch":
        assert all(len({case.source_of(index) for index in batch}) == 1 for batch in whole)


@settings(max_examples=EXAMPLES)
@given(cases(), st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_other_replicas_resume_the_same_samples_at_any_position(
    case: Case, first: int, others: list[int], data: st.DataObject
) -> None:
    sampler = make(case, first)
    for _ in range(data.draw(st.integers(0, 2))):
        list(sampler)
    whole = list(sampler)
    expected = Counter(index for batch in whole for index in batch)
    epoch = sampler.epoch - 1
    steps = data.draw(st.integers(0, len(whole) // first))
    position = case_position(case, first, epoch, steps)
    taken = whole[: steps * first]
    for num_replicas in others:
        try:
            ranks = [case.sampler(num_replicas, rank) for rank in range(num_replicas)]
            for rank in ranks:
                rank.seek(json.loads(json.dumps(position)))
        except ValueError as error:
            # An epoch of one batch, or of few rows, is too short for so many replicas.
            assume("last step" not in str(error) and "a batch for each" not in str(error))
            raise
        steps = data.draw(st.integers(0, ranks[0].remaining))
        lists = [[batch for batch, _ in zip(rank, range(steps), strict=False)] for rank in ranks]
        taken += [batch for step in zip(*lists, strict=True) for batch in step]
        position = ranks[0].position(steps)
    last = case.sampler(1, 0)
    last.seek(position)
    taken += list(last)
    assert Counter(index for batch in taken for index in batch) == expected
    # The samples of the next epoch do not depend on who took this one.
    assert Counter(index for batch in last for index in batch) == Counter(index for batch in sampler for index in batch)


def case_position(case: Case, num_replicas: int, epoch: int, steps: int) -> dict[str, int | str]:
    sampler = case.sampler(num_replicas, 0)
    sampler.set_epoch(epoch)
    return sampler.position(steps)


@settings(max_examples=EXAMPLES)
@given(cases(), st.integers(1, 3), st.data())
def test_a_change_of_weights_neither_loses_nor_repeats_a_sample(
    case: Case, num_replicas: int, data: st.DataObject
) -> None:
    # Red where the part of a pass that was begun was taken from its start again.
    case.mixture_options["within"] = "batch"
    sampler = make(case, num_replicas)
    names = list(case.sources)
    taken: list[list[int]] = []
    current = case
    for change in range(3):
        batches = list(sampler)
        steps = data.draw(st.integers(0, len(batches) // num_replicas))
        start = sampler.epoch - 1
        taken += batches[: steps * num_replicas]
        if change == 2:
            break
        weights = {name: float(data.draw(st.integers(1, 9))) for name in names}
        current = current._replace(weights=weights)
        position = sampler.position(steps)
        try:
            sampler.seek(position, mixture=current.mixture())
        except ValueError as error:
            # Both are documented: neither rows nor batches for every replica.
            assume("last step" not in str(error) and "a batch for each" not in str(error))
            raise
        assert sampler.epoch == start
        assert sampler.remaining == len(sampler)
        given = data.draw(st.integers(0, min(3, len(sampler) // num_replicas)))
        later = sampler.position(given)
        # A new process has the new mixture alone.
        fresh = pickle.loads(pickle.dumps(current.sampler(num_replicas)))
        fresh.seek(json.loads(json.dumps(later)))
        assert list(fresh) == list(sampler)[given * num_replicas :]
        sampler.seek(later | {"batches": 0})
    check_passes(case, taken)
