"""The order of a batch's documents, from which a collator that cuts a list by capacity gets the planned rows.

Such a collator knows no rows: it fills a row until the next document does not fit. So the longest document of a row
comes first, and the fullest row; then the room that a row has left is smaller than the next row's first document. Two
rows of 10 steps:

>>> lengths = np.array([4, 2, 3, 7])
>>> samples, documents, rows = arrange_rows(
...     np.array([1, 0, 2, 3]), np.array([2, 2]), np.array([2]), lengths[[1, 0, 2, 3], None], RowLimits(capacity=(10,))
... )
>>> lengths[samples].tolist(), documents.tolist(), rows.tolist()
([7, 3, 4, 2], [2, 2], [2])
"""

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Integers
from samplers.planning.packs.documents import RowLimits

# Shares of a row are counted in these units.
_UNITS = 1 << 20


def arrange_rows(
    samples: Integers, documents: Integers, rows: Integers, sizes: Integers, limits: RowLimits
) -> tuple[Integers, Integers, Integers]:
    """Order the rows of batches, and the documents of rows, so that the list can be cut into them again.

    Where two rows of a batch fit in one, no order keeps them apart: the batch then has the rows that the cut gives,
    fewer than before. With a limit of cost they are kept, as the cut does not see it.

    Args:
        samples: Row after row, int64 `[n]`.
        documents: Of each row, int64 `[R]`, at least one.
        rows: Of each batch, int64 `[B]`, at least one.
        sizes: Steps that a collator counts for each document, int64 `[n, K]`.
        limits: Of a row.

    Returns:
        Samples `[n]`, documents of each row, and rows of each batch, int64.
    """
    capacity = np.array(limits.capacity)
    owners = np.repeat(np.arange(len(documents)), documents)
    order = np.lexsort((-(sizes * _UNITS // capacity).max(1), owners))
    room = capacity - np.add.reduceat(sizes, np.cumsum(documents) - documents)
    batches = np.repeat(np.arange(len(rows)), rows)
    row_order = np.lexsort(((room * _UNITS // capacity).min(1), batches))
    starts = (np.cumsum(documents) - documents)[row_order]
    documents, room = documents[row_order], room[row_order]
    order = order[_ranges(starts, documents)]
    samples, sizes = samples[order], sizes[order]
    if limits.max_cost is not None:
        return samples, documents, rows
    firsts = sizes[np.cumsum(documents) - documents]
    joins = (firsts[1:] <= room[:-1]).all(1) & (batches[1:] == batches[:-1])
    if limits.max_documents is not None:
        joins &= documents[:-1] < limits.max_documents
    if not joins.any():
        return samples, documents, rows
    return samples, *_cut_again(np.unique(batches[1:][joins]), documents, rows, sizes, limits)


def _cut_again(
    joined: Integers, documents: Integers, rows: Integers, sizes: Integers, limits: RowLimits
) -> tuple[Integers, Integers]:
    """Documents of each row, and rows of each batch, where some batches have the rows that a cut gives."""
    counts = np.split(documents, np.cumsum(rows)[:-1])
    ends = np.cumsum([int(count.sum()) for count in counts])
    for batch in joined.tolist():
        first = int(ends[batch] - counts[batch].sum())
        counts[batch] = count_row_documents(sizes[first : int(ends[batch])], limits)
    return np.concatenate(counts), np.array([len(count) for count in counts])


def count_row_documents(sizes: Integers, limits: RowLimits) -> Integers:
    """The documents of each row, if each takes documents of a list as long as they fit: int64 `[R]`.

    Args:
        sizes: In steps, int64 `[n, K]`, each at most the capacity.
        limits: Of a row; a limit of cost is not looked at.
    """
    counts, room = [0], list(limits.capacity)
    for size in sizes.tolist():
        if counts[-1] == limits.max_documents or any(part > left for part, left in zip(size, room, strict=True)):
            counts.append(0)
            room = list(limits.capacity)
        counts[-1] += 1
        room = [left - part for part, left in zip(size, room, strict=True)]
    return np.array(counts)


def _ranges(starts: Integers, counts: Integers) -> npt.NDArray[np.int64]:
    """The integers from each start on, as many as its count."""
    within: Integers = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(starts, counts) + within
