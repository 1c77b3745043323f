"""transformers.Trainer: length-bucketed batches as plain dicts, resumed mid-epoch, on one process or two.

python, or torchrun --nproc-per-node 2, examples/frameworks/huggingface_trainer.py FOLDER
"""

import sys
from typing import Any

from accelerate import PartialState
from parity import MAX_TOKENS, Parity
from tally import Tally, show
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainerCallback, TrainingArguments, set_seed

from collate import PadCollator
from samplers import LengthBucketBatchSampler

DATA = Parity()
TALLIES = [Tally(len(DATA)) for _ in range(3)]


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Tensors `[B, T]` with the model's names. The label says whether a bit equals the first one."""
    samples = [{"id": s["id"], "bits": s["bits"] + 1, "same": (s["bits"] == s["bits"][0]).long()} for s in samples]
    batch = PadCollator({"bits": 0, "same": -100}, sort_by=False)(samples)
    inputs = batch["bits"].as_dict({"input_ids": "padded", "attention_mask": "mask"})
    return {**inputs, "labels": batch["same"].padded, "id": batch["id"]}


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """The mean over the real tokens of all processes, as the Trainer's factor W assumes."""
    return cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


class Announcer(TrainerCallback):
    """Sets the sampler's epoch: a Trainer that resumes mid-epoch on several processes does not."""

    def on_epoch_begin(self, args: Any, state: Any, *_: Any, train_dataloader: Any, **__: Any) -> None:
        """Called before the first batch is taken. With several processes accelerate's sampler wraps ours."""
        sampler = train_dataloader.batch_sampler
        getattr(sampler, "batch_sampler", sampler).set_epoch(int(state.epoch))


class BucketTrainer(Trainer):
    """A Trainer with a lengthtrack sampler; it counts the samples of each epoch."""

    def get_train_dataloader(self) -> DataLoader:
        """The batches of all processes, which `prepare` deals out."""
        sampler = LengthBucketBatchSampler(DATA.lengths, max_tokens=MAX_TOKENS, rank="all")
        return self.accelerator.prepare(DataLoader(DATA, batch_sampler=sampler, collate_fn=self.data_collator))

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """One training step."""
        ids, tally = inputs.pop("id"), TALLIES[int(self.state.epoch)]
        loss = super().training_step(model, inputs, num_items_in_batch)
        tally.add(ids, inputs["attention_mask"], loss.item())
        return loss


def train(folder: str, checkpoint: str | None = None, **options: Any) -> None:
    """Train a tiny model from scratch or from a checkpoint."""
    set_seed(0)
    config = BertConfig(vocab_size=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    args = TrainingArguments(folder, learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True, **options)
    ours = {"data_collator": collate, "compute_loss_func": token_loss, "callbacks": [Announcer()]}
    BucketTrainer(BertForTokenClassification(config), args, **ours).train(resume_from_checkpoint=checkpoint)


def main(folder: str) -> None:
    """Stop mid-epoch; another Trainer resumes from the checkpoint."""
    train(folder, max_steps=40, save_steps=40)
    train(folder, f"{folder}/checkpoint-40", num_train_epochs=3, save_strategy="no")
    for epoch, tally in enumerate(TALLIES):
        show(f"epoch {epoch}", tally)


if __name__ == "__main__":
    main(sys.argv[1])
    # Without this, threads of the process group can abort the process at interpreter exit.
    PartialState().destroy_process_group()
