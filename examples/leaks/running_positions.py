"""Leak 3, running positions: a document's positions say where in its row it happens to be.

python examples/leaks/running_positions.py
"""

import torch
from compare import Step, documents, losses_of, show
from torch import Tensor, nn

from collate import VarlenBatch

torch.manual_seed(0)
EMBED, PLACE, HEAD = nn.Embedding(24, 8).double(), nn.Embedding(32, 8).double(), nn.Linear(8, 24).double()


def step_with(positions: Step) -> Step:
    """Attention within documents, with learned positions `[R, C]`."""

    def step(batch: VarlenBatch) -> Tensor:
        hidden = EMBED(batch.values) + PLACE(positions(batch))
        query = hidden.unflatten(2, (2, 4))
        return losses_of(HEAD(batch.attend(query, query, query).flatten(2)), batch)

    return step


def steps() -> dict[str, Step]:
    """Three kinds of positions."""
    return {
        "positions of the row": step_with(lambda b: torch.arange(b.values.shape[1]).expand(b.values.shape)),
        "positions of a 2-D mask": step_with(lambda b: (b.mask.long().cumsum(1) - 1).clamp(min=0)),
        "lengthtrack, position_ids": step_with(lambda b: b.position_ids),
    }


def main() -> None:
    """Print what each kind does to documents."""
    show(steps(), documents())


if __name__ == "__main__":
    main()
