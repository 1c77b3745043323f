"""The batch sampler under loaders: even steps, resume on any number of replicas, and the cursor in the iterator."""

import io
import json
import pickle
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.stateful import Stateful

from samplers.batch_sampler import LengthBucketBatchSampler

LENGTHS = (np.arange(260) * 37 % 61 + 1).tolist()
WORLDS = st.integers(1, 6)


def make(replicas: int = 1, rank: int | str = 0, **options: Any) -> LengthBucketBatchSampler:
    options = {"max_tokens": 400, "seed": 5, **options}
    return LengthBucketBatchSampler(options.pop("lengths", LENGTHS), num_replicas=replicas, rank=rank, **options)


def make_all(replicas: int, **options: Any) -> list[LengthBucketBatchSampler]:
    return [make(replicas, rank, **options) for rank in range(replicas)]


def identity(batch: list[int]) -> list[int]:
    return batch


class Samples(torch.utils.data.Dataset[int]):
    """A dataset whose samples are their own numbers."""

    def __getitem__(self, place: int) -> int:
        return place

    def __len__(self) -> int:
        return len(LENGTHS)


def flat(batches: Any) -> list[int]:
    return [sample for batch in batches for sample in batch]


@given(WORLDS, WORLDS, st.integers(0, 9))
def test_the_batches_of_all_replicas_can_be_dealt_out_by_others(replicas: int, saved_by: int, taken: int) -> None:
    earlier = make(saved_by)
    position = earlier.position(min(taken, len(earlier)))
    samplers, whole = make_all(replicas), make(replicas, rank="all")
    assert len(whole) == replicas * len(samplers[0])
    for sampler in (*samplers, whole):
        sampler.seek(position)
    assert whole.remaining == replicas * samplers[0].remaining
    for _ in range(2):
        dealt = list(whole)
        assert [dealt[rank::replicas] for rank in range(replicas)] == [list(sampler) for sampler in samplers]


@given(WORLDS, st.integers(0, 4), st.booleans(), st.sampled_from([None, 7]))
def test_replicas_take_the_plan_batch_by_batch(
    replicas: int, epoch: int, shuffle: bool, batch_size: int | None
) -> None:
    samplers = make_all(replicas, shuffle=shuffle, batch_size=batch_size)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    taken = [list(sampler) for sampler in samplers]
    assert [len(each) for each in taken] == [len(sampler) for sampler in samplers]
    assert [batch for step in zip(*taken, strict=True) for batch in step] == list(samplers[0].plan(epoch).batches)
    assert sorted(flat(flat(taken))) == list(range(len(LENGTHS)))


@given(WORLDS, st.integers(0, 2), st.data())
def test_a_position_on_as_many_replicas_gives_the_identical_rest(
    replicas: int, epoch: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, replicas - 1))
    sampler = make(replicas, rank)
    sampler.set_epoch(epoch)
    whole = list(sampler)
    steps = data.draw(st.integers(0, len(whole)))
    position = sampler.position(steps)
    restored = make(replicas, rank)
    restored.seek(position)
    assert restored.remaining == len(whole) - steps
    assert list(restored) == whole[steps:]
    assert restored.epoch == epoch + 1
    assert list(restored) == list(make(replicas, rank).plan(epoch + 1).batches)[rank::replicas]


@given(st.lists(st.tuples(WORLDS, st.floats(0, 1)), min_size=1, max_size=5), st.integers(0, 3), st.booleans())
def test_a_chain_of_any_worlds_loses_and_repeats_nothing(
    chain: list[tuple[int, float]], epoch: int, shuffle: bool
) -> None:
    seen: list[int] = []
    position: dict[str, Any] | None = None
    for number, (replicas, share) in enumerate(chain):
        samplers = make_all(replicas, shuffle=shuffle)
        for sampler in samplers:
            sampler.set_epoch(epoch)
            if position is not None:
                sampler.seek(position)
        steps = samplers[0].remaining
        used = steps if number == len(chain) - 1 else int(share * steps)
        iterators = [iter(sampler) for sampler in samplers]
        batches = [list(islice(iterator, used)) for iterator in iterators]
        assert {len(each) for each in batches} == {used}
        assert all(flat(batches))
        seen += flat(flat(batches))
        positions = [sampler.position(used) for sampler in samplers]
        states = [iterator.state_dict() for iterator in iterators]
        assert all(each == positions[0] for each in [*positions, *states])
        position = json.loads(json.dumps(positions[0]))
    assert sorted(seen) == list(range(len(LENGTHS)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 4), WORLDS, WORLDS, st.integers(0, 9))
def test_small_corpora_are_shared_out_or_refused_before_the_first_batch(
    lengths: list[int], batch_size: int, before: int, after: int, steps: int
) -> None:
    options = {"lengths": lengths, "max_tokens": None, "batch_size": batch_size}
    try:
        samplers = make_all(before, **options)
    except ValueError as error:
        assume("must have a row for each" not in str(error))
        raise
    used = min(steps, len(samplers[0]))
    seen = flat(flat(islice(sampler, used) for sampler in samplers))
    position = samplers[0].position(used)
    rest = []
    for rank in range(after):
        try:
            sampler = make(after, rank, **options)
            sampler.seek(position)
        except ValueError as error:
            assume("must have a row for each" not in str(error))
            raise
        rest.append(list(sampler))
    assert len({len(each) for each in rest}) == 1
    assert sorted(seen + flat(flat(rest))) == list(range(len(lengths)))


@given(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9))
def test_a_second_save_in_an_epoch_counts_from_where_the_iteration_began(epoch: int, first: int, second: int) -> None:
    sampler = make()
    sampler.set_epoch(epoch)
    whole = list(sampler)
    for steps in (first, second):
        position = sampler.position(steps)
        sampler = make()
        sampler.seek(position)
        next(iter(sampler))
    sampler.seek(sampler.position(0))
    assert list(sampler) == whole[first + second :]


def test_a_position_is_small_primitive_and_fresh() -> None:
    iterator = iter(make())
    next(iterator)
    state, again = iterator.state_dict(), iterator.state_dict()
    assert state == again
    assert state is not again
    assert set(state) == {"version", "epoch", "replicas", "batches", "fingerprint"}
    assert {type(value) for value in state.values()} == {int, str}
    assert json.loads(json.dumps(state)) == state
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file) == state
    assert len(json.dumps(state)) < 1000


def test_making_iterators_changes_nothing() -> None:
    sampler = make()
    expected = list(make())
    unused = [iter(sampler) for _ in range(3)]
    assert sampler.epoch == 0
    assert list(unused[1]) == expected
    assert list(unused[0]) == list(sampler.plan(1).batches)


def test_an_iterator_that_has_ended_stays_ended() -> None:
    iterator = iter(make())
    list(iterator)
    assert [next(iterator, None) for _ in range(5)] == [None] * 5
    assert iterator.state_dict()["batches"] == len(make())


def test_an_early_break_begins_the_next_epoch_afresh() -> None:
    sampler = make()
    assert len(list(islice(sampler, 3))) == 3
    assert list(sampler) == list(sampler.plan(1).batches)


def test_the_sampler_itself_is_not_stateful_and_names_itself() -> None:
    sampler = make()
    assert not isinstance(sampler, Stateful)
    assert isinstance(iter(sampler), Stateful)
    assert not hasattr(sampler, "batch_size")
    assert not hasattr(sampler, "drop_last")
    assert sampler.sampler is sampler


def test_an_iterator_under_way_can_be_sent_elsewhere() -> None:
    whole = list(make())
    position = make().position(7)
    sampler = make()
    iterator = iter(sampler)
    list(islice(iterator, 2))
    iterator.load_state_dict(position)
    assert iterator.state_dict() == position
    assert list(iterator) == whole[7:]


def test_a_restored_iterator_outlasts_set_epoch_and_the_next_follows() -> None:
    sampler = make()
    iterator = iter(sampler)
    iterator.load_state_dict(make().position(4))
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
    assert list(iterator) == list(make())[4:]
    assert list(sampler) == list(sampler.plan(1).batches)


def test_seek_is_for_the_first_iterator_that_takes_a_batch_and_only_once() -> None:
    sampler = make()
    whole = list(sampler)
    sampler.seek(sampler.position(4))
    unused, used = iter(sampler), iter(sampler)
    assert list(used) == whole[4:]
    assert list(unused) == list(sampler.plan(1).batches)


def test_set_epoch_keeps_a_seek_in_that_epoch_and_clears_it_in_another() -> None:
    sampler = make()
    whole = list(sampler)
    position = sampler.position(4)
    sampler.seek(position)
    sampler.set_epoch(0)
    assert list(sampler) == whole[4:]
    sampler.seek(position)
    sampler.set_epoch(2)
    assert sampler.remaining == len(sampler)
    assert list(sampler) == list(sampler.plan(2).batches)


def test_a_seek_to_an_epochs_edge_gives_nothing_and_then_the_next_epoch() -> None:
    sampler = make()
    list(sampler)
    sampler.seek(sampler.position(len(sampler)))
    assert sampler.remaining == 0
    assert list(sampler) == []
    assert list(sampler) == list(sampler.plan(1).batches)


def test_position_counts_the_batches_of_the_present_iteration() -> None:
    sampler = make()
    assert sampler.position(0)["epoch"] == 0
    list(islice(sampler, 5))
    assert (sampler.position(2)["epoch"], sampler.position(2)["batches"]) == (0, 2)
    sampler.set_epoch(3)
    assert sampler.position(0)["epoch"] == 3
    with pytest.raises(ValueError, match=f"batches must be at most {len(sampler)}"):
        sampler.position(len(sampler) + 1)
    with pytest.raises(ValueError, match="batches must be at least 0"):
        sampler.position(-1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lengths": LENGTHS[:-1]}, "whose lengths differ"),
        ({"lengths": [*LENGTHS[1:], LENGTHS[0]]}, "whose lengths differ"),
        ({"max_tokens": 500}, "whose options differ"),
        ({"drop_last": True}, "whose options differ"),
        ({"shuffle": False}, "whose options differ"),
        ({"indices": list(range(259))}, "whose options differ"),
        ({"seed": 6}, "whose seed differ"),
        ({"seed": 6, "window": 50}, "whose options and seed differ"),
    ],
)
def test_a_position_of_something_else_is_refused_by_name(options: dict[str, Any], says: str) -> None:
    position = make().position(3)
    with pytest.raises(ValueError, match=says):
        make(**options).seek(position)
    with pytest.raises(ValueError, match=says):
        iter(make(**options)).load_state_dict(position)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"version": 3}, ValueError, "version 2, got version 3"),
        ({"batches": -1}, ValueError, "batches must be at least 0"),
        ({"batches": 10**6}, ValueError, "must lie in an epoch of"),
        ({"replicas": 0}, ValueError, "replicas must be at least 1"),
        ({"epoch": 1.0}, TypeError, "epoch must be an int, got 1.0"),
        ({"epoch": True}, TypeError, "epoch must be an int, got True"),
        ({"fingerprint": ""}, ValueError, "differ"),
    ],
)
def test_a_damaged_position_is_refused(change: dict[str, Any], error: type[Exception], says: str) -> None:
    sampler = make()
    with pytest.raises(error, match=says):
        sampler.seek({**sampler.position(3), **change})
    assert sampler.remaining == len(sampler)


def test_a_position_without_a_value_or_that_is_no_mapping_is_refused() -> None:
    sampler = make()
    with pytest.raises(ValueError, match="must have .'epoch'.,"):
        sampler.seek({name: value for name, value in sampler.position(0).items() if name != "epoch"})
    with pytest.raises(TypeError, match="got list"):
        sampler.seek([1, 2])


def test_a_remainder_that_cannot_be_shared_is_refused_with_a_remedy() -> None:
    sampler = make(lengths=[3] * 10, max_tokens=None, batch_size=5)
    list(islice(sampler, 1))
    position = sampler.position(1)
    with pytest.raises(ValueError, match=r"a row for each of 6 replicas, got 5 rows in 1 batches: set drop_last=True"):
        make(6, 0, lengths=[3] * 10, max_tokens=None, batch_size=5, window=2).seek(position)


def test_lists_are_fresh_and_of_python_ints() -> None:
    sampler = make()
    first = next(iter(sampler))
    first.clear()
    sampler.set_epoch(0)
    assert next(iter(sampler))
    assert {type(sample) for batch in sampler for sample in batch} == {int}


def test_a_sampler_and_its_iterator_can_be_pickled() -> None:
    sampler = make()
    iterator = iter(sampler)
    next(iterator)
    assert list(pickle.loads(pickle.dumps(iterator))) == list(iterator)
    assert len(pickle.loads(pickle.dumps(sampler))) == len(sampler)


@given(st.integers(1, 40), st.integers(0, 2))
@settings(max_examples=20)
def test_fields_are_planned_by_tuples_of_widths(count: int, epoch: int) -> None:
    lengths = np.stack([np.arange(1, count + 1), np.arange(count, 0, -1)], axis=1)
    sampler = make(lengths=lengths, max_tokens=90)
    assert sorted(flat(sampler.plan(epoch).batches)) == list(range(count))
    assert all(rows * sum(width) <= 90 for rows, width in sampler.shapes)


# --- under loaders


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_every_epoch_as_planned(workers: int) -> None:
    sampler = make()
    loader = DataLoader(Samples(), batch_sampler=sampler, num_workers=workers, collate_fn=identity)
    assert len(loader) == len(sampler)
    for epoch in range(2):
        assert list(loader) == list(sampler.plan(epoch).batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_position_and_seek_resume_a_loader_that_runs_ahead(workers: int) -> None:
    sampler = make()
    loader = DataLoader(Samples(), batch_sampler=sampler, num_workers=workers, collate_fn=identity)
    used = list(islice(loader, 5))
    restored = make()
    restored.seek(sampler.position(5))
    loader = DataLoader(Samples(), batch_sampler=restored, num_workers=workers, collate_fn=identity)
    assert used + list(loader) == list(sampler.plan(0).batches)
    assert list(loader) == list(sampler.plan(1).batches)


def stateful_loader(workers: int, **options: Any) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(Samples(), batch_sampler=make(**options), num_workers=workers, collate_fn=identity)


def epochs(loader: StatefulDataLoader[Any], first: int, last: int, *, manual: bool) -> Iterator[list[list[int]]]:
    for epoch in range(first, last):
        if manual:
            loader.batch_sampler.set_epoch(epoch)
        yield list(loader)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(("workers", "cuts"), [(0, range(18)), (2, (0, 1, 9, 17))])
def test_a_stateful_loader_resumes_at_any_batch(workers: int, cuts: Any, manual: bool) -> None:
    expected = [list(make().plan(epoch).batches) for epoch in range(4)]
    assert len(expected[1]) >= 17
    for cut in cuts:
        loader = stateful_loader(workers)
        assert list(epochs(loader, 0, 1, manual=manual)) == expected[:1]
        if manual:
            loader.batch_sampler.set_epoch(1)
        iterator = iter(loader)
        used = list(islice(iterator, cut))
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        restored = stateful_loader(workers)
        restored.load_state_dict(state)
        if manual:
            restored.batch_sampler.set_epoch(1)
        assert used + list(restored) == expected[1]
        assert list(epochs(restored, 2, 4, manual=manual)) == expected[2:]


def test_a_stateful_loader_saved_at_its_end_resumes_at_the_next_epoch() -> None:
    loader = stateful_loader(0)
    expected = [list(make().plan(epoch).batches) for epoch in range(2)]
    assert list(loader) == expected[0]
    restored = stateful_loader(0)
    restored.load_state_dict(loader.state_dict())
    assert list(restored) == expected[1]


# --- who takes part


def test_a_launcher_without_a_process_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes .WORLD_SIZE., but torch.distributed is not initialised"):
        LengthBucketBatchSampler([3, 4], batch_size=1)
    assert len(LengthBucketBatchSampler([3, 4], batch_size=1, num_replicas=2, rank=0)) == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(LengthBucketBatchSampler([3, 4], batch_size=1)) == 2


def test_an_initialised_process_group_says_who_takes_part(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        sampler = LengthBucketBatchSampler([3, 4], batch_size=1)
        assert (sampler.num_replicas, sampler.rank) == (1, 0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("replicas", "rank", "error", "says"),
    [
        (2, 2, ValueError, "rank must be below num_replicas=2, got 2"),
        (2, -1, ValueError, "rank must be at least 0"),
        (2, None, ValueError, "rank must be given with num_replicas=2"),
        (None, 1, ValueError, "rank must be below num_replicas=1, got 1"),
        (0, 0, ValueError, "num_replicas must be at least 1"),
        (True, 0, TypeError, "num_replicas must be an int"),
        (2, 0.0, TypeError, "rank must be an int"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(replicas: Any, rank: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        LengthBucketBatchSampler([3, 4, 5], batch_size=1, num_replicas=replicas, rank=rank)
