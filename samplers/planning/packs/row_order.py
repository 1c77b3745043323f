"""The rows of an epoch in the order in which replicas take them, and how the last ones are shared.

A step is the next W batches of the order. With a cost, rows of like cost form a step, so that replicas do not wait for
each other, and steps are shuffled. The rows that are left for a partial step are those with most documents.
"""

from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, permute, permute_one, stream_keys
from samplers.planning.packs.documents import RowLimits
from samplers.planning.packs.pack_table import LastRows, PackTable

# What a key is for, next to the purposes of the table.
ROWS, STEPS, SLOTS, DROPPED = range(52, 56)


@dataclass(frozen=True, eq=False)
class RowOrder:
    """An epoch as one sequence of rows, laid out for the replicas with which it began.

    Attributes:
        table: The rows by number.
        epoch: Which one.
        replicas: Batches in a step.
        batch_rows: Rows in a batch.
        drop_last: Whether the rows of the partial step are dropped: other ones in each epoch.
    """

    table: PackTable
    epoch: int
    replicas: int = 1
    batch_rows: int = 1
    drop_last: bool = False

    @property
    def step_rows(self) -> int:
        """Rows in a step."""
        return self.replicas * self.batch_rows

    @property
    def steps(self) -> int:
        """Whole steps."""
        return len(self.table) // self.step_rows

    @property
    def partial(self) -> int:
        """Rows in the last, partial step."""
        return len(self.table) % self.step_rows

    def row_ids(self, positions: Integers) -> Integers:
        """The rows at these positions of the sequence.

        Args:
            positions: int64 `[n]`, each in `range(len(table))`; batch b has positions from `b * batch_rows` on.

        Returns:
            int64 `[n]`.
        """
        whole = self.steps * self.step_rows
        inside = positions < whole
        ranks = self._shuffle(np.minimum(positions, max(whole - 1, 0))) if self.table.shuffle and whole else positions
        ids = self._around_last(np.where(inside, ranks, 0))
        return np.where(inside, ids, self._last[np.maximum(positions - whole, 0)]) if self.partial else ids

    def samples(self, positions: Integers) -> tuple[Integers, Integers]:
        """The samples of the rows at these positions, and the documents of each row, as `PackTable.rows` gives them."""
        return self.table.rows(self.epoch, self.row_ids(positions), self.last)

    @property
    def last(self) -> LastRows | None:
        """What the rows of the partial step must hold, if they are fewer than the replicas."""
        if self.drop_last or not 0 < self.partial < self.replicas:
            return None
        return LastRows(self.partial, self.replicas)

    def _shuffle(self, positions: Integers) -> Integers:
        """Whole steps shuffled, and rows within each step: positions `[n]` among the rows that are not last."""
        if self.table.limits.cost is None:
            return permute(positions, self.steps * self.step_rows, self._key(ROWS))
        steps, slots = np.divmod(positions, self.step_rows)
        steps = permute(steps, self.steps, self._key(STEPS))
        slots = permute(slots, self.step_rows, stream_keys(self._key(SLOTS), steps))
        return steps * self.step_rows + slots

    def _around_last(self, ranks: Integers) -> Integers:
        """The ids of rows that are numbered without the last ones."""
        if self.partial == 0:
            return ranks
        # Before the last row number j there are `last[j] - j` others.
        return ranks + np.searchsorted(self._last - np.arange(self.partial), ranks, side="right")

    @cached_property
    def _last(self) -> Integers:
        """The rows of the partial step, ascending, int64 `[partial]`."""
        if self.drop_last and self.table.shuffle:
            if self.table.limits.cost is None:
                hole = permute(np.arange(self.partial), len(self.table), self._key(DROPPED))
                return np.sort(hole)
            first = permute_one(0, self.steps + 1, self._key(DROPPED)) * self.step_rows
            return np.arange(first, first + self.partial)
        documents = self.table.recipes(self.epoch, self.last).all_documents()
        return np.sort(np.argsort(-documents, kind="stable")[: self.partial])

    def _key(self, purpose: int) -> int:
        return derive_key(self.table.seed, self.epoch, purpose)


def share_rows(rows: list[Integers], units: list[Integers], limits: RowLimits, replicas: int) -> list[list[Integers]]:
    """Share the last rows of an epoch between replicas, so that each has a document.

    As many rows as replicas or more are dealt whole. Of fewer, the documents are pooled and go, the costliest first,
    to the replica with the least load; should this break a limit, the rows are split one by one.

    Args:
        rows: The samples of each row.
        units: Size of each of these documents in units, int64 `[documents, K]`.
        limits: Of a row.
        replicas: Who shares.

    Returns:
        The rows of each replica; with fewer rows than replicas, one each.

    Raises:
        ValueError: There are fewer documents than replicas.
    """
    documents = sum(len(row) for row in rows)
    if documents < replicas:
        raise ValueError(
            f"the last step must have a document for each of {replicas} replicas, got {documents} documents in "
            f"{len(rows)} rows: set drop_last=True or use fewer replicas"
        )
    weights = [_weigh(sizes, limits) for sizes in units]
    if len(rows) >= replicas:
        order = sorted(range(len(rows)), key=lambda index: -int(weights[index].sum()))
        return [[rows[index] for index in order[replica::replicas]] for replica in range(replicas)]
    pooled, sizes, weight = np.concatenate(rows), np.concatenate(units), np.concatenate(weights)
    shares = _pool_documents(weight, replicas)
    if all(_fits_one_row(sizes[share], limits) for share in shares):
        return [[pooled[share]] for share in shares]
    return [[piece] for piece in _split_rows(rows, replicas)]


def _pool_documents(weights: Integers, replicas: int) -> list[Integers]:
    """The indices of documents for each replica, the heaviest first to the least load."""
    shares: list[list[int]] = [[] for _ in range(replicas)]
    loads = [(0, 0, replica) for replica in range(replicas)]
    for index in np.argsort(-weights, kind="stable").tolist():
        # Of equal loads, the replica with fewer documents, so that none is without one.
        load, documents, replica = loads[0]
        shares[replica].append(index)
        heapreplace(loads, (load + int(weights[index]), documents + 1, replica))
    return [np.array(share) for share in shares]


def _weigh(units: Integers, limits: RowLimits) -> Integers:
    """The cost of documents in whole units, or their size where there is no cost: at least 1, int64 `[n]`."""
    if limits.cost is None:
        return np.asarray(units.sum(1), np.int64)
    costs = limits.costs(units.astype(np.int64))
    most = limits.max_cost if limits.max_cost is not None else max(float(costs.max()), 1e-300)
    return np.maximum(1, np.ceil(costs / most * (1 << 30))).astype(np.int64)


def _fits_one_row(units: Integers, limits: RowLimits) -> bool:
    """Whether documents of these sizes fit in one row."""
    if limits.max_documents is not None and len(units) > limits.max_documents:
        return False
    if limits.max_cost is not None and limits.costs(units.astype(np.int64)).sum() > limits.max_cost:
        return False
    return bool((units.sum(0) <= np.array(limits.units)).all())


def _split_rows(rows: list[Integers], replicas: int) -> list[Integers]:
    """Rows split one by one, the one with the most documents in a piece first, until there are as many as replicas."""
    pieces = [(-len(row), index, 1) for index, row in enumerate(rows)]
    heapify(pieces)
    shares = [1] * len(rows)
    for _ in range(replicas - len(rows)):
        _, index, count = heappop(pieces)
        shares[index] = count + 1
        heappush(pieces, (-len(rows[index]) // (count + 1), index, count + 1))
    return [piece for row, share in zip(rows, shares, strict=True) for piece in np.array_split(row, share)]
