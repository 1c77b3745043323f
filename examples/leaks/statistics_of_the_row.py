"""Leak 5, statistics of the row: a mean or a variance over all steps ties documents together.

python examples/leaks/statistics_of_the_row.py
"""

import torch
from compare import Step, documents, losses_of, show
from torch import Tensor, nn
from torch.nn.functional import pad

from collate import VarlenBatch, masked_mean


class Mixer(nn.Module):
    """An embedding, something that looks at other steps, and a head."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(24, 8), mix, nn.Linear(8, 24)
        self.double()

    def forward(self, batch: VarlenBatch) -> Tensor:
        """Losses `[N]`."""
        hidden = self.embed(batch.values)
        return losses_of(self.head(hidden + self.mix(hidden, batch)), batch)


class RowNorm(nn.Module):
    """Less the mean of the row, over its deviation."""

    def forward(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        """Normalised steps."""
        return (hidden - hidden.mean(1, keepdim=True)) / hidden.std(1, keepdim=True)


class RowMean(nn.Module):
    """The mean of the row's real steps, as for a classifier of one sequence a row."""

    def forward(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        """The mean, at every step."""
        weights = batch.mask[..., None].double()
        return ((hidden * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)).expand_as(hidden)


class DocumentMean(nn.Module):
    """The mean of each document."""

    def forward(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        """The mean, at every step of its document."""
        return pad(masked_mean(batch.with_values(hidden)), (0, 0, 0, 1))[batch.document_ids.long()]


class BatchNorm(nn.BatchNorm1d):
    """torch's batch norm over steps."""

    def forward(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        """Normalised steps."""
        return super().forward(hidden.transpose(1, 2)).transpose(1, 2)


def steps() -> dict[str, Step]:
    """Four statistics."""
    named = {"norm over the row": RowNorm(), "mean of the row": RowMean(), "batch norm": BatchNorm(8)}
    return {name: Mixer(mix) for name, mix in (named | {"lengthtrack, masked_mean": DocumentMean()}).items()}


def main() -> None:
    """Print what each statistic does to documents."""
    show(steps(), documents())


if __name__ == "__main__":
    main()
