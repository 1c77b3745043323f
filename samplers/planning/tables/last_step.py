"""The last step of an epoch: fewer batches than replicas are split, so that each replica gets a piece of like cost."""

from collections.abc import Callable
from heapq import heapify, heapreplace
from typing import Final

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.sorting import IndexArray

# Rounds in which the pieces of the last step are made more even.
EVENING_ROUNDS: Final = 4


def cut_evenly(weights: Integers, pieces: int) -> Integers:
    """Lengths of runs of `weights` `[n]` whose sums are as even as whole rows allow: int64 `[pieces]`.

    >>> cut_evenly(np.array([9, 5, 4, 4, 3, 2]), 3).tolist()
    [1, 2, 3]
    """
    ends = weights.cumsum()
    goals = np.arange(1, pieces) * (2 * int(ends[-1])) // pieces
    # A run ends with the row in whose middle the goal lies.
    return np.diff(np.searchsorted(2 * ends - weights, goals), prepend=0, append=len(weights))


def cut_by_cost(
    weights: Integers, pieces: int, *, measure: Callable[[Integers], Integers], limit: int
) -> Integers | None:
    """Cut rows into runs of even cost, where a run of different lengths costs more than its rows do one by one.

    Six rows for two replicas; a run costs its rows x its longest row. By length, a cut after the first row is as even
    as any, 11 and 22 steps, but padded the runs cost 11 and 5 x 11 = 55. Cut again by these costs, the runs are
    (11 11) and (4 4 2 1), which cost 22 and 16:

    >>> lengths = np.array([11, 11, 4, 4, 2, 1]) * 1000
    >>> cut_evenly(lengths, 2).tolist()
    [1, 5]
    >>> cut_by_cost(lengths, 2, measure=lambda rows: rows * lengths[rows.cumsum() - rows], limit=60_000).tolist()
    [2, 4]

    Args:
        weights: Cost of each row alone, int64 `[n]`.
        pieces: How many runs there must be.
        measure: The costs of runs `[pieces]`, of these many rows each: int64 `[pieces]` -> int64 `[pieces]`.
        limit: The cost that no run may exceed.

    Returns:
        Rows of each run, int64 `[pieces]`; None if no round stays within the limit.
    """
    best, best_rows = limit, None
    for _ in range(EVENING_ROUNDS):
        rows = cut_evenly(weights, pieces)
        if rows.min() < 1:
            break
        costs = measure(rows)
        if costs.max() <= best:
            best, best_rows = int(costs.max()), rows
        # Raise the weights of each run to what it costs, and cut again.
        separate = np.add.reduceat(weights, rows.cumsum() - rows)
        weights = np.maximum(1, weights * np.repeat(costs, rows) // np.repeat(separate, rows))
    return best_rows


def split_batches(batches: list[IndexArray], num_replicas: int) -> list[IndexArray]:
    """Split each batch of a step on its own, so that the largest piece has as few rows as possible.

    Args:
        batches: Samples of each, at most as many batches as replicas, and at least as many rows.
        num_replicas: How many pieces there must be.
    """
    parts = split_largest([len(batch) for batch in batches], num_replicas - len(batches))
    return [piece for batch, count in zip(batches, parts, strict=True) for piece in np.array_split(batch, count)]


def split_largest(sizes: list[int], count: int) -> list[int]:
    """The number of parts of each batch, so that there are `count` more batches and the largest part is smallest.

    >>> split_largest([10, 4, 3], 2)
    [3, 1, 1]
    """
    parts = [1] * len(sizes)
    largest = [(-float(size), batch) for batch, size in enumerate(sizes)]
    heapify(largest)
    for _ in range(count):
        batch = largest[0][1]
        parts[batch] += 1
        heapreplace(largest, (-sizes[batch] / parts[batch], batch))
    return parts
