"""The rows of the tables on the page about mixtures, from the results of `mixtures.py`."""

import math
from collections.abc import Callable
from typing import Any, Final

Cells = dict[str, str]


def padding_rows(results: Any) -> list[Cells]:
    """Padding of batches of one source and of several, next to the same corpora unmixed, and to the least."""
    return [
        {
            "corpora": row["corpora"].removesuffix(" corpora"),
            "within": row["within"],
            "padding": f"{row['padding %']:.1f} %",
            "unmixed": f"{row['unmixed %']:.1f} %",
            "least of one source": _percent(row.get("least of one source %")),
            "use of the budget": f"{row['budget use %']:.1f} %",
            "pairs that meet again": f"{row['repeated pairs %']:.0f} %",
            "corpora in a batch": f"{row['corpora in a batch']:.1f}",
        }
        for row in results["padding"]
    ]


def cost_rows(results: Any) -> list[Cells]:
    """Time to plan and give an epoch of a hundred corpora, next to their concatenation."""
    return [
        {
            "plan": f"{'packed' if row['sampler'].startswith('Packing') else 'bucketed'}, {row['plan']}",
            "samples of each": f"{row['samples of each']:,}" if "samples of each" in row else "6,000",
            "us per sample": f"{row['us per sample']:.2f}",
            "times the concatenation": f"{row['ratio']:.1f}",
        }
        for row in results["costs"]
    ]


def mixer_rows(results: Any) -> list[Cells]:
    """Shares, prefixes and times of mixers."""
    return [
        {
            "mixer": row["mixer"],
            "share error, points": f"{row['share error, points']:.2f}",
            "largest error of a prefix, batches": f"{row['largest prefix error, batches']:.1f}",
            "us per sample": f"{row['us per sample']:.1f}",
        }
        for row in results["mixers"]
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1f} %"


MIXTURES: Final[dict[str, tuple[str, Callable[[Any], list[Cells]]]]] = {
    "mixture-padding": ("mixtures", padding_rows),
    "mixture-costs": ("mixtures", cost_rows),
    "mixture-mixers": ("mixtures", mixer_rows),
}
