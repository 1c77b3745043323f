"""The packages work where `resource`, `fcntl` and /proc do not exist, as on Windows."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from samplers import ShardWriter
from samplers.shards.storage import locks, paths

ROOT = Path(__file__).parents[1]
# Reading, writing, planning, loading and collating. Tests that need Unix themselves are marked.
CORE = [
    "tests/shards/test_shards_writer.py",
    "tests/shards/test_shards_dataset.py",
    "tests/loading/test_sampler.py",
    "tests/batches/test_collator.py",
    # Each start of spawned workers imports torch again: one test of each kind is enough.
    *("-k", "not spawn-plain and not resumes_at_any and not runs_ahead and not stateful"),
]
BARE = """
import builtins, io, os, sys
from pathlib import Path

for name in MISSING:
    # An entry of None makes an import raise ImportError.
    sys.modules[name] = None

def without_proc(function):
    def opened(path, *rest, **options):
        if isinstance(path, (str, Path)) and str(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return function(path, *rest, **options)
    return opened

builtins.open = io.open = without_proc(io.open)
"""


def run(code: Any, missing: Any, *arguments: Any) -> Any:
    text = f"MISSING = {missing!r}\n{BARE}{textwrap.dedent(code)}"
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_shards_are_written_and_read_without_the_modules_of_unix(tmp_path: Path) -> None:
    code = """
    # The modules of the other package, without its root.
    import types
    root = Path(sys.argv[2])
    sys.modules["collate"] = package = types.ModuleType("collate")
    package.__path__ = [str(root / "collate")]
    import numpy as np
    import samplers
    from samplers import LengthIndex, ShardDataset, ShardWriter
    from samplers.shards.storage.locks import lock

    folder = Path(sys.argv[1])
    with ShardWriter(folder, max_samples=2) as writer:
        for number in range(5):
            writer.write({"__key__": f"k{number}", "x": np.arange(number)})
    (folder / "shard-000003.tar.tmp").touch()
    with ShardWriter(folder, append=True) as writer:
        writer.write({"__key__": "last", "x": np.arange(9)})
    data = ShardDataset(folder)
    assert [len(sample["x"]) for sample in data.__getitems__(range(len(data)))] == [0, 1, 2, 3, 4, 9]
    data.index.verify(checksums=True)
    with open(folder / "lock", "wb") as stream:
        print(lock(stream))
    """
    assert run(code, ["resource", "fcntl", "msvcrt"], tmp_path, ROOT) == "None"


def test_where_windows_locks_bytes_a_file_is_locked_far_behind_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {}

    def locking(descriptor: Any, mode: Any, count: Any) -> None:
        place = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        if held.setdefault(place, descriptor) != descriptor:
            raise OSError("locked")

    monkeypatch.setattr(locks, "_FCNTL", None)
    monkeypatch.setattr(locks, "_MSVCRT", SimpleNamespace(locking=locking, LK_NBLCK=2))
    path = tmp_path / "a"
    with path.open("wb") as one, path.open("wb") as other:
        one.write(b"x" * 100)
        assert (locks.lock(one), locks.lock(other), one.tell()) == (True, False, 100)
    assert [place > 1 << 30 for _, place in held] == [True]


def run_elsewhere(*command: object, locks: str = "windows") -> subprocess.CompletedProcess[str]:
    """Run Python as on another platform: see tests/support/other_platform."""
    paths = os.pathsep.join([str(ROOT / "tests" / "support" / "other_platform"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "HYPOTHESIS_PROFILE": "quick", "OTHER_PLATFORM_LOCKS": locks}
    # Coverage of this run would be that of a system that we do not measure.
    environment = {name: value for name, value in environment.items() if not name.startswith(("COV_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
        timeout=900,
    )


def test_the_core_of_the_suite_passes_on_another_platform() -> None:
    """Without the modules and functions of Unix and /proc, with spawned processes, and files that stay if open."""
    done = run_elsewhere("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov", *CORE)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_an_index_is_refreshed_where_open_files_stay(tmp_path: Path) -> None:
    """The former index is open while the new one is made, and must not be when it is replaced."""
    for number in range(2):
        with ShardWriter(tmp_path / "shards", append=number > 0) as writer:
            writer.write({"__key__": f"k{number}", "x": np.arange(3)})
        (tmp_path / "shards" / "shard.ltx").replace(tmp_path / "corpus.ltx")
        done = run_elsewhere("-m", "lengthtrack", "index", tmp_path / "shards")
        assert done.returncode == 0, done.stderr
        assert f"{number + 1} sample" in done.stdout
        (tmp_path / "corpus.ltx").replace(tmp_path / "shards" / "shard.ltx")


def test_a_file_that_is_open_elsewhere_is_named_if_it_cannot_be_replaced(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from samplers.shards.storage.atomic import AtomicFile
target = Path(sys.argv[1], "a")
target.write_bytes(b"before")
with target.open("rb"):
    file = AtomicFile(target)
    file.stream.write(b"after")
    try:
        file.commit()
    except PermissionError as error:
        print(error, target.read_bytes(), [path.name for path in target.parent.iterdir()])
"""
    done = run_elsewhere("-c", code, tmp_path)
    assert "cannot be replaced" in done.stdout, done.stderr
    assert f"'{tmp_path / 'a'}' b'before' ['a']" in done.stdout


@pytest.mark.parametrize("locks", ["windows", "none"])
def test_only_what_nobody_writes_any_more_is_replaced(locks: str, tmp_path: Path) -> None:
    """Locks of bytes tell a leftover from a file at work, also to other processes; without locks nobody can tell."""
    code = """
import subprocess, sys
from pathlib import Path
from samplers.shards.storage.atomic import AtomicFile

def attempt(path):
    try:
        return AtomicFile(path)
    except FileExistsError as error:
        print("refused", str(error).split(": ")[1])

target = Path(sys.argv[1], "a")
if len(sys.argv) > 2:
    attempt(target)
else:
    Path(sys.argv[1], "a.tmp").write_bytes(b"of a process that was killed")
    if attempt(target) is None:
        Path(sys.argv[1], "a.tmp").unlink()
    file = AtomicFile(target)
    attempt(target)
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", Path(sys.argv[1], "code").read_text(), sys.argv[1], "another"], check=True)
    file.stream.write(b"whole")
    file.commit()
    print(target.read_bytes(), [path.name for path in target.parent.iterdir() if path.name != "code"])
"""
    (tmp_path / "code").write_text(code)
    done = run_elsewhere("-c", code, tmp_path, locks=locks)
    refused = ["refused another writer is at work, or was killed"] * (2 if locks == "windows" else 3)
    assert done.stdout.splitlines() == [*refused, "b'whole' ['a']"], done.stderr


def test_braces_expand_behind_the_backslash_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Red before: `C:\data\{a,b}.tar` was taken for a name with braces."""
    monkeypatch.setattr(paths, "_HAS_ESCAPES", False)
    monkeypatch.setattr(paths, "_SPECIAL", re.compile("[{},]"))
    assert paths.expand_braces(r"C:\data\{a,b}.tar") == [r"C:\data\a.tar", r"C:\data\b.tar"]
    assert paths.expand_braces(r"C:\{08..10}.tar") == [r"C:\08.tar", r"C:\09.tar", r"C:\10.tar"]


@pytest.mark.parametrize("package", ["samplers"])
def test_the_packages_are_imported_without_the_modules_of_unix(package: str) -> None:
    collate = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['resource'] = None; import collate"],
        capture_output=True,
        check=False,
    )
    if collate.returncode:
        pytest.skip("collate itself needs resource")
    assert run(f"import {package}; print({package}.__name__)", ["resource", "fcntl"]) == package
