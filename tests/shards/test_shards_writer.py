"""ShardWriter: what is written reads back, by any reader; shards appear whole or not at all."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import LAYOUTS, VERSIONS, assert_same, corpora, groups, keys_of_block, read_with_webdataset, tokens, write
from hypothesis import given
from hypothesis import strategies as st
from killed import KILL_AT_A_SYNC
from webdataset import autodecode, filters

from samplers.shards.dataset import ShardDataset
from samplers.shards.format.samples import decode_groups
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.storage.locks import lock
from samplers.shards.writing.writer import ShardWriter


@pytest.mark.parametrize("layout", LAYOUTS)
@given(corpus=corpora(), block_size=st.integers(1, 4), max_samples=st.integers(1, 5))
def test_what_is_written_is_read_back_by_place_and_by_stream(
    tmp_path_factory: pytest.TempPathFactory, layout: str, corpus: Any, block_size: Any, max_samples: Any
) -> None:
    samples, stack = corpus
    folder = tmp_path_factory.mktemp("corpus")
    write(folder, samples, layout=layout, block_size=block_size, max_samples=max_samples, stack=stack)
    dataset = ShardDataset(folder)
    assert len(dataset) == len(samples)
    assert list(dataset.index.keys) == [sample["__key__"] for sample in samples]
    for read, written in zip(dataset, samples, strict=True):
        assert_same(read, written)
    for read, written in zip(decode_groups(groups(folder)), samples, strict=True):
        assert_same(read, written)


@pytest.mark.parametrize("version", VERSIONS)
def test_blocks_are_what_the_format_says_to_tarfile_and_numpy(tmp_path: Path, version: int) -> None:
    samples = [
        {"__key__": f"é{place}", "x": np.full((place, 2), place, np.float32), "n": place, "v": np.arange(3) + place}
        for place in range(5)
    ]
    write(tmp_path, samples, block_size=3, stack=["v"], version=version)
    read = {}
    with tarfile.open(tmp_path / "shard-000000.tar", format=tarfile.USTAR_FORMAT) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode, member.pax_headers) == (0, 0, 0, 0o644, {})
            read[member.name] = np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)
    assert sorted(read) == sorted(
        f"block-00000{block}.{part}.npy" for block in (0, 1) for part in ("block.keys", "x.lengths", "x", "n", "v")
    )
    for block, places in enumerate(([0, 1, 2], [3, 4])):
        part = {name.split(".", 1)[1]: array for name, array in read.items() if name.startswith(f"block-00000{block}")}
        assert keys_of_block(part["block.keys.npy"], version) == [f"é{place}" for place in places]
        assert part["x.lengths.npy"].dtype == {1: np.int32, 2: np.uint8}[version]
        assert part["x.lengths.npy"].tolist() == places
        assert np.array_equal(part["x.npy"], np.concatenate([samples[place]["x"] for place in places]))
        assert part["n.npy"].tolist() == places
        assert np.array_equal(part["v.npy"], np.stack([samples[place]["v"] for place in places]))


def test_the_plain_layout_is_what_webdataset_decodes(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 0]), layout="plain")
    first, second = read_with_webdataset(tmp_path, filters.map(autodecode.Decoder([])))
    assert (first["__key__"], first["label.cls"], first["tokens.npy"].tolist()) == ("k0", 0, [0, 1, 2])
    assert (second["__key__"], second["label.cls"], second["tokens.npy"].tolist()) == ("k1", 1, [])
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert tar.getnames() == ["k0.tokens.npy", "k0.label.cls", "k1.tokens.npy", "k1.label.cls"]
        assert np.load(io.BytesIO(tar.extractfile("k0.tokens.npy").read())).tolist() == [0, 1, 2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_samples_give_the_same_bytes(tmp_path: Path, layout: str) -> None:
    for name in "ab":
        write(tmp_path / name, tokens([3, 0, 7, 2]), layout=layout, max_samples=3)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "shard-000000.tar",
        "shard-000000.tar.ltx",
        "shard-000001.tar",
        "shard-000001.tar.ltx",
        "shard.ltx",
    ]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 400))
def test_shards_hold_no_more_samples_and_bytes_than_asked(
    tmp_path_factory: pytest.TempPathFactory, lengths: Any, max_samples: Any, max_bytes: Any
) -> None:
    folder = write(tmp_path_factory.mktemp("c"), tokens(lengths), max_samples=max_samples, max_bytes=max_bytes)
    counts = [shard.samples for shard in LengthIndex.open(folder / "shard.ltx")._tables.shards]
    sizes = np.array(lengths) * 8 + 8
    for first, last in zip(np.cumsum([0, *counts]), np.cumsum(counts), strict=False):
        assert 1 <= last - first <= max_samples
        assert sizes[first:last].sum() <= max_bytes or last - first == 1
        # No shard is closed early: the next sample would not have fitted.
        if last < len(lengths):
            assert last - first == max_samples or sizes[first : last + 1].sum() > max_bytes


def test_what_was_written_is_copied(tmp_path: Path) -> None:
    array = np.arange(3)
    with ShardWriter(tmp_path) as writer:
        writer.write({"__key__": "a", "x": array})
        array[:] = 9
        writer.write({"__key__": "b", "x": array})
    assert [sample["x"].tolist() for sample in ShardDataset(tmp_path)] == [[0, 1, 2], [9, 9, 9]]


def test_tensors_and_odd_memory_layouts_are_stored_as_their_values(tmp_path: Path) -> None:
    base = np.arange(12).reshape(3, 4)
    values = {
        "a": torch.arange(6.0, requires_grad=True)[::2],
        "b": base.T,
        "c": base.astype(">i4"),
        "d": torch.tensor([1 + 2j]).conj(),
        "e": np.float16(2),
        "f": True,
        "g": 1.5,
        # NumPy's numbers of double width are Python's too.
        "h": np.float64(2.5),
        "i": np.complex128(1j),
    }
    write(tmp_path, [{"__key__": "k"} | values])
    sample = ShardDataset(tmp_path)[0]
    assert np.array_equal(sample["a"], [0, 2, 4])
    assert np.array_equal(sample["b"], base.T)
    assert np.array_equal(sample["c"], base)
    assert sample["d"].tolist() == [1 - 2j]
    assert [(sample[name], sample[name].dtype.name) for name in "efghi"] == [
        (2, "float16"),
        (True, "bool"),
        (1.5, "float64"),
        (2.5, "float64"),
        (1j, "complex128"),
    ]


GOOD = {"__key__": "good", "x": np.arange(3), "y": np.ones((2, 4), np.float32), "n": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"__key__": "good"}, ValueError, "'good' was written before"),
        ({"__key__": ""}, ValueError, "1 to 1024 characters"),
        ({"__key__": "a\0"}, ValueError, "without NUL"),
        ({"__key__": "\ud800"}, ValueError, "Unicode"),
        ({"__key__": "k" * 1025}, ValueError, "1 to 1024"),
        ({"__key__": 3}, TypeError, "must be a str, got 3"),
        ({"x": None}, TypeError, "sample 'bad', field 'x': must be an array"),
        ({"x": [1, 2]}, TypeError, "field 'x'.*lists need a dtype"),
        ({"x": "text"}, TypeError, "field 'x'.*np.frombuffer"),
        ({"x": np.array([1, None])}, TypeError, "sample 'bad', field 'x': holds Python objects"),
        # Red: it was stored as if nothing were masked.
        ({"x": np.ma.array([1, 2], mask=[0, 1])}, TypeError, r"'bad', field 'x': .* masks 1 of 2 .* \.compressed"),
        ({"x": np.array(["a"])}, TypeError, "field 'x': <U1 cannot be stored"),
        ({"x": np.zeros(2, [("a", "i4")])}, TypeError, "field 'x'"),
        ({"x": torch.ones(2, dtype=torch.bfloat16)}, TypeError, r"no bfloat16: store value.view\(torch.int16\)"),
        ({"x": torch.ones(2, device="meta")}, TypeError, r"on the CPU, got torch.strided on meta: use .cpu\(\)"),
        ({"x": torch.ones(2).to(torch.float8_e5m2)}, TypeError, "field 'x': torch.float8_e5m2 cannot be stored"),
        ({"x": torch.ones(2).to_sparse()}, TypeError, "must be a dense tensor"),
        ({"x": np.arange(3.0)}, TypeError, r"field 'x': must be int64 \[L\] like the first sample's, got float64"),
        ({"x": np.ones((2, 2), int)}, ValueError, r"field 'x': must be int64 \[L\].* got int64 \[2, 2\]"),
        ({"x": 3}, ValueError, r"field 'x': must be int64 \[L\].*, got int64 \[\]"),
        ({"y": np.ones((2, 3), np.float32)}, ValueError, r"field 'y': must be float32 \[L, 4\].* got float32 \[2, 3\]"),
        ({"n": np.arange(2)}, ValueError, r"field 'n': must be int64 \[\]"),
        ({"n": 2**80}, OverflowError, "too (large|big)"),
        ({"z": 1}, ValueError, "sample 'bad': field 'z' is new"),
        ({"n": ...}, ValueError, "sample 'bad': field 'n' is missing"),
    ],
)
def test_a_bad_sample_is_refused_and_the_next_good_one_written(
    tmp_path: Path, layout: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    bad = {name: value for name, value in (GOOD | {"__key__": "bad"} | change).items() if value is not ...}
    with ShardWriter(tmp_path, layout=layout) as writer:
        writer.write(GOOD)
        with pytest.raises(error, match=message):
            writer.write(bad)
        writer.write(GOOD | {"__key__": "next"})
    dataset = ShardDataset(tmp_path)
    assert list(dataset.index.keys) == ["good", "next"]
    assert_same(dataset[1], GOOD | {"__key__": "next"})


@pytest.mark.parametrize("key", ["a.b", "a/.b", "__x__/y", "k" * 300])
def test_the_plain_layout_refuses_keys_that_tar_cannot_name(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path / "plain", layout="plain") as writer:
        writer.write(GOOD)
        with pytest.raises(ValueError, match='choose the layout "blocks"'):
            writer.write(GOOD | {"__key__": key})
    write(tmp_path / "blocks", [GOOD | {"__key__": key}])
    assert ShardDataset(tmp_path / "blocks")[0]["__key__"] == key


@pytest.mark.parametrize("name", ["Tokens", "a.b", "a/b", "", "__x", "a\n"])
def test_fields_that_webdataset_would_rename_are_refused(tmp_path: Path, name: str) -> None:
    with ShardWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="lower case without dots"):
            writer.write({"__key__": "a", name: np.arange(2)})
        writer.write(GOOD)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": "rows"}, ValueError, "layout must be"),
        ({"max_samples": 0}, ValueError, "max_samples must be at least 1, got 0"),
        ({"max_bytes": True}, TypeError, "max_bytes must be"),
        ({"block_size": 2.5}, TypeError, "block_size must be"),
        ({"prefix": "a/b"}, ValueError, "prefix must be"),
        ({"stack": "image"}, TypeError, "stack must be a list"),
    ],
)
def test_bad_options_are_refused_at_once(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ShardWriter(tmp_path, **options)


def test_a_corpus_needs_a_sequence_and_the_fields_that_stack_names(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, stack=["x"]) as writer:
        with pytest.raises(ValueError, match="at least one field must be a sequence"):
            writer.write({"__key__": "a", "x": np.arange(3), "n": 1})
        with pytest.raises(ValueError, match=r"stack names \['x'\], the fields are \['y'\]"):
            writer.write({"__key__": "a", "y": np.arange(3)})
        writer.write({"__key__": "a", "x": np.arange(3), "y": np.arange(2)})
    assert LengthIndex.open(tmp_path / "shard.ltx").fields == ("y",)


def test_an_empty_corpus_and_a_writer_out_of_its_block_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    with pytest.raises(RuntimeError, match="within the with block"):
        writer.write(GOOD)
    with pytest.raises(ValueError, match="nothing was written"), writer:
        pass
    assert not list(tmp_path.iterdir())


def test_shards_that_are_there_are_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path, tokens([1]))
    with pytest.raises(FileExistsError, match=r"already holds shard-000000.tar: write to another folder, give another"):
        ShardWriter(tmp_path)
    write(tmp_path, tokens([2]), prefix="valid")
    assert len(ShardDataset(tmp_path / "valid.ltx")[0]["tokens"]) == 2
    with pytest.raises(ValueError, match=r"several corpora: give one of .*shard.ltx.*valid.ltx"):
        ShardDataset(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exception_keeps_the_finished_shards_and_leaves_nothing_else(tmp_path: Path, layout: str) -> None:
    def interrupted() -> Iterator[Any]:
        yield from tokens([1, 2, 3, 4, 5])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, interrupted(), layout=layout, max_samples=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-000000.tar",
        "shard-000000.tar.ltx",
        "shard-000001.tar",
        "shard-000001.tar.ltx",
    ]
    LengthIndex.build(tmp_path).save(tmp_path / "shard.ltx")
    assert ShardDataset(tmp_path).index.lengths.tolist() == [1, 2, 3, 4]


IMPORTS = """
import os, signal, sys
from pathlib import Path
import numpy as np
from samplers.shards.writing.writer import ShardWriter
"""

KILLED = """
def write(folder, layout):
    with ShardWriter(folder, layout=layout, max_samples=50, block_size=7) as writer:
        for place in range(120):
            writer.write({"__key__": f"k{place}", "x": np.arange(place)})
        if folder.name.endswith("-0"):
            os.kill(os.getpid(), signal.SIGKILL)

for layout in ("blocks", "plain"):
    for count in range(1 + int(sys.argv[2])):
        child = os.fork()
        if not child:
            kill_at(count)
            write(Path(sys.argv[1]) / f"{layout}-{count}", layout)
            os._exit(0)
        print(layout, count, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


# How many shards have their name when the writer is killed at its first, second, ... flush.
NAMED = {
    # Each shard gets its name alone: two files are flushed, then the folder with the shard, then with its index.
    "0": [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3],
    # The first shard gets its name alone, the others together: four files are flushed, and the folder twice.
    "inf": [0, 0, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3],
}


@pytest.mark.unix
@pytest.mark.parametrize("patience", NAMED)
def test_a_killed_writer_leaves_no_half_shard_under_a_final_name(tmp_path: Path, patience: str) -> None:
    # Killed between samples, and at every one of the moments at which it sends something to the disk.
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS + KILL_AT_A_SYNC + KILLED, str(tmp_path), str(len(NAMED[patience]))],
        env=os.environ | {"PATIENCE": patience},
        capture_output=True,
        text=True,
        check=True,
    )
    codes = {(layout, int(count)): int(code) for layout, count, code in map(str.split, run.stdout.splitlines())}
    assert len(codes) == 2 * (1 + len(NAMED[patience]))
    assert all(code == -9 for code in codes.values())
    lengths = np.arange(120)
    for layout, count in codes:
        folder = tmp_path / f"{layout}-{count}"
        shards = sorted(folder.glob("*.tar"))
        assert count == 0 or len(shards) == NAMED[patience][count - 1]
        for place, shard in enumerate(shards):
            assert LengthIndex.build(shard).lengths.tolist() == lengths[50 * place : 50 * place + 50].tolist()
        for index in folder.glob("*.ltx"):
            LengthIndex.open(index).verify(checksums=True)
        # The corpus file has its name at the last flush, of its folder.
        assert (folder / "shard.ltx").exists() == (count == len(NAMED[patience]))


def test_a_sequence_of_more_steps_than_an_index_holds_is_refused(tmp_path: Path) -> None:
    # Steps without features take no memory.
    write(tmp_path / "a", [{"__key__": "a", "x": np.zeros((2**31 - 1, 0))}])
    assert ShardDataset(tmp_path / "a")[0]["x"].shape == (2**31 - 1, 0)
    with pytest.raises(ValueError, match="field 'x': 2147483648 steps, at most 2147483647"):
        write(tmp_path / "b", [{"__key__": "a", "x": np.zeros((2**31, 0))}])


def test_a_disk_that_fails_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, tokens([3, 4]))
    assert not list(tmp_path.iterdir())


def test_a_leftover_of_a_killed_writer_is_named(tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar.tmp").touch()
    with pytest.raises(FileExistsError, match="already holds shard-000000.tar.tmp"):
        ShardWriter(tmp_path)
    writer = ShardWriter(tmp_path, prefix="x").__enter__()
    with (tmp_path / "x-000000.tar.tmp").open("wb") as another:
        # Nobody can tell where there are no locks.
        assert lock(another) in {True, None}
        with pytest.raises(FileExistsError, match="another writer is at work, or was killed"):
            writer.write(GOOD)


def test_nothing_on_disk_can_be_a_pickle(tmp_path: Path) -> None:
    write(tmp_path, tokens([2, 3]))
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert all(name.endswith(".npy") for name in tar.getnames())
    content = (tmp_path / "shard.ltx").read_bytes()
    header = json.loads(content[24 : 24 + int.from_bytes(content[12:16], "little")])
    assert header["layout"] == "blocks"
    assert os.fsencode("pickle") not in content
