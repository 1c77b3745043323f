"""The benchmark of loaders: every loader gives all rows, its figures meet their targets as said, failures are named."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.mark.unix
def test_the_benchmark_runs_and_each_loader_gives_all_rows() -> None:
    small = ["--quick", "--scale", "0.005", "--rounds", "1", "--seconds", "0.05", "--parts", "speed", "--no-peers"]
    done = subprocess.run([sys.executable, FOLDER / "loading.py", *small], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for loader in ("ShardDataset", "ShardStream", "memory map, pad_sequence", "memory map, one gather"):
        for workers in (0, 2):
            # Once for each work, and perhaps in a target.
            assert done.stdout.count(f"\n{loader}, {workers} workers  ") == 3, done.stdout
    assert "missing:" not in done.stdout
    assert "saved to" not in done.stdout


@pytest.mark.parametrize("name", ["tokens", "frames", "sft"])
def test_a_work_comes_back_from_its_files_with_exact_sums(name: str, tmp_path: Path) -> None:
    works: Any = importlib.import_module("loaders.works")
    made = works.make_work(name, 0.003)
    made.save(tmp_path / name)
    back = works.Work.open(tmp_path / name)
    assert list(back.fields) == list(made.fields)
    assert np.array_equal(back.lengths, made.lengths)
    for field, values in made.fields.items():
        assert np.array_equal(back.fields[field], values)
    # Any order of the samples, and any padding, has the same sums.
    samples = back.samples()[::-1]
    for field, expected in made.totals().items():
        padding = works.PADDING[field]
        pieces = [works.total(sample[field], padding) for sample in samples]
        pieces.append(works.total(np.full((7, 5), padding), padding))
        assert sum(pieces) == expected


def test_a_work_is_the_same_in_every_run() -> None:
    works: Any = importlib.import_module("loaders.works")
    one, two = (works.make_work("tokens", 0.01) for _ in range(2))
    assert np.array_equal(one.fields["tokens"], two.fields["tokens"])
    assert one.key(1) == "tokens-00000001"


@pytest.mark.unix
def test_a_library_that_is_not_installed_is_missing_with_its_name(tmp_path: Path) -> None:
    process: Any = importlib.import_module("loading_process")
    with pytest.raises(process.MissingError, match="no_such_loader"):
        process.Process("no_such_loader", tmp_path)


@pytest.mark.unix
def test_a_process_that_fails_says_why_and_starts_again(tmp_path: Path) -> None:
    process: Any = importlib.import_module("loading_process")
    with process.Process("by_hand", tmp_path) as running:
        with pytest.raises(process.MissingError, match="by_hand has ended: .*FileNotFoundError"):
            running.ask("write", work="no such work", loader="memory map, one gather")
        assert "memory map, one gather" in running.ask("list")["loaders"]


def test_an_epoch_that_loses_a_row_stops_the_benchmark() -> None:
    loading: Any = importlib.import_module("loading")
    works: Any = importlib.import_module("loaders.works")
    work = works.make_work("tokens", 0.001)

    class Losing:
        def ask(self, do: str, **_: object) -> dict[str, Any]:
            found = {"rows": len(work.lengths) - 1, "sums": work.totals(), "values": 1}
            return {"write": {"bytes": 1}, "check": found}[do]

    ours = loading.Contender("by_hand", "loader", 0, {})
    with (
        pytest.raises(SystemExit, match="must give 100 rows of tokens .* gives 99 rows"),
        loading.left_out(ours, work, [ours], {}),
    ):
        loading.check(work, ours, Losing())
    # A library that does so is left out.
    other = loading.Contender("lit_data", "litdata", 2, {})
    contenders, missing = [other], {}
    with loading.left_out(other, work, contenders, missing):
        loading.check(work, other, Losing())
    assert contenders == []
    assert "gives 99 rows" in missing["tokens: litdata, 2 workers"]


def contender(source: str, loader: str, workers: int, rate: float) -> dict[str, Any]:
    facts = {"checks": "nothing", "padding": 0.1, "size": 1.0}
    return {"source": source, "loader": loader, "workers": workers, "rates": [rate, 2 * rate, 3 * rate]} | facts


def some_contenders() -> dict[str, dict[str, Any]]:
    rates = {
        ("ours", "ShardDataset"): (100, 30),
        ("ours", "ReadAheadLoader"): (90, None),
        ("before", "ShardDataset"): (50, 20),
        ("by_hand", "memory map, pad_sequence"): (80, 45),
        ("by_hand", "memory map, one gather"): (400, 75),
        ("lit_data", "litdata"): (10, 60),
    }
    return {
        f"{'before: ' if source == 'before' else ''}{loader}, {workers} workers": contender(
            source, loader, workers, rate
        )
        for (source, loader), pair in rates.items()
        for workers, rate in zip((0, 2), pair, strict=True)
        if rate is not None
    }


def test_the_targets_take_our_best_way_and_the_closest_library() -> None:
    bars: Any = importlib.import_module("loading_bars")
    results = {"works": {"tokens": {"contenders": some_contenders()}}, "first": {}, "training": {}, "memory": {}}
    found = {figure: (target, measured, met) for figure, target, measured, met in bars.find_bars(results)}
    best, library = "tokens: two cores (ReadAheadLoader, 0 workers)", "the fastest library: litdata"
    assert found == {
        "tokens: one process, memory map, pad_sequence": (">= 1.2x", "1.25x [1.25-1.25]", True),
        "tokens: one process, memory map, one gather": (">= 0.4x", "0.25x [0.25-0.25]", False),
        f"{best}, memory map, pad_sequence, 2 workers": (">= 1.5x", "2.00x [2.00-2.00]", True),
        f"{best}, memory map, one gather, 2 workers": (">= 1.5x", "1.20x [1.20-1.20]", False),
        f"tokens: ShardDataset, 0 workers, {library}, 0 workers": (
            ">= 2x",
            "10.00x [10.00-10.00]",
            True,
        ),
        f"tokens: ReadAheadLoader, 0 workers, {library}, 2 workers": (
            ">= 2x",
            "1.50x [1.50-1.50]",
            False,
        ),
        "tokens: one process, now over before": (">= 1.7x", "2.00x [2.00-2.00]", True),
        f"{best}, now over before": (">= 1.8x", "4.50x [4.50-4.50]", True),
        "tokens: size on disk, in payloads": ("<= 1.15", "1.00", True),
    }


def test_the_targets_of_waiting_training_and_memory_are_medians() -> None:
    bars: Any = importlib.import_module("loading_bars")
    first = {f"ours: {kind}, {at}": times for at in ("0%", "50%") for kind, times in FIRST.items()}
    training = {
        "tokens, 5 ms": {"alone": [1, 1, 1], "alone again": [9, 9, 9], "ShardDataset, 2 workers": [1.3, 1.2, 1.0]}
    }
    training["sft, 20 ms"] = {"alone": [2, 2], "ShardDataset, 0 workers": [2.2, 2.2], "ReadAheadLoader": [2.04, 2.04]}
    sizes = {"Pss_Anon": 90_000_000, "Pss_Shmem": 10_000_000}
    memory = {"ours: ShardDataset, 0 workers": sizes, "before: ShardDataset, 0 workers": sizes | {"Pss_Shmem": 0}}
    results = {"works": {}, "first": {"sft": first}, "training": training, "memory": {"sft": memory}}
    assert [bar[1:] for bar in bars.find_bars(results)] == [
        ("<= 1.5x", "2.00x [1.00-3.00]", False),
        ("<= 1.5x", "2.00x [1.00-3.00]", False),
        ("<= 10%", "+20.0%", False),
        ("<= 3%", "+2.0%", True),
        ("level or less", "+2.0%, +10.0%", True),
        ("<= 90 MB, as before", "100 MB", False),
    ]


FIRST = {"ShardStream": [1.0, 2.0, 3.0], "ShardDataset": [1.0, 1.0, 1.0]}


def test_tables_and_chart_hold_every_loader_with_its_ways() -> None:
    bars: Any = importlib.import_module("loading_bars")
    chart: Any = importlib.import_module("loading_chart")
    page_rows: Any = importlib.import_module("page_rows")
    loaders = bars.by_loader(some_contenders())
    assert (loaders["ReadAheadLoader"]["one process"], loaders["ReadAheadLoader"]["two cores"]) == (None, 180)
    rows = page_rows.loading_rows("tokens")({"works": {"tokens": {"loaders": loaders}}})
    assert [row["tokens"] for row in rows] == list(loaders)
    assert rows[-1]["two cores"] == "120 /s, 1.50x [1.50-1.50]"
    tree = ElementTree.fromstring(chart.chart({"tokens": {"contenders": some_contenders()}}))
    texts = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in loaders] == [
        "memory map, one gather",
        "ShardDataset",
        "ReadAheadLoader",
        "memory map, pad_sequence",
        "litdata",
    ]
    # The axis ends with the fastest round, of 1,200 rows a second.
    assert "1,000 /s" in texts
    assert "10,000 /s" not in texts
    assert "800" in texts
