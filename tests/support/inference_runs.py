"""Runs of `run_in_order` that are killed: `inference_runs.py JOB FOLDER [OPTIONS]`, alone or under torchrun."""

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import leave_pid
from torch import Tensor

from collate import LengthTrackedBatch, PadCollator
from samplers import run_in_order

LENGTHS = [1 + 37 * number % 23 for number in range(200)]
ROWS = [torch.arange(length, dtype=torch.float64) + number for number, length in enumerate(LENGTHS)]
EXPECTED = np.array([[float(row.sum()), number] for number, row in enumerate(ROWS)])


def totals(batch: dict[str, Any]) -> Tensor:
    """Each row's sum, and its number."""
    x: LengthTrackedBatch = batch["x"]
    return torch.stack([(x.padded * x.mask).sum(1), batch["id"].double()], 1)


def infer(out: Path, step: Any = totals, **options: Any) -> Any:
    """Run over all rows; every batch is a part."""
    samples = [{"x": row, "id": number} for number, row in enumerate(ROWS)]
    options = {"lengths": LENGTHS, "max_tokens": 90, "flush_seconds": 0, "progress": False, **options}
    return run_in_order(step, samples, collate_fn=PadCollator(), out=out, **options)


def infer_until_killed(folder: Path, run: str, batches: str, budget: str) -> None:
    """Run in all processes of a group; the last one kills itself in a step, after some batches.

    Each process leaves a line of sample numbers for each batch, when it has computed it.
    """
    rank, last = (dist.get_rank(), dist.get_world_size() - 1) if dist.is_initialized() else (0, 0)
    left = int(batches)

    def step(batch: dict[str, Any]) -> Tensor:
        nonlocal left
        if left == 0 and rank == last:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        with (folder / f"{run}-{rank}.computed").open("a") as file:
            file.write(" ".join(map(str, batch["id"].tolist())) + "\n")
        return totals(batch)

    found = infer(folder / "all.npy", step, max_tokens=int(budget))
    np.save(folder / f"{run}-{rank}.npy", found)


def infer_from_two_lengths(folder: Path) -> None:
    """The processes disagree on the dataset."""
    lengths = [length + dist.get_rank() for length in LENGTHS]
    try:
        infer(folder / "all.npy", lengths=lengths)
    except ValueError as error:
        (folder / f"{dist.get_rank()}.txt").write_text(str(error))


def kill_at_each_sync(folder: Path) -> None:
    """For each time that something is sent to the disk, a process that is killed then, and one that resumes."""
    # Few batches: each is a part, of two syncs.
    options: dict[str, Any] = {"max_tokens": 1000}
    sync = os.fsync
    for count in itertools.count(1):
        out = folder / f"{count}.npy"
        calls = itertools.count(1)

        def fsync(descriptor: Any, calls: Any = calls, count: int = count) -> None:
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)

        child = os.fork()
        if not child:
            vars(os)["fsync"] = fsync
            infer(out, **options)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        computed: list[int] = []

        def step(batch: dict[str, Any], computed: list[int] = computed) -> Tensor:
            computed.extend(batch["id"].tolist())
            return totals(batch)

        parts = len(list(Path(f"{out}.parts").glob("*.part")))
        before = sum(1 for _ in computed)
        found = infer(out, step, **options)
        left = sorted(path.name for path in folder.glob(f"{count}.*"))
        exact = bool(np.array_equal(found, EXPECTED)) and left == [f"{count}.npy", f"{count}.npy.run.json"]
        sys.stdout.write(f"{status} {parts} {len(computed) - before} {exact}\n")
        if status == 0:
            return


JOBS = {job.__name__: job for job in (infer_until_killed, infer_from_two_lengths, kill_at_each_sync)}


def main(name: str, folder: str, *options: str) -> None:
    """Do a job, in a process group if torchrun has started this."""
    if "RANK" in os.environ:
        leave_pid(Path(folder))
        dist.init_process_group("gloo")
    JOBS[name](Path(folder), *options)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
