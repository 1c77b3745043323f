"""Bucketing streams: the stage in webdataset's pipelines, the node among torchdata's, saved at every batch."""

import gc
import logging
import multiprocessing
import pickle
import random
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchdata.nodes as tn
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from collate import LengthError
from samplers.dynamic.node import SNAPSHOT_EVERY, LengthBucketNode
from samplers.dynamic.stage import bucket_by_length

Batches = list[list[Any]]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, ValueError, "a budget must be given"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": True}, TypeError, "max_tokens must be an int, got True"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an int, got 2.0"),
        ({"max_tokens": 1, "buffer_size": 0}, ValueError, "buffer_size must be at least 1, got 0"),
        ({"max_tokens": 1, "max_wait": -1}, ValueError, "max_wait must be at least 1, got -1"),
        ({"max_tokens": 1, "max_bytes": 0}, ValueError, "max_bytes must be at least 1, got 0"),
        ({"max_tokens": 1, "max_bytes": 2.0}, TypeError, "max_bytes must be an int, got 2.0"),
        ({"max_tokens": 1, "overlong": "cut"}, ValueError, "overlong must be 'error', 'drop' or 'alone', got 'cut'"),
    ],
)
def test_bad_options_are_refused_when_the_stage_or_the_node_is_made(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        bucket_by_length(len, **options)
    with pytest.raises(kind, match=message):
        LengthBucketNode(tn.IterableWrapper([]), len, **options)


@pytest.mark.parametrize("length", [None, True, 2.5, ["x"]])
def test_a_length_that_is_neither_function_nor_field_is_refused(length: Any) -> None:
    with pytest.raises(TypeError, match="length must be a function or the name or number of a field, got"):
        bucket_by_length(length, batch_size=2)


@pytest.mark.parametrize(
    "sequence", [[1, 2], "ab", b"ab", np.zeros((2, 5)), torch.zeros(2, 5), 2, np.int32(2), np.array(2), torch.tensor(2)]
)
def test_a_length_is_that_of_a_sequence_or_a_number_itself(sequence: Any) -> None:
    long, short = {"x": sequence}, {"x": 1}
    assert list(bucket_by_length("x", batch_size=2)([long, short])) == [[short, long]]
    assert list(bucket_by_length(1, batch_size=2)([(0, sequence), (0, 1)])) == [[(0, 1), (0, sequence)]]
    assert list(bucket_by_length(lambda sample: 3, max_tokens=3)([long])) == [[long]]


def test_a_length_that_cannot_be_read_is_an_error_that_says_why() -> None:
    with pytest.raises(KeyError, match="length names the field 'y', the sample has .'x', 'n'."):
        list(bucket_by_length("y", batch_size=2)([{"x": 1, "n": 2}]))
    with pytest.raises(KeyError, match="length names the field 2, the sample has 0 to 1"):
        list(bucket_by_length(2, batch_size=2)([(1, 2)]))
    for value, kind in ((-1, ValueError), (1.5, TypeError), (np.array(1.5), TypeError), (None, TypeError)):
        with pytest.raises(kind, match="length must be"):
            list(bucket_by_length("n", batch_size=2)([{"n": value}]))
    with pytest.raises(LengthError, match=r"at arrival 1 \(key 'b'\) has 30 steps, which alone exceeds the budget"):
        list(bucket_by_length("n", max_tokens=20)([{"n": 3}, {"__key__": "b", "n": 30}]))


def test_a_stage_keeps_nothing_between_runs() -> None:
    stage = bucket_by_length(len, max_tokens=6, buffer_size=3)
    words = ["ab", "cde", "f", "gh", "ijk"]
    first, second = stage(words), stage(words)
    interleaved = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert interleaved[::2] == interleaved[1::2] == list(stage(words))
    assert list(stage([])) == []


class Weighed:
    """An iterable of byte strings that knows, whenever it is asked for the next, what is held of those before."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.held, self.most = sizes, 0, 0

    def __iter__(self) -> Iterator[bytes]:
        for size in self.sizes:
            self.most = max(self.most, self.held)
            sample = bytes(size)
            self.held += sys.getsizeof(sample)
            yield sample

    def give_back(self, batch: list[bytes]) -> list[bytes]:
        self.held -= sum(map(sys.getsizeof, batch))
        return batch


@given(st.lists(st.integers(0, 400), max_size=80), st.integers(1, 40), st.integers(1, 4000), st.booleans())
def test_no_source_is_asked_for_more_while_more_bytes_wait_than_max_bytes(
    sizes: list[int], buffer_size: int, max_bytes: int, as_node: bool
) -> None:
    source = Weighed(sizes)
    options: dict[str, Any] = {"max_tokens": 1000, "buffer_size": buffer_size, "max_bytes": max_bytes}
    node: LengthBucketNode[bytes] = LengthBucketNode(tn.IterableWrapper(source), len, **options)
    running = started(node) if as_node else bucket_by_length(len, **options)(source)
    batches = [source.give_back(batch) for batch in running]
    assert source.most <= max_bytes
    assert source.held == 0
    assert sorted(len(sample) for batch in batches for sample in batch) == sorted(sizes)


def test_what_was_dropped_set_apart_or_cut_off_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    list(bucket_by_length(int, max_tokens=5, overlong="drop")([3, 9, 8]))
    list(bucket_by_length(int, max_tokens=5, overlong="alone")([3, 9]))
    assert "of 3 samples 2 over the budget were dropped, and 0 are a batch of one" in caplog.text
    assert "of 2 samples 0 over the budget were dropped, and 1 are a batch of one" in caplog.text
    with caplog.at_level(logging.INFO):
        running = bucket_by_length(int, max_tokens=5, buffer_size=2)([3, 3, 3, 3])
        next(running)
        running.close()
    assert "closed with 1 samples in the buffer, which no batch held" in caplog.text


# --- in webdataset


def sample_stream(count: int = 120) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [{"__key__": str(index), "x": [index] * rng.randint(1, 30)} for index in range(count)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Plain shards that webdataset wrote itself."""
    folder: Path = tmp_path_factory.mktemp("plain")
    for number in range(4):
        with wds.TarWriter(str(folder / f"{number}.tar"), mtime=0) as writer:
            for sample in sample_stream()[number::4]:
                writer.write({"__key__": sample["__key__"], "txt": " ".join(map(str, sample["x"]))})
    return [str(folder / f"{number}.tar") for number in range(4)]


def count_words(sample: dict[str, Any]) -> int:
    return len(sample["txt"].split())


# webdataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("composed", [False, True])
def test_the_stage_works_in_webdataset_pipelines(shards: list[str], workers: int, composed: bool) -> None:
    stage = pickle.loads(pickle.dumps(bucket_by_length(count_words, max_tokens=100, buffer_size=20)))
    if composed:
        data = wds.WebDataset(shards, shardshuffle=False, workersplitter=wds.split_by_worker).compose(stage)
    else:
        data = wds.DataPipeline(wds.SimpleShardList(shards), wds.split_by_worker, wds.tarfile_to_samples(), stage)
    for _ in range(2):
        batches = list(wds.WebLoader(data, batch_size=None, num_workers=workers))
        keys = [sample["__key__"] for batch in batches for sample in batch]
        assert sorted(keys) == sorted(sample["__key__"] for sample in sample_stream())
        assert all(len(batch) * max(map(count_words, batch)) <= 100 for batch in batches)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_nodes_and_their_workers_share_the_shards_out(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = bucket_by_length(count_words, max_tokens=100, buffer_size=20)
    keys = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        data = wds.DataPipeline(
            wds.SimpleShardList(shards), wds.split_by_node, wds.split_by_worker, wds.tarfile_to_samples(), stage
        )
        # A fork server, the default of Python 3.14, keeps the environment in which it has started: the first rank's.
        start = "spawn" if multiprocessing.get_start_method() == "forkserver" else None
        batches = list(wds.WebLoader(data, batch_size=None, num_workers=2, multiprocessing_context=start))
        keys.append([sample["__key__"] for batch in batches for sample in batch])
    assert sorted(keys[0] + keys[1]) == sorted(sample["__key__"] for sample in sample_stream())
    assert all(len(own) == len(sample_stream()) // 2 for own in keys)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_an_epoch_of_resampled_shards_is_cut_and_the_cut_is_logged(
    shards: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    stage = bucket_by_length(count_words, max_tokens=100, buffer_size=20)
    data = wds.DataPipeline(wds.ResampledShards(shards, deterministic=True), wds.tarfile_to_samples(), stage)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            batches = list(data.with_epoch(15))
            assert len(batches) == 15
            assert all(len(batch) * max(map(count_words, batch)) <= 100 for batch in batches)
            gc.collect()
    assert len(re.findall(r"closed with \d+ samples in the buffer, which no batch held", caplog.text)) == 2


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_what_a_handler_passes_over_is_all_that_is_missing(shards: list[str], tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    # In the eleventh member's data; where a header should be, tarfile takes anything for the end.
    cut.write_bytes(Path(shards[0]).read_bytes()[: 10 * 1024 + 512 + 1])

    def refuse(sample: dict[str, Any]) -> dict[str, Any]:
        if sample["__key__"] == "1":
            raise ValueError("a bad sample")
        return sample

    stage = bucket_by_length(count_words, max_tokens=100, buffer_size=20)
    passed: set[type[Exception]] = set()

    def note(error: Exception) -> bool:
        passed.add(type(error))
        return True

    paths = [str(cut), *shards[1:]]
    data = wds.DataPipeline(
        wds.SimpleShardList(paths), wds.tarfile_to_samples(handler=note), wds.map(refuse, handler=note), stage
    )
    keys = {sample["__key__"] for batch in data for sample in batch}
    assert passed == {tarfile.ReadError, ValueError}
    lost = {sample["__key__"] for sample in sample_stream()[::4][10:]} | {"1"}
    assert keys == {sample["__key__"] for sample in sample_stream()} - lost
    # The same stage under webdataset's own, which raises: the error comes through.
    loud = wds.DataPipeline(wds.SimpleShardList(shards), wds.tarfile_to_samples(), wds.map(refuse), stage)
    with pytest.raises(ValueError, match="a bad sample"):
        list(loud)
    # webdataset leaves its files open, and pytest would tell of it in another test.
    del data, loud
    gc.collect()


# --- in torchdata


class Numbers(tn.BaseNode[int]):
    """A source that counts what is asked of it, and whose state is one live list: the worst that a source may do."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.lengths, self.saves, self.reads = lengths, 0, 0

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.place = initial_state["place"] if initial_state else [0]

    def next(self) -> int:
        self.reads += 1
        if self.place[0] >= len(self.lengths):
            raise StopIteration
        self.place[0] += 1
        return self.lengths[self.place[0] - 1]

    def get_state(self) -> dict[str, Any]:
        self.saves += 1
        return {"place": self.place}


def identity(value: Any) -> Any:
    return value


def node(kind: str) -> tn.BaseNode[Any]:
    source: tn.BaseNode[Any] = tn.IterableWrapper(sample_stream())
    if kind == "mapped source":
        source = tn.ParallelMapper(source, identity, num_workers=2, method="thread")
    bucketed: LengthBucketNode[Any] = LengthBucketNode(source, "x", max_tokens=100, buffer_size=16)
    wrap: dict[str, Callable[[], tn.BaseNode[Any]]] = {
        "mapper": lambda: tn.Mapper(bucketed, identity),
        "prefetcher": lambda: tn.Prefetcher(bucketed, prefetch_factor=3),
        "prefetcher, rare snapshots": lambda: tn.Prefetcher(bucketed, prefetch_factor=3, snapshot_frequency=4),
        "parallel mapper": lambda: tn.ParallelMapper(bucketed, identity, num_workers=2, method="thread"),
        "unbatcher": lambda: tn.Batcher(tn.Unbatcher(bucketed), batch_size=5),
    }
    return wrap.get(kind, lambda: bucketed)()


KINDS = ["plain", "mapped source", "mapper", "prefetcher", "prefetcher, rare snapshots", "parallel mapper", "unbatcher"]


def started(running: tn.BaseNode[Any], state: dict[str, Any] | None = None) -> tn.BaseNode[Any]:
    running.reset(state)
    return running


def drain(running: Iterator[Any]) -> Batches:
    found = []
    while True:
        try:
            found.append(next(running))
        except StopIteration:
            return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_saved_at_any_batch_goes_on_exactly_also_on_the_second_save(kind: str) -> None:
    whole = drain(started(node(kind)))
    for cut in range(0, len(whole) + 1, 1 if kind in {"plain", "mapper"} else 3):
        first = started(node(kind))
        taken = [next(first) for _ in range(cut)]
        second = started(node(kind), pickle.loads(pickle.dumps(first.state_dict())))
        taken += [next(second) for _ in range(min(2, len(whole) - cut))]
        third = started(node(kind), pickle.loads(pickle.dumps(second.state_dict())))
        assert taken + drain(third) == whole


@pytest.mark.parametrize("kind", ["plain", "prefetcher", "parallel mapper"])
def test_a_loader_saved_at_any_batch_resumes_exactly_and_continues(kind: str) -> None:
    whole = drain(started(node(kind)))
    for cut in range(0, len(whole), 4):
        first = tn.Loader(node(kind))
        running = iter(first)
        taken = [next(running) for _ in range(cut)]
        second = tn.Loader(node(kind))
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        assert taken + list(second) == whole
        assert list(second) == whole


@given(
    st.lists(st.integers(0, 30), max_size=300),
    st.integers(1, 90),
    st.sampled_from(["drop", "alone"]),
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
    st.none() | st.integers(1, 3000),
)
def test_a_node_loses_nothing_over_many_saves_of_a_live_state(
    lengths: list[int], buffer_size: int, overlong: Any, cuts: list[int], max_bytes: int | None
) -> None:
    options: dict[str, Any] = {"buffer_size": buffer_size, "overlong": overlong, "max_bytes": max_bytes}

    def new() -> LengthBucketNode[int]:
        return LengthBucketNode(Numbers(lengths), identity, max_tokens=25, **options)

    expected, done, state, kept = drain(started(new())), [], None, []
    for cut in cuts:
        running = started(new(), state)
        done += [batch for _, batch in zip(range(cut), running, strict=False)]
        state = running.state_dict()
        kept.append((len(done), state, pickle.dumps(state)))
        drain(running)
    assert done + drain(started(new(), state)) == expected
    for taken, saved, bytes_then in kept:
        assert pickle.dumps(saved) == bytes_then
        assert drain(started(new(), saved)) == expected[taken:]


def test_a_source_s_state_is_read_rarely_and_little_is_read_again() -> None:
    source = Numbers([3] * 2000)
    running = started(LengthBucketNode(source, identity, max_tokens=12, buffer_size=100))
    for _ in range(300):
        next(running)
        running.state_dict()
    assert source.saves <= 1 + 1300 // SNAPSHOT_EVERY
    again = Numbers([3] * 2000)
    resumed = started(LengthBucketNode(again, identity, max_tokens=12, buffer_size=100), running.state_dict())
    next(resumed)
    assert again.reads <= SNAPSHOT_EVERY + 3 * 100


def test_a_node_gives_epoch_after_epoch_and_keeps_raising_at_the_end() -> None:
    loader = tn.Loader(node("plain"))
    first, second = list(loader), list(loader)
    assert first == second
    assert sorted(sample["__key__"] for batch in first for sample in batch) == sorted(map(str, range(120)))
    source = Numbers([1, 2, 3])
    plain = started(LengthBucketNode(source, identity, batch_size=1))
    drain(plain)
    assert source.reads == 4
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(plain)
    assert drain(started(LengthBucketNode(source, identity, batch_size=1), plain.state_dict())) == []


def test_a_node_counts_and_reports_what_it_drops(caplog: pytest.LogCaptureFixture) -> None:
    dropping = LengthBucketNode(Numbers([1, 9, 9, 2]), identity, max_tokens=5, overlong="drop")
    apart = LengthBucketNode(Numbers([1, 9, 2]), identity, max_tokens=5, overlong="alone")
    assert (dropping.dropped, apart.alone) == (0, 0)
    assert [drain(started(dropping)), drain(started(apart))] == [[[1, 2]], [[1, 2], [9]]]
    assert (dropping.dropped, apart.alone) == (2, 1)
    assert "of 4 samples 2 over the budget were dropped" in caplog.text


def test_a_node_that_goes_on_after_an_error_stays_in_step_with_its_source() -> None:
    lengths = [3, 4, 99, 2, 5, -1, 3, 4]
    running = started(LengthBucketNode(Numbers(lengths), identity, max_tokens=10, buffer_size=2))
    found: list[int] = []
    errors = 0
    states = []
    while True:
        try:
            found += next(running)
        except StopIteration:
            break
        except ValueError:
            errors += 1
        states.append((list(found), running.state_dict()))
    assert errors == 2
    assert sorted(found) == [2, 3, 3, 4, 4, 5]
    rest: LengthBucketNode[int] = LengthBucketNode(Numbers(lengths), identity, max_tokens=10, buffer_size=2)
    seen, state = states[-2]
    assert sorted(seen + [length for batch in drain(started(rest, state)) for length in batch]) == sorted(found)


def test_a_state_of_a_longer_source_or_another_version_is_refused() -> None:
    running = started(LengthBucketNode(Numbers([3] * 50), identity, batch_size=4, buffer_size=8))
    for _ in range(9):
        next(running)
    state = running.state_dict()
    with pytest.raises(ValueError, match="ended 16 samples before the oldest that waited"):
        started(LengthBucketNode(Numbers([3] * 20), identity, batch_size=4, buffer_size=8), state)
    with pytest.raises(ValueError, match="it lacks bucketer, source, source_arrival: start without a state"):
        started(LengthBucketNode(Numbers([3] * 50), identity, batch_size=4, buffer_size=8), {"version": 1})
    state["bucketer"]["version"] = 0
    with pytest.raises(ValueError, match="must be of version 1, got version 0"):
        started(LengthBucketNode(Numbers([3] * 50), identity, batch_size=4, buffer_size=8), state)
