"""The chart of `loading.py`: rows a second of every loader, on a logarithmic axis, as an SVG of plain text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

PICTURE: Final = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "loading.svg"
TITLES: Final = {
    "tokens": "tokens: 100,000 of mean length 29, int64",
    "frames": "frames: 10,000 of about 200 x 16, float32",
    "sft": "sft: tokens and labels, 8,000 of mean length 609, int64",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart: one process, two cores.
COLOURS: Final = {"ours": ("#0072B2", "#56B4E9"), "others": ("#777777", "#bbbbbb")}
WIDTH: Final = 720
LEFT: Final = 235
RIGHT: Final = 80
BAR: Final = 8
ROW: Final = 24
HEAD: Final = 26
FOOT: Final = 30


def draw_loading(works: Mapping[str, Any], path: Path = PICTURE) -> None:
    """Write the chart of the results of all works.

    Args:
        works: By work, results with `loaders`: by name, rows a second in `one process` and on `two cores`, or None.
        path: Output file.
    """
    path.write_text(chart(works))


def chart(works: Mapping[str, Any]) -> str:
    """The chart as text: equal results give equal text."""
    parts: list[str] = []
    top = 34
    for name, work in works.items():
        # Our code before is no choice of users.
        loaders = {loader: one for loader, one in work["loaders"].items() if one["source"] != "before"}
        parts += panel(TITLES[name], loaders, top)
        top += HEAD + ROW * len(loaders) + FOOT
    legend = [
        f'<rect x="{x}" y="8" width="12" height="{BAR}" fill="{COLOURS[whose][cores]}"/>'
        f'<text x="{x + 16}" y="16">{label}</text>'
        for x, whose, cores, label in (
            (8, "ours", 0, "ours, one process"),
            (150, "ours", 1, "ours, two cores"),
            (280, "others", 0, "others, one process"),
            (430, "others", 1, "others, two workers"),
        )
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="sans-serif" font-size="11">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>', *legend, *parts, "</svg>\n"])


def panel(title: str, loaders: Mapping[str, Any], top: int) -> Iterator[str]:
    """The bars of one work, the fastest loader first."""
    rates = [rate for one in loaders.values() for rate in rates_of(one) if rate]
    low = math.floor(math.log10(min(rates)))
    scale = (WIDTH - LEFT - RIGHT) / (math.log10(max(rates)) - low)
    bottom = top + HEAD + ROW * len(loaders)
    yield f'<text x="8" y="{top + 12}" font-weight="bold">{escape(title)}</text>'
    for power in range(low, math.floor(math.log10(max(rates))) + 1):
        x = LEFT + (power - low) * scale
        yield f'<line x1="{x:.1f}" y1="{top + HEAD - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 12}" text-anchor="middle" fill="#555555">{10**power:,} /s</text>'
    ranked = sorted(loaders.items(), key=lambda item: -max(filter(None, rates_of(item[1]))))
    for position, (name, one) in enumerate(ranked):
        y = top + HEAD + position * ROW
        colours = COLOURS["ours" if one["source"] == "ours" else "others"]
        weight = ' font-weight="bold"' if one["source"] == "ours" else ""
        yield f'<text x="{LEFT - 6}" y="{y + 11}" text-anchor="end"{weight}>{escape(name)}</text>'
        for bar, (rate, colour) in enumerate(zip(rates_of(one), colours, strict=True)):
            if rate:
                width = max(1.0, (math.log10(rate) - low) * scale)
                level = y + bar * (BAR + 1)
                yield f'<rect x="{LEFT}" y="{level}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>'
                yield f'<text x="{LEFT + width + 4:.1f}" y="{level + BAR}" font-size="9">{rate:,.0f}</text>'


def rates_of(loader: Mapping[str, Any]) -> Sequence[float | None]:
    """Rows a second in one process, and on two cores."""
    return loader["one process"], loader["two cores"]
