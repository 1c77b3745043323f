"""The laws of a packing sampler: every sample once, full rows in equal steps, whatever the replicas and the epoch."""

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pack_oracles import Integers, corpora, cut_list

from collate import VarlenCollator
from collate.errors import LengthError
from samplers import PackingBatchSampler
from samplers.planning.pack_batches.options import make_pack_options
from samplers.planning.pack_batches.plan import PackPlan
from samplers.planning.pack_batches.window_packs import make_window_packs

EPOCHS = st.integers(0, 10_000)
SEEDS = st.integers(0, 2**64 - 1)
REPLICAS = st.integers(1, 9)
ROWS = st.integers(1, 4)


def square(lengths: Integers) -> Any:
    """The cost of attention."""
    return lengths.astype(np.float64) ** 2


@st.composite
def cases(draw: st.DrawFn, most: int = 200) -> tuple[Integers, dict[str, Any]]:
    """Lengths, and the options of a sampler."""
    lengths, capacity = draw(corpora(max_samples=most))
    multiple = draw(st.sampled_from([1, 1, 2, 8]))
    options: dict[str, Any] = {"capacity": -(-capacity // multiple) * multiple, "multiple": multiple}
    options |= {"rows": draw(ROWS), "seed": draw(SEEDS), "shuffle": draw(st.booleans() | st.just(value=True))}
    options["drop_last"] = draw(st.booleans())
    if draw(st.booleans()):
        options["max_documents"] = draw(st.integers(1, 9))
    limit = draw(st.sampled_from(["none", "none", "cost", "cost and limit"]))
    if limit != "none":
        options["cost"] = square
    if limit == "cost and limit":
        rounded = -(-np.maximum(lengths, 1) // multiple) * multiple
        options["max_cost"] = float((rounded.astype(np.float64) ** 2).max()) * draw(st.sampled_from([1.0, 1.5, 4.0]))
    return lengths, options


def make(lengths: Any, options: dict[str, Any], replicas: int = 1, rank: Any = 0) -> PackingBatchSampler:
    """A sampler; a corpus whose last rows have too few documents for the replicas is not looked at."""
    try:
        return PackingBatchSampler(lengths, num_replicas=replicas, rank=rank, **options)
    except ValueError as error:
        assume(not ("must have a document" in str(error) or "must have a batch" in str(error)))
        raise


def flat(batches: Any) -> list[int]:
    """The samples of batches."""
    return [sample for batch in batches for sample in batch]


@given(cases(), REPLICAS, EPOCHS)
def test_an_epoch_gives_every_sample_once_in_equal_steps(case: Any, replicas: int, epoch: int) -> None:
    lengths, options = case
    samplers = [make(lengths, options, replicas, rank) for rank in range(replicas)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    assert len({len(sampler) for sampler in samplers} | {sampler.remaining for sampler in samplers}) == 1
    batches = [list(sampler) for sampler in samplers]
    assert {len(each) for each in batches} == {len(samplers[0])}
    given_samples = flat(flat(batches))
    assert len(set(given_samples)) == len(given_samples)
    dropped = len(lengths) - len(given_samples)
    assert dropped == 0 or (options["drop_last"] and dropped == samplers[0].plan(epoch).report().last_dropped)
    assert all(batch for each in batches for batch in each)


@given(cases(), REPLICAS, EPOCHS)
def test_rows_keep_every_limit_and_none_is_empty(case: Any, replicas: int, epoch: int) -> None:
    lengths, options = case
    plan = make(lengths, options, replicas).plan(epoch)
    multiple = options["multiple"]
    sizes = -(-np.maximum(lengths, 1) // multiple) * multiple
    for batch, rows in zip(plan.batches, plan.rows, strict=True):
        assert flat(rows) == batch
        assert 1 <= len(rows) <= options["rows"]
        for row in rows:
            assert 0 < len(row) <= options.get("max_documents", len(row))
            assert int(sizes[row].sum()) <= options["capacity"] or lengths[row].min() == 0
            assert int((-(-lengths[row] // multiple) * multiple).sum()) <= options["capacity"]
        if "max_cost" in options:
            assert sum(square(sizes[row]).sum() for row in rows) <= options["max_cost"] * options["rows"]
            assert all(square(sizes[row]).sum() <= options["max_cost"] for row in rows)


@given(cases(), REPLICAS, EPOCHS)
def test_a_collator_cuts_each_batch_into_the_planned_rows(case: Any, replicas: int, epoch: int) -> None:
    lengths, options = case
    # A cut by capacity does not see costs: only where each batch has one row does it keep their rows.
    if "max_cost" in options:
        options |= {"rows": 1}
    plan = make(lengths, options, replicas).plan(epoch)
    collate = VarlenCollator(
        arrange="given",
        capacity=options["capacity"],
        max_documents=options.get("max_documents"),
        align=options["multiple"],
    )
    for batch, rows in zip(plan.batches[:20], plan.rows[:20], strict=True):
        documents = [np.full(int(lengths[sample]), sample) for sample in batch]
        assert collate(documents).documents_per_row.tolist() == [len(row) for row in rows]
        sizes = [-(-int(lengths[sample]) // options["multiple"]) * options["multiple"] for sample in batch]
        assert cut_list(sizes, options["capacity"], options.get("max_documents")) == [len(row) for row in rows]


@given(cases(), st.lists(SEEDS, min_size=2, max_size=2), st.lists(EPOCHS, min_size=2, max_size=4), REPLICAS)
def test_every_epoch_and_seed_has_as_many_steps(case: Any, seeds: list[int], epochs: list[int], replicas: int) -> None:
    lengths, options = case
    samplers = [make(lengths, options | {"seed": seed}, replicas) for seed in seeds]
    steps = {sampler.plan(epoch).steps for sampler in samplers for epoch in epochs}
    assert steps == {len(samplers[0])}


@given(cases(), REPLICAS, EPOCHS, st.data())
def test_a_batch_by_number_is_that_batch_of_the_whole_epoch(case: Any, replicas: int, epoch: int, data: Any) -> None:
    lengths, options = case
    sampler = make(lengths, options, replicas)
    other = make(list(lengths), options, replicas)
    whole = list(sampler.plan(epoch).batches)
    slot = data.draw(st.integers(0, len(whole) - 1))
    for plan in (other.plan(epoch), pickle.loads(pickle.dumps(sampler)).plan(epoch)):
        assert plan.batches[slot] == whole[slot]
        assert plan.rows[slot] == list(plan.rows)[slot]
        assert list(plan.batches[slot:]) == whole[slot:]


@given(cases(), st.lists(REPLICAS, min_size=2, max_size=4), EPOCHS, st.data())
def test_other_replicas_take_the_rest_of_an_epoch_once(case: Any, chain: list[int], epoch: int, data: Any) -> None:
    lengths, options = case
    options = options | {"drop_last": False}
    taken: list[int] = []
    position = None
    for number, replicas in enumerate(chain):
        samplers = [make(lengths, options, replicas, rank) for rank in range(replicas)]
        for sampler in samplers:
            if position is None:
                sampler.set_epoch(epoch)
            else:
                try:
                    sampler.seek(json.loads(json.dumps(position)))
                except ValueError as error:
                    # Fewer documents remain than replicas.
                    assume("must have a document for each" not in str(error))
                    raise
        steps = samplers[0].remaining
        assert {sampler.remaining for sampler in samplers} == {steps}
        last = number == len(chain) - 1
        count = steps if last else data.draw(st.integers(0, steps))
        iterators = [iter(sampler) for sampler in samplers]
        for _ in range(count):
            taken += flat(next(iterator) for iterator in iterators)
        if last:
            assert all(next(iterator, None) is None for iterator in iterators)
        # An iterator that has taken nothing has not begun: the position is where it would begin.
        positions = [sampler.position(count) for sampler in samplers]
        assert all(each == positions[0] for each in positions)
        position = positions[0]
    assert sorted(taken) == list(range(len(lengths)))


@given(cases(), st.integers(1, 4), EPOCHS)
def test_rank_all_gives_the_batches_of_all_replicas_in_turn(case: Any, replicas: int, epoch: int) -> None:
    lengths, options = case
    all_ranks = make(lengths, options, replicas, "all")
    all_ranks.set_epoch(epoch)
    batches = list(all_ranks)
    assert len(all_ranks) == len(batches)
    for rank in range(replicas):
        sampler = make(lengths, options, replicas, rank)
        sampler.set_epoch(epoch)
        assert list(sampler) == batches[rank::replicas]


@given(cases(), st.data())
def test_an_iterator_resumes_from_its_state_at_any_step(case: Any, data: Any) -> None:
    lengths, options = case
    sampler = make(lengths, options, data.draw(st.integers(1, 3)))
    steps = data.draw(st.integers(0, len(sampler)))
    iterator = iter(sampler)
    before = [next(iterator) for _ in range(steps)]
    state = json.loads(json.dumps(iterator.state_dict()))
    assert len(json.dumps(state)) < 1_000
    rest = list(iterator)
    other = make(lengths, options, sampler.num_replicas)
    resumed = iter(other)
    resumed.load_state_dict(state)
    assert list(resumed) == rest
    assert other.epoch == (1 if steps or rest else 0)
    assert before + rest == list(make(lengths, options, sampler.num_replicas))


@given(corpora(), SEEDS, EPOCHS, ROWS)
def test_pieces_of_split_samples_cover_them_once(case: Any, seed: int, epoch: int, rows: int) -> None:
    lengths, capacity = case
    smaller = max(1, capacity // 3)
    sampler = make(lengths, {"capacity": smaller, "overlong": "split", "seed": seed, "rows": rows})
    pieces = sampler.pieces
    covered: dict[int, list[tuple[int, int]]] = {}
    for index in flat(sampler.plan(epoch).batches):
        piece = index - len(lengths)
        start, stop = (0, int(lengths[index])) if piece < 0 else (int(pieces.starts[piece]), int(pieces.stops[piece]))
        assert stop - start <= smaller
        covered.setdefault(index if piece < 0 else int(pieces.samples[piece]), []).append((start, stop))
    assert covered.keys() == set(range(len(lengths)))
    for sample, parts in covered.items():
        parts.sort()
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
        assert parts[-1][1] == lengths[sample]


@given(corpora(), st.sampled_from(["drop", "cut"]), EPOCHS)
def test_overlong_samples_are_dropped_or_cut_as_told(case: Any, overlong: str, epoch: int) -> None:
    lengths, capacity = case
    smaller = max(1, capacity // 3)
    assume((lengths <= smaller).any())
    sampler = make(lengths, {"capacity": smaller, "overlong": overlong})
    plan = sampler.plan(epoch)
    fitting = set(np.flatnonzero(lengths <= smaller).tolist())
    assert set(flat(plan.batches)) == (fitting if overlong == "drop" else set(range(len(lengths))))
    assert plan.report().overlong_dropped == (len(lengths) - len(fitting) if overlong == "drop" else 0)
    assert sampler.max_length == (smaller if overlong == "cut" else None)
    assert plan.tokens.sum() == np.minimum(lengths, smaller)[sorted(set(flat(plan.batches)))].sum()


@given(corpora(), st.integers(0, 40), st.data())
def test_samples_that_are_not_chosen_or_too_short_are_left_out(case: Any, least: int, data: Any) -> None:
    lengths, capacity = case
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    chosen = {index for index in indices if lengths[index] >= least}
    assume(chosen)
    sampler = make(lengths, {"capacity": capacity, "indices": indices, "min_length": least})
    plan = sampler.plan(0)
    assert sorted(flat(plan.batches)) == sorted(chosen)
    assert plan.report().too_short == len(indices) - len(chosen)
    outputs = [[2 * sample for sample in batch] for batch in plan.batches]
    expected = [2 * sample if sample in chosen else None for sample in range(len(lengths))]
    assert plan.unsort(outputs) == expected


@given(corpora(max_samples=120), st.integers(1, 30), ROWS, EPOCHS, st.integers(1, 4))
def test_rows_of_two_fields_keep_both_capacities(case: Any, second: int, rows: int, epoch: int, replicas: int) -> None:
    lengths, capacity = case
    patches = np.random.default_rng(len(lengths)).integers(0, second + 1, len(lengths))
    pairs = np.stack([lengths, patches], 1)
    sampler = make(pairs, {"capacity": (capacity, second + 3), "rows": rows}, replicas)
    plan = sampler.plan(epoch)
    assert sorted(flat(plan.batches)) == list(range(len(lengths)))
    collate = VarlenCollator(arrange="given", capacity={"a": capacity, "b": second + 3})
    for batch, planned in zip(plan.batches[:10], plan.rows[:10], strict=True):
        for row in planned:
            assert (pairs[row].sum(0) <= [capacity, second + 3]).all()
        samples = [{"a": np.zeros(pairs[i, 0], np.int64), "b": np.zeros(pairs[i, 1], np.int64)} for i in batch]
        collated = collate(samples)
        assert collated["a"].documents_per_row.tolist() == [len(row) for row in planned]
        assert collated["b"].documents_per_row.tolist() == [len(row) for row in planned]


@given(cases(), REPLICAS, EPOCHS)
def test_the_report_agrees_with_a_count_by_hand(case: Any, replicas: int, epoch: int) -> None:
    lengths, options = case
    plan = make(lengths, options, replicas).plan(epoch)
    report = plan.report()
    rows = flat(plan.rows)
    assert (report.rows, report.batches, report.steps) == (len(rows), len(plan.batches), plan.steps)
    assert report.documents == sum(map(len, rows))
    assert report.real_tokens == sum(int(lengths[row].sum()) for row in rows) == int(plan.tokens.sum())
    assert report.waste == pytest.approx(1 - report.real_tokens / (len(rows) * options["capacity"]), abs=1e-12)
    assert report.least_full == pytest.approx(min(lengths[row].sum() for row in rows) / options["capacity"])
    later = {
        sample: at
        for at, row in enumerate(flat(make(lengths, options, replicas).plan(epoch + 1).rows))
        for sample in row
    }
    pairs = [(one, two) for row in rows for i, one in enumerate(row) for two in row[:i]]
    again = sum(one in later and later.get(one) == later.get(two) for one, two in pairs)
    assert report.repeated_pairs == pytest.approx(again / max(1, len(pairs)))
    rounded = -(-np.maximum(lengths, 1) // options["multiple"]) * options["multiple"]
    price = square(rounded) if "cost" in options else lengths.astype(float)
    steps = np.array([price[batch].sum() for batch in plan.batches]).reshape(-1, replicas)
    if steps.sum() == 0:
        assert report.imbalance == report.worst_imbalance == 1
    else:
        assert report.imbalance == pytest.approx(replicas * steps.max(1).sum() / steps.sum(), rel=1e-3)
        assert report.costliest_document == pytest.approx(price[flat(plan.batches)].max() / steps.mean(), rel=1e-6)
    assert "waste" in str(report)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, TypeError, "capacity must be given"),
        ({"capacity": 10, "max_tokens": 5}, TypeError, "options must be among capacity, rows, .*, got max_tokens"),
        ({"capacity": 10, "rows": 0}, ValueError, "rows must be at least 1, got 0"),
        ({"capacity": 10, "seed": -1}, ValueError, "seed must be at least 0"),
        ({"capacity": 10, "seed": 2**64}, ValueError, "seed must be at most"),
        ({"capacity": 10, "shuffle": 1}, TypeError, "shuffle must be True or False"),
        ({"capacity": 10, "min_length": 10}, ValueError, "min_length=10 leaves out 3"),
        ({"capacity": 10, "indices": [0, 0]}, ValueError, "indices must differ"),
        ({"capacity": 10, "indices": [3]}, ValueError, "indices must be in range.3."),
        ({"capacity": 8}, LengthError, "row of capacity 8, got 9 steps at sample 2"),
        (
            {"capacity": 10, "num_replicas": 4, "rank": 0},
            ValueError,
            "a document for each of 4 replicas, got 3 documents",
        ),
        (
            {"capacity": 10, "num_replicas": 4, "rank": 0, "drop_last": True},
            ValueError,
            "a batch for each of 4 replicas",
        ),
        ({"capacity": 10, "num_replicas": 2, "rank": 2}, ValueError, "rank must be below num_replicas=2"),
        ({"capacity": 10, "rows": 2**31 + 1}, ValueError, "rows must be at most 2..31, got 2147483649"),
        ({"capacity": 10, "cost": np.square, "max_cost": "5"}, TypeError, "max_cost must be a number, got '5'"),
        ({"capacity": 10, "cost": np.square, "max_cost": True}, TypeError, "max_cost must be a number, got True"),
        # Red before: these costs were refused only when an epoch began.
        ({"capacity": 10, "cost": lambda lengths: 1.0}, ValueError, "cost must return one number per document, .3."),
        ({"capacity": 10, "cost": lambda lengths: -lengths}, ValueError, "finite numbers from 0, got -9"),
        ({"capacity": 10, "cost": lambda lengths: lengths * np.nan}, ValueError, "finite numbers from 0, got nan"),
        ({"capacity": 10, "cost": lambda lengths: ["a"] * 3}, TypeError, "cost must return numbers, got <U1"),
        ({"capacity": 10, "cost": lambda lengths: lengths * 1j}, TypeError, "cost must return numbers, got complex128"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_a_remedy(options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        PackingBatchSampler([3, 5, 9], **options)


@pytest.mark.parametrize("rows", [2**20, 2**31])
def test_many_more_rows_than_documents_are_one_batch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red before: a batch asked for memory for all rows that it could have had."""
    arange = np.arange

    def small_arange(*bounds: Any, **options: Any) -> Any:
        assert max(bounds) < 10_000, "asks for memory"
        return arange(*bounds, **options)

    monkeypatch.setattr(np, "arange", small_arange)
    sampler = PackingBatchSampler([3, 5, 9, 4], capacity=10, rows=rows)
    assert [sorted(batch) for batch in sampler] == [[0, 1, 2, 3]]
    starts = np.array([0, 2, 4])
    packs = make_window_packs(
        np.array([3, 5, 9, 4]), starts, make_pack_options({"capacity": 10, "rows": rows}), window=1
    )
    assert sorted(PackPlan(packs, 0, 1).batches) in ([[1, 0], [2, 3]], [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        ([], ValueError, "got .0."),
        ([1.5], TypeError, "must be integers"),
        (np.ma.array([1, 2], mask=[0, 1]), TypeError, "masked"),
        ([3, -1], LengthError, "got -1 at sample 1"),
        ([[[1]]], ValueError, "must be .N. or .N, K."),
    ],
)
def test_lengths_that_are_none_are_refused(lengths: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        PackingBatchSampler(lengths, capacity=10)


def test_positions_of_other_lengths_options_and_seeds_are_refused() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    sampler = PackingBatchSampler(lengths, capacity=100)
    position = sampler.position(0)
    changed = {
        "lengths": PackingBatchSampler(lengths + 1, capacity=100),
        "seed": PackingBatchSampler(lengths, capacity=100, seed=1),
        **{
            f"options {number}": PackingBatchSampler(lengths, **({"capacity": 100} | options))
            for number, options in enumerate(
                [
                    {"capacity": 101},
                    {"rows": 2},
                    {"max_documents": 8},
                    {"cost": square},
                    {"drop_last": True},
                    {"shuffle": False},
                    {"multiple": 2},
                    {"indices": range(199)},
                    {"min_length": 3},
                ]
            )
        },
    }
    for name, other in changed.items():
        with pytest.raises(ValueError, match=f"whose .*{name.split()[0]}.* differ"):
            other.seek(position)


def test_every_kind_of_lengths_gives_the_same_plan(tmp_path: Any) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    np.save(tmp_path / "lengths.npy", lengths.astype(np.int32))
    kinds = [lengths, lengths.tolist(), lengths.astype(np.uint16), np.load(tmp_path / "lengths.npy", mmap_mode="r")]
    plans = [list(PackingBatchSampler(kind, capacity=100).plan(3).batches) for kind in [*kinds, lengths[:, None]]]
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize(("seed", "samples", "replicas"), [(2, 60, 4), (0, 90, 7), (14, 150, 5)])
def test_every_epoch_has_a_document_for_each_replica_in_its_last_rows(seed: int, samples: int, replicas: int) -> None:
    """Rows are left whose documents suffice in some epochs only, and not in the spare recipes of construction."""
    lengths = np.random.default_rng(seed).integers(20, 61, samples)
    sampler = PackingBatchSampler(lengths, capacity=128, num_replicas=replicas, rank=0)
    for epoch in range(40):
        plan = sampler.plan(epoch)
        assert sorted(flat(plan.batches)) == list(range(samples))
        assert plan.steps == len(sampler)


def test_a_row_that_is_nearly_empty_comes_last_in_its_batch() -> None:
    # The row with 2 steps alone has room for the 7 of another row, if that came next.
    lengths = np.array([7, 7, 7, 3, 3, 3, 2])
    sampler = PackingBatchSampler(lengths, capacity=10, rows=2)
    for epoch in range(20):
        plan = sampler.plan(epoch)
        assert sum(map(len, plan.rows)) == 4
        for batch, rows in zip(plan.batches, plan.rows, strict=True):
            assert cut_list(lengths[batch].tolist(), 10) == [len(row) for row in rows]
