"""Compare packs before training: what each capacity wastes, mixes and costs, as figures, as JSON and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import click
import numpy as np

from samplers.cli.arguments import open_lengths, parse_numbers
from samplers.cli.extras import load_extra
from samplers.cli.printing import print_columns, write_json
from samplers.planning.pack_batches.options import PackOptions
from samplers.planning.pack_batches.plan import PackPlan
from samplers.planning.pack_batches.report import PackReport
from samplers.planning.pack_batches.table import PackBatches, pack_batches
from samplers.planning.sorting import Lengths, as_length_array

# Options of batches of a budget, and what they are where they are not given.
_OF_BUDGETS: Final = {
    "max_tokens": (None, "--max-tokens"),
    "batch_size": (None, "--batch-size"),
    "count_tokens": ("padded", "--count"),
    "widths": (None, "--widths"),
    "max_length": (None, "--max-length"),
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


def report_packs(
    sources: Sequence[str],
    capacities: Sequence[int],
    options: dict[str, Any],
    *,
    json_path: str | None,
    plot: str | None,
) -> None:
    """What `lengthtrack report --pack` does; the errors are those of `compare_packs`."""
    lengths = open_lengths(sources)
    # Before the plans, so that a missing matplotlib is an error at once.
    pictures = load_extra("samplers.cli.pack_plots", "plots") if plot else None
    summaries = compare_packs(lengths, capacities, options)
    # JSON on stdout must be the only output.
    if json_path != "-":
        print_columns(sources, lengths, [pack_column(summary) for summary in summaries])
    write_json(sources, lengths, [summary.as_json() for summary in summaries], json_path)
    if pictures is not None:
        pictures.draw_packs(summaries, Path(str(plot)))


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
    options["overlong"] = options["overlong"] or "split"
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
