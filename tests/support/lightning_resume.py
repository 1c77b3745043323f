"""How Lightning continues from checkpoints written at different moments: `lightning_resume.py FOLDER WORKERS WAY`.

The way is `loader`, a `StatefulDataLoader` that the module makes, or `module`, our DataModule. Prints as JSON whether
the batches of three epochs were those of a run that never stopped, for each kind of checkpoint.
"""

import json
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

from samplers import LengthBucketBatchSampler
from samplers.integrations.lightning import PlannedDataModule

LENGTHS = [1 + 37 * number % 61 for number in range(200)]
STEPS = len(LengthBucketBatchSampler(LENGTHS, max_tokens=600))
# In the middle of the second epoch.
MIDDLE = STEPS + 5


class Recorder(LightningModule):
    """Records the batches that it is given, and learns nothing."""

    def __init__(self, taken: list[list[int]], workers: int) -> None:
        super().__init__()
        self.taken, self.workers = taken, workers
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: list[int], _: int) -> torch.Tensor:
        self.taken.append(batch)
        return self.weight.sum()

    def validation_step(self, batch: list[int], _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class LoaderModule(Recorder):
    """Makes its loader itself."""

    def train_dataloader(self) -> StatefulDataLoader[Any]:
        sampler = LengthBucketBatchSampler(LENGTHS, max_tokens=600)
        # Workers that begin at an epoch's edge run ahead before Lightning tells the sampler its epoch.
        sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        dataset: Any = LENGTHS
        return StatefulDataLoader(dataset, batch_sampler=sampler, collate_fn=list, num_workers=self.workers)


class SaveAtTheLastStep(Callback):
    """Saves within the last step, however many there are."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.path)


def fit(
    way: str, workers: int, path: str | None, *callbacks: Callback, **limits: int
) -> tuple[Trainer, list[list[int]]]:
    """A new Trainer and the batches that it has taken."""
    taken: list[list[int]] = []
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"), False)
    saves = {"callbacks": list(callbacks), "enable_checkpointing": bool(callbacks)}
    trainer = Trainer(accelerator="cpu", devices=1, **silent, **saves, **limits)
    if way == "loader":
        trainer.fit(LoaderModule(taken, workers), ckpt_path=path)
    else:
        plan = {"max_tokens": 600}
        data = PlannedDataModule(
            LENGTHS, collate_fn=list, plan=plan, lengths=list, val=LENGTHS[:40], num_workers=workers
        )
        trainer.fit(Recorder(taken, workers), datamodule=data, ckpt_path=path)
    return trainer, taken


def main(folder: str, workers: int, way: str) -> None:
    """Stop within the second epoch, or at its end, and continue from each checkpoint."""
    _, whole = fit(way, workers, None, max_epochs=3)
    after = f"{folder}/after.ckpt"
    steps = ModelCheckpoint(folder, filename="steps", every_n_train_steps=MIDDLE)
    epochs = ModelCheckpoint(folder, filename="epochs")
    last = SaveAtTheLastStep(f"{folder}/last.ckpt")
    trainer, first = fit(way, workers, None, steps, epochs, last, max_steps=MIDDLE)
    trainer.save_checkpoint(after)
    paths = {"steps": steps.best_model_path, "last": last.path, "epochs": epochs.best_model_path, "after": after}
    exact = {name: first + fit(way, workers, path, max_epochs=3)[1] == whole for name, path in paths.items()}
    edge = ModelCheckpoint(folder, filename="edge")
    trainer, first = fit(way, workers, None, edge, max_epochs=2)
    exact["edge"] = first + fit(way, workers, edge.best_model_path, max_epochs=3)[1] == whole
    trainer.save_checkpoint(after)
    exact["after edge"] = first + fit(way, workers, after, max_epochs=3)[1] == whole
    sys.stdout.write(json.dumps(exact) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
