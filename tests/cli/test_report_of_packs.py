"""`lengthtrack report --pack`: its figures are those of the sampler's plan, and its pictures tell them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from samplers import PackingBatchSampler
from samplers.cli.commands import main
from samplers.cli.compare import PolynomialCost

LENGTHS = np.random.default_rng(0).integers(0, 600, 400)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with lengths of one field and of two."""
    monkeypatch.chdir(tmp_path)
    np.save("lengths.npy", LENGTHS)
    np.save("two.npy", np.stack([LENGTHS, LENGTHS // 3], 1))
    return tmp_path


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result


def test_the_figures_are_those_of_the_plan(work: Path) -> None:
    options = ["--replicas", 3, "--seed", 7, "--rows", 2, "--multiple", 8, "--max-documents", 9, "--cost", "100,1"]
    figures = json.loads(run("lengths.npy", "--pack", "1024,2048", *options, "--epoch", 2, "--json", "-").output)
    for entry, capacity in zip(figures["plans"], (1024, 2048), strict=True):
        sampler = PackingBatchSampler(
            LENGTHS,
            capacity=capacity,
            rows=2,
            multiple=8,
            max_documents=9,
            cost=PolynomialCost(100, 1),
            seed=7,
            num_replicas=3,
            rank=0,
        )
        assert entry["report"] == asdict(sampler.plan(2).report())
        assert (entry["options"]["capacity"], entry["options"]["cost"]) == ([capacity], [100, 1])
    assert figures["lengths"]["samples"] == 400


def test_a_column_stands_for_each_capacity(work: Path) -> None:
    lines = run("lengths.npy", "--pack", 1024, "--pack", "2048,512", "--overlong", "split").output.splitlines()
    columns = {line[:21].strip(): line[21:].split() for line in lines if "  " in line}
    assert columns["capacity"] == ["1,024", "2,048", "512"]
    reports = [
        PackingBatchSampler(LENGTHS, capacity=capacity, overlong="split").plan(0).report()
        for capacity in (1024, 2048, 512)
    ]
    assert columns["rows"] == [f"{report.rows:,}" for report in reports]
    assert columns["waste"] == [f"{report.waste:.2%}" for report in reports]
    assert columns["pairs that meet again"] == [f"{report.repeated_pairs:.3%}" for report in reports]
    assert columns["split"] == ["0", "0", str((LENGTHS > 512).sum())]


def test_the_picture_tells_how_full_rows_are_and_what_ranks_cost(work: Path) -> None:
    run("lengths.npy", "--pack", "1024,2048", "--replicas", 2, "--cost", 1, "--plot", "packs.svg")
    drawn = Path("packs.svg").read_text()
    for text in ("How full rows are", "Documents of a row", "the slowest rank", "Cost of steps, 2 ranks", "2,048"):
        assert text in drawn


def test_each_of_two_fields_has_the_capacity(work: Path) -> None:
    figures = json.loads(run("two.npy", "--pack", 1024, "--overlong", "error", "--json", "-").output)
    report = PackingBatchSampler(np.load("two.npy"), capacity=(1024, 1024)).plan(0).report()
    assert figures["plans"][0]["report"] == asdict(report)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--pack", "0"], 2, "'0' is not a positive integer"),
        (["--pack", "512", "--overlong", "error"], 1, "must fit in a row of capacity 512"),
        (["--pack", "512", "--overlong", "alone"], 2, "--overlong alone is not for --pack"),
        (["--pack", "512", "--max-tokens", "9"], 2, "--max-tokens is not for --pack: a row holds its capacity"),
        (["--pack", "512", "--count", "real"], 2, "--count is not for --pack"),
        (["--pack", "512", "--cost", "1,2,3"], 2, "must be SQUARE or LINEAR,SQUARE"),
        (["--rows", "2", "--max-tokens", "900"], 2, "--rows needs --pack"),
        (["--cost", "1", "--max-tokens", "900"], 2, "--cost needs --pack"),
        (["--max-tokens", "900", "--overlong", "split"], 2, "--overlong split needs --pack"),
    ],
)
def test_options_that_do_not_go_together_are_refused(work: Path, arguments: Any, status: int, words: str) -> None:
    assert words in run("lengths.npy", *arguments, status=status).stderr


def test_a_column_that_nobody_named_is_named(work: Path) -> None:
    # Red before: the report said only how many samples there are.
    rows = [{"id": number, "tokens": [1] * length, "mask": [1] * length} for number, length in enumerate((3, 5, 2))]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pytest.importorskip("pyarrow.parquet").write_table(
        pytest.importorskip("pyarrow").table({"words": [[1, 2], [3]]}), "words.parquet"
    )
    assert "3 samples, lengths of tokens (as long as mask)\n" in run("rows.jsonl", "--pack", 8).output
    assert "2 samples, lengths of words\n" in run("words.parquet", "--max-tokens", 8).output
    assert "400 samples\n" in run("lengths.npy", "--pack", 1024).output
