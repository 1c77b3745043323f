"""Shards behind a network that drops, refuses, stalls and damages: every sample comes once, with its bytes.

The server's faults follow a fixed schedule, and no test looks at the clock.
"""

import asyncio
import copy
import pickle
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run
from corpora import LAYOUTS, assert_same
from faulty import Faulty, faulty
from remote_corpus import ONCE, PATIENT, assert_each_once, numbered, running, server, write_layouts
from torch.utils.data import DataLoader, Dataset

from samplers import LengthBucketBatchSampler, LengthIndex, ShardDataset, ShardStream, Transport
from samplers.shards.storage.network import requests
from samplers.shards.storage.network.counts import Counts
from samplers.shards.storage.network.fetched import FetchedFile
from samplers.shards.storage.network.http_body import HttpBody
from samplers.shards.storage.network.remote import fetch_into, find_infos
from samplers.shards.storage.network.usual_times import UsualTimes
from samplers.shards.storage.reading import open_file

# Fixtures.
__all__ = ["running", "server"]

SHARDS, EACH = 20, 12
COUNT = SHARDS * EACH
# Stalls are given up soon, and waits are short. Enough tries that no schedule below can use them up.
QUICK = Transport(timeout=1.0, retries=12, backoff=0.01)
# One of 50 requests each is dropped or refused, and one in 200 stalls, as often as a bad network does it.
BAD_NETWORK = {"drop": (50, 3), "503": (50, 20), "stall": (200, 60), "break": (97, 11)}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def samples() -> list[dict[str, Any]]:
    return numbered(COUNT, shortest=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_layouts(tmp_path_factory.mktemp("faulty"), samples(), max_samples=EACH, block_size=4)


def open_dataset(server: Faulty, layout: str = "blocks", **options: Any) -> ShardDataset:
    return ShardDataset(server.url(f"{layout}.ltx"), **{"transport": QUICK, **options})


def assert_all_once(read: list[Any]) -> None:
    assert_each_once(read, samples())


# --- every job ends on a bad network


@layouts
def test_an_epoch_of_a_stream_ends_on_a_bad_network(server: Faulty, layout: str) -> None:
    server.behave(every=BAD_NETWORK | {"drop": (7, 3), "503": (9, 2)})
    stream = ShardStream(server.url(f"{layout}.ltx"), collate_fn=list, max_tokens=500, window=30, transport=QUICK)
    assert_all_once([sample for batch in stream for sample in batch])


@layouts
def test_an_index_is_built_on_a_bad_network(server: Faulty, folder: Path, layout: str) -> None:
    server.behave(every=BAD_NETWORK | {"drop": (7, 3), "503": (9, 2)})
    shards = server.url(f"{layout}-{{000000..000019}}.tar")
    built = LengthIndex.build(shards, checksums=True, transport=QUICK)
    assert built.fingerprint == LengthIndex.open(folder / f"{layout}.ltx").fingerprint
    built.verify(checksums=True)


def test_a_build_over_http_is_refused_before_its_scan(server: Faulty, folder: Path, tmp_path: Path) -> None:
    """Red when a shard over HTTP without an index was read whole, and then the index could not be written."""
    shards = "plain-{000000..000001}.tar"
    assert len(LengthIndex.build(server.url(shards), resume=True, checksums=True, transport=PATIENT)) == 2 * EACH
    with faulty(tmp_path) as other:
        for name in ("plain-000000.tar", "plain-000000.tar.ltx", "plain-000001.tar"):
            shutil.copy2(folder / name, tmp_path)
        with pytest.raises(ValueError, match=r"plain-000001.tar.ltx: this shard has no such index.*resume= a local"):
            LengthIndex.build(other.url(shards), resume=True, transport=PATIENT)
        assert [each for each in other.log() if each["method"] == "GET" and each["name"].endswith(".tar")] == []


@layouts
def test_batches_by_index_are_read_on_a_bad_network(server: Faulty, layout: str) -> None:
    server.behave(every=BAD_NETWORK)
    dataset = open_dataset(server, layout)
    order = np.random.default_rng(1).permutation(COUNT).reshape(-1, 24)
    assert_all_once([sample for batch in order for sample in dataset.__getitems__(batch)])


def the_only(items: list[Any]) -> Any:
    [item] = items
    return item


class Jobs(Dataset[list[Any]]):
    """What one worker does: item 0 is an epoch of a stream, item 1 all batches by index."""

    def __init__(self, server: Faulty) -> None:
        self.stream = ShardStream(server.url("plain.ltx"), collate_fn=list, max_tokens=500, window=30, transport=QUICK)
        self.dataset = open_dataset(server)
        self.sampler = LengthBucketBatchSampler(self.dataset.index, max_tokens=500)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, job: int) -> list[Any]:
        if job == 0:
            return [sample for batch in iter(self.stream) for sample in batch]
        return [sample for batch in self.sampler for sample in list(self.dataset.__getitems__(batch))]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_on_a_bad_network_after_their_parent(server: Faulty, folder: Path, start: str) -> None:
    server.behave(every=BAD_NETWORK | {"drop": (17, 3)})
    jobs = Jobs(server)
    # What the parent has open must not travel.
    list(jobs.dataset.__getitems__(range(0, COUNT, 7)))
    next(iter(jobs.stream))
    # One worker, which is asked for all: a spawned one takes seconds to import torch.
    for read in DataLoader(jobs, collate_fn=the_only, num_workers=1, multiprocessing_context=start):
        assert_all_once(read)
    if start == "fork":
        built = LengthIndex.build(server.url("plain-{000000..000019}.tar"), workers=2, transport=QUICK)
        assert built.fingerprint == LengthIndex.open(folder / "plain.ltx").fingerprint


# --- one round of requests


@layouts
def test_a_warm_batch_over_twenty_shards_is_one_round(server: Faulty, layout: str) -> None:
    dataset = open_dataset(server, layout, transport=ONCE)
    rows = list(range(EACH - 1, COUNT, EACH))
    list(dataset.__getitems__(rows))
    server.log()
    # No range is answered before there are as many as shards. One after the other, this would end with an error.
    server.gather(SHARDS)
    read = list(dataset.__getitems__(rows))
    server.gather(0)
    for sample, row in zip(read, rows, strict=True):
        assert_same(sample, samples()[row])
    assert {entry["name"] for entry in server.log()} == {f"{layout}-{shard:06}.tar" for shard in range(SHARDS)}


def test_the_first_batch_asks_for_sizes_and_headers_in_rounds(server: Faulty) -> None:
    dataset = open_dataset(server, transport=ONCE)
    # The server is known to give ranges.
    list(dataset.__getitems__([0]))
    server.log()
    server.gather(SHARDS - 1)
    list(dataset.__getitems__(list(range(EACH, COUNT, EACH))))
    server.gather(0)
    log = server.log()
    assert Counter(entry["method"] for entry in log)["HEAD"] == SHARDS - 1
    # Two parts of a block for a field of variable length, one for a field of fixed size, and the two values.
    assert len(log) <= 6 * (SHARDS - 1)


def test_a_shard_is_asked_for_its_size_once(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samplers.shards.opening.open_shards.HANDLES", 3)
    dataset = open_dataset(server, transport=PATIENT)
    for _ in range(2):
        assert_all_once(list(dataset.__getitems__(range(COUNT))))
    # Next to that of the index.
    assert Counter(entry["method"] for entry in server.log())["HEAD"] == SHARDS + 1


def test_neighbours_are_one_request_and_far_ranges_are_not(server: Faulty, folder: Path) -> None:
    (folder / "large.bin").write_bytes(np.random.default_rng(2).bytes(300_000))
    content = (folder / "large.bin").read_bytes()
    file = open_file(server.url("large.bin"), transport=PATIENT)
    file.read(0, 10)
    server.log()
    buffers = [np.empty(size, np.uint8) for size in (100, 0, 50, 100, 70)]
    offsets = [200_000, 5, 1000, 17_000, 1020]
    fetch_into([(file, buffers, offsets)])  # type: ignore[list-item]
    for buffer, offset in zip(buffers, offsets, strict=True):
        assert buffer.tobytes() == content[offset : offset + buffer.nbytes]
    assert sorted(entry["range"] for entry in server.log()) == [[1000, 17_099], [200_000, 200_099]]


# --- what is tried again, and how


@pytest.mark.parametrize("fault", ["break", "short", "hang"])
def test_a_body_that_ends_early_is_continued_at_its_offset(server: Faulty, folder: Path, fault: str) -> None:
    content = (folder / "plain-000003.tar").read_bytes()
    patience = replace(PATIENT, timeout=2.0) if fault == "hang" else PATIENT
    file = open_file(server.url("plain-000003.tar"), transport=patience)
    size, half = len(content), len(content) // 2
    server.behave(faults={"0": fault})
    server.log()
    fetched = FetchedFile(file)  # type: ignore[arg-type]
    assert fetched.read(0, size) == content
    assert [entry["range"] for entry in server.log()] == [None, [half, size - 1]]
    # A body that stops is given up after the timeout, for which the test waits: once.
    second = "break" if fault == "hang" else fault
    server.behave(faults={"0": second, "1": second})
    buffer = np.empty(2000, np.uint8)
    file.fill([buffer], [500])
    assert buffer.tobytes() == content[500:2500]
    assert [entry["range"] for entry in server.log()] == [[500, 2499], [1500, 2499], [2000, 2499]]


def test_a_whole_shard_begins_again_if_its_server_gives_no_ranges(server: Faulty, folder: Path) -> None:
    file = open_file(server.url("plain-000003.tar"), transport=PATIENT)
    server.behave(faults={"0": "break"}, ranges=False)
    server.log()
    fetched = FetchedFile(file)  # type: ignore[arg-type]
    assert fetched.read(0, file.size) == (folder / "plain-000003.tar").read_bytes()
    assert [entry["status"] for entry in server.log()] == [200, 200]


@pytest.mark.parametrize("status", ["404", "403", "400", "416", "501"])
def test_a_refusal_is_not_tried_again(server: Faulty, status: str) -> None:
    # One field is one request.
    dataset = open_dataset(server, transport=PATIENT, fields=["tokens"])
    list(dataset.__getitems__([5]))
    server.behave(faults={str(number): status for number in range(9)})
    server.log()
    kind = {"404": FileNotFoundError, "403": PermissionError}.get(status, OSError)
    hint = {"403": "check the credentials", "400": "check the region and the endpoint", "416": "index it again"}
    with pytest.raises(kind, match=rf"blocks-000000.tar: .*1 try.*{hint.get(status, '')}"):
        list(dataset.__getitems__([5]))
    assert [entry["status"] for entry in server.log()] == [int(status)]


def test_a_request_that_stalls_is_sent_a_second_time(server: Faulty) -> None:
    # No timeout would end it in the time that the test has.
    dataset = open_dataset(server, transport=Transport(timeout=500, retries=0, patience=4), fields=["tokens"])
    for _ in range(30):
        list(dataset.__getitems__(range(0, COUNT, 50)))
    server.behave(faults={"1": "stall"})
    before = dataset.transfers
    for row in range(0, COUNT, 50):
        assert dataset[row]["tokens"].tolist() == samples()[row]["tokens"].tolist()  # type: ignore[attr-defined]
    assert dataset.transfers["second_requests"] > before["second_requests"]
    assert dataset.transfers["retries"] == 0
    # A body that stops in its middle too.
    server.behave(faults={"1": "hang"})
    for row in range(0, COUNT, 50):
        assert dataset[row]["tokens"].tolist() == samples()[row]["tokens"].tolist()  # type: ignore[attr-defined]


def test_a_size_or_first_read_that_stalls_is_asked_for_a_second_time(
    server: Faulty, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red before: no timeout would end it in the time that the test has.
    monkeypatch.setattr(requests, "_USUAL", {})
    (folder / "large.bin").write_bytes(data := bytes(100_000))
    transport, url, counts = Transport(timeout=500, retries=0, patience=4), server.url("large.bin"), Counts()
    sizes = find_infos([url] * 40, transport)
    server.behave(faults={"0": "stall"})
    assert find_infos([url], transport, counts) == sizes[:1]
    assert counts.as_dict()["second_requests"] == 1
    # No answer of this size has come: it is judged by the sizes.
    server.behave(faults={"0": "stall"})
    assert open_file(url, transport=transport, info=sizes[0], counts=counts).read(0, 1 << 20) == data
    assert counts.as_dict()["second_requests"] == 2


def test_a_body_that_is_complete_is_not_asked_for_again() -> None:
    """Red when a second request continued it: a range without bytes."""
    body = HttpBody(None, "http://absent/a.tar", (2, 5), 9)
    body.data += b"abc"
    asyncio.run(body.receive("http://absent/a.tar", 1.0))
    assert body.data == b"abc"


def test_an_answer_that_comes_while_it_is_given_up_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when a client's answer to the first request was lost, and the rest of a whole range asked for."""
    usual = UsualTimes()
    for _ in range(20):
        usual.note(9, 0.001)
    monkeypatch.setitem(requests._USUAL, "absent", usual)
    calls: list[int] = []

    async def attempt() -> bytes:
        calls.append(1)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            # As `wait_for` of Python 3.11 does.
            return b"answer"
        return b""

    async def race() -> bytes:
        gate = asyncio.Semaphore(1)
        async with gate:
            request = requests.Request("http://absent/a.tar", "all", lambda: attempt, 9)
            return await requests._race(request, attempt, 0.001, gate)

    assert asyncio.run(race()) == b"answer"
    assert calls == [1]


def test_a_request_that_stalls_begins_again_where_no_connection_is_free(server: Faulty) -> None:
    # One connection, and no timeout that the test could wait for.
    one = Transport(connections=1, timeout=500, retries=0, patience=4)
    dataset = open_dataset(server, transport=one, fields=["tokens"])
    for _ in range(30):
        list(dataset.__getitems__(range(0, COUNT, 50)))
    for fault in ("stall", "hang"):
        server.behave(faults={"1": fault})
        before = dataset.transfers["second_requests"]
        # Red when the second request waited for a connection: for ever.
        for row in range(0, COUNT, 50):
            assert dataset[row]["tokens"].tolist() == samples()[row]["tokens"].tolist()  # type: ignore[attr-defined]
        assert dataset.transfers["second_requests"] > before


@pytest.mark.parametrize("status", ["429", "500", "503"])
def test_a_busy_server_is_asked_again_until_the_retries_end(server: Faulty, status: str) -> None:
    patient = Transport(retries=3, backoff=0.001)
    file = open_file(server.url("plain-000000.tar"), transport=patient)
    server.behave(faults={str(number): status for number in range(3)}, retry_after="0")
    assert len(file.read(0, 600)) == 600
    server.behave(faults={str(number): status for number in range(4)})
    message = (
        rf"plain-000000.tar: cannot be read: ClientResponseError: {status} .*\(bytes 7 to 17, 4 tries\): check the"
    )
    with pytest.raises(OSError, match=message) as error:
        file.fill([np.empty(10, np.uint8)], [7])
    assert "raise Transport(retries=, timeout=)" in str(error.value)
    assert "Range" not in str(error.value)


def test_a_server_says_how_long_to_wait(server: Faulty) -> None:
    file = open_file(server.url("plain-000000.tar"), transport=Transport(deadline=30, backoff=0))
    server.behave(faults={"0": "503"}, retry_after="1000")
    # It is known at once that the deadline comes first, so that the test need not wait.
    with pytest.raises(
        OSError, match=r"503.*bytes 0 to \d+, 1 try, not done after 30 s\): raise Transport\(deadline=\)"
    ):
        file.read(0, 600)


def test_a_deadline_ends_a_read_that_gets_no_answer(server: Faulty) -> None:
    file = open_file(server.url("plain-000000.tar"), transport=Transport(deadline=0.3, timeout=60))
    server.behave(faults={str(number): "stall" for number in range(9)})
    with pytest.raises(OSError, match="plain-000000.tar: cannot be read: TimeoutError .*not done after 0.3 s"):
        file.read(0, 600)


# --- what is wrong is never taken


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_read_that_has_failed_is_not_begun_again(server: Faulty, tmp_path: Path, *, is_cached: bool) -> None:
    """Red when a shard that could not be opened with others was opened again alone: a batch had two deadlines."""
    transport = Transport(timeout=100, retries=2, backoff=0, patience=0)
    dataset = open_dataset(server, transport=transport, cache=tmp_path if is_cached else None)
    server.behave(every={"503": (1, 0)})
    server.log()
    with pytest.raises(OSError, match="3 tries"):
        dataset.__getitems__(range(COUNT))[0]
    tried = Counter(entry["name"] for entry in server.log())
    assert max(tried.values()) <= 6


@layouts
def test_a_damaged_body_is_read_once_more(server: Faulty, layout: str) -> None:
    dataset = open_dataset(server, layout, transport=PATIENT)
    list(dataset.__getitems__(range(10, 14)))
    server.behave(faults={"0": "flip", "1": "flip"})
    server.log()
    for sample, expected in zip(dataset.__getitems__([10, 13]), (samples()[10], samples()[13]), strict=True):
        assert_same(sample, expected)
    server.behave(every={"flip": (1, 0)})
    with pytest.raises(ValueError, match="the bytes do not have the checksum in the index"):
        list(dataset.__getitems__([10, 13]))


def test_a_damaged_index_and_a_damaged_shard_are_read_once_more(server: Faulty, folder: Path) -> None:
    server.behave(faults={"1": "flip"})
    index = LengthIndex.open(server.url("plain.ltx"), transport=PATIENT)
    assert index.fingerprint == LengthIndex.open(folder / "plain.ltx").fingerprint
    server.behave(faults={"1": "flip"})
    index.verify(checksums=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("shift", "plain-000000.tar: its server sent the bytes 101-200 for 100-199: it has another file, or a fault"),
        ("gzip", r"plain-000000.tar: its server compresses it \(gzip\)"),
    ],
)
def test_a_server_that_sends_something_else_is_refused(server: Faulty, fault: str, message: str) -> None:
    file = open_file(server.url("plain-000000.tar"), transport=PATIENT)
    server.behave(faults={"0": fault})
    server.log()
    with pytest.raises(ValueError, match=message):
        file.fill([np.empty(100, np.uint8)], [100])
    assert len(server.log()) == 1


def test_a_file_that_changes_is_not_mixed_with_what_it_was(server: Faulty, folder: Path) -> None:
    path = folder / "changing.bin"
    path.write_bytes(b"a" * 5000)
    file = open_file(server.url("changing.bin"), transport=PATIENT)
    path.write_bytes(b"b" * 5001)
    with pytest.raises(ValueError, match="changing.bin: has 5001 bytes, it had 5000 when it was opened"):
        file.fill([np.empty(100, np.uint8)], [100])


def test_a_file_without_bytes_needs_no_request_for_them(server: Faulty, folder: Path) -> None:
    (folder / "empty.bin").write_bytes(b"")
    file = open_file(server.url("empty.bin"), transport=PATIENT)
    server.log()
    assert FetchedFile(file).read(0, 10) == file.read(0, 10) == b""  # type: ignore[arg-type]
    file.fill([np.empty(0, np.uint8)], [0])
    assert server.log() == []
    with pytest.raises(ValueError, match="empty.bin: ends at byte 0"):
        file.fill([np.empty(1, np.uint8)], [0])


def test_a_server_without_head_is_read(server: Faulty) -> None:
    server.behave(head=False)
    assert_same(open_dataset(server)[7], samples()[7])


def test_a_message_has_neither_query_nor_password(server: Faulty) -> None:
    server.behave(every={"403": (1, 0)})
    url = server.url("plain-000000.tar?signature=secret").replace("//", "//me:secret@", 1)
    with pytest.raises(PermissionError, match=r"//\.\.\.@127.*plain-000000.tar\?\.\.\.: cannot be read") as error:
        open_file(url, transport=PATIENT)
    assert "secret" not in str(error.value)


# --- processes, threads and options


def test_threads_read_while_workers_are_forked(server: Faulty) -> None:
    dataset = open_dataset(server, transport=PATIENT)
    failed: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                list(dataset.__getitems__(range(0, COUNT, 5)))
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        loader = DataLoader(dataset, batch_size=20, collate_fn=list, num_workers=2, multiprocessing_context="fork")
        for _ in range(2):
            assert_all_once([sample for batch in loader for sample in batch])
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failed == []


def test_a_copy_keeps_its_options_and_has_its_counts(server: Faulty) -> None:
    dataset = pickle.loads(pickle.dumps(open_dataset(server)))
    server.behave(faults={"0": "drop", "2": "503", "3": "503"})
    assert_same(dataset[7], samples()[7])
    assert dataset._transport == dataset.index._transport == QUICK
    # A shallow copy has the same counts, a deep one its own.
    requests = dataset.transfers["requests"]
    assert requests > 0
    assert copy.deepcopy(dataset).transfers["requests"] == 0
    assert copy.copy(dataset)[20 * 11]["label"] == 20 * 11
    assert dataset.transfers["requests"] > requests


def test_wrong_options_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="connections must be at least 1, got 0"):
        Transport(connections=0)
    with pytest.raises(ValueError, match=r"timeout must be a positive number of seconds, got nan"):
        Transport(timeout=float("nan"))
    with pytest.raises(TypeError, match=r"deadline must be a number of seconds, got '3'"):
        Transport(deadline="3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"transport must be a Transport\(.*got 5"):
        ShardDataset("http://host/a.ltx", transport=5)  # type: ignore[arg-type]


def test_the_command_takes_the_options_and_refuses_others(server: Faulty, tmp_path: Path) -> None:
    shards, target = server.url("plain-{000000..000003}.tar"), tmp_path / "some.ltx"
    server.behave(faults={"1": "503", "2": "drop"})
    run("index", shards, "--output", target, "--transport", "retries=8, backoff=0.01", "--workers", 0)
    assert len(LengthIndex.open(target)) == 4 * EACH
    run("verify", target, "--transport", "timeout=50", "--workers", 0)
    for wrong, message in {
        "tries=3": "'tries=3' must be one of connections, timeout, retries, deadline, backoff, patience",
        "retries=x": "'retries=x' must have a number behind =",
        "retries=-1": "retries must be at least 0, got -1",
    }.items():
        refused = run("verify", target, "--transport", wrong, status=2)
        assert message in refused.output
