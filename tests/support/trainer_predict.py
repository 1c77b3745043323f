"""What a Trainer predicts with a collator of ours: `trainer_predict.py FOLDER` prints it as JSON for each `sort_by`."""

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from collate import PadCollator

DATA = [{"input_ids": [place] * (1 + place * 7 % 5)} for place in range(24)]


class Total(nn.Module):
    """Tells rows apart: the sum of each row's real tokens, as logits `[B, 1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": (input_ids * attention_mask).sum(1, keepdim=True) * self.weight}


def predict(folder: str, **options: Any) -> list[float]:
    """The predictions for DATA, in the order in which the Trainer gives them."""
    padded = PadCollator(**options)

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return padded(samples)["input_ids"].as_dict({"input_ids": "padded", "attention_mask": "mask"})

    args = TrainingArguments(folder, report_to="none", disable_tqdm=True, use_cpu=True, per_device_eval_batch_size=8)
    trainer = Trainer(Total(), args, data_collator=collate)
    return trainer.predict(DATA).predictions[:, 0].tolist()


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"False": predict(sys.argv[1], sort_by=False), "None": predict(sys.argv[1])}) + "\n")
