"""What users have saved stays valid: imports, shards, indexes, positions, states, pickles and files of `torch.save`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compatibility import corpora, loaders, pickles, plain, surface
from compatibility.pickles import ANYWHERE, decode, load
from torch.utils import _pytree as pytree

from samplers import LengthIndex, ShardDataset, ShardWriter

FOLDER = Path(plain.__file__).parent
ROOT = FOLDER.parents[1]
RELEASES = sorted(path.name for path in FOLDER.iterdir() if (path / "saved.json").exists())

# What a release has renamed since: `name(parameter)`, `name.method(parameter)` or `name.attribute` of the old surface
# to what stands in its place; the same name for a parameter whose default or kind alone is another. Who adds a line
# says so in the changelog, and keeps the old name for one release.
REPORTED = {
    "short": "too_short",
    "dropped": "overlong_dropped",
    "unused": "last_dropped",
    "alone": "overlong_alone",
    "meeting_again": "repeated_pairs",
    "meeting_again_in_2": "repeated_pairs_in_2",
    "meeting_again_in_5": "repeated_pairs_in_5",
    "worst_step": "worst_imbalance",
    "greatest_use": "max_budget_use",
    "shapes_of_4": "shapes_in_4_epochs",
}
LATER: dict[str, Any] = {"step_milliseconds": None, "waiting": None}
REPORT = "samplers.measure.PlanReport"
PLANNED = ("samplers.LengthBucketBatchSampler", "samplers.ShardStream", "samplers.plan_epoch")
RENAMED: dict[str, str] = {
    "collate.find_max_tokens(limit)": "memory_limit",
    "collate.find_max_tokens(share)": "memory_fraction",
    "collate.find_max_tokens(most)": "upper",
    "collate.find_max_tokens(step)": "run_shape",
    "samplers.LengthIndex.build(fields)": "length_fields",
    "samplers.LengthIndex.verify(payload)": "checksums",
    "samplers.ShardDataset(check)": "checksums",
    **{f"{name}(count)": "count_tokens" for name in (*PLANNED, "samplers.budget.Budget")},
    "samplers.budget.Budget.count": "count_tokens",
    # The options of a sampler are those of its typed dict now: their defaults stand in the docstring.
    **{f"{name}.position(steps)": "batches" for name in PLANNED[:2]},
    **{f"{REPORT}({old})": new for old, new in REPORTED.items()},
    # What no user calls: plans are made by `plan_epoch` and by `plan`, positions are read by `seek`.
    "samplers.BatchPlan(layout)": "table",
    "samplers.ShardStream.read": "read_position",
    "samplers.ShardStream.course_from": "schedule_from",
}

# Kinds of pickles that an older release has written and this one does not load. A saved run holds positions and states,
# which stay; these objects hold the planner's own tables, which have other classes since 0.2. Workers that are started
# with spawn pickle them as well, but within one release.
NOT_KEPT = {
    "sampler": "holds tables of batches: make a new one, and seek its position",
    "facts of a sampler": "the same",
    "iterator": "holds a table of batches: its state_dict stays",
    "plan": "holds a table of batches: plan the epoch again",
    "stream": "holds options and a cursor of other classes: make a new one, and seek its position",
}

# Methods that only the packages called, which no page told of, and which are gone.
INTERNAL = {f"collate.LengthTrackedBatch.{method}" for method in ("from_rows", "trusted", "rebuilt")}

NO_DEFAULT = {"variadic positional", "variadic keyword"}


def entries(file: str) -> list[Any]:
    """All entries of all releases in a file of that name, each as a case of a test."""
    return list(find_entries(file))


def find_entries(file: str) -> Iterator[Any]:
    for release in RELEASES:
        path = FOLDER / release / file
        content = json.loads(path.read_text()) if path.exists() else []
        for entry in content.items() if isinstance(content, dict) else content:
            name = entry[0] if isinstance(entry, tuple) else entry.get("description", entry.get("name"))
            form = f"{entry['form']} of " if isinstance(entry, dict) and file == "saved.json" else ""
            yield pytest.param(release, entry, id=f"{release}-{form}{name}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A copy of the corpora of each release, so that nothing is written beside the originals."""
    copies = {release: tmp_path_factory.mktemp("release") / "corpora" for release in RELEASES}
    for release, copied in copies.items():
        if (FOLDER / release / "corpora").exists():
            shutil.copytree(FOLDER / release / "corpora", copied)
    return copies


def told(release: str) -> dict[str, Any]:
    return json.loads((FOLDER / release / "corpora.json").read_text())


WITH_CORPORA = [release for release in RELEASES if (FOLDER / release / "corpora.json").exists()]
LAYOUTS = [(release, layout) for release in WITH_CORPORA for layout in ("blocks", "plain")]


def test_no_fixtures_are_missing() -> None:
    assert {"0.1.0", "0.2.0.dev0", "0.2.0"} <= set(RELEASES)
    for release in RELEASES[1:]:
        files = {"corpora", "corpora.json", "plans.json", "public.json", "saved.json", "states.json"}
        assert {path.name for path in (FOLDER / release).iterdir()} == files


# --- names


@pytest.mark.parametrize(("release", "entry"), entries("public.json"))
def test_a_public_name_is_there_with_all_that_it_took(release: str, entry: tuple[Any, ...]) -> None:
    name, old = entry
    new = surface.describe(RENAMED.get(name, name))
    assert_takes(name, old, new)
    for method, signature in old.get("methods", {}).items():
        if f"{name}.{method}" in INTERNAL:
            continue
        kept = RENAMED.get(f"{name}.{method}", method)
        assert kept in new["methods"], f"{name}.{method} is gone: keep it, or name what stands for it in RENAMED"
        assert_takes(f"{name}.{method}", signature, new["methods"][kept])
    left = {RENAMED.get(f"{name}.{attribute}", attribute) for attribute in old.get("attributes", [])}
    assert left <= {*new.get("attributes", []), *new.get("methods", {})}


def assert_takes(name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """No parameter has vanished or become another, none has moved, and no new one must be given."""
    now = {parameter: (kind, default) for parameter, kind, default in new["parameters"]}
    kept = {}
    for parameter, kind, default in old["parameters"]:
        renamed = RENAMED.get(f"{name}({parameter})")
        kept[renamed or parameter] = kind
        assert (renamed or parameter) in now, f"{name}: {parameter} is gone from {new['signature']}"
        found_kind, found = now[renamed or parameter]
        same = found_kind == kind and (found == default or "..." in {found, default})
        assert same or renamed is not None, f"{name}: {parameter} was {kind} = {default}, is {found_kind} = {found}"
    assert [key for key in now if kept.get(key) == "positional or keyword"] == [
        key for key, kind in kept.items() if kind == "positional or keyword"
    ]
    needed = [key for key, (kind, default) in now.items() if default is None and kind not in NO_DEFAULT]
    assert set(needed) <= set(kept), f"{name}: old calls do not give {set(needed) - set(kept)}"


# --- on disk


@pytest.mark.parametrize(("release", "layout"), LAYOUTS)
def test_a_corpus_reads_as_it_was_written(release: str, layout: str, folders: dict[str, Path]) -> None:
    data = ShardDataset(folders[release] / layout)
    assert plain.tell_samples(data) == told(release)[layout]["samples"]
    assert plain.tell("index", data.index) == told(release)[layout]["index"]
    assert list(data.index.keys) == [sample["__key__"] for sample in corpora.samples_from(0, len(data))]


@pytest.mark.parametrize("release", WITH_CORPORA)
def test_shards_of_other_programs_read_by_an_old_index(release: str, folders: dict[str, Path]) -> None:
    data = ShardDataset(*corpora.foreign_in(folders[release]))
    assert plain.tell_samples(data) == told(release)["foreign"]["samples"]
    assert plain.tell("index", data.index) == told(release)["foreign"]["index"]


@pytest.mark.parametrize("release", WITH_CORPORA)
@pytest.mark.parametrize("layout", ["blocks", "plain", "foreign"])
def test_old_shards_are_indexed_again_as_they_were(
    release: str, layout: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shards = sorted((folders[release] / layout).glob("*.tar"))
    index = LengthIndex.build(shards, told(release)[layout]["index"]["fields"], checksums=True)
    index.save(tmp_path / "again.ltx")
    for again in (index, LengthIndex.open(tmp_path / "again.ltx")):
        assert plain.tell("index", again) == told(release)[layout]["index"]


@pytest.mark.parametrize("release", WITH_CORPORA)
def test_an_index_of_each_shard_and_of_the_corpus_agree(release: str, folders: dict[str, Path]) -> None:
    for layout in ("blocks", "plain"):
        parts = sorted((folders[release] / layout).glob("*.tar.ltx"))
        joined = LengthIndex.concat([LengthIndex.open(part) for part in parts])
        assert joined.fingerprint == told(release)[layout]["index"]["fingerprint"]


@pytest.mark.parametrize("release", WITH_CORPORA)
def test_a_build_goes_on_with_the_indexes_that_were_kept(
    release: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shards = shutil.copytree(folders[release] / "foreign", tmp_path / "foreign")
    for index in shards.glob("*.tar.ltx"):
        # A copy is as new as its shard, and an index older than its shard is not taken.
        os.utime(index)
    before = {path.name: path.stat().st_ino for path in shards.iterdir()}
    index = corpora.build_kept(shards)
    assert {path.name: path.stat().st_ino for path in shards.iterdir()} == before
    assert {"lengths": index.lengths.tolist(), "length_id": index.length_id} == told(release)["kept"]


@pytest.mark.parametrize(("release", "layout"), LAYOUTS)
def test_a_writer_goes_on_behind_old_shards(
    release: str, layout: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[release] / layout, tmp_path / layout)
    before = len(ShardDataset(folder))
    with ShardWriter(folder, layout=layout, stack=["place"], append=True) as writer:
        for sample in corpora.samples_from(before, 3):
            writer.write(sample)
    assert list(writer.shards) == sorted(folder.glob("*.tar"))
    data = ShardDataset(folder)
    assert plain.tell_samples(data)[:before] == told(release)[layout]["samples"]
    assert plain.tell_samples(data)[before:] == [plain.tell_batch(sample) for sample in added(before)]
    data.index.verify(checksums=True)


def added(first: int) -> list[dict[str, Any]]:
    return [sample | {"label": np.int64(sample["label"])} for sample in corpora.samples_from(first, 3)]


@pytest.mark.parametrize("release", WITH_CORPORA)
def test_parts_of_a_killed_run_are_taken_over(release: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[release] / "parts", tmp_path / "parts")
    assert sorted(path.name for path in folder.iterdir()) == told(release)["parts"]["files"]
    stamps = {path.name: path.stat().st_ino for path in folder.glob("*.tar")}
    index = ShardWriter.write_parts(folder, corpora.part_of, corpora.PARTS, append=True, max_samples=2)
    samples = [sample for part in corpora.PARTS for sample in corpora.part_of(part)]
    assert list(index.keys) == [sample["__key__"] for sample in samples]
    assert plain.tell_samples(ShardDataset(folder)) == [plain.tell_batch(sample) for sample in samples]
    assert stamps.items() <= {path.name: path.stat().st_ino for path in folder.glob("*.tar")}.items()


# --- plans, positions and states


@pytest.mark.filterwarnings("ignore:count= of a plan is now called:DeprecationWarning")
@pytest.mark.parametrize(("release", "entry"), entries("plans.json"))
def test_a_plan_and_its_fingerprint_stay_as_they_were(release: str, entry: dict[str, Any]) -> None:
    sampler = loaders.make(entry["recipe"], FOLDER)
    assert sampler.position(0)["fingerprint"] == entry["fingerprint"]
    assert len(sampler) == entry["len"]
    for epoch, batches in entry["epochs"].items():
        assert list(sampler.plan(int(epoch)).batches[: len(batches)]) == batches


@pytest.mark.parametrize(("release", "entry"), entries("states.json"))
def test_the_rest_of_an_epoch_comes_after_a_saved_state(
    release: str, entry: dict[str, Any], folders: dict[str, Path]
) -> None:
    state = entry["state"] if entry["form"] == "json" else load(entry["form"], decode(entry["state"]), FOLDER)
    assert loaders.resume(entry["recipe"], state, folders[release]) == entry["after"]


@pytest.mark.parametrize(("release", "entry"), entries("refused.json"))
def test_a_position_within_an_epoch_planned_otherwise_is_refused(
    release: str,
    entry: dict[str, dict[str, dict[str, int] | int | str] | dict[str, int | str] | str],
    folders: dict[str, Path],
) -> None:
    with pytest.raises(ValueError, match=entry["error"]):
        loaders.resume(entry["recipe"], entry["state"], folders[release])


# --- pickles and files of torch.save


def objects(*forms: str) -> list[Any]:
    return [case for case in entries("saved.json") if case.values[1]["form"] in forms and is_kept(case.values[1])]


def is_kept(entry: dict[str, Any]) -> bool:
    """Whether this release loads what was saved."""
    return entry["kind"] not in NOT_KEPT


@pytest.mark.parametrize(("release", "entry"), objects("pickle", "torch.save"))
def test_what_was_saved_loads_as_it_was(release: str, entry: dict[str, Any], folders: dict[str, Path]) -> None:
    value = load(entry["form"], decode(entry["data"]), folders[release])
    assert [name for name in plain.READ.get(entry["kind"], []) if not hasattr(value, name)] == []
    result = json.loads(json.dumps(plain.tell(entry["kind"], value)))
    assert result == (renamed_report(entry["result"]) if entry["kind"] == "plan report" else entry["result"])


def renamed_report(result: dict[str, Any]) -> dict[str, Any]:
    """What is told of a report, by the present names of its figures; those that came later are None."""
    values = LATER | {REPORTED.get(name, name): value for name, value in result["values"].items()}
    lines = [
        f"{REPORTED.get(label.replace(' ', '_'), label).replace('_', ' '):<20}{figure}"
        for label, figure in ((line[:20].strip(), line[20:]) for line in result["text"].splitlines())
    ]
    return {"values": values, "text": "\n".join(lines)}


@pytest.mark.parametrize(("release", "entry"), objects("text"))
def test_the_tree_of_a_batch_that_an_export_holds_is_known(
    release: str, entry: dict[str, dict[str, str] | str]
) -> None:
    tree = pytree.treespec_loads(entry["data"])
    leaves = list(range(tree.num_leaves))
    assert pytree.tree_leaves(pytree.tree_unflatten([torch.tensor(leaf) for leaf in leaves], tree)) == leaves


@pytest.mark.parametrize("release", RELEASES)
def test_what_was_saved_loads_in_a_process_that_has_imported_nothing(
    release: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    # Here all modules are imported by now, which may be what makes an old name known.
    saved = json.loads((FOLDER / release / "saved.json").read_text())
    kept = [entry for entry in saved if entry["form"] in {"pickle", "torch.save"} and is_kept(entry)]
    for number, entry in enumerate(kept):
        data = decode(entry["data"])
        moved = pickles.move(data, ANYWHERE, str(folders[release])) if entry["form"] == "pickle" else data
        (tmp_path / f"{number:03}-{entry['form']}").write_bytes(moved)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(path.name for path in tmp_path.iterdir())


FRESH = """
import pickle, sys
from pathlib import Path

files = sorted(Path(sys.argv[1]).iterdir())
for path in files:
    if path.name.endswith("pickle"):
        pickle.loads(path.read_bytes())

import torch
import collate

for path in files:
    if path.name.endswith("torch.save"):
        torch.load(path)
    print(path.name)
"""


@pytest.mark.parametrize(("release", "entry"), objects("pickle", "torch.save"))
def test_a_saved_object_names_modules_as_listed_and_no_machine(release: str, entry: dict[str, Any]) -> None:
    data = decode(entry["data"])
    assert pickles.names_in(data) == entry["names"]
    assert not [text for text in pickles.texts_in(data) if text.startswith(("/", "\\")) or text[1:3] == ":\\"]
