"""transformers.Trainer: length-bucketed batches, resumed mid-epoch, and predictions in order, on one process or two.

python, or torchrun --nproc-per-node 2, examples/frameworks/huggingface_trainer.py FOLDER
"""

import sys
from typing import Any

from accelerate import PartialState
from parity import MAX_TOKENS, Parity
from tally import Tally, show
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForTokenClassification, TrainingArguments, set_seed

from collate import PadCollator
from samplers.integrations.huggingface import PlannedTrainer

DATA, HELD_OUT = Parity(), Parity(150)
TALLIES = [Tally(len(DATA)) for _ in range(3)]


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Tensors `[B, T]` with the model's names. The label says whether a bit equals the first one."""
    samples = [{"id": s["id"], "bits": s["bits"] + 1, "same": (s["bits"] == s["bits"][0]).long()} for s in samples]
    batch = PadCollator({"bits": 0, "same": -100}, sort_by=False)(samples)
    inputs = batch["bits"].as_dict({"input_ids": "padded", "attention_mask": "mask"})
    return {**inputs, "labels": batch["same"].padded, "id": batch["id"]}


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """The mean over the real tokens of all processes, as the Trainer's factor W assumes; of a batch in evaluation."""
    if num_items_in_batch is None:
        num_items_in_batch = (labels != -100).sum()
    return cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


def accuracy(found: Any) -> dict[str, float]:
    """Over the real steps: padding has the label -100. Rows are in the order of the dataset."""
    real = found.label_ids != -100
    in_order = real.sum(1).tolist() == HELD_OUT.lengths
    return {"accuracy": (found.predictions.argmax(-1) == found.label_ids)[real].mean().item(), "in_order": in_order}


class CountingTrainer(PlannedTrainer):
    """Counts the samples of each epoch."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """The loss of a batch."""
        ids, mask = inputs.pop("id"), inputs["attention_mask"]
        loss = super().compute_loss(model, inputs, *args, **options)
        if model.training:
            TALLIES[int(self.state.epoch)].add(ids, mask, loss.item())
        return loss


def train(folder: str, checkpoint: str | None = None, **options: Any) -> CountingTrainer:
    """Train a tiny model from scratch or from a checkpoint."""
    set_seed(0)
    config = BertConfig(vocab_size=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}
    args = TrainingArguments(folder, learning_rate=1e-2, **quiet, **options)
    ours = {"data_collator": collate, "compute_loss_func": token_loss, "compute_metrics": accuracy}
    plan = {"plan": {"max_tokens": MAX_TOKENS}, "lengths": lambda data: data.lengths}
    trainer = CountingTrainer(BertForTokenClassification(config), args, train_dataset=DATA, **ours, **plan)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def main(folder: str) -> None:
    """Stop mid-epoch; another Trainer resumes from the checkpoint, and predicts."""
    train(folder, max_steps=40, save_steps=40)
    trainer = train(folder, f"{folder}/checkpoint-40", num_train_epochs=3, save_strategy="no")
    for epoch, tally in enumerate(TALLIES):
        show(f"epoch {epoch}", tally)
    found = trainer.predict(HELD_OUT)
    if trainer.is_world_process_zero():
        in_order = (found.label_ids != -100).sum(1).tolist() == HELD_OUT.lengths
        print(f"predictions in order: {in_order and found.metrics['test_in_order']}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    # Without this, threads of the process group can abort the process at interpreter exit.
    PartialState().destroy_process_group()
