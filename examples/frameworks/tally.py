"""What an epoch held, counted over all processes: how the examples of this folder show that nothing is lost."""

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor


@dataclass
class Tally:
    """What an epoch held.

    Attributes:
        size: samples that it should hold, over all processes.
        ids: those that it held.
        batches, real, padded, loss: sums over the batches: 1, real tokens, padded tokens, and the loss.
    """

    size: int
    ids: list[int] = field(default_factory=list)
    batches: int = 0
    real: int = 0
    padded: int = 0
    loss: float = 0.0

    def add(self, ids: Tensor, mask: Tensor, loss: float) -> None:
        """Note a batch of this process: `ids` `[B]`, `mask` bool `[B, T]`."""
        self.join(Tally(0, ids.tolist(), 1, int(mask.sum()), mask.numel(), loss))

    def join(self, other: "Tally") -> None:
        """Add another tally to this one."""
        for name in ("ids", "batches", "real", "padded", "loss"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def gathered(self) -> "Tally":
        """That of all processes together; each of them must ask for it."""
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
    """Print a tally of all processes, on the first of them."""
    whole = tally.gathered()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{title}: {whole}", flush=True)
