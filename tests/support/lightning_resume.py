"""How Lightning continues from checkpoints written at different moments: `lightning_resume.py FOLDER WORKERS`.

Prints as JSON whether the batches of three epochs were those of a run that never stopped, for each kind of checkpoint.
"""

import json
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

from samplers import LengthBucketBatchSampler

LENGTHS = [1 + 37 * place % 61 for place in range(200)]
STEPS = len(LengthBucketBatchSampler(LENGTHS, max_tokens=600))
# In the middle of the second epoch.
MIDDLE = STEPS + 5


class Module(LightningModule):
    """Records the batches that it is given, and learns nothing."""

    def __init__(self, taken: list[list[int]], workers: int) -> None:
        super().__init__()
        self.taken, self.workers = taken, workers
        self.weight = torch.nn.Parameter(torch.ones(1))

    def train_dataloader(self) -> StatefulDataLoader[Any]:
        sampler = LengthBucketBatchSampler(LENGTHS, max_tokens=600)
        # Workers that begin at an epoch's edge run ahead before Lightning tells the sampler its epoch.
        sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        dataset: Any = LENGTHS
        return StatefulDataLoader(dataset, batch_sampler=sampler, collate_fn=list, num_workers=self.workers)

    def training_step(self, batch: list[int], _: int) -> torch.Tensor:
        self.taken.append(batch)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveAtTheLastStep(Callback):
    """Saves within the last step, however many there are."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.path)


def fit(workers: int, path: str | None, *callbacks: Callback, **limits: int) -> tuple[Trainer, list[list[int]]]:
    """A new Trainer and the batches that it has taken."""
    taken: list[list[int]] = []
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"), False)
    saves = {"callbacks": list(callbacks), "enable_checkpointing": bool(callbacks)}
    trainer = Trainer(accelerator="cpu", devices=1, **silent, **saves, **limits)
    trainer.fit(Module(taken, workers), ckpt_path=path)
    return trainer, taken


def main(folder: str, workers: int) -> None:
    """Stop within the second epoch, or at its end, and continue from each checkpoint."""
    _, whole = fit(workers, None, max_epochs=3)
    after = f"{folder}/after.ckpt"
    steps = ModelCheckpoint(folder, filename="steps", every_n_train_steps=MIDDLE)
    epochs = ModelCheckpoint(folder, filename="epochs")
    last = SaveAtTheLastStep(f"{folder}/last.ckpt")
    trainer, first = fit(workers, None, steps, epochs, last, max_steps=MIDDLE)
    trainer.save_checkpoint(after)
    paths = {"steps": steps.best_model_path, "last": last.path, "epochs": epochs.best_model_path, "after": after}
    exact = {name: first + fit(workers, path, max_epochs=3)[1] == whole for name, path in paths.items()}
    edge = ModelCheckpoint(folder, filename="edge")
    _, first = fit(workers, None, edge, max_epochs=2)
    exact["edge"] = first + fit(workers, edge.best_model_path, max_epochs=3)[1] == whole
    sys.stdout.write(json.dumps(exact) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
