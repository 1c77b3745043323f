"""The laws of packs: every sample once, full rows within their capacity, as many of them in every epoch."""

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_oracles import corpora, slow_best_fit

from collate.errors import LengthError
from samplers.planning.packs.pack_table import PackTable

SEEDS = st.integers(0, 2**40)
EPOCHS = st.integers(0, 10_000)

# Twelve documents, 55 units in three rows of 20: epochs 0 and 1.
GOLDEN = [[[8, 2, 9, 3], [5, 0, 4, 7], [10, 11, 6, 1]], [[0, 2, 1, 3], [5, 6, 9, 4], [10, 8, 11, 7]]]
GOLDEN_TABLE = (253, "5a33675d6e5226e1")
GOLDEN_ROWS = ([1247, 1681, 349, 1651, 1650, 102, 1342, 757], [6, 8, 8])


def rows_of(table: PackTable, epoch: int) -> list[list[int]]:
    """All rows of an epoch, as lists of samples."""
    samples, documents = table.rows(epoch, np.arange(len(table)))
    return [part.tolist() for part in np.split(samples, np.cumsum(documents)[:-1])]


@given(corpora(), SEEDS, EPOCHS)
def test_rows_hold_every_sample_once_within_the_capacity(
    case: tuple[npt.NDArray[Any], int], seed: int, epoch: int
) -> None:
    lengths, capacity = case
    table = PackTable.build(lengths, capacity=capacity, seed=seed)
    rows = rows_of(table, epoch)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert max(lengths[row].sum() for row in rows) <= capacity
    # Documents without steps are planned as one unit.
    assert max(np.maximum(lengths[row], 1).sum() for row in rows) <= capacity


@given(corpora(), st.lists(SEEDS, min_size=2, max_size=3), st.lists(EPOCHS, min_size=3, max_size=3))
def test_the_number_of_rows_is_the_same_for_every_epoch_and_seed(
    case: tuple[npt.NDArray[Any], int], seeds: list[int], epochs: list[int]
) -> None:
    lengths, capacity = case
    tables = [PackTable.build(lengths, capacity=capacity, seed=seed) for seed in seeds]
    assert len({len(table) for table in tables}) == 1
    for table, epoch in zip(tables * 2, epochs, strict=False):
        assert len(rows_of(table, epoch)) == len(table)
        assert int(table.recipes(epoch).tree.rows[0]) == len(table)


@given(corpora())
def test_there_are_few_more_rows_than_best_fit_takes(case: tuple[npt.NDArray[Any], int]) -> None:
    lengths, capacity = case
    table = PackTable.build(lengths, capacity=capacity)
    fitted = len(slow_best_fit(np.maximum(lengths, 1).tolist(), capacity))
    assert len(table) <= fitted + fitted * 3 // 1000 + 1
    if fitted < 100:
        assert len(table) == fitted


@given(corpora(), SEEDS, EPOCHS, st.data())
def test_a_row_by_number_is_that_row_of_the_whole_epoch(
    case: tuple[npt.NDArray[Any], int], seed: int, epoch: int, data: Any
) -> None:
    lengths, capacity = case
    table = PackTable.build(lengths, capacity=capacity, seed=seed)
    whole = rows_of(table, epoch)
    row_ids = np.array(data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=5)))
    other = pickle.loads(pickle.dumps(PackTable.build(lengths, capacity=capacity, seed=seed)))
    samples, documents = other.rows(epoch, row_ids)
    assert documents.tolist() == [len(whole[row]) for row in row_ids.tolist()]
    assert samples.tolist() == [sample for row in row_ids.tolist() for sample in whole[row]]
    assert other.row_documents(epoch, row_ids).tolist() == documents.tolist()


@given(corpora(), SEEDS, EPOCHS)
def test_rows_are_numbered_by_the_cost_of_their_slots(
    case: tuple[npt.NDArray[Any], int], seed: int, epoch: int
) -> None:
    lengths, capacity = case
    table = PackTable.build(lengths, capacity=capacity, seed=seed)
    costs = table.row_cost(epoch, np.arange(len(table)))
    assert (np.diff(costs) >= 0).all()
    real = [np.maximum(lengths[row], 1).sum() for row in rows_of(table, epoch)]
    assert (costs >= real).all()
    assert costs.max() <= capacity


@given(corpora(), SEEDS, EPOCHS, st.randoms(use_true_random=False))
def test_samples_of_equal_length_can_be_exchanged_in_all_recipes(
    case: tuple[npt.NDArray[Any], int], seed: int, epoch: int, random: Any
) -> None:
    lengths, capacity = case
    order = list(range(len(lengths)))
    random.shuffle(order)
    one, two = (PackTable.build(each, capacity=capacity, seed=seed) for each in (lengths, lengths[order]))
    for mine, other in zip(one.recipes(epoch).tree, two.recipes(epoch).tree, strict=True):
        assert mine.tolist() == other.tolist()
    assert one.digest == two.digest


def test_epochs_differ_and_each_is_the_same_when_asked_again() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    table = PackTable.build(lengths, capacity=100, seed=3)
    epochs = [rows_of(table, epoch) for epoch in (0, 1, 2, 0)]
    assert epochs[0] == epochs[3]
    assert all(one != two for one, two in pairwise(epochs))
    assert rows_of(PackTable.build(lengths, capacity=100, seed=4), 0) != epochs[0]


def test_without_a_shuffle_every_epoch_has_the_same_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    table = PackTable.build(lengths, capacity=100, shuffle=False)
    assert rows_of(table, 0) == rows_of(table, 7)
    assert sorted(table.rows(7, np.arange(len(table)))[0].tolist()) == list(range(500))


def test_two_hundred_epochs_keep_the_number_of_rows_and_the_caps() -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 300)
    table = PackTable.build(lengths, capacity=128)
    for epoch in range(200):
        samples, documents = table.rows(epoch, np.arange(len(table)))
        assert np.bincount(samples, minlength=300).max() == 1
        assert np.add.reduceat(lengths[samples], np.cumsum(documents) - documents).max() <= 128


def test_a_pickled_table_is_small_and_gives_the_same_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 5_000)
    table = PackTable.build(lengths, capacity=1_000)
    rows = rows_of(table, 2)
    small = len(pickle.dumps(table))
    assert rows_of(pickle.loads(pickle.dumps(table)), 2) == rows
    assert small < 4 * len(lengths) + 60_000


def test_rows_are_the_same_on_every_machine_and_version() -> None:
    lengths = [7, 3, 5, 2, 2, 9, 4, 1, 6, 3, 8, 5]
    table = PackTable.build(lengths, capacity=20, seed=5)
    assert len(table) == 3
    assert [rows_of(table, epoch) for epoch in (0, 1)] == GOLDEN
    large = PackTable.build(np.arange(1, 2_001) * 37 % 251 + 1, capacity=1_000, seed=1)
    samples, documents = large.rows(3, np.array([0, 100, len(large) - 1]))
    assert (len(large), large.digest) == GOLDEN_TABLE
    assert (samples.tolist()[:8], documents.tolist()) == GOLDEN_ROWS


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"capacity": 10.0}, TypeError, "capacity must be an int"),
        ({"capacity": True}, TypeError, "capacity must be an int"),
        ({"capacity": 10, "multiple": 4}, ValueError, "multiple of multiple=4, at most 2"),
        ({"capacity": 10, "max_documents": 0}, ValueError, "max_documents must be at least 1, got 0"),
        ({"capacity": [10, 10]}, ValueError, "one number for each of 1 fields"),
        ({"capacity": 8}, LengthError, "row of capacity 8, got 9 steps at sample 2 .1 samples do not fit"),
        ({"capacity": 10, "max_cost": 3.0}, ValueError, "max_cost must be above 0 and have a cost"),
        ({"capacity": 10, "cost": 3}, TypeError, "cost must be a function"),
        ({"capacity": 10, "cost": lambda lengths: -lengths, "max_cost": 1}, ValueError, "finite numbers from 0, got -"),
        ({"capacity": 10, "cost": lambda lengths: 1.0, "max_cost": 1}, ValueError, "one number per document"),
        ({"capacity": 10, "overlong": "alone"}, ValueError, "overlong must be one of 'error', 'drop', 'cut', 'split'"),
        ({"capacity": 2, "overlong": "drop"}, ValueError, "drops them all"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_a_remedy(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        PackTable.build([3, 5, 9], **options)


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        ([], ValueError, r"got \[0\]"),
        ([1.5], TypeError, "must be integers"),
        ([True], TypeError, "must be integers"),
        ([3, -1], ValueError, "got -1 at sample 1"),
        ([[[1]]], ValueError, r"\[N\] or \[N, K\]"),
        ([3, 2**50], ValueError, "at sample 1"),
    ],
)
def test_lengths_that_are_none_are_refused(
    lengths: list[bool | float | list[list[int]]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        PackTable.build(lengths, capacity=10)
