"""The order of rows: even steps, rows of like cost side by side, and the last rows shared whatever the replicas."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pack_oracles import corpora

from samplers.planning.packs.documents import RowLimits
from samplers.planning.packs.pack_table import PackTable
from samplers.planning.packs.row_order import RowOrder, share_rows

COSTS = [None, lambda lengths: lengths.astype(np.float64) ** 2]


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 3))


@given(corpora(), SIZES, st.booleans(), st.sampled_from(COSTS), st.booleans())
def test_positions_reach_every_row_once(
    case: tuple[npt.NDArray[Any], int],
    sizes: tuple[int, ...],
    drop_last: bool,
    cost: Callable[..., Any] | None,
    shuffle: bool,
) -> None:
    (lengths, capacity), (replicas, batch_rows) = case, sizes
    table = PackTable.build(lengths, capacity=capacity, cost=cost, shuffle=shuffle)
    order = RowOrder(table, 2, replicas, batch_rows, drop_last)
    row_ids = order.row_ids(np.arange(len(table)))
    assert sorted(row_ids.tolist()) == list(range(len(table)))
    at = np.arange(len(table))[:: max(1, len(table) // 5)]
    assert order.row_ids(at).tolist() == row_ids[at].tolist()
    samples, documents = order.samples(at)
    # Where the last rows have too few documents, the epoch has other recipes.
    assert samples.tolist() == table.rows(2, row_ids[at], order.last)[0].tolist()
    assert len(documents) == len(at)


@given(corpora(), st.integers(2, 9), st.sampled_from(COSTS))
def test_the_last_rows_are_those_of_most_documents(
    case: tuple[npt.NDArray[Any], int], replicas: int, cost: Callable[..., Any] | None
) -> None:
    lengths, capacity = case
    table = PackTable.build(lengths, capacity=capacity, cost=cost)
    order = RowOrder(table, 0, replicas)
    _, documents = order.samples(np.arange(len(table)))
    whole = order.steps * replicas
    if 0 < whole < len(table):
        assert documents[whole:].min() >= documents[:whole].max()


@given(corpora(), st.integers(2, 9))
def test_a_step_has_neighbours_in_cost(case: tuple[npt.NDArray[Any], int], replicas: int) -> None:
    lengths, capacity = case
    table = PackTable.build(lengths, capacity=capacity, cost=COSTS[1])
    order = RowOrder(table, 1, replicas)
    steps = order.row_ids(np.arange(order.steps * replicas)).reshape(-1, replicas)
    last = set(order.row_ids(np.arange(order.steps * replicas, len(table))).tolist())
    for step in steps.tolist():
        between = set(range(min(step), max(step) + 1)) - set(step)
        assert between <= last


def test_the_dropped_rows_are_others_in_each_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 600)
    for cost in COSTS:
        table = PackTable.build(lengths, capacity=100, cost=cost)
        replicas = next(w for w in range(5, 20) if len(table) % w > 1)
        dropped = [
            tuple(
                RowOrder(table, epoch, replicas, drop_last=True).row_ids(np.arange(len(table)))[
                    -(len(table) % replicas) :
                ]
            )
            for epoch in range(6)
        ]
        assert len(set(dropped)) > 3


CHANGES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(corpora(), CHANGES, st.sampled_from(COSTS), st.sampled_from([None, 4]), st.data())
def test_a_change_of_replicas_loses_and_repeats_nothing(
    case: tuple[npt.NDArray[Any], int],
    replicas: tuple[int, ...],
    cost: Callable[..., Any] | None,
    most: int | None,
    data: Any,
) -> None:
    (lengths, capacity), (before, after) = case, replicas
    table = PackTable.build(lengths, capacity=capacity, cost=cost, max_documents=most)
    order = RowOrder(table, 3, before)
    taken = before * data.draw(st.integers(0, order.steps))
    rest = (len(table) - taken) % after
    samples, documents = order.samples(np.arange(len(table) - rest, len(table)))
    whole, _ = order.samples(np.arange(len(table) - rest))
    assume(rest == 0 or documents.sum() >= after)
    if rest:
        units = np.maximum(lengths, 1)[:, None]
        rows = np.split(samples, np.cumsum(documents)[:-1])
        shares = share_rows(rows, [units[row] for row in rows], table.limits, after)
        assert [len(share) for share in shares] == [1] * after
        for share in shares:
            assert len(share[0]) >= 1
            assert most is None or len(share[0]) <= most
            assert units[share[0]].sum() <= capacity
        samples = np.concatenate([row for share in shares for row in share])
    assert sorted([*whole.tolist(), *samples.tolist()]) == list(range(len(lengths)))


def test_as_many_rows_as_replicas_are_dealt_whole() -> None:
    rows = [np.array([0, 1]), np.array([2]), np.array([3, 4, 5])]
    shares = share_rows(rows, [np.ones((len(row), 1), np.int64) for row in rows], RowLimits(capacity=(4,)), 2)
    assert [[row.tolist() for row in share] for share in shares] == [[[3, 4, 5], [2]], [[0, 1]]]


def test_rows_are_split_one_by_one_where_a_pool_breaks_the_capacity() -> None:
    # Longest first to the least load gives 5 + 3 + 3 = 11 to one replica.
    rows, units = [np.array([0, 1]), np.array([2, 3, 4])], [np.array([[5], [5]]), np.array([[3], [3], [3]])]
    shares = share_rows(rows, units, RowLimits(capacity=(10,)), 2)
    assert sorted(len(share) for share in shares) == [1, 1]
    sizes = [5, 5, 3, 3, 3]
    assert all(sum(sizes[sample] for sample in share[0].tolist()) <= 10 for share in shares)
    three = share_rows(rows, units, RowLimits(capacity=(10,), max_documents=1, cost=None), 5)
    assert all(len(share[0]) == 1 for share in three)


def test_fewer_documents_than_replicas_are_named() -> None:
    with pytest.raises(ValueError, match="each of 3 replicas, got 2 documents in 1 rows: set drop_last=True"):
        share_rows([np.array([0, 1])], [np.ones((2, 1), np.int64)], RowLimits(capacity=(4,)), 3)
