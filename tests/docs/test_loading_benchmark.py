"""The benchmark of loaders: every loader gives all rows, its figures meet their targets as said, failures are named."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


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


def test_a_library_that_is_not_installed_is_missing_with_its_name(tmp_path: Path) -> None:
    process: Any = importlib.import_module("loading_process")
    with pytest.raises(process.MissingError, match="no_such_loader"):
        process.Process("no_such_loader", tmp_path)


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

    with pytest.raises(SystemExit, match="must give 100 rows of tokens .* gives 99 rows"):
        loading.check(work, loading.Contender("by_hand", "loader", 0, {}), Losing())
