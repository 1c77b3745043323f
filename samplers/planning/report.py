"""Figures of a plan: padding, use of the budget, repeated pairs, balance among replicas."""

from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collate.deprecated.names import renamed_attribute
from collate.widths import padded_widths
from samplers.planning.budget import Budget, Floats, Integers
from samplers.planning.keyed_shuffle import derive_key, permute
from samplers.planning.options import Options
from samplers.planning.sorting import SortedLengths

# A report counts the pairs of its epoch that share a batch again this many epochs later.
LAGS: Final = (1, 2, 5)
# Enough samples for three digits of a share, in a fraction of a second.
SIMULATED_SAMPLES: Final = 100_000
_NUMBERS: Final = frozenset(["autocorrelation", "imbalance", "worst_imbalance", "step_milliseconds"])
# Former field names, as pickles of release 0.1 and of development versions have them.
FORMER_NAMES: Final = {
    "short": "too_short",
    "dropped": "overlong_dropped",
    "unused": "last_dropped",
    "alone": "overlong_alone",
    "meeting_again": "repeated_pairs",
    "meeting_again_in_2": "repeated_pairs_in_2",
    "meeting_again_in_5": "repeated_pairs_in_5",
    "worst_step": "worst_imbalance",
    "greatest_use": "max_budget_use",
    "shapes_of_4": "shapes_in_4_epochs",
}


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """The figures of an epoch's plan: what it contains, wastes and leaves out.

    Attributes:
        sequences: Samples in the plan.
        real_tokens: Sum of their lengths, over all fields.
        padded_tokens: Sum of rows x padded width, over all batches and fields.
        batches: Batches over all replicas.
        steps: Batches of each replica.
        padding: Share of the padded tokens that are padding, 0 to 1.
        budget_use: Mean share of the budget that a batch uses.
        max_budget_use: The largest such share of a batch, but for those that hold an overlong sample alone.
        too_short: Samples that `min_length` left out.
        overlong_dropped: Samples that `overlong="drop"` left out.
        last_dropped: Samples that `drop_last` left out.
        overlong_alone: Samples over the budget that are a batch of one row.
        repeated_pairs: Share of the pairs of samples in a batch that share a batch again in the next epoch.
        repeated_pairs_in_2: The same, for the epoch two later.
        repeated_pairs_in_5: The same, for the epoch five later.
        shapes: Number of different (rows, padded width) of the batches.
        shapes_in_4_epochs: The same over this epoch and those one, two and five later: shapes that a compiled model
            meets.
        autocorrelation: Lag-1 autocorrelation of the mean length over steps; 0 if it is undefined.
        imbalance: Time lost to the slowest replica: the sum over steps of W x the largest padded tokens of a replica,
            divided by all padded tokens. 1.0 means that no time is lost.
        worst_imbalance: The largest such ratio of a single step.
        step_milliseconds: Mean predicted time of a step, which is that of its slowest replica; None, as is the next,
            unless the plan's `cost` is from `fit_cost`.
        waiting: Share of the replicas' predicted time that they wait for the slowest, 0 to 1.
    """

    sequences: int
    real_tokens: int
    padded_tokens: int
    batches: int
    steps: int
    padding: float
    budget_use: float
    max_budget_use: float
    too_short: int
    overlong_dropped: int
    last_dropped: int
    overlong_alone: int
    repeated_pairs: float
    repeated_pairs_in_2: float
    repeated_pairs_in_5: float
    shapes: int
    shapes_in_4_epochs: int
    autocorrelation: float
    imbalance: float
    worst_imbalance: float
    step_milliseconds: float | None = None
    waiting: float | None = None

    short = renamed_attribute("short", "too_short")
    dropped = renamed_attribute("dropped", "overlong_dropped")
    unused = renamed_attribute("unused", "last_dropped")
    alone = renamed_attribute("alone", "overlong_alone")
    meeting_again = renamed_attribute("meeting_again", "repeated_pairs")
    meeting_again_in_2 = renamed_attribute("meeting_again_in_2", "repeated_pairs_in_2")
    meeting_again_in_5 = renamed_attribute("meeting_again_in_5", "repeated_pairs_in_5")
    worst_step = renamed_attribute("worst_step", "worst_imbalance")
    greatest_use = renamed_attribute("greatest_use", "max_budget_use")
    shapes_of_4 = renamed_attribute("shapes_of_4", "shapes_in_4_epochs")

    def __str__(self) -> str:
        known = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        return "\n".join(f"{name.replace('_', ' '):<20}{self._format(name):>16}" for name in known)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A frozen dataclass has no setter; its pickles hold its `__dict__`. Release 0.1 had fewer figures.
        self.__dict__.update(dict.fromkeys(field.name for field in fields(self)))
        self.__dict__.update({FORMER_NAMES.get(name, name): value for name, value in state.items()})

    def _format(self, name: str) -> str:
        """A figure as text."""
        value = getattr(self, name)
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:.3f}" if name in _NUMBERS else f"{value:.2%}"


def autocorrelation(values: Floats) -> float:
    """Lag-1 autocorrelation of a series `[n]`; 0 if the series is constant or shorter than three.

    >>> round(autocorrelation(np.array([1.0, 2.0, 1.0, 2.0])), 2)
    -0.75
    """
    centred = values - values.mean()
    spread = float(centred @ centred)
    return float(centred[:-1] @ centred[1:]) / spread if len(values) > 2 and spread > 0 else 0.0


def measure_imbalance(costs: Integers) -> tuple[float, float]:
    """How long replicas wait for the slowest: over all steps, and in the worst step.

    Two replicas, two steps: 12 + 10 tokens are computed in the time of 2 x (8 + 5) = 26, so that 26 / 22 = 1.18.

    >>> overall, worst = measure_imbalance(np.array([[8, 4], [5, 5]]))
    >>> round(overall, 2), round(worst, 2)
    (1.18, 1.33)

    Args:
        costs: Padded tokens of each replica in each step, int64 `[steps, W]`.

    Returns:
        The sum over steps of W x the step's largest cost, divided by the sum of all costs; the largest such ratio of
        one step.
    """
    slowest = costs.shape[1] * costs.max(1)
    totals = np.maximum(costs.sum(1), 1)
    return float(slowest.sum() / totals.sum()), float((slowest / totals).max())


def measure_waiting(milliseconds: Floats | None) -> tuple[float | None, float | None]:
    """The mean time of a step, and the share of all time that replicas wait for the slowest.

    Steps of 8 and 5 ms, in which the other replica takes 4 and 5 ms, and so waits 4 of 26 ms:

    >>> step, waiting = measure_waiting(np.array([[8.0, 4.0], [5.0, 5.0]]))
    >>> step, round(waiting, 3)
    (6.5, 0.154)

    Args:
        milliseconds: Time of each replica in each step, float64 `[steps, W]`, above 0; None gives twice None.
    """
    if milliseconds is None:
        return None, None
    slowest = milliseconds.max(1)
    return float(slowest.mean()), 1 - float(milliseconds.sum() / (milliseconds.shape[1] * slowest.sum()))


def count_pairs(sizes: Integers) -> int:
    """The number of pairs of samples in groups of these sizes."""
    return int((sizes * (sizes - 1) // 2).sum())


def count_repeated_pairs(groups: Integers, later_groups: npt.NDArray[np.int32]) -> int:
    """How many pairs of samples share a group twice.

    Samples 0 and 1 share group 0, and later group 7; samples 2 and 3 are parted:

    >>> count_repeated_pairs(np.array([0, 0, 5, 5]), np.array([7, 7, 1, 2], np.int32))
    1

    Args:
        groups: The group of each sample, int64 `[n]`, not negative.
        later_groups: The group of each in another grouping, `[n]`; -1 for a sample that is in none.
    """
    both = (groups << 32) | later_groups
    return count_pairs(np.unique(both[later_groups >= 0], return_counts=True)[1])


def simulate_random_padding(sorted_lengths: SortedLengths, options: Options) -> float:
    """Share of padding if samples came in random order, and each batch was filled up to the budget: 0 to 1.

    Of a large corpus, a random hundred thousand samples are taken.
    """
    count = min(len(sorted_lengths), SIMULATED_SAMPLES)
    chosen = permute(np.arange(count), len(sorted_lengths), derive_key(options.seed))
    lengths = sorted_lengths.sample_lengths(sorted_lengths.order[chosen])
    widths = padded_widths(lengths, options.allowed_widths)
    return 1 - int(lengths.sum()) / _fill_batches(widths.tolist(), lengths.sum(1).tolist(), options.budget)


def _fill_batches(widths: list[list[int]], tokens: list[int], budget: Budget) -> int:
    """Padded tokens of batches that take the samples in this order, each until the budget is full."""
    padded, rows, real = 0, 0, 0
    batch_width = [0] * len(widths[0])
    for width, length in zip(widths, tokens, strict=True):
        grown = [max(pair) for pair in zip(batch_width, width, strict=True)]
        if rows and not budget.fits(rows + 1, grown, real + length):
            padded += rows * sum(batch_width)
            rows, real, grown = 0, 0, width
        rows, real, batch_width = rows + 1, real + length, grown
    return padded + rows * sum(batch_width)
