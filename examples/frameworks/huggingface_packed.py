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
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from collate import VarlenBatch, VarlenCollator, check_step, masked_mean
from samplers.integrations.huggingface import PlannedTrainer

DATA = Parity()
TALLIES = [Tally(len(DATA)) for _ in range(3)]
PACK = VarlenCollator({"bits": 0, "same": -100}, capacity=MAX_TOKENS, arrange="given")
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


class CountingTrainer(PlannedTrainer):
    """Counts the samples of each epoch."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """The loss of a batch."""
        ids, real = inputs.pop("id"), inputs["labels"] >= 0
        loss = super().compute_loss(model, inputs, *args, **options)
        TALLIES[int(self.state.epoch)].add(ids, real, loss.item())
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
    args = TrainingArguments(folder, learning_rate=1e-2, remove_unused_columns=False, **options)
    ours = {"data_collator": collate, "compute_loss_func": step_loss}
    plan = {"plan": {"capacity": MAX_TOKENS}, "lengths": lambda data: data.lengths}
    CountingTrainer(model, args, train_dataset=DATA, **ours, **plan).train()
    for epoch, tally in enumerate(TALLIES):
        show(f"epoch {epoch}", tally)


if __name__ == "__main__":
    main(sys.argv[1])
    PartialState().destroy_process_group()
