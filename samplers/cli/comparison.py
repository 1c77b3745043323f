"""Plans side by side, before any is trained on: what each costs, as figures, as JSON and as a table."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, Self

import numpy as np

from samplers.planning.budget import Floats, Integers
from samplers.planning.options import Options, PlanOptions
from samplers.planning.plan import BatchPlan, plan_epoch
from samplers.planning.report import PlanReport
from samplers.planning.schedule import make_schedule
from samplers.planning.sorting import Lengths, as_length_array
from samplers.planning.tables.batch_table import BatchTable
from samplers.planning.tables.buckets import count_windows
from samplers.planning.tables.pool_table import choose_table

# The numbers of windows at which a curve is drawn.
COUNTS: Final = (2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256)
# Batches of a window at least.
FEWEST_BATCHES: Final = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A plan that training might follow, with what it costs.

    Attributes:
        table: the batches of any epoch.
        plan: of the epoch asked for.
        report: of that plan.
        random: share of padding in batches of the same budget, filled with samples in random order.
    """

    table: BatchTable
    plan: BatchPlan
    report: PlanReport
    random: float

    @classmethod
    def of(cls, table: BatchTable, epoch: int, num_replicas: int) -> Self:
        """Compute four epochs of a plan, and its random batches."""
        plan = BatchPlan(table, epoch, num_replicas)
        return cls(table=table, plan=plan, report=plan.report(), random=plan.random_padding)

    @property
    def windows(self) -> int:
        """How many windows the epoch is a shuffle of."""
        return count_windows(self.table.sorted_lengths, self.table.options)

    @property
    def window(self) -> int:
        """Samples in a window, rounded."""
        return round(len(self.table.sorted_lengths) / self.windows)

    @property
    def overlong(self) -> int:
        """Samples that alone exceed the budget."""
        return self.report.overlong_alone + self.report.overlong_dropped

    @property
    def name(self) -> str:
        """The budget in words."""
        options = self.table.options
        rows = "" if options.batch_size is None else f"{options.batch_size:,} rows"
        tokens = "" if options.max_tokens is None else f"{options.max_tokens:,} tokens"
        return ", ".join(filter(None, [tokens, rows]))

    @cached_property
    def widths(self) -> Integers:
        """The padded widths that occur, over all fields: int64, ascending."""
        widths = self.plan.widths
        return np.unique(widths if widths.ndim == 1 else widths.sum(1))

    def step_costs(self, steps: int) -> Floats:
        """The share of the budget that each replica uses in the first steps: float64 `[steps, W]`."""
        table, replicas = self.table, self.plan.num_replicas
        schedule = make_schedule(table, self.plan.epoch, replicas)
        slots = np.arange(min(steps, schedule.steps) * replicas)
        return table.budget_use(table.measure_batches(*schedule.batch_samples(slots))).reshape(-1, replicas)

    def as_json(self) -> dict[str, Any]:
        """All figures, in primitive values."""
        options = self.table.options
        given = {
            name: getattr(options, name) for name in ("max_tokens", "batch_size", "count_tokens", "widths", "overlong")
        }
        given |= {name: getattr(options, name) for name in ("min_length", "max_length", "drop_last", "seed")}
        return {
            "options": given | {"window": options.window, "epoch": self.plan.epoch, "replicas": self.plan.num_replicas},
            "window": self.window,
            "windows": self.windows,
            "report": asdict(self.report),
            "random_padding": self.random,
            "shapes": [list(shape) for shape in self.plan.batch_shapes],
        }


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How a budget's padding depends on the window.

    Attributes:
        name: the budget in words.
        windows: samples in a window, ascending.
        padding: of each, a share.
        repeated_pairs: of each, the share of pairs that meet again in the next epoch.
    """

    name: str
    windows: list[int]
    padding: list[float]
    repeated_pairs: list[float]


def compare_plans(
    lengths: Lengths,
    budgets: Sequence[int | None],
    windows: Sequence[int | None],
    *,
    epoch: int = 0,
    num_replicas: int = 1,
    **options: Any,
) -> list[Candidate]:
    """Plan an epoch for every budget and window.

    Args:
        lengths: as `plan_epoch` takes them.
        budgets: values of `max_tokens`.
        windows: values of `window`.
        epoch: which one.
        num_replicas: how many share each step.
        options: the others of `plan_epoch`.

    Raises:
        TypeError: Lengths or an option have the wrong type.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no budget is given, or no batch is left to plan.
    """
    return [
        Candidate.of(choose_table(lengths, Options(max_tokens=budget, window=window, **options)), epoch, num_replicas)
        for budget in budgets
        for window in windows
    ]


def trace_windows(lengths: Lengths, candidates: Iterable[Candidate]) -> list[Curve]:
    """The padding of each budget among the candidates, over windows of a half of the corpus and ever shorter ones.

    A window of which no plan can be made, as where the last step has too few rows for all replicas, is left out.
    """
    budgets = {candidate.name: candidate for candidate in candidates}
    return [_trace(name, lengths, candidate) for name, candidate in budgets.items()]


def describe_lengths(lengths: Lengths) -> dict[str, float]:
    """Number, sum and quantiles of the lengths; of samples with several fields, of their sums."""
    totals = total_lengths(lengths)
    low, median, high, top = np.quantile(totals, [0, 0.5, 0.95, 1]).tolist()
    figures = {"samples": len(totals), "steps": int(totals.sum(dtype=np.int64))}
    return figures | {"least": low, "median": median, "mean": float(totals.mean()), "percentile_95": high, "most": top}


def total_lengths(lengths: Lengths) -> Integers:
    """Each sample's steps over all fields: integers `[N]`."""
    array = as_length_array(lengths)
    return array if array.ndim == 1 else array.sum(1, dtype=np.int64)


def tabulate(candidates: Sequence[Candidate], width: int) -> list[str]:
    """The candidates as columns of a table.

    Args:
        candidates: at least one.
        width: of a line in characters; what is wider goes on in another table below.
    """
    columns = [_column(candidate) for candidate in candidates]
    labels = list(columns[0])
    wide = max(len(label) for label in labels)
    cell = max(len(value) for column in columns for value in column.values()) + 2
    fitting = max(1, (width - wide) // cell)
    lines = []
    for first in range(0, len(columns), fitting):
        some = columns[first : first + fitting]
        lines += [f"{label:<{wide}}" + "".join(f"{column[label]:>{cell}}" for column in some) for label in labels]
        lines.append("")
    return lines[:-1]


def _trace(name: str, lengths: Lengths, candidate: Candidate) -> Curve:
    given, samples, plan = candidate.table.options, len(candidate.table.sorted_lengths), candidate.plan
    kept: PlanOptions = {name: getattr(given, name) for name in PlanOptions.__annotations__}  # type: ignore[assignment]
    most = max(2, len(plan.batches) // FEWEST_BATCHES)
    reports = {}
    for window in [samples // count for count in COUNTS[::-1] if count <= most]:
        # The plan that was asked for is made: what is refused is this window.
        with suppress(ValueError):
            other = plan_epoch(lengths, num_replicas=plan.num_replicas, epoch=plan.epoch, **kept | {"window": window})
            reports[window] = other.report()
    return Curve(
        name=name,
        windows=list(reports),
        padding=[report.padding for report in reports.values()],
        repeated_pairs=[report.repeated_pairs for report in reports.values()],
    )


def _column(candidate: Candidate) -> dict[str, str]:
    report, options = candidate.report, candidate.table.options
    widths = candidate.widths
    return {
        **({} if options.max_tokens is None else {"max tokens": f"{options.max_tokens:,}"}),
        **({} if options.batch_size is None else {"batch size": f"{options.batch_size:,}"}),
        "window": f"{candidate.window:,}" + " auto" * (options.window is None),
        "windows": f"{candidate.windows:,}",
        "batches": f"{report.batches:,}",
        "steps": f"{report.steps:,}",
        "padding": f"{report.padding:.2%}",
        "  random batches": f"{candidate.random:.2%}",
        "budget use": f"{report.budget_use:.2%}",
        "pairs that meet again": f"{report.repeated_pairs:.2%}",
        "  in 2 epochs": f"{report.repeated_pairs_in_2:.2%}",
        "  in 5 epochs": f"{report.repeated_pairs_in_5:.2%}",
        "autocorrelation": f"{report.autocorrelation:.3f}",
        "rank imbalance": f"{report.imbalance:.3f}",
        "  worst step": f"{report.worst_imbalance:.3f}",
        "shapes": f"{report.shapes:,}",
        "  in 4 epochs": f"{report.shapes_of_4:,}",
        "padded widths": f"{len(widths):,}",
        "  from": f"{widths[0]:,}",
        "  to": f"{widths[-1]:,}",
        "over-long": f"{candidate.overlong:,}",
        "left out": f"{report.too_short + report.overlong_dropped + report.last_dropped:,}",
    }
