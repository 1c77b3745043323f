"""What a plan costs, in figures."""

from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Floats, Integers


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What an epoch's plan holds, wastes and leaves out.

    Attributes:
        sequences: samples that the plan holds.
        real_tokens: the sum of their lengths, over all fields.
        padded_tokens: the sum of rows x padded width over all batches and fields.
        batches: over all replicas.
        steps: of every replica.
        padding: share of padded tokens that are padding.
        budget_use: mean share of the budget that a batch uses.
        greatest_use: the greatest such share of a batch with two rows or more.
        short: samples that `min_length` left out.
        dropped: samples that `overlong="drop"` left out.
        unused: samples that `drop_last` left out.
        alone: samples over the budget that are a batch of one.
        meeting_again: share of the pairs of samples in a batch that share a batch again in the next epoch.
        meeting_again_in_2: the same, in the epoch two later.
        meeting_again_in_5: the same, in the epoch five later.
        shapes: different (rows, padded width) of the batches.
        shapes_of_4: the same, over this epoch and those one, two and five later: what a compiled model comes to see.
        autocorrelation: lag-1 autocorrelation of the mean length over steps; 0 where it is not defined.
        imbalance: sum over steps of replicas x the greatest padded tokens of a replica / all padded tokens.
        worst_step: the greatest such ratio of a single step.
    """

    sequences: int
    real_tokens: int
    padded_tokens: int
    batches: int
    steps: int
    padding: float
    budget_use: float
    greatest_use: float
    short: int
    dropped: int
    unused: int
    alone: int
    meeting_again: float
    meeting_again_in_2: float
    meeting_again_in_5: float
    shapes: int
    shapes_of_4: int
    autocorrelation: float
    imbalance: float
    worst_step: float

    def __str__(self) -> str:
        return "\n".join(f"{field.name.replace('_', ' '):<20}{self._show(field.name):>16}" for field in fields(self))

    def _show(self, name: str) -> str:
        value = getattr(self, name)
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:.3f}" if name in {"autocorrelation", "imbalance", "worst_step"} else f"{value:.2%}"


# Epochs after this one in which pairs of it are looked for.
LAGS: Final = (1, 2, 5)


def lag_one(values: Floats) -> float:
    """Lag-1 autocorrelation of a series `[n]`; 0 if it is constant or shorter than three."""
    centred = values - values.mean()
    spread = float(centred @ centred)
    return float(centred[:-1] @ centred[1:]) / spread if len(values) > 2 and spread > 0 else 0.0


def imbalance(costs: Integers) -> tuple[float, float]:
    """How much replicas wait for one another: over all steps, and in the worst one.

    Args:
        costs: padded tokens of each replica in each step, int64 `[steps, W]`.

    Returns:
        The sum over steps of W x the step's greatest cost, by the sum of all costs; and the greatest such ratio.
    """
    waits = costs.shape[1] * costs.max(1)
    totals = np.maximum(costs.sum(1), 1)
    return float(waits.sum() / totals.sum()), float((waits / totals).max())


def count_pairs(sizes: Integers) -> int:
    """How many pairs groups of these sizes hold."""
    return int((sizes * (sizes - 1) // 2).sum())


def count_meeting(groups: Integers, later: npt.NDArray[np.int32]) -> int:
    """How many pairs of samples share a group twice.

    Args:
        groups: of each sample, int64 `[n]`, not negative.
        later: another grouping of the same samples, `[n]`; -1 for one that is in no group.
    """
    both = (groups << 32) | later
    return count_pairs(np.unique(both[later >= 0], return_counts=True)[1])
