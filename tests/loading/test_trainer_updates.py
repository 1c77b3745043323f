"""The Trainer of transformers, which accumulates gradients of planned batches: what it divides by, and its gradient."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import TrainingArguments

from collate import PadCollator
from samplers import LengthBucketBatchSampler, Mixture
from samplers.integrations.huggingface import PlannedTrainer
from samplers.integrations.longest_first import LongestFirst

LENGTHS = [3, 9, 4, 8, 3, 7, 2, 5, 6, 1, 4, 4, 9, 2, 3, 8, 5]
EACH = 3


class Tagger(nn.Module):
    """Tells three classes of each step from its value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layers(values[..., None])}


def sample(index: int) -> dict[str, Tensor]:
    values = torch.sin(torch.arange(LENGTHS[index], dtype=torch.float64) + index)
    labels = (torch.arange(LENGTHS[index]) + index) % 3
    # The first steps of some samples have no label, as prompts have none.
    labels[: index % 2] = -100
    return {"values": values, "labels": labels}


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = PadCollator({"values": 0.0, "labels": -100}, sort_by=False)(samples)
    return {"values": batch["values"].padded, "labels": batch["labels"].padded}


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    losses = cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
    return losses / num_items_in_batch


def test_the_trainer_accumulates_to_the_gradient_of_one_flat_batch(tmp_path: Path) -> None:
    # Red where the loss was the mean of each batch: batches of few labels then count too much.
    seen: list[tuple[int, int]] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append((int((labels != -100).sum()), int(num_items_in_batch)))
        return token_loss(outputs, labels, num_items_in_batch)

    arguments = TrainingArguments(
        str(tmp_path),
        gradient_accumulation_steps=EACH,
        num_train_epochs=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    data = [sample(index) for index in range(len(LENGTHS))]
    trainer = PlannedTrainer(
        Tagger(),
        arguments,
        train_dataset=data,
        data_collator=collate,
        compute_loss_func=loss,
        plan={"max_tokens": 18},
        lengths=lambda _: LENGTHS,
    )
    trainer.train()
    sampler = trainer.get_train_dataloader().batch_sampler
    flat = Tagger()
    optimizer = torch.optim.SGD(flat.parameters(), lr=0.1)
    expected = []
    for epoch in range(2):
        plan = sampler.plan(epoch)
        updates = plan.updates(accumulate=EACH, labels=[length - index % 2 for index, length in enumerate(LENGTHS)])
        batches = list(plan.batches)
        begins = [0, *updates.ends.tolist()[:-1]]
        for begin, end, tokens in zip(begins, updates.ends.tolist(), updates.tokens.tolist(), strict=True):
            whole = collate([data[index] for index in chain.from_iterable(batches[begin:end])])
            token_loss(flat(whole["values"]), whole["labels"], tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            expected += [tokens] * (end - begin)
    # What the Trainer counts is what the plan knew ahead.
    assert [items for _, items in seen] == expected
    assert len(set(expected)) > 2
    for own, other in zip(trainer.model.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


def test_the_trainer_takes_a_mixture_for_training_alone(tmp_path: Path) -> None:
    # Red where only one corpus could be planned.
    half = len(LENGTHS) // 2
    mixture = Mixture({"a": LENGTHS[:half], "b": LENGTHS[half:]}, weights={"a": 1, "b": 1}, stop="longest")
    data = [sample(index) for index in range(len(LENGTHS))]
    seen = []

    def note(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        seen.append(sorted(len(each["values"]) for each in samples))
        return collate(samples)

    def trainer(plan: Any, lengths: Any, **options: Any) -> PlannedTrainer:
        arguments = TrainingArguments(
            str(tmp_path), num_train_epochs=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
            remove_unused_columns=False, seed=5,
        )  # fmt: skip
        return PlannedTrainer(
            Tagger(), arguments, data_collator=note, plan=plan, lengths=lengths, compute_loss_func=token_loss, **options
        )

    joined = mixture.concat({"a": data[:half], "b": data[half:]})
    options = {"train_dataset": joined, "eval_dataset": data, "eval_collator": collate}
    trainer(
        {"lengths": mixture, "max_tokens": 24}, lambda rows: [len(row["values"]) for row in rows], **options
    ).train()
    planned = LengthBucketBatchSampler(mixture, max_tokens=24, seed=5).plan(0).batches
    assert seen == [sorted(LENGTHS[index] for index in batch) for batch in planned]
    with pytest.raises(TypeError, match="give it in the plan"):
        trainer({"max_tokens": 24}, mixture, **options).evaluate()
    with pytest.raises(ValueError, match="16 samples, got 17"):
        trainer({"lengths": mixture, "max_tokens": 24}, None, train_dataset=data[1:]).train()


def test_outputs_of_packed_rows_are_not_put_into_the_order_of_samples() -> None:
    with pytest.raises(ValueError, match="2 rows of outputs for 3 samples.*give eval_collator"):
        LongestFirst([2, 5, 3]).restore(np.zeros((2, 4)))
