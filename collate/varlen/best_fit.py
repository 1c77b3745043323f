"""A list of sizes -> the row of each item, one list at a time: by best fit, or cut in the order of the list.

Best fit: the longest goes first, into the fullest row that still has room for it. Sizes 5, 4, 3 and 2 fill two rows of
7, of which the first holds 5 and 2:

>>> pack_best_fit([3, 5, 2, 4], capacity=7)
[1, 0, 0, 1]

With at most two in a row, and with equal sizes, samples come in their order:

>>> pack_best_fit([1, 1, 1, 1, 1], capacity=7, max_items=2)
[0, 0, 1, 1, 2]
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from collate.tensors.numpy_view import Int64Array


def pack_best_fit(sizes: Sequence[int], capacity: int, max_items: int | None = None) -> list[int]:
    """Pack by best fit, longest first.

    All rows with room but the one that was filled last wait in a sorted list of `free steps * N + row`, in which a row
    is found by bisection. The next item goes into the row that was filled last as long as no other fits more tightly,
    which two comparisons tell.

    Args:
        sizes: N sizes from 0 to `capacity`.
        capacity: Steps of a row.
        max_items: Items that a row may have; None is any number.

    Returns:
        The row of each item: N ints, rows numbered in the order in which they were opened.
    """
    most = size_of_list = len(sizes)
    if max_items is not None:
        most = max_items
    rows, held = [0] * size_of_list, list[int]()
    waiting: list[int] = []
    # The row that was filled last, its free steps (-1: none or closed), and those of the next fuller row.
    row = free = below = -1
    for item in sorted(range(size_of_list), key=sizes.__getitem__, reverse=True):
        size = sizes[item]
        if not below < size <= free:
            if free >= 0:
                insort(waiting, free * size_of_list + row)
            index = bisect_left(waiting, size * size_of_list)
            below = waiting[index - 1] // size_of_list if index else -1
            if index == len(waiting):
                row, free = len(held), capacity
                held.append(0)
            else:
                free, row = divmod(waiting.pop(index), size_of_list)
        rows[item] = row
        held[row] += 1
        # Nothing fits a row that is closed, not even an empty item.
        free = free - size if held[row] < most else -1
    return rows


def cut_in_order(sizes: Sequence[int], capacity: int, max_items: int | None = None) -> list[int]:
    """Cut a list in its order: each row takes items as long as they fit.

    >>> cut_in_order([3, 5, 2, 4], capacity=7)
    [0, 1, 1, 2]

    Args:
        sizes: As in `pack_best_fit`.
        capacity: As in `pack_best_fit`.
        max_items: As in `pack_best_fit`.

    Returns:
        The row of each item, ascending.
    """
    rows: list[int] = []
    row, held, free = 0, 0, capacity
    for size in sizes:
        if size > free or held == max_items:
            row, held, free = row + 1, 0, capacity
        rows.append(row)
        held, free = held + 1, free - size
    return rows


def pack_fields(sizes: Int64Array, capacities: Int64Array, max_items: int | None = None) -> list[int]:
    """Best fit for items of several sizes, none of which may exceed its capacity in any row.

    Items come by the largest share that they take of a row, each into the row that has the least free shares. All rows
    are compared for each item, O(N R).

    >>> pack_fields(np.array([[3, 2], [1, 4], [3, 6]]), np.array([4, 8]))
    [0, 0, 1]

    Args:
        sizes: int64 `[N, K]`, at most the capacities.
        capacities: int64 `[K]`.
        max_items: As in `pack_best_fit`.

    Returns:
        As `pack_best_fit`.
    """
    rows, held = [0] * len(sizes), list[int]()
    free = np.empty((len(sizes), len(capacities)))
    shares = sizes / capacities
    for item in np.argsort(-shares.max(1), kind="stable").tolist():
        room = free[: len(held)]
        fits = np.flatnonzero((room >= sizes[item]).all(1))
        if len(fits) == 0:
            row = len(held)
            held.append(0)
            free[row] = capacities
        else:
            row = int(fits[np.argmin((room[fits] / capacities).sum(1))])
        rows[item] = row
        held[row] += 1
        free[row] -= sizes[item]
        if held[row] == max_items:
            # Nothing fits a row that is closed, not even an empty item.
            free[row] = -1
    return rows


def cut_fields(sizes: Int64Array, capacities: Int64Array, max_items: int | None = None) -> list[int]:
    """Cut a list of items of several sizes in its order: each row takes items as long as they fit.

    >>> cut_fields(np.array([[3, 2], [1, 4], [3, 6]]), np.array([4, 8]))
    [0, 0, 1]
    """
    rows: list[int] = []
    row, held, free = 0, 0, capacities
    for size in sizes:
        if (size > free).any() or held == max_items:
            row, held, free = row + 1, 0, capacities
        rows.append(row)
        held, free = held + 1, free - size
    return rows
