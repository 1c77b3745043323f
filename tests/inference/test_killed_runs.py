"""Real processes that are killed: what they had written is not computed again, on any number of processes."""

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from inference_runs import EXPECTED, LENGTHS
from ranks import PATIENCE, run

pytestmark = pytest.mark.unix


def computed(folder: Path, name: str) -> list[list[list[int]]]:
    """The batches that each process of a run computed."""
    files = sorted(folder.glob(f"{name}-*.computed"))
    return [[[int(word) for word in line.split()] for line in file.read_text().splitlines()] for file in files]


def test_killed_runs_compute_nothing_twice_but_what_was_not_written(tmp_path: Path) -> None:
    """Two processes, then one, then two again, each run under another budget."""
    status, out = run(2, "inference_runs.py", "infer_until_killed", tmp_path, "first", 6, 90)
    assert status != 0, out
    status, out = run(1, "inference_runs.py", "infer_until_killed", tmp_path, "second", 5, 60)
    assert status != 0, out
    status, out = run(2, "inference_runs.py", "infer_until_killed", tmp_path, "third", 999, 120)
    assert status == 0, out
    for rank in range(2):
        assert np.array_equal(np.load(tmp_path / f"third-{rank}.npy"), EXPECTED)
    runs = {name: computed(tmp_path, name) for name in ("first", "second", "third")}
    assert [len(processes) for processes in runs.values()] == [2, 1, 2]
    assert len(runs["first"][1]) == 6
    # torchrun ends the other process at any moment: its last batch may not have been written.
    unwritten = [sample for name in ("first", "second") for batches in runs[name] for sample in batches[-1]]
    counts = Counter(sample for processes in runs.values() for batches in processes for b in batches for sample in b)
    assert sorted(counts) == list(range(len(LENGTHS)))
    twice = {sample for sample, count in counts.items() if count > 1}
    assert twice <= set(unwritten)
    # The process that was killed within a step had written all that it had computed.
    assert twice.isdisjoint(sample for batch in runs["first"][1] for sample in batch)
    assert sorted(path.name for path in tmp_path.glob("all*")) == ["all.npy", "all.npy.run.json"]


def test_processes_with_different_data_are_told(tmp_path: Path) -> None:
    status, out = run(2, "inference_runs.py", "infer_from_two_lengths", tmp_path)
    assert status == 0, out
    messages = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert all("all processes must share one dataset and one out, got lengths and name" in each for each in messages)


def test_a_kill_at_any_write_loses_no_part_and_no_file(tmp_path: Path) -> None:
    """Each write of a part, a record and the file; what was a part before is not computed again."""
    script = Path(__file__).parents[1] / "support" / "inference_runs.py"
    command = [sys.executable, str(script), "kill_at_each_sync", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *killed, last = [line.split() for line in done.stdout.splitlines()]
    assert last == ["0", "0", "0", "True"]
    assert {status for status, *_ in killed} == {str(int(signal.SIGKILL))}
    assert {exact for *_, exact in killed} == {"True"}
    parts, samples = (np.array([int(row[column]) for row in killed]) for column in (1, 2))
    # The record comes before the first part; then parts grow and what remains shrinks; at last the file is there.
    assert samples[0] == len(LENGTHS)
    assert samples[-1] == 0
    assert np.all(np.diff(samples) <= 0)
    assert parts.max() >= 4
