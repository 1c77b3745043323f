"""ShardWriter(append=True): killed or finished, a writer is gone on with, and the corpus is as if nothing had been."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import LAYOUTS, assert_same, corpora, files, tokens, write
from hypothesis import given
from hypothesis import strategies as st
from killed import KILL_AT_A_SYNC

from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.writing.writer import ShardWriter

WRITING = """
import os, signal, sys
from pathlib import Path
import numpy as np
from samplers.shards.writing.writer import ShardWriter

def samples(count=120):
    for number in range(count):
        yield {"__key__": f"k{number}", "x": np.arange(number % 17), "v": np.full(3, number), "n": number}

def write(folder, layout, **options):
    with ShardWriter(folder, layout=layout, max_samples=50, block_size=7, stack=["v"], **options) as writer:
        for sample in samples():
            if sample["__key__"] not in writer.keys:
                writer.write(sample)
"""

KILLED = """
folder = Path(sys.argv[1])
for layout in ("blocks", "plain"):
    write(folder / layout, layout)
    for count in range(1, 16):
        child = os.fork()
        if not child:
            kill_at(count)
            write(folder / f"{layout}-{count}", layout)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        write(folder / f"{layout}-{count}", layout, append=True)
"""


@pytest.mark.parametrize(("patience", "moments"), [("0", 14), ("inf", 12)])
def test_a_writer_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path: Path, patience: str, moments: int) -> None:
    # Flushes of three shards, three indexes, the corpus file and their folder, see `test_shards_writer`. Others are too
    # late.
    code = WRITING + KILL_AT_A_SYNC + KILLED
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PATIENCE": patience},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [*["-9"] * moments, *["0"] * (15 - moments)] * 2
    for layout in LAYOUTS:
        whole = files(tmp_path / layout)
        assert len(whole) == 7
        for count in range(1, 16):
            assert files(tmp_path / f"{layout}-{count}") == whole, count
        LengthIndex.open(tmp_path / f"{layout}-3" / "shard.ltx").verify(checksums=True)


KILLED_IN_A_SHARD = """
import time
with ShardWriter(sys.argv[1], layout=sys.argv[2], max_samples=50, block_size=7, stack=["v"]) as writer:
    for sample in samples(80):
        writer.write(sample)
    print("in mid-shard", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_live_writer_is_refused_and_a_killed_one_is_continued(tmp_path: Path, layout: str) -> None:
    command = [sys.executable, "-c", WRITING + KILLED_IN_A_SHARD, str(tmp_path / "killed"), layout]
    names = {}
    exec(WRITING, names)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "in mid-shard\n"
            with pytest.raises(FileExistsError, match=r"shard-000001.tar.tmp is being written: wait for the other wri"):
                ShardWriter(tmp_path / "killed", layout=layout, append=True)
        finally:
            process.kill()
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == ["shard-000000.tar", "shard-000000.tar.ltx", "shard-000001.tar.tmp"]
    names["write"](tmp_path / "killed", layout, append=True)
    names["write"](tmp_path / "whole", layout)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("layout", LAYOUTS)
@given(corpus=corpora(), cuts=st.lists(st.integers(0, 8), max_size=3), max_samples=st.integers(1, 4))
def test_a_corpus_written_in_several_goes_is_the_corpus_of_all_samples(
    tmp_path_factory: pytest.TempPathFactory, layout: str, corpus: Any, cuts: Any, max_samples: Any
) -> None:
    samples, stack = corpus
    folder = tmp_path_factory.mktemp("corpus")
    edges = [0, *sorted(min(cut, len(samples)) for cut in cuts), len(samples)]
    for first, last in pairwise(edges):
        if last or first:
            options = {"layout": layout, "max_samples": max_samples, "stack": stack if not first else ()}
            before = files(folder)
            write(folder, samples[first:last], append=True, **options)
            after = files(folder)
            assert all(after[name] == content for name, content in before.items() if name != "shard.ltx")
    dataset = ShardDataset(folder)
    for read, written in zip(dataset, samples, strict=True):
        assert_same(read, written)
    dataset.index.verify(checksums=True)


def test_a_finished_writer_is_gone_on_with_twice(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 1, 2]), max_samples=2)
    for first in (3, 5):
        with ShardWriter(tmp_path, append=True) as writer:
            assert list(writer.keys) == [f"k{number}" for number in range(first)]
            for sample in tokens([7, 8], first):
                writer.write(sample)
    assert ShardDataset(tmp_path).index.lengths.tolist() == [3, 1, 2, 7, 8, 7, 8]
    assert [path.name for path in writer.shards] == [f"shard-00000{number}.tar" for number in range(4)]
    LengthIndex.build(tmp_path, checksums=True).save(tmp_path / "again.ltx")
    assert (tmp_path / "again.ltx").read_bytes() == (tmp_path / "shard.ltx").read_bytes()


def test_keys_that_are_there_are_known(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 1, 2]), max_samples=2)
    with ShardWriter(tmp_path, append=True) as writer:
        for sample in tokens([3, 1, 2]):
            with pytest.raises(ValueError, match="'k.' was written before"):
                writer.write(sample)
        assert "k2" in writer.keys
        assert "k3" not in writer.keys
    assert len(ShardDataset(tmp_path)) == 3


def test_appending_to_nothing_is_writing(tmp_path: Path) -> None:
    write(tmp_path / "a", tokens([3, 1]), append=True)
    write(tmp_path / "b", tokens([3, 1]))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with pytest.raises(ValueError, match="nothing was written"), ShardWriter(tmp_path / "c", append=True):
        pass


THERE = {"__key__": "a", "x": np.ones((2, 4), np.float32), "v": np.arange(3), "n": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.ones((2, 4))}, TypeError, r"'x': must be float32 \[L, 4\] like in .*shard-000000.tar, got float64 "),
        (
            {"x": np.ones((2, 5), np.float32)},
            ValueError,
            r"float32 \[L, 4\] like in .*-000000.tar, got float32 \[2, 5\]",
        ),
        ({"v": np.arange(4)}, ValueError, r"'v': must be int64 \[3\] like in .*shard-000000.tar, got int64 \[4\]"),
        ({"n": 1.0}, TypeError, r"'n': must be int64 \[\] like in .*shard-000000.tar, got float64 \[\]"),
        ({"n": None}, ValueError, r"'n' is missing: every sample must have \['n', 'v', 'x'\] like in .*000000.tar"),
        ({"z": 1}, ValueError, "'z' is new: every sample must have .* like in .*shard-000000.tar"),
    ],
)
def test_a_schema_other_than_that_on_disk_is_refused_with_both(
    tmp_path: Path, layout: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    write(tmp_path, [THERE], layout=layout, stack=["v"])
    new = {name: value for name, value in (THERE | {"__key__": "b"} | change).items() if value is not None}
    with ShardWriter(tmp_path, layout=layout, append=True) as writer:
        with pytest.raises(error, match=message):
            writer.write(new)
        writer.write(THERE | {"__key__": "c", "x": np.ones((5, 4), np.float32)})
    assert ShardDataset(tmp_path).index.lengths.tolist() == [2, 5]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_or_stack_is_refused(tmp_path: Path, layout: str) -> None:
    write(tmp_path, [THERE], layout=layout, stack=["v"])
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    with pytest.raises(ValueError, match=f'000000.tar is in layout="{layout}": continue in it, got "{other}"'):
        ShardWriter(tmp_path, layout=other, append=True)
    with pytest.raises(ValueError, match=r"000000.tar: stack names 'x', which is float32 \[L, 4\] there"):
        ShardWriter(tmp_path, layout=layout, stack=["v", "x"], append=True)
    with pytest.raises(ValueError, match=r"000000.tar: stack names 'z', which is no field there"):
        ShardWriter(tmp_path, layout=layout, stack=["z"], append=True)


def test_shards_that_are_gone_changed_or_of_another_writer_are_refused(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 1, 2]), max_samples=1)
    shard = tmp_path / "shard-000001.tar"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"shard.ltx lists .*shard-000001.tar, which is not among .*: put it ba"
    ):
        ShardWriter(tmp_path, append=True)
    shard.write_bytes(content + b"more")
    with pytest.raises(ValueError, match=r"shard-000001.tar: changed since it was indexed: \d+ bytes, .*ltx says \[\d"):
        ShardWriter(tmp_path, append=True)
    shard.write_bytes(content)
    LengthIndex.build(shard).save(f"{shard}.ltx")
    with pytest.raises(
        ValueError, match=r"shard-000001.tar is indexed without checksums: delete .*000001.tar.ltx, and"
    ):
        ShardWriter(tmp_path, append=True)
    (tmp_path / "shard-000001.tar.ltx").unlink()
    write(tmp_path, tokens([4], 3), append=True)
    assert ShardDataset(tmp_path).index.lengths.tolist() == [3, 1, 2, 4]
    write(tmp_path / "b", [{"__key__": "other", "y": np.arange(2)}])
    for name in ("shard-000000.tar", "shard-000000.tar.ltx"):
        (tmp_path / "b" / name).rename(tmp_path / name.replace("000000", "000009"))
    with pytest.raises(ValueError, match=r"000009.tar and .*000000.tar cannot be one corpus: blocks of y.npy <i8"):
        ShardWriter(tmp_path, append=True)


def test_a_foreign_plain_shard_is_refused_by_its_encoding(tmp_path: Path) -> None:
    write(tmp_path, tokens([3]), layout="plain")
    shard = tmp_path / "shard-000000.tar"
    content = shard.read_bytes().replace(b"k0.label.cls", b"k0.label.wav")
    header = bytearray(content[1024 : 1024 + 512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    shard.write_bytes(content[:1024] + bytes(header) + content[1536:])
    for path in tmp_path.glob("*.ltx"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"000000.tar: field 'label' is stored as 'label.wav', to which no array can be"
    ):
        ShardWriter(tmp_path, layout="plain", append=True)


def test_writers_of_other_prefixes_are_let_be(tmp_path: Path) -> None:
    write(tmp_path, tokens([1]), prefix="shard")
    write(tmp_path, tokens([2]), prefix="shard-x")
    (tmp_path / "shard-x-000007.tar.tmp").touch()
    write(tmp_path, tokens([3], 1), prefix="shard", append=True)
    assert (tmp_path / "shard-x-000007.tar.tmp").exists()
    assert LengthIndex.open(tmp_path / "shard.ltx").lengths.tolist() == [1, 3]
    write(tmp_path, tokens([4], 1), prefix="shard-x", append=True)
    assert not list(tmp_path.glob("*.tmp"))
    assert LengthIndex.open(tmp_path / "shard-x.ltx").lengths.tolist() == [2, 4]


def test_of_two_writers_of_one_prefix_neither_overwrites_the_others_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_samples=1) as first, ShardWriter(tmp_path, max_samples=1) as second:
        for sample in tokens([3, 1]):
            first.write(sample)
        with pytest.raises(FileExistsError, match=r"shard-000000.tar exists: another writer is at work in this folder"):
            second.write(tokens([5], 5)[0])
        with pytest.raises(FileExistsError, match=r"shard-000001.tar.tmp is being written"):
            ShardWriter(tmp_path, append=True)
        second.local_shards = first.local_shards
    assert ShardDataset(tmp_path).index.lengths.tolist() == [3, 1]


def test_a_file_system_without_locks_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(stream: Any, operation: Any) -> None:
        raise OSError("locks are not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "shard-000000.tar.tmp").touch()
    write(tmp_path, tokens([3]), append=True)
    assert sorted(files(tmp_path)) == ["shard-000000.tar", "shard-000000.tar.ltx", "shard.ltx"]
