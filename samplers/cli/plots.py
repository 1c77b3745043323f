"""A comparison of plans as a figure; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from samplers.cli.comparison import Candidate, Curve, total_lengths
from samplers.planning.sorting import Lengths

STEPS: Final = 80
# Lengths so far above the median are drawn on a logarithmic axis.
LOG_FROM: Final = 20
BINS: Final = 60
# Okabe and Ito's colours, which stay apart for readers who are colour-blind.
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


def draw_comparison(lengths: Lengths, candidates: Sequence[Candidate], curves: Sequence[Curve], path: Path) -> None:
    """Draw the lengths and bucket edges, padding and meeting again over windows, and the cost of steps.

    Args:
        lengths: of the corpus.
        candidates: the first is the one whose edges and steps are shown.
        curves: one for each budget.
        path: a file whose suffix says the format: `.png`, `.svg`, `.pdf`.

    Raises:
        ValueError: matplotlib does not know the format.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        panels = figure.subplots(2, 2)
        _draw_lengths(panels[0, 0], total_lengths(lengths), candidates[0])
        _draw_curves(panels[0, 1], curves, candidates, "padding", "Padding")
        _draw_curves(panels[1, 0], curves, candidates, "repeated_pairs", "Pairs that meet again")
        _draw_steps(panels[1, 1], candidates[0])
        for letter, axes in zip("abcd", panels.flat, strict=True):
            axes.set_title(f"({letter}) {axes.get_title('left')}")
        figure.savefig(path, dpi=200)


def _draw_lengths(axes: Axes, totals: Any, candidate: Candidate) -> None:
    spread = bool(totals.max() > LOG_FROM * max(1.0, float(np.median(totals))))
    heights, _, _ = axes.hist(np.maximum(totals, 1), bins=_bins(totals, spread=spread), color=COLOURS[0])
    edges = sorted({sum(bucket.width) for bucket in candidate.table.buckets})
    # A rug above the bars: hundreds of lines through them would hide them.
    top = float(np.max(heights))
    axes.vlines(edges, 1.06 * top, 1.16 * top, color="#222222", linewidth=0.5)
    label = f"{len(edges):,} bucket edges"
    axes.text(1, 1.18 * top, label, ha="right", fontsize=7, transform=axes.get_yaxis_transform())
    axes.set_ylim(0, 1.28 * top)
    axes.set_title(f"Lengths and buckets, {candidate.name}")
    axes.set_xlabel("length (steps)")
    axes.set_ylabel("samples")
    if spread:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_thousands())
    axes.yaxis.set_major_formatter(_thousands())
    axes.grid(visible=False, axis="x")


def _bins(totals: Any, *, spread: bool) -> list[float]:
    """Edges halfway between whole lengths, so that all bars of a linear axis stand for as many lengths."""
    low, high = max(1, int(totals.min())), max(1, int(totals.max()))
    width = -(-(high - low + 1) // BINS)
    edges = (
        np.unique(np.geomspace(low, high + 1, BINS // 2).round()) if spread else np.arange(low, high + width + 1, width)
    )
    return [float(edge) - 0.5 for edge in edges]


def _draw_curves(
    axes: Axes, curves: Sequence[Curve], candidates: Sequence[Candidate], measure: str, title: str
) -> None:
    random = {candidate.name: candidate.random for candidate in candidates}
    for curve, colour in zip(curves, _colours(len(curves)), strict=True):
        label = f"{curve.name} (random batches {random[curve.name]:.0%})" if measure == "padding" else curve.name
        axes.plot(curve.windows, getattr(curve, measure), color=colour, marker="o", markersize=3, label=label)
        for candidate in candidates:
            if candidate.name == curve.name:
                value = getattr(candidate.report, measure)
                axes.plot(candidate.window, value, color=colour, marker="D", markersize=5, markerfacecolor="white")
    axes.plot(
        [], [], color="#555555", marker="D", markersize=5, markerfacecolor="white", ls="none", label="as reported"
    )
    axes.set_title(f"{title} against window")
    axes.set_xlabel("window (samples)")
    axes.set_xscale("log")
    axes.set_ylabel("share of padded tokens" if measure == "padding" else "share of pairs in a batch")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(_thousands())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="best")


def _draw_steps(axes: Axes, candidate: Candidate) -> None:
    costs = candidate.step_costs(STEPS)
    steps, replicas = costs.shape
    places = np.arange(steps)
    axes.scatter(np.repeat(places, replicas), costs.reshape(-1), s=4, color=COLOURS[0], linewidths=0, label="a rank")
    if replicas > 1:
        axes.step(
            places,
            costs.max(1),
            where="mid",
            color=COLOURS[1],
            linewidth=0.9,
            label="the dearest rank, for which all wait",
        )
    axes.set_title(f"Cost of steps, {candidate.name}, {replicas} rank{'s' * (replicas > 1)}")
    axes.set_xlabel(f"step (first {steps:,} of {candidate.report.steps:,})")
    axes.set_ylabel("share of the budget")
    # A batch of one may exceed it.
    axes.set_ylim(0, max(1.05, 1.05 * float(costs.max())))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    imbalance = f"imbalance {candidate.report.imbalance:.3f}" if replicas > 1 else None
    axes.legend(loc="lower left", title=imbalance, alignment="left")


def _colours(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def _thousands() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:,.0f}")
