"""States at the edges of epochs, within a step, of older releases, and positions that are dropped: never in silence."""

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader

from samplers import LengthBucketBatchSampler, ShardStream, ShardWriter

LENGTHS = np.random.default_rng(0).integers(1, 60, 400)
# What the plan of an epoch's end is made for, in the first release.
FIRST = {"version": 1}


def make(**options: Any) -> LengthBucketBatchSampler:
    return LengthBucketBatchSampler(LENGTHS, **({"max_tokens": 600, "seed": 2} | options))


def at(epoch: int, **options: Any) -> LengthBucketBatchSampler:
    sampler = make(**options)
    sampler.set_epoch(epoch)
    return sampler


def loader(sampler: Any, workers: int = 0) -> StatefulDataLoader:
    return StatefulDataLoader(range(len(LENGTHS)), batch_sampler=sampler, collate_fn=list, num_workers=workers)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, max_samples=30) as writer:
        for number in range(120):
            writer.write({"__key__": f"{number:03}", "x": np.zeros(LENGTHS[number], np.uint8)})
    return folder


def keys(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["__key__"] for sample in samples]


def stream(shards: Path, **options: Any) -> ShardStream:
    return ShardStream(shards, collate_fn=keys, **({"max_tokens": 300, "window": 50} | options))


# --- the end of an epoch (each was red: the epoch came again)


@given(st.integers(0, 4), st.booleans())
def test_an_iterator_at_an_epoch_s_end_gives_nothing_then_the_next(epoch: int, stopped: bool) -> None:
    iterator = iter(at(epoch))
    list(iterator) if stopped else list(islice(iterator, len(make())))
    state = iterator.state_dict()
    sampler = make()
    restored = iter(sampler)
    restored.load_state_dict(state)
    assert restored.state_dict() == state == sampler.position(0)
    assert list(restored) == []
    assert sampler.epoch == epoch + 1
    assert sampler.position(0) == state
    assert list(sampler) == list(at(epoch + 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_saved_in_an_epochs_last_step_does_not_train_it_again(workers: int) -> None:
    saved = loader(make(), workers)
    list(saved)
    running = iter(saved)
    for _ in range(len(saved)):
        next(running)
    restored = loader(make(), workers)
    restored.load_state_dict(saved.state_dict())
    assert list(restored) == []
    assert list(restored) == list(at(2))


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_loader_saved_after_whole_epochs_goes_on_with_the_next(epochs: int) -> None:
    saved = loader(make())
    for _ in range(epochs):
        list(saved)
    restored = loader(make())
    restored.load_state_dict(saved.state_dict())
    assert list(restored) == list(at(epochs))


# --- all replicas in one loader (red: the rest of another epoch came)


@given(st.integers(1, 4), st.integers(0, 30), st.integers(0, 2), st.booleans())
def test_an_iterator_of_all_goes_on_within_a_step(replicas: int, taken: int, epoch: int, twice: bool) -> None:
    options = {"num_replicas": replicas, "rank": "all"}
    whole = list(at(epoch, **options))
    taken = min(taken, len(whole))
    iterator = iter(at(epoch, **options))
    assert list(islice(iterator, taken)) == whole[:taken]
    state = json.loads(json.dumps(iterator.state_dict()))
    sampler = make(**options)
    restored = iter(sampler)
    restored.load_state_dict(state)
    if twice:
        state = restored.state_dict()
        restored.load_state_dict(state)
    assert list(restored) == whole[taken:]
    assert list(sampler) == list(at(epoch + 1, **options))
    if taken % replicas:
        assert (state["dealt"], state["num_replicas"]) == (taken % replicas, replicas)
        for other in ({"num_replicas": replicas + 1, "rank": "all"}, {"num_replicas": replicas, "rank": 0}):
            with pytest.raises(ValueError, match="within a step .* save when all replicas have had theirs"):
                iter(make(**other)).load_state_dict(state)
        with pytest.raises(ValueError, match="got an iterator's state with 'dealt'"):
            sampler.seek(state)
    else:
        assert state == at(epoch, num_replicas=replicas, rank=0).position(taken // replicas)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [0, 3, 6])
def test_a_loader_of_all_replicas_resumes_in_the_second_epoch(workers: int, cut: int) -> None:
    options = {"num_replicas": 2, "rank": "all"}
    saved = loader(make(**options), workers)
    list(saved)
    running = iter(saved)
    taken = list(islice(running, cut))
    state = saved.state_dict()
    restored = loader(make(**options), workers)
    restored.load_state_dict(state)
    assert taken + list(restored) == list(at(1, **options))
    assert list(restored) == list(at(2, **options))


# --- positions that are dropped


def dropped(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("kind", ["sampler", "stream"])
def test_a_position_that_was_sought_and_dropped_is_logged(
    kind: str, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = (lambda: make()) if kind == "sampler" else (lambda: stream(shards))
    position = new().position(3)
    steps = len(new()) - 3
    sampler = new()
    sampler.seek(position)
    next(iter(sampler))
    assert dropped(caplog) == []
    next(iter(sampler))
    [message] = dropped(caplog)
    assert f"was dropped after 1 of {steps} batches, and epoch 1 comes next: " in message
    assert "seek the position again" in message
    list(sampler)
    assert len(dropped(caplog)) == 1


@pytest.mark.parametrize("kind", ["sampler", "stream"])
def test_nothing_is_logged_where_nothing_is_lost(kind: str, shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    new = (lambda: make()) if kind == "sampler" else (lambda: stream(shards))
    position = new().position(3)
    sampler = new()
    sampler.seek(position)
    next(iter(sampler))
    # The way out that the message names.
    sampler.seek(position)
    for _ in zip(range(len(sampler) - 3), sampler, strict=True):
        pass
    next(iter(sampler))
    list(sampler)
    end = new()
    end.seek(new().position(len(end)))
    assert list(end) == []
    list(end)
    assert dropped(caplog) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dropped_state_of_a_loader_is_logged(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    saved = loader(make(), workers)
    next(iter(saved))
    restored = loader(make(), workers)
    restored.load_state_dict(saved.state_dict())
    next(iter(restored))
    next(iter(restored))
    assert len(dropped(caplog)) == 1


# --- versions and damage


@pytest.mark.parametrize("kind", ["sampler", "stream"])
def test_a_position_of_the_first_release_is_refused_but_at_an_epochs_edge(kind: str, shards: Path) -> None:
    new = (lambda **options: make(**options)) if kind == "sampler" else (lambda **options: stream(shards, **options))
    sampler = new()
    sampler.set_epoch(4)
    middle, end = sampler.position(3) | FIRST, sampler.position(len(sampler)) | FIRST
    says = r"version 2, got version 1, after batch 3 of epoch 4: .* Finish .* or start it again with set_epoch\(4\)"
    for refuse in (sampler.seek, iter(sampler).load_state_dict):
        with pytest.raises(ValueError, match=says):
            refuse(middle)
    # The options' digest is of the old plan.
    lengths, _, seed = end["fingerprint"].split("-")[:3]
    sampler.seek(end | {"fingerprint": f"{lengths}-{'0' * 12}-{seed}"})
    assert list(sampler) == []
    assert sampler.epoch == 5
    for other in ({"seed": 9}, {"indices": np.arange(100)}):
        with pytest.raises(ValueError, match="got version 1"):
            new(**other).seek(end)


def test_an_iterators_state_of_a_stream_in_the_first_release_is_refused(shards: Path) -> None:
    iterator = iter(stream(shards))
    state = iterator.state_dict()
    assert state["version"] == 2
    with pytest.raises(ValueError, match="got version 1"):
        iterator.load_state_dict(state | FIRST)


def test_a_workers_state_is_not_taken_for_a_position(shards: Path) -> None:
    data = stream(shards)
    iterator = iter(data)
    next(iterator)
    with pytest.raises(ValueError, match="got an iterator's state with 'taken'"):
        data.seek(iterator.state_dict())
    with pytest.raises(ValueError, match="got an iterator's state with 'taken'"):
        iter(make()).load_state_dict(make().position(0) | {"taken": 3})


@pytest.mark.parametrize("kind", ["sampler", "stream"])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"replicas": 2**70}, ValueError, "replicas must be at most 2147483647, got 1180591620717411303424"),
        ({"epoch": 2**70}, ValueError, "epoch must be at most 2147483647"),
        ({"batches": 2**70}, ValueError, "batches must be at most 2147483647"),
        ({"version": True}, TypeError, "version must be an int, got True"),
        ({"version": 3}, ValueError, "version 2, got version 3: resume with the release that saved it"),
    ],
)
def test_a_position_with_a_wild_number_is_refused_by_name(
    kind: str, change: dict[str, Any], error: type[Exception], says: str, shards: Path
) -> None:
    sampler = make() if kind == "sampler" else stream(shards)
    with pytest.raises(error, match=says):
        sampler.seek(sampler.position(1) | change)


@pytest.mark.parametrize("kind", ["sampler", "stream"])
def test_an_epoch_beyond_what_workers_share_is_refused(kind: str, shards: Path) -> None:
    sampler = make() if kind == "sampler" else stream(shards)
    for refuse in (sampler.set_epoch, sampler.plan):
        with pytest.raises(ValueError, match="epoch must be at most 2147483647, got 1180591620717411303424"):
            refuse(2**70)
