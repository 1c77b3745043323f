"""The padding of random and of planned batches as a picture, from the results of `padding.py`."""

from collections.abc import Iterator
from typing import Any, Final

from svg import WIDTH, bar, picture, text

EDGE: Final = 12
HEAD: Final = 58
BODY: Final = 250
FOOT: Final = 36
GAP: Final = 9
# Rows of at least this height have a line between them.
APART: Final = 3
PANEL: Final = (WIDTH - 3 * EDGE) / 2
REAL, PADDING = 0, 7


def padding_picture(results: Any) -> str:
    """Two panels: batches of random samples, and planned ones; real time steps and padding of all their rows."""
    kinds = [results["random"], results["planned"]]
    height = HEAD + BODY + FOOT
    parts = [
        *panel(EDGE, "random batches", kinds[0]),
        *panel(2 * EDGE + PANEL, "batches planned by length", kinds[1]),
        bar(EDGE, height - 22, 14, 14, REAL),
        text(EDGE + 20, height - 9, "real time steps", size=18),
        bar(190, height - 22, 14, 14, PADDING),
        text(210, height - 9, "padding", size=18),
    ]
    return picture(parts, height, size=14)


def panel(left: float, title: str, kind: Any) -> Iterator[str]:
    """Some batches, each a block of one size, whatever the number and the steps of its rows."""
    batches = kind["batches"]
    block = (BODY - GAP * (len(batches) - 1)) / len(batches)
    yield text(left, 22, title, kind="bold", size=20)
    yield text(left, 46, f"{kind['padding']:.1%} padding", size=20)
    for number, batch in enumerate(batches):
        top, row = HEAD + number * (block + GAP), block / len(batch)
        yield bar(left, top, PANEL, block, PADDING)
        if row > APART:
            for position, length in enumerate(batch):
                yield bar(left, top + position * row, length / max(batch) * PANEL, row - 1, REAL)
        else:
            # One shape: seams between thin rows would be seen as stripes.
            steps = "".join(f"h{length / max(batch) * PANEL:.1f}v{row:.3f}H{left:.1f}" for length in batch)
            yield f'<path class="c{REAL}" d="M{left:.1f} {top:.2f}{steps}z"/>'
