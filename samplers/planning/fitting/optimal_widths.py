"""The few padded widths that waste least for a list of lengths.

Lengths 3, 4, 4 and 9 with two widths: widths 4 and 9 pad one time step, widths 3 and 9 pad ten.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from collate.errors import LengthError
from collate.widths import check_count
from samplers.planning.budget import Integers
from samplers.planning.sorting import LONGEST_LENGTH
from samplers.sources.masked import refuse_masked

# Costs up to here, and their differences, fit 64 bits.
_LARGEST_COST: Final = 1 << 62
# Passes over all points of a hull, of which a few are enough for real lengths.
_PASSES: Final = 40


def optimal_widths(lengths: npt.ArrayLike, k: int) -> list[int]:
    """The padded widths, at most `k`, that waste least: an exact partition of the lengths, not quantiles.

    Every sample is padded to the next width. The best last width of each shorter list is found on a lower convex hull
    (the convex hull trick for one-dimensional partitions with a quadrangle inequality; Wu, 1991, and Wang and Song,
    2011, for optimal k-means on a line), for all lists at once: k sorts of D distinct lengths.

    Args:
        lengths: Lengths of the corpus, in time steps: integers `[N]`, or an index with such `.lengths`.
        k: The largest number of widths.

    Returns:
        Widths in ascending order; the last is the largest length, so that every sample has a width. A length of zero
        needs width 1.

    Raises:
        TypeError: Lengths or `k` are not integers.
        ValueError: There are no lengths, a length is negative, they are not `[N]`, or `k` is below one.

    Examples:
        >>> optimal_widths([3, 4, 4, 9, 10, 30], 3)
        [4, 10, 30]
    """
    k = check_count("k", k, least=1, hint="give the largest number of widths")
    values, counts = np.unique(np.maximum(_check_field(lengths), 1), return_counts=True)
    return _best_partition(values, np.cumsum(counts), k)


def _check_field(lengths: npt.ArrayLike) -> Integers:
    """The checked lengths of one field: int64 `[N]`.

    Raises:
        TypeError: They are not integers, or masked.
        ValueError: They are not `[N]`, or there are none.
        LengthError: One is negative, or above 2**63 - 1.
    """
    lengths = getattr(lengths, "lengths", lengths)
    refuse_masked(lengths, "lengths", "measure them, or leave them out with .compressed()")
    array = np.asarray(lengths)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"lengths must be [N] with N >= 1, got {list(array.shape)}: give one field at a time")
    if array.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {array.dtype}: count whole steps")
    if array.dtype == np.uint64 and array.max() > LONGEST_LENGTH:
        raise LengthError(f"lengths must be from 0 to 2**63 - 1, got {array.max()} at sample {array.argmax()}")
    if array.min() < 0:
        raise LengthError(f"lengths must not be negative, got {array.min()} at sample {array.argmin()}")
    return array.astype(np.int64)


def _best_partition(values: Integers, ends: Integers, k: int) -> list[int]:
    """The exact partition of ascending `values` [D], where `ends` [D] counts the samples up to each value."""
    if k >= len(values):
        return [int(value) for value in values]
    if int(values[-1]) * int(ends[-1]) > _LARGEST_COST:
        # NumPy calculates with Python's integers then, which do not overflow, and takes twenty times as long.
        values, ends = values.astype(object), ends.astype(object)
    # costs[j]: padded tokens of the first j values. With one width, all are padded to the last: lengths 3, 4, 4 and 9
    # are the values 3, 4 and 9 with ends 1, 3 and 4, and cost 3, 12 and 36.
    starts = np.concatenate([np.zeros_like(ends[:1]), ends])
    costs = np.concatenate([np.zeros_like(ends[:1]), values * ends])
    layers = []
    for _ in range(k - 1):
        costs, origins = _one_width_more(costs, values, starts)
        layers.append(origins)
    # Walk back from the last value: each layer tells where the samples of its last width begin.
    cut = len(values)
    chosen = []
    for origins in reversed(layers):
        chosen.append(int(values[cut - 1]))
        cut = int(origins[cut - 1])
    if cut:
        chosen.append(int(values[cut - 1]))
    return chosen[::-1]


def _one_width_more(costs: Integers, values: Integers, starts: Integers) -> tuple[Integers, Integers]:
    """The fewest padded tokens [D + 1] with one more width, and where its samples start [D].

    If the last width begins after value i, the first j values cost `costs[i] + values[j - 1] * (starts[j] -
    starts[i])`. The best i is a vertex of the lower convex hull of the points `(starts[i], costs[i])`: the last one
    that an edge reaches whose slope is at most `values[j - 1]`. Points behind j are among them, but never best, because
    their samples would be paid at more than `values[j - 1]` each.
    """
    hull = _lower_hull(starts, costs)
    slopes = _slopes(starts[hull], costs[hull])
    origins = hull[np.searchsorted(slopes, values, side="right")]
    best = costs[origins] + values * (starts[1:] - starts[origins])
    return np.concatenate([np.zeros_like(best[:1]), best]), origins


def _lower_hull(x: Integers, y: Integers) -> Integers:
    """The indices of the points that are lowest in some direction of an integer slope, of points with ascending `x`.

    >>> _lower_hull(np.array([0, 1, 2, 3, 4]), np.array([0, 3, 4, 9, 16])).tolist()
    [0, 2, 3, 4]
    """
    hull = np.arange(len(x))
    for _ in range(_PASSES):
        slopes = _slopes(x[hull], y[hull])
        # Slopes rise along a hull. A point where they do not is above the line between its neighbours, which are points
        # too, even if they are removed with it.
        kept = np.concatenate([[True], slopes[:-1] < slopes[1:], [True]])
        if kept.all():
            return hull
        hull = hull[kept]
    return _walk_hull(hull.tolist(), x.tolist(), y.tolist())


def _walk_hull(points: list[int], x: list[int], y: list[int]) -> Integers:
    """The same hull, point by point: each point is looked at twice, however they lie."""
    hull: list[int] = []
    slopes: list[int] = []
    for point in points:
        while hull:
            slope = -((y[hull[-1]] - y[point]) // (x[point] - x[hull[-1]]))
            if not slopes or slopes[-1] < slope:
                slopes.append(slope)
                break
            hull.pop()
            slopes.pop()
        hull.append(point)
    return np.array(hull)


def _slopes(x: Integers, y: Integers) -> Integers:
    """The slopes between neighbouring points, rounded up: as exact as their fractions where only integers compare."""
    slopes: Integers = -((y[:-1] - y[1:]) // (x[1:] - x[:-1]))
    return slopes
