"""What an import loads: names come when they are used, commands load what they need, collate needs torch and NumPy."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import collate
import samplers
from samplers import ShardWriter

ROOT = Path(__file__).parents[1]
LAZY = ["collate", "samplers", "samplers.dynamic", "samplers.shards"]
TORCH = {"torch", "torchdata", "webdataset"}
SLOW = TORCH | {"numpy", "fsspec", "tqdm", "multiprocessing", "asyncio"}
COMMAND = """
import os, sys
from lengthtrack.__main__ import main
try:
    main({arguments!r}, prog_name="lengthtrack")
finally:
    print(*sorted({unwanted!r} & set(sys.modules)), "end", file=sys.stderr)
"""


def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    variables = {"PYTHONPATH": str(ROOT), "PATH": "", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def run_command(arguments: list[str], unwanted: set[str], **environment: str) -> str:
    """Run the command in a new process, which must not import the unwanted modules; what it prints."""
    done = run(COMMAND.format(arguments=arguments, unwanted=unwanted), **environment)
    assert done.stderr.split() == ["end"]
    return done.stdout


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "shards", max_samples=3) as writer:
        for number in range(7):
            writer.write({"__key__": f"k{number}", "x": np.arange(number)})
    return tmp_path / "shards"


@pytest.mark.parametrize("package", ["collate", "samplers", "lengthtrack", "collate.errors", "samplers.shards"])
def test_importing_a_package_loads_nothing_that_takes_long(package: str) -> None:
    """Red before: importing `collate.errors` imported torch."""
    assert run(f"import sys, {package}; print(*{SLOW!r} & set(sys.modules))").stdout.split() == []


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["report", "--help"]], ids=" ".join)
def test_what_the_command_says_about_itself_loads_nothing_that_takes_long(arguments: list[str]) -> None:
    """Red before: `--version` imported torch."""
    assert "lengthtrack" in run_command(arguments, SLOW)


@pytest.mark.parametrize(
    ("words", "completion"),
    [("lengthtrack re", "report"), ("lengthtrack report --max-t", "--max-tokens")],
    ids=["command", "option"],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_loads_nothing_that_takes_long(shell: str, words: str, completion: str) -> None:
    last = words.rpartition(" ")[2]
    variables = {"COMP_WORDS": words, "COMP_CWORD": last if shell == "fish" else str(words.count(" "))}
    code = COMMAND.format(arguments=[], unwanted=SLOW).replace("try:", 'os.environ.pop("PATH")\ntry:')
    done = run(code, _LENGTHTRACK_COMPLETE=f"{shell}_complete", **variables)
    assert completion in done.stdout
    assert done.stderr.split() == ["end"]


@pytest.mark.parametrize(
    "arguments",
    [["index"], ["index", "--checksums", "--workers", "2"], ["verify"], ["report", "--max-tokens", "8,16"]],
    ids=" ".join,
)
def test_commands_that_read_lengths_import_no_torch(shards: Path, arguments: list[str]) -> None:
    """Red before: each of them did."""
    assert "7 samples" in run_command([arguments[0], str(shards), *arguments[1:]], TORCH)


@pytest.mark.parametrize("package", LAZY)
def test_what_type_checkers_see_is_what_is_loaded(package: str) -> None:
    module = import_module(package)
    [guarded] = [
        node
        for node in ast.parse(Path(str(module.__file__)).read_text()).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    ]
    imported = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(module.__all__) - {"LengthError"} == imported.keys()
    for name, home in imported.items():
        assert getattr(module, name) is getattr(import_module(str(home)), name)


@pytest.mark.parametrize("package", LAZY)
def test_dir_lists_the_public_names_before_one_was_used(package: str) -> None:
    code = f"import {package} as p; print(*(set(p.__all__) - set(dir(p))), *(n for n in dir(p) if n[0] == '_' != n[1]))"
    assert run(code).stdout.split() == []


def test_modules_are_attributes_of_their_package_without_an_import() -> None:
    code = "import samplers, collate; print(samplers.planning.__name__, collate.lengths.__name__)"
    assert run(code).stdout.split() == ["samplers.planning", "collate.lengths"]


def test_a_star_import_gives_every_public_name() -> None:
    code = "from collate import *; from samplers import *; print(PadCollator.__name__, LengthIndex.__name__)"
    assert run(code).stdout.split() == ["PadCollator", "LengthIndex"]


@pytest.mark.parametrize("module", [collate, samplers], ids=["collate", "samplers"])
def test_an_unknown_name_is_an_attribute_error(module: object) -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'PadColator': its names are in \w+\.__all__"):
        _ = module.PadColator  # type: ignore[attr-defined]
    assert not hasattr(module, "__wrapped__")


def test_torch_knows_batches_after_both_packages_were_imported(tmp_path: Path) -> None:
    """`torch.load` and pytrees must know their class, though the program has named none."""
    save = "import torch, sys; from collate import PadCollator; torch.save(PadCollator()([{'x': [1]}]), sys.argv[1])"
    load = "import torch, sys; import collate; print(torch.load(sys.argv[1])['x'].lengths.tolist())"
    run(save, tmp_path / "batch.pt")
    assert run(load, tmp_path / "batch.pt").stdout.strip() == "[1]"


def test_collate_needs_torch_and_numpy_alone() -> None:
    code = """
import pkgutil, pickle, sys
from importlib import import_module
for name in ("torchdata", "webdataset", "fsspec", "click", "tqdm", "samplers", "lengthtrack", "packaging", "psutil"):
    sys.modules[name] = None
import collate
for module in pkgutil.walk_packages(collate.__path__, "collate."):
    import_module(module.name)
import torch
from torch import nn
from collate import *
rows = [{"x": torch.randn(n, 4), "y": list(range(n))} for n in (3, 1, 2)]
for batch in torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=PadCollator(), num_workers=1):
    hidden, _ = apply_rnn(nn.GRU(4, 5), pickle.loads(pickle.dumps(batch["x"])))
    loss = sequence_loss(nn.CrossEntropyLoss(reduction="none"), hidden, batch["y"])
    loss.backward()
[packed] = VarlenCollator(capacity=6)(rows)["x"].sequences()[:1]
print(check_step(lambda batch: masked_mean(batch["x"]).sum(), batch).ok, len(packed))
"""
    assert run(code).stdout.split()[-1] == "3"
