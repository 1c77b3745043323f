"""Compare plans before training, of batches or of packs: what each costs, as figures, as JSON and as a table."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, Self

import click
import numpy as np

from samplers.cli.arguments import parse_numbers
from samplers.planning.budget import Floats, Integers
from samplers.planning.mixtures.epochs import plan_epoch
from samplers.planning.options import Options, PlanOptions
from samplers.planning.pack_batches.options import PackOptions
from samplers.planning.pack_batches.plan import PackPlan
from samplers.planning.pack_batches.report import PackReport
from samplers.planning.pack_batches.table import PackBatches, pack_batches
from samplers.planning.plan import BatchPlan
from samplers.planning.report import PlanReport
from samplers.planning.schedules.schedule import make_schedule
from samplers.planning.sorting import Lengths, as_length_array
from samplers.planning.tables.batch_table import BatchTable
from samplers.planning.tables.buckets import count_windows
from samplers.planning.tables.pool_table import choose_table

# Numbers of windows, one for each point of a curve.
COUNTS: Final = (2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256)
# A window has at least this many batches.
FEWEST_BATCHES: Final = 4
# Options of batches of a budget, and what they are where they are not given.
_OF_BUDGETS: Final = {
    "max_tokens": (None, "--max-tokens"),
    "batch_size": (None, "--batch-size"),
    "count_tokens": ("padded", "--count"),
    "widths": (None, "--widths"),
    "max_length": (None, "--max-length"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanSummary:
    """A plan and its costs.

    Attributes:
        table: Batches of any epoch.
        plan: Plan of the requested epoch.
        report: Report of that plan.
        random: Fraction of padding in batches of the same budget with samples in random order.
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
        """Number of windows in an epoch."""
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
        """The budget as text."""
        options = self.table.options
        rows = "" if options.batch_size is None else f"{options.batch_size:,} rows"
        tokens = "" if options.max_tokens is None else f"{options.max_tokens:,} tokens"
        return ", ".join(filter(None, [tokens, rows]))

    @cached_property
    def widths(self) -> Integers:
        """The padded widths in the plan, over all fields: int64, ascending."""
        widths = self.plan.widths
        # `[batches]` for one field, `[batches, K]` for several.
        return np.unique(widths if widths.ndim == 1 else widths.sum(1))

    def step_costs(self, steps: int) -> Floats:
        """Fraction of the budget that each replica uses in the first steps: float64 `[steps, W]`."""
        table, replicas = self.table, self.plan.num_replicas
        schedule = make_schedule(table, self.plan.epoch, replicas)
        slots = np.arange(min(steps, schedule.steps) * replicas)
        return table.budget_use(table.measure_batches(*schedule.batch_samples(slots))).reshape(-1, replicas)

    def as_json(self) -> dict[str, Any]:
        """All figures as primitive values."""
        options = self.table.options
        figures = {
            name: getattr(options, name) for name in ("max_tokens", "batch_size", "count_tokens", "widths", "overlong")
        }
        figures |= {name: getattr(options, name) for name in ("min_length", "max_length", "drop_last", "seed")}
        return {
            "options": figures
            | {"window": options.window, "epoch": self.plan.epoch, "replicas": self.plan.num_replicas},
            "window": self.window,
            "windows": self.windows,
            "report": asdict(self.report),
            "random_padding": self.random,
            "shapes": [list(shape) for shape in self.plan.batch_shapes],
        }


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Padding of a budget for windows of several sizes.

    Attributes:
        name: The budget as text.
        windows: Samples in a window, ascending.
        padding: Fraction of padding, for each window.
        repeated_pairs: Fraction of pairs that share a batch again in the next epoch, for each window.
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
) -> list[PlanSummary]:
    """Plan an epoch for every budget and window.

    Args:
        lengths: As for `plan_epoch`.
        budgets: Values of `max_tokens`.
        windows: Values of `window`.
        epoch: Number of the epoch.
        num_replicas: Number of ranks.
        options: Other options of `plan_epoch`.

    Raises:
        TypeError: Lengths or an option have the wrong type.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no budget is given, or the plan has no batch.
    """
    return [
        PlanSummary.of(choose_table(lengths, Options(max_tokens=budget, window=window, **options)), epoch, num_replicas)
        for budget in budgets
        for window in windows
    ]


def trace_windows(lengths: Lengths, summaries: Iterable[PlanSummary]) -> list[Curve]:
    """The padding of each budget for windows from half of the corpus downwards.

    Windows without a possible plan are left out, for example if the last step has too few rows for all replicas.
    """
    budgets = {summary.name: summary for summary in summaries}
    return [_trace(name, lengths, summary) for name, summary in budgets.items()]


def describe_lengths(lengths: Lengths) -> dict[str, float]:
    """Number, sum and quantiles of the lengths. For several fields, of their sums."""
    totals = total_lengths(lengths)
    low, median, high, top = np.quantile(totals, [0, 0.5, 0.95, 1]).tolist()
    figures = {"samples": len(totals), "steps": int(totals.sum(dtype=np.int64))}
    return figures | {"least": low, "median": median, "mean": float(totals.mean()), "percentile_95": high, "most": top}


def total_lengths(lengths: Lengths) -> Integers:
    """Steps of each sample over all fields: integers `[N]`."""
    array = as_length_array(lengths)
    return array if array.ndim == 1 else array.sum(1, dtype=np.int64)


def tabulate(columns: Sequence[dict[str, str]], width: int) -> list[str]:
    """Columns as a table.

    Args:
        columns: At least one: labels to values, all with the same labels.
        width: Characters in a line. Further columns go into another table below.
    """
    labels = list(columns[0])
    label_width = max(len(label) for label in labels)
    cell = max(len(value) for column in columns for value in column.values()) + 2
    fitting = max(1, (width - label_width) // cell)
    lines = []
    for first in range(0, len(columns), fitting):
        group = columns[first : first + fitting]
        lines += [
            f"{label:<{label_width}}" + "".join(f"{column[label]:>{cell}}" for column in group) for label in labels
        ]
        lines.append("")
    return lines[:-1]


def _trace(name: str, lengths: Lengths, summary: PlanSummary) -> Curve:
    """The curve of a budget."""
    table, plan = summary.table, summary.plan
    samples = len(table.sorted_lengths)
    options: PlanOptions = {name: getattr(table.options, name) for name in PlanOptions.__annotations__}  # type: ignore[assignment]
    largest_count = max(2, len(plan.batches) // FEWEST_BATCHES)
    reports = {}
    for window in [samples // count for count in COUNTS[::-1] if count <= largest_count]:
        # The plan itself could be made, so an error here is about this window alone.
        with suppress(ValueError):
            other = plan_epoch(
                lengths, num_replicas=plan.num_replicas, epoch=plan.epoch, **options | {"window": window}
            )
            reports[window] = other.report()
    return Curve(
        name=name,
        windows=list(reports),
        padding=[report.padding for report in reports.values()],
        repeated_pairs=[report.repeated_pairs for report in reports.values()],
    )


def plan_column(summary: PlanSummary) -> dict[str, str]:
    """A column of the table."""
    report, options = summary.report, summary.table.options
    widths = summary.widths
    return {
        **({} if options.max_tokens is None else {"max tokens": f"{options.max_tokens:,}"}),
        **({} if options.batch_size is None else {"batch size": f"{options.batch_size:,}"}),
        "window": f"{summary.window:,}" + " auto" * (options.window is None),
        "windows": f"{summary.windows:,}",
        "batches": f"{report.batches:,}",
        "steps": f"{report.steps:,}",
        "padding": f"{report.padding:.2%}",
        "  random batches": f"{summary.random:.2%}",
        "budget use": f"{report.budget_use:.2%}",
        "pairs that meet again": f"{report.repeated_pairs:.2%}",
        "  in 2 epochs": f"{report.repeated_pairs_in_2:.2%}",
        "  in 5 epochs": f"{report.repeated_pairs_in_5:.2%}",
        "autocorrelation": f"{report.autocorrelation:.3f}",
        "rank imbalance": f"{report.imbalance:.3f}",
        "  worst step": f"{report.worst_imbalance:.3f}",
        "shapes": f"{report.shapes:,}",
        "  in 4 epochs": f"{report.shapes_in_4_epochs:,}",
        "padded widths": f"{len(widths):,}",
        "  from": f"{widths[0]:,}",
        "  to": f"{widths[-1]:,}",
        "over-long": f"{summary.overlong:,}",
        "left out": f"{report.too_short + report.overlong_dropped + report.last_dropped:,}",
    }


@dataclass(frozen=True)
class PolynomialCost:
    """The cost of a document of L steps: linear x L + square x L^2."""

    linear: int
    square: int

    def __call__(self, lengths: Any) -> Any:
        """Costs `[n]` of lengths `[n]`, or `[n, K]` for K fields, whose costs are summed."""
        steps = np.asarray(lengths, np.float64)
        costs = self.linear * steps + self.square * steps**2
        return costs if costs.ndim == 1 else costs.sum(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackSummary:
    """A plan of packs and its figures.

    Attributes:
        table: Batches of any epoch.
        plan: Plan of the requested epoch.
        report: Report of that plan.
    """

    table: PackBatches
    plan: PackPlan
    report: PackReport

    @classmethod
    def of(cls, lengths: Lengths, options: PackOptions, epoch: int, num_replicas: int) -> Self:
        """Compute four epochs of a plan."""
        table = pack_batches(lengths, options)
        plan = PackPlan(table, epoch, num_replicas)
        return cls(table=table, plan=plan, report=plan.report())

    @property
    def capacity(self) -> str:
        """The capacity as text."""
        return " x ".join(f"{steps:,}" for steps in self.table.packs.limits.capacity)

    def as_json(self) -> dict[str, Any]:
        """All figures as primitive values."""
        options, limits = self.table.options, self.table.packs.limits
        names = ("rows", "multiple", "max_documents", "overlong", "min_length", "drop_last", "seed")
        cost = None if options.cost is None else [getattr(options.cost, name) for name in ("linear", "square")]
        figures = {"capacity": list(limits.capacity), "cost": cost}
        figures |= {name: getattr(options, name) for name in names}
        return {
            "options": figures | {"epoch": self.plan.epoch, "replicas": self.plan.num_replicas},
            "report": asdict(self.report),
        }


def compare_packs(lengths: Lengths, capacities: Sequence[int], options: dict[str, Any]) -> list[PackSummary]:
    """Plan an epoch for every capacity.

    Args:
        lengths: As for `PackingBatchSampler`; with several fields, each has that capacity.
        capacities: Steps of a row.
        options: Of `lengthtrack report`, those of packs; the others must be left out.

    Raises:
        LengthError: A document does not fit in a row, with `overlong="error"`.
        UsageError: An option is not for packs.
        ValueError: An option is out of its range, or the last rows have fewer documents than replicas.
    """
    epoch, num_replicas = options.pop("epoch"), options.pop("num_replicas")
    for name, (default, option) in _OF_BUDGETS.items():
        if options.pop(name) != default:
            raise click.UsageError(f"{option} is not for --pack: a row holds its capacity")
    options["cost"] = parse_cost(options["cost"])
    if options["overlong"] == "alone":
        raise click.UsageError("--overlong alone is not for --pack: choose cut, drop, error or split")
    array = as_length_array(lengths)
    fields = 1 if array.ndim == 1 else array.shape[1]
    return [
        PackSummary.of(lengths, PackOptions(capacity=(capacity,) * fields, **options), epoch, num_replicas)
        for capacity in capacities
    ]


def parse_cost(text: str | None) -> PolynomialCost | None:
    """Parse `SQUARE` or `LINEAR,SQUARE`.

    Raises:
        BadParameter: It is neither.
    """
    if text is None:
        return None
    numbers = parse_numbers(text)
    if len(numbers) > 2:
        raise click.BadParameter(f"{text!r} must be SQUARE or LINEAR,SQUARE", param_hint="--cost")
    linear, square = (0, *numbers)[-2:]
    return PolynomialCost(linear, square)


def pack_column(summary: PackSummary) -> dict[str, str]:
    """A column of the table."""
    report, options = summary.report, summary.table.options
    return {
        "capacity": summary.capacity,
        **({"rows of a batch": f"{options.rows:,}"} if options.rows > 1 else {}),
        "rows": f"{report.rows:,}",
        "steps": f"{report.steps:,}",
        "waste": f"{report.waste:.2%}",
        "  emptiest row": f"{1 - report.least_full:.2%}",
        "documents": f"{report.documents:,}",
        "  in a row": f"{report.documents_per_row:.2f}",
        "  deviation / mean": f"{report.documents_deviation:.2f}",
        "pairs that meet again": f"{report.repeated_pairs:.3%}",
        "  in 2 epochs": f"{report.repeated_pairs_in_2:.3%}",
        "  in 5 epochs": f"{report.repeated_pairs_in_5:.3%}",
        "  at random": f"{report.random_pairs:.3%}",
        "rank imbalance": f"{report.imbalance:.3f}",
        "  worst step": f"{report.worst_imbalance:.3f}",
        "  costliest document": f"{report.costliest_document:.2f}",
        "spread / random": f"{report.spread:.2f}",
        "split": f"{report.overlong_split:,}",
        "left out": f"{report.too_short + report.overlong_dropped + report.last_dropped:,}",
    }
