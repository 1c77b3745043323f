"""LengthIndex.build(resume=...): a killed build scans only what it had not, and takes no index that does not fit."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from corpora import LAYOUTS, tokens, write
from hypothesis import given
from hypothesis import strategies as st

from samplers.shards.indexing import cache as kept
from samplers.shards.indexing.index import LengthIndex


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The shards that are scanned from now on."""
    seen, scan = [], kept.scan_shard

    def scan_shard(path: Path, *rest: Any, **options: Any) -> Any:
        seen.append(Path(path).name)
        return scan(path, *rest, **options)

    monkeypatch.setattr(kept, "scan_shard", scan_shard)
    return seen


def corpus(folder: Path, shards: int = 6, layout: str = "blocks") -> Any:
    """Shards without any index."""
    write(folder, tokens(list(range(shards))), max_samples=1, layout=layout)
    for path in folder.glob("*.ltx"):
        path.unlink()
    return folder


def names(*numbers: Any) -> Any:
    return [f"shard-{number:06}.tar" for number in numbers]


BUILD = """
import os, signal, sys
from samplers.shards.indexing import cache as kept
from samplers.shards.indexing.index import LengthIndex

scan = kept.scan_shard

def scan_shard(path, *rest, **options):
    if path.endswith("4.tar"):
        os.kill(os.getpid() if sys.argv[2] == "0" else os.getppid(), signal.SIGKILL)
        signal.pause()
    return scan(path, *rest, **options)

kept.scan_shard = scan_shard
LengthIndex.build(sys.argv[1], resume=True, workers=int(sys.argv[2]))
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_build_scans_only_the_rest(tmp_path: Path, layout: str, workers: int, scanned: Any) -> None:
    corpus(tmp_path, layout=layout)
    fresh = LengthIndex.build(tmp_path)
    scanned.clear()
    run = subprocess.run([sys.executable, "-c", BUILD, str(tmp_path), str(workers)], check=False)
    assert run.returncode == -9
    time.sleep(0.2)
    there = {path.name.removesuffix(".ltx") for path in tmp_path.glob("*.tar.ltx")}
    # When one worker comes to shard 4 the other may still be at an earlier one.
    assert len(there) >= 3
    assert there <= set(names(0, 1, 2, 3, 5))
    index = LengthIndex.build(tmp_path, resume=True)
    assert scanned == [name for name in names(*range(6)) if name not in there]
    assert index.fingerprint == fresh.fingerprint
    scanned.clear()
    again = LengthIndex.build(tmp_path, resume=True)
    assert scanned == []
    for each, name in ((fresh, "fresh"), (index, "index"), (again, "again")):
        each.save(tmp_path / f"{name}.ltx")
    assert len({(tmp_path / f"{name}.ltx").read_bytes() for name in ("fresh", "index", "again")}) == 1


def test_workers_take_what_is_kept(tmp_path: Path) -> None:
    corpus(tmp_path)
    LengthIndex.build(sorted(tmp_path.glob("*.tar"))[:3], resume=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.ltx")}
    index = LengthIndex.build(tmp_path, resume=True, workers=2)
    assert index.lengths.tolist() == list(range(6))
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert len(list(tmp_path.glob("*.ltx"))) == 6


@given(data=st.data())
def test_whatever_is_kept_the_index_is_that_of_a_fresh_build(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    folder = corpus(tmp_path_factory.mktemp("c"), 3, layout=data.draw(st.sampled_from(LAYOUTS)))
    shards = sorted(folder.glob("*.tar"))
    checksums = data.draw(st.booleans())
    fresh = LengthIndex.build(folder, checksums=checksums)
    some = data.draw(st.lists(st.sampled_from(shards), min_size=1, unique=True))
    LengthIndex.build(some, resume=True, checksums=data.draw(st.booleans()))
    damaged = data.draw(st.sampled_from(some)).with_suffix(".tar.ltx")
    content = bytearray(damaged.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    built = LengthIndex.build(folder, resume=True, checksums=checksums)
    for name, index in (("fresh", fresh), ("built", built)):
        index.save(folder / f"{name}.ltx")
    assert (folder / "built.ltx").read_bytes() == (folder / "fresh.ltx").read_bytes()


def test_a_shard_that_changed_is_scanned_again(tmp_path: Path, scanned: Any) -> None:
    corpus(tmp_path)
    LengthIndex.build(tmp_path, resume=True)
    scanned.clear()
    # Of another size; of the same size, written later; of the same size, written sooner but put here later.
    write(tmp_path / "b", tokens([1000, 7, 8], 50), max_samples=1)
    (tmp_path / "shard-000001.tar").write_bytes((tmp_path / "b" / "shard-000000.tar").read_bytes())
    (tmp_path / "shard-000002.tar").write_bytes((tmp_path / "b" / "shard-000001.tar").read_bytes())
    os.utime(tmp_path / "b" / "shard-000002.tar", (1, 1))
    (tmp_path / "b" / "shard-000002.tar").replace(tmp_path / "shard-000003.tar")
    assert LengthIndex.build(tmp_path, resume=True).lengths.tolist() == [0, 1000, 7, 8, 4, 5]
    assert scanned == names(1, 2, 3)
    LengthIndex.build(tmp_path, resume=True).verify()


def test_checksums_are_added_where_they_are_asked_for_and_never_lost(tmp_path: Path, scanned: Any) -> None:
    write(tmp_path, tokens([3, 1]), max_samples=1)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.ltx")}
    assert LengthIndex.build(tmp_path, resume=True)._tables.crcs is None
    assert scanned == []
    assert {path: path.read_bytes() for path in tmp_path.glob("*.ltx")} == before
    corpus(tmp_path / "b", 2)
    LengthIndex.build(tmp_path / "b", resume=True)
    scanned.clear()
    assert LengthIndex.build(tmp_path / "b", resume=True, checksums=True)._tables.crcs is not None
    assert scanned == names(0, 1)
    LengthIndex.open(tmp_path / "b" / "shard-000000.tar.ltx").verify(checksums=True)


def test_fields_are_those_asked_for_or_those_of_the_kept_indexes(tmp_path: Path) -> None:
    samples = [{"__key__": f"{n}", "x": np.zeros(n), "y": np.zeros(n + 1)} for n in range(3)]
    for layout in LAYOUTS:
        folder = write(tmp_path / layout, samples, layout=layout, max_samples=1)
        for path in folder.glob("*.ltx"):
            path.unlink()
        LengthIndex.build(folder / "shard-000001.tar", ["y"], resume=True)
        index = LengthIndex.build(folder, resume=True)
        assert (index.fields, index.lengths.tolist()) == (("y",), [1, 2, 3])
        with pytest.raises(ValueError, match=r"000000.tar.ltx has the lengths of \['y'\], asked for are \['x'\]: ask"):
            LengthIndex.build(folder, ["x"], resume=True)
        assert LengthIndex.build(folder, ["x"], resume=folder / "x").lengths.tolist() == [0, 1, 2]
        assert LengthIndex.build(folder, ["y"], resume=True, checksums=True).lengths.tolist() == [1, 2, 3]


def test_a_folder_keeps_the_indexes_of_shards_whose_names_are_alike(tmp_path: Path, scanned: Any) -> None:
    for name in "ab":
        corpus(tmp_path / name, 2)
    shards = [tmp_path / "a", tmp_path / "b"]
    index = LengthIndex.build(shards, resume=tmp_path / "kept")
    assert index.lengths.tolist() == [0, 1, 0, 1]
    assert not list(tmp_path.glob("?/*.ltx"))
    assert len(list((tmp_path / "kept").iterdir())) == 4
    scanned.clear()
    assert LengthIndex.build(shards, resume=str(tmp_path / "kept")).shards == index.shards
    assert scanned == []


def test_remote_shards_keep_their_indexes_in_a_folder_or_their_store(tmp_path: Path, scanned: Any) -> None:
    corpus(tmp_path, 2)
    memory = fsspec.filesystem("memory")
    urls = [f"memory://corpus/{name}" for name in names(0, 1)]
    for url, name in zip(urls, names(0, 1), strict=True):
        memory.pipe(url, (tmp_path / name).read_bytes())
    for _ in range(2):
        assert LengthIndex.build(urls, resume=tmp_path / "kept").lengths.tolist() == [0, 1]
    assert sorted(scanned) == names(0, 1)
    for _ in range(2):
        assert LengthIndex.build(urls, resume=True).lengths.tolist() == [0, 1]
    assert sorted(scanned) == sorted(names(0, 0, 1, 1))
    scanned[:] = names(0, 1)
    memory.pipe(urls[1], (tmp_path / names(1)[0]).read_bytes() + bytes(512))
    LengthIndex.build(urls, resume=tmp_path / "kept")
    assert scanned == names(0, 1, 1)


def test_what_a_killed_build_left_half_written_is_removed(tmp_path: Path) -> None:
    corpus(tmp_path, 2)
    (tmp_path / "shard-000000.tar.ltx.tmp").write_bytes(b"half")
    assert len(LengthIndex.build(tmp_path, resume=True)) == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_a_user_s_error_in_a_worker_keeps_its_type_and_shows_its_place(tmp_path: Path) -> None:
    corpus(tmp_path, 2)
    (tmp_path / "shard-000001.tar").write_bytes(b"no tar")
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"shard-000001.tar: at offset 0: the archive has no end mark") as caught:
            LengthIndex.build(tmp_path, workers=workers)
        assert any("in a worker process" in note for note in getattr(caught.value, "__notes__", [])) == bool(workers)
    for workers, error in ((-1, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="workers must be"):
            LengthIndex.build(tmp_path, workers=workers)
