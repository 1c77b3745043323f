"""Best fit: a list of sizes -> as few rows as hold them, one list at a time.

The longest goes first, into the fullest row that still has room for it. Sizes 5, 4, 3 and 2 fill two rows of 7:

>>> pack_best_fit([3, 5, 2, 4], capacity=7)
[[1, 2], [0, 3]]

With at most two in a row, and with equal sizes, samples come in their order:

>>> pack_best_fit([1, 1, 1, 1, 1], capacity=7, max_items=2)
[[0, 1], [2, 3], [4]]
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

import numpy as np

from collate.tensors.numpy_view import Int64Array


def pack_best_fit(sizes: Sequence[int], capacity: int, max_items: int | None = None) -> list[list[int]]:
    """Pack by best fit, longest first.

    Open rows wait in queues by their free steps, and the numbers of free steps that occur are kept sorted, so that a
    row is found by bisection. A row is closed when it has `max_items` items.

    Args:
        sizes: N sizes from 0 to `capacity`.
        capacity: what a row holds.
        max_items: how many items a row may have at most; None is any number.

    Returns:
        The items of each row, ascending; rows in the order in which they were opened. O(N log N).
    """
    rows: list[list[int]] = []
    queues: dict[int, deque[int]] = {}
    # Free steps for which a row waits, ascending; at most as many numbers as a row has steps.
    waiting: list[int] = []
    for item in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        index = bisect_left(waiting, sizes[item])
        if index == len(waiting):
            row, free = len(rows), capacity
            rows.append([])
        else:
            free = waiting[index]
            row = queues[free].popleft()
            if not queues[free]:
                del queues[free], waiting[index]
        rows[row].append(item)
        free -= sizes[item]
        if max_items is None or len(rows[row]) < max_items:
            if free not in queues:
                queues[free] = deque()
                insort(waiting, free)
            queues[free].append(row)
    return [sorted(row) for row in rows]


def cut_in_order(sizes: Sequence[int], capacity: int, max_items: int | None = None) -> list[list[int]]:
    """Cut a list in its order: each row takes items as long as they fit.

    >>> cut_in_order([3, 5, 2, 4], capacity=7)
    [[0], [1, 2], [3]]
    """
    rows: list[list[int]] = [[]]
    free = capacity
    for item, size in enumerate(sizes):
        if size > free or len(rows[-1]) == max_items:
            rows.append([])
            free = capacity
        rows[-1].append(item)
        free -= size
    return rows


def pack_fields(sizes: Int64Array, capacities: Int64Array, max_items: int | None = None) -> list[list[int]]:
    """Best fit for items of several sizes, none of which may exceed its capacity in any row.

    Items come by the largest share that they take of a row, each into the row that has the least free shares. Rows are
    looked at all together for each item, O(N R).

    >>> pack_fields(np.array([[3, 2], [1, 4], [3, 6]]), np.array([4, 8]))
    [[0, 1], [2]]

    Args:
        sizes: int64 `[N, K]`, at most the capacities.
        capacities: int64 `[K]`.
        max_items: as in `pack_best_fit`.

    Returns:
        As `pack_best_fit`.
    """
    rows: list[list[int]] = []
    free = np.empty((len(sizes), len(capacities)))
    shares = sizes / capacities
    for item in np.argsort(-shares.max(1), kind="stable").tolist():
        room = free[: len(rows)]
        fits = np.flatnonzero((room >= sizes[item]).all(1))
        if len(fits) == 0:
            row = len(rows)
            rows.append([])
            free[row] = capacities
        else:
            row = int(fits[np.argmin((room[fits] / capacities).sum(1))])
        rows[row].append(item)
        free[row] -= sizes[item]
        if len(rows[row]) == max_items:
            # Nothing fits what is closed, not even an empty item.
            free[row] = -1
    return [sorted(row) for row in rows]


def cut_fields(sizes: Int64Array, capacities: Int64Array, max_items: int | None = None) -> list[list[int]]:
    """Cut a list of items of several sizes in its order: each row takes items as long as they fit.

    >>> cut_fields(np.array([[3, 2], [1, 4], [3, 6]]), np.array([4, 8]))
    [[0, 1], [2]]
    """
    rows: list[list[int]] = [[]]
    free = capacities.copy()
    for item, size in enumerate(sizes):
        if (size > free).any() or len(rows[-1]) == max_items:
            rows.append([])
            free = capacities.copy()
        rows[-1].append(item)
        free = free - size
    return rows
