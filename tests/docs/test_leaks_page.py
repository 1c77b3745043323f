"""The six leaks as programs: each drifts from documents alone and is found; lengthtrack's own way does neither."""

import runpy
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "leaks"
PAGE = (ROOT / "docs" / "leaks.md").read_text()
ZERO = 1e-9

NAMES = [
    pytest.param(
        "masks_switched_off",
        marks=pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
    ),
    "state_carried_on",
    "running_positions",
    "labels_that_cross",
    "statistics_of_the_row",
    "masks_and_offsets",
]
# Ways that are right, besides those whose name says lengthtrack.
RIGHT = ("convolution of each document", "scan, reset at documents")
FOUND = {"running_positions": "order", "batch norm": "meeting in mix (BatchNorm)"}

each_program = pytest.mark.parametrize("name", NAMES)


@cache
def printed(name: str) -> str:
    command = [sys.executable, "-W", "error", str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@each_program
def test_every_program_prints_what_the_page_shows(name: str) -> None:
    assert f"`examples/leaks/{name}.py`" in PAGE
    assert f"```text\n{printed(name)}```\n" in PAGE


@each_program
def test_a_leak_drifts_and_is_found_and_the_right_way_does_neither(name: str) -> None:
    for line in printed(name).splitlines()[1:]:
        title, drift, verdict = line[:34].strip(), float(line[34:42]), line[42:].strip()
        if "lengthtrack" in title or title in RIGHT:
            assert drift < ZERO, line
            assert verdict == "nothing found", line
        else:
            assert drift > 1e-4, line
            assert verdict.startswith(FOUND.get(title) or FOUND.get(name) or "other documents "), line


def test_every_program_is_short_and_stands_on_the_page() -> None:
    programs = {path.stem for path in FOLDER.glob("*.py")} - {"compare"}
    assert programs == {getattr(name, "values", (name,))[0] for name in NAMES}
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path


def test_the_file_to_copy_passes_and_stands_on_the_page() -> None:
    path = ROOT / "examples" / "test_my_packed_step.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert f"```python\n{path.read_text()}```" in PAGE


def test_the_programs_may_be_read_without_being_run() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names: dict[str, Any] = runpy.run_path(str(FOLDER / "state_carried_on.py"))
    assert len(names["steps"]()) == 6
