"""Lightning on packed rows: a GRU that begins again at each document, on one process or two.

python examples/frameworks/lightning_packed.py
torchrun --nproc-per-node 2 examples/frameworks/lightning_packed.py
"""

import os
from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from parity import MAX_TOKENS, Parity, Tagger, loss_of
from tally import Tally, show
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import VarlenCollator, check_step, token_scale
from samplers import LengthBucketBatchSampler

DATA = Parity()
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
TALLIES: dict[int, Tally] = defaultdict(lambda: Tally(len(DATA)))
# One row of this many real steps, so that all batches have one shape.
PACK = VarlenCollator({"bits": 0, "odd": -100}, capacity=MAX_TOKENS, max_documents=MAX_TOKENS)


class Module(LightningModule):
    """Trains a tagger on packed rows, and counts the samples of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.tagger = Tagger()

    def train_dataloader(self) -> StatefulDataLoader:
        """Samples of up to `MAX_TOKENS` real steps together, made when the process group exists."""
        sampler = LengthBucketBatchSampler(DATA.lengths, max_tokens=MAX_TOKENS, count_tokens="real")
        return StatefulDataLoader(DATA, batch_sampler=sampler, collate_fn=PACK)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """The loss; its averaged gradient is that of the mean over the steps of all processes."""
        loss = loss_of(self.tagger, batch, "sum") * token_scale(batch["bits"])
        self.log("loss", loss, batch_size=len(batch["bits"]))
        TALLIES[self.current_epoch].add(batch["id"], batch["bits"].mask, loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return torch.optim.Adam(self.parameters(), lr=0.02)


def main() -> None:
    """Check that no document reaches another, then train."""
    module = Module()
    check_step(lambda batch: loss_of(module.tagger, batch), PACK([DATA[i] for i in range(8)])).raise_if_broken()
    silent = (
        "logger",
        "enable_progress_bar",
        "enable_model_summary",
        "use_distributed_sampler",
        "enable_checkpointing",
    )
    options = {"accelerator": "cpu", "devices": PROCESSES, "strategy": "ddp" if PROCESSES > 1 else "auto"}
    Trainer(**options, **dict.fromkeys(silent, False), max_epochs=3).fit(module)
    for epoch, tally in sorted(TALLIES.items()):
        show(f"epoch {epoch}", tally)
    # Lightning leaves the group of gloo open, and its threads can abort a process that ends while they run.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
