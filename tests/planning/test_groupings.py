"""A stream's epochs group its shards into windows of their own, and have as many batches each."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from indexed import Index

from samplers.planning.options import Options
from samplers.planning.schedule import make_schedule
from samplers.planning.sorting import sort_lengths
from samplers.planning.tables.buckets import count_batches
from samplers.planning.tables.window_table import Groupings, WindowTable, make_window_table

SHARDS = 10


def make_table(samples: int = 8_000, shards: int = SHARDS, **options: Any) -> WindowTable:
    lengths = np.random.default_rng(0).integers(1, 200, samples)
    return make_window_table(Index(lengths), np.arange(shards + 1) * samples // shards, Options(**options))


def pairs_in(windows: Any) -> set[tuple[int, int]]:
    return {pair for window in windows for pair in combinations(sorted(window), 2)}


@pytest.mark.parametrize(
    "budget", [{"max_tokens": 3_000}, {"batch_size": 32}, {"max_tokens": 3_000, "count_tokens": "real"}]
)
def test_sources_stored_shard_by_shard_meet_as_often_as_with_random_groups(budget: dict[str, Any]) -> None:
    met, expected = [], []
    rng = np.random.default_rng(0)
    for seed in range(20):
        table = make_table(window=1_600, seed=seed, **budget)
        met.append(len(set.union(*(pairs_in(table.for_epoch(epoch, 1).windows) for epoch in range(10)))))
        groups = [np.array_split(rng.permutation(SHARDS), SHARDS // 2) for _ in range(10)]
        expected.append(len(set.union(*(pairs_in(group) for group in groups))))
    assert np.mean(met) >= 0.95 * np.mean(expected)


OPTIONS = st.fixed_dictionaries(
    {"window": st.integers(100, 700), "seed": st.integers(0, 2**64 - 1)},
    optional={
        "max_tokens": st.integers(400, 4_000),
        "batch_size": st.integers(2, 40),
        "widths": st.sampled_from([16, (50, 200)]),
        "drop_last": st.booleans(),
        "shuffle": st.just(False),
    },
).filter(lambda options: "max_tokens" in options or "batch_size" in options)


@given(OPTIONS, st.integers(1, 3), st.integers(1, 2))
def test_every_epoch_has_every_sample_once_in_as_many_batches(
    options: dict[str, Any], replicas: int, interleave: int
) -> None:
    # The last batch may have to be split among all replicas.
    assume(replicas <= options.get("batch_size", 40) and (replicas == 1 or options.get("max_tokens", 4_000) >= 600))
    lengths = np.random.default_rng(1).integers(1, 200, 1_000)
    starts = np.array([0, 90, 200, 230, 500, 640, 700, 900, 1_000])
    first = make_window_table(Index(lengths), starts, Options(**options), interleave)
    for epoch in range(4):
        table = first.for_epoch(epoch, 1)
        assert len(table) == len(first)
        schedule = make_schedule(first, epoch, replicas)
        samples = [
            sample for slots in schedule.slot_ranges() for batch in schedule.index_lists(slots) for sample in batch
        ]
        assert len(samples) == len(set(samples))
        assert options.get("drop_last") or len(samples) == len(lengths)


def test_the_closed_list_of_shapes_holds_for_every_grouping() -> None:
    table = make_table(window=1_600, max_tokens=3_000, widths=16)
    shapes = table.shapes
    for epoch in range(20):
        present = table.for_epoch(epoch, 1)
        sizes = present.measure_batches(*present.batch_samples(np.arange(len(table)), key=epoch))
        for rows, width in set(zip(sizes.rows.tolist(), sizes.widths[:, 0].tolist(), strict=True)):
            assert any(rows <= most and width <= widest for most, (widest,) in shapes)


def test_which_windows_an_epoch_has_does_not_depend_on_those_before() -> None:
    first, second = make_table(window=1_600, max_tokens=3_000), make_table(window=1_600, max_tokens=3_000)
    for epoch in (9, 2, 5, 9, 0):
        first.for_epoch(epoch, 1)
    assert [first.for_epoch(e, 1).windows for e in (7, 3)] == [second.for_epoch(e, 1).windows for e in (7, 3)]
    assert len({first.for_epoch(epoch, 1).windows for epoch in range(10)}) > 7


@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=12),
    st.integers(1, 60),
    st.integers(1, 300),
    st.fixed_dictionaries(
        {},
        optional={
            "drop_last": st.booleans(),
            "shuffle": st.booleans(),
            "widths": st.sampled_from([16, (50, 200)]),
            "max_length": st.integers(1, 250),
            "min_length": st.integers(0, 150),
            "overlong": st.sampled_from(["drop", "alone"]),
        },
    ),
    st.integers(1, 3),
)
def test_batches_of_a_fixed_size_are_counted_without_a_plan(
    sizes: list[int], rows: int, window: int, options: dict[str, Any], fields: int
) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, (sum(sizes), fields))
    inner = Options(batch_size=rows, **options)
    assume(sum(sizes) and (lengths >= inner.min_length).all(1).any())
    sorted_lengths = sort_lengths(lengths, inner)
    starts = np.cumsum([0, *sizes])
    shard_of = np.searchsorted(starts, sorted_lengths.order, side="right") - 1
    groupings = Groupings(sorted_lengths, shard_of, inner, window, 1)
    for grouping in groupings._group(range(4 if inner.shuffle else 1), attempt=0):
        assert grouping.batches == sum(count_batches(each.buckets) for each in grouping.windows())
        assert not grouping.batches or grouping.batches == len(groupings._join(grouping.windows()))
