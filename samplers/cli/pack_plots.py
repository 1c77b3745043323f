"""Draw a comparison of packs. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from samplers.cli.pack_compare import PackSummary
from samplers.cli.plots import COLOURS, STEPS, STYLE


def draw_packs(summaries: Sequence[PackSummary], path: Path) -> None:
    """Draw three panels: how full rows are, documents of a row, and the cost of each rank in the first steps.

    Args:
        summaries: Plans. The first one gives the steps.
        path: Output file. Its suffix is the format: `.png`, `.svg`, `.pdf`.

    Raises:
        ValueError: matplotlib does not have the format.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.8), layout="constrained")
        panels = figure.subplots(1, 3)
        _draw_fill(panels[0], summaries)
        _draw_documents(panels[1], summaries)
        _draw_costs(panels[2], summaries[0])
        for letter, axes in zip("abc", panels.flat, strict=True):
            axes.set_title(f"({letter}) {axes.get_title('left')}")
        figure.savefig(path, dpi=200)


def _draw_fill(axes: Axes, summaries: Sequence[PackSummary]) -> None:
    """How full the rows are, from the emptiest to the fullest."""
    for number, summary in enumerate(summaries):
        fill = np.sort(summary.plan.row_fill)
        label = f"{summary.capacity} ({summary.report.waste:.2%} waste)"
        axes.plot(np.linspace(0, 1, len(fill)), fill, color=COLOURS[number % len(COLOURS)], label=label)
    axes.set_title("How full rows are")
    axes.set_xlabel("share of the rows, emptiest first")
    axes.set_ylabel("share of the capacity")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="lower right")


def _draw_documents(axes: Axes, summaries: Sequence[PackSummary]) -> None:
    """Documents of a row, as a histogram."""
    for number, summary in enumerate(summaries):
        counts = np.bincount(summary.plan.row_documents)
        colour = COLOURS[number % len(COLOURS)]
        axes.step(np.arange(len(counts)), counts, where="mid", color=colour, label=summary.capacity)
    axes.set_title("Documents of a row")
    axes.set_xlabel("documents")
    axes.set_ylabel("rows")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")


def _draw_costs(axes: Axes, summary: PackSummary) -> None:
    """Cost of each rank in the first steps, in means of a rank."""
    costs = summary.plan.batch_costs
    mean = float(costs.mean()) or 1.0
    steps = costs[:STEPS] / mean
    numbers = np.arange(len(steps))
    replicas = steps.shape[1]
    axes.scatter(np.repeat(numbers, replicas), steps.ravel(), s=4, color=COLOURS[0], linewidths=0, label="a rank")
    if replicas > 1:
        axes.step(numbers, steps.max(1), where="mid", color=COLOURS[1], linewidth=0.9, label="the slowest rank")
    axes.set_title(f"Cost of steps, {replicas} rank{'s' * (replicas > 1)}")
    axes.set_xlabel(f"step (first {len(steps):,} of {len(costs):,})")
    axes.set_ylabel("mean cost of a rank")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right", title=f"imbalance {summary.report.imbalance:.3f}" if replicas > 1 else None)
