"""Other limits than the capacity: documents, costs, several fields, multiples, and documents longer than a row."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_oracles import corpora

from collate.errors import LengthError
from samplers.planning.packs.groups import Tree
from samplers.planning.packs.ladder import LADDER, PackTask, Rung, attempt, fill_empty
from samplers.planning.packs.pack_table import PackTable


def squares(lengths: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return lengths.astype(np.float64) ** 2 + 3


def all_rows(table: PackTable, epoch: int) -> tuple[npt.NDArray[Any], ...]:
    samples, documents = table.rows(epoch, np.arange(len(table)))
    return samples, documents, np.cumsum(documents) - documents


@given(corpora(), st.integers(1, 12), st.integers(0, 9))
def test_no_row_has_more_documents_than_it_may(case: tuple[npt.NDArray[Any], int], most: int, epoch: int) -> None:
    lengths, capacity = case
    table = PackTable.build(lengths, capacity=capacity, max_documents=most, seed=epoch)
    samples, documents, firsts = all_rows(table, epoch)
    assert sorted(samples.tolist()) == list(range(len(lengths)))
    assert documents.min() >= 1
    assert documents.max() <= most
    assert np.add.reduceat(np.maximum(lengths, 1)[samples], firsts).max() <= capacity
    assert len(table) == len(PackTable.build(lengths, capacity=capacity, max_documents=most, seed=77))


@given(corpora(), st.floats(1, 3), st.integers(0, 9))
def test_no_row_costs_more_than_it_may(case: tuple[npt.NDArray[Any], int], factor: float, epoch: int) -> None:
    lengths, capacity = case
    most = factor * squares(np.maximum(lengths, 1)).max()
    table = PackTable.build(lengths, capacity=capacity, cost=squares, max_cost=most, seed=epoch)
    samples, _, firsts = all_rows(table, epoch)
    assert sorted(samples.tolist()) == list(range(len(lengths)))
    assert np.add.reduceat(squares(np.maximum(lengths, 1)[samples]), firsts).max() <= most * (1 + 1e-12)
    assert np.add.reduceat(np.maximum(lengths, 1)[samples], firsts).max() <= capacity
    assert (np.diff(table.row_cost(epoch, np.arange(len(table)))) >= 0).all()


@pytest.mark.parametrize("fields", [1, 2])
def test_slots_of_classes_do_not_cost_more_than_documents(fields: int) -> None:
    # Both were planned without end: 24,999 was rounded up to 25,000, and 1063 x 1062 costs more than any document.
    if fields == 1:
        lengths = np.random.default_rng(0).permutation(np.arange(1, 25_000))
        most, capacity = 24_999.0, (100_000,)
    else:
        first = np.random.default_rng(0).integers(1_000, 1_064, 2_000)
        lengths = np.stack([first, 2_063 - first], 1)
        most, capacity = 1_031.0 * 1_032, (5_000, 5_000)

    def cost(steps: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return steps.reshape(len(steps), -1).prod(1).astype(np.float64)

    table = PackTable.build(lengths, capacity=capacity, cost=cost, max_cost=most)
    samples, _, firsts = all_rows(table, 0)
    assert sorted(samples.tolist()) == list(range(len(lengths)))
    assert np.add.reduceat(cost(lengths[samples]), firsts).max() <= most


@pytest.mark.parametrize("most", [9.0, np.float64(9), np.int64(9), np.float32(9)])
def test_the_type_of_max_cost_does_not_change_a_plan(most: Any) -> None:
    # Red before: a position was refused where 9 had become 9.0.
    digests = {PackTable.build([3, 4, 5], capacity=9, cost=np.abs, max_cost=cost).digest for cost in (9, most)}
    assert len(digests) == 1


@given(corpora(max_samples=200), st.integers(1, 500), st.integers(1, 12), st.integers(0, 9))
def test_several_fields_and_documents_hold_their_limits_together(
    case: tuple[npt.NDArray[Any], int], patches: int, most: int, epoch: int
) -> None:
    lengths, capacity = case
    rng = np.random.default_rng(epoch)
    other = np.where(rng.random(len(lengths)) < 0.3, rng.integers(0, patches + 1, len(lengths)), 0)
    pairs = np.stack([lengths, other], 1)
    table = PackTable.build(pairs, capacity=(capacity, patches), max_documents=most, seed=epoch)
    samples, documents, firsts = all_rows(table, epoch)
    assert sorted(samples.tolist()) == list(range(len(lengths)))
    assert documents.max() <= most
    assert (np.add.reduceat(pairs[samples], firsts).max(0) <= (capacity, patches)).all()


@given(corpora(), st.integers(1, 16))
def test_rows_hold_lengths_that_are_rounded_up_to_multiples(case: tuple[npt.NDArray[Any], int], multiple: int) -> None:
    lengths, capacity = case
    table = PackTable.build(lengths, capacity=capacity * multiple, multiple=multiple)
    samples, _, firsts = all_rows(table, 1)
    rounded = np.maximum(1, -(-lengths // multiple)) * multiple
    assert sorted(samples.tolist()) == list(range(len(lengths)))
    assert np.add.reduceat(rounded[samples], firsts).max() <= capacity * multiple
    assert table.tokens == rounded.sum()


@given(st.lists(st.integers(0, 100), min_size=1, max_size=60), st.integers(1, 30), st.sampled_from([1, 2]))
def test_pieces_of_split_samples_join_to_the_samples(lengths: list[int], units: int, multiple: int) -> None:
    capacity = units * multiple
    table = PackTable.build(lengths, capacity=capacity, multiple=multiple, overlong="split")
    samples, documents, firsts = all_rows(table, 0)
    longer = [sample for sample, length in enumerate(lengths) if -(-length // multiple) * multiple > capacity]
    whole = [sample for sample in range(len(lengths)) if sample not in longer]
    pieces = sum(math.ceil(lengths[sample] / capacity) for sample in longer)
    assert sorted(samples.tolist()) == whole + list(range(len(lengths), len(lengths) + pieces))
    if not longer:
        assert table.pieces is None
        return
    steps = np.concatenate([np.array(lengths), table.pieces.stops - table.pieces.starts])
    assert np.add.reduceat(steps[samples], firsts).max() <= capacity
    joined = [list(range(*bounds)) for bounds in zip(table.pieces.starts, table.pieces.stops, strict=True)]
    for sample in longer:
        found = [step for piece in np.flatnonzero(table.pieces.samples == sample) for step in joined[piece]]
        assert found == list(range(lengths[sample]))
    assert documents.sum() == len(whole) + pieces


@given(st.lists(st.integers(0, 100), min_size=1, max_size=60), st.integers(1, 120))
def test_overlong_samples_are_dropped_and_counted_or_cut(lengths: list[int], capacity: int) -> None:
    array = np.array(lengths)
    fitting = np.flatnonzero(array <= capacity)
    cut = PackTable.build(array, capacity=capacity, overlong="cut")
    samples, _, firsts = all_rows(cut, 0)
    assert sorted(samples.tolist()) == list(range(len(lengths)))
    assert np.add.reduceat(np.minimum(array, capacity)[samples], firsts).max() <= capacity
    if len(fitting):
        dropped = PackTable.build(array, capacity=capacity, overlong="drop")
        assert sorted(all_rows(dropped, 0)[0].tolist()) == fitting.tolist()
        assert dropped.dropped == len(lengths) - len(fitting)


def test_a_cost_cuts_and_splits_where_a_document_alone_costs_too_much() -> None:
    lengths = [4, 30, 7, 12]
    for overlong, least in (("cut", 4), ("split", 6)):
        table = PackTable.build(lengths, capacity=40, cost=lambda n: n**2, max_cost=150, overlong=overlong)
        samples, documents, _ = all_rows(table, 0)
        assert documents.sum() >= least
    # The longest piece costs 12 x 12.
    assert table.pieces.stops.tolist() == [12, 24, 30]
    assert sorted(samples.tolist()) == [0, 2, 3, 4, 5, 6]


def test_only_the_samples_that_take_part_are_packed() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 400)
    chosen = np.flatnonzero(lengths % 3 == 0)
    table = PackTable.build(lengths, capacity=100, indices=chosen)
    assert sorted(all_rows(table, 4)[0].tolist()) == chosen.tolist()
    longer = PackTable.build(lengths, capacity=30, indices=chosen, overlong="split")
    samples = all_rows(longer, 4)[0]
    assert sorted(samples[samples < 400].tolist()) == [sample for sample in chosen if lengths[sample] <= 30]
    assert (lengths[longer.pieces.samples] > 30).all()


@given(corpora(max_samples=150), st.integers(0, 2**40), st.sampled_from(LADDER), st.integers(0, 20))
def test_an_attempt_places_all_documents_or_says_that_it_failed(
    case: tuple[npt.NDArray[Any], int], key: int, rung: Rung, more: int
) -> None:
    lengths, capacity = np.maximum(case[0], 1), case[1]
    sizes, counts = np.unique(lengths, return_counts=True)
    task = PackTask(sizes[::-1, None], counts[::-1], np.array([capacity]))
    rows = min(len(lengths), task.bound + more)
    tree = attempt(task, rows, rung, key)
    if tree is None:
        return
    assert tree.rows[0] == rows
    assert tree.open_rows().min() >= 0
    assert tree.open_rows()[0] == 0
    placed = np.bincount(tree.classes[1:], tree.rows[1:], len(counts))
    assert placed.tolist() == counts[::-1].tolist()


def test_rows_without_a_document_get_the_longest_last_one_of_another() -> None:
    # Two rows of documents 0 and 1, one of 0 and 2, one of 0 alone, two empty.
    tree = Tree(np.array([-1, 0, 1, 1]), np.array([-1, 0, 1, 2]), np.array([6, 4, 2, 1]))
    full = fill_empty(tree)
    assert full.open_rows().tolist() == [0, 3, 0, 1, 2]
    assert full.classes.tolist() == [-1, 0, 1, 2, 1]
    assert full.parents.tolist() == [-1, 0, 1, 1, 0]


def test_as_many_rows_as_documents_always_succeed() -> None:
    task = PackTask(np.array([[9, 1], [5, 1], [3, 1]]), np.array([3, 4, 5]), np.array([10, 1]))
    for rung in (LADDER[0], Rung(350, 700), LADDER[-1]):
        assert attempt(task, 12, rung, 1) is not None
    assert attempt(task, 11, LADDER[0], 1) is None


def test_a_document_is_overlong_if_any_of_its_fields_is() -> None:
    pairs = np.array([[3, 9], [4, 0], [12, 2], [5, 4]])
    with pytest.raises(LengthError, match=r"capacity \(10, 8\), got \[12, 2\] steps at sample 2 \(2 samples"):
        PackTable.build(pairs, capacity=(10, 8))
    dropped = PackTable.build(pairs, capacity=(10, 8), overlong="drop")
    assert sorted(all_rows(dropped, 0)[0].tolist()) == [1, 3]
    cut = PackTable.build(pairs, capacity=(10, 8), overlong="cut")
    samples, _, firsts = all_rows(cut, 0)
    assert sorted(samples.tolist()) == [0, 1, 2, 3]
    assert (np.add.reduceat(np.minimum(pairs, (10, 8))[samples], firsts).max(0) <= (10, 8)).all()
    with pytest.raises(ValueError, match="overlong='split' must have one field"):
        PackTable.build(pairs, capacity=(10, 8), overlong="split")
    with pytest.raises(ValueError, match="overlong='cut' must be told where to cut"):
        PackTable.build(pairs, capacity=(10, 8), overlong="cut", cost=lambda n: n.sum(1), max_cost=5)
