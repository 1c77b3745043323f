"""What the examples of this folder train: say after each bit whether the ones so far are odd in number."""

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
    """Sample i: `id` i, `bits` int64 `[L]` and `odd` int64 `[L]`, drawn from i; log-normal lengths, 1 to 60 steps."""

    def __init__(self, size: int = 1200) -> None:
        spread = torch.randn(size, generator=torch.Generator().manual_seed(0))
        self.lengths = spread.mul(0.8).add(2.2).exp().long().clamp(1, 60).tolist()

    def __getitem__(self, place: int) -> dict[str, Any]:
        bits = torch.randint(2, (self.lengths[place],), generator=torch.Generator().manual_seed(place))
        return {"id": place, "bits": bits, "odd": bits.cumsum(0) % 2}

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
    """Cross entropy over the batch's real steps."""
    return sequence_loss(nn.CrossEntropyLoss(reduction="none"), model(batch["bits"]), batch["odd"], reduction=reduction)


def take_step(model: nn.Module, optimizer: Optimizer, batch: dict[str, Any], tally: Tally) -> None:
    """A step of training in one process; those with several need a factor."""
    loss = loss_of(model, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    tally.add(batch["id"], batch["bits"].mask, loss.item())
