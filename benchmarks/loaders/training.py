"""A training step on the CPU, of about the time that is asked for."""

import statistics
import time
from typing import Final

import torch
from torch import nn

# One unit: forward, backward and an update of this many rows and features.
ROWS: Final = 128
FEATURES: Final = 256
TRIES: Final = 31
# So small that the numbers stay: steps on tiny numbers would take longer from round to round.
LEARNING_RATE: Final = 1e-9


class Step:
    """Training steps of a small network on numbers that stay the same: the loader's batches change nothing.

    Args:
        units: Forward and backward passes in a step.
    """

    def __init__(self, units: int) -> None:
        torch.manual_seed(0)
        self.units = units
        self.net = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=LEARNING_RATE)
        self.inputs = torch.randn(ROWS, FEATURES)

    def __call__(self) -> None:
        """One step."""
        for _ in range(self.units):
            self.optimizer.zero_grad()
            self.net(self.inputs).square().mean().backward()
            self.optimizer.step()

    @classmethod
    def units_of(cls, seconds: float) -> int:
        """Units of a step that takes about that many seconds."""
        step = cls(1)
        times = []
        for _ in range(TRIES):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return max(1, round(seconds / statistics.median(times)))
