"""A folder in which the processes of a machine keep remote shards: what is read is what was written."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from corpora import LAYOUTS, assert_same, write
from faulty import Faulty, faulty
from remote_corpus import ONCE, PATIENT, assert_each_once, numbered, running, server, write_layouts
from torch.utils.data import DataLoader

from samplers import LengthBucketBatchSampler, ShardDataset, ShardStream, Transport
from samplers.shards.storage import shard_cache
from samplers.shards.storage.atomic import AtomicFile
from samplers.shards.storage.locks import lock

# Fixtures.
__all__ = ["running", "server"]

SHARDS, EACH = 8, 6
COUNT = SHARDS * EACH


def samples() -> list[dict[str, Any]]:
    return numbered(COUNT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_layouts(tmp_path_factory.mktemp("cached"), samples(), max_samples=EACH, block_size=3)


def assert_all_once(read: list[Any]) -> None:
    assert_each_once(read, samples())


def open_stream(server: Faulty, cache: Path, layout: str = "blocks", **options: Any) -> ShardStream:
    given = {"collate_fn": list, "max_tokens": 200, "window": 2 * EACH, "transport": PATIENT, "cache": cache}
    return ShardStream(server.url(f"{layout}.ltx"), **given | options)


def epoch(stream: Any) -> list[Any]:
    return [sample for batch in stream for sample in batch]


def shard_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.name.endswith(".tar"))


@pytest.mark.parametrize(("layout", "workers"), [("blocks", 2), ("plain", 0)])
def test_the_second_epoch_needs_no_request(server: Faulty, tmp_path: Path, layout: str, workers: int) -> None:
    stream = open_stream(server, tmp_path / "cache", layout)
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    assert_all_once(epoch(loader))
    fetched = [entry["name"] for entry in server.log() if entry["method"] == "GET" and entry["name"] != f"{layout}.ltx"]
    # Two workers want the same shards; each was fetched by one of them.
    assert sorted(fetched) == [f"{layout}-{shard:06}.tar" for shard in range(SHARDS)]
    assert_all_once(epoch(loader))
    assert server.log() == []
    transfers = stream.transfers
    assert transfers["cache_misses"] == SHARDS
    assert transfers["cache_hits"] > 0
    # Another process, and reads by index.
    dataset = ShardDataset(server.url(f"{layout}.ltx"), transport=PATIENT, cache=tmp_path / "cache")
    server.log()
    assert_all_once(list(dataset.__getitems__(range(COUNT))))
    assert_all_once([dataset[index] for index in range(COUNT)])
    assert server.log() == []
    assert dataset.transfers["requests"] == 0


def test_a_dataset_fetches_the_shards_of_a_batch_together(server: Faulty, tmp_path: Path) -> None:
    dataset = ShardDataset(server.url("plain.ltx"), transport=ONCE, cache=tmp_path / "cache")
    sampler = LengthBucketBatchSampler(dataset.index, batch_size=4)
    server.gather(SHARDS)
    rows = list(range(0, COUNT, EACH))
    for sample, row in zip(dataset.__getitems__(rows), rows, strict=True):
        assert_same(sample, samples()[row])
    server.gather(0)
    server.log()
    assert_all_once(epoch(DataLoader(dataset.follow(sampler), batch_sampler=sampler, collate_fn=list)))
    assert server.log() == []


def test_a_cache_is_bounded_and_forgets_what_was_not_used_for_longest(server: Faulty, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    dataset = ShardDataset(server.url("blocks.ltx"), transport=PATIENT)
    sizes = [shard.size for shard in dataset._tables.shards]
    limit = 3 * max(sizes)
    stream = open_stream(server, cache, cache_bytes=limit)
    for _ in range(2):
        assert_all_once(epoch(stream))
        assert sum(path.stat().st_size for path in shard_files(cache)) <= limit
    small = ShardDataset(server.url("blocks.ltx"), transport=PATIENT, cache=cache, cache_bytes=limit)
    for row in (0, EACH, 2 * EACH):
        small[row]
    # A process that has shards open has not used them since; another one opens the first again.
    ShardDataset(server.url("blocks.ltx"), transport=PATIENT, cache=cache, cache_bytes=limit)[1]
    small[3 * EACH]
    assert [path.name.rpartition("-")[2] for path in sorted(shard_files(cache), key=lambda path: path.name[-10:])] == [
        "000000.tar",
        "000002.tar",
        "000003.tar",
    ]
    # A shard that was removed is fetched again, also by those who had it open, whose disk it would still use.
    assert_same(small[EACH + 1], samples()[EACH + 1])
    tiny = ShardDataset(server.url("blocks.ltx"), transport=PATIENT, cache=tmp_path / "tiny", cache_bytes=100)
    assert_all_once(list(tiny.__getitems__(range(COUNT))))
    assert shard_files(tmp_path / "tiny") == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_file_in_the_cache_is_fetched_again(server: Faulty, tmp_path: Path, layout: str) -> None:
    cache = tmp_path / "cache"
    assert_all_once(epoch(open_stream(server, cache, layout)))
    for number, path in enumerate(shard_files(cache)):
        content = bytearray(path.read_bytes())
        # Bits of all samples; nothing but zeros, as after a crash; cut.
        damaged = [bytes(255 - byte for byte in content), bytes(len(content)), bytes(content[:-512]), bytes(content)]
        path.write_bytes(damaged[number % 4])
    server.log()
    assert_all_once(epoch(open_stream(server, cache, layout)))
    names = {entry["name"] for entry in server.log() if entry["name"].endswith(".tar")}
    assert len(names) == 6
    assert_all_once(epoch(open_stream(server, cache, layout)))
    server.log()
    assert_all_once(epoch(open_stream(server, cache, layout)))
    assert {entry["name"] for entry in server.log()} == {f"{layout}.ltx"}


def test_a_shard_that_was_written_again_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    with faulty(source) as server:
        for seed in range(2):
            for path in source.iterdir():
                path.unlink()
            written = [{"__key__": str(number), "tokens": np.arange(9) + seed} for number in range(4)]
            write(source, written, layout="blocks")
            dataset = ShardDataset(server.url("shard.ltx"), cache=cache)
            assert_same(dataset[2], written[2])


def test_two_who_want_the_same_shard_fetch_it_once(server: Faulty, tmp_path: Path) -> None:
    datasets = [ShardDataset(server.url("blocks.ltx"), transport=PATIENT, cache=tmp_path / "cache") for _ in range(4)]
    server.log()
    read: list[Any] = []
    threads = [threading.Thread(target=lambda each=each: read.append(each[3])) for each in datasets]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sample in read:
        assert_same(sample, samples()[3])
    assert len(read) == 4
    assert [entry["method"] for entry in server.log()] == ["GET"]


def test_a_killed_process_s_file_is_replaced_and_a_live_one_s_awaited(
    server: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    ShardDataset(server.url("blocks.ltx"), cache=cache)[0]
    [path] = shard_files(cache)
    path.unlink()
    # A killed process leaves its file without a lock.
    leftover = path.with_name(path.name + ".tmp")
    leftover.write_bytes(b"half")
    assert_same(ShardDataset(server.url("blocks.ltx"), cache=cache)[0], samples()[0])
    assert shard_files(cache) == [path]
    assert not leftover.exists()
    # One that is at work for too long is not waited for for ever.
    path.unlink()
    impatient = Transport(deadline=0.3)
    with leftover.open("wb") as stream:
        assert lock(stream)
        slow = ShardDataset(server.url("blocks.ltx"), cache=cache, transport=impatient)
        # The shard itself, not its index, whose deadline is the same.
        assert_same(slow[1], samples()[1])
        assert shard_files(cache) == []
    # Where the disk is full, nothing is kept, and a warning says so.
    monkeypatch.setattr(shard_cache, "_READ_AT_ONCE", 1000)
    full = ShardDataset(server.url("blocks.ltx"), cache=cache)
    monkeypatch.setattr("samplers.shards.storage.atomic._NamedFile.write", _full_disk)
    assert_same(full[EACH], samples()[EACH])
    assert shard_files(cache) == []


def _full_disk(*_: Any) -> int:
    raise OSError(28, "No space left on device")


def test_killed_readers_leave_nothing_that_is_read(server: Faulty, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    # After the index, every body stops at its half.
    server.behave(every={"hang": (1, 2)})
    command = (
        "import sys; from samplers import ShardDataset; dataset = ShardDataset(sys.argv[1], cache=sys.argv[2])\n"
        "print('open', flush=True); dataset.__getitems__(range(len(dataset)))[0]"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command, server.url("plain.ltx"), str(cache)], stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    process.stdout.readline()
    while not any(path.name.endswith(".tmp") for path in cache.iterdir()):
        assert process.poll() is None
        sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    server.behave()
    dataset = ShardDataset(server.url("plain.ltx"), cache=cache, transport=PATIENT)
    assert_all_once(list(dataset.__getitems__(range(COUNT))))
    assert len(shard_files(cache)) == SHARDS
    assert not any(path.name.endswith(".tmp") for path in cache.iterdir())


def test_threads_that_find_one_damaged_file_all_read_the_shard(server: Faulty, tmp_path: Path) -> None:
    """Red when only the thread that found the damage first read again: the others raised."""
    dataset = ShardDataset(server.url("blocks.ltx"), transport=PATIENT, cache=tmp_path)
    dataset.__getitems__(range(COUNT))[0]
    for path in shard_files(tmp_path):
        path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    server.behave(latency=0.05)
    dataset = ShardDataset(server.url("blocks.ltx"), transport=PATIENT, cache=tmp_path)
    sampler = LengthBucketBatchSampler(dataset.index, batch_size=4)
    assert_all_once(epoch(DataLoader(dataset.follow(sampler), batch_sampler=sampler, collate_fn=list)))


def test_a_cache_that_cannot_be_written_is_read_and_no_more(
    server: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Red when shards in a read-only cache, and those of another user, were an error."""
    dataset = ShardDataset(server.url("blocks.ltx"), transport=PATIENT, cache=tmp_path / "cache")
    dataset.__getitems__(range(EACH))[0]

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    server.log()
    with monkeypatch.context() as patch:
        patch.setattr(shard_cache, "AtomicFile", refuse)
        patch.setattr(shard_cache.os, "utime", refuse)
        dataset = ShardDataset(server.url("blocks.ltx"), transport=PATIENT, cache=tmp_path / "cache")
        assert len(list(dataset.__getitems__(range(EACH)))) == EACH
        assert {entry["name"] for entry in server.log()} == {"blocks.ltx"}
        assert_all_once(list(dataset.__getitems__(range(COUNT))))
    assert len(shard_files(tmp_path / "cache")) == 1
    # A limit of the size of files (RLIMIT_FSIZE).
    with monkeypatch.context() as patch:
        patch.setattr(AtomicFile, "rename", lambda _: refuse())
        dataset = ShardDataset(server.url("blocks.ltx"), transport=PATIENT, cache=tmp_path / "limited")
        assert_all_once(list(dataset.__getitems__(range(COUNT))))
    assert [path.name for path in (tmp_path / "limited").iterdir()] == ["lock"]
    # Once for each folder, and not for each shard and batch.
    assert sum("not kept in the cache" in message for message in caplog.messages) == 2


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_process_that_was_forked_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Red when the lock went with the open file: each shard then waited ten seconds for a worker to end."""
    with shard_cache._locked(tmp_path / "lock"):
        [held] = [int(each.name) for each in Path("/proc/self/fd").iterdir() if each.resolve() == tmp_path / "lock"]
        # As a forked process has it.
        inherited = os.dup(held)
    with (tmp_path / "lock").open("ab") as stream:
        assert lock(stream) is True
    os.close(inherited)


def test_an_interrupt_does_not_wait_for_a_server_without_answer(tmp_path: Path) -> None:
    """Red when shards were fetched by a pool that waits for its threads: here for ever."""
    program = """
import _thread, sys, threading
import numpy as np
from samplers import LengthIndex, ShardDataset, ShardWriter
from samplers.shards.opening.open_shards import OpenShards

once = iter([True])

def wait(*_):
    if next(once, False):
        _thread.interrupt_main()
    threading.Event().wait()

with ShardWriter("memory://corpus", max_samples=2) as writer:
    for number in range(6):
        writer.write({"__key__": str(number), "x": np.arange(number)})
dataset = ShardDataset("memory://corpus/shard.ltx", cache=sys.argv[1])
OpenShards.fetch = wait
try:
    dataset.__getitems__(range(6))[0]
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_wrong_options_of_a_cache_are_refused(server: Faulty, tmp_path: Path) -> None:
    url = server.url("plain.ltx")
    with pytest.raises(ValueError, match="cache_bytes must be at least 1, got 0"):
        ShardDataset(url, cache=tmp_path / "c", cache_bytes=0)
    with pytest.raises(ValueError, match=r"cache must be a path on this machine, got 's3://bucket/x'"):
        ShardDataset(url, cache="s3://bucket/x")
