"""Time a model's steps for a few seconds, fit a cost to them, and plan by milliseconds.

Batches of like padded tokens take different times: attention takes more for wide ones, a GRU for those with few rows.
Where ranks wait for each other, that time is lost. Every other shape is held out, to see how well the rest predict it.
"""

import argparse
import time
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from torch import nn

from samplers import fit_cost, plan_epoch

FEATURES, MOST_STEPS, REPLICAS = 32, 2_400, 8


class Recurrent(nn.Module):
    """A GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(FEATURES, 96, batch_first=True)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The loss of a batch `[rows, width, features]`, a scalar."""
        return self.layer(values)[0].square().mean()


class Attention(nn.Module):
    """One layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(FEATURES, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The loss of a batch `[rows, width, features]`, a scalar."""
        return self.layer(values).square().mean()


def timed_step(model: nn.Module, rows: int, width: int) -> float:
    """Milliseconds of forward and backward. On a GPU, synchronise before each reading of the clock."""
    values = torch.randn(rows, width, FEATURES)
    begin = time.perf_counter()
    model(values).backward()
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    """Fit and predict for both models, then compare plans for ranks that wait for each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="seconds of timing for each of the two models (10)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    grid = [(rows, width) for rows in (1, 2, 3, 5, 8, 12, 20, 32) for width in (8, 12, 20, 32, 50, 80, 128, 200)]
    shapes = [shape for shape in grid if np.prod(shape) <= MOST_STEPS]
    lengths = np.clip(rng.lognormal(np.log(60), 0.7, 4_000), 4, 200).astype(np.int64)
    for model in (Recurrent(), Attention()):
        times: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
        end = time.perf_counter() + options.seconds
        rounds = 0
        # The first round warms up. Each round has its own order, so that no shape always follows the same one.
        while time.perf_counter() < end or rounds < 3:
            for index in rng.permutation(len(shapes)).tolist():
                times[shapes[index]].append(timed_step(model, *shapes[index]))
            rounds += 1
        observed = {shape: each[1:] for shape, each in times.items()}
        known = [(*shape, one) for shape in shapes[::2] for one in observed[shape]]
        cost = fit_cost(known)
        predicted = cost.milliseconds(*zip(*shapes[1::2], strict=True))
        typical = [median(observed[shape]) for shape in shapes[1::2]]
        error = median(abs(guess / real - 1) for guess, real in zip(predicted, typical, strict=True))
        gap = median(abs(one / other - 1) for each in observed.values() for one, other in pairwise(each))
        print(f"{type(model).__name__}: {rounds - 1} rounds of {len(shapes)} shapes")
        print(f"  {cost}")
        print(
            f"  median error on {len(typical)} other shapes {error:.1%}; two timings of one shape differ by {gap:.1%}"
        )
        by_time = cost.within(float(cost.milliseconds([12], [200])[0]))
        for name, budget in (("max_tokens=2400", {"max_tokens": 2400}), (f"{by_time.limit:.0f} ms", {"cost": by_time})):
            plan = plan_epoch(lengths, num_replicas=REPLICAS, **budget)
            sizes = np.array([(len(batch), lengths[batch].max()) for batch in plan.batches])
            steps = cost.milliseconds(*sizes.T).reshape(-1, REPLICAS)
            waiting = 1 - steps.sum() / (REPLICAS * steps.max(1).sum())
            print(
                f"  {name:16} steps {plan.steps:3}, slowest {steps.max():5.1f} ms, fastest {steps.min():5.1f} ms, "
                f"{REPLICAS} ranks wait {waiting:.1%} of the time"
            )


if __name__ == "__main__":
    main()
