"""transformers.Trainer on packed rows: a tiny Llama, several documents in a row, and no document sees another.

python, or torchrun --nproc-per-node 2, examples/frameworks/huggingface_packed.py FOLDER
"""

import sys
from typing import Any

from accelerate import PartialState
from parity import MAX_TOKENS, Parity
from tally import Tally, show
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from collate import VarlenBatch, VarlenCollator, check_step, masked_mean
from samplers import LengthBucketBatchSampler

DATA = Parity()
TALLIES = [Tally(len(DATA)) for _ in range(3)]
PACK = VarlenCollator({"bits": 0, "same": -100}, capacity=MAX_TOKENS)
CONFIG = LlamaConfig(
    vocab_size=2,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
)


def labelled(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples whose label says whether a bit equals the first one."""
    return [{"id": s["id"], "bits": s["bits"], "same": (s["bits"] == s["bits"][0]).long()} for s in samples]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows `[R, C]` with the model's names."""
    batch = PACK(labelled(samples))
    arguments = batch["bits"].kwargs_for("transformers")
    return {"input_ids": batch["bits"].values, **arguments, "labels": batch["same"].values, "id": batch["id"]}


def step_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """The mean over the real steps of all processes; labels are not shifted."""
    return cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


class PackedTrainer(Trainer):
    """A Trainer on packed rows; it counts the samples of each epoch."""

    def get_train_dataloader(self) -> DataLoader:
        """Samples of up to `MAX_TOKENS` real steps together, for all processes."""
        sampler = LengthBucketBatchSampler(DATA.lengths, max_tokens=MAX_TOKENS, count_tokens="real", rank="all")
        return self.accelerator.prepare(DataLoader(DATA, batch_sampler=sampler, collate_fn=self.data_collator))

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """One training step."""
        ids, tally = inputs.pop("id"), TALLIES[int(self.state.epoch)]
        loss = super().training_step(model, inputs, num_items_in_batch)
        tally.add(ids, inputs["labels"] >= 0, loss.item())
        return loss


def losses_of(model: LlamaForCausalLM, batch: dict[str, VarlenBatch]) -> Tensor:
    """The loss of each document, for the check: `[N]`."""
    logits = model(batch["bits"].values, **batch["bits"].kwargs_for("transformers")).logits
    return masked_mean(batch["same"].with_values(cross_entropy(logits.mT, batch["same"].values, reduction="none")))


def main(folder: str) -> None:
    """Check that no document of a row reaches another, then train three epochs."""
    set_seed(0)
    model = LlamaForCausalLM(CONFIG)
    check_step(lambda batch: losses_of(model, batch), PACK(labelled([DATA[i] for i in range(8)]))).raise_if_broken()
    options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    args = TrainingArguments(folder, learning_rate=1e-2, **options)
    ours = {"data_collator": collate, "compute_loss_func": step_loss}
    PackedTrainer(model, args, **ours).train()
    for epoch, tally in enumerate(TALLIES):
        show(f"epoch {epoch}", tally)


if __name__ == "__main__":
    main(sys.argv[1])
    PartialState().destroy_process_group()
