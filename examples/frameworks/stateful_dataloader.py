"""StatefulDataLoader: save mid-epoch while workers run ahead, load, and resume.

python examples/frameworks/stateful_dataloader.py
"""

import tempfile
from itertools import islice
from pathlib import Path

import torch
from parity import COLLATE, MAX_TOKENS, Parity, Tagger, take_step
from tally import Tally, show
from torchdata.stateful_dataloader import StatefulDataLoader

from samplers import LengthBucketBatchSampler

DATA = Parity()


class Run:
    """A model, its optimizer and a loader, saved and loaded together."""

    def __init__(self) -> None:
        sampler = LengthBucketBatchSampler(DATA.lengths, max_tokens=MAX_TOKENS)
        # The loader asks the sampler's iterator for its state.
        self.loader = StatefulDataLoader(DATA, batch_sampler=sampler, collate_fn=COLLATE, num_workers=2)
        self.model, self.tally = Tagger(), Tally(len(DATA))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)

    def train(self, steps: int | None = None) -> None:
        """Train for a number of steps, or for the rest of the epoch."""
        for batch in islice(self.loader, steps):
            take_step(self.model, self.optimizer, batch, self.tally)

    def save(self, path: Path) -> None:
        """Save all states. Batches that the workers have prepared do not count as taken."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "loader")}
        torch.save(parts, path)

    def load(self, path: Path) -> None:
        """Load all states. They are primitive values, so the default of `torch.load` accepts them."""
        for name, state in torch.load(path).items():
            getattr(self, name).load_state_dict(state)


def main(folder: str) -> None:
    """Train an epoch, part of the next one, and the rest with new objects. Print the tally of each epoch."""
    first, second, path = Run(), Run(), Path(folder, "run.pt")
    first.train()
    show("epoch 0", first.tally)
    first.tally = Tally(len(DATA))
    first.train(steps=20)
    first.save(path)
    print(f"stopped after {first.tally.batches} batches; the file has {path.stat().st_size:,} bytes")
    second.load(path)
    second.train()
    second.tally.join(first.tally)
    show("epoch 1", second.tally)
    second.tally = Tally(len(DATA))
    second.train()
    show("epoch 2", second.tally)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
