"""Versions 1 and 2 of blocks and their indexes: the same samples, mixed in one corpus, and what version 2 saves."""

import copy
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import VERSIONS, assert_same, corpora, files, groups, is_mapped, tokens, write
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import DataLoader

from samplers import LengthBucketBatchSampler, LengthIndex, ShardDataset, ShardStream, ShardWriter
from samplers.shards.format.block_keys import encode_block_keys, read_block_keys
from samplers.shards.format.packed_keys import PackedKeys, find_key_form
from samplers.shards.format.packed_offsets import PackedOffsets, find_bases, subtract_bases
from samplers.shards.format.samples import decode_groups
from samplers.shards.indexing.index import tables_of

KEY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
DIGITS = st.text("0123456789", min_size=1, max_size=9)
LENGTHS = [5, 0, 300, 7, 1, 70_000, 2, 2, 9, 40]


def same_corpora(one: Path, other: Path) -> None:
    """Two folders hold the same samples, and their indexes say the same of them."""
    first, second = LengthIndex.open(one / "shard.ltx"), LengthIndex.open(other / "shard.ltx")
    assert list(first.keys) == list(second.keys)
    assert (first.lengths.dtype, first.lengths.tolist()) == (second.lengths.dtype, second.lengths.tolist())
    assert first.order.tolist() == second.order.tolist()
    assert first.fingerprint == second.fingerprint
    pairs = list(zip(ShardDataset(one), ShardDataset(other), strict=True))
    assert len(pairs) == len(first)
    for sample, expected in pairs:
        assert_same(sample, expected)
    for sample, expected in zip(decode_groups(groups(one)), decode_groups(groups(other)), strict=True):
        assert_same(sample, expected)
    for index in (first, second):
        index.verify(checksums=True)


@given(corpora(), st.integers(1, 4), st.integers(1, 5))
def test_both_versions_hold_the_same_samples_under_one_fingerprint(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[Any, ...], block_size: int, max_samples: int
) -> None:
    samples, stack = drawn
    folder = tmp_path_factory.mktemp("versions")
    options: dict[str, Any] = {"stack": stack, "block_size": block_size, "max_samples": max_samples}
    for version in VERSIONS:
        write(folder / str(version), samples, version=version, **options)
    same_corpora(folder / "1", folder / "2")


def version_of(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[8:12], "little")


def blocks_of(path: Path) -> int:
    """The version of the blocks of a shard."""
    return 2 if b"'descr': '|u1'" in path.read_bytes()[512:640] else 1


@pytest.mark.parametrize("first", VERSIONS)
def test_a_corpus_of_one_version_is_continued_in_the_other(tmp_path: Path, first: int) -> None:
    samples = tokens(LENGTHS)
    write(tmp_path / "mixed", samples[:4], version=first, max_samples=2, block_size=2)
    before = files(tmp_path / "mixed")
    write(tmp_path / "mixed", samples[4:], version=3 - first, max_samples=2, block_size=2, append=True)
    write(tmp_path / "whole", samples, max_samples=2, block_size=2)
    same_corpora(tmp_path / "mixed", tmp_path / "whole")
    shards = sorted((tmp_path / "mixed").glob("*.tar"))
    assert [blocks_of(shard) for shard in shards] == [first] * 2 + [3 - first] * 3
    assert [version_of(Path(f"{shard}.ltx")) for shard in shards] == [first] * 2 + [3 - first] * 3
    assert version_of(tmp_path / "mixed" / "shard.ltx") == 3 - first
    after = files(tmp_path / "mixed")
    assert {name: after[name] for name in before if name != "shard.ltx"} == {
        name: content for name, content in before.items() if name != "shard.ltx"
    }
    # The indexes of both kinds join.
    parts = [LengthIndex.open(f"{shard}.ltx") for shard in shards]
    assert LengthIndex.concat(parts).fingerprint == LengthIndex.open(tmp_path / "whole" / "shard.ltx").fingerprint
    assert len(ShardDataset(shards)) == len(samples)
    for version in VERSIONS:
        LengthIndex.concat(parts).save(tmp_path / "mixed" / "again.ltx", version=version)
        assert version_of(tmp_path / "mixed" / "again.ltx") == version
        LengthIndex.open(tmp_path / "mixed" / "again.ltx").verify(checksums=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_shards_without_their_index_are_adopted_in_the_asked_version(tmp_path: Path, version: int) -> None:
    write(tmp_path, tokens(LENGTHS), version=3 - version, max_samples=5)
    for index in tmp_path.glob("*.ltx"):
        index.unlink()
    with ShardWriter(tmp_path, append=True, version=version) as writer:
        assert list(writer.keys) == [f"k{number}" for number in range(10)]
    assert {version_of(index) for index in tmp_path.glob("*.ltx")} == {version}
    LengthIndex.open(tmp_path / "shard.ltx").verify(checksums=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_parts_and_rewritten_shards_have_the_asked_version(tmp_path: Path, version: int) -> None:
    write(tmp_path / "from", tokens(LENGTHS), version=3 - version, max_samples=4)
    ShardWriter.rewrite(tmp_path / "to", tmp_path / "from", version=version)
    assert {version_of(index) for index in (tmp_path / "to").glob("*.ltx")} == {version}
    assert {blocks_of(shard) for shard in (tmp_path / "to").glob("*.tar")} == {version}
    same_corpora(tmp_path / "from", tmp_path / "to")


def test_plain_shards_have_version_1_whatever_is_asked(tmp_path: Path) -> None:
    for version in VERSIONS:
        write(tmp_path / str(version), tokens([3, 0, 9]), layout="plain", version=version)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert version_of(tmp_path / "2" / "shard.ltx") == 1


@pytest.mark.parametrize(("version", "error"), [(0, ValueError), (3, ValueError), (True, TypeError), ("2", TypeError)])
def test_other_versions_are_refused_before_anything_is_written(
    tmp_path: Path, version: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="version"):
        ShardWriter(tmp_path / "a", version=version)
    with pytest.raises(error, match="version"):
        ShardWriter.write_parts(tmp_path / "a", tokens, [[1, 2]], version=version)
    assert not (tmp_path / "a").exists()
    index = LengthIndex.open(write(tmp_path / "b", tokens([1])) / "shard.ltx")
    with pytest.raises(error, match="version"):
        index.save(tmp_path / "c.ltx", version=version)
    assert not (tmp_path / "c.ltx").exists()


def keys_of(batches: Any) -> list[list[str]]:
    return [[sample["__key__"] for sample in batch] for batch in batches]


@pytest.mark.parametrize("first", VERSIONS)
def test_a_position_of_one_version_resumes_in_the_other(tmp_path: Path, first: int) -> None:
    lengths = (np.arange(90) * 37 % 61).tolist()
    for version in VERSIONS:
        write(tmp_path / str(version), tokens(lengths), version=version, max_samples=30, block_size=7)

    def stream(version: int) -> ShardStream:
        return ShardStream(tmp_path / str(version), collate_fn=list, max_tokens=200, window=30, seed=4)

    def sampler(version: int) -> LengthBucketBatchSampler:
        return LengthBucketBatchSampler(ShardDataset(tmp_path / str(version)).index, max_tokens=200, seed=4)

    whole = keys_of(stream(first))
    other = stream(3 - first)
    other.seek(stream(first).position(4))
    assert keys_of(DataLoader(other, batch_size=None)) == whole[4:]
    expected = list(sampler(first))
    resumed = sampler(3 - first)
    resumed.seek(sampler(first).position(4))
    assert list(resumed) == expected[4:]


def test_a_build_takes_kept_indexes_of_both_versions(tmp_path: Path) -> None:
    write(tmp_path, tokens(LENGTHS), version=1, max_samples=5, block_size=3)
    (tmp_path / "shard.ltx").unlink()
    old, new = sorted(tmp_path.glob("*.tar.ltx"))
    LengthIndex.open(new).save(new)
    assert [version_of(old), version_of(new)] == [1, 2]
    before = {path: path.stat().st_ino for path in (old, new)}
    index = LengthIndex.build(tmp_path, resume=True, checksums=True)
    assert {path: path.stat().st_ino for path in (old, new)} == before
    assert index.lengths.tolist() == LENGTHS


# --- what is smaller, and how it is looked up


@pytest.mark.parametrize("max_samples", [20_000, 1500])
def test_a_corpus_of_short_sequences_takes_at_most_1_15_times_its_values(tmp_path: Path, max_samples: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.0, 0.85, 20_000).round(), 1, 400).astype(int)
    with ShardWriter(tmp_path, max_samples=max_samples) as writer:
        for number, length in enumerate(lengths.tolist()):
            writer.write({"__key__": f"tokens-{number:08}", "tokens": np.full(length, number)})
    values = int(lengths.sum()) * 8
    assert 28 < values / 8 / len(lengths) < 30
    # All files: shards, their indexes and that of the corpus.
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1.15 * values


@given(
    st.one_of(st.lists(KEY, min_size=1, max_size=30), st.lists(DIGITS.map("tokens/".__add__), min_size=1)), st.data()
)
def test_packed_keys_are_the_keys_by_row_by_slice_and_whole(keys: list[str], data: st.DataObject) -> None:
    table = np.array([key.encode() for key in keys])
    cut = data.draw(st.integers(0, len(keys)))
    parts = [np.array(part) for part in (table[:cut].tolist(), table[cut:].tolist()) if part]
    form = find_key_form(parts)
    packed = PackedKeys(form, np.concatenate([form.encode(part) for part in parts]))
    assert packed.tolist() == table.tolist()
    assert (packed.stored.nbytes <= table.nbytes + len(table), len(packed)) == (True, len(table))
    rows = data.draw(hnp.arrays(np.int64, st.integers(0, 8), elements=st.integers(-len(keys), len(keys) - 1)))
    assert packed[rows].tolist() == table[rows].tolist()
    assert [packed[row] for row in rows.tolist()] == table[rows].tolist()
    assert packed[cut:].tolist() == table[cut:].tolist()
    mask = np.arange(len(keys)) % 2 == 0
    assert packed[mask].tolist() == table[mask].tolist()
    with pytest.raises(IndexError):
        packed[len(keys)]


@pytest.mark.parametrize(
    ("keys", "bytes_each"),
    [
        (["a"], 1),
        (["tokens-1", "tokens-2"], 1),
        ([f"{number:08x}" for number in range(0, 2**32, 2**28 - 1)], 4),
        (["k1", "k12", "k"], 1),
        (["x" * 300 + "1", "x" * 300 + "2"], 23),
        (["left", "right", "über"], 3),
        (["quick", "brown", "fox", "jumps over", "the lazy dog"], 12),
    ],
)
def test_keys_of_few_characters_take_half_a_byte_each(keys: list[str], bytes_each: int) -> None:
    table = np.array([key.encode() for key in keys])
    form = find_key_form([table])
    assert form.encode(table).nbytes == bytes_each * len(keys)
    assert PackedKeys(form, form.encode(table)).tolist() == table.tolist()


@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 200), st.integers(1, 3)), elements=st.integers(0, 2**40)), st.data()
)
def test_packed_offsets_are_the_offsets(offsets: np.ndarray, data: st.DataObject) -> None:
    offsets = offsets % data.draw(st.sampled_from([2**20, 2**32, 2**33, 2**41]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(offsets)), max_size=4)))
    parts = np.split(offsets, cuts)
    bases = find_bases(parts, *offsets.shape)
    runs = [offsets[first : first + 64] for first in range(0, len(offsets), 64)]
    assert (bases is None) == any((run.max(0) - run.min(0) >= 2**32).any() for run in runs)
    assume(bases is not None)
    packed = PackedOffsets(bases, np.concatenate(list(subtract_bases(parts, bases))))
    assert np.asarray(packed).tolist() == offsets.tolist()
    rows = data.draw(hnp.arrays(np.int64, st.integers(0, 8), elements=st.integers(0, len(offsets) - 1)))
    for column in range(offsets.shape[1]):
        assert packed[rows, column].tolist() == offsets[rows, column].tolist()
        assert packed.at(rows, column).tolist() == offsets[rows, column].tolist()
        assert packed[-1 - rows, column].tolist() == offsets[-1 - rows, column].tolist()
        assert packed[int(len(offsets) - 1), column] == packed[-1, column] == offsets[-1, column]
        assert packed[offsets[:, 0] % 2 == 0, column].tolist() == offsets[offsets[:, 0] % 2 == 0, column].tolist()
        assert packed[3:70, column].tolist() == offsets[3:70, column].tolist()
    # Red before for rows below zero: they gave another row.
    for row in (len(offsets), -len(offsets) - 1):
        with pytest.raises(IndexError):
            packed[row, 0]
    again = pickle.loads(pickle.dumps(packed))
    assert again[rows].tolist() == copy.deepcopy(packed)[rows].tolist() == offsets[rows].tolist()


@given(st.lists(KEY, min_size=1, max_size=40))
def test_keys_of_a_block_are_read_as_written_in_both_versions(keys: list[str]) -> None:
    for version in VERSIONS:
        member = encode_block_keys(keys, version=version)
        assert read_block_keys(member, lambda: len(keys), "here") == [key.encode() for key in keys]
        assert member[:6] == b"\x93NUMPY"


def test_keys_that_compress_too_well_are_stored_as_they_are(tmp_path: Path) -> None:
    # 1024 equal characters and a number: far more than 64 times their compressed form.
    samples = [{"__key__": "k" * 1019 + f"{number:05}", "x": np.arange(40)} for number in range(300)]
    write(tmp_path, samples)
    assert [sample["__key__"] for sample in ShardDataset(tmp_path)] == [sample["__key__"] for sample in samples]
    assert [sample["__key__"] for sample in decode_groups(groups(tmp_path))] == [s["__key__"] for s in samples]
    LengthIndex.open(tmp_path / "shard.ltx").verify(checksums=True)


def test_a_shard_of_empty_sequences_and_long_keys_can_be_read(tmp_path: Path) -> None:
    samples = [{"__key__": "é" * 500 + str(number), "x": np.arange(0)} for number in range(2500)]
    write(tmp_path, samples)
    assert len(list(tmp_path.glob("*.tar"))) > 1
    assert [sample["__key__"] for sample in ShardDataset(tmp_path)] == [sample["__key__"] for sample in samples]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose index is mapped, in two shards."""
    folder = tmp_path_factory.mktemp("large")
    with ShardWriter(folder, max_samples=60_000) as writer:
        for number in range(90_000):
            writer.write({"__key__": f"tokens-{number:08}", "tokens": np.full(number % 3, number)})
    return folder


def test_the_index_of_a_large_corpus_stays_a_map(large: Path) -> None:
    tables = tables_of(LengthIndex.open(large / "shard.ltx"))
    assert isinstance(tables.keys, PackedKeys)
    assert isinstance(tables.offsets, PackedOffsets)
    for array in (tables.keys.stored, tables.offsets.differences, tables.crcs):
        assert is_mapped(array)
    own = tables_of(LengthIndex.open(large / "shard-000001.tar.ltx"))
    assert np.array_equal(own.array("offsets"), tables.array("offsets")[60_000:])
    rows = np.array([0, 59_999, 60_000, 89_999])
    assert tables.offsets_of(rows, 0).tolist() == tables.array("offsets")[rows, 0].tolist()


def read_back(folder: Path, numbers: list[int]) -> Iterator[tuple[str, list[int]]]:
    dataset = ShardDataset(folder)
    loader = DataLoader(
        dataset, batch_sampler=[numbers], collate_fn=list, num_workers=1, multiprocessing_context="spawn"
    )
    for batch in loader:
        yield from ((sample["__key__"], sample["tokens"].tolist()) for sample in batch)


def test_workers_read_a_mapped_index_of_version_2(large: Path) -> None:
    numbers = [89_999, 3, 60_001, 59_999]
    expected = [(f"tokens-{number:08}", [number] * (number % 3)) for number in numbers]
    assert list(read_back(large, numbers)) == expected


def test_an_index_without_a_file_is_pickled_with_its_tables(tmp_path: Path) -> None:
    write(tmp_path, tokens(LENGTHS), max_samples=4)
    joined = LengthIndex.concat([LengthIndex.open(path) for path in sorted(tmp_path.glob("*.tar.ltx"))])
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    for index in (joined, LengthIndex.open(tmp_path / "shard.ltx"), joined.moved_to(sorted(moved.glob("*.tar")))):
        again = pickle.loads(pickle.dumps(index))
        assert (list(again.keys), again.fingerprint) == (list(index.keys), index.fingerprint)
        assert [sample["__key__"] for sample in ShardDataset(again.shards, again)] == list(index.keys)
