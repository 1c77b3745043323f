"""A training step on rows of documents, and tests that no document reaches another. Copy it and replace the step.

Run it with `python -m pytest examples/test_my_packed_step.py`.
"""

import pytest
import torch
from torch import Tensor, nn

from collate import LengthError, VarlenBatch, VarlenCollator, check_step, masked_mean


class LanguageModel(nn.Module):
    """Predicts the next token of each document."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(30, 16), nn.Embedding(64, 16)
        self.query, self.head = nn.Linear(16, 16), nn.Linear(16, 30)
        self.per_step = nn.CrossEntropyLoss(reduction="none")

    def losses(self, batch: VarlenBatch) -> Tensor:
        """The training step before the mean: losses of the documents, `[N]`."""
        hidden = self.embedding(batch.values) + self.positions(batch.position_ids)
        query = self.query(hidden).unflatten(2, (2, 8))
        logits = self.head(hidden + batch.attend(query, query, query).flatten(2))
        labels = batch.next_step_labels().values
        return masked_mean(batch.with_values(self.per_step(logits.transpose(1, 2), labels)))

    def wrong_losses(self, batch: VarlenBatch) -> Tensor:
        """The same with a row mean among the features, which ties documents together."""
        hidden = self.embedding(batch.values)
        logits = self.head(hidden + hidden.mean(1, keepdim=True))
        labels = batch.next_step_labels().values
        return masked_mean(batch.with_values(self.per_step(logits.transpose(1, 2), labels)))


@pytest.fixture
def batch() -> VarlenBatch:
    """Documents of different lengths, several in a row."""
    torch.manual_seed(0)
    return VarlenCollator(capacity=16)([torch.randint(1, 30, (n,)) for n in (5, 9, 3, 7, 4)])


def test_no_document_reaches_another(batch: VarlenBatch) -> None:
    """Write this test first."""
    check_step(LanguageModel().losses, batch).raise_if_broken()


def test_no_document_reaches_another_one_by_one(batch: VarlenBatch) -> None:
    """With `thorough=True` every pair of documents is separated."""
    check_step(LanguageModel().losses, batch, thorough=True).raise_if_broken()


def test_the_mean_that_is_trained_on_has_no_leak(batch: VarlenBatch) -> None:
    """A scalar is checked by its gradients."""
    model = LanguageModel()
    check_step(lambda batch: model.losses(batch).mean(), batch).raise_if_broken()


def test_a_step_that_leaks_is_found(batch: VarlenBatch) -> None:
    """The first test can fail: the check names the module."""
    with pytest.raises(LengthError, match=r"other contents of document .* before Linear"):
        check_step(LanguageModel().wrong_losses, batch).raise_if_broken()
