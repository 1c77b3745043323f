"""A process that runs turns of one module of loaders, as it is told: one JSON line in, one out.

    python benchmarks/loading_turns.py MODULE FOLDER LABEL keep|free

FOLDER holds the works, and by LABEL the files that the loaders write. Contenders with other requirements, or of another
checkout, so take turns in the same rounds: while one process runs a turn, the others wait for a line.
"""

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from harness import keep_pages
from loaders.contract import Loader
from loaders.training import Step
from loaders.works import PADDING, Work, total

# A turn of short epochs, whose workers take long to start, ends after this many times its seconds.
LONGEST: Final = 4
# A loader may take long to its first batch: fewer batches than this do not show its speed.
FEW: Final = 32
KILOBYTE: Final = 1024


class Turns:
    """The loaders of one module, opened when they are first used.

    Args:
        module: A module of this folder, with `LOADERS`.
        folder: Where the works are, and the files of loaders.
        label: Name of the folder of this process's files.
    """

    def __init__(self, module: Any, folder: Path, label: str) -> None:
        self.module, self.folder, self.label = module, folder, label
        self.loaders: dict[str, Loader] = module.LOADERS
        self._works: dict[str, Work] = {}
        self._open: dict[tuple[str, str, int], Iterable[Any]] = {}

    def work(self, name: str) -> Work:
        """A work by name."""
        if name not in self._works:
            self._works[name] = Work.open(self.folder / "works" / name)
        return self._works[name]

    def files(self, work: str, loader: str) -> Path:
        """The folder of a loader's files of a work."""
        return self.folder / "files" / self.label / work / self.loaders[loader].files

    def open(self, work: str, loader: str, workers: int) -> Iterable[Any]:
        """The batches of a loader; each iteration is an epoch."""
        key = (work, loader, workers)
        if key not in self._open:
            self._open[key] = self.loaders[loader].epochs(self.work(work), self.files(work, loader), workers)
        return self._open[key]

    def list(self) -> dict[str, Any]:
        """The loaders, the versions of their library, and the file of our code if this process has imported it."""
        return {
            "loaders": {
                name: {"workers": one.workers, "checks": one.checks, "works": one.works}
                for name, one in self.loaders.items()
            },
            "versions": {name: version(name) for name in self.module.LIBRARIES},
            "code": getattr(sys.modules.get("collate"), "__file__", None),
        }

    def write(self, work: str, loader: str) -> dict[str, float]:
        """Write a loader's files, if no other loader has: bytes of the files, and seconds."""
        path = self.files(work, loader)
        start = time.perf_counter()
        if not path.exists():
            path.mkdir(parents=True)
            self.loaders[loader].write(self.work(work), path)
        return {"bytes": bytes_of(path), "seconds": time.perf_counter() - start}

    def check(self, work: str, loader: str, workers: int) -> dict[str, Any]:
        """A whole epoch: rows, padded values, and the sum above the padding, by field."""
        rows, values, sums = 0, 0, dict.fromkeys(self.work(work).fields, 0.0)
        start = time.perf_counter()
        for batch in self.open(work, loader, workers):
            blocks = self.loaders[loader].blocks(batch)
            rows += len(next(iter(blocks.values())))
            for name in sums:
                values += blocks[name].numel()
                sums[name] += total(blocks[name].numpy(), PADDING[name])
        return {"rows": rows, "values": values, "sums": sums, "seconds": time.perf_counter() - start}

    def turn(self, work: str, loader: str, workers: int, seconds: float) -> dict[str, float]:
        """Whole epochs for about half of some seconds or more, the first one cut at these seconds.

        With workers, each epoch is counted from the first batch of the last of them on: their start is not counted.

        Returns:
            Rows, batches, and seconds.
        """
        one = self.loaders[loader]
        batches = self.open(work, loader, workers)
        skipped = 0 if one.counts_start else max(workers, int(one.from_first))
        total = {"rows": 0, "batches": 0, "seconds": 0.0}
        gc.collect()
        begin = time.perf_counter()
        while total["seconds"] < seconds / 2 and time.perf_counter() - begin < LONGEST * seconds:
            for name, figure in take(batches, one, seconds, skipped).items():
                total[name] += figure
        return total

    def first(self, work: str, loader: str, half: float) -> dict[str, float]:
        """Seconds from the making of a loader to its first batch, at the start or in the middle of an epoch."""
        gc.collect()
        start = time.perf_counter()
        made = self.module.at_half(self.work(work), self.files(work, loader), loader, half=bool(half))
        source = iter(made)
        next(source)
        return {"seconds": time.perf_counter() - start}

    def memory(self, work: str, loader: str, workers: int, batches: int) -> dict[str, int]:
        """Memory of this process and its workers after some batches, in bytes, by kind."""
        source = repeated(self.open(work, loader, workers))
        for _ in range(batches):
            next(source)
        return proportional_memory()

    def train(self, work: str, loader: str | None, workers: int, *, steps: int, units: int) -> dict[str, float]:
        """Seconds of a training loop of some steps, each of some units; without a loader, the steps alone."""
        step = Step(units)
        source = iter(()) if loader is None else repeated(self.open(work, loader, workers))
        gc.collect()
        # The first batch, and its step, start workers and threads.
        next(source, None)
        step()
        start = time.perf_counter()
        for _ in range(steps):
            next(source, None)
            step()
        seconds = time.perf_counter() - start
        del source
        return {"seconds": seconds}

    def calibrate(self, seconds: float) -> dict[str, int]:
        """How many units make a training step of about that many seconds."""
        return {"units": Step.units_of(seconds)}


def take(batches: Iterable[Any], loader: Loader, seconds: float, skipped: int) -> dict[str, float]:
    """One epoch after its first `skipped` batches: some seconds of it, longer if they gave few batches."""
    blocks = loader.blocks
    rows = count = 0
    start = time.perf_counter()
    source = iter(batches)
    for _ in islice(source, skipped):
        start = time.perf_counter()
    now = start
    for batch in source:
        rows += len(next(iter(blocks(batch).values())))
        count += 1
        now = time.perf_counter()
        if now - start > (seconds if count >= FEW else LONGEST * seconds):
            break
    return {"rows": rows, "batches": count, "seconds": now - start}


def repeated(batches: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from batches


def bytes_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def proportional_memory() -> dict[str, int]:
    """Memory of this process and its children: shared pages count by the number of processes that share them.

    Empty where the system does not tell.
    """
    found: dict[str, int] = {}
    own, listed = Path("/proc/self/smaps_rollup"), Path(f"/proc/self/task/{os.getpid()}/children")
    if not own.exists() or not listed.exists():
        return found
    children = listed.read_text().split()
    for text in [own.read_text(), *(Path(f"/proc/{child}/smaps_rollup").read_text() for child in children)]:
        for line in text.splitlines():
            if line.startswith("Pss"):
                name, size = line.split()[:2]
                found[name.rstrip(":")] = found.get(name.rstrip(":"), 0) + int(size) * KILOBYTE
    return found


def answer(turns: Turns, line: str) -> dict[str, Any]:
    """The answer to one line. An error ends the process, and its last line is in the log."""
    asked = json.loads(line)
    call: Callable[..., dict[str, Any]] = getattr(turns, asked.pop("do"))
    return call(**asked)


def main() -> None:
    """Answer lines until the input ends."""
    name, folder, label, keeping = sys.argv[1:]
    # What libraries print must not go between the answers.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    if keeping == "keep":
        keep_pages()
    try:
        turns = Turns(importlib.import_module(f"loaders.{name}"), Path(folder), label)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=channel, flush=True)
        return
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(turns, line)), file=channel, flush=True)


if __name__ == "__main__":
    main()
