"""accelerate: `prepare` deals the batches of one sampler to all processes. Saved and resumed mid-epoch.

accelerate launch --cpu --num_processes 2 examples/frameworks/accelerate_loop.py
"""

from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from parity import COLLATE, MAX_TOKENS, Parity, Tagger, loss_of
from tally import Tally, show
from torch.utils.data import DataLoader

from collate import token_scale
from samplers import LengthBucketBatchSampler

DATA = Parity()
ACCELERATOR = Accelerator(cpu=True)


def make_loader(position: dict[str, Any] | None = None) -> tuple[LengthBucketBatchSampler, Any]:
    """A sampler of the batches of all processes, and the loader that gives each process every W-th of them."""
    sampler = LengthBucketBatchSampler(DATA.lengths, max_tokens=MAX_TOKENS, rank="all")
    loader = ACCELERATOR.prepare(DataLoader(DATA, batch_sampler=sampler, collate_fn=COLLATE))
    if position:
        sampler.seek(position)
        # The loader sets the sampler's epoch from its own count. A count of 0 would clear the position.
        loader.set_epoch(position["epoch"])
    return sampler, loader


def train(model: Any, optimizer: Any, batches: Any, tally: Tally) -> None:
    """Train on batches; the gradient is that of the mean over the tokens of all processes."""
    for batch in batches:
        loss = loss_of(model, batch, "sum") * token_scale(batch["bits"].num_tokens)
        optimizer.zero_grad()
        ACCELERATOR.backward(loss)
        optimizer.step()
        tally.add(batch["id"], batch["bits"].mask, loss.item())


def main() -> None:
    """Train three epochs. The second one stops, and resumes with another sampler and loader."""
    model = Tagger()
    model, optimizer = ACCELERATOR.prepare(model, torch.optim.Adam(model.parameters(), lr=0.02))
    tallies = [Tally(len(DATA)) for _ in range(3)]
    sampler, loader = make_loader()
    train(model, optimizer, loader, tallies[0])
    train(model, optimizer, islice(loader, 10), tallies[1])
    position = sampler.position(10)
    ACCELERATOR.print(f"{ACCELERATOR.num_processes} processes, {len(loader)} steps; stopped at {position}")
    sampler, loader = make_loader(position)
    train(model, optimizer, loader, tallies[1])
    train(model, optimizer, loader, tallies[2])
    for epoch, tally in enumerate(tallies):
        show(f"epoch {epoch}", tally)


if __name__ == "__main__":
    main()
    ACCELERATOR.end_training()
