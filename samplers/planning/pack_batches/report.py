"""Figures of packed epochs: waste, documents of a row, repeated pairs, balance among replicas, mixing of lengths."""

from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Floats, Integers
from samplers.planning.report import count_pairs, count_repeated_pairs, measure_imbalance

_NUMBERS: Final = frozenset(
    [
        "documents_per_row",
        "documents_deviation",
        "imbalance",
        "worst_imbalance",
        "spread",
        "costliest_document",
        "step_milliseconds",
    ]
)
# Costs are compared in this many parts of a mean batch.
_COST_PARTS: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What an epoch of packs holds, what it wastes and what it leaves out.

    Attributes:
        documents: Documents in the plan: samples, and pieces of split ones.
        real_tokens: Steps of all documents, over all fields.
        rows: Rows over all replicas.
        batches: Batches over all replicas.
        steps: Batches of each replica.
        waste: Share of the rows' steps that holds no document; with several fields, of the fullest field.
        least_full: The share of its capacity that the emptiest row uses.
        documents_per_row: Mean over rows.
        documents_deviation: Standard deviation of the documents of a row, divided by their mean.
        too_short: Samples that `min_length` left out.
        overlong_dropped: Samples that `overlong="drop"` left out.
        overlong_split: Samples that `overlong="split"` split.
        last_dropped: Documents that `drop_last` left out.
        repeated_pairs: Share of the pairs of documents in a row that share a row again in the next epoch.
        repeated_pairs_in_2: The same, for the epoch two later.
        repeated_pairs_in_5: The same, for the epoch five later.
        random_pairs: What it would be if each epoch dealt the documents to rows of the same sizes at random.
        imbalance: Time lost to the slowest replica: the sum over steps of W x the largest cost of a replica, divided by
            all costs. 1.0 means that no time is lost. A document costs what `cost` says, or its steps.
        worst_imbalance: The largest such ratio of a single step.
        costliest_document: Cost of the costliest document, in mean batches of a replica: the step with it cannot be
            shorter.
        spread: How much the mean length of a step's documents varies from step to step, compared with documents drawn
            at random: 1.0 is as random.
        step_milliseconds: Mean predicted time of a step, which is that of its slowest replica; None, as is the next,
            unless the plan's `cost` is from `fit_cost`.
        waiting: Share of the replicas' predicted time that they wait for the slowest, 0 to 1.
    """

    documents: int
    real_tokens: int
    rows: int
    batches: int
    steps: int
    waste: float
    least_full: float
    documents_per_row: float
    documents_deviation: float
    too_short: int
    overlong_dropped: int
    overlong_split: int
    last_dropped: int
    repeated_pairs: float
    repeated_pairs_in_2: float
    repeated_pairs_in_5: float
    random_pairs: float
    imbalance: float
    worst_imbalance: float
    costliest_document: float
    spread: float
    step_milliseconds: float | None = None
    waiting: float | None = None

    def __str__(self) -> str:
        known = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        return "\n".join(f"{name.replace('_', ' '):<20}{self._format(name):>16}" for name in known)

    def _format(self, name: str) -> str:
        """A figure as text."""
        value = getattr(self, name)
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:.3f}" if name in _NUMBERS else f"{value:.3%}"


def measure_balance(costs: Floats, replicas: int) -> tuple[float, float, float]:
    """How long replicas wait for the slowest, in all and in the worst step, and the mean cost of a batch.

    Args:
        costs: Cost of each batch, in the order of slots, float64 `[steps x replicas]`.
        replicas: W.
    """
    mean = float(costs.mean())
    if mean == 0:
        return 1.0, 1.0, 1.0
    parts = np.rint(costs / mean * _COST_PARTS).astype(np.int64)
    return *measure_imbalance(parts.reshape(-1, replicas)), mean


def measure_spread(lengths: Integers, step_sizes: Integers) -> float:
    """The deviation of the mean length of steps, compared with documents drawn at random; 1.0 where none is defined.

    >>> measure_spread(np.array([1, 3, 1, 3]), np.array([2, 2]))
    0.0

    Args:
        lengths: Of all documents, step after step, int64 `[n]`.
        step_sizes: Documents of each step, int64 `[steps]`, at least one.
    """
    steps = len(step_sizes)
    deviation = float(lengths.std())
    if steps < 2 or deviation == 0:
        return 1.0
    means = np.add.reduceat(lengths, np.cumsum(step_sizes) - step_sizes) / step_sizes
    overall = float(lengths.mean())
    # A step of d documents that are drawn at random varies by deviation / sqrt(d).
    return float(np.sqrt(np.mean((means - overall) ** 2 * step_sizes)) / deviation)


def share_repeated(rows: Integers, samples: Integers, later: npt.NDArray[np.int32], row_sizes: Integers) -> float:
    """The share of pairs in a row that share a row of a later epoch.

    Args:
        rows: The row of each document, int64 `[n]`.
        samples: Its sample index, int64 `[n]`.
        later: The row of each sample index in the later epoch, int32 `[N]`; -1 for none.
        row_sizes: Documents of each row, int64 `[R]`.
    """
    return count_repeated_pairs(rows, later[samples]) / max(1, count_pairs(row_sizes))


def chance_of_pairs(row_sizes: Integers) -> float:
    """The chance that two documents share a row of these sizes."""
    documents = int(row_sizes.sum())
    return count_pairs(row_sizes) / max(1, documents * (documents - 1) // 2)
