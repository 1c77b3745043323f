"""Length classes: the fewest runs of neighbouring lengths whose slots waste no more than a given share of the tokens.

A slot is as long as the longest of its class, so that any document of the class can take it. Lengths 3, 4, 9 and 10 in
two classes waste 1 x 1 unit for each document of 3 and of 9:

>>> cut_least_slack(np.array([3, 4, 9, 10]), np.array([1, 1, 1, 1]), 2).tolist()
[2, 4]
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Integers
from samplers.planning.packs.best_fit import count_rows

# Whether documents of these units `[n, K]` fit in a row alone: `[n]`.
FitAlone: TypeAlias = Callable[[Integers], npt.NDArray[np.bool_]]

# Shares of the tokens that slots may waste, in units of 1/4000; the first that costs no rows is taken.
SLACKS: Final = (8, 4, 2, 1)
SLACK_UNIT: Final = 4_000
# With several fields, a class for each combination: fewer for each field.
FIELD_SLACK: Final = 14
# More distinct lengths than this are rounded up by up to a 5,000th of the mean before they are cut into classes.
MANY_LENGTHS: Final = 20_000
LENGTH_ROUNDING: Final = 5_000
# Prices of a class grow by 1/8 to 1/16 from one to the next.
_OCTAVE: Final = 8
_PRICES: Final = _OCTAVE * 60
# Up to so long lengths are counted in a table; an int32 order suffices for that many samples.
_COUNTED: Final = 1 << 22
_INT32: Final = 1 << 31


@dataclass(frozen=True, eq=False)
class LengthClasses:
    """The classes, longest first, and their documents.

    Attributes:
        units: The slot of each class, in units, int64 `[J, K]`.
        counts: Documents of each class, int64 `[J]`.
        starts: Where they begin in `order`, int64 `[J]`.
        order: The documents, class by class: integers `[M]`.
        tokens: Units of all documents, for each field.
        rows: Rows that best-fit decreasing takes for the true lengths, and for the slots; None for several fields.
    """

    units: Integers
    counts: Integers
    starts: Integers
    order: npt.NDArray[np.signedinteger]
    tokens: tuple[int, ...]
    rows: tuple[int, int] | None


def make_classes(units: Integers, capacity: tuple[int, ...], fit_alone: FitAlone | None = None) -> LengthClasses:
    """Sort documents into classes.

    Args:
        units: Size of each document, integers `[M, K]`.
        capacity: Of a row, in units, for each field.
        fit_alone: Whether slots fit in a row alone, as all documents do; None where only `capacity` limits them.
    """
    if units.shape[1] > 1:
        return _make_cells(units, fit_alone)
    column = units[:, 0]
    order = sort_stably(column)
    values, counts = _make_histogram(column, order)
    tokens = int(values @ counts)
    sizes, numbers = _merge_close(values, counts)
    exact = count_rows(sizes[::-1].tolist(), numbers[::-1].tolist(), capacity[0])
    for ends in _cuts(sizes, numbers):
        slots = sizes[ends - 1]
        sums = np.diff(np.cumsum(numbers)[ends - 1], prepend=0)
        rows = count_rows(slots[::-1].tolist(), sums[::-1].tolist(), capacity[0])
        if rows <= exact + (exact + 500) // 1_000:
            break
    starts = np.cumsum(sums) - sums
    return LengthClasses(slots[::-1, None], sums[::-1], starts[::-1], order, (tokens,), (exact, rows))


def sort_stably(column: Integers) -> npt.NDArray[np.signedinteger]:
    """The documents by size, ascending, those of equal size in their order: int32 `[M]` if that suffices, or int64."""
    longest = int(column.max())
    # NumPy sorts 16 bits by radix, several times as fast as more.
    low = column.astype(np.uint16)
    order: npt.NDArray[np.signedinteger] = np.argsort(low, kind="stable")
    if len(column) < _INT32:
        order = order.astype(np.int32)
    for shift in range(16, longest.bit_length(), 16):
        digits = (column >> shift).astype(np.uint16)[order]
        order = order[np.argsort(digits, kind="stable")]
    return order


def cut_least_slack(values: Integers, counts: Integers, slack: int) -> Integers:
    """The ends of few classes whose documents waste at most `slack` units together.

    The slack plus a price for each class is least (a shortest path on the lower envelope of lines); the highest price
    that keeps within `slack` is found by halving.

    Args:
        values: Distinct sizes, ascending, int64 `[D]`.
        counts: Documents of each, int64 `[D]`.
        slack: Units that all slots together may be longer than their documents.

    Returns:
        Ascending, int64 `[J]`: class j ends before value `ends[j]`; the last is D.
    """
    return _ClassCutter(values, counts).cut(slack)


class _ClassCutter:
    """Cuts of one histogram at several prices; each is computed once."""

    def __init__(self, values: Integers, counts: Integers) -> None:
        ends = np.cumsum(counts)
        self._values: list[int] = values.tolist()
        self._ends: list[int] = ends.tolist()
        self._tokens = np.cumsum(values * counts)
        self._arrays = values, ends
        self._cuts: dict[int, tuple[int, Integers]] = {}

    def cut(self, slack: int) -> Integers:
        price = bisect_right(range(_PRICES), slack, key=lambda price: self._at(price)[0])
        return np.arange(1, len(self._values) + 1) if price == 0 else self._at(price - 1)[1]

    def _at(self, price: int) -> tuple[int, Integers]:
        """The slack and the ends of the classes at a price."""
        if price not in self._cuts:
            octave, part = divmod(price, _OCTAVE)
            ends = _cut_at_price(self._values, self._ends, ((_OCTAVE + part) << octave) // _OCTAVE)
            values, counts = self._arrays
            numbers = np.diff(counts[ends - 1], prepend=0)
            self._cuts[price] = int(values[ends - 1] @ numbers - self._tokens[-1]), ends
        return self._cuts[price]


def _cut_at_price(values: list[int], ends: list[int], price: int) -> Integers:
    """The classes of least slack + price x classes.

    If the last class begins after value i, the first j values cost `costs[i] + price + values[j - 1] * (ends[j - 1] -
    ends[i - 1])` padded units: a line in `values[j - 1]` of slope `-ends[i - 1]`. Slopes fall and values rise, so that
    the best line only moves forward.
    """
    slopes, heights, origins = [0], [0], [0]
    best = 0
    before = [0] * (len(values) + 1)
    for j, (value, end) in enumerate(zip(values, ends, strict=True), start=1):
        while best + 1 < len(slopes) and (
            heights[best + 1] - heights[best] <= value * (slopes[best + 1] - slopes[best])
        ):
            best += 1
        cost = heights[best] - slopes[best] * value + value * end + price
        before[j] = origins[best]
        # A line that is nowhere below both of its neighbours is taken out.
        while len(slopes) - best > 1 and (cost - heights[-2]) * (slopes[-1] - slopes[-2]) <= (
            heights[-1] - heights[-2]
        ) * (end - slopes[-2]):
            del slopes[-1], heights[-1], origins[-1]
        slopes.append(end)
        heights.append(cost)
        origins.append(j)
    cuts = []
    j = len(values)
    while j:
        cuts.append(j)
        j = before[j]
    return np.array(cuts[::-1])


def _cuts(values: Integers, counts: Integers) -> Iterator[Integers]:
    """Classes with less and less slack; at last each length is one.

    Yields:
        Their ends, int64 `[J]`.
    """
    cutter = _ClassCutter(values, counts)
    tokens = int(values @ counts)
    for slack in SLACKS:
        yield cutter.cut(tokens * slack // SLACK_UNIT)
    yield np.arange(1, len(values) + 1)


def _make_histogram(column: Integers, order: npt.NDArray[np.signedinteger]) -> tuple[Integers, Integers]:
    """The distinct sizes, ascending, and the documents of each."""
    if int(column.max()) < _COUNTED:
        table = np.bincount(column)
        values = np.flatnonzero(table)
        return values, table[values]
    ascending = column[order].astype(np.int64)
    firsts = np.flatnonzero(np.diff(ascending, prepend=-1))
    return ascending[firsts], np.diff(firsts, append=len(ascending))


def _merge_close(values: Integers, counts: Integers) -> tuple[Integers, Integers]:
    """Sizes and counts with close ones rounded up to one, where too many are distinct."""
    if len(values) <= MANY_LENGTHS:
        return values, counts
    step = max(1, int(values @ counts) // (LENGTH_ROUNDING * int(counts.sum())))
    # The longest fits in a row; longer ones may exceed the capacity, or cost too much.
    rounded = np.minimum(-(-values // step) * step, values[-1])
    firsts = np.flatnonzero(np.diff(rounded, prepend=-1))
    return rounded[firsts], np.add.reduceat(counts, firsts)


def _make_cells(units: Integers, fit_alone: FitAlone | None) -> LengthClasses:
    """Classes of several fields: the combinations of each field's classes that have documents."""
    cells = np.zeros(len(units), np.int64)
    for column in units.T:
        values, which, counts = np.unique(column, return_inverse=True, return_counts=True)
        ends = cut_least_slack(values.astype(np.int64), counts, int(values @ counts) * FIELD_SLACK // SLACK_UNIT)
        cells = cells * len(ends) + np.searchsorted(ends, which, side="right")
    order, firsts, slots = _sort_cells(cells, units)
    if fit_alone is not None and not (fits := fit_alone(slots)).all():
        # Each field of a slot is as long as some document's: all of them together may cost more than any document.
        split = np.isin(cells, cells[order[firsts[~fits]]])
        sizes = np.unique(units[split], axis=0, return_inverse=True)[1]
        cells[split] = cells.max() + 1 + sizes.reshape(-1)
        order, firsts, slots = _sort_cells(cells, units)
    tokens = tuple(int(total) for total in units.sum(0, dtype=np.int64))
    return LengthClasses(slots, np.diff(firsts, append=len(order)), firsts, order, tokens, None)


def _sort_cells(cells: Integers, units: Integers) -> tuple[Integers, Integers, Integers]:
    """The documents cell by cell, where the cells begin, and the slot of each."""
    order = np.argsort(cells, kind="stable")
    firsts = np.flatnonzero(np.diff(cells[order], prepend=-1))
    return order, firsts, np.maximum.reduceat(units[order].astype(np.int64), firsts)
