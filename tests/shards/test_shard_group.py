"""Shards that get their names together: complete or absent, in order, with as few flushes as that takes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import files, tokens, write

from samplers import LengthIndex, ShardDataset, ShardWriter
from samplers.shards.storage.atomic import AtomicFile, commit_in_stages
from samplers.shards.writing import shard_group


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards but the first wait, however fast the disk is."""
    monkeypatch.setattr(shard_group, "PATIENCE", float("inf"))


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The file descriptors that were flushed."""
    flushed: list[int] = []
    flush = os.fsync

    def count(descriptor: int) -> None:
        flushed.append(descriptor)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", count)
    return flushed


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shard_names(count: int, suffix: str = "", first: int = 0) -> list[str]:
    return [f"shard-{number:06}.tar{each}{suffix}" for number in range(first, count) for each in ("", ".ltx")]


@pytest.mark.usefixtures("waits")
def test_forty_small_shards_take_two_flushes_each_and_few_more(tmp_path: Path, flushes: list[int]) -> None:
    write(tmp_path, tokens([3] * 80), max_samples=2)
    # The first alone, 16 together twice and 7 at the end, each group with its folder twice; then the corpus file.
    assert len(flushes) == 2 * 40 + 2 * 4 + 2
    assert names(tmp_path) == sorted([*shard_names(40), "shard.ltx"])
    LengthIndex.open(tmp_path / "shard.ltx").verify(checksums=True)


@pytest.mark.usefixtures("waits")
def test_shards_wait_under_temporary_names_and_count_when_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_samples=1) as writer:
        for sample in tokens([3, 4, 5, 6]):
            writer.write(sample)
        # The fourth is not finished. The second and third are, and wait.
        waiting = [*shard_names(3, ".tmp", 1), "shard-000003.tar.tmp"]
        assert names(tmp_path) == sorted([*shard_names(1), *waiting])
        assert [path.name for path in writer.shards] == ["shard-000000.tar"]
        # Complete and read back already, as the law of the writer says.
        assert LengthIndex.build(tmp_path / "shard-000002.tar.tmp").lengths.tolist() == [5]
        with pytest.raises(FileExistsError, match=r"shard-00000\d.tar\S* is being written"):
            ShardWriter(tmp_path, append=True)
    assert [path.name for path in writer.shards] == [f"shard-00000{number}.tar" for number in range(4)]


def test_a_large_shard_gets_its_name_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: None) -> None:
    monkeypatch.setattr(shard_group, "MOST_BYTES", 100_000)
    with ShardWriter(tmp_path, max_samples=1) as writer:
        for number, steps in enumerate([1, 1, 20_000, 1]):
            writer.write({"__key__": str(number), "x": np.zeros(steps)})
        assert [path.name for path in writer.shards] == [f"shard-00000{number}.tar" for number in range(3)]


@pytest.mark.usefixtures("waits")
def test_an_error_of_the_program_names_the_finished_shards(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, max_samples=1) as writer:
            for sample in tokens([3, 4, 5, 6]):
                writer.write(sample)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert names(tmp_path) == sorted(shard_names(3))
    with ShardWriter(tmp_path, max_samples=1, append=True) as writer:
        assert list(writer.keys) == ["k0", "k1", "k2"]


def write_all(writer: ShardWriter, samples: list[dict[str, object]]) -> None:
    with writer:
        for sample in samples:
            writer.write(sample)


def failing_at(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that fails from a call on."""
    count = iter(range(calls))

    def call(*args: Any) -> Any:
        if next(count, None) is None:
            raise OSError("no space")
        return function(*args)

    return call


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("flushed", [4, 7, 10])
def test_a_disk_that_fails_in_a_group_keeps_what_has_its_name(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, flushed: int
) -> None:
    samples = tokens([3, 4, 5, 6])
    # The first shard takes 4 flushes; those of 3 more are 6, and then their folder's.
    monkeypatch.setattr(os, "fsync", failing_at(flushed, os.fsync))
    writer = ShardWriter(tmp_path, max_samples=1)
    with pytest.raises(OSError, match="no space"):
        write_all(writer, samples)
    monkeypatch.undo()
    named = 1 if flushed < 10 else 4
    assert [name for name in names(tmp_path) if name.endswith(".tmp")] == []
    assert [path.name for path in writer.shards] == [f"shard-00000{number}.tar" for number in range(named)]
    assert list(writer.keys) == [f"k{number}" for number in range(named)]
    # The indexes of those that failed at their folder are made again.
    with ShardWriter(tmp_path, max_samples=1, append=True) as again:
        assert list(again.keys) == list(writer.keys)
        for sample in samples[named:]:
            again.write(sample)
    whole = tmp_path_factory.mktemp("whole")
    write(whole, samples, max_samples=1)
    assert files(tmp_path) == files(whole)


@pytest.mark.usefixtures("waits")
def test_an_index_is_never_older_than_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tokens([3, 4, 5, 6]), max_samples=1)
    # Otherwise all would be scanned again. It was so when an index kept the time at which it was written.
    monkeypatch.setattr("samplers.shards.indexing.cache.scan_shard", None)
    index = LengthIndex.build(sorted(tmp_path.glob("*.tar")), resume=True, checksums=True)
    assert index.lengths.tolist() == [3, 4, 5, 6]
    assert len(ShardDataset(tmp_path)) == 4


def test_files_of_later_stages_have_no_name_before_those_of_earlier_ones(tmp_path: Path) -> None:
    first, second = AtomicFile(tmp_path / "a"), AtomicFile(tmp_path / "b")
    second.temporary.unlink()
    with pytest.raises(FileNotFoundError):
        commit_in_stages([[first], [second]])
    assert names(tmp_path) == ["a"]
    assert (first.committed, second.committed) == (True, False)
    first.discard()
    assert names(tmp_path) == ["a"]
