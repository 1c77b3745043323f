"""Batches whose samples lie far apart in open local shards: read in one pass over all shards, with the same checks."""

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from corpora import tokens, write
from hypothesis import given
from hypothesis import strategies as st

from collate import PadCollator, VarlenCollator
from samplers import ShardDataset
from samplers.shards.opening import open_shards
from samplers.shards.opening.descriptors import Descriptors
from samplers.shards.sample_reader import SampleReader
from samplers.shards.storage.reading import LocalFile

pytestmark = pytest.mark.unix

PAD = PadCollator(padding_value=0)
# Samples of this many steps are no neighbours: each takes more than is read through.
STEPS = 900


def corpus(folder: Path, samples: int = 24, **options: Any) -> ShardDataset:
    """Shards of five samples each, in blocks of two."""
    written = tokens([STEPS + index for index in range(samples)])
    for sample in written:
        # Labels of so few samples are neighbours.
        del sample["label"]
    return ShardDataset(write(folder, written, max_samples=5, block_size=2), **options)


def assert_right(data: ShardDataset, indices: list[int], batch: Any) -> None:
    """The batch has the samples of these indices, as they were written."""
    for row, index in enumerate(batch["tokens"].permutation.tolist()):
        expected = torch.arange(STEPS + indices[index]) + 1000 * indices[index]
        assert torch.equal(batch["tokens"].padded[row, : len(expected)], expected)
        assert not batch["tokens"].padded[row, len(expected) :].any()
        assert batch["__key__"][row] == f"k{indices[index]}" == data[indices[index]]["__key__"]


def forbid_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that are done shard by shard fail."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("read shard by shard")

    monkeypatch.setattr(SampleReader, "_read_part_into", refuse)


@given(indices=st.lists(st.integers(0, 23), min_size=2, max_size=30).filter(lambda rows: max(rows) - min(rows) > 12))
def test_after_the_first_read_a_batch_is_read_in_one_pass(
    tmp_path_factory: pytest.TempPathFactory, indices: list[int]
) -> None:
    data = corpus(tmp_path_factory.mktemp("c"))
    PAD(data.__getitems__(range(24)))
    with pytest.MonkeyPatch.context() as patch:
        forbid_other_ways(patch)
        try:
            batch = PAD(data.__getitems__(indices))
        except AssertionError:
            # No two samples are near each other, but one that comes twice is near itself.
            assert 4 * (len(indices) - len(set(indices))) >= len(indices)
            return
    assert_right(data, indices, batch)


def test_packed_batches_and_one_shard_are_read_in_one_pass_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = corpus(tmp_path)
    packed = VarlenCollator(0)
    expected = packed(data.__getitems__([0, 23, 9]))["tokens"].values
    within = PAD(data.__getitems__([4, 0]))
    forbid_other_ways(monkeypatch)
    assert torch.equal(packed(data.__getitems__([0, 23, 9]))["tokens"].values, expected)
    assert torch.equal(PAD(data.__getitems__([4, 0]))["tokens"].padded, within["tokens"].padded)


def test_labels_that_are_neighbours_are_read_with_their_samples(tmp_path: Path) -> None:
    data = ShardDataset(write(tmp_path, tokens([STEPS + index for index in range(24)]), max_samples=5, block_size=2))
    for indices in ([23, 7, 0], [0, 1, 2, 3], [23, 7, 0]):
        batch = PAD(data.__getitems__(indices))
        assert_right(data, indices, batch)
        assert batch["label"].tolist() == [indices[index] for index in batch["tokens"].permutation]


def test_blocks_that_were_not_compared_with_the_index_are_compared_first(tmp_path: Path) -> None:
    data = corpus(tmp_path)
    PAD(data.__getitems__([0, 5, 10]))
    [shard] = tmp_path.glob("*-000000.tar")
    content = shard.read_bytes()
    # The header of the second block's array says that it holds floats.
    at = content.rindex(b"'<i8'", 0, int(data._tables.offsets_of(np.array([2]), 0)[0]))
    with shard.open("r+b") as file:
        file.seek(at)
        file.write(b"'<f8'")
    PAD(data.__getitems__([1, 6, 11]))
    with pytest.raises(ValueError, match="f8"):
        PAD(data.__getitems__([2, 5, 10]))


@pytest.mark.parametrize("checksums", [True, False])
def test_damage_is_found_and_named(tmp_path: Path, checksums: bool) -> None:
    data = corpus(tmp_path, checksums=checksums)
    indices = [23, 7, 0, 12]
    PAD(data.__getitems__(range(24)))
    [shard] = tmp_path.glob("*-000001.tar")
    with shard.open("r+b") as file:
        file.seek(int(data._tables.offsets_of(np.array([7]), 0)[0]) + 8)
        file.write(b"\xff")
    if checksums:
        with pytest.raises(ValueError, match=r"shard-000001\.tar: sample 'k7', field 'tokens'.*checksum"):
            PAD(data.__getitems__(indices))
    else:
        # Nobody asked for it.
        assert PAD(data.__getitems__(indices))["tokens"].padded.numel()


@pytest.mark.parametrize("left", [0, 512, -4096])
@pytest.mark.parametrize("checksums", [True, False])
def test_a_shard_that_is_cut_is_named(tmp_path: Path, left: int, checksums: bool) -> None:
    data = corpus(tmp_path, checksums=checksums)
    PAD(data.__getitems__(range(24)))
    [shard] = tmp_path.glob("*-000002.tar")
    last = int(data._tables.offsets_of(np.array([14]), 0)[0]) + 8 * STEPS
    os.truncate(shard, left if left >= 0 else last + left)
    with pytest.raises(ValueError, match=r"shard-000002\.tar.*truncated"):
        PAD(data.__getitems__([23, 14, 0]))
    assert_right(data, [23, 4, 0], PAD(data.__getitems__([23, 4, 0])))


def test_files_are_not_closed_under_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread closes the shards, and opens other files, to which the system gives the free numbers."""
    data, indices = corpus(tmp_path / "corpus"), [23, 7, 0, 12, 18]
    PAD(data.__getitems__(range(24)))
    (tmp_path / "other").write_bytes(b"\xff" * 300_000)
    others = []
    offsets_of = SampleReader._offsets_of

    def close_and_find(reader: SampleReader, *given: Any) -> Any:
        reader.shards.close()
        others.extend(LocalFile(str(tmp_path / "other")) for _ in range(5))
        return offsets_of(reader, *given)

    with monkeypatch.context() as patch:
        forbid_other_ways(patch)
        patch.setattr(SampleReader, "_offsets_of", close_and_find)
        batch = PAD(data.__getitems__(indices))
    assert len(others) == 5
    assert_right(data, indices, batch)


def test_threads_that_close_and_read_get_right_batches(tmp_path: Path) -> None:
    data, indices = corpus(tmp_path), [23, 7, 0, 12, 18]
    stop = threading.Event()

    def read() -> int:
        batches = 0
        while not stop.is_set():
            assert_right(data, indices, PAD(data.__getitems__(indices)))
            batches += 1
        return batches

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for _ in range(1500):
            data._reader.shards.close()
        stop.set()
        assert all(reader.result() for reader in readers)


def test_neighbours_are_read_with_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ShardDataset(write(tmp_path, tokens([40] * 600), max_samples=300))
    PAD(data.__getitems__(range(600)))
    calls: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *given: calls.append(1) or preadv(*given))
    # A run in one shard, and one in each of two, which are far from each other.
    for indices, shards in ((range(60), 1), ((*range(60), *range(540, 600)), 2)):
        calls.clear()
        assert PAD(data.__getitems__(indices))["label"].tolist() == list(indices)
        # One for each of the two fields.
        assert len(calls) == 2 * shards


def test_samples_are_read_in_one_pass_next_to_labels_that_are_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ShardDataset(write(tmp_path, tokens([STEPS + index for index in range(24)]), max_samples=12))
    PAD(data.__getitems__(range(24)))
    read: list[str] = []
    read_part_into = SampleReader._read_part_into
    monkeypatch.setattr(
        SampleReader, "_read_part_into", lambda self, *given: read.extend(given[3]) or read_part_into(self, *given)
    )
    batch = PAD(data.__getitems__([22, 20, 3, 1]))
    assert_right(data, [22, 20, 3, 1], batch)
    assert sorted(batch["label"].tolist()) == [1, 3, 20, 22]
    assert set(read) == {"label"}


def test_the_first_damaged_sample_of_the_corpus_is_named_in_any_order(tmp_path: Path) -> None:
    data = corpus(tmp_path)
    PAD(data.__getitems__(range(24)))
    for shard, row in ((0, 2), (3, 17)):
        with next(tmp_path.glob(f"*-00000{shard}.tar")).open("r+b") as file:
            file.seek(int(data._tables.offsets_of(np.array([row]), 0)[0]) + 8)
            file.write(b"\xff")
    for indices in ([17, 9, 2, 23], [2, 17, 23, 9]):
        with pytest.raises(ValueError, match=r"sample 'k2'"):
            PAD(data.__getitems__(indices))


def test_shards_that_cannot_all_be_open_are_not_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_shards, "HANDLES", 3)
    data = corpus(tmp_path)
    for indices in ([0, 6, 11, 17, 22], [23, 4, 9], [0, 6, 11, 17, 22]):
        assert_right(data, indices, PAD(data.__getitems__(indices)))
    files = [one.path for one in gc.get_objects() if isinstance(one, LocalFile) and one.path.startswith(str(tmp_path))]
    assert 0 < len(files) <= 3


def test_files_are_noted_once_and_closed_with_the_last_note(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    notes = Descriptors(3)
    first, second = LocalFile(str(path)), LocalFile(str(path))
    assert notes.find(np.array([1])) is None
    notes.add(1, first)
    notes.add(1, second)
    assert notes.find(np.array([1, 1])) == [first.descriptor] * 2
    assert notes.find(np.array([1, 2])) is None
    number = first.descriptor
    del first
    assert os.pread(number, 7, 0) == b"content"
    del notes
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
