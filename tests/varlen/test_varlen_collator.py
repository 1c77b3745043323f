"""The collator: every field in the same rows, nothing lost, and refusals with numbers."""

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from collate import LengthError, PadCollator, VarlenBatch, VarlenCollator
from collate.varlen.best_fit import cut_fields, cut_in_order, pack_best_fit

SIZES = st.lists(st.integers(0, 20), max_size=40)


def as_packs(rows: list[int]) -> list[list[int]]:
    """The row of each item -> the items of each row."""
    return [[item for item, row in enumerate(rows) if row == number] for number in range(max(rows, default=-1) + 1)]


def slow_best_fit(sizes: Any, capacity: Any, max_items: Any) -> Any:
    """Longest first, each into the row with the least room that still holds it, found by looking at all of them."""
    rows = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        free = [capacity - sum(sizes[i] for i in row) for row in rows]
        fits = [
            (room, number)
            for number, room in enumerate(free)
            if room >= sizes[item] and (max_items is None or len(rows[number]) < max_items)
        ]
        if fits:
            rows[min(fits)[1]].append(item)
        else:
            rows.append([item])
    return [sorted(row) for row in rows]


@given(SIZES, st.sampled_from([None, 1, 2, 5]))
def test_best_fit_fills_rows_as_a_slow_search_does(sizes: Any, most: Any) -> None:
    packs = as_packs(pack_best_fit(sizes, 20, most))
    assert packs == slow_best_fit(sizes, 20, most)
    assert sorted(item for row in packs for item in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 20 and row == sorted(row) for row in packs)
    assert most is None or all(len(row) <= most for row in packs)


@given(SIZES, st.sampled_from([None, 1, 2, 5]))
def test_rows_that_are_given_are_cut_where_the_next_does_not_fit(sizes: Any, most: Any) -> None:
    packs = as_packs(cut_in_order(sizes, 20, most))
    assert [item for row in packs for item in row] == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 20 and (most is None or len(row) <= most) for row in packs)
    for row, after in pairwise(packs):
        full = most is not None and len(row) == most
        assert full or sum(sizes[i] for i in [*row, after[0]]) > 20


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12), st.booleans())
def test_a_sample_is_in_the_same_row_in_every_field(lengths: Any, apart: Any) -> None:
    samples = [
        {"x": np.full(n, index), "y": np.full(m, index), "labels": np.full(n, -index), "id": str(index), "n": n}
        for index, (n, m) in enumerate(lengths)
    ]
    capacity = {"x": 12, "y": 18, "labels": 12} if apart else 10
    batch = VarlenCollator({"x": 0, "y": 0, "labels": -100}, capacity=capacity)(samples)
    x, y, labels = batch["x"], batch["y"], batch["labels"]
    assert x.offsets is labels.offsets
    assert x.spans is labels.spans
    assert x.documents_per_row.tolist() == y.documents_per_row.tolist()
    indices = x.permutation.tolist()
    assert indices == y.permutation.tolist() == [int(name) for name in batch["id"]]
    assert batch["n"].tolist() == [lengths[index][0] for index in indices]
    for index, ours, theirs, label in zip(indices, x.sequences(), y.sequences(), labels.sequences(), strict=True):
        assert ours.tolist() == [index] * lengths[index][0]
        assert theirs.tolist() == [index] * lengths[index][1]
        assert label.tolist() == [-index] * lengths[index][0]
    assert x.values.shape[1] == (12 if apart else 10)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_fields_are_what_the_padding_collator_makes_of_them(lengths: Any) -> None:
    """The same samples by way of the other collator are the same documents."""
    samples = [(torch.arange(n), [float(n)] * n, "text", n) for n in lengths]
    ours = VarlenCollator(capacity=16)(samples)
    theirs = PadCollator(sort_by=False)(samples)
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert mine.values.dtype == other.padded.dtype
        for a, b in zip(mine.unsort(mine.sequences()), other.sequences(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(ours[0].unsort(ours[3]), theirs[3])


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12),
    st.sampled_from([None, 1, 2]),
    st.sampled_from(["best-fit", "given"]),
)
def test_rows_of_several_fields_break_no_cap_and_lose_nothing(lengths: Any, most: Any, arrange: Any) -> None:
    samples = [{"x": np.zeros(n), "y": np.zeros(m)} for n, m in lengths]
    batch = VarlenCollator(capacity={"x": 9, "y": 18}, max_documents=most, arrange=arrange)(samples)
    assert sorted(batch["x"].permutation.tolist()) == list(range(len(samples)))
    for field in batch.values():
        field.verify()
        assert most is None or int(field.documents_per_row.max()) <= most
    if arrange == "given":
        assert batch["x"].permutation.tolist() == list(range(len(samples)))
        packs = as_packs(cut_fields(np.array(lengths), np.array([9, 18]), most))
        assert batch["y"].documents_per_row.tolist() == list(map(len, packs))


@given(st.lists(st.one_of(st.integers(-(2**65), 2**65), st.booleans(), st.floats(width=32)), min_size=1, max_size=4))
def test_a_list_has_the_dtype_and_numbers_that_numpy_gives_it(numbers: list[float]) -> None:
    expected = np.asarray(numbers)
    if expected.dtype.kind in "Ou":
        with pytest.raises(TypeError, match=r"must hold numbers|torch has no dtype"):
            VarlenBatch.from_sequences([numbers])
        return
    values = VarlenBatch.from_sequences([numbers]).values[0].numpy()
    assert values.dtype == (np.float32 if expected.dtype.kind == "f" else expected.dtype)
    np.testing.assert_array_equal(values, expected.astype(values.dtype))


def test_pairs_stay_together() -> None:
    samples = [{"chosen": torch.arange(n), "rejected": torch.arange(6 - n)} for n in (5, 1, 3)]
    batch = VarlenCollator(capacity=6)(samples)
    chosen, rejected = batch["chosen"], batch["rejected"]
    assert torch.equal(chosen.permutation, rejected.permutation)
    assert torch.equal(chosen.documents_per_row, rejected.documents_per_row)
    both = VarlenBatch.concat([chosen, rejected])
    assert len(both) == 6


def test_a_run_of_one_capacity_has_one_shape() -> None:
    collate = VarlenCollator(capacity=32, rows=4, align=4, max_documents=8, max_seqlen=16)
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(50):
        batch = collate([torch.zeros(n) for n in rng.integers(0, 17, rng.integers(1, 9)).tolist()])
        shapes.add((batch.values.shape, batch.cu_seqlens.shape, batch.offsets.table.shape, batch.max_seqlen))
    assert shapes == {((4, 32), (65,), (5, 65), 16)}


def test_planned_rows_are_kept() -> None:
    rows = [[5, 3], [8], [2, 2, 4]]
    collate = VarlenCollator(capacity=8, arrange="given")
    batch = collate([torch.zeros(n) for row in rows for n in row])
    assert batch.documents_per_row.tolist() == [2, 1, 3]
    assert batch.permutation.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("options", "samples", "message"),
    [
        ({"capacity": 8}, [9], "sample 0 has 9 steps, capacity is 8: cut with max_length"),
        ({"capacity": 8, "rows": 1}, [5, 5], "2 documents of 10 steps .* take 2 rows of 8 steps, rows is 1"),
        ({"max_documents": 1}, [1, 1], "takes all 2 documents, max_documents is 1: give a capacity"),
        ({"capacity": 8, "max_seqlen": 4}, [5], "has 5 steps, max_seqlen is 4"),
        ({"max_seqlen": 4}, [2, 5], "document 1 has 5 steps, max_seqlen is 4"),
        ({"capacity": 8, "on_empty": "error"}, [3, 0], "sample 1 is empty"),
        ({}, [], "cannot collate an empty list"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(options: dict[str, Any], samples: list[int], message: str) -> None:
    with pytest.raises(LengthError, match=message):
        VarlenCollator(**options)([torch.zeros(n) for n in samples])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"capacity": 2.0}, TypeError, "capacity must be an int, got 2.0"),
        ({"rows": 2}, ValueError, "rows=2 need a capacity"),
        ({"capacity": 12, "align": 8}, ValueError, "multiple of align, got 12 and 8: 16 is one"),
        ({"capacity": 8, "arrange": "first"}, ValueError, "arrange must be 'best-fit' or 'given'"),
        ({"capacity": {"x": 8, "y": 0}}, ValueError, "capacity must be at least 1, got 0"),
        ({"stack": "x"}, TypeError, "stack must be a collection"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        VarlenCollator(**options)


def test_options_of_fields_must_name_them_all() -> None:
    with pytest.raises(ValueError, match=r"capacity is given for \['x'\], the variable-length fields are \['x', 'y'\]"):
        VarlenCollator(capacity={"x": 4})([{"x": [1], "y": [2]}])
    with pytest.raises(ValueError, match="field 'x': padding_value 0.5"):
        VarlenCollator({"x": 0.5}, capacity=4)([{"x": [1]}])


def test_declared_lengths_and_cuts_are_those_of_the_padding_collator() -> None:
    collate = VarlenCollator(capacity=4, max_length=3, length_field={"x": "n"})
    batch = collate([{"x": [1, 2, 3, 4], "n": 4}, {"x": [5], "n": 1}])
    assert batch["x"].values.tolist() == [[1, 2, 3, 5]]
    assert collate.max_length == 3
    with pytest.raises(LengthError, match="sample 1 has 1 steps, its declared length is 2"):
        collate([{"x": [1, 2], "n": 2}, {"x": [5], "n": 2}])


def test_it_goes_to_workers_and_its_batches_come_back() -> None:
    data = [{"x": torch.arange(n), "y": torch.ones(n)} for n in (3, 5, 2, 7, 1, 4)]
    collate = VarlenCollator({"x": -1, "y": 0}, capacity=8, align=2)
    assert pickle.loads(pickle.dumps(collate)).capacity == 8
    loader = DataLoader(data, batch_size=3, collate_fn=collate, num_workers=1)
    for ours, theirs in zip(loader, DataLoader(data, batch_size=3, collate_fn=collate), strict=True):
        for field in ("x", "y"):
            assert torch.equal(ours[field].values, theirs[field].values)
            assert torch.equal(ours[field].offsets.table, theirs[field].offsets.table)
            assert ours[field].permutation.tolist() == theirs[field].permutation.tolist()
