"""Draw a comparison of plans, of batches or of packs. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from samplers.cli.compare import Curve, PackSummary, PlanSummary, total_lengths
from samplers.planning.sorting import Lengths

STEPS: Final = 80
# If the longest sample is 20 times the median, the axis of lengths is logarithmic.
LOG_FROM: Final = 20
BINS: Final = 60
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE: Final[Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    # Text in an SVG stays text.
    "svg.fonttype": "none",
}


def draw_comparison(lengths: Lengths, summaries: Sequence[PlanSummary], curves: Sequence[Curve], path: Path) -> None:
    """Draw four panels: lengths and buckets, padding and repeated pairs over windows, and the cost of steps.

    Args:
        lengths: Lengths of the corpus.
        summaries: Plans. The first one gives the buckets and the steps.
        curves: One for each budget.
        path: Output file. Its suffix is the format: `.png`, `.svg`, `.pdf`.

    Raises:
        ValueError: matplotlib does not have the format.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        panels = figure.subplots(2, 2)
        _draw_lengths(panels[0, 0], total_lengths(lengths), summaries[0])
        _draw_curves(panels[0, 1], curves, summaries, measure="padding", title="Padding")
        _draw_curves(panels[1, 0], curves, summaries, measure="repeated_pairs", title="Pairs that meet again")
        _draw_steps(panels[1, 1], summaries[0])
        for letter, axes in zip("abcd", panels.flat, strict=True):
            axes.set_title(f"({letter}) {axes.get_title('left')}")
        figure.savefig(path, dpi=200)


def _draw_lengths(axes: Axes, totals: Any, summary: PlanSummary) -> None:
    spread = bool(totals.max() > LOG_FROM * max(1.0, float(np.median(totals))))
    heights, _, _ = axes.hist(np.maximum(totals, 1), bins=_bins(totals, spread=spread), color=COLOURS[0])
    edges = sorted({sum(bucket.width) for bucket in summary.table.buckets})
    # Marks above the bars, because hundreds of lines would hide the bars.
    top = float(np.max(heights))
    axes.vlines(edges, 1.06 * top, 1.16 * top, color="#222222", linewidth=0.5)
    label = f"{len(edges):,} bucket edges"
    axes.text(1, 1.18 * top, label, ha="right", fontsize=7, transform=axes.get_yaxis_transform())
    axes.set_ylim(0, 1.28 * top)
    axes.set_title(f"Lengths and buckets, {summary.name}")
    axes.set_xlabel("length (steps)")
    axes.set_ylabel("samples")
    if spread:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_thousands())
    axes.yaxis.set_major_formatter(_thousands())
    axes.grid(visible=False, axis="x")


def _bins(totals: Any, *, spread: bool) -> list[float]:
    """Edges halfway between integers, so that all bars of a linear axis contain the same number of lengths."""
    low, high = max(1, int(totals.min())), max(1, int(totals.max()))
    width = -(-(high - low + 1) // BINS)
    edges = (
        np.unique(np.geomspace(low, high + 1, BINS // 2).round()) if spread else np.arange(low, high + width + 1, width)
    )
    return [float(edge) - 0.5 for edge in edges]


def _draw_curves(
    axes: Axes, curves: Sequence[Curve], summaries: Sequence[PlanSummary], *, measure: str, title: str
) -> None:
    random = {summary.name: summary.random for summary in summaries}
    for curve, colour in zip(curves, _colours(len(curves)), strict=True):
        label = f"{curve.name} (random batches {random[curve.name]:.0%})" if measure == "padding" else curve.name
        axes.plot(curve.windows, getattr(curve, measure), color=colour, marker="o", markersize=3, label=label)
        for summary in summaries:
            if summary.name == curve.name:
                value = getattr(summary.report, measure)
                axes.plot(summary.window, value, color=colour, marker="D", markersize=5, markerfacecolor="white")
    axes.plot(
        [], [], color="#555555", marker="D", markersize=5, markerfacecolor="white", ls="none", label="as reported"
    )
    axes.set_title(f"{title} against window")
    axes.set_xlabel("window (samples)")
    axes.set_xscale("log")
    axes.set_ylabel("fraction of padding" if measure == "padding" else "fraction of pairs in a batch")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(_thousands())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="best")


def _draw_steps(axes: Axes, summary: PlanSummary) -> None:
    costs = summary.step_costs(STEPS)
    steps, replicas = costs.shape
    numbers = np.arange(steps)
    axes.scatter(np.repeat(numbers, replicas), costs.reshape(-1), s=4, color=COLOURS[0], linewidths=0, label="a rank")
    if replicas > 1:
        axes.step(
            numbers,
            costs.max(1),
            where="mid",
            color=COLOURS[1],
            linewidth=0.9,
            label="the slowest rank",
        )
    axes.set_title(f"Cost of steps, {summary.name}, {replicas} rank{'s' * (replicas > 1)}")
    axes.set_xlabel(f"step (first {steps:,} of {summary.report.steps:,})")
    axes.set_ylabel("fraction of the budget")
    # A batch of one over-long sample may exceed the budget.
    axes.set_ylim(0, max(1.05, 1.05 * float(costs.max())))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    imbalance = f"imbalance {summary.report.imbalance:.3f}" if replicas > 1 else None
    axes.legend(loc="lower left", title=imbalance, alignment="left")


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


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _thousands() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:,.0f}")
