"""Pictures as plain SVG: equal results give equal text, and the colours follow a light or a dark page."""

from collections.abc import Iterable
from html import escape
from typing import Final

WIDTH: Final = 720
# Okabe and Ito's colours, which colour-blind readers can tell apart; on a dark page the same hues, lighter.
LIGHT: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777", "#bbbbbb")
DARK: Final = ("#4DA3E0", "#FF8A3D", "#2CC79B", "#E59BC3", "#F0B429", "#A5D8F7", "#9a9a9a", "#5f6470")
GREY: Final = 6


def picture(parts: Iterable[str], height: float, *, size: int = 11) -> str:
    """A whole picture.

    Args:
        parts: Elements.
        height: Its height; the width is `WIDTH`.
        size: Size of the text.
    """
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="sans-serif" '
        f'font-size="{size}">'
    )
    return "\n".join([head, style(), '<rect class="page" width="100%" height="100%"/>', *parts, "</svg>\n"])


def style() -> str:
    """The colours; a page passes its scheme on to its pictures."""
    light = colours(LIGHT, page="#ffffff", ink="#1d1d1f", soft="#5a5a5f", line="#dddddd")
    dark = colours(DARK, page="#1e2129", ink="#e3e4e8", soft="#a2a5ad", line="#3a3e49")
    return f"<style>{light}@media (prefers-color-scheme: dark){{{dark}}}</style>"


def colours(palette: Iterable[str], *, page: str, ink: str, soft: str, line: str) -> str:
    """One scheme as CSS: classes `c0` to `c7` fill, `s0` to `s7` draw lines."""
    classes = "".join(f".c{n}{{fill:{colour}}}.s{n}{{stroke:{colour}}}" for n, colour in enumerate(palette))
    lines = f".line{{stroke:{line}}}.axis{{stroke:{soft}}}"
    return f".page{{fill:{page}}}text{{fill:{ink}}}.soft{{fill:{soft}}}{lines}{classes}"


def text(x: float, y: float, words: str, *, kind: str = "", anchor: str = "start", size: int = 0) -> str:
    """A line of text. `kind` is a class, or `bold`."""
    look = ' font-weight="bold"' if kind == "bold" else f' class="{kind}"' if kind else ""
    look += f' text-anchor="{anchor}"' if anchor != "start" else ""
    look += f' font-size="{size}"' if size else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{look}>{escape(words)}</text>'


def bar(x: float, y: float, width: float, height: float, colour: int) -> str:
    """A filled rectangle."""
    return f'<rect class="c{colour}" x="{x:.1f}" y="{y:.2f}" width="{width:.1f}" height="{height:.4g}"/>'


def line(start: tuple[float, float], end: tuple[float, float], kind: str, width: float = 1) -> str:
    """A straight line of a class."""
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="{width:g}"/>'


def dot(x: float, y: float, colour: int) -> str:
    """A small disc."""
    return f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
