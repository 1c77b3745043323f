"""Corrupt samples of shards: skipped where a handler says so, counted, within limits, and without moving the rest.

All tests were red before: `handler=` was unknown, and one damaged sample ended a run.
"""

import errno
import json
import os
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import webdataset as wds
from corpora import LAYOUTS, assert_same, write
from faults import cut, flip_bits, splice
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import LengthError, PadCollator
from samplers import LengthBucketBatchSampler, ShardDataset, ShardStream
from samplers.shards.opening.open_shards import OpenShards
from samplers.shards.skipping import IN_A_ROW

COUNT, PER_SHARD = 300, 40
KEYS = [f"{index:03}" for index in range(COUNT)]
SKIP = wds.ignore_and_continue


def sample(index: int) -> dict[str, npt.NDArray[Any] | str]:
    return {"__key__": KEYS[index], "x": np.full(1 + index * 7 % 39, index, np.int32)}


@pytest.fixture(scope="module", params=LAYOUTS)
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return write(folder, map(sample, range(COUNT)), layout=request.param, max_samples=PER_SHARD, block_size=16)


@pytest.fixture
def corpus(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "corpus"))


def shard_of(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06}.tar"


def flip(folder: Path, *indices: Any) -> None:
    """Another bit in the payload of samples."""
    index = ShardDataset(folder).index
    for sample_index in indices:
        number = int(np.searchsorted(index.starts, sample_index, side="right")) - 1
        with shard_of(folder, number).open("r+b") as file:
            # Behind the array's own header, in the plain layout.
            offset = int(index._tables.offsets[sample_index, 0]) + (128 if index._tables.layout == "plain" else 0)
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 64]))


def truncate(folder: Path) -> None:
    os.truncate(shard_of(folder, 2), shard_of(folder, 2).stat().st_size - 700)


def change(folder: Path) -> None:
    other = write(folder.parent / "other", map(sample, range(90, 100)))
    shutil.copy(shard_of(other, 0), shard_of(folder, 2))


def remove(folder: Path) -> None:
    shard_of(folder, 2).unlink()


SECOND = range(80, 120)
FLIPPED = [0, 57, 58, 130, 299]
DAMAGES = {
    "truncated": (truncate, SECOND, "damaged"),
    "changed": (change, SECOND, "damaged"),
    "missing": (remove, SECOND, "missing"),
    "flipped": (lambda folder: flip(folder, *FLIPPED), FLIPPED, "damaged"),
}
# Processes that are started again take their time: one kind of damage is enough for them.
processes = pytest.mark.parametrize(
    ("damage", "context"),
    [*((damage, context) for damage in DAMAGES for context in (None, "fork")), ("flipped", "spawn")],
)
damages = pytest.mark.parametrize("damage", DAMAGES)


def spoil(folder: Path, damage: str) -> tuple[set[Any], dict[str, dict[str, int]]]:
    """Damage a corpus.

    Returns:
        Keys that are lost, and what is to be counted.
    """
    act, lost, reason = DAMAGES[damage]
    act(folder)
    counts = Counter(str(shard_of(folder, index // PER_SHARD)) for index in lost)
    return {KEYS[index] for index in lost}, {shard: {reason: count} for shard, count in sorted(counts.items())}


def keys(samples: list[dict[str, npt.NDArray[Any] | str]]) -> list[str]:
    return [each["__key__"] for each in samples]


def stream(folder: Path, **options: Any) -> ShardStream:
    options = {"collate_fn": keys, "batch_size": 24, "window": 150, "handler": SKIP, "max_failed": 0.5} | options
    return ShardStream(folder, **options)


def without(batches: list[list[str]], lost: set[Any]) -> list[list[str]]:
    return [[key for key in batch if key not in lost] for batch in batches]


# --- by index


@processes
def test_a_loader_goes_on_without_corrupt_samples_and_counts_them(
    corpus: Path, damage: str, context: str | None
) -> None:
    sampler = LengthBucketBatchSampler(ShardDataset(corpus).index, batch_size=24, window=150)
    whole = list(DataLoader(ShardDataset(corpus), batch_sampler=sampler, collate_fn=keys))
    sampler.set_epoch(0)
    lost, counts = spoil(corpus, damage)
    data = ShardDataset(corpus, handler=SKIP, max_failed=0.5)
    assert data.skipped == {}
    workers = {"num_workers": 2, "multiprocessing_context": context} if context else {}
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=keys, **workers)
    assert list(loader) == without(whole, lost)
    # Workers have counted, and the main process reads.
    assert data.skipped == counts


@damages
def test_a_single_sample_is_never_skipped_nor_is_one_without_a_handler(corpus: Path, damage: str) -> None:
    lost, _ = spoil(corpus, damage)
    data = ShardDataset(corpus, handler=SKIP)
    index = KEYS.index(min(lost))
    for read in (data.__getitem__, lambda index: list(ShardDataset(corpus).__getitems__([150, index]))):
        with pytest.raises((ValueError, FileNotFoundError), match="shard-00000"):
            read(index)
    assert data.skipped == {}
    assert ShardDataset(corpus).skipped == {}


def test_an_index_of_another_version_is_refused_whatever_the_handler(corpus: Path) -> None:
    file = corpus / "shard.ltx"
    file.write_bytes(file.read_bytes()[:8] + b"\3\0\0\0" + file.read_bytes()[12:])
    with pytest.raises(ValueError, match="it has version 3, this program reads 1 and 2"):
        ShardDataset(corpus, handler=SKIP)


@given(st.lists(st.integers(-COUNT, COUNT - 1), max_size=40), st.sets(st.integers(0, COUNT - 1), max_size=30))
def test_what_is_left_of_a_batch_is_what_was_asked_for_without_the_lost(
    intact: Path, indices: list[int], lost: set[Any]
) -> None:
    class Lossy(ShardDataset):
        def _read(self, rows: npt.NDArray[Any]) -> list[dict[str, npt.NDArray[Any] | str]] | None:
            if lost & set(rows.tolist()):
                raise ValueError("a bad row")
            return super()._read(rows)

    data = Lossy(intact, handler=SKIP, max_failed=1)
    expected = [KEYS[index] for index in indices if index % COUNT not in lost]
    if indices and not expected:
        with pytest.raises(RuntimeError, match=f"none of a batch's {len(indices)} samples could be read"):
            data.__getitems__(indices)
        return
    assert keys(data.__getitems__(indices)) == expected
    assert sum(count for shard in data.skipped.values() for count in shard.values()) == len(indices) - len(expected)


def test_only_a_read_that_fails_is_repeated_in_parts(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(corpus, 57)
    sizes = []
    original = ShardDataset._read
    monkeypatch.setattr(ShardDataset, "_read", lambda self, rows: sizes.append(len(rows)) or original(self, rows))
    data = ShardDataset(corpus, handler=SKIP)
    data.__getitems__(range(80, 240))
    assert sizes == [160]
    sizes.clear()
    assert len(data.__getitems__(range(160))) == 159
    # Whole, its four shards, and in the one that is damaged halves down to the sample.
    assert len(sizes) <= 5 + 2 * 6


def test_a_missing_shard_is_tried_once_a_batch_not_once_a_sample(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(corpus)
    data = ShardDataset(corpus, handler=SKIP)
    opened: list[int] = []
    original = OpenShards.open
    monkeypatch.setattr(OpenShards, "open", lambda self, shard: opened.append(shard) or original(self, shard))
    assert len(data.__getitems__(range(60, 140))) == 40
    assert opened.count(2) <= 2


def test_a_batch_of_which_nothing_is_left_is_an_error_that_lists_it(corpus: Path) -> None:
    flip(corpus, 10, 11, 12)
    data = ShardDataset(corpus, handler=SKIP)
    assert data.__getitems__([]) == []
    with pytest.raises(RuntimeError, match="none of a batch's 3 samples could be read") as caught:
        data.__getitems__([10, 12, 11])
    assert all(f"sample {KEYS[index]!r} of {shard_of(corpus, 0)}" in str(caught.value) for index in (10, 11, 12))
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_hundred_failures_in_a_row_end_the_run_with_a_list(corpus: Path) -> None:
    for number in (2, 3, 4):
        shard_of(corpus, number).unlink()
    data = ShardDataset(corpus, handler=SKIP, max_failed=1)
    with pytest.raises(RuntimeError, match=f"^{IN_A_ROW} samples in a row could not be read") as caught:
        data.__getitems__(range(78, 210))
    assert f"{shard_of(corpus, 2)}: 40 missing" in str(caught.value)
    assert str(caught.value).count("\nsample '") == IN_A_ROW
    # A sample between them breaks the row, in another batch too.
    data = ShardDataset(corpus, handler=SKIP, max_failed=1)
    for indices in ([*range(80, 179), 0], [*range(80, 179), 1]):
        assert len(data.__getitems__(indices)) == 1
    data.__getitems__([0, *range(80, 140)])
    with pytest.raises(RuntimeError, match="in a row"):
        data.__getitems__([*range(80, 120), 1])


@given(st.integers(0, 30), st.sampled_from([0, 0.01, 0.05, 0.1, 1]))
def test_more_than_a_share_of_the_samples_ends_the_run(intact: Path, bad: int, share: float) -> None:
    lost = set(range(0, 8 * bad, 8))

    class Lossy(ShardDataset):
        def _read(self, rows: npt.NDArray[Any]) -> list[dict[str, npt.NDArray[Any] | str]] | None:
            if lost & set(rows.tolist()):
                raise ValueError("a bad row")
            return super()._read(rows)

    data = Lossy(intact, handler=SKIP, max_failed=share)
    ends = bad > share * COUNT

    def run() -> None:
        for epoch in range(2):
            for first in range(0, COUNT, 50):
                data.__getitems__(range(first, first + 50))
            assert sum(each["damaged"] for each in data.skipped.values()) == (epoch + 1) * bad

    if ends:
        with pytest.raises(RuntimeError, match=f"more than max_failed={share:g} of .*\nskipped so far:\n"):
            run()
    else:
        run()


def test_of_a_small_corpus_any_share_below_a_hundred_samples_is_spared(intact: Path) -> None:
    class Lossy(ShardDataset):
        def _read(self, rows: npt.NDArray[Any]) -> list[dict[str, npt.NDArray[Any] | str]] | None:
            if (rows % 3 > 0).any():
                raise ValueError("a bad row")
            return super()._read(rows)

    data = Lossy(intact, handler=SKIP)
    assert len(data.__getitems__(range(148))) == 50
    data.__getitems__([150, 151])
    with pytest.raises(RuntimeError, match="100 of 152 samples could not be read, more than max_failed=0.1 of 300"):
        data.__getitems__([153, 154])


def test_whatever_a_shard_has_become_the_rest_is_read_as_it_was_written(corpus: Path) -> None:
    shard = shard_of(corpus, 2)
    content = shard.read_bytes()
    lost_in_all = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        shard.write_bytes([flip_bits, cut, splice][seed % 3](rng, content))
        data = ShardDataset(corpus, handler=SKIP, max_failed=1)
        lost = set(range(COUNT))
        for first in range(0, COUNT, 60):
            for read in data.__getitems__(range(first, first + 60)):
                assert_same(read, sample(int(read["__key__"])))
                lost.remove(int(read["__key__"]))
        assert lost <= set(SECOND)
        assert sum(sum(reasons.values()) for reasons in data.skipped.values()) == len(lost)
        assert data.skipped.keys() <= {str(shard)}
        lost_in_all += len(lost)
    assert lost_in_all > 100


# --- what may be skipped


def decoding(error: Any) -> Callable[..., Any]:
    def decode(data: bytes) -> npt.NDArray[Any] | None:
        if len(np.frombuffer(data, "<i4", offset=128)) == 5:
            raise error
        return np.frombuffer(data, "<i4", offset=128)

    return decode


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    folder = write(tmp_path / "sounds", map(sample, range(40)), layout="plain")
    bad = [index for index in range(40) if len(sample(index)["x"]) == 5]
    assert len(bad) == 1
    return folder


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("x"), "damaged"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "x"), "damaged"),
        (LengthError("x"), "length"),
        (EOFError(), "unreadable"),
        (OSError("x"), "unreadable"),
        (zlib.error("x"), "damaged"),
        (struct.error("x"), "damaged"),
        (FileNotFoundError("x"), "missing"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_damage_that_a_function_of_the_user_meets_may_be_skipped(sounds: Path, error: Any, reason: str) -> None:
    data = ShardDataset(sounds, decode={"x": decoding(error)}, handler=SKIP)
    assert len(data.__getitems__(range(40))) == 39
    assert data.skipped == {str(shard_of(sounds, 0)): {reason: 1}}


@pytest.mark.parametrize(
    "error",
    [
        *(TypeError("x"), AttributeError("x"), NameError("x"), ImportError("x"), NotImplementedError("x")),
        *(MemoryError(), KeyError("x"), IndexError("x"), RuntimeError("x"), AssertionError("x"), ZeroDivisionError()),
        *(OSError(code, "x") for code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)),
        *(KeyboardInterrupt(), StopIteration("x")),
    ],
    ids=repr,
)
def test_an_error_of_the_program_is_never_skipped_and_no_handler_is_asked(sounds: Path, error: Any) -> None:
    asked = []
    data = ShardDataset(sounds, decode={"x": decoding(error)}, handler=lambda error: asked.append(error) or True)
    with pytest.raises(type(error)):
        data.__getitems__(range(40))
    assert asked == []
    assert data.skipped == {}


def test_a_length_that_is_not_that_of_the_index_is_counted_as_one(sounds: Path) -> None:
    def decode(data: bytes) -> npt.NDArray[Any]:
        values = np.frombuffer(data, "<i4", offset=128)
        return values[1:] if len(values) == 5 else values

    data = ShardDataset(sounds, decode={"x": decode}, handler=SKIP)
    assert len(data.__getitems__(range(40))) == 39
    assert data.skipped == {str(shard_of(sounds, 0)): {"length": 1}}


def test_handlers_of_webdataset_and_functions_decide(corpus: Path) -> None:
    flip(corpus, 3, 7)

    def read(handler: Callable[..., Any]) -> int | None:
        return len(ShardDataset(corpus, handler=handler).__getitems__(range(10)))

    seen = []
    assert read(lambda error: seen.append(str(error)) or "008" not in str(error)) == 8
    assert [f"sample '{KEYS[index]}'" in text for index, text in zip((3, 7), seen, strict=True)] == [True, True]
    with pytest.warns(UserWarning, match="checksum"):
        assert read(wds.warn_and_continue) == 8
    for handler in (wds.reraise_exception, wds.ignore_and_stop, lambda _: None, lambda error: error):
        with pytest.raises(ValueError, match="sample '003', field 'x'.*checksum"):
            read(handler)
    with pytest.raises(RuntimeError, match="my own"):
        read(lambda _: RuntimeError("my own"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"handler": "warn"}, TypeError, "handler must be a function from an error .*, got 'warn': give"),
        ({"handler": SKIP, "max_failed": "1"}, TypeError, "max_failed must be a number, got '1'"),
        ({"handler": SKIP, "max_failed": True}, TypeError, "max_failed must be a number, got True"),
        ({"handler": SKIP, "max_failed": 1.5}, ValueError, "max_failed must be a fraction of samples, 0 to 1, got 1.5"),
        ({"handler": SKIP, "max_failed": float("nan")}, ValueError, "max_failed must be a fraction"),
        ({"max_failed": -1}, ValueError, "max_failed must be a fraction of samples, 0 to 1, got -1"),
    ],
)
def test_a_wrong_handler_or_share_is_refused_at_once(
    intact: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    for make in (ShardDataset, partial(ShardStream, collate_fn=keys, batch_size=4)):
        with pytest.raises(error, match=message):
            make(intact, **options)


# --- as a stream


@processes
def test_a_stream_goes_on_without_corrupt_samples_and_its_plan_stands(
    corpus: Path, damage: str, context: str | None
) -> None:
    before = stream(corpus, handler=None)
    whole, length, shapes = list(before), len(before), before.shapes
    lost, counts = spoil(corpus, damage)
    data = stream(corpus)
    workers = {"num_workers": 2, "multiprocessing_context": context} if context else {}
    assert list(DataLoader(data, batch_size=None, **workers)) == without(whole, lost)
    assert (len(data), data.shapes) == (length, shapes)
    assert data.skipped == counts
    with pytest.raises((ValueError, FileNotFoundError), match="shard-00000"):
        list(stream(corpus, handler=None))


@damages
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_among_corrupt_samples_exactly(corpus: Path, damage: str, workers: int) -> None:
    whole = list(stream(corpus, handler=None))
    lost, _ = spoil(corpus, damage)
    expected = without(whole, lost)
    for steps in (1, len(whole) // 2, len(whole) - 1):
        loaders = [StatefulDataLoader(stream(corpus), batch_size=None, num_workers=workers) for _ in range(2)]
        running = iter(loaders[0])
        taken = [next(running) for _ in range(steps)]
        loaders[1].load_state_dict(loaders[0].state_dict())
        assert taken + list(loaders[1]) == expected


@damages
def test_replicas_stay_even_and_a_position_leads_to_other_numbers_of_them(corpus: Path, damage: str) -> None:
    whole = [stream(corpus, handler=None, num_replicas=2, rank=rank) for rank in range(2)]
    expected = [list(each) for each in whole]
    lost, counts = spoil(corpus, damage)
    replicas = [stream(corpus, num_replicas=2, rank=rank) for rank in range(2)]
    assert [list(each) for each in replicas] == [without(each, lost) for each in expected]
    seen = Counter()
    for each in replicas:
        for shard, reasons in each.skipped.items():
            seen[shard] += sum(reasons.values())
    assert seen == {shard: sum(reasons.values()) for shard, reasons in counts.items()}
    # Halfway, and on with one: positions do not know of the damage.
    halves = [stream(corpus, num_replicas=2, rank=rank) for rank in range(2)]
    taken = [batch for each in halves for _, batch in zip(range(3), each, strict=False)]
    position = json.loads(json.dumps(halves[0].position(3)))
    assert position == halves[1].position(3) == _position_of(whole[0], 3)
    last = stream(corpus)
    last.seek(position)
    assert sorted(key for batch in [*taken, *last] for key in batch) == sorted(set(KEYS) - lost)


def _position_of(data: ShardStream, steps: int) -> dict[str, int | str]:
    data.set_epoch(0)
    return data.position(steps)


def test_a_stream_that_loses_a_whole_batch_ends_there_and_not_before(corpus: Path) -> None:
    whole = list(stream(corpus, handler=None))
    flip(corpus, *map(int, whole[4]))
    running = iter(stream(corpus))
    assert [next(running) for _ in range(4)] == whole[:4]
    state = running.state_dict()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"none of a batch's {len(whole[4])} samples could be read"):
            next(running)
        assert running.state_dict() == state


def test_a_worker_tells_which_samples_ended_the_run(corpus: Path) -> None:
    truncate(corpus)
    loader = DataLoader(stream(corpus, max_failed=0.01), batch_size=None, num_workers=2)
    with pytest.raises(RuntimeError, match="more than max_failed=0.01 of") as caught:
        list(loader)
    assert f"of {shard_of(corpus, 2)}: ValueError: " in str(caught.value)


def test_batches_that_lose_samples_are_valid(corpus: Path) -> None:
    flip(corpus, *FLIPPED)
    total = 0
    for batch in stream(corpus, collate_fn=PadCollator(-1)):
        batch["x"].verify()
        total += len(batch["x"])
    assert total == COUNT - len(FLIPPED)


def test_a_copy_counts_by_itself_and_the_counts_go_on_over_epochs(corpus: Path) -> None:
    flip(corpus, *FLIPPED)
    data = ShardDataset(corpus, handler=SKIP)
    loader = DataLoader(data, batch_size=50, num_workers=2, collate_fn=keys)
    for epoch in (1, 2, 3):
        list(loader)
        assert sum(each["damaged"] for each in data.skipped.values()) == epoch * len(FLIPPED)
    # Two sets of workers of the same numbers at once.
    for _ in zip(loader, loader, strict=True):
        pass
    assert sum(each["damaged"] for each in data.skipped.values()) == 5 * len(FLIPPED)
