"""Plain DDP under torchrun: stopped mid-epoch, and resumed on another number of processes.

torchrun --nproc-per-node 2 examples/frameworks/ddp_torchrun.py run.pt 50
torchrun --nproc-per-node 1 examples/frameworks/ddp_torchrun.py run.pt
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity import COLLATE, MAX_TOKENS, Parity, Tagger, loss_of
from tally import Tally, show
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from collate import token_scale
from samplers import LengthBucketBatchSampler

DATA, EPOCHS = Parity(), 3


class Run:
    """The parts of a training run. The tally only shows that no sample is lost; training does not need it."""

    def __init__(self) -> None:
        # The sampler reads W and its rank from the process group, which must exist.
        self.sampler = LengthBucketBatchSampler(DATA.lengths, max_tokens=MAX_TOKENS)
        self.loader = DataLoader(DATA, batch_sampler=self.sampler, collate_fn=COLLATE, num_workers=1)
        self.model = DistributedDataParallel(Tagger())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.tally = Tally(len(DATA))

    def step(self, batch: dict[str, Any]) -> None:
        """One training step; its averaged gradient is that of the mean over the tokens of all processes."""
        loss = loss_of(self.model, batch, "sum") * token_scale(batch["bits"].num_tokens)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.tally.add(batch["id"], batch["bits"].mask, loss.item())

    def save(self, path: Path, steps: int) -> None:
        """Save the run; `steps` counts from the start of the present epoch, or from where it was resumed."""
        state = {"position": self.sampler.position(steps), "tally": asdict(self.tally.gathered())}
        if dist.get_rank() == 0:
            torch.save(state | {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, path)

    def load(self, path: Path) -> None:
        """Resume from a saved run."""
        state = torch.load(path)
        self.sampler.seek(state["position"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.tally = Tally(**state["tally"]) if dist.get_rank() == 0 else self.tally


def main(file: str, stop_after: str = "0") -> None:
    """Resume from the file if it exists. Train to the end, or save and stop after `stop_after` steps."""
    run, path, done = Run(), Path(file), 0
    if path.exists():
        run.load(path)
    while run.sampler.epoch < EPOCHS:
        epoch, left = run.sampler.epoch, run.sampler.remaining
        for step, batch in enumerate(run.loader, start=1):
            run.step(batch)
            done += 1
            if done == int(stop_after):
                run.save(path, step)
                return
        show(f"epoch {epoch}, the last {left} steps by {dist.get_world_size()}", run.tally)
        run.tally = Tally(len(DATA))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(*sys.argv[1:])
    dist.destroy_process_group()
