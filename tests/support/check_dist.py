"""What `make dist` has built: a wheel with the packages alone, and a source archive that can run its own tests.

`python tests/support/check_dist.py DIST` reads the archives. With `--installed` it is the smoke test: run by the Python
of an environment that has only the wheel, in a folder of its own.
"""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("collate", "lengthtrack", "samplers")
# Files that the source archive needs to run `make check`, to build the pages, and to be built again.
NEEDED = (
    *("Makefile", "pyproject.toml", "constraints.txt", "constraints-oldest.txt", "mkdocs.yml", "README.md", "LICENSE"),
    *(
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "RELEASING.md",
        "SECURITY.md",
        "tests/test_house.py",
        "docs/index.md",
        "benchmarks/pages.py",
    ),
    *("examples/five_minutes.py", ".github/workflows/tests.yml"),
)
# What runs leave behind.
STRAY = ("__pycache__", ".pyc", ".venv", ".hypothesis", ".coverage", "site/", "runs/", ".git/")


def check_archives(folder: Path) -> list[str]:
    """The problems of the archives in a folder."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    stem = f"lengthtrack-{version}"
    names = sorted(path.name for path in folder.iterdir())
    if names != [f"{stem}-py3-none-any.whl", f"{stem}.tar.gz"]:
        return [f"{folder} holds {names}, not the wheel and the source archive of {version}"]
    return check_wheel(folder / names[0], stem) + check_source(folder / names[1], stem)


def check_wheel(path: Path, stem: str) -> list[str]:
    """The problems of a wheel."""
    with zipfile.ZipFile(path) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist()}
    tops = {name.split("/")[0] for name in files}
    problems = [f"{name} does not belong in a wheel" for name in tops - {*PACKAGES, f"{stem}.dist-info"}]
    problems += [f"{package}/py.typed is missing" for package in PACKAGES if f"{package}/py.typed" not in files]
    sources = {path.relative_to(ROOT).as_posix(): path for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    problems += [f"{name} is missing" for name in sources.keys() - files.keys()]
    problems += [
        f"{name} differs" for name in sources.keys() & files.keys() if files[name] != sources[name].read_bytes()
    ]
    text = files[f"{stem}.dist-info/METADATA"].decode()
    problems += [f"the metadata lack {line!r}" for line in ("License-Expression: BSD-3-Clause",) if line not in text]
    return problems + strays(files)


def check_source(path: Path, stem: str) -> list[str]:
    """The problems of a source archive."""
    with tarfile.open(path) as archive:
        names = {name.removeprefix(f"{stem}/") for name in archive.getnames()}
    return [f"the source archive lacks {name}" for name in NEEDED if name not in names] + strays(names)


def strays(names: set[str] | dict[str, bytes]) -> list[str]:
    """Files that no archive should have."""
    return [f"{name} is what a run left behind" for name in names if any(part in name for part in STRAY)]


def smoke() -> list[str]:
    """The problems of an installed wheel: from shards to batches, and the command."""
    import numpy as np  # noqa: PLC0415
    from torch.utils.data import DataLoader  # noqa: PLC0415

    import lengthtrack as lt  # noqa: PLC0415

    problems = [] if Path(lt.__file__).is_relative_to(sys.prefix) else [f"{lt.__file__} is not the installed package"]
    if lt.__version__ != metadata.version("lengthtrack"):
        problems.append(f"__version__ is {lt.__version__}, the installed one {metadata.version('lengthtrack')}")
    with lt.ShardWriter("corpus") as writer:
        for number in range(100):
            writer.write({"__key__": str(number), "tokens": np.arange(1 + number % 17)})
    data = lt.ShardDataset("corpus")
    sampler = lt.LengthBucketBatchSampler(data.index, max_tokens=200)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=lt.PadCollator({"tokens": 0}))
    steps = sum(int(batch["tokens"].lengths.sum()) for batch in loader)
    if steps != sum(1 + number % 17 for number in range(100)):
        problems.append(f"the batches hold {steps} steps")
    command = [sys.executable, "-m", "lengthtrack"]
    for arguments in (["--version"], ["verify", "corpus"], ["report", "corpus", "--max-tokens", "200"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        if done.returncode:
            problems.append(f"lengthtrack {' '.join(arguments)}: {done.stderr}")
    return problems


def main(arguments: list[str]) -> int:
    """Print the problems, and return 1 if there are any."""
    check: Callable[[], list[str]] = (
        smoke if arguments == ["--installed"] else lambda: check_archives(Path(arguments[0]))
    )
    problems = check()
    sys.stdout.write("".join(f"{problem}\n" for problem in problems) or "all is as it should be\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
