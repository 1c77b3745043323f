"""Real processes under torchrun: how a test starts and ends them, and what each of them does.

As a script: `ranks.py JOB FOLDER [OPTION]`, where a rank leaves its files in the folder.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from collate import LengthTrackedBatch, PadCollator, VarlenCollator, apply_rnn, sequence_loss, token_scale
from samplers import LengthBucketBatchSampler, PackingBatchSampler

# 67 batches: two, three and four processes all have to share out a last, partial step.
LENGTHS = (np.arange(1180) * 37 % 61 + 1).tolist()
MAX_TOKENS = 600
# 118 rows of about ten sequences: four, three and eight processes all have to share the last rows.
CAPACITY = 310
CLASSES = 5
# Seconds after which a test gives its ranks up.
PATIENCE = 240

Record = dict[str, Any]


# --- in the test's process


def start(processes: int, script: str, job: str, folder: Path, *options: object) -> subprocess.Popen[str]:
    """Start a script of this folder under torchrun, in a session of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--log-dir", str(folder / "logs")]
    script = str(Path(__file__).with_name(script))
    command = [*launcher, "--nproc-per-node", str(processes), script, job, str(folder), *map(str, options)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(processes: int, script: str, job: str, folder: Path, *options: object) -> tuple[int, str]:
    """Run such a script to its end: torchrun's exit status and what all processes wrote."""
    process = start(processes, script, job, folder, *options)
    try:
        out, _ = process.communicate(timeout=PATIENCE)
    finally:
        kill(process, folder)
    return process.returncode, out


def kill(process: subprocess.Popen[str], folder: Path) -> None:
    """Kill torchrun and its ranks at once; torchrun gives each rank a session, so that its own group is not enough."""
    if process.poll() is not None:
        return
    for group in [process.pid, *(int(path.read_text()) for path in folder.glob("*.pid"))]:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def read(folder: Path) -> list[list[Record]]:
    """What each rank recorded, step by step."""
    paths = sorted(folder.glob("*.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


# --- in both


class Sequences(Dataset[dict[str, Any]]):
    """Sample i: its number, `x` float64 `[L, 2]` and `y` int64 `[L]`, both drawn from i."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(index)
        x = torch.randn(LENGTHS[index], 2, generator=rng, dtype=torch.float64)
        return {"id": index, "x": x, "y": torch.randint(CLASSES, (LENGTHS[index],), generator=rng)}

    def __len__(self) -> int:
        return len(LENGTHS)


class Tagger(nn.Module):
    """A GRU and a linear layer, float64: `x` `[B, T, 2]` -> logits `[B, T, CLASSES]`, the same weights each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.GRU(2, 4, batch_first=True).double()
        self.head = nn.Linear(4, CLASSES).double()

    def forward(self, x: LengthTrackedBatch) -> LengthTrackedBatch:
        return apply_rnn(self.rnn, x)[0].map(self.head)


def leave_pid(folder: Path) -> None:
    """Let `kill` find this rank."""
    (folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))


def make_sampler(**options: Any) -> LengthBucketBatchSampler:
    """The sampler of all these tests."""
    return LengthBucketBatchSampler(LENGTHS, max_tokens=MAX_TOKENS, seed=5, **options)


def make_packer(**options: Any) -> PackingBatchSampler:
    """The packing sampler of all these tests: attention's cost, two rows in a batch."""
    return PackingBatchSampler(LENGTHS, capacity=CAPACITY, rows=2, cost=lambda lengths: lengths**2, seed=5, **options)


def make_loader(batches: Any, kind: type[DataLoader[Any]] = DataLoader, workers: int = 0) -> DataLoader[Any]:
    """Batches of `Sequences`, collated."""
    collate: Any = PadCollator({"x": 0, "y": -100})
    if isinstance(batches, PackingBatchSampler):
        collate = VarlenCollator({"x": 0, "y": -100}, arrange="given", capacity=CAPACITY)
    return kind(Sequences(), batch_sampler=batches, collate_fn=collate, num_workers=workers)


def total_loss(
    model: nn.Module, batch: dict[str, Any], reduction: Literal["token", "sequence", "sum"] = "sum"
) -> Tensor:
    """Cross entropy over the real steps, a float64 scalar."""
    return sequence_loss(nn.CrossEntropyLoss(reduction="none"), model(batch["x"]), batch["y"], reduction=reduction)


# --- in the ranks


def record(folder: Path, epoch: int, step: int, batch: dict[str, Any]) -> None:
    """Add a line to this rank's file, which is on disk when this returns: a killed rank leaves what it has taken."""
    sizes = {"lengths": batch["x"].lengths.tolist(), "padded": batch["x"].mask.numel()}
    line = json.dumps({"epoch": epoch, "step": step, "ids": batch["id"].tolist(), **sizes})
    with (folder / f"{dist.get_rank()}.jsonl").open("a") as file:
        file.write(line + "\n")


def take_epochs(folder: Path) -> None:
    """Take three epochs; say how many steps they should have."""
    sampler = make_sampler()
    loader = make_loader(sampler)
    for epoch in range(3):
        for step, batch in enumerate(loader, start=1):
            record(folder, epoch, step, batch)
    (folder / f"{dist.get_rank()}.steps").write_text(str(len(sampler)))


def train_until_killed(folder: Path, seconds: str, before: str | None = None) -> None:
    """Take the rest of an epoch, and after each step save how many are done and the position.

    Args:
        folder: of this run.
        seconds: that a step takes.
        before: folder of the run to continue.
    """
    train(make_sampler(), folder, seconds, before)


def pack_until_killed(folder: Path, seconds: str, before: str | None = None) -> None:
    """The same with packs."""
    train(make_packer(), folder, seconds, before)


def train(sampler: Any, folder: Path, seconds: str, before: str | None) -> None:
    """Take the rest of an epoch, and save after each step."""
    if before:
        sampler.seek(json.loads(Path(before, "saved.json").read_text())["position"])
    for step, batch in enumerate(make_loader(sampler, workers=1), start=1):
        record(folder, 0, step, batch)
        time.sleep(float(seconds))
        # The step is done when all ranks have done it.
        dist.barrier()
        if dist.get_rank() == 0:
            replace(folder / "saved.json", json.dumps({"steps": step, "position": sampler.position(step)}))


def replace(file: Path, text: str) -> None:
    """Write a file anew, whole or not at all."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def save_gradients(folder: Path) -> None:
    """Leave each step's averaged gradients `[steps][parameters]`, scaled by a collective's tokens or the plan's."""
    sampler = make_sampler()
    tokens = sampler.plan(0).tokens
    model = nn.parallel.DistributedDataParallel(Tagger())
    saved: dict[str, list[list[Tensor]]] = {"collective": [], "plan": []}
    for step, batch in enumerate(make_loader(sampler)):
        scales = {"collective": token_scale(batch["x"].num_tokens), "plan": dist.get_world_size() / tokens[step]}
        for name, scale in scales.items():
            model.zero_grad()
            (total_loss(model, batch) * scale).backward()
            saved[name].append([cast("Tensor", weight.grad).clone() for weight in model.parameters()])
    torch.save(saved, folder / f"{dist.get_rank()}.pt")


def build_too_early(_: Path) -> None:
    """Build the sampler before there is a process group."""
    make_sampler()


JOBS = {
    job.__name__: job for job in (take_epochs, train_until_killed, pack_until_killed, save_gradients, build_too_early)
}


def main(name: str, folder: str, *options: str) -> None:
    """Do a job in a process group, but for the one that wants none."""
    leave_pid(Path(folder))
    if name != "build_too_early":
        dist.init_process_group("gloo")
    JOBS[name](Path(folder), *options)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
