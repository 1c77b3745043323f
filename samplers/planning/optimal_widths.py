"""The few padded widths that waste least for a list of lengths.

Lengths 3, 4, 4 and 9 with two widths: widths 4 and 9 pad one time step, widths 3 and 9 pad ten.
"""

from collections import deque

import numpy as np
import numpy.typing as npt

from collate.errors import LengthError
from collate.widths import check_count
from samplers.masked import refuse_masked
from samplers.planning.budget import Integers
from samplers.planning.sorting import LONGEST_LENGTH


def optimal_widths(lengths: npt.ArrayLike, k: int) -> list[int]:
    """The padded widths, at most `k`, that waste least: an exact partition of the lengths, not quantiles.

    Every sample is padded to the next width. The best last width of each shorter list is found on the lower envelope of
    lines (the convex hull trick for one-dimensional partitions with a quadrangle inequality; Wu, 1991, and Wang and
    Song, 2011, for optimal k-means on a line), in O(k D) steps for D distinct lengths.

    Args:
        lengths: Lengths of the corpus, in time steps: integers `[N]`, or an index with such `.lengths`.
        k: The largest number of widths.

    Returns:
        Widths in ascending order; the last is the largest length, so that every sample has a width. A length of zero
        needs width 1.

    Raises:
        TypeError: Lengths or `k` are not integers.
        ValueError: There are no lengths, a length is negative, they are not `[N]`, or `k` is below one.

    Example:
        >>> optimal_widths([3, 4, 4, 9, 10, 30], 3)
        [4, 10, 30]
    """
    k = check_count("k", k, least=1, hint="give the largest number of widths")
    values, counts = np.unique(np.maximum(_check_field(lengths), 1), return_counts=True)
    return _best_partition(values.tolist(), np.cumsum(counts).tolist(), k)


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


def _best_partition(values: list[int], ends: list[int], k: int) -> list[int]:
    """The exact partition of ascending `values` [D], where `ends` [D] counts the samples up to each value."""
    if k >= len(values):
        return values
    # costs[j]: padded tokens of the first j values. With one width, all are padded to the last: lengths 3, 4, 4 and 9
    # are the values 3, 4 and 9 with ends 1, 3 and 4, and cost 3, 12 and 36.
    costs = [0, *(value * end for value, end in zip(values, ends, strict=True))]
    layers = []
    for _ in range(k - 1):
        costs, origins = _one_width_more(costs, values, ends)
        layers.append(origins)
    # Walk back from the last value: each layer tells where the samples of its last width begin.
    cut = len(values)
    chosen = []
    for origins in reversed(layers):
        chosen.append(values[cut - 1])
        cut = int(origins[cut])
    if cut:
        chosen.append(values[cut - 1])
    return chosen[::-1]


def _one_width_more(costs: list[int], values: list[int], ends: list[int]) -> tuple[list[int], Integers]:
    """The fewest padded tokens [D + 1] with one more width, and where its samples start [D + 1].

    If the last width begins after value i, the first j values cost `costs[i] + values[j - 1] * (ends[j - 1] -
    ends[i - 1])`: a line in `values[j - 1]` of slope `-ends[i - 1]`. Slopes fall and queries rise, so that the best
    line only moves forward.
    """
    lines: deque[tuple[int, int, int]] = deque()
    best, origins = [0], np.zeros(len(values) + 1, np.int64)
    for j, (value, end) in enumerate(zip(values, ends, strict=True), start=1):
        line = (-(ends[j - 2] if j > 1 else 0), costs[j - 1], j - 1)
        while len(lines) > 1 and _is_hidden(lines[-1], lines[-2], line):
            lines.pop()
        lines.append(line)
        while len(lines) > 1 and _height(lines[0], value) >= _height(lines[1], value):
            lines.popleft()
        best.append(value * end + _height(lines[0], value))
        origins[j] = lines[0][2]
    return best, origins


def _height(line: tuple[int, int, int], value: int) -> int:
    """The cost that a line (slope, intercept, origin) has at a value."""
    return line[0] * value + line[1]


def _is_hidden(middle: tuple[int, int, int], before: tuple[int, int, int], after: tuple[int, int, int]) -> bool:
    """Whether the middle line is nowhere below both of its neighbours."""
    return (after[1] - before[1]) * (before[0] - middle[0]) <= (middle[1] - before[1]) * (before[0] - after[0])
