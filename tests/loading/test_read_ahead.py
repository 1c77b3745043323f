"""ReadAheadLoader: a thread makes the batches, and nothing else changes."""

import gc
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import tokens, write
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from collate import DevicePrefetcher, PadCollator
from samplers import LengthBucketBatchSampler, PackingBatchSampler, ReadAheadLoader, ShardDataset, ShardStream

LENGTHS = np.random.default_rng(0).integers(1, 30, 200)
DATA = [[index] * length for index, length in enumerate(LENGTHS.tolist())]
COLLATE = PadCollator()


def loader(seed: int = 0, **options: Any) -> ReadAheadLoader:
    sampler = LengthBucketBatchSampler(LENGTHS, max_tokens=200, seed=seed)
    return ReadAheadLoader(DATA, batch_sampler=sampler, collate_fn=COLLATE, **options)


def ids(batches: Any) -> list[list[int]]:
    """The samples of each batch."""
    return [batch.padded[:, 0].tolist() for batch in batches]


def reading_threads() -> int:
    """Threads of loaders that are alive."""
    gc.collect()
    return sum(thread.name == "read ahead" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert reading_threads() == 0


def test_epochs_are_those_of_a_data_loader() -> None:
    sampler = LengthBucketBatchSampler(LENGTHS, max_tokens=200)
    plain, ahead = DataLoader(DATA, batch_sampler=sampler, collate_fn=COLLATE), loader()
    assert len(plain) == len(ahead) == len(iter(ahead))
    for _ in range(3):
        assert ids(plain) == ids(ahead)


@given(used=st.integers(0, 40), ahead=st.integers(1, 5), epoch=st.integers(0, 2))
def test_the_state_is_that_of_the_batches_the_loop_has(used: int, ahead: int, epoch: int) -> None:
    first = loader(prefetch_batches=ahead)
    first.batch_sampler.set_epoch(epoch)
    running = iter(first)
    used = min(used, len(first))
    for _ in range(used):
        next(running)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = loader(prefetch_batches=3)
    second.load_state_dict(state)
    assert second.state_dict() == state
    rest = ids(running)
    assert ids(second) == rest
    assert len(rest) == len(first) - used
    # After the end of an epoch, both continue with the next.
    assert ids(first) == ids(second)
    assert first.state_dict() == second.state_dict()


def test_a_broken_off_epoch_is_followed_by_the_next() -> None:
    first, sampler = loader(), LengthBucketBatchSampler(LENGTHS, max_tokens=200)
    for number, _ in enumerate(first):
        if number == 2:
            break
    sampler.set_epoch(1)
    assert ids(first) == ids(DataLoader(DATA, batch_sampler=sampler, collate_fn=COLLATE))


def test_a_position_that_is_sought_or_an_epoch_that_is_set_counts() -> None:
    first = loader()
    running = iter(first)
    next(running)
    position = first.batch_sampler.position(5)
    first.batch_sampler.seek(position)
    assert first.state_dict() == position
    first.batch_sampler.set_epoch(7)
    assert first.state_dict()["epoch"] == 7
    del running


def test_streams_and_packs_resume_too(tmp_path: Path) -> None:
    write(tmp_path, tokens(LENGTHS.tolist()), max_samples=20)

    def stream() -> ReadAheadLoader:
        return ReadAheadLoader(ShardStream(tmp_path, max_tokens=200, window=50, collate_fn=COLLATE), batch_size=None)

    def packs() -> ReadAheadLoader:
        data = ShardDataset(tmp_path)
        return ReadAheadLoader(data, batch_sampler=PackingBatchSampler(data.index, capacity=100), collate_fn=COLLATE)

    for make in (stream, packs):
        first, second = make(), make()
        running = iter(first)
        for _ in range(4):
            next(running)
        second.load_state_dict(first.state_dict())
        assert [batch["__key__"] for batch in second] == [batch["__key__"] for batch in running]


class Counting(IterableDataset[int]):
    """Numbers, and how many of them were asked for."""

    def __init__(self, fail_at: int = 1000) -> None:
        self.given, self.fail_at = 0, fail_at

    def __iter__(self) -> Iterator[int]:
        for number in range(20):
            if number == self.fail_at:
                raise OSError("the disk is gone")
            self.given = number + 1
            yield number


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_thread_is_that_many_batches_ahead_and_no_more(ahead: int) -> None:
    data = Counting()
    running = iter(ReadAheadLoader(data, batch_size=None, prefetch_batches=ahead))
    for number in range(4):
        assert next(running) == number
        # At most the batches that are ready or being made: the thread cannot pass this, however fast it is.
        assert data.given <= number + 1 + ahead
    # And it gets there, without being asked again.
    for _ in range(1000):
        if data.given == 4 + ahead:
            break
        threading.Event().wait(0.01)
    assert data.given == 4 + ahead


def test_an_error_comes_after_the_batches_before_it() -> None:
    running = iter(ReadAheadLoader(Counting(fail_at=3), batch_size=None))
    assert [next(running) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(running)
    with pytest.raises(StopIteration):
        next(running)


def test_the_end_stays_the_end() -> None:
    running = iter(loader())
    list(running)
    assert list(running) == []
    assert reading_threads() == 0


def test_an_iterator_that_is_dropped_ends_its_thread() -> None:
    running = iter(loader())
    next(running)
    assert reading_threads() == 1
    del running
    assert reading_threads() == 0


def test_no_thread_starts_and_no_epoch_is_taken_before_the_first_batch() -> None:
    first = loader()
    iter(first)
    assert first.batch_sampler.epoch == 0
    assert reading_threads() == 0


def test_two_passes_at_a_time_are_two_epochs() -> None:
    first, second = loader(), loader()
    one, two = iter(first), iter(first)
    pairs = list(zip(one, two, strict=True))
    assert ids(batch for batch, _ in pairs) == ids(second)
    assert ids(batch for _, batch in pairs) == ids(second)


def test_a_copy_begins_where_its_sampler_stands() -> None:
    first = loader()
    running = iter(first)
    next(running)
    copied = pickle.loads(pickle.dumps(first))
    assert ids(copied) == ids(first)
    del running


def test_a_prefetcher_takes_its_state() -> None:
    first, second = loader(), loader()
    with DevicePrefetcher(first, "cpu") as batches:
        running = iter(batches)
        for _ in range(5):
            next(running)
        second.load_state_dict(batches.state_dict())
        assert ids(second) == ids(running)


@pytest.mark.unix
def test_a_forked_child_is_told_to_iterate_anew() -> None:
    running = iter(loader())
    next(running)

    def child() -> None:
        with pytest.raises(RuntimeError, match="belongs to the process that began it"):
            next(running)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_a_program_that_ends_during_an_epoch_ends_well() -> None:
    program = """
import torch
from samplers import ReadAheadLoader
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 100
    def __getitem__(self, index): return torch.randn(300, 300) @ torch.randn(300, 300)
running = iter(ReadAheadLoader(Slow(), batch_size=4, prefetch_batches=8))
next(running)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_workers": 2}, ValueError, "num_workers must be 0, got 2: a thread makes the batches"),
        ({"prefetch_batches": 0}, ValueError, "prefetch_batches must be at least 1, got 0"),
        ({"prefetch_batches": 1.5}, TypeError, "prefetch_batches must be an int"),
        ({"batch_size": 3}, ValueError, "batch_sampler"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loader(**options)


def test_without_a_position_there_is_no_state() -> None:
    plain = ReadAheadLoader(DATA, batch_size=4, collate_fn=COLLATE)
    assert len(list(plain)) == 50
    everyone = LengthBucketBatchSampler(LENGTHS, max_tokens=200, num_replicas=2, rank="all")
    for each in (plain, ReadAheadLoader(DATA, batch_sampler=everyone, collate_fn=COLLATE)):
        next(iter(each))
        with pytest.raises(TypeError, match="has no position that one process could resume from"):
            each.state_dict()
        with pytest.raises(TypeError, match="has no position that one process could resume from"):
            each.load_state_dict({})


def test_batches_of_tensors_are_those_of_a_plain_loader() -> None:
    values = torch.arange(30).reshape(10, 3)
    assert torch.equal(torch.cat(list(ReadAheadLoader(values, batch_size=4))), values)
