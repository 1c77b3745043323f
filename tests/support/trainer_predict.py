"""What a Trainer predicts with a collator of ours: `trainer_predict.py FOLDER` prints it as JSON.

For each `sort_by`; and with `PlannedTrainer`, whose metrics and predictions are in the order of the dataset, also where
training packs.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from collate import PadCollator
from samplers.integrations.huggingface import PlannedTrainer

DATA = [{"input_ids": [number] * (1 + number * 7 % 5)} for number in range(24)]


class Total(nn.Module):
    """Tells rows apart: the sum of each row's real tokens, as logits `[B, 1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = {"logits": (input_ids * attention_mask).sum(1, keepdim=True) * self.weight}
        return outputs if labels is None else {"loss": labels.float().mean(), **outputs}


def predict(folder: str, **options: Any) -> list[float]:
    """The predictions for DATA, in the order in which the Trainer gives them."""
    padded = PadCollator(**options)

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return padded(samples)["input_ids"].as_dict({"input_ids": "padded", "attention_mask": "mask"})

    trainer = Trainer(Total(), arguments(folder), data_collator=collate)
    return trainer.predict(DATA).predictions[:, 0].tolist()


def arguments(folder: str) -> TrainingArguments:
    """Those of all Trainers."""
    # Five rows: the last batch is short.
    return TrainingArguments(folder, report_to="none", disable_tqdm=True, use_cpu=True, per_device_eval_batch_size=5)


def predict_planned(folder: str) -> dict[str, Any]:
    """The predictions, what the metrics saw, the sizes of the batches, and the samples of an update in the mean."""
    padded, widths = PadCollator(sort_by=False), []

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        widths.append(max(len(sample["input_ids"]) for sample in samples))
        batch = padded(samples)
        inputs = batch["input_ids"].as_dict({"input_ids": "padded", "attention_mask": "mask"})
        return {**inputs, "labels": batch["labels"]}

    def metrics(found: Any) -> dict[str, Any]:
        return {"seen": found.predictions[:, 0].tolist(), "labels": found.label_ids.tolist()}

    ours: dict[str, Any] = {"plan": {"capacity": 16}, "eval_collator": collate, "compute_metrics": metrics}
    trainer = PlannedTrainer(Total(), arguments(folder), train_dataset=DATA, **ours)
    found = trainer.predict([{**row, "labels": number} for number, row in enumerate(DATA)])
    trainer.get_train_dataloader()
    per_update = trainer.get_total_train_batch_size(trainer.args)
    facts = {"predictions": found.predictions[:, 0].tolist(), "seen": found.metrics["test_seen"]}
    facts["labels"] = found.metrics["test_labels"]
    return {**facts, "widths": widths, "per_update": per_update}


if __name__ == "__main__":
    facts = {
        "False": predict(sys.argv[1], sort_by=False),
        "None": predict(sys.argv[1]),
        "planned": predict_planned(sys.argv[1]),
    }
    sys.stdout.write(json.dumps(facts) + "\n")
