"""Make fixtures of the release that is checked out: `cd tests && python -m compatibility.make VERSION`.

Run it only to add what a newer release writes, in a new folder named by its version. The folders of earlier releases
stay as they are for ever: what they hold cannot be made again, and a later release that cannot read it is broken.
Paths of files in pickles begin with `CORPORA`, in whose place a test puts a folder.

`0.1.0` was written by that release, of which only positions and a few batches are kept. `0.2.0.dev0` was written by the
code that came after it, before its modules got other names. `0.2.0` is the first with packed rows and mixtures.
"""

import json
import pickle
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

import samplers
from compatibility import corpora, loaders, objects, pickles, plain, surface
from compatibility.recipes import (
    PACKS,
    PLANS,
    mixture_recipe,
    pack_recipe,
    packed_stream_recipe,
    sampler_recipe,
    stream_recipe,
    take,
)

ROOT = Path(__file__).parents[2]
# Batches of an epoch that are kept.
PLANNED = 5


def main(version: str) -> None:
    """Write all fixtures.

    Raises:
        SystemExit: There are fixtures of that version.
    """
    folder = Path(__file__).parent / version
    if folder.exists():
        sys.exit(f"{folder} holds fixtures that must stay: name the new release")
    with tempfile.TemporaryDirectory() as temporary:
        shards = Path(temporary) / "corpora"
        corpora.write_corpora(shards)
        shutil.copytree(shards, folder / "corpora")
        write(folder / "public.json", surface.find_surface(ROOT))
        write(folder / "corpora.json", told_corpora(shards))
        write(folder / "plans.json", list(told_plans()))
        write(folder / "states.json", list(saved_states(shards)))
        write(folder / "saved.json", list(saved_objects(version, shards)))


def write(path: Path, content: Any) -> None:
    """Write JSON: one entry a line, so that it stays small and can be read."""
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    lines = [
        (f"{json.dumps(key)}: " if isinstance(content, dict) else "") + json.dumps(value) for key, value in entries
    ]
    first, last = "{}" if isinstance(content, dict) else "[]"
    path.write_text(first + "\n" + ",\n".join(lines) + "\n" + last + "\n")


def told_corpora(shards: Path) -> dict[str, Any]:
    """What each corpus holds."""
    found = {name: samplers.ShardDataset(shards / name) for name in ("blocks", "plain")}
    found["foreign"] = samplers.ShardDataset(*corpora.foreign_in(shards))
    told = {
        name: {"samples": plain.tell_samples(data), "index": plain.tell("index", data.index)}
        for name, data in found.items()
    }
    kept = corpora.build_kept(shards / "foreign")
    names = sorted(path.name for path in (shards / "parts").iterdir())
    return told | {"kept": {"lengths": kept.lengths.tolist(), "length_id": kept.length_id}, "parts": {"files": names}}


def told_plans() -> Iterator[dict[str, Any]]:
    """Fingerprint and first batches of samplers."""
    sources = {name: sampler_recipe(name) for name in PLANS} | {name: pack_recipe(name) for name in PACKS}
    for name, source in (sources | {"mixed": mixture_recipe()}).items():
        for replicas, numbers in {1: (0, 1, 6), 3: (1,)}.items():
            recipe = source | {"replicas": replicas, "rank": 0}
            sampler = loaders.make(recipe, Path())
            epochs = {str(epoch): list(sampler.plan(epoch).batches[:PLANNED]) for epoch in numbers}
            fingerprint = sampler.position(0)["fingerprint"]
            yield {"name": name, "recipe": recipe, "len": len(sampler), "fingerprint": fingerprint, "epochs": epochs}


def saved_states(shards: Path) -> Iterator[dict[str, Any]]:
    """Positions and states, each with what comes after it."""
    yield from _sampler_states(shards)
    yield from _iterator_states(shards)
    yield from _other_states(shards)
    yield from _loader_states(shards)


def _sampler_states(shards: Path) -> Iterator[dict[str, Any]]:
    sources = {
        "small": sampler_recipe("small"),
        "two fields": sampler_recipe("two fields"),
        "many": sampler_recipe("many"),
        "stream of blocks": stream_recipe("blocks"),
        "stream of plain shards": stream_recipe("plain"),
        "rows": pack_recipe("packed"),
        "pairs of rows": pack_recipe("packed, two rows"),
        "mixture": mixture_recipe(),
        "stream of rows": packed_stream_recipe("blocks"),
    }
    for name, source in sources.items():
        for replicas, rank in ((1, 0), (2, 0), (2, 1)):
            recipe = source | {"load": "seek", "replicas": replicas, "rank": rank}
            loader = loaders.make(recipe, shards)
            # Of a long epoch only the end is kept.
            middle = max(1, len(loader) // 3) if name != "many" else len(loader) - 3
            for where, steps in {"middle": middle, "end": len(loader)}.items():
                loader.set_epoch(4)
                running = iter(loader)
                take(running, steps)
                state = loader.position(steps)
                after = {"rest": [plain.tell_keys(batch) for batch in running], "next": loaders.first_batches(loader)}
                yield _entry(f"position of {name}, rank {rank} of {replicas}, {where}", recipe, state, after, shards)
        others = {"small": (3, 2), "stream of blocks": (1, 0)}
        if name in others:
            replicas, rank = others[name]
            other = recipe | {"replicas": replicas, "rank": rank}
            loader.set_epoch(4)
            take(iter(loader), middle)
            state = loader.position(middle)
            after = loaders.resume(other, state, shards)
            yield _entry(f"position of {name}, of 2 replicas, gone on with by {replicas}", other, state, after, shards)
    every = sampler_recipe("small") | {"load": "seek", "replicas": 2, "rank": "all"}
    loader = loaders.make(every, shards)
    running = iter(loader)
    take(running, 4)
    state = loader.position(2)
    after = {"rest": list(running), "next": loaders.first_batches(loader)}
    yield _entry("position of small, all ranks of 2", every, state, after, shards)
    loader.set_epoch(7)
    state = loader.next_position
    after = {"rest": list(loader), "next": loaders.first_batches(loader)}
    yield _entry("next_position of small, all ranks of 2, after set_epoch", every, state, after, shards)


def _iterator_states(shards: Path) -> Iterator[dict[str, Any]]:
    cases = [
        ("small", sampler_recipe("small"), 1, 0, 3),
        ("small, all ranks, within a step", sampler_recipe("small"), 2, "all", 3),
        ("small, at the end", sampler_recipe("small"), 1, 0, None),
        ("stream of blocks", stream_recipe("blocks"), 1, 0, 2),
        ("stream of plain shards, rank 1 of 2", stream_recipe("plain"), 2, 1, 1),
        ("stream of blocks, at the end", stream_recipe("blocks"), 1, 0, None),
        ("stream of blocks, not begun", stream_recipe("blocks"), 1, 0, 0),
    ]
    for name, source, replicas, rank, taken in cases:
        recipe = source | {"load": "iterator", "replicas": replicas, "rank": rank}
        loader = loaders.make(recipe, shards)
        running = iter(loader)
        take(running, len(loader) if taken is None else taken)
        state = running.state_dict()
        after = {"rest": [plain.tell_keys(batch) for batch in running], "next": loaders.first_batches(loader)}
        yield _entry(f"state of an iterator of {name}", recipe, state, after, shards)


def _other_states(shards: Path) -> Iterator[dict[str, Any]]:
    for taken in (0, 1, 5):
        recipe = {"kind": "node", "load": "reset"}
        node = loaders.make(recipe, shards)
        node.reset()
        take(node, taken)
        state = node.state_dict()
        rest = list(node)
        node.reset()
        after = {"rest": rest, "next": list(islice(node, 2))}
        yield _entry(f"state of a node after {taken} batches", recipe, state, after, shards)
    recipe = {"kind": "buffer", "load": "push"}
    bucketer = loaders.make(recipe, shards)
    running = loaders.push_from(bucketer, 0)
    take(running, 4)
    state = bucketer.state_dict()
    yield _entry("state of a buffer", recipe, state, {"rest": list(running), "next": []}, shards)


def _loader_states(shards: Path) -> Iterator[dict[str, Any]]:
    sources = {"small": sampler_recipe("small"), "stream of blocks": stream_recipe("blocks")}
    for name, source in sources.items():
        one = source | {"replicas": 1, "rank": 0}
        for workers in (0, 2):
            recipe = {"kind": "loader", "load": "state", "source": one, "workers": workers, "stateful": True}
            for taken in (2, None):
                text = f"state of a StatefulDataLoader of {name}, {workers} workers, after {taken or 'all'} batches"
                yield _state_of(text, recipe, taken, shards)
        for stateful in (False, True):
            inner = {"kind": "loader", "source": one, "workers": 0, "stateful": stateful}
            recipe = {"kind": "prefetcher", "load": "state", "source": inner}
            kind = "StatefulDataLoader" if stateful else "DataLoader"
            yield _state_of(f"state of a DevicePrefetcher over a {kind} of {name}", recipe, 2, shards)


def _state_of(text: str, recipe: dict[str, Any], taken: int | None, shards: Path) -> dict[str, Any]:
    loader = loaders.make(recipe, shards)
    running = iter(loader)
    take(running, len(loader) if taken is None else taken)
    state = loader.state_dict()
    # What comes is told by the loader itself, going on.
    rest = [plain.tell_keys(batch) for batch in running]
    return _entry(text, recipe, state, {"rest": rest, "next": loaders.first_batches(loader)}, shards)


def _entry(text: str, recipe: dict[str, Any], state: Any, after: dict[str, Any], shards: Path) -> dict[str, Any]:
    if json.loads(json.dumps(state)) == state:
        kept = {"form": "json", "state": state}
    else:
        kept = {"form": "torch.save", "state": pickles.encode(pickles.torch_saved(state))}
    resumed = loaders.resume(recipe, state, shards)
    if resumed != after:
        raise ValueError(f"{text}: comes {after}, resumed {resumed}")
    return {"description": text, "recipe": recipe, **kept, "after": after}


def saved_objects(version: str, shards: Path) -> Iterator[dict[str, Any]]:
    """What `torch.save` and pickle make of every object that they take, and what must come out."""
    made_by = {"lengthtrack": version, "torch": torch.__version__, "numpy": np.__version__}
    made_by["python"] = platform.python_version()
    for form, kind, text, value in objects.objects(shards):
        data = pickles.torch_saved(value) if form == "torch.save" else pickle.dumps(value)
        if form == "pickle":
            data = pickles.move(data, str(shards), pickles.ANYWHERE)
        loaded = pickles.load(form, data, shards)
        yield {
            "description": text,
            "kind": kind,
            "form": form,
            "made_by": made_by,
            "names": pickles.names_in(data),
            "data": pickles.encode(data),
            "result": json.loads(json.dumps(plain.tell(kind, loaded))),
        }
    for name, batch in objects.batches().items():
        text = pytree.treespec_dumps(pytree.tree_structure(batch))
        yield {"description": f"the tree of {name}", "kind": "tree", "form": "text", "data": text, "made_by": made_by}


if __name__ == "__main__":
    main(*sys.argv[1:])
