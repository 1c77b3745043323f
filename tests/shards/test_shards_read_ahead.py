"""Remote shards that are read ahead: in the background, within a bound, and with the same samples as local ones.

No test looks at the clock. The server answers no request before enough of them have been asked for, where requests must
be sent together.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from corpora import LAYOUTS, assert_same
from faulty import Faulty, faulty
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_corpus import ONCE, PATIENT, numbered, running, server, write_layouts
from torch.utils.data import DataLoader

from collate import PadCollator
from samplers import LengthBucketBatchSampler, ReadAheadLoader, ShardDataset, ShardStream, Transport
from samplers.shards.opening.read_ahead import ReadAhead
from samplers.shards.storage.network import fetched, remote
from samplers.shards.storage.network.counts import Counts

# Fixtures.
__all__ = ["running", "server"]

SHARDS, EACH = 16, 6
COUNT = SHARDS * EACH


def samples() -> list[dict[str, Any]]:
    return numbered(COUNT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_layouts(tmp_path_factory.mktemp("ahead"), samples(), max_samples=EACH, block_size=3)


def keys(batch: list[Any]) -> list[str]:
    return [sample["__key__"] for sample in batch]


def open_stream(corpus: Any, index: Any = None, **options: Any) -> ShardStream:
    given = {"collate_fn": list, "max_tokens": 200, "window": 4 * EACH, "transport": PATIENT}
    return ShardStream(corpus, index, **given | options)


# --- streams


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stream_fetches_the_shards_of_its_next_windows_together(server: Faulty, folder: Path, layout: str) -> None:
    stream = open_stream(server.url(f"{layout}.ltx"), transport=ONCE)
    local = open_stream(folder / f"{layout}.ltx")
    # A window is four shards. Eight are asked for before one is answered; fewer would end with an error.
    server.gather(8)
    iterator = iter(stream)
    read = [next(iterator)]
    server.gather(0)
    read += list(iterator)
    for batch, expected in zip(read, local, strict=True):
        for sample, written in zip(batch, expected, strict=True):
            assert_same(sample, written)
    log = server.log()
    # The bytes of each shard: their number tells its size. Red when it was asked for first.
    shards = [entry for entry in log if entry["name"].endswith(".tar")]
    assert len(shards) == SHARDS
    transfers = stream.transfers
    assert transfers["requests"] == len(shards)
    assert transfers["bytes"] == sum((folder / f"{layout}-{number:06}.tar").stat().st_size for number in range(SHARDS))
    assert transfers["waited_seconds"] > 0
    assert [keys(batch) for batch in stream] == [keys(batch) for batch in local]


@pytest.mark.parametrize("change", [-512, 512, None])
def test_a_shard_that_is_another_one_now_is_named(tmp_path: Path, change: int | None) -> None:
    """Its size is not asked for before it is fetched."""
    folder = write_layouts(tmp_path, numbered(12), max_samples=6)
    shard = folder / "plain-000001.tar"
    content = shard.read_bytes()
    if change is None:
        shard.unlink()
    else:
        shard.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with faulty(folder) as server, pytest.raises((ValueError, FileNotFoundError)) as failed:
        list(open_stream(server.url("plain.ltx")))
    size = len(content)
    expected = "no shard" if change is None else f"{size + change} bytes, the index says {size}: changed since it was"
    assert f"{expected}" in str(failed.value)
    assert "plain-000001.tar" in str(failed.value)


def test_what_a_stream_reads_ahead_is_bounded(server: Faulty, folder: Path) -> None:
    size = (folder / "blocks-000000.tar").stat().st_size
    for limit, least, most in ((3 * size, 4 + 2, 4 + 4), (1, 4 + 1, 4 + 1), (0, 4, 4)):
        stream = open_stream(server.url("blocks.ltx"), read_ahead_bytes=limit)
        server.log()
        iterator = iter(stream)
        next(iterator)
        # Only what is taken makes room for more.
        while len(stream.data._reader.shards._ahead) and not all(  # type: ignore[attr-defined]
            future.done()
            for future, _ in stream.data._reader.shards._ahead._results.values()  # type: ignore[attr-defined]
        ):
            sleep(0.01)
        fetched_shards = {entry["name"] for entry in server.log() if entry["method"] == "GET"} - {"blocks.ltx"}
        assert least <= len(fetched_shards) <= most, limit
        assert len(list(iterator)) == len(stream) - 1


@pytest.mark.parametrize(("workers", "limit"), [(0, 2000), (2, 1 << 26)])
def test_a_stream_that_reads_ahead_resumes_where_it_stopped(
    server: Faulty, folder: Path, workers: int, limit: int
) -> None:
    stream = open_stream(server.url("plain.ltx"), read_ahead_bytes=limit, interleave=2)
    local = open_stream(folder / "plain.ltx", interleave=2)
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    begun = iter(loader)
    next(begun)
    del begun
    local.set_epoch(1)
    assert [keys(batch) for batch in loader] == [keys(batch) for batch in local]
    stream.seek(local.position(3))
    local.seek(local.position(3))
    rest = [keys(batch) for batch in loader]
    assert rest == [keys(batch) for batch in local]
    assert stream.transfers["requests"] > SHARDS
    # Two passes at once share what is read ahead, and each still gets its own batches.
    twice = copy.deepcopy(stream)
    pairs = list(zip(iter(twice), iter(pickle.loads(pickle.dumps(stream))), strict=True))
    assert [keys(first) for first, _ in pairs] == [keys(second) for _, second in pairs]


def test_a_shard_that_cannot_be_fetched_ahead_is_an_error_in_its_turn(server: Faulty) -> None:
    stream = open_stream(server.url("blocks.ltx"), transport=Transport(retries=0, patience=0))
    # Window by window, without what was read ahead.
    shards = [{key // EACH for key in batch} for batch in stream.plan(0).batches]
    first = set().union(*shards[: len(shards) // 4])
    bad = next(shard for shard in range(SHARDS) if shard not in first)
    name = f"blocks-{bad:06}.tar"
    server.behave(refused=name)
    iterator = iter(stream)
    next(iterator)
    with pytest.raises(PermissionError, match=name):
        list(iterator)


def test_a_large_shard_is_fetched_in_parts_side_by_side(
    server: Faulty, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folder / "plain-000002.tar").stat().st_size
    monkeypatch.setattr(fetched, "PART", size // 4 + 1)
    monkeypatch.setattr(remote, "_GIVE_RANGES", set())
    stream = open_stream(server.url("plain-000002.tar"), folder / "plain-000002.tar.ltx", window=EACH)
    assert sorted(keys([sample for batch in stream for sample in batch])) == [f"k{each}" for each in range(12, 18)]
    ranges = [entry["range"] for entry in server.log() if entry["method"] == "GET"]
    # One byte, to learn that the server gives ranges, and four parts.
    parts = [[start, min(start + fetched.PART, size) - 1] for start in range(0, size, fetched.PART)]
    assert sorted(ranges) == [[0, 0], *parts]
    server.behave(ranges=False)
    monkeypatch.setattr(remote, "_GIVE_RANGES", set())
    assert len(list(open_stream(server.url("plain-000003.tar"), folder / "plain-000003.tar.ltx"))) > 0


# --- batches by index


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dataset_reads_along_the_plan_of_its_sampler(server: Faulty, folder: Path, layout: str) -> None:
    dataset = ShardDataset(server.url(f"{layout}.ltx"), transport=ONCE)
    local = ShardDataset(folder / f"{layout}.ltx")
    sampler = LengthBucketBatchSampler(dataset.index, batch_size=8)
    expected = LengthBucketBatchSampler(local.index, batch_size=8)
    loader = DataLoader(dataset.follow(sampler), batch_sampler=sampler, collate_fn=PadCollator.for_sampler(sampler))
    others = DataLoader(local, batch_sampler=expected, collate_fn=PadCollator.for_sampler(expected))
    for _ in range(2):
        for batch, other in zip(loader, others, strict=True):
            assert batch["__key__"] == other["__key__"]
            assert (batch["tokens"].padded == other["tokens"].padded).all()
    # All headers are known now, so that a batch of at most 16 values is one round; none is answered before 24 come.
    server.log()
    server.gather(24)
    next(iter(loader))
    server.gather(0)
    assert len(server.log()) >= 24


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_read_along_the_plan_over_epochs_and_jumps(server: Faulty, folder: Path, workers: int) -> None:
    dataset = ShardDataset(server.url("blocks.ltx"), transport=PATIENT)
    sampler = LengthBucketBatchSampler(dataset.index, batch_size=8)
    dataset.follow(sampler)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=keys,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    names = ShardDataset(folder / "blocks.ltx").index.keys
    for epoch in (0, 1, 7, 2):
        sampler.set_epoch(epoch)
        assert list(loader) == [[names[row] for row in batch] for batch in sampler.plan(epoch).batches]
    sampler.seek(sampler.position(5))
    assert list(loader) == [[names[row] for row in batch] for batch in list(sampler.plan(2).batches)[5:]]


def test_a_step_of_another_epoch_is_not_taken_from_this_one(server: Faulty) -> None:
    """Red when what was read ahead went by its step alone: step 5 of the next epoch gave step 5 of this one."""
    dataset = ShardDataset(server.url("plain.ltx"), transport=PATIENT)
    sampler = LengthBucketBatchSampler(dataset.index, batch_size=8)
    dataset.follow(sampler)
    dataset.__getitems__(next(iter(sampler)))
    # A resumed loop of another library takes batches from the sampler, and skips the first ones.
    skipped = list(sampler)[5]
    assert keys(list(dataset.__getitems__(skipped))) == [f"k{row}" for row in skipped]
    # Two epochs side by side, and two in different threads.
    epochs = [list(sampler.plan(epoch).batches) for epoch in (1, 2)]
    for pair in zip(*epochs, strict=True):
        for batch in pair:
            assert keys(list(dataset.__getitems__(batch))) == [f"k{row}" for row in batch]
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda batch: keys(list(dataset.__getitems__(batch))), epochs[0] + epochs[1]))
    assert read == [[f"k{row}" for row in batch] for batch in epochs[0] + epochs[1]]


def test_a_dataset_reads_what_the_plan_does_not_have(server: Faulty) -> None:
    dataset = ShardDataset(server.url("plain.ltx"), transport=PATIENT)
    sampler = LengthBucketBatchSampler(dataset.index, batch_size=8)
    dataset.follow(sampler)
    for rows in ([5], [70, 2, 2], [], list(sampler.plan(3).batches[4])):
        for sample, row in zip(dataset.__getitems__(rows), rows, strict=True):
            assert_same(sample, samples()[row])
    assert_same(dataset[9], samples()[9])
    loader = ReadAheadLoader(dataset, batch_sampler=sampler, collate_fn=keys)
    assert sorted(key for batch in loader for key in batch) == sorted(keys(samples()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sampler must be a LengthBucketBatchSampler.*got a list"):
        dataset.follow([[1]])
    with pytest.raises(ValueError, match='rank="all" cannot be followed'):
        dataset.follow(LengthBucketBatchSampler(dataset.index, batch_size=8, num_replicas=2, rank="all"))
    with pytest.raises(ValueError, match="read_ahead_bytes must be at least 0, got -1"):
        ShardDataset(server.url("plain.ltx"), read_ahead_bytes=-1)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=20, max_size=80),
    every=st.integers(1, 4),
    epoch=st.integers(0, 3),
    taken=st.integers(0, 3),
    rank=st.integers(0, 1),
)
def test_a_follower_finds_each_batch_and_those_behind_it(
    lengths: list[int], every: int, epoch: int, taken: int, rank: int
) -> None:
    sampler = LengthBucketBatchSampler(lengths, batch_size=4, num_replicas=2, rank=rank)
    sampler.set_epoch(epoch)
    if taken < len(sampler):
        sampler.seek(sampler.position(taken))
    follower = pickle.dumps(sampler.follower())
    batches = list(pickle.loads(pickle.dumps(sampler)))
    sampler.set_epoch(epoch + 1)
    again = list(sampler)
    for first in range(min(every, len(batches))):
        # As in a worker, which has a copy that was made before the epoch began.
        worker = pickle.loads(follower)
        mine = batches[first::every]
        for number, batch in enumerate(mine):
            step = worker.find(np.array(batch), every)
            assert step is not None
            behind = worker.batch_at(step + every, every)
            assert (None if behind is None else behind.tolist()) == (mine[number + 1 :] or [None])[0]
        # In the next epoch, a worker that stays.
        assert worker.find(np.array(again[first]), every) is not None


def test_calls_in_advance_keep_to_their_bound_and_their_errors() -> None:
    counts = Counts()
    ahead: ReadAhead[int] = ReadAhead(10, counts)
    assert ahead.start("large", 100, lambda: 1)
    assert not ahead.start("small", 1, lambda: 2)
    assert ahead.take("large", lambda: 0) == 1
    assert ahead.start("small", 4, lambda: 2)
    assert ahead.start("wrong", 6, lambda: 1 // 0)
    assert not ahead.start("more", 1, lambda: 3)
    with pytest.raises(ZeroDivisionError):
        ahead.take("wrong", lambda: 0)
    assert ahead.take("unknown", lambda: 5) == 5
    ahead.forget()
    assert len(ahead) == 0
    assert ahead.free_bytes == 10
    assert ahead.take("small", lambda: 6) == 6
