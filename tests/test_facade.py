"""`import lengthtrack`: one name for both packages, also where a file of the user's has the name of one of them."""

import subprocess
import sys
from pathlib import Path

import pytest

import collate
import lengthtrack
import samplers

SCRIPT = """
import lengthtrack as lt
from torch.utils.data import DataLoader

if __name__ == "__main__":
    lengths = [3, 1, 2, 5]
    data = [{"x": [row] * length} for row, length in enumerate(lengths)]
    sampler = lt.LengthBucketBatchSampler(lengths, batch_size=2)
    options = {"num_workers": 1, "multiprocessing_context": START} if START else {}
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=lt.PadCollator(), **options)
    print(sorted(int(row[0]) for batch in loader for row in batch["x"].padded))
"""


def run(folder: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script that stands in a folder."""
    (folder / "train.py").write_text(code)
    return subprocess.run(
        [sys.executable, *options, "train.py"], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )


def test_the_facade_has_every_public_name_of_both_packages() -> None:
    own = {"ShadowWarning", "__version__"}
    assert set(lengthtrack.__all__) == {*collate.__all__, *samplers.__all__} | own
    assert lengthtrack.__all__ == sorted(lengthtrack.__all__)
    for package in (collate, samplers):
        for name in package.__all__:
            assert getattr(lengthtrack, name) is getattr(package, name)
    assert set(lengthtrack.__all__) <= set(dir(lengthtrack))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'PadColator'.*lengthtrack.__all__"):
        _ = lengthtrack.PadColator


def test_importing_the_facade_loads_no_torch() -> None:
    code = "import lengthtrack, sys; print(lengthtrack.__version__, sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [lengthtrack.__version__, "[]"]


@pytest.mark.parametrize("start", [None, "spawn", "forkserver"])
def test_a_script_runs_next_to_files_that_have_our_names(tmp_path: Path, start: str | None) -> None:
    (tmp_path / "collate.py").write_text("raise SystemExit('never imported')\n")
    (tmp_path / "samplers").mkdir()
    (tmp_path / "samplers" / "__init__.py").write_text("raise SystemExit('never imported')\n")
    done = run(tmp_path, f"START = {start!r}\n{SCRIPT}")
    assert done.stdout.strip() == "[0, 1, 2, 3]", done.stderr
    for name in ("collate.py", "samplers/__init__.py"):
        assert f"{tmp_path / name} has the name of lengthtrack's package" in done.stderr
    assert "train.py:" in done.stderr


def test_a_user_who_has_imported_a_file_of_that_name_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "collate.py").write_text("MINE = 1\n")
    code = "import collate\nimport lengthtrack as lt\nlt.PadCollator\nprint(collate.MINE)\nimport collate\n"
    done = run(tmp_path, code + "print(collate.PadCollator.__name__)\n")
    assert done.stdout.split() == ["1", "PadCollator"], done.stderr
    assert "was imported before" in done.stderr


def test_nothing_is_said_where_no_file_has_our_names(tmp_path: Path) -> None:
    done = run(tmp_path, f"START = None\n{SCRIPT}", "-W", "error")
    assert done.stdout.strip() == "[0, 1, 2, 3]", done.stderr


def test_samplers_names_the_file_that_hides_collate(tmp_path: Path) -> None:
    (tmp_path / "collate.py").write_text("")
    done = run(tmp_path, "import samplers")
    assert done.returncode == 1
    assert f"ImportError: {tmp_path / 'collate.py'} has the name of lengthtrack's package 'collate'" in done.stderr


def test_the_command_runs_as_a_module_next_to_such_a_file(tmp_path: Path) -> None:
    (tmp_path / "samplers.py").write_text("")
    command = [sys.executable, "-m", "lengthtrack", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(lengthtrack.__version__)
