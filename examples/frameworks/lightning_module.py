"""Lightning: a Trainer stops mid-epoch, and another resumes from a later checkpoint, on one process or two.

python examples/frameworks/lightning_module.py
torchrun --nproc-per-node 2 examples/frameworks/lightning_module.py
"""

import os
import tempfile
from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from parity import COLLATE, MAX_TOKENS, Parity, Tagger, loss_of
from tally import Tally, show

from collate import token_scale
from samplers.integrations.lightning import PlannedDataModule

DATA = Parity()
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
STOP_AFTER = 80 // PROCESSES
TALLIES: dict[int, Tally] = defaultdict(lambda: Tally(len(DATA)))


class Module(LightningModule):
    """Trains a tagger, and counts the samples of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.tagger = Tagger()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """The loss; its averaged gradient is that of the mean over the tokens of all processes."""
        loss = loss_of(self.tagger, batch, "sum") * token_scale(batch["bits"].num_tokens)
        # Lightning would guess the batch size from the first tensor that it finds.
        self.log("loss", loss, batch_size=len(batch["bits"]))
        TALLIES[self.current_epoch].add(batch["id"], batch["bits"].mask, loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return torch.optim.Adam(self.parameters(), lr=0.02)


def fit(checkpoint: str | None = None, **options: Any) -> Trainer:
    """Train with a new Trainer, which must not replace the sampler."""
    data = PlannedDataModule(DATA, collate_fn=COLLATE, plan={"max_tokens": MAX_TOKENS}, lengths=DATA.lengths)
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"), False)
    strategy = "ddp" if PROCESSES > 1 else "auto"
    trainer = Trainer(accelerator="cpu", devices=PROCESSES, strategy=strategy, **silent, **options)
    trainer.fit(Module(), data, ckpt_path=checkpoint)
    return trainer


def main() -> None:
    """Stop in the second epoch, save after that, and resume. Only the first process writes to its folder."""
    with tempfile.TemporaryDirectory() as folder:
        first = fit(max_steps=STOP_AFTER, default_root_dir=folder)
        path = first.strategy.broadcast(f"{folder}/stopped.ckpt")
        first.save_checkpoint(path)
        fit(path, max_epochs=3, default_root_dir=folder)
    for epoch, tally in TALLIES.items():
        show(f"epoch {epoch}", tally)
    # Lightning leaves the group of gloo open, and its threads can abort a process that ends while they run.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
