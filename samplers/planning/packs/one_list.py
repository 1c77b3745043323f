"""Pack one list of lengths into rows, without epochs: for a batch that is at hand."""

from heapq import heappop, heappush
from typing import Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from collate.widths import check_count
from samplers.planning.budget import Integers
from samplers.planning.packs.documents import DocumentCost, Documents, RowLimits, plan_documents
from samplers.planning.packs.groups import Groups, Tree
from samplers.planning.packs.ladder import PackTask, fill_empty
from samplers.planning.packs.length_classes import LengthClasses, sort_stably
from samplers.planning.packs.pack_table import check_pack_lengths, make_limits, make_task
from samplers.planning.packs.recipes import Recipes
from samplers.planning.packs.row_count import choose_rows

RowList: TypeAlias = list[list[int]]
"""The indices of the documents of each row."""


@overload
def pack(
    lengths: npt.ArrayLike,
    capacity: int,
    *,
    ranks: None = None,
    max_documents: int | None = None,
    cost: DocumentCost | None = None,
    max_cost: float | None = None,
    multiple: int = 1,
    overlong: Literal["error", "drop", "cut"] = "error",
) -> RowList: ...


@overload
def pack(
    lengths: npt.ArrayLike,
    capacity: int,
    *,
    ranks: int,
    max_documents: int | None = None,
    cost: DocumentCost | None = None,
    max_cost: float | None = None,
    multiple: int = 1,
    overlong: Literal["error", "drop", "cut"] = "error",
) -> list[RowList]: ...


def pack(
    lengths: npt.ArrayLike,
    capacity: int,
    *,
    ranks: int | None = None,
    max_documents: int | None = None,
    cost: DocumentCost | None = None,
    max_cost: float | None = None,
    multiple: int = 1,
    overlong: Literal["error", "drop", "cut"] = "error",
) -> RowList | list[RowList]:
    """Pack samples into rows: few rows, or as many for each rank and of even cost.

    Without `ranks` rows are filled by best-fit decreasing, or, under `max_documents` or `max_cost`, by whatever takes
    fewer rows. With `ranks` every rank gets the same number of rows, as few as possible; the costliest document goes
    to the row with the least cost that holds it, and the rows of one step are alike in cost.

    Args:
        lengths: In steps, integers `[N]`.
        capacity: Steps of a row.
        ranks: Number of ranks W that share the rows, or None.
        max_documents: Documents in a row.
        cost: Cost of documents, `cost(lengths)` -> `[n]` numbers from 0; with `ranks` it is balanced. Default: steps.
        max_cost: Sum of the costs of a row's documents.
        multiple: Lengths are rounded up to multiples of it; `capacity` must be one.
        overlong: What to do with a sample that does not fit in a row alone: `"error"`, `"drop"` it, or plan it as
            `"cut"` to the longest that fits.

    Returns:
        Rows, each a list of sample indices; with `ranks` a list of rows for each rank, all with equally many rows.

    Raises:
        LengthError: A sample does not fit in a row, with `overlong="error"`.
        TypeError: A limit is not an int, lengths are not integers, or `cost` is not a function.
        ValueError: A limit is below 1, there are no samples, or too few for each rank to have a document in each row.

    Examples:
        >>> pack([5, 3, 3, 3, 2], 8)
        [[0, 1], [2, 3, 4]]
        >>> pack([5, 3, 3, 3, 2], 8, ranks=2)
        [[[0, 3]], [[1, 2, 4]]]
    """
    if overlong not in {"error", "drop", "cut"}:
        raise ValueError(f"overlong must be 'error', 'drop' or 'cut', got {overlong!r}: pieces need a PackTable")
    array = check_pack_lengths(lengths)
    if array.ndim > 1:
        raise ValueError(f"lengths must be [N], got {list(array.shape)}: rows of several fields need a PackTable")
    limits = make_limits(
        1, capacity=capacity, multiple=multiple, max_documents=max_documents, cost=cost, max_cost=max_cost
    )
    documents = plan_documents(array, limits, overlong=overlong)
    classes = _exact_classes(documents)
    task = make_task(classes, limits)
    tree = _few_rows(task)
    if ranks is None:
        return _as_lists(tree, classes, documents)
    ranks = check_count("ranks", ranks, least=1, hint="give the number of ranks, or None for a single list of rows")
    weights = limits.costs(classes.units) if cost is not None else classes.units[:, 0].astype(np.float64)
    return _share(task, tree, weights, packed=(classes, documents), ranks=ranks)


def pack_rows(lengths: Integers, limits: RowLimits) -> list[Integers]:
    """Documents that fit in few rows, under limits that are checked: the documents of each row, int64 `[n]`.

    Args:
        lengths: In steps, int64 `[n]`, each of which fits in a row alone.
        limits: Of a row, for one field.
    """
    documents = plan_documents(lengths, limits)
    classes = _exact_classes(documents)
    tree = _few_rows(make_task(classes, limits))
    numbers, slots, counts = Recipes(tree, classes.units[:, 0]).slots(np.arange(int(tree.rows[0])))
    rows: list[Integers] = np.split(
        classes.order[classes.starts[numbers] + slots].astype(np.int64), counts.cumsum()[:-1]
    )
    return rows


def _exact_classes(documents: Documents) -> LengthClasses:
    """A class for each length, longest first."""
    column = documents.units[:, 0]
    order = sort_stably(column)
    ascending = column[order].astype(np.int64)
    starts = np.flatnonzero(np.diff(ascending, prepend=-1))
    counts = np.diff(starts, append=len(order))
    units = ascending[starts][:, None]
    return LengthClasses(units[::-1], counts[::-1], starts[::-1], order, (int(ascending.sum()),), None)


def _few_rows(task: PackTask) -> Tree:
    """Rows by best fit; with several limits, the rows of a spread if they are fewer."""
    groups = Groups(task.sizes, task.limits, int(task.counts.sum()))
    for number, count in enumerate(task.counts.tolist()):
        groups.place_best_fit(number, count)
    tree = groups.tree()
    rows = tree.rows.copy()
    rows[0] -= tree.open_rows()[0]
    tree = tree._replace(rows=rows)
    if len(task.limits) == 1 or rows[0] == task.bound:
        return tree
    plan = choose_rows(task, None)
    return plan.spare if isinstance(plan.spare, Tree) and plan.rows < rows[0] else tree


def _as_lists(tree: Tree, classes: LengthClasses, documents: Documents) -> RowList:
    numbers, slots, counts = Recipes(tree, classes.units[:, 0]).slots(np.arange(int(tree.rows[0])))
    samples = classes.order[classes.starts[numbers] + slots]
    if documents.samples is not None:
        samples = documents.samples[samples]
    flat, ends = samples.tolist(), np.cumsum(counts).tolist()
    return [flat[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]


def _share(
    task: PackTask, tree: Tree, weights: npt.NDArray[np.float64], *, packed: tuple[LengthClasses, Documents], ranks: int
) -> list[RowList]:
    """Rows of even cost for each rank; `tree` says how many are needed, and is used where even ones do not hold all.

    Raises:
        ValueError: There are fewer documents than rows.
    """
    classes, documents = packed
    rows = -(-int(tree.rows[0]) // ranks) * ranks
    if rows > int(task.counts.sum()):
        raise ValueError(
            f"lengths must have a document for each of {rows} rows, {rows // ranks} for each of {ranks} ranks, got "
            f"{int(task.counts.sum())} documents: use fewer ranks"
        )
    samples = _samples_in_order(classes, documents)
    owners = _balance(task, weights, rows)
    if owners is None:
        lists = _as_lists(fill_empty(tree._replace(rows=np.append(rows, tree.rows[1:]))), classes, documents)
    else:
        lists = [[] for _ in range(rows)]
        for owner, sample in zip(owners, samples, strict=True):
            lists[owner].append(sample)
    cost_of = dict(zip(samples, np.repeat(weights, task.counts).tolist(), strict=True))
    return _to_ranks(lists, [sum(cost_of[sample] for sample in row) for row in lists], ranks)


def _samples_in_order(classes: LengthClasses, documents: Documents) -> list[int]:
    """Sample indices class by class, longest first."""
    indices = np.concatenate(
        [classes.order[first : first + count] for first, count in zip(classes.starts, classes.counts, strict=True)]
    )
    samples: list[int] = (indices if documents.samples is None else documents.samples[indices]).tolist()
    return samples


def _balance(task: PackTask, weights: npt.NDArray[np.float64], rows: int) -> list[int] | None:
    """The row of each document, the heaviest class first to the row with the least load that holds it; None if none.

    Args:
        task: The documents and limits.
        weights: Of a document of each class, float64 `[J]`.
        rows: How many there are.
    """
    loads = [(0.0, row) for row in range(rows)]
    rooms = [task.limits.tolist() for _ in range(rows)]
    owners: dict[int, list[int]] = {}
    for number in np.argsort(-weights, kind="stable").tolist():
        size = task.sizes[number].tolist()
        owners[number] = []
        for _ in range(int(task.counts[number])):
            passed: list[tuple[float, int]] = []
            while loads and any(room < part for room, part in zip(rooms[loads[0][1]], size, strict=True)):
                passed.append(heappop(loads))
            if not loads:
                return None
            load, row = heappop(loads)
            rooms[row] = [room - part for room, part in zip(rooms[row], size, strict=True)]
            owners[number].append(row)
            for entry in (*passed, (load + float(weights[number]), row)):
                heappush(loads, entry)
    if any(room == task.limits.tolist() for room in rooms):
        return None
    return [row for number in range(len(weights)) for row in owners[number]]


def _to_ranks(lists: RowList, costs: list[float], ranks: int) -> list[RowList]:
    """Rows to ranks: neighbours in cost are a step, in which the costliest goes to the rank with the least so far."""
    order = sorted(range(len(lists)), key=lambda index: (-costs[index], index))
    shares: list[RowList] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for first in range(0, len(order), ranks):
        lightest = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        for rank, index in zip(lightest, order[first : first + ranks], strict=True):
            shares[rank].append(lists[index])
            totals[rank] += costs[index]
    return shares
