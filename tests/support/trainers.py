"""What each process of a trainer does, under torchrun: `trainers.py JOB FOLDER [OPTION]`.

For each way of the data into the trainer, records and weights lie in a folder of its name.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import Tagger, leave_pid, make_loader, make_sampler, record, total_loss
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import token_scale
from samplers import LengthBucketBatchSampler

EPOCHS = 2
# Batches of each rank in an optimizer step, where gradients are accumulated.
ACCUMULATE = 3
LEARNING_RATE = 0.1
STEPS = len(make_sampler(num_replicas=2, rank=0))
# Lightning's checkpoints are named by the step: one after an epoch, one five steps into the next.
EDGE, MIDDLE = STEPS, STEPS + 5


def share_of_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """This rank's share of the mean over the real steps of all ranks, for trainers that average gradients."""
    return total_loss(model, batch) * token_scale(batch["x"].num_tokens)


def save_weights(model: nn.Module, folder: Path) -> None:
    torch.save([weight.detach() for weight in model.parameters()], folder / f"{dist.get_rank()}.pt")


def note(folder: Path, epoch: int, batches: Iterable[Any], first: int = 1) -> Iterator[Any]:
    """Record batches as they are taken."""
    folder.mkdir(exist_ok=True)
    for step, batch in enumerate(batches, start=first):
        record(folder, epoch, step, batch)
        yield batch


# --- accelerate


def train_with_accelerate(folder: Path) -> None:
    """Train on a loader that accelerate deals out, and on one that it never sees; resume both; meet the error."""
    accelerator = Accelerator(cpu=True)
    mine = {"rank": accelerator.process_index}
    train(accelerator, accelerator.prepare(make_loader(make_sampler(rank="all"))), folder / "prepared")
    train(accelerator, make_loader(make_sampler(**mine)), folder / "unseen")
    accumulate(accelerator, make_sampler(**mine), folder / "accumulated")
    resume(make_sampler(rank="all"), accelerator.prepare, folder / "prepared-resumed")
    resume(make_sampler(**mine), lambda loader: loader, folder / "unseen-resumed")
    try:
        make_sampler()
    except RuntimeError as error:
        (folder / f"{dist.get_rank()}.txt").write_text(str(error))


def train(accelerator: Accelerator, loader: Any, folder: Path) -> None:
    model = Tagger()
    model, optimizer = accelerator.prepare(model, SGD(model.parameters(), LEARNING_RATE))
    for epoch in range(EPOCHS):
        for batch in note(folder, epoch, loader):
            accelerator.backward(share_of_loss(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    save_weights(model, folder)


def accumulate(accelerator: Accelerator, sampler: LengthBucketBatchSampler, folder: Path) -> None:
    """Train with several batches in each optimizer step; no tokens are communicated."""
    model = Tagger()
    model, optimizer = accelerator.prepare(model, SGD(model.parameters(), LEARNING_RATE))
    updates = sampler.updates(accumulate=ACCUMULATE)
    for epoch in range(EPOCHS):
        for number, batch in enumerate(note(folder, epoch, make_loader(sampler))):
            update = updates.at(number)
            with nullcontext() if update.is_last else accelerator.no_sync(model):
                accelerator.backward(total_loss(model, batch) * update.token_scale)
            if update.is_last:
                optimizer.step()
                optimizer.zero_grad()
    save_weights(model, folder)


def resume(sampler: LengthBucketBatchSampler, prepare: Callable[[Any], Any], folder: Path) -> None:
    """Stop the second epoch after five steps; the same sampler continues in a new loader, and takes the third."""
    sampler.set_epoch(1)
    list(note(folder, 1, islice(loader_at(1, sampler, prepare), 5)))
    position = sampler.position(5)
    sampler.seek(position)
    rest = loader_at(int(position["epoch"]), sampler, prepare)
    list(note(folder, 1, rest, first=6))
    list(note(folder, 2, rest))


def loader_at(epoch: int, sampler: LengthBucketBatchSampler, prepare: Callable[[Any], Any]) -> Any:
    loader = prepare(make_loader(sampler))
    # A loader of accelerate's calls the sampler's set_epoch with a count of its own, which starts at 0.
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    return loader


# --- Lightning


class Module(LightningModule):
    """Trains a tagger, on a loader that is built when the processes know each other."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tagger = Tagger()
        self.folder = folder

    def train_dataloader(self) -> DataLoader[Any]:
        return make_loader(make_sampler(), kind=StatefulDataLoader)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        record(self.folder, self.current_epoch, batch_idx + 1, batch)
        return share_of_loss(self.tagger, batch)

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), LEARNING_RATE)


class Accumulating(Module):
    """The same with several batches in each optimizer step: Lightning divides each loss by their number."""

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = make_sampler()
        self.updates = sampler.updates(accumulate=ACCUMULATE)
        return make_loader(sampler)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        record(self.folder, self.current_epoch, batch_idx + 1, batch)
        return total_loss(self.tagger, batch) * ACCUMULATE * self.updates.at(batch_idx).token_scale


def train_with_lightning(folder: Path, sharding: str = "own") -> None:
    """Train with the sampler's own sharding or Lightning's; then again from the end and the middle of an epoch."""
    fit(folder / "whole", None, use_distributed_sampler=sharding == "Lightning's")
    for name in (f"step={EDGE}", f"step={MIDDLE}"):
        fit(folder / name, folder / "whole" / f"{name}.ckpt", use_distributed_sampler=False)
    options = {"use_distributed_sampler": False, "accumulate_grad_batches": ACCUMULATE}
    fit(folder / "accumulated", None, Accumulating, **options)


def fit(folder: Path, checkpoint: Path | None, kind: type[Module] = Module, **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    save = {"dirpath": folder, "filename": "{step}", "save_top_k": -1}
    saves = [ModelCheckpoint(**save, every_n_epochs=1), ModelCheckpoint(**save, every_n_train_steps=MIDDLE)]
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=EPOCHS, callbacks=saves, **silent, **options
    )
    module = kind(folder)
    trainer.fit(module, ckpt_path=checkpoint)
    save_weights(module, folder)


JOBS = {job.__name__: job for job in (train_with_accelerate, train_with_lightning)}


def main(name: str, folder: str, *options: str) -> None:
    """Do a job; the trainer starts the process group."""
    leave_pid(Path(folder))
    JOBS[name](Path(folder), *options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
