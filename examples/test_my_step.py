"""A training step and tests that it respects the lengths. Copy this file and replace the step with yours.

Run it with `python -m pytest examples/test_my_step.py`.
"""

import pytest
import torch
from torch import Tensor, nn

from collate import LengthError, PadCollator, apply_rnn, check_step, sequence_loss


class Tagger(nn.Module):
    """A label for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.gru = nn.GRU(8, 16, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 5))

    def loss(self, batch: dict) -> Tensor:
        """The training step: the loss of a batch, without `backward` and without the optimizer."""
        hidden, _ = apply_rnn(self.gru, batch["tokens"].map(self.embedding))
        return sequence_loss(nn.CrossEntropyLoss(reduction="none"), hidden.map(self.head), batch["tags"])

    def wrong_loss(self, batch: dict) -> Tensor:
        """The same, but the backward direction starts in the padding and the mean counts padding."""
        hidden, _ = self.gru(self.embedding(batch["tokens"].padded))
        return nn.functional.cross_entropy(self.head(hidden).transpose(1, 2), batch["tags"].padded.clamp(min=0))


collate = PadCollator({"tokens": 0, "tags": -100})


@pytest.fixture
def samples() -> list[dict]:
    """Samples of different lengths, not sorted and not empty."""
    torch.manual_seed(0)
    lengths = (4, 9, 2, 6)
    return [{"tokens": torch.randint(1, 20, (n,)), "tags": torch.randint(0, 5, (n,))} for n in lengths]


def test_the_training_step_respects_the_lengths(samples):
    """Write this test first."""
    check_step(Tagger().loss, collate(samples)).raise_if_broken()


def test_the_collate_function_respects_the_lengths(samples):
    """Write this test second, if the collate function is yours."""
    check_step(Tagger().loss, samples=samples, collate=collate).raise_if_broken()


def test_a_step_that_counts_padding_is_found(samples):
    """The first test can fail: the check names the mistake of a wrong step."""
    with pytest.raises(LengthError, match="a loss or mean that is not masked"):
        check_step(Tagger().wrong_loss, collate(samples)).raise_if_broken()
