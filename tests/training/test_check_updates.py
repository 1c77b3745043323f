"""check_step on steps that accumulate gradients: means of means are named, right sums are not accused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collate import LengthTrackedBatch, PadCollator, VarlenCollator, check_step, sequence_loss

MODEL = nn.Linear(3, 4)
SAMPLES = [
    {
        "x": torch.randn(length, 3, generator=torch.Generator().manual_seed(length)),
        "y": torch.randint(0, 4, (length,), generator=torch.Generator().manual_seed(length)),
    }
    for length in (3, 9, 1, 6, 2, 7)
]
COLLATORS = [PadCollator(), VarlenCollator(capacity=30)]


def loss_of(batch: Any, reduction: Any) -> Tensor:
    values = batch["x"]
    replaced = values.with_padded if isinstance(values, LengthTrackedBatch) else values.with_values
    return sequence_loss(
        nn.CrossEntropyLoss(reduction="none"), replaced(MODEL(values.step_values)), batch["y"], reduction=reduction
    )


def right(batches: list[Any]) -> Tensor:
    """The sum of all losses, over the tokens of the update."""
    tokens = sum(batch["x"].num_tokens for batch in batches)
    return torch.stack([loss_of(batch, "sum") / tokens for batch in batches]).sum()


def mean_of_means(batches: list[Any]) -> Tensor:
    return torch.stack([loss_of(batch, "token") / len(batches) for batch in batches]).sum()


def sum_of_means(batches: list[Any]) -> Tensor:
    return torch.stack([loss_of(batch, "token") for batch in batches]).sum()


def first_count(batches: list[Any]) -> Tensor:
    """The first batch's tokens divide all sums."""
    return torch.stack([loss_of(batch, "sum") / batches[0]["x"].num_tokens for batch in batches]).sum()


@pytest.mark.parametrize("collate", COLLATORS)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_an_update_over_all_its_tokens_is_right(collate: Any, count: int) -> None:
    report = check_step(right, samples=SAMPLES, collate=collate, micro_batches=count)
    assert report.ok, report
    assert not any("micro" in reason for reason in report.skipped)


@pytest.mark.parametrize("collate", COLLATORS)
@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize(
    ("step", "mistake"),
    [
        (mean_of_means, "the mean of micro-batches' means: divide"),
        (sum_of_means, "the sum of micro-batches' means, which grows"),
        (first_count, ""),
    ],
)
def test_means_of_micro_batches_are_named(step: Any, mistake: str, collate: Any, count: int) -> None:
    """Without accumulation the step is right, and nothing else is found."""
    assert check_step(lambda batch: step([batch]), samples=SAMPLES, collate=collate).ok
    [finding] = check_step(step, samples=SAMPLES, collate=collate, micro_batches=count).findings
    assert finding.probe == "micro-batches"
    assert "dividing the 6 samples among micro-batches of" in finding.what
    assert finding.likely[0].startswith(mistake)


def test_other_mistakes_are_found_too() -> None:
    def unmasked(batches: list[Any]) -> Tensor:
        tokens = sum(batch["x"].num_tokens for batch in batches)
        return torch.stack([MODEL(batch["x"].padded + 1).square().sum() / tokens for batch in batches]).sum()

    found = {
        each.probe for each in check_step(unmasked, samples=SAMPLES, collate=PadCollator(), micro_batches=3).findings
    }
    assert {"width", "micro-batches"} <= found


def test_what_cannot_be_tried_is_said() -> None:
    def noisy(batches: list[Any]) -> Tensor:
        return right(batches) * torch.rand(())

    report = check_step(noisy, samples=SAMPLES, collate=PadCollator(), micro_batches=2)
    assert any(reason.startswith("micro-batches: the step draws random") for reason in report.skipped)

    def single(batches: list[Any]) -> Tensor:
        if len(batches) > 1:
            raise ValueError("one only")
        return right(batches)

    report = check_step(single, samples=SAMPLES, collate=PadCollator(), micro_batches=2)
    assert any("raises ValueError on several: one only" in reason for reason in report.skipped)
    with pytest.raises(ValueError, match="micro_batches must be at most the 6 samples, got 7"):
        check_step(right, samples=SAMPLES, collate=PadCollator(), micro_batches=7)
    with pytest.raises(ValueError, match="micro_batches must be at least 2"):
        check_step(right, samples=SAMPLES, collate=PadCollator(), micro_batches=1)
    with pytest.raises(TypeError, match="micro_batches needs samples="):
        check_step(right, PadCollator()(SAMPLES), micro_batches=2)


@pytest.mark.parametrize(
    "refused",
    [
        lambda batches: any(len(batch["x"]) == 1 for batch in batches),
        lambda batches: len(batches) == 1 and len(batches[0]["x"]) == 1,
    ],
)
def test_a_step_that_refuses_one_sample_is_found_on_others(refused: Any) -> None:
    """It was red: even divisions were not tried, or the step's own error came out of the check."""

    def step(batches: list[Any]) -> Tensor:
        if refused(batches):
            raise ValueError("two samples at least")
        return mean_of_means(batches)

    report = check_step(step, samples=SAMPLES, collate=COLLATORS[0], micro_batches=3)
    assert "micro-batches" in [finding.probe for finding in report.findings]
