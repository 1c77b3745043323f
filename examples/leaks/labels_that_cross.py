"""Leak 4, labels that cross: shifted over the whole row, they ask a document to predict the next document.

python examples/leaks/labels_that_cross.py
"""

import torch
from compare import Step, documents, losses_of, show
from torch import Tensor, nn

from collate import VarlenBatch

torch.manual_seed(0)
EMBED, HEAD = nn.Embedding(24, 8).double(), nn.Linear(8, 24).double()


def step_with(labels: Step) -> Step:
    """Attention within documents, with labels `[R, C]`."""

    def step(batch: VarlenBatch) -> Tensor:
        query = EMBED(batch.values).unflatten(2, (2, 4))
        return losses_of(HEAD(batch.attend(query, query, query).flatten(2)), batch, labels(batch))

    return step


def shifted_late(batch: VarlenBatch) -> Tensor:
    """Ends of documents are masked, one step too late."""
    labels = batch.values.roll(-1, 1)
    return labels.masked_fill(batch.position_ids == 0, -100)


def steps() -> dict[str, Step]:
    """Three ways to make labels."""
    return {
        "shifted over the row": step_with(lambda b: b.values.roll(-1, 1)),
        "masked one step too late": step_with(shifted_late),
        "lengthtrack, next_step_labels": step_with(lambda b: b.next_step_labels().values),
    }


def main() -> None:
    """Print what each way does to documents."""
    show(steps(), documents())


if __name__ == "__main__":
    main()
