"""What was transferred over a network is shown: by `--transfers`, and behind progress bars, over all workers."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# Not among the oldest versions.
pytest.importorskip("aiohttp")

from command import run
from faulty import Faulty, faulty
from remote_corpus import PATIENT, numbered, write_layouts

from collate import PadCollator
from samplers import LengthIndex, ShardDataset, run_in_order
from samplers.shards.storage.network.counts import PROCESS, TransferBar, describe_transfers

SHARDS = 6
LINE = re.compile(r"transfers: ([\d,]+) requests?, ([\d,]+) retr(?:y|ies), ([\d.]+) (k?B), waited [\d.]+ s")
# One that is never sent twice.
TRANSPORT = "patience=0,retries=12,backoff=0.01,timeout=100"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    with faulty(write_layouts(tmp_path_factory.mktemp("corpus"), numbered(24), max_samples=4)) as server:
        yield server


@pytest.mark.parametrize("workers", [0, 2])
def test_commands_tell_the_requests_of_all_workers(server: Faulty, tmp_path: Path, workers: int) -> None:
    shards = server.url("blocks-{000000..000005}.tar")
    output = tmp_path / "corpus.ltx"
    options = ["--workers", workers, "--transport", TRANSPORT, "--transfers"]
    for command in (["index", shards, "--output", output], ["verify", output]):
        server.log()
        told = run(*command, *options)
        requests, retries, size, unit = LINE.search(told.stderr).groups()  # type: ignore[union-attr]
        # Red when worker processes kept their counts to themselves: 0 requests.
        assert int(requests) == len(server.log()) >= SHARDS
        assert retries == "0"
        assert float(size) > 1
        assert unit == "kB"
        assert "transfers" not in told.stdout
        # A body that breaks off is asked for again.
        server.behave(every={"break": (4, 1)})
        told = run(*command, *options)
        assert int(LINE.search(told.stderr)[2]) > 0  # type: ignore[index]
        server.behave()


def test_a_command_that_fails_tells_them_too(server: Faulty, tmp_path: Path) -> None:
    failed = run("index", server.url("absent.tar"), "--output", tmp_path / "a.ltx", "--transfers", status=1)
    assert "transfers: 1 request, 0 retries, 0 B" in failed.stderr
    assert "no such file" in failed.stderr
    write_layouts(tmp_path, numbered(4))
    told = run("report", tmp_path / "blocks.ltx", "--max-tokens", 100, "--transfers", "--json", "-")
    assert "transfers: none" in told.stderr
    assert "transfers" not in told.stdout


@pytest.mark.parametrize("workers", [0, 2])
def test_bars_of_an_index_and_of_a_run_show_them(
    server: Faulty, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    index = LengthIndex.build(
        server.url("blocks-{000000..000005}.tar"), workers=workers, progress=True, transport=PATIENT
    )
    assert re.search(r"\d requests?, 0 retries, .+ kB, waited", capsys.readouterr().err)
    data = ShardDataset(index.shards, index, fields=["tokens"], transport=PATIENT)
    options = {"collate_fn": PadCollator(), "batch_size": 5, "num_workers": workers, "progress": True}
    assert len(run_in_order(lambda batch: batch["tokens"].lengths, data, **options)) == 24
    bar = capsys.readouterr().err
    assert re.search(r"tok.*\d requests?, 0 retries, .+ kB, waited", bar.rpartition("\r")[2])
    # Those of the build are no part of them.
    assert f" {data.transfers['requests']} requests" in bar.rpartition("\r")[2]
    # What has another meaning, or is local, is not shown.
    local = [sample["tokens"] for sample in numbered(6)]
    run_in_order(lambda batch: batch.lengths, local, **options)
    assert "requests" not in capsys.readouterr().err


def test_counts_as_text_leave_out_what_there_is_none_of() -> None:
    counts = {"requests": 1, "retries": 2, "bytes": 0, "bytes_sent": 1_500_000, "waited_seconds": 0.0}
    assert describe_transfers(counts) == "1 request, 2 retries, 1.5 MB sent, waited 0.0 s"
    counts |= {"bytes": 999, "second_requests": 3, "bytes_sent": 0}
    assert describe_transfers(counts) == "1 request, 2 retries, 3 sent twice, 999 B, waited 0.0 s"
    before = PROCESS.as_dict()
    PROCESS.add_all({"requests": 2, "bytes_sent": 5})
    assert PROCESS.as_dict()["bytes_sent"] == before["bytes_sent"] + 5

    class Bar:
        disable = True

    TransferBar(Bar()).show()
