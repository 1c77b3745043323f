"""Counts the samples of an epoch over all processes. The examples use it to show that no sample is lost."""

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor


@dataclass
class Tally:
    """The samples and sums of an epoch.

    Attributes:
        size: Number of samples in the dataset, over all processes.
        ids: Ids of the samples that came.
        batches, real, padded, loss: Sums over the batches: 1, real tokens, padded tokens, and the loss.
    """

    size: int
    ids: list[int] = field(default_factory=list)
    batches: int = 0
    real: int = 0
    padded: int = 0
    loss: float = 0.0

    def add(self, ids: Tensor, mask: Tensor, loss: float) -> None:
        """Add a batch of this process: `ids` `[B]`, `mask` bool `[B, T]`."""
        self.join(Tally(0, ids.tolist(), 1, int(mask.sum()), mask.numel(), loss))

    def join(self, other: "Tally") -> None:
        """Add another tally to this one."""
        for name in ("ids", "batches", "real", "padded", "loss"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def gathered(self) -> "Tally":
        """The sum of the tallies of all processes. Every process must call this."""
        whole, parts = Tally(self.size), [self]
        if dist.is_initialized():
            parts *= dist.get_world_size()
            dist.all_gather_object(parts, self)
        for part in parts:
            whole.join(part)
        return whole

    def __str__(self) -> str:
        once = "each once" if sorted(self.ids) == list(range(self.size)) else f"NOT each of {self.size} once"
        return (
            f"{self.batches} batches, {len(self.ids)} samples, {once}, padding {1 - self.real / self.padded:.1%}, "
            f"loss {self.loss / self.batches:.4f}"
        )


def show(title: object, tally: Tally) -> None:
    """Print the sum of all tallies, on the first process."""
    whole = tally.gathered()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{title}: {whole}", flush=True)
