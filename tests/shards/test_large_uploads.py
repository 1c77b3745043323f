"""Shards that a store puts together from parts, and two writers of one prefix, against a real server."""

from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from time import sleep
from typing import Any

import fsspec
import numpy as np
import pytest

# Not among the oldest versions.
pytest.importorskip("s3fs")
pytest.importorskip("moto")

from object_store import ObjectStore, object_store

from samplers import LengthIndex, ShardDataset, ShardWriter, Transport
from samplers.shards.storage.network import upload

# Of a shard: three parts of 16 MiB, with room for the headers.
STEPS = 9 << 20
PATIENT = Transport(timeout=100, retries=3, backoff=0.01)


@pytest.fixture(scope="module")
def running() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(running: ObjectStore) -> ObjectStore:
    running.behave()
    running.log()
    return running


def names(store: ObjectStore, folder: str) -> list[str]:
    system: Any = fsspec.filesystem("s3", skip_instance_cache=True)
    found = system.find(store.url(folder))
    return sorted(path.rpartition("/")[2] for path in found)


def sample(number: int, steps: int = STEPS) -> dict[str, Any]:
    return {"__key__": f"k{number}", "tokens": np.arange(number, number + steps, dtype=np.int32)}


def write_large(url: str, numbers: range, **options: Any) -> ShardWriter:
    """A shard for each sample, of which the first is large."""
    writer = ShardWriter(url, max_samples=1, transport=PATIENT, **options)
    with writer:
        for number in numbers:
            if f"k{number}" not in writer.keys:
                writer.write(sample(number, STEPS if number == 0 else 9))
    return writer


@pytest.mark.parametrize("stalled", ["part", "end"])
def test_a_large_shard_is_invisible_until_all_of_its_parts_are_there(store: ObjectStore, stalled: str) -> None:
    folder = f"large-{stalled}"
    shard = f"/{folder}/shard-000000.tar"

    def sent() -> list[str]:
        return [entry["method"] for entry in log if entry["path"].endswith(shard)]

    # Two lists of the folder, the beginning of the upload, three parts, its end: one is never answered.
    store.behave(faults={"part": {"4": "stall"}, "end": {"6": "stall"}}[stalled])
    process = get_context("fork").Process(target=write_large, args=(store.url(folder), range(2)), daemon=True)
    process.start()
    log: list[Any] = []
    expected = ["POST", "PUT", "PUT", "PUT", "POST"][: 4 if stalled == "part" else 5]
    while len(sent()) < len(expected):
        assert process.is_alive()
        sleep(0.02)
        log += store.log()
    assert sent() == expected
    # Red with a client that writes under the final name.
    assert names(store, folder) == []
    process.kill()
    process.join()
    store.behave()
    assert names(store, folder) == []
    with pytest.raises(FileNotFoundError):
        ShardDataset(store.url(f"{folder}/shard.ltx"))
    # As locally.
    writer = write_large(store.url(folder), range(2), append=True)
    assert list(writer.keys) == ["k0", "k1"]
    assert [name for name in names(store, folder) if name.endswith(".tar")] == ["shard-000000.tar", "shard-000001.tar"]
    data = ShardDataset(store.url(f"{folder}/shard.ltx"))
    assert [(data[each]["tokens"] == sample(each, STEPS if each == 0 else 9)["tokens"]).all() for each in range(2)] == [
        True,
        True,
    ]


def test_an_end_without_an_answer_is_not_taken_for_another_writer(store: ObjectStore) -> None:
    # No answer: the store has put the parts together, and its client does not know.
    store.behave(faults={"6": "lost"})
    write_large(store.url("answer"), range(1))
    log = store.log()
    assert [entry["method"] for entry in log].count("POST") > 2, log
    # The same of a small shard, whose second try is refused by the condition.
    store.behave(faults={"2": "lost"})
    with ShardWriter(store.url("small"), transport=PATIENT) as writer:
        writer.write(sample(0, 9))
    assert 412 in [entry["status"] for entry in store.log()]
    store.behave()
    for folder in ("answer", "small"):
        LengthIndex.open(store.url(f"{folder}/shard.ltx")).verify(checksums=True)


@pytest.mark.parametrize("append", [False, True])
def test_the_second_of_two_writers_of_a_prefix_gets_an_error(store: ObjectStore, append: bool) -> None:
    folder = store.url(f"two-{append}")
    if append:
        with ShardWriter(folder, transport=PATIENT) as writer:
            writer.write(sample(0, 8))
    first, second = (ShardWriter(folder, max_samples=1, append=append, transport=PATIENT) for _ in range(2))
    with first:
        first.write(sample(1, 5))
    # Red when the shard of the first writer was replaced.
    with pytest.raises(FileExistsError, match=r"shard-00000\d.tar was written by another writer"), second:
        second.write(sample(2, 7))
    with ShardWriter(folder, max_samples=1, append=True, transport=PATIENT) as writer:
        assert list(writer.keys)[-1] == "k1"
        writer.write(sample(3, 6))
    index = LengthIndex.open(f"{folder}/shard.ltx")
    assert list(index.keys)[-2:] == ["k1", "k3"]
    index.verify(checksums=True)


def test_a_store_without_conditions_is_written_without(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_WITHOUT_CONDITIONS", set())
    # Two lists, and the first try of the shard.
    store.behave(faults={"2": "501"})
    with ShardWriter(store.url("plain"), transport=PATIENT) as writer:
        writer.write(sample(0, 9))
    assert len(upload._WITHOUT_CONDITIONS) == 1
    assert len(LengthIndex.open(store.url("plain/shard.ltx"))) == 1


def test_a_client_without_coroutines_refuses_and_repeats_too(tmp_path: Path) -> None:
    memory: Any = fsspec.filesystem("memory")
    path = tmp_path / "a.tar"
    for content, is_refused in ((b"one", False), (b"one", False), (b"two", True)):
        path.write_bytes(content)
        try:
            upload._put(memory, path, "/prefix/a.tar", is_new=True)
        except FileExistsError:
            assert is_refused
        else:
            assert not is_refused
    assert memory.find("/prefix") == ["/prefix/a.tar"]
    assert memory.cat_file("/prefix/a.tar") == b"one"
