"""Epochs of a stream in copies and in workers: a copy goes its own way, a worker shares, and a break ends an epoch."""

import copy
import multiprocessing
import os
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from samplers import LengthBucketBatchSampler, ShardStream, ShardWriter
from samplers.progress.shared_cursor import Record, Token, _find_iteration
from samplers.shards.skip_counts import shared_zeros

COUNT = 200
# More workers than cores, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda data: pickle.loads(pickle.dumps(data))}
copies = pytest.mark.parametrize("how", COPIES)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    lengths = np.random.default_rng(1).integers(1, 40, COUNT)
    with ShardWriter(folder, max_samples=30) as writer:
        for number, length in enumerate(lengths):
            writer.write({"__key__": f"{number:03}", "x": np.zeros(length, np.uint8)})
    return folder


def keys(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["__key__"] for sample in samples]


def stream(shards: Path, epoch: int = 0) -> ShardStream:
    data = ShardStream(shards, collate_fn=keys, max_tokens=300, window=50)
    data.set_epoch(epoch)
    return data


def epochs(shards: Path, *numbers: int) -> list[list[list[str]]]:
    return [list(stream(shards, number)) for number in numbers]


def loader(data: ShardStream, workers: int = 0, kind: Any = DataLoader, **options: Any) -> Any:
    return kind(data, batch_size=None, num_workers=workers, **options)


LOADERS = pytest.mark.parametrize(
    ("workers", "options"), [(0, {}), (2, {}), (2, {"persistent_workers": True}), (3, {})]
)


@copies
@LOADERS
def test_a_copy_comes_to_its_next_epochs(how: str, workers: int, options: dict[str, bool], shards: Path) -> None:
    # Red: a copy with workers gave the same epoch for ever, and set_epoch did not reach workers that live on.
    data = stream(shards, 1)
    list(islice(data, 2))
    copied = COPIES[how](data)
    assert (copied.epoch, copied.position(2)) == (2, data.position(2))
    data.set_epoch(7)
    list(data)
    running = loader(copied, workers, **options)
    assert [list(running), list(running)] == epochs(shards, 2, 3)
    copied.set_epoch(5)
    assert list(running) == epochs(shards, 5)[0]
    assert data.epoch == 8


@copies
def test_a_copy_keeps_what_was_sought(how: str, shards: Path) -> None:
    data = stream(shards)
    data.seek(data.position(3))
    copied = COPIES[how](data)
    assert copied.remaining == len(data) - 3
    assert list(copied) == list(data) == epochs(shards, 0)[0][3:]


@copies
def test_a_copied_sampler_and_its_iterator_go_their_own_ways(how: str) -> None:
    # Red for copy.copy: both moved one epoch, and took batches out of one list.
    sampler = LengthBucketBatchSampler(np.arange(1, 200), max_tokens=400)
    whole = list(sampler.plan(0).batches)
    iterator = iter(sampler)
    first = list(islice(iterator, 4))
    copied, again = COPIES[how](sampler), COPIES[how](iterator)
    assert list(copied) == list(sampler.plan(1).batches)
    assert sampler.epoch == 1
    assert first + list(again) == first + list(iterator) == whole


def test_a_pickle_of_a_stream_is_small_and_holds_no_memory_that_is_shared(shards: Path) -> None:
    data = stream(shards)
    list(islice(data, 1))
    assert len(pickle.dumps(data._cursor)) < 1000


def _advance(data: ShardStream, queue: Any) -> None:
    # In a process that was started with the stream, or that got it from a queue.
    data = queue.get() if data is None else data
    next(iter(data))


@pytest.mark.parametrize("way", ["argument", "queue"])
def test_what_torchs_multiprocessing_sends_is_shared(way: str, shards: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    data, queue = stream(shards, 3), context.Queue()
    process = context.Process(target=_advance, args=(data if way == "argument" else None, queue))
    process.start()
    if way == "queue":
        queue.put(data)
    process.join()
    assert process.exitcode == 0
    assert data.epoch == 4


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@LOADERS
def test_a_pass_after_an_early_break_is_the_next_epoch(
    kind: type[Any], workers: int, options: dict[str, bool], shards: Path
) -> None:
    # Red: the same batches came in every pass.
    running = loader(stream(shards), workers, kind, **options)
    seen = [[batch for batch, _ in zip(running, range(2), strict=False)] for _ in range(4)]
    assert seen == [epoch[:2] for epoch in epochs(shards, 0, 1, 2, 3)]
    assert list(running) == epochs(shards, 4)[0]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_started_anew_agree_on_the_epoch(method: str, shards: Path) -> None:
    running = loader(stream(shards), 2, multiprocessing_context=method)
    next(iter(running))
    assert list(running) == epochs(shards, 1)[0]


def test_workers_with_the_same_seed_in_each_pass_are_told_apart(shards: Path) -> None:
    running = loader(stream(shards), 2)
    for epoch in range(4):
        torch.manual_seed(0)
        assert [batch for batch, _ in zip(running, range(3), strict=False)] == epochs(shards, epoch)[0][:3]


def test_more_workers_than_batches_agree_as_well(shards: Path) -> None:
    data = ShardStream(shards, collate_fn=keys, max_tokens=4000)
    running = loader(data, len(data) + 2)
    for epoch in range(3):
        plan = data.plan(epoch)
        assert list(running) == [[data.data.index.keys[sample] for sample in batch] for batch in plan.batches]


def test_two_loaders_at_once_take_an_epoch_each(shards: Path) -> None:
    data = stream(shards)
    first, second = iter(loader(data, 2)), iter(loader(data, 2))
    taken = [next(first)], [next(second)]
    rest = [[*taken[0], *first], [*taken[1], *second]]
    assert sorted(rest) == sorted(epochs(shards, 0, 1))


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("options", [{}, {"multiprocessing_context": "spawn"}, {"persistent_workers": True}])
def test_loaders_at_once_of_one_seed_take_an_epoch_each(kind: type[Any], options: dict[str, Any], shards: Path) -> None:
    # Red: the second took the first one's epoch, since workers knew those of their loader by its seed alone.
    data = stream(shards)
    running, taken = [], []
    for _ in range(3):
        torch.manual_seed(0)
        running.append(iter(loader(data, 2, kind, **options)))
        # Each worker has begun.
        taken.append(list(islice(running[-1], 2)))
    assert [[*first, *rest] for first, rest in zip(taken, running, strict=True)] == epochs(shards, 0, 1, 2)
    assert data.epoch == 3


def test_a_pass_that_is_held_while_the_next_has_its_seed_is_no_part_of_it(shards: Path) -> None:
    running, held = loader(stream(shards), 3), []
    for epoch in range(4):
        torch.manual_seed(0)
        held.append(iter(running))
        assert list(islice(held[-1], 3)) == epochs(shards, epoch)[0][:3]


def test_loaders_of_one_seed_that_begin_together_take_whole_epochs(shards: Path) -> None:
    # Before all workers of the first have begun, the second may take its epoch, but never a part of it.
    data = stream(shards)
    running = []
    for _ in range(3):
        torch.manual_seed(0)
        running.append(iter(loader(data, 3)))
    assert all(list(each) in epochs(shards, 0, 1, 2) for each in running)


def test_workers_whose_births_are_mixed_up_know_their_loader(shards: Path) -> None:
    # Threads that start processes side by side: births differ within a loader, seeds do not.
    mine = [Token(5, 1, os.getpid(), worker, birth) for worker, birth in ((0, 7), (1, 8), (2, 11))]
    records = [Record(1, 4, 0, 1, 0, **mine[0]._asdict())]
    assert all(_find_iteration(records, token._replace(process=1)) == records[0] for token in mine[1:])
    assert _find_iteration(records, mine[0]._replace(process=1, birth=20)) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_counts_from_where_a_loaders_state_led(workers: int, shards: Path) -> None:
    # Red: it counted from where the iteration began that had saved the state.
    saved = loader(stream(shards), workers, StatefulDataLoader)
    running = iter(saved)
    list(islice(running, 3))
    state = saved.state_dict()
    data = stream(shards)
    restored = loader(data, workers, StatefulDataLoader)
    restored.load_state_dict(state)
    running = iter(restored)
    list(islice(running, 2))
    assert data.position(2) == stream(shards).position(5)
    with pytest.raises(ValueError, match=f"at most {len(data) - 3}, the iteration's"):
        data.position(len(data) - 2)


def test_a_half_written_record_is_not_read(shards: Path) -> None:
    data = stream(shards, 2)
    data._cursor._numbers[0, 0, :3] = 99, 4, 50
    assert data.epoch == 2


def test_forked_children_of_the_default_method_share(shards: Path) -> None:
    data = stream(shards)
    process = multiprocessing.get_context("fork").Process(target=_advance, args=(data, None))
    process.start()
    process.join()
    assert data.epoch == 1


def test_shared_memory_is_made_in_a_fork_of_a_process_with_threads() -> None:
    """Red before: `share_memory_` copied with threads that a fork does not have, and hung."""
    torch.zeros(10_000_000).add_(1)
    process = torch.multiprocessing.get_context("fork").Process(target=shared_zeros, args=((5_000, 23), torch.int64))
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    assert code == 0
