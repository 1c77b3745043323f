"""Shards behind a web server: what is read is what is on its disk, by ranges; what cannot be read is named."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import LAYOUTS, assert_same, write
from hypothesis import given
from hypothesis import strategies as st
from served import Served, serving
from torch.utils.data import DataLoader

from samplers import LengthBucketBatchSampler, LengthIndex, ShardDataset, ShardStream, ShardWriter
from samplers.shards.indexing.index import _names_of
from samplers.shards.storage.reading import open_file

EXAMPLES = Path(__file__).parents[2] / "examples"
COUNT = 60
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def samples(seed: int = 0) -> list[dict[str, object]]:
    """Tokens of up to 240 KB, some of them none."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 30_000, COUNT) * (rng.random(COUNT) > 0.1)
    return [
        {"__key__": f"k{index}", "tokens": rng.integers(0, 1000, length), "label": index}
        for index, length in enumerate(lengths.tolist())
    ]


def write_both(folder: Path, **options: object) -> Path:
    """The same samples in both layouts, three shards each, named by them."""
    for layout in LAYOUTS:
        write(folder, samples(), layout=layout, prefix=layout, max_samples=20, block_size=10, **options)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Any]:
    with serving(folder) as server:
        yield server


def shard_bytes(folder: Path, layout: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{layout}-*.tar"))


def shards_of(server: Served, layout: str, manner: str = "ranges") -> str:
    return server.url(f"{layout}-{{000000..000002}}.tar", manner)


@given(
    layout=st.sampled_from(LAYOUTS),
    named=st.booleans(),
    indices=st.lists(st.integers(-COUNT, COUNT - 1), max_size=9),
)
def test_samples_by_index_are_those_of_the_local_shards(
    folder: Path, server: Any, layout: str, named: Any, indices: Any
) -> None:
    there = server.url(f"{layout}.ltx") if named else shards_of(server, layout)
    index = None if named else folder / f"{layout}.ltx"
    remote, local = ShardDataset(there, index), ShardDataset(folder / f"{layout}.ltx")
    for read, expected in zip(remote.__getitems__(indices), local.__getitems__(indices), strict=True):
        assert_same(read, expected)


@layouts
def test_an_index_comes_through_its_url_with_one_request_for_its_bytes(folder: Path, server: Any, layout: str) -> None:
    server.log()
    index, local = LengthIndex.open(server.url(f"{layout}.ltx")), LengthIndex.open(folder / f"{layout}.ltx")
    log = server.log()
    assert log["GET 206"] == log["requests"] - log["HEAD 200"] == 1
    assert log["bytes"] == (folder / f"{layout}.ltx").stat().st_size
    assert index.fingerprint == local.fingerprint
    assert index.order.tolist() == local.order.tolist()
    assert index.shards == [server.url(Path(path).name) for path in local.shards]


@layouts
def test_a_few_samples_are_fetched_by_ranges_alone(folder: Path, server: Any, layout: str) -> None:
    dataset = ShardDataset(server.url(f"{layout}.ltx"))
    server.log()
    read = list(dataset.__getitems__([3, 50, 27, 4]))
    log = server.log()
    assert log["GET 200"] == 0
    # Apart from the samples, what two headers of each of four blocks say, read at least 64 KiB at once.
    assert log["bytes"] <= sum(sample["tokens"].nbytes for sample in read) + 9 * (1 << 16) + 4096
    assert log["bytes"] < shard_bytes(folder, layout) / 4
    list(dataset.__getitems__([3, 50, 27, 4]))
    again = server.log()
    assert again["HEAD 200"] == 0
    # The members of a plain sample are one request, with the headers between them.
    assert again["bytes"] <= sum(sample["tokens"].nbytes for sample in read) + 4 * 4096


@given(data=st.data())
def test_reads_anywhere_in_a_remote_file_give_its_bytes(folder: Path, server: Any, data: Any) -> None:
    name = "plain-000001.tar"
    content = (folder / name).read_bytes()
    file = open_file(server.url(name))
    sizes = st.one_of(st.integers(0, 1000), st.integers(0, 2 * len(content)))
    offset = 0
    for gap, size in data.draw(st.lists(st.tuples(st.integers(-70_000, 600_000), sizes), max_size=8)):
        offset = min(max(0, offset + gap), len(content) + 10)
        assert file.read(offset, size) == content[offset : offset + size]


@layouts
def test_an_index_is_built_from_ranges_and_nothing_is_fetched_twice(folder: Path, server: Any, layout: str) -> None:
    server.log()
    built = LengthIndex.build(shards_of(server, layout))
    log = server.log()
    assert built.fingerprint == LengthIndex.open(folder / f"{layout}.ltx").fingerprint
    assert log["GET 200"] == 0
    # Plain members lie so near that to pass over them would take longer.
    assert log["bytes"] <= shard_bytes(folder, layout) * (1 if layout == "plain" else 0.5)


def test_an_index_with_checksums_is_built_and_verified_over_http(server: Any) -> None:
    index = LengthIndex.build(shards_of(server, "plain"), checksums=True)
    index.verify(checksums=True)
    assert index.fingerprint == LengthIndex.open(server.url("plain.ltx")).fingerprint


def epoch_by_index(corpus: str | Path, workers: int, **options: object) -> list[list[dict[str, object]]]:
    """The batches of an epoch."""
    dataset = ShardDataset(corpus)
    # The parent has read as well: what it has open must not travel.
    dataset[0]
    sampler = LengthBucketBatchSampler(dataset.index, max_tokens=100_000)
    return list(DataLoader(dataset, batch_sampler=sampler, collate_fn=list, num_workers=workers, **options))


def assert_same_batches(read: Any, expected: Any) -> None:
    assert [len(batch) for batch in read] == [len(batch) for batch in expected]
    for batch, other in zip(read, expected, strict=True):
        for sample, written in zip(batch, other, strict=True):
            assert_same(sample, written)


@pytest.mark.parametrize(("layout", "start"), [("blocks", "fork"), ("plain", "fork"), ("blocks", "spawn")])
def test_workers_read_by_index_over_http(folder: Path, server: Any, layout: str, start: str) -> None:
    read = epoch_by_index(server.url(f"{layout}.ltx"), 2, multiprocessing_context=start)
    assert_same_batches(read, epoch_by_index(folder / f"{layout}.ltx", 0))


@layouts
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_equals_the_local_one_and_fetches_each_shard_whole(
    folder: Path, server: Any, layout: str, workers: int
) -> None:
    options = {"collate_fn": list, "max_tokens": 100_000, "window": 20}
    server.log()
    remote = ShardStream(server.url(f"{layout}.ltx"), **options)
    read = list(DataLoader(remote, batch_size=None, collate_fn=list, num_workers=workers))
    log = server.log()
    assert_same_batches(read, list(ShardStream(folder / f"{layout}.ltx", **options)))
    if workers == 0:
        assert log["GET 200"] == 3
        assert log["bytes"] == shard_bytes(folder, layout) + (folder / f"{layout}.ltx").stat().st_size


def test_plain_shards_are_rewritten_from_their_url(server: Any, tmp_path: Path) -> None:
    ShardWriter.rewrite(tmp_path, server.url("plain.ltx"))
    for read, written in zip(ShardDataset(tmp_path), samples(), strict=True):
        assert_same(read, written)


def test_redirects_and_queries_are_followed(folder: Path, server: Any) -> None:
    index = folder / "blocks.ltx"
    shards = [server.url(f"blocks-00000{shard}.tar", "moved") for shard in range(3)]
    assert_same(ShardDataset(shards, index)[41], ShardDataset(index)[41])
    signed = [server.url(f"blocks-00000{shard}.tar?token=1", "signed") for shard in range(3)]
    built = LengthIndex.build(signed)
    assert_same(ShardDataset(signed, built)[41], ShardDataset(index)[41])


def test_an_index_without_signatures_reads_signed_urls(folder: Path, server: Any, tmp_path: Path) -> None:
    """Red when a signature was part of a shard's name, and a missing shard was a wildcard that matches nothing."""
    index = LengthIndex.open(folder / "blocks.ltx")
    signed = [server.url(f"blocks-00000{shard}.tar?token=1&key=secret", "signed") for shard in range(3)]
    assert_same(ShardDataset(signed, index, cache=tmp_path)[41], ShardDataset(folder / "blocks.ltx")[41])
    stale = [url.replace("token=1", "token=2") for url in signed]
    gone = [url.replace("/signed/", "/signed/gone/") for url in signed]
    for urls, error in ((stale, PermissionError), (gone, FileNotFoundError)):
        with pytest.raises(error, match=r"blocks-000001.tar\?\.\.\.") as caught:
            ShardDataset(urls, index)[25]
        assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="give the same shards in the same order") as swapped:
        index.moved_to(signed[::-1])
    assert "secret" not in str(swapped.value)
    # Where the query is the name, it counts.
    assert _names_of([f"http://host/get?file={letter}.tar" for letter in "ab"]) == ["get?file=a.tar", "get?file=b.tar"]


@layouts
def test_a_server_without_ranges_is_refused_by_index_and_does_for_a_stream(
    folder: Path, server: Any, layout: str
) -> None:
    index, shards = folder / f"{layout}.ltx", shards_of(server, layout, "whole")
    server.log()
    with pytest.raises(ValueError, match=r"/whole/\w+-000002.tar: its server sent \d+ bytes for a range of .*, and gi"):
        list(ShardDataset(shards, index).__getitems__(range(41, 60)))
    # Not once for every sample.
    assert server.log()["GET 200"] == 1
    with pytest.raises(ValueError, match="/whole/.*copy the file, or use ShardStream, which fetches shards whole"):
        LengthIndex.build(shards)
    options = {"collate_fn": list, "max_tokens": 100_000}
    assert_same_batches(ShardStream(shards, index, **options), ShardStream(index, **options))


@layouts
def test_a_server_that_says_it_gives_no_ranges_is_refused_at_once(folder: Path, server: Any, layout: str) -> None:
    dataset = ShardDataset(shards_of(server, layout, "denied"), folder / f"{layout}.ltx")
    server.log()
    with pytest.raises(ValueError, match=r"/denied/\w+-000000.tar: its server gives no size, or no ranges.*copy the"):
        dataset[0]
    assert server.log()["bytes"] == 0


@pytest.mark.parametrize(
    ("manner", "kind", "message"),
    [
        (
            "ranges",
            FileNotFoundError,
            r"/ranges/lost-000001.tar, which the index lists: put it back, give shards= their",
        ),
        ("busy", OSError, r"/busy/lost-000001.tar: cannot be read: ClientResponseError: 503"),
        ("signed", OSError, r"/signed/lost-000001.tar: cannot be read: ClientResponseError: 403"),
    ],
)
def test_a_shard_that_cannot_be_had_is_named_with_the_reason(
    server: Any, tmp_path: Path, manner: str, kind: type[Exception], message: str
) -> None:
    folder = write(tmp_path, samples(1), prefix="lost", max_samples=40)
    index, shards = folder / "lost.ltx", shards_of(server, "lost", manner).replace("2}", "1}")
    dataset = ShardDataset(shards, index)
    with pytest.raises(kind, match=message):
        dataset[50]
    with pytest.raises(OSError, match=f"/{manner}/lost-00000[01].tar"):
        list(ShardStream(shards, index, collate_fn=list, max_tokens=100_000))
    with pytest.raises(OSError, match=f"/{manner}/lost-000000.tar"):
        LengthIndex.build(shards)


def test_a_missing_index_and_an_unreachable_one_have_different_errors(server: Any, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no index http.*/ranges/none.ltx"):
        LengthIndex.open(server.url("none.ltx"))
    with serving(folder) as other:
        url = other.url("blocks.ltx")
    with pytest.raises(OSError, match=f"{url}: cannot be read: .*Cannot connect"):
        LengthIndex.open(url)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_dies_in_an_epoch_is_an_error_that_names_the_shard(folder: Path, workers: int) -> None:
    with serving(folder) as server:
        dataset = ShardDataset(server.url("plain.ltx"))
        batches = iter(DataLoader(dataset, batch_size=1, collate_fn=list, num_workers=workers))
        next(batches)
    with pytest.raises(OSError, match=f"{server.root}/ranges/plain-00000[012].tar: cannot be read: "):
        list(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_dies_during_a_stream_is_an_error_with_the_shard(folder: Path, workers: int) -> None:
    with serving(folder) as server:
        # Without what was read ahead, which would be the whole corpus.
        stream = ShardStream(server.url("blocks.ltx"), collate_fn=list, batch_size=2, window=10, read_ahead_bytes=0)
        batches = iter(DataLoader(stream, batch_size=None, num_workers=workers))
        next(batches)
    with pytest.raises(OSError, match=f"{server.root}/ranges/blocks-00000[012].tar: cannot be read: "):
        list(batches)


def test_the_example_serves_a_corpus_and_reads_it_both_ways() -> None:
    # Its main process reads over HTTP after forked workers have read: it once waited for ever for what they closed.
    path = EXAMPLES / "shards_over_http.py"
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    [written] = re.findall(r"the shards have ([\d,]+) bytes", done.stdout)
    told = re.findall(r"([\d,]+) samples, padding ([\d.]+)%; ([\d,]+) requests, ([\d,]+) bytes", done.stdout)
    for samples, padding, _, sent in told:
        assert samples == "3,000"
        assert float(padding) < 10
        assert 1 < number(sent) / number(written) < 1.2
    (_, _, by_index, _), (_, _, stream, _) = told
    # Neighbours of a batch are one request.
    assert number(stream) < 30 < 2000 < number(by_index)
    assert len(path.read_text().splitlines()) < 80


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_a_corrupt_sample_is_found_without_fetching_its_shard_again(tmp_path: Path) -> None:
    folder = write(tmp_path, samples(), max_samples=20, block_size=10)
    index = int(LengthIndex.open(folder / "shard.ltx").lengths[:40].argmax())
    shard = folder / f"shard-{index // 20:06}.tar"
    content = bytearray(shard.read_bytes())
    content[LengthIndex.open(folder / "shard.ltx")._tables.offsets[index, 0]] ^= 1
    shard.write_bytes(content)
    with serving(folder) as server:
        (folder / "shard-000002.tar").unlink()
        url = server.url("shard.ltx")
        stream = ShardStream(url, collate_fn=list, batch_size=20, window=60, handler=lambda _: True)
        server.log()
        keys = {sample["__key__"] for batch in stream for sample in batch}
        log = server.log()
        # Red before: the run ended. Halves down to a sample would have fetched the shard a dozen times.
        assert keys == {f"k{other}" for other in range(40) if other != index}
        assert log["GET 200"] == 2
        # Once for all of its samples, and once before with those of the others.
        assert log["GET 404"] == 2
        assert stream.skipped == {
            server.url(shard.name): {"damaged": 1},
            server.url("shard-000002.tar"): {"missing": 20},
        }
        data = ShardDataset(url, handler=lambda _: True)
        assert len(data.__getitems__(range(60))) == 39
