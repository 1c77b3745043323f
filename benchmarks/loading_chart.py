"""The chart of `loading.py`: rows a second of every loader on a logarithmic axis; a line spans the rounds."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from loading_bars import by_loader
from svg import GREY, WIDTH, bar, line, picture, text

TITLES: Final = {
    "tokens": "tokens: 100,000 of mean length 29, int64",
    "frames": "frames: 10,000 of about 200 x 16, float32",
    "sft": "sft: tokens and labels, 8,000 of mean length 609, int64",
}
COLOURS: Final = {"ours": (0, 5), "others": (GREY, GREY + 1)}
CORES: Final = ("one process", "two cores")
LEFT: Final = 235
RIGHT: Final = 80
BAR: Final = 8
ROW: Final = 24
HEAD: Final = 26
FOOT: Final = 30


def chart(works: Mapping[str, Any]) -> str:
    """The chart as text: equal results give equal text.

    Args:
        works: By work, results with `contenders`, whose rates are rows a second in each round.
    """
    parts: list[str] = []
    top = 34
    for name, work in works.items():
        # Our code before is no choice of users.
        loaders = {loader: one for loader, one in by_loader(work["contenders"]).items() if one["source"] != "before"}
        parts += panel(TITLES[name], loaders, top)
        top += HEAD + ROW * len(loaders) + FOOT
    legend = [
        part
        for x, whose, cores, label in (
            (8, "ours", 0, "ours, one process"),
            (150, "ours", 1, "ours, two cores"),
            (280, "others", 0, "others, one process"),
            (430, "others", 1, "others, two workers"),
        )
        for part in (bar(x, 8, 12, BAR, COLOURS[whose][cores]), text(x + 16, 16, label))
    ]
    return picture([*legend, *parts], top)


def panel(title: str, loaders: Mapping[str, Any], top: int) -> Iterator[str]:
    """The bars of one work, the fastest loader first."""
    rates = [rate for one in loaders.values() for spread in one["spread"].values() for rate in spread if rate]
    low = math.floor(math.log10(min(rates)))
    scale = (WIDTH - LEFT - RIGHT) / (math.log10(max(rates)) - low)
    bottom = top + HEAD + ROW * len(loaders)
    yield text(8, top + 12, title, kind="bold")
    for power in range(low, math.floor(math.log10(max(rates))) + 1):
        x = LEFT + (power - low) * scale
        yield line((x, top + HEAD - 6), (x, bottom), "line")
        yield text(x, bottom + 12, f"{10**power:,} /s", kind="soft", anchor="middle")
    ranked = sorted(loaders.items(), key=lambda item: -max(one[1] for one in item[1]["spread"].values()))
    for position, (name, one) in enumerate(ranked):
        y = top + HEAD + position * ROW
        yield text(LEFT - 6, y + 11, name, kind="bold" if one["source"] == "ours" else "", anchor="end")
        for number, cores in enumerate(CORES):
            if cores in one["spread"]:
                least, middle, most = (
                    LEFT + (math.log10(max(rate, 10**low)) - low) * scale for rate in one["spread"][cores]
                )
                level = y + number * (BAR + 1)
                yield bar(
                    LEFT,
                    level,
                    max(1.0, middle - LEFT),
                    BAR,
                    COLOURS["ours" if one["source"] == "ours" else "others"][number],
                )
                yield line((least, level + BAR / 2), (most, level + BAR / 2), "axis")
                yield text(max(middle, most) + 4, level + BAR, f"{one[cores]:,.0f}", size=9)
