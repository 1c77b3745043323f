"""Charts of `harness.compare`: how many times as fast ours is as each peer, with the spread over the rounds.

A dot is the median, its line goes from the lowest to the highest round. The axis is logarithmic. Right of 1 ours
is faster.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, TypeAlias

from svg import WIDTH, dot, line, picture, text

# By the title of a panel, cases as `harness.compare` gives them.
Panels: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]

# Width of a character of a case, about.
CHARACTER: Final = 6
RIGHT: Final = 50
SLOT: Final = 10
TICKS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
# Space above the first panel, of a panel's title, and of its axis.
TOP, TITLE, AXIS = 14, 20, 28


def ratio_chart(panels: Panels) -> str:
    """The chart as text: a panel under the other, with one axis for all."""
    cases = [case for rows in panels.values() for case in rows]
    peers = list(dict.fromkeys(peer for case in cases for peer in case["times_as_fast"]))
    left = 24 + CHARACTER * max(len(case["case"]) for case in cases)
    place = axis_of(left, [figure for case in cases for spread in case["times_as_fast"].values() for figure in spread])
    parts, top = [*legend(peers)], SLOT + legend_rows(peers) * 16
    for title, rows in panels.items():
        parts += panel(title, rows, peers, top, place)
        top += TITLE + sum(map(height_of, rows)) + AXIS
    return picture(parts, top)


def axis_of(left: float, figures: Sequence[float]) -> Callable[[float], float]:
    """From a ratio to its place on the axis; ratios beyond the last tick stand at the end."""
    low = max(tick for tick in TICKS if tick <= max(min([*figures, 1]), TICKS[0]))
    high = min(tick for tick in TICKS if tick >= min(max([*figures, 2]), TICKS[-1]))
    scale = (WIDTH - left - RIGHT) / math.log(high / low)
    return lambda ratio: left + scale * math.log(min(max(ratio, low), high) / low)


def legend_rows(peers: Sequence[str]) -> int:
    """Lines of the legend: three peers in each. A single peer without a name needs none."""
    return 0 if peers == [""] else -(-len(peers) // 3)


def legend(peers: Sequence[str]) -> Iterator[str]:
    """The colour of each peer."""
    for number, peer in enumerate(peers if legend_rows(peers) else ()):
        x, y = 12 + 235 * (number % 3), TOP + 16 * (number // 3)
        yield dot(x, y, number)
        yield text(x + 8, y + 4, f"against {peer}")


def panel(
    title: str, rows: Sequence[Mapping[str, Any]], peers: Sequence[str], top: float, place: Callable[[float], float]
) -> Iterator[str]:
    """The dots of some cases, with an axis below."""
    heights = [height_of(row) for row in rows]
    first, last = top + TITLE - 6, top + TITLE + sum(heights)
    yield text(8, top + 12, title, kind="bold")
    for tick in TICKS:
        # Ticks beyond an end have its place.
        if place(tick / 1.1) < place(tick) or place(tick) < place(tick * 1.1):
            yield line((place(tick), first), (place(tick), last), "axis" if tick == 1 else "line")
            yield text(place(tick), last + 13, f"{tick:g}x", kind="soft", anchor="middle", size=10)
    for row, below in zip(rows, accumulate(heights), strict=True):
        yield from case(row, peers, top + TITLE + below - height_of(row), place)


def height_of(row: Mapping[str, Any]) -> float:
    """Height of a case: a line for each of its peers."""
    return 6 + SLOT * len(row["times_as_fast"])


def case(row: Mapping[str, Any], peers: Sequence[str], top: float, place: Callable[[float], float]) -> Iterator[str]:
    """The name of a case, and for each peer its spread, its median and the median as text."""
    yield text(place(0) - 10, top + height_of(row) / 2 + 3, row["case"], anchor="end")
    for position, (peer, (low, middle, high)) in enumerate(row["times_as_fast"].items()):
        y, colour = top + 3 + SLOT * (position + 0.5), peers.index(peer)
        yield line((place(low), y), (place(high), y), f"s{colour}", 1.6)
        yield dot(place(middle), y, colour)
        yield text(place(high) + 6, y + 3, f"{middle:.2f}x", kind="soft", size=9)
