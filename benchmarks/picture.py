"""A scatter plot on logarithmic axes as plain SVG text, so that a benchmark needs no plotting library."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

WIDTH, HEIGHT = 980, 640
LEFT, RIGHT, TOP, BOTTOM = 80, 220, 60, 70
# The colour-blind safe palette of Okabe and Ito (2008).
COLOURS: Final = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#56b4e9", "#cc79a7", "#000000")
Side: TypeAlias = Literal["upper left", "upper right", "lower left", "lower right"]


class Point(NamedTuple):
    """Two shares above 0 and up to 1, what is written beside them (an empty label writes nothing), and where."""

    x: float
    y: float
    label: str = ""
    side: Side = "upper right"


@dataclass(frozen=True)
class Series:
    """Points of one colour, with a line through them if they are a curve; `name` is for the legend."""

    name: str
    points: list[Point]
    joined: bool = False


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis of shares, from the power of ten below the least value, drawn from `start` to `end` pixels."""

    least: float
    start: float
    end: float

    def place(self, share: float) -> float:
        """Where a share lies, in pixels."""
        return self.start + (self.end - self.start) * (1 - log10(share) / log10(self.least))

    def ticks(self) -> list[float]:
        """1, 2 and 5 times each power of ten, up to 1."""
        powers = range(floor(log10(self.least)), 1)
        shares = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        return [share for share in shares if self.least <= share <= 1]


def draw(path: Path, series: Sequence[Series], *, title: str, x: str, y: str) -> None:
    """Write the plot.

    Args:
        path: of the SVG file; its folder is made.
        series: what to draw.
        title: above the plot.
        x: under the horizontal axis.
        y: beside the vertical one.
    """
    points = [point for one in series for point in one.points]
    across = Axis(_floor(min(point.x for point in points)), LEFT, WIDTH - RIGHT)
    up = Axis(_floor(min(point.y for point in points)), HEIGHT - BOTTOM, TOP)
    parts = [*_frame(across, up), *_captions(title, x, y), *_legend(series)]
    for colour, one in zip(COLOURS, series, strict=False):
        parts += _marks(one, colour, across, up)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
    body = "\n".join([f'{head} font-size="12" role="img">', f"<title>{escape(title)}</title>", *parts, "</svg>\n"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body)


def _floor(share: float) -> float:
    """The greatest 1, 2 or 5 times a power of ten that is not above a share."""
    power = 10.0 ** (ceil(log10(share)) - 1)
    return max(digit * power for digit in (1, 2, 5) if digit * power <= share)


def _frame(across: Axis, up: Axis) -> list[str]:
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for share in across.ticks():
        place = across.place(share)
        parts.append(_line(place, up.start, place, up.end, "#dddddd"))
        parts.append(_text(place, up.start + 18, _percent(share), anchor="middle"))
    for share in up.ticks():
        place = up.place(share)
        parts.append(_line(across.start, place, across.end, place, "#dddddd"))
        parts.append(_text(across.start - 8, place + 4, _percent(share), anchor="end"))
    return parts


def _captions(title: str, x: str, y: str) -> list[str]:
    middle = (HEIGHT - BOTTOM + TOP) / 2
    return [
        f'<text x="{LEFT}" y="30" font-size="16">{escape(title)}</text>',
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 22, x, anchor="middle"),
        f'<text transform="translate(22 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>',
    ]


def _legend(series: Sequence[Series]) -> list[str]:
    parts = []
    for row, (colour, one) in enumerate(zip(COLOURS, series, strict=False)):
        place = TOP + 10 + 20 * row
        parts.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{place - 4}" r="5" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 28, place, one.name))
    return parts


def _marks(one: Series, colour: str, across: Axis, up: Axis) -> list[str]:
    places = [(across.place(point.x), up.place(point.y)) for point in one.points]
    parts = []
    if one.joined:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    for point, (x, y) in zip(one.points, places, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        if point.label:
            parts.append(_label(x, y, point))
    return parts


def _label(x: float, y: float, point: Point) -> str:
    vertical, horizontal = point.side.split()
    across, anchor = (9, "start") if horizontal == "right" else (-9, "end")
    place = f'x="{x + across:.1f}" y="{y + (-7 if vertical == "upper" else 15):.1f}" text-anchor="{anchor}"'
    text = f"{escape(point.label)}</text>"
    # A white rim under the text, since a label may lie on a curve.
    rim = 'fill="none" stroke="white" stroke-width="4" stroke-linejoin="round"'
    return f"<text {place} {rim}>{text}<text {place}>{text}"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
