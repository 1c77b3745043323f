"""The house: imports point down the map, the public surface is what it says, the changelog knows the version."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import collate
import samplers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def read_map() -> dict[str, list[list[str]]]:
    """The layers of each package, top first, as the README draws them: one line is one layer."""
    layers: dict[str, list[list[str]]] = {}
    for block in re.findall(r"```text\n((?:collate|samplers)/.*?)```", README, re.DOTALL):
        head, *lines = block.splitlines()
        package = head.split("/")[0]
        layers[package] = [
            [name.removesuffix(".py").replace("/", ".") for name in re.findall(r"[\w/]+\.py", line)] for line in lines
        ]
    return layers


LAYERS = read_map()


def modules(package: str) -> dict[str, Path]:
    files = (ROOT / package).rglob("*.py")
    named = {path.relative_to(ROOT / package).with_suffix("").as_posix().replace("/", "."): path for path in files}
    return {name: path for name, path in named.items() if not name.endswith("__init__")}


def imports_of(path: Path) -> list[str]:
    """The project's own modules that a file imports, wherever in the file it does."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.append(node.module)
    return [name for name in found if name.split(".")[0] in LAYERS]


@pytest.mark.parametrize("package", ["collate", "samplers"])
def test_every_module_stands_on_the_map_and_the_map_names_no_other(package):
    mapped = [name for layer in LAYERS[package] for name in layer]
    assert sorted(mapped) == sorted(modules(package))


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in ("collate", "samplers") for name in sorted(modules(package))]
)
def test_imports_point_down_the_map_and_never_at_a_package_root(package, name):
    level = {module: depth for depth, layer in enumerate(LAYERS[package]) for module in layer}
    for imported in imports_of(modules(package)[name]):
        owner, _, module = imported.partition(".")
        assert module, f"{name} imports the root of {owner}"
        if owner != package:
            assert (package, imported) == ("samplers", "collate.errors")
        else:
            assert level[module] > level[name], f"{name} imports {module}, which is not below it"


@pytest.mark.parametrize("package", [collate, samplers])
def test_the_public_names_are_sorted_complete_and_documented(package):
    public = {name for name, value in vars(package).items() if not name.startswith("_") and not _is_module(value)}
    assert package.__all__ == sorted(package.__all__)
    assert set(package.__all__) == public
    for name in package.__all__:
        assert getattr(package, name).__doc__.strip(), name


def _is_module(value: object) -> bool:
    return type(value).__name__ == "module"


def test_the_public_names_are_those_that_were_promised():
    assert set(collate.__all__) == {
        *("LengthTrackedBatch", "PadCollator", "DevicePrefetcher", "apply_rnn", "sequence_loss", "masked_mean"),
        *("last_step", "token_scale", "check_step", "find_max_tokens", "LengthError"),
    }
    assert set(samplers.__all__) == {
        *("LengthBucketBatchSampler", "BatchPlan", "plan_epoch", "optimal_widths", "bucket_by_length"),
        *("LengthBucketNode", "LengthIndex", "ShardWriter", "ShardDataset", "ShardStream"),
    }


def test_importing_samplers_loads_no_heavy_extra():
    heavy = {"transformers", "lhotse", "matplotlib", "lightning", "accelerate", "pandas", "torchvision"}
    code = f"import collate, samplers, sys; print(sorted(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_changelog_begins_with_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    first = re.search(r"^## \[(.+?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert first[1] == version


def test_the_guide_for_contributors_stays_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 120


def test_code_stands_within_the_first_thirty_lines_of_the_readme():
    lines = README.splitlines()[:30]
    assert "```python" in lines
    assert "```" in lines[lines.index("```python") :]


def test_both_packages_are_typed_and_hold_no_assert():
    for package in ("collate", "samplers"):
        assert (ROOT / package / "py.typed").exists()
        for path in modules(package).values():
            assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text()))), path
