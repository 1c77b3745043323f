"""The recipes of an epoch as numbers: which slots the row of a given number holds.

The rows of a group have consecutive numbers inside the tree: first those that no child has, then each child's. So a row
of group g has an index x from `lo[g]` on, and its document of g's class is slot `base[g] + x - lo[g]` of that class.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.packs.groups import Tree


@dataclass(frozen=True, eq=False)
class Recipes:
    """All rows of an epoch. Row ids list the groups with open rows by cost, so that neighbours are alike.

    Attributes:
        tree: The groups.
        costs: Cost of a slot of each class, int64 `[J]`.
    """

    tree: Tree
    costs: Integers

    def slots(self, row_ids: Integers) -> tuple[Integers, Integers, Integers]:
        """The slots of rows.

        Args:
            row_ids: int64 `[n]`.

        Returns:
            Classes and slots of the documents, row after row, int64 `[sum(documents)]` each; documents, int64 `[n]`.
        """
        leaves = self._leaves_of(row_ids)
        row_indices = self._lo[self._leaves[leaves]] + row_ids - self._firsts[leaves]
        documents = self._depths[leaves]
        owners = np.repeat(np.arange(len(row_ids)), documents)
        firsts = self._path_ends[leaves] - np.cumsum(documents)
        groups = self._paths[np.arange(len(owners)) + firsts[owners]]
        classes = self.tree.classes[groups]
        return classes, self._offsets[groups] + row_indices[owners], documents

    def row_documents(self, row_ids: Integers) -> Integers:
        """Documents of each row, int64 `[n]`."""
        return self._depths[self._leaves_of(row_ids)]

    def row_costs(self, row_ids: Integers) -> Integers:
        """The sum of the costs of each row's slots, int64 `[n]`."""
        return self._leaf_costs[self._leaves_of(row_ids)]

    def all_documents(self) -> Integers:
        """Documents of every row, int64 `[R]`."""
        return np.repeat(self._depths, np.diff(self._ends, prepend=0))

    def most_documents(self, rows: int) -> int:
        """The documents of that many rows, of those with most."""
        order = np.argsort(-self._depths, kind="stable")
        opened = self._opened[self._leaves][order]
        taken = np.diff(np.minimum(np.cumsum(opened), rows), prepend=0)
        return int(taken @ self._depths[order])

    def _leaves_of(self, row_ids: Integers) -> Integers:
        return np.searchsorted(self._ends, row_ids, side="right")

    @cached_property
    def _opened(self) -> Integers:
        return self.tree.open_rows()

    @cached_property
    def _walk(self) -> tuple[Integers, Integers, Integers]:
        """First row index of each group, its depth and the cost of its slots, int64 `[G]`."""
        parents, rows, opened = (column.tolist() for column in (self.tree.parents, self.tree.rows, self._opened))
        costs = self.costs[self.tree.classes].tolist()
        lo, depths, sums = [0] * len(rows), [0] * len(rows), [0] * len(rows)
        following = [opened[0]] * len(rows)
        # Parents come before their children.
        for group in range(1, len(rows)):
            parent = parents[group]
            lo[group] = first = following[parent]
            following[parent] = first + rows[group]
            following[group] = first + opened[group]
            depths[group] = depths[parent] + 1
            sums[group] = sums[parent] + costs[group]
        return np.array(lo), np.array(depths), np.array(sums)

    @property
    def _lo(self) -> Integers:
        return self._walk[0]

    @cached_property
    def _leaves(self) -> Integers:
        """Groups with open rows, by cost and then by number."""
        leaves = np.flatnonzero(self._opened)
        return leaves[np.argsort(self._walk[2][leaves], kind="stable")]

    @cached_property
    def _ends(self) -> Integers:
        return np.cumsum(self._opened[self._leaves])

    @cached_property
    def _firsts(self) -> Integers:
        return self._ends - self._opened[self._leaves]

    @cached_property
    def _depths(self) -> Integers:
        return self._walk[1][self._leaves]

    @cached_property
    def _leaf_costs(self) -> Integers:
        return self._walk[2][self._leaves]

    @cached_property
    def _path_ends(self) -> Integers:
        return np.cumsum(self._depths)

    @cached_property
    def _paths(self) -> Integers:
        """For each leaf the groups from the root's child down to it, one leaf after the other."""
        paths = np.empty(int(self._depths.sum()), np.int64)
        groups, ends = self._leaves, self._path_ends
        while len(groups):
            ends = ends - 1
            paths[ends] = groups
            groups = self.tree.parents[groups]
            deeper = groups > 0
            groups, ends = groups[deeper], ends[deeper]
        return paths

    @cached_property
    def _offsets(self) -> Integers:
        """For each group, what leads from a row's index to its slot: the slots before it in its class, less `lo`."""
        order = np.argsort(self.tree.classes, kind="stable")
        rows = self.tree.rows[order]
        before = np.cumsum(rows) - rows
        classes = self.tree.classes[order]
        firsts = np.flatnonzero(np.diff(classes, prepend=-2))
        base = np.empty_like(before)
        base[order] = before - np.repeat(before[firsts], np.diff(firsts, append=len(before)))
        return base - self._lo
