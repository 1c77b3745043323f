"""Where the budget cuts the order of lengths: edges, runs of neighbours that give batches of one shape.

An edge is made of strata, one for each row of its batches, each with as many samples as the edge has batches, so that
any batch may take any sample of a stratum. Edges are cut on the strata's greatest lengths: whatever a shuffle puts
into a batch, its budget holds.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from collate.widths import padded_widths
from samplers.planning.budget import Integers
from samplers.planning.options import Options
from samplers.planning.sorting import Corpus

# The default is sqrt(batches of the epoch / 32) windows: padding grows with windows / batches and meeting again falls
# with 1 / windows, so that the root keeps the two in step from a thousand samples to a thousand million.
BATCHES_PER_SQUARED_WINDOW: Final = 32
# With one, every stratum would be a single sample, and batches of lengths that differ the same in every epoch.
FEWEST_WINDOWS: Final = 2
# A power of two: the turns' shifts are far apart in bit-reversed order.
MOST_TURNS: Final = 4
PROBES: Final = 1024
# From so many batches on, the default is more windows than the fewest.
MANY_BATCHES: Final = 200


class Edge(NamedTuple):
    """A run of the order that is cut into batches of one shape.

    Its first `full` strata have `batches` samples, one for every batch; those after have `rest`, and only the last
    `rest` batches take from them.

    Attributes:
        first: where it starts in the order.
        batches: how many batches take from it.
        rows: of its last `rest` batches; its number of strata.
        full: rows of the batches before those.
        rest: how many batches have all `rows` rows.
        skipped: how many of its first batches are not planned, because `drop_last` drops them.
        width: padded width of each field at most.
    """

    first: int
    batches: int
    rows: int
    full: int
    rest: int
    skipped: int
    width: tuple[int, ...]


def cut_turns(corpus: Corpus, options: Options) -> list[list[Edge]]:
    """Edges for the epochs to take in turn, of as many batches each; the first begin at the longest samples.

    The others are shifted by parts of an edge: a pair of samples that shares an edge in one turn shares it in another
    only if no bound has moved between them. So pairs meet again in the next epoch about half as often as if the edges
    stayed, and in later ones hardly more often. A turn that cannot have as many batches as the others is left out.
    """
    windows = count_windows(corpus, options)
    turns = min(MOST_TURNS, 1 << (windows.bit_length() - 1)) if windows != 3 else 3
    shifts = [windows * turn // turns for turn in range(turns)]
    cut = [cut_edges(corpus, options, windows, shift=shift) for shift in shifts]
    batches = max(count_batches(cut[0]), count_batches(cut[turns // 2]))
    for turn, shift in enumerate(shifts):
        more = batches - count_batches(cut[turn])
        if more > 0:
            cut[turn] = cut_edges(corpus, options, windows, shift=shift, more=more)
    even = [edges for edges in cut if count_batches(edges) == batches]
    return [edges for turn, edges in enumerate(even) if edges not in even[:turn]]


def count_batches(edges: Sequence[Edge]) -> int:
    """Batches that are planned from these edges."""
    return sum(edge.batches - edge.skipped for edge in edges)


def cut_edges(corpus: Corpus, options: Options, windows: int, *, shift: int = 0, more: int = 0) -> list[Edge]:
    """Cut the order into edges, greedily from the longest samples, every batch as full as the budget lets it be.

    Each edge gives one batch to every window. What is left at the short end, one to two such edges, is the last one, of
    as many batches as it needs; so a corpus smaller than two edges is a single one.

    Args:
        corpus: the order.
        options: the budget among them.
        windows: batches of an edge.
        shift: batches of a first edge that is only a part of one: fewer than windows.
        more: batches that the last edge has beyond what it needs.
    """
    first, edges = corpus.alone, []
    if first:
        edges.append(even_edge(0, first, 1, _Cutter(corpus, options).width(0, first)))
    if shift and first < len(corpus):
        edges += _cut_part(corpus, options, first, windows, shift)
        first = sum(edge.batches * edge.rows for edge in edges)
    cutter = _make_cutter(corpus, options, first, windows)
    while first < len(corpus):
        rows = cutter.rows_from(first)
        samples = rows * windows
        if len(corpus) - first < 2 * samples:
            return edges + _cut_tail(first, cutter, contiguous=windows == 1, more=more)
        edges.append(even_edge(first, windows, rows, cutter.width(first, first + samples)))
        first += samples
    return edges


def _cut_part(corpus: Corpus, options: Options, first: int, windows: int, batches: int) -> list[Edge]:
    """A first edge of fewer batches than windows, unless the corpus is too small for it."""
    cutter = _make_cutter(corpus, options, first, batches)
    rows = cutter.rows_from(first)
    if 2 * rows * windows >= len(corpus) - first:
        return []
    return [even_edge(first, batches, rows, cutter.width(first, first + batches * rows))]


def count_windows(corpus: Corpus, options: Options) -> int:
    """How many windows the corpus is dealt to: as many batches share a shape, and as many samples a stratum."""
    if not options.shuffle:
        return 1
    if options.window is None:
        batches = estimate_batches(corpus, options)
        wanted = (isqrt(4 * batches // BATCHES_PER_SQUARED_WINDOW) + 1) // 2
    else:
        wanted = (len(corpus) + options.window // 2) // options.window
    return min(len(corpus), max(FEWEST_WINDOWS, wanted))


def estimate_batches(corpus: Corpus, options: Options) -> int:
    """About how many batches the corpus has, from the rows that fit at some places of its order."""
    # In whole numbers, since a float's last bit may differ between machines.
    places = range(0, len(corpus), -(-len(corpus) // PROBES))
    cutter = _Cutter(corpus, options)
    shares = sum((1 << 32) // cutter.rows_from(place) for place in places)
    return len(corpus) * shares // (len(places) << 32)


def even_edge(first: int, batches: int, rows: int, width: tuple[int, ...]) -> Edge:
    """An edge whose batches all have as many rows."""
    return Edge(first, batches, rows, rows, batches, 0, width)


class _Cutter:
    """Rows and widths where the longest sample of a run is its first: one field, padded tokens."""

    def __init__(self, corpus: Corpus, options: Options) -> None:
        self.corpus = corpus
        self.options = options
        self._known: dict[int, tuple[int, ...]] = {}

    def rows_from(self, first: int) -> int:
        """Rows of the batches of an edge that starts here."""
        return self.rows_at(self.width(first, first + 1))

    def rows_at(self, width: tuple[int, ...]) -> int:
        """Rows that fit at a width whatever their lengths; one where none does, since real tokens may still fit."""
        return max(1, self.options.budget.max_rows(width if len(width) > 1 else width[0]))

    def width(self, first: int, last: int) -> tuple[int, ...]:
        """Padded width of each field, for any samples of this run."""
        if self.corpus.fields > 1:
            return self._round_up(self.corpus.lengths_at(first, last))
        # There may be an edge for every batch of the corpus, but only so many lengths.
        longest = int(self.corpus.lengths[self.corpus.order[first]])
        if longest not in self._known:
            self._known[longest] = self._round_up(self.corpus.lengths_at(first, first + 1))
        return self._known[longest]

    def _round_up(self, lengths: Integers) -> tuple[int, ...]:
        return tuple(padded_widths(lengths.max(0), self.options.allowed_widths).tolist())


class _GrowingCutter(_Cutter):
    """Rows where each sample counts: several fields, or real tokens."""

    def __init__(self, corpus: Corpus, options: Options, first: int, windows: int) -> None:
        super().__init__(corpus, options)
        self.first, self.windows = first, windows
        self.heads = self._greatest_lengths()

    def rows_from(self, first: int) -> int:
        stratum = (first - self.first) // self.windows
        count = 16
        while True:
            fits = self._fits(self.heads[stratum : stratum + count])
            if not fits.all():
                return max(1, int(fits.argmin()))
            if stratum + count >= len(self.heads):
                return max(1, len(fits))
            count *= 2

    def _greatest_lengths(self) -> Integers:
        """Of each whole stratum and field: int64 `[strata, K]`."""
        corpus, windows = self.corpus, self.windows
        strata = (len(corpus) - self.first) // windows
        last = self.first + strata * windows
        if corpus.fields == 1:
            return corpus.lengths_at(self.first, last, windows)
        greatest: Integers = corpus.lengths_at(self.first, last).reshape(strata, windows, corpus.fields).max(1)
        return greatest

    def _fits(self, heads: Integers) -> npt.NDArray[np.bool_]:
        """Whether a batch of the first row, of the first two, and so on holds the budget: bool `[n]`."""
        rows = np.arange(1, len(heads) + 1)
        widths = padded_widths(np.maximum.accumulate(heads), self.options.allowed_widths)
        tokens = np.maximum(heads.sum(1), 1).cumsum()
        use = self.options.budget.use(rows, widths if self.corpus.fields > 1 else widths[:, 0], tokens)
        return np.less_equal(use, 1)


def _make_cutter(corpus: Corpus, options: Options, first: int, windows: int) -> _Cutter:
    if corpus.fields > 1 or options.count == "real":
        return _GrowingCutter(corpus, options, first, windows)
    return _Cutter(corpus, options)


def _cut_tail(first: int, cutter: _Cutter, *, contiguous: bool, more: int) -> list[Edge]:
    """The rest of the order: one edge, or for a single window a short batch and full ones after it."""
    left, options = len(cutter.corpus) - first, cutter.options
    width = cutter.width(first, len(cutter.corpus))
    fitting = cutter.rows_at(width)
    rows = min(fitting, left)
    batches = -(-left // rows)
    short = left - (batches - 1) * rows
    drops = options.drop_last and fitting == options.batch_size and short < fitting
    if contiguous:
        return _cut_contiguous(first, rows, cutter, skip=short if drops else 0)
    if fitting == options.batch_size and not more:
        return [Edge(first, batches, rows, short, batches if short == rows else batches - 1, int(drops), width)]
    batches = min(batches + more, left)
    even, longer = divmod(left, batches)
    if not longer:
        return [even_edge(first, batches, even, width)]
    return [Edge(first, batches, even + 1, even, longer, 0, width)]


def _cut_contiguous(first: int, rows: int, cutter: _Cutter, *, skip: int) -> list[Edge]:
    """Batches of `rows` rows in a row; the short one comes first, so that the last has the most rows."""
    edges = []
    last = len(cutter.corpus)
    while last > first + skip:
        start = max(first, last - rows)
        edges.append(even_edge(start, 1, last - start, cutter.width(start, last)))
        last = start
    return edges[::-1]
