"""The house: imports point down the layers, the public surface is what it says, the changelog knows the version."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import collate
import samplers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


# Each package from top to bottom: an entry may import what stands in a line below its own, and its own room.
LAYERS = {
    "samplers": [
        ["cli"],
        ["integrations"],
        ["shard_stream", "inference"],
        ["batch_sampler"],
        ["progress", "dynamic"],
        ["planning", "shards"],
        ["sources"],
        ["testing", "lazy_names"],
    ],
    "samplers.planning": [
        ["mixtures"],
        ["pack_batches"],
        ["plan"],
        ["schedules", "report"],
        ["tables", "packs", "fitting"],
        ["sorting"],
        ["options"],
        ["keyed_shuffle"],
        ["budget"],
    ],
    "samplers.planning.schedules": [["updates"], ["schedule"]],
    "samplers.planning.fitting": [["cost_fit", "optimal_widths"]],
    "samplers.planning.tables": [
        ["window_table", "pool_table"],
        ["batch_table", "window_order"],
        ["epoch_table"],
        ["buckets", "epoch_order", "equal_lengths", "last_step", "clipping"],
    ],
    "samplers.planning.mixtures": [
        ["epochs"],
        ["bucketed", "packed"],
        ["mixed_table"],
        ["mixed_plan", "blending", "report"],
        ["sequence"],
        ["streams", "shares"],
        ["mixture"],
        ["dataset"],
    ],
    "samplers.planning.mixtures.streams": [["windows"], ["buckets", "packs"], ["source_stream"]],
    "samplers.planning.packs": [
        ["row_order", "one_list"],
        ["pack_table"],
        ["recipes", "row_count"],
        ["ladder"],
        ["length_classes", "groups"],
        ["best_fit"],
        ["documents"],
    ],
    "samplers.planning.pack_batches": [
        ["plan"],
        ["report", "window_packs", "agreement"],
        ["table", "shard_documents"],
        ["packed_table"],
        ["options", "cut_rows"],
    ],
    "samplers.progress": [
        ["stream_iterator"],
        ["mixtures"],
        ["planned_sampler", "read_ahead", "window_reader"],
        ["plan_follower"],
        ["loader"],
        ["loop_updates"],
        ["epoch_cursor", "shared_cursor"],
        ["position", "replica"],
    ],
    "samplers.progress.mixtures": [["mixed_shards", "staged"], ["shared_text"]],
    "samplers.shards": [
        ["writing"],
        ["dataset"],
        ["unread"],
        ["sample_reader"],
        ["field_value", "opening", "skipping"],
        ["indexing", "skip_counts", "split_dataset"],
        ["format"],
        ["storage"],
    ],
    "samplers.shards.writing": [
        ["writer"],
        ["parts", "source"],
        ["sample_writer"],
        ["existing", "shard_file", "shard_group"],
        ["schema"],
    ],
    "samplers.shards.indexing": [
        ["index"],
        ["cache", "find_index", "verify"],
        ["index_file", "scan"],
        ["index_header", "layouts"],
        ["index_arrays", "measuring", "shard_groups"],
        ["tables"],
    ],
    "samplers.cli.conversion": [
        ["writing"],
        ["rows", "unfinished"],
        ["arrow", "exact_numbers", "tokenizer"],
    ],
    "samplers.inference": [
        ["run_in_order"],
        ["containers"],
        ["run_folder", "saved_result"],
        ["assemble", "run_record"],
        ["parts"],
        ["output_arrays"],
        ["outputs", "plan", "halving"],
    ],
    "samplers.integrations": [["huggingface", "lightning"], ["longest_first", "plans"]],
    "samplers.sources": [
        ["lengths_of"],
        ["files"],
        ["json_lines", "megatron"],
        ["arrow_lengths"],
        ["extras", "masked"],
    ],
    "samplers.shards.format": [
        ["header_lengths"],
        ["samples", "tar"],
        ["block_keys"],
        ["keys", "packed_keys", "packed_offsets"],
        ["npy"],
    ],
    "samplers.shards.storage": [
        ["mirror", "paths", "ranges", "shard_cache"],
        ["reading", "process_pool", "untrusted"],
        ["network"],
        ["atomic", "checksum", "memory"],
        ["locks"],
    ],
    "samplers.shards.storage.network": [
        ["upload"],
        ["fetched"],
        ["remote"],
        ["requests", "signed_urls"],
        ["http_body"],
        ["failures", "usual_times"],
        ["counts", "transport"],
    ],
    "samplers.shards.opening": [["followed", "open_shards"], ["descriptors", "read_ahead", "transfers"]],
    "samplers.dynamic": [
        ["node"],
        ["pack_stage"],
        ["stage"],
        ["bucketer", "packer", "sample_length"],
        ["buffer"],
    ],
    "samplers.cli": [
        ["commands"],
        ["index_commands", "sample_commands"],
        ["folder_index", "plots", "printing"],
        ["reported"],
        ["compare", "conversion", "describing", "opening"],
        ["arguments"],
    ],
    "collate": [
        ["training"],
        ["varlen"],
        ["collator"],
        ["batch"],
        ["operations"],
        ["lengths"],
        ["packing", "padding"],
        ["widths"],
        ["tensors"],
        ["deprecated", "errors"],
    ],
    "collate.tensors.slabs": [["receiving", "sending"], ["slab"]],
    "collate.training": [
        ["checking", "max_tokens", "losses", "rnn", "prefetch"],
        ["cpu_rnn", "restore"],
        ["rnn_modules", "sequences"],
    ],
}
# What `samplers` may take from `collate`.
SHARED = {"collate.errors", "collate.widths", "collate.deprecated.names"}


def modules(package: str) -> dict[str, Path]:
    """The files of a package or room by dotted name, without the faces of folders."""
    folder = ROOT.joinpath(*package.split("."))
    return {
        f"{package}.{path.relative_to(folder).with_suffix('').as_posix().replace('/', '.')}": path
        for path in folder.rglob("*.py")
        if path.name not in {"__init__.py", "__main__.py"}
    }


def imports_of(path: Path) -> list[str]:
    """The project's own modules that a file imports, wherever in the file it does."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.append(node.module)
    return [name for name in found if name.split(".")[0] in {"collate", "samplers"}]


def entry_of(package: str, module: str) -> str:
    """The file or folder of a room in which a module stands."""
    return module.removeprefix(f"{package}.").split(".")[0]


@pytest.mark.parametrize("package", LAYERS)
def test_the_layers_name_every_entry_of_a_room_and_no_other(package: str) -> None:
    named = [entry for layer in LAYERS[package] for entry in layer]
    assert sorted(named) == sorted({entry_of(package, module) for module in modules(package)})
    assert len(named) <= 12


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_down_and_never_at_a_package_root(package: str) -> None:
    level = {entry: depth for depth, layer in enumerate(LAYERS[package]) for entry in layer}
    for module, path in modules(package).items():
        here = entry_of(package, module)
        for imported in imports_of(path):
            assert "." in imported, f"{module} imports the root of {imported}"
            if imported.split(".")[0] != package.split(".")[0]:
                assert imported in SHARED, f"{module} imports {imported}"
            elif imported.startswith(f"{package}.") and entry_of(package, imported) != here:
                there = entry_of(package, imported)
                assert level[there] > level[here], f"{module} imports {imported}, which is not below it"


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        name: set(imports_of(path)) for package in ("collate", "samplers") for name, path in modules(package).items()
    }
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("package", [collate, samplers])
def test_the_public_names_are_sorted_complete_and_documented(package: ModuleType) -> None:
    public = {name for name in dir(package) if not name.startswith("_") and not _is_module(getattr(package, name))}
    assert package.__all__ == sorted(package.__all__)
    assert set(package.__all__) == public
    for name in package.__all__:
        assert getattr(package, name).__doc__.strip(), name


def _is_module(value: object) -> bool:
    return type(value).__name__ == "module"


def test_the_public_names_are_those_that_were_promised() -> None:
    assert set(collate.__all__) == {
        *("LengthTrackedBatch", "PadCollator", "DevicePrefetcher", "apply_rnn", "sequence_loss", "masked_mean"),
        *("last_step", "token_scale", "check_step", "find_max_tokens", "LengthError", "VarlenBatch"),
        "VarlenCollator",
    }
    assert set(samplers.__all__) == {
        *(
            "LengthBucketBatchSampler",
            "BatchPlan",
            "plan_epoch",
            "optimal_widths",
            "fit_cost",
            "bucket_by_length",
            "ReadAheadLoader",
        ),
        *("LengthBucketNode", "LengthIndex", "ShardWriter", "ShardDataset", "ShardStream", "LengthError", "Transport"),
        *("Mixture", "PackingBatchSampler", "PackingNode", "SplitDataset", "pack", "pack_by_length"),
        *("lengths_of", "run_in_order"),
    }


def test_importing_samplers_loads_no_heavy_extra() -> None:
    heavy = {"transformers", "lhotse", "matplotlib", "lightning", "accelerate", "pandas", "torchvision"}
    code = f"import collate, samplers, sys; print(sorted(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    first = re.search(r"^## \[(.+?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert first[1] == version


def test_make_oldest_runs_on_the_versions_that_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {name: release(version) for name, version in (pin.split("==") for pin in pins)}
    declared = {name: release(version) for name, version in (each.split(">=") for each in project["dependencies"])}
    assert declared.items() <= pinned.items()
    page = (ROOT / "docs" / "install.md").read_text()
    for name, version in (each.split(">=") for each in project["dependencies"]):
        assert f"| {name} | {version} |" in page


def release(version: str) -> list[int]:
    """A version's numbers without the zeros at its end."""
    numbers = [int(number) for number in version.split(".")]
    while numbers[-1:] == [0]:
        numbers.pop()
    return numbers


def test_the_install_page_lists_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "install.md").read_text()
    assert {name for name in extras if f"| `{name}` |" not in page} == set()


def test_the_guide_for_contributors_stays_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 120


def test_code_stands_within_the_first_thirty_lines_of_the_readme() -> None:
    lines = README.splitlines()[:30]
    assert "```python" in lines
    assert "```" in lines[lines.index("```python") :]


def test_both_packages_are_typed_and_hold_no_assert() -> None:
    for package in ("collate", "samplers"):
        assert (ROOT / package / "py.typed").exists()
        for path in modules(package).values():
            assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text()))), path
