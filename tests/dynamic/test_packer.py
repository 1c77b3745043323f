"""Packing of streams: full rows, every sample once, bounded waiting, and the same rows after any restart."""

import json
import logging
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_oracles import cut_list
from torchdata import nodes

from collate import VarlenCollator
from collate.errors import LengthError
from samplers import LengthBucketNode, PackingNode, bucket_by_length, pack_by_length
from samplers.dynamic.bucketer import Bucketer
from samplers.dynamic.packer import Packer
from samplers.planning.budget import Budget
from samplers.testing import check_node

LENGTHS = st.lists(st.integers(0, 40), max_size=120)
OPTIONS = st.fixed_dictionaries(
    {
        "buffer_size": st.integers(1, 30),
        "rows": st.integers(1, 3),
        "multiple": st.sampled_from([1, 1, 8]),
        "max_documents": st.none() | st.integers(1, 6),
        "max_wait": st.none() | st.integers(1, 40),
    }
)


def sizes_of(lengths: list[int], multiple: int) -> list[int]:
    """The steps that samples take."""
    return [-(-length // multiple) * multiple for length in lengths]


@given(LENGTHS, OPTIONS)
def test_every_sample_comes_once_in_rows_that_hold_it(lengths: list[int], options: Any) -> None:
    batches = list(pack_by_length(lengths.__getitem__, capacity=48, **options)(range(len(lengths))))
    assert sorted(sample for batch in batches for sample in batch) == list(range(len(lengths)))
    sizes = sizes_of(lengths, options["multiple"])
    for batch in batches:
        rows = cut_list([sizes[sample] for sample in batch], 48, options["max_documents"])
        assert 1 <= len(rows) <= options["rows"]


@given(LENGTHS, OPTIONS)
def test_no_sample_waits_longer_than_the_limit_in_a_buffer_of_its_size(lengths: list[int], options: Any) -> None:
    packer: Packer[int] = Packer(48, **options)
    waits = options["max_wait"] or 3 * options["buffer_size"]
    for sample, length in enumerate(lengths):
        packer.push(length, sample)
        while packer.is_due:
            assert packer.arrivals - packer.oldest <= waits
            packer.pop()
        assert len(packer) < options["buffer_size"] or len(packer) == 0
        assert packer.arrivals - packer.oldest < waits


@given(LENGTHS, OPTIONS, st.data())
def test_the_rows_after_a_restart_are_those_without_one(lengths: list[int], options: Any, data: Any) -> None:
    def run(packer: Packer[int], first: int) -> list[list[int]]:
        stream = ((lengths[sample], sample) for sample in range(first, len(lengths)))
        return list(packer.batches_of(stream))

    whole = run(Packer(48, **options), 0)
    packer: Packer[int] = Packer(48, **options)
    stop = data.draw(st.integers(0, len(lengths)))
    batches = []
    for sample in range(stop):
        packer.push(lengths[sample], sample)
        while packer.is_due:
            batches.append(packer.pop())
    state = json.loads(json.dumps(packer.state_dict()))
    assert len(json.dumps(state)) < 200
    resumed: Packer[int] = Packer(48, **options)
    resumed.load_state_dict(state)
    assert batches + run(resumed, state["oldest"]) == whole


def test_a_collator_cuts_batches_into_full_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 200, 2_000)
    stage = pack_by_length(len, capacity=1_024, rows=4, max_documents=30, buffer_size=300)
    collate = VarlenCollator(arrange="given", capacity=1_024, max_documents=30)
    batches = [collate(batch) for batch in pickle.loads(pickle.dumps(stage))(np.zeros(n, np.int64) for n in lengths)]
    assert {len(batch.documents_per_row) for batch in batches[:-1]} == {4}
    rows = sum(len(batch.documents_per_row) for batch in batches)
    assert rows * 1_024 - lengths.sum() <= 0.01 * lengths.sum()


@pytest.mark.parametrize(("median", "sigma", "longest"), [(450, 0.6, 3_000), (150, 0.9, 4_000)])
def test_long_streams_waste_little_and_nobody_waits_for_three_buffers(median: int, sigma: float, longest: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(median), sigma, 20_000)).clip(8, longest).astype(int).tolist()
    packer: Packer[int] = Packer(4_096, buffer_size=2_000, max_wait=100_000)
    used, rows, waits = 0, 0, []
    for sample, length in enumerate(lengths):
        packer.push(length, sample)
        while packer.is_due:
            row = packer.pop()
            used, rows = used + sum(lengths[each] for each in row), rows + 1
            waits.append(packer.arrivals - min(row))
    assert 1 - used / (rows * 4_096) <= 0.002
    assert max(waits) <= 2.5 * 2_000


@pytest.mark.parametrize("rows", [1, 3])
def test_the_node_of_packs_keeps_the_contract(rows: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 60).tolist()

    def make() -> nodes.BaseNode[Any]:
        source = nodes.IterableWrapper([{"x": np.zeros(length)} for length in lengths])
        return PackingNode(source, "x", capacity=64, rows=rows, buffer_size=12)

    assert check_node(make, every=3) >= 60 * 15 // (64 * rows)


def test_short_samples_are_left_out_and_long_ones_count_as_cut() -> None:
    lengths = [1, 9, 3, 30, 2, 8]
    node = PackingNode(nodes.IterableWrapper(lengths), int, capacity=10, min_length=2, max_length=10, buffer_size=4)
    node.reset()
    batches = _all(node)
    assert sorted(sample for batch in batches for sample in batch) == [2, 3, 8, 9, 30]
    assert node.too_short == 1
    state = node.state_dict()
    assert state["bucketer"]["too_short"] == 1
    for batch in batches:
        assert sum(min(sample, 10) for sample in batch) <= 10


def _all(node: Any) -> list[Any]:
    """All batches of a node."""
    batches = []
    while True:
        try:
            batches.append(node.next())
        except StopIteration:
            return batches


def test_a_sample_longer_than_a_row_is_refused_dropped_or_skipped(caplog: pytest.LogCaptureFixture) -> None:
    stage = pack_by_length(int, capacity=8)
    with pytest.raises(LengthError, match="at arrival 1 has 9 steps, more than a row of capacity 8"):
        list(stage([3, 9, 2]))
    with caplog.at_level(logging.WARNING):
        assert list(pack_by_length(int, capacity=8, overlong="drop")([3, 9, 2])) == [[3, 2]]
    assert "of 3 samples 1 over the budget were dropped" in caplog.text
    skipping = pack_by_length(int, capacity=8, handler=lambda error: True)
    assert list(skipping([3, 9, 2])) == [[3, 2]]
    assert sum(sum(reasons.values()) for reasons in skipping.skipped.values()) == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"capacity": 0}, ValueError, "capacity must be at least 1"),
        ({"capacity": 10, "multiple": 4}, ValueError, "multiple of multiple=4, got 10"),
        ({"capacity": 10, "overlong": "alone"}, ValueError, "overlong must be 'error' or 'drop', got 'alone'"),
        ({"capacity": 10, "rows": 0}, ValueError, "rows must be at least 1"),
        ({"capacity": 10, "max_documents": 1.5}, TypeError, "max_documents must be an int"),
        ({"capacity": 10, "buffer_size": 0}, ValueError, "buffer_size must be at least 1"),
        ({"capacity": 10, "min_length": -1}, ValueError, "min_length must be at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        pack_by_length(len, **options)


# --- what the stage and node of buckets have in common with the planner


@given(LENGTHS, st.integers(40, 200), st.integers(1, 30))
def test_a_budget_of_real_tokens_limits_their_sum(lengths: list[int], budget: int, size: int) -> None:
    stage = bucket_by_length(lengths.__getitem__, max_tokens=budget, count_tokens="real", buffer_size=size)
    batches = list(stage(range(len(lengths))))
    assert sorted(sample for batch in batches for sample in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[sample] for sample in batch) <= budget


def test_real_tokens_fill_batches_further_than_padded_ones() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 3_000).tolist()
    counts = [
        len(list(bucket_by_length(int, max_tokens=1_000, count_tokens=count, buffer_size=100)(lengths)))
        for count in ("padded", "real")
    ]
    assert counts[1] < counts[0]


@given(LENGTHS, st.sampled_from([8, (16, 48), 1]), st.integers(1, 30))
def test_widths_are_what_the_budget_counts(lengths: list[int], widths: Any, size: int) -> None:
    stage = bucket_by_length(lengths.__getitem__, max_tokens=96, widths=widths, buffer_size=size)
    batches = list(stage(range(len(lengths))))
    assert sorted(sample for batch in batches for sample in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(1, max(lengths[sample] for sample in batch))
        width = -(-longest // widths) * widths if isinstance(widths, int) else min(w for w in widths if w >= longest)
        assert len(batch) * width <= 96


@given(LENGTHS, st.integers(0, 20), st.integers(10, 30), st.data())
def test_limits_of_length_and_real_tokens_survive_a_restart(
    lengths: list[int], least: int, most: int, data: Any
) -> None:
    options: dict[str, Any] = {"buffer_size": 9, "min_length": least, "max_length": most, "widths": 4}
    budget = Budget(max_tokens=90, count_tokens=data.draw(st.sampled_from(["padded", "real"])))

    def stream(first: int) -> Any:
        return ((lengths[sample], sample) for sample in range(first, len(lengths)))

    whole = list(Bucketer[int](budget, **options).batches_of(stream(0)))
    assert sorted(each for batch in whole for each in batch) == [i for i, n in enumerate(lengths) if n >= least]
    bucketer: Bucketer[int] = Bucketer(budget, **options)
    batches = []
    for sample in range(data.draw(st.integers(0, len(lengths)))):
        bucketer.push(lengths[sample], sample)
        while bucketer.is_due:
            batches.append(bucketer.pop())
    state = bucketer.state_dict()
    resumed: Bucketer[int] = Bucketer(budget, **options)
    resumed.load_state_dict(state)
    assert batches + list(resumed.batches_of(stream(state["oldest"]))) == whole
    assert resumed.too_short == sum(length < least for length in lengths)


def test_the_node_of_buckets_takes_the_options_of_the_planner() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 60).tolist()
    options: dict[str, Any] = {"max_tokens": 100, "count_tokens": "real", "min_length": 5, "max_length": 30}

    def make() -> nodes.BaseNode[Any]:
        return LengthBucketNode(nodes.IterableWrapper(lengths), int, widths=8, buffer_size=12, **options)

    assert check_node(make, every=3) > 8


def test_the_oldest_waiting_sample_starts_every_row() -> None:
    packer: Packer[int] = Packer(10, buffer_size=3)
    emitted = []
    for sample, length in enumerate([6, 6, 6, 3, 3, 3, 1, 1, 1, 2]):
        packer.push(length, sample)
        while packer.is_due:
            emitted.append(packer.pop())
    assert all(first[0] < second[0] for first, second in pairwise(emitted))
