"""Shards in an object store: written there, indexed there, and read on a bad network, against a real server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from time import sleep
from typing import Any

import fsspec
import pytest

# Not among the oldest versions.
pytest.importorskip("s3fs")
pytest.importorskip("moto")

from command import run
from corpora import write
from object_store import ObjectStore, object_store
from remote_corpus import PATIENT, assert_each_once, numbered
from torch.utils.data import DataLoader

from samplers import LengthBucketBatchSampler, LengthIndex, ShardDataset, ShardStream, ShardWriter, Transport

COUNT, EACH = 24, 4


def samples(count: int = COUNT) -> list[dict[str, Any]]:
    return numbered(count)


def part(number: int) -> list[dict[str, Any]]:
    return samples()[8 * number : 8 * number + 8]


@pytest.fixture(scope="module")
def running() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(running: ObjectStore) -> ObjectStore:
    running.behave()
    running.log()
    return running


def write_to(writer: ShardWriter) -> None:
    with writer:
        for sample in samples():
            if sample["__key__"] not in writer.keys:
                writer.write(sample)


def names(store: ObjectStore, folder: str) -> list[str]:
    system = fsspec.filesystem("s3")
    system.invalidate_cache()
    return sorted(path.rpartition("/")[2] for path in system.ls(store.url(folder).removeprefix("s3://")))


def content(store: ObjectStore, name: str) -> bytes:
    return bytes(fsspec.filesystem("s3").cat_file(store.url(name)))


def assert_all_once(read: list[Any], count: int = COUNT) -> None:
    assert_each_once(read, samples(count))


def read_all(url: str, **options: Any) -> list[Any]:
    return [sample for batch in ShardStream(url, collate_fn=list, max_tokens=200, **options) for sample in batch]


def test_a_writer_writes_the_same_bytes_to_a_store_and_to_a_folder(store: ObjectStore, tmp_path: Path) -> None:
    write(tmp_path, samples(), max_samples=EACH)
    writer = ShardWriter(store.url("written"), max_samples=EACH)
    write_to(writer)
    assert names(store, "written") == sorted(path.name for path in tmp_path.iterdir())
    for path in tmp_path.iterdir():
        assert content(store, f"written/{path.name}") == path.read_bytes()
    assert writer.shards == [store.url(f"written/shard-{number:06}.tar") for number in range(6)]
    # Each shard is sent before its index, and all before the corpus file.
    put = [entry["path"].rpartition("/")[2] for entry in store.log() if entry["method"] == "PUT"]
    assert all(put.index(f"shard-{number:06}.tar") < put.index(f"shard-{number:06}.tar.ltx") for number in range(6))
    assert put[-1] == "shard.ltx"
    assert_all_once(read_all(store.url("written/shard.ltx")))
    with pytest.raises(FileExistsError, match="append=True"):
        ShardWriter(store.url("written"))
    with ShardWriter(store.url("written"), max_samples=EACH, append=True) as writer:
        assert list(writer.keys) == [sample["__key__"] for sample in samples()]
        for sample in samples(COUNT + 3)[COUNT:]:
            writer.write(sample)
    assert_all_once(read_all(store.url("written/shard.ltx")), COUNT + 3)
    assert not writer._folder.parent.joinpath("shard.ltx").exists()


@pytest.mark.parametrize("fault", ["shard", "index", "corpus"])
def test_a_writer_that_is_killed_leaves_whole_shards_and_resumes(store: ObjectStore, fault: str) -> None:
    folder = f"killed-{fault}"
    # A shard, its index, a shard, ..., the corpus file: this one is never answered.
    suffix = {"shard": "shard-000002.tar", "index": "shard-000002.tar.ltx", "corpus": "shard.ltx"}[fault]
    store.behave(refused=suffix, faults={"refused": "stall"})
    process = get_context("fork").Process(
        target=lambda: write_to(ShardWriter(store.url(folder), max_samples=EACH)), daemon=True
    )
    process.start()
    while not any(entry["path"].endswith(suffix) for entry in store.log()):
        assert process.is_alive()
        sleep(0.01)
    process.kill()
    process.join()
    store.behave()
    there = names(store, folder)
    assert suffix not in there
    with ShardWriter(store.url(folder), max_samples=EACH, append=True) as writer:
        written = len(writer.keys)
        assert written == EACH * sum(name.endswith(".tar") for name in there)
        assert list(writer.keys) == [sample["__key__"] for sample in samples()[:written]]
        for sample in samples()[written:]:
            writer.write(sample)
    assert_all_once(read_all(store.url(f"{folder}/shard.ltx")))
    LengthIndex.open(store.url(f"{folder}/shard.ltx")).verify(checksums=True)


def test_a_shard_that_cannot_be_sent_is_an_error_and_not_lost(store: ObjectStore) -> None:
    store.behave(refused="shard-000001.tar", faults={"refused": "403"})
    writer = ShardWriter(store.url("refused"), max_samples=EACH)
    with pytest.raises(PermissionError, match=r"refused/shard-000001.tar: cannot be written: .*check the credentials"):
        write_to(writer)
    assert set(writer.keys) <= {sample["__key__"] for sample in samples()[:EACH]}
    assert "shard-000001.tar" not in names(store, "refused")
    # A bad network is none.
    store.behave(every={"drop": (5, 2), "503": (7, 4), "break": (6, 3)})
    write_to(ShardWriter(store.url("refused"), max_samples=EACH, append=True))
    store.behave()
    assert_all_once(read_all(store.url("refused/shard.ltx")))


def test_parts_are_written_and_rewritten_by_several_processes(store: ObjectStore) -> None:
    def run_parts(**options: Any) -> LengthIndex:
        return ShardWriter.write_parts(store.url("parts"), part, range(3), max_samples=EACH, **options)

    store.behave(refused="shard-000001-000001.tar", faults={"refused": "403"})
    with pytest.raises(RuntimeError, match=r"part 1.*cannot be written"):
        run_parts()
    store.behave()
    index = run_parts(append=True, workers=2)
    assert list(index.keys) == [sample["__key__"] for sample in samples()]
    # No marks of finished parts remain.
    assert [name for name in names(store, "parts") if name.endswith(".ltx") and ".tar" not in name] == ["shard.ltx"]
    rewritten = ShardWriter.rewrite(store.url("plain"), store.url("parts/shard.ltx"), layout="plain", max_samples=5)
    assert rewritten.shards == [store.url(f"plain/shard-{number:06}-000000.tar") for number in range(6)]
    assert_all_once(read_all(store.url("plain/shard.ltx")))
    with pytest.raises(ValueError, match="would be read, and others of its prefix written"):
        ShardWriter.rewrite(store.url("plain"), store.url("plain/shard.ltx"), append=True)


def test_an_index_is_built_and_kept_in_the_store(store: ObjectStore, tmp_path: Path) -> None:
    write(tmp_path, samples(), max_samples=EACH, layout="plain")
    system = fsspec.filesystem("s3")
    for path in tmp_path.glob("*.tar"):
        system.put_file(str(path), store.url(f"raw/{path.name}"))
    shards = store.url("raw/*.tar")
    built = LengthIndex.build(shards, checksums=True, resume=True)
    built.save(store.url("raw/corpus.ltx"))
    assert built.fingerprint == LengthIndex.open(tmp_path / "shard.ltx").fingerprint
    store.log()
    again = LengthIndex.build(shards, checksums=True, resume=True)
    assert again.fingerprint == built.fingerprint
    # Of shards that have an index, only the size is asked for.
    assert not any(entry["path"].endswith(".tar") and entry["method"] == "GET" for entry in store.log())
    moved = LengthIndex.build(shards, resume=store.url("indexes"))
    assert moved.fingerprint == built.fingerprint
    assert len(names(store, "indexes")) == 6
    # Paths are relative, so that the folder can be copied.
    assert b"s3://" not in content(store, "raw/corpus.ltx")
    assert (
        LengthIndex.open_all([store.url(f"raw/shard-{number:06}.tar.ltx") for number in range(6)]).shards
        == built.shards
    )
    assert_all_once(read_all(store.url("raw/corpus.ltx")))


def test_files_that_another_machine_has_written_since_a_list_are_found(store: ObjectStore, tmp_path: Path) -> None:
    write_to(ShardWriter(store.url("listed"), max_samples=EACH))
    shards = store.url("listed/*.tar")
    index = LengthIndex.build(shards)
    assert len(ShardDataset(shards, index)) == COUNT
    # A client of its own, as on another machine: this one has listed the folder.
    other: Any = fsspec.filesystem("s3", skip_instance_cache=True)
    for count in (2, 6):
        LengthIndex.concat([LengthIndex.open(f"{shard}.ltx") for shard in index.shards[:count]]).save(
            tmp_path / "corpus.ltx"
        )
        other.put_file(str(tmp_path / "corpus.ltx"), store.url("listed/corpus.ltx"))
        # Red when the list was believed: no index; and then its former size, a damaged one.
        assert len(LengthIndex.open(store.url("listed/corpus.ltx"))) == count * EACH
        fsspec.filesystem("s3").ls(store.url("listed"))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_job_ends_on_a_bad_network(store: ObjectStore, tmp_path: Path, workers: int) -> None:
    folder = f"bad-{workers}"
    write_to(ShardWriter(store.url(folder), max_samples=EACH))
    # Sent twice where one stalls, or after a second.
    quick = Transport(timeout=1.0, retries=12, backoff=0.01)
    store.behave(every={"drop": (20, 3), "503": (20, 9), "stall": (70, 15), "break": (30, 11)})
    start: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    url = store.url(f"{folder}/shard.ltx")
    stream = ShardStream(url, collate_fn=list, max_tokens=200, window=9, transport=quick, cache=tmp_path / "cache")
    for _ in range(2):
        assert_all_once([sample for batch in DataLoader(stream, batch_size=None, **start) for sample in batch])
    dataset = ShardDataset(url, transport=quick)
    sampler = LengthBucketBatchSampler(dataset.index, batch_size=5)
    loader = DataLoader(dataset.follow(sampler), batch_sampler=sampler, collate_fn=list, **start)
    for _ in range(2):
        assert_all_once([sample for batch in loader for sample in batch])
    built = LengthIndex.build(store.url(f"{folder}/shard-{{000000..000005}}.tar"), workers=workers, transport=quick)
    assert built.fingerprint == dataset.index.fingerprint


def test_the_second_epoch_from_a_store_needs_no_request(store: ObjectStore, tmp_path: Path) -> None:
    ShardWriter.write_parts(store.url("cached"), part, range(3), max_samples=EACH)
    stream = ShardStream(
        store.url("cached/shard.ltx"), collate_fn=len, max_tokens=200, transport=PATIENT, cache=tmp_path / "cache"
    )
    assert sum(stream) == COUNT
    shards = [entry for entry in store.log() if entry["path"].endswith(".tar") and entry["method"] == "GET"]
    assert len(shards) == 6
    assert sum(stream) == COUNT
    assert store.log() == []


@pytest.mark.parametrize("change", [-512, 512])
def test_a_shard_of_another_size_in_a_store_is_named(store: ObjectStore, change: int) -> None:
    folder = f"changed{change}"
    write_to(ShardWriter(store.url(folder), max_samples=EACH))
    name = f"{folder}/shard-000003.tar"
    before = content(store, name)
    other: Any = fsspec.filesystem("s3", skip_instance_cache=True)
    other.pipe_file(store.url(name), before[:change] if change < 0 else before + bytes(change))
    store.log()
    with pytest.raises(ValueError, match=rf"{len(before) + change} bytes, the index says {len(before)}: changed since"):
        read_all(store.url(f"{folder}/shard.ltx"), transport=PATIENT)
    # Only that of this shard was asked for.
    assert {entry["path"].rpartition("/")[2] for entry in store.log() if entry["method"] == "HEAD"} <= {
        "shard.ltx",
        "shard-000003.tar",
    }


def test_the_command_converts_to_a_store_and_resumes_there(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"t": list(range(1 + number % 7))}) for number in range(20)]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n")
    folder = store.url("converted")
    store.behave(refused="shard-000002.tar", faults={"refused": "403"})
    failed = run("convert", "rows.jsonl", folder, "--max-samples", 5, status=1)
    assert "shard-000002.tar: cannot be written" in failed.stderr
    store.behave()
    assert "--resume" in run("convert", "rows.jsonl", folder, "--max-samples", 5, status=1).stderr
    told = run("convert", "rows.jsonl", folder, "--max-samples", 5, "--resume", "--transfers")
    assert re.search(r"transfers: \d+ requests, 0 retries, .*B sent, waited", told.stderr)
    assert f"{folder}/shard.ltx: 20 samples in 4 shards" in told.output
    assert len(LengthIndex.open(f"{folder}/shard.ltx")) == 20
    assert not any("unfinished" in name for name in names(store, "converted"))
    told = run("index", f"{folder}/shard-*.tar", "--output", f"{folder}/again.ltx", "--workers", 0)
    assert f"{folder}/again.ltx: built, 20 samples" in told.output
    run("verify", f"{folder}/again.ltx", "--workers", 0)


def test_the_example_writes_and_reads_its_own_store() -> None:
    path = Path(__file__).parents[2] / "examples" / "shards_over_s3.py"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    epochs = re.findall(r"(.+): 600 samples; so far ([\d,]+) requests, ([\d,]+) bytes", done.stdout)
    assert [name for name, *_ in epochs] == ["by index", "stream", "stream again, from the cache"]
    assert epochs[1][1:] == epochs[2][1:]


def test_wrong_credentials_and_missing_buckets_say_so(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.behave(every={"403": (1, 0)})
    with pytest.raises(PermissionError, match=r"any.ltx: cannot be read: .*1 try\): check the credentials"):
        LengthIndex.open(store.url("any.ltx"), transport=PATIENT)
    store.behave()
    with pytest.raises(FileNotFoundError, match="no index s3://corpus/any.ltx"):
        LengthIndex.open(store.url("any.ltx"), transport=PATIENT)
    with pytest.raises(ValueError, match="over HTTP and through caches files are read, and not written"):
        ShardWriter(f"{store.root}/corpus/x")
    assert list(tmp_path.iterdir()) == []
