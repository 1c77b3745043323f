"""The packages work where `resource`, `fcntl` and /proc do not exist, as on Windows."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from samplers.shards.storage import locks

ROOT = Path(__file__).parents[1]
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
