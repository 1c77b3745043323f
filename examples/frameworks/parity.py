"""The task of the examples in this folder: after each bit, is the number of ones so far odd?"""

from typing import Any

import torch
from tally import Tally
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from collate import LengthTrackedBatch, PadCollator, apply_rnn, sequence_loss

COLLATE = PadCollator({"bits": 0, "odd": -100})
MAX_TOKENS = 256


class Parity(Dataset[dict[str, Any]]):
    """Sample i has `id` i, `bits` and `odd` int64 `[L]`, drawn with seed i; log-normal lengths, 1 to 60 time steps."""

    def __init__(self, size: int = 1200) -> None:
        spread = torch.randn(size, generator=torch.Generator().manual_seed(0))
        self.lengths = spread.mul(0.8).add(2.2).exp().long().clamp(1, 60).tolist()

    def __getitem__(self, index: int) -> dict[str, Any]:
        bits = torch.randint(2, (self.lengths[index],), generator=torch.Generator().manual_seed(index))
        return {"id": index, "bits": bits, "odd": bits.cumsum(0) % 2}

    def __len__(self) -> int:
        return len(self.lengths)


class Tagger(nn.Module):
    """A GRU: `bits` `[B, T]` -> logits `[B, T, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.rnn, self.head = nn.Embedding(2, 8), nn.GRU(8, 32), nn.Linear(32, 2)

    def forward(self, bits: LengthTrackedBatch) -> LengthTrackedBatch:
        """Logits with the lengths of the bits."""
        return apply_rnn(self.rnn, bits.map(self.embedding))[0].map(self.head)


def loss_of(model: nn.Module, batch: dict[str, Any], reduction: Any = "token") -> Tensor:
    """Cross entropy over the real steps of a batch."""
    return sequence_loss(nn.CrossEntropyLoss(reduction="none"), model(batch["bits"]), batch["odd"], reduction=reduction)


def take_step(model: nn.Module, optimizer: Optimizer, batch: dict[str, Any], tally: Tally) -> None:
    """One training step in a single process; with several processes the loss needs a factor."""
    loss = loss_of(model, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    tally.add(batch["id"], batch["bits"].mask, loss.item())
