"""Rows in groups: rows that were filled alike so far are one group, and planning never looks at a single row.

The root holds all rows, empty. Where documents of one class go to some rows of a group, these rows become a child of it
with less room. Four rows of 10 take two documents of 6 and three of 4, the emptiest rows first:

>>> groups = Groups(np.array([[6], [4]]), np.array([10]), 4)
>>> groups.place(0, 2, lambda rooms, numbers: np.argsort(-rooms, kind="stable"))
0
>>> groups.place(1, 3, lambda rooms, numbers: np.argsort(-rooms, kind="stable"))
0
>>> tree = groups.tree()
>>> [column.tolist() for column in (tree.parents, tree.classes, tree.rows)]
[[-1, 0, 0, 1], [-1, 0, 1, 1], [4, 2, 2, 1]]
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from samplers.planning.keyed_shuffle import Integers

# From the room that is left in groups [n] and their numbers [n] to the order in which they are used, [n] indices.
Ranking: TypeAlias = Callable[[Integers, Integers], Integers]


class Tree(NamedTuple):
    """Groups in the order in which they were made, parents before children: int64 `[G]` each.

    Attributes:
        parents: -1 for the root.
        classes: The class of the document that sets a group apart from its parent; -1 for the root.
        rows: All rows of the group, those of its children too.
    """

    parents: Integers
    classes: Integers
    rows: Integers

    def open_rows(self) -> Integers:
        """The rows of each group that no child has, int64 `[G]`."""
        inner = np.bincount(self.parents[1:], self.rows[1:], len(self.rows))
        return self.rows - inner.astype(np.int64)


class Groups:
    """Rows that are being filled.

    Args:
        sizes: What a document of each class takes of each limit, int64 `[J, D]`.
        limits: What a row holds of each, int64 `[D]`; the room of a group is measured in units of the first.
        rows: How many there are.
    """

    def __init__(self, sizes: Integers, limits: Integers, rows: int) -> None:
        self._sizes: list[list[int]] = sizes.tolist()
        self._limits: list[int] = limits.tolist()
        self._least: list[int] = sizes.min(0).tolist()
        self._numbers = np.zeros(1, np.int64)
        self._rows = np.array([rows])
        self._rooms = [np.array([limit]) for limit in self._limits]
        self._made: list[tuple[Integers, int, Integers]] = []
        self._root_rows = rows
        self.count = 1

    def place(self, number: int, count: int, ranking: Ranking) -> int:
        """Place documents of a class, each row taking one in a pass, until all are placed or nothing fits.

        Args:
            number: Of the class.
            count: Documents.
            ranking: The order in which the groups that hold such a document are used.

        Returns:
            Documents that fit nowhere.
        """
        while count:
            chosen = self._fitting(number)
            if len(chosen) == 0:
                break
            chosen = chosen[ranking(self._room(chosen), self._numbers[chosen])]
            ends = np.cumsum(self._rows[chosen])
            chosen = chosen[: int(np.searchsorted(ends, count)) + 1]
            rows = self._rows[chosen]
            rows[-1] -= max(0, int(ends[len(chosen) - 1]) - count)
            count -= int(rows.sum())
            self._add_children(chosen, number, rows)
        return count

    def place_best_fit(self, number: int, count: int) -> int:
        """Place documents of a class by best fit: a row that took one is filled up with them first.

        Returns:
            Documents that fit nowhere.
        """
        chosen = self._fitting(number)
        chosen = chosen[np.argsort(self._room(chosen), kind="stable")]
        # As many as the tightest limit allows.
        each = np.full(len(chosen), np.iinfo(np.int64).max)
        for rooms, size in zip(self._rooms, self._sizes[number], strict=True):
            if size:
                np.minimum(each, rooms[chosen] // size, out=each)
        for index, fill, rows in zip(chosen.tolist(), each.tolist(), self._rows[chosen].tolist(), strict=True):
            taken = min(rows, count // fill)
            self._add_chain(index, number, taken, fill)
            count -= taken * fill
            if taken < rows and count:
                self._add_chain(index, number, 1, count)
                count = 0
            if count == 0:
                break
        self._drop_full()
        return count

    def tree(self) -> Tree:
        """The groups so far."""
        parents, classes, rows = [np.array([-1])], [np.array([-1])], [np.array([self._root_rows])]
        for made, number, through in self._made:
            parents.append(made)
            classes.append(np.full(len(made), number))
            rows.append(through)
        return Tree(np.concatenate(parents), np.concatenate(classes), np.concatenate(rows))

    def _fitting(self, number: int) -> Integers:
        """Where, among the open groups, those stand that hold a document of a class."""
        size = self._sizes[number]
        fits = self._rooms[0] >= size[0]
        for rooms, part in zip(self._rooms[1:], size[1:], strict=True):
            fits &= rooms >= part
        return np.flatnonzero(fits)

    def _room(self, chosen: Integers) -> Integers:
        """The room of groups in units of the first limit: by the limit that is nearest."""
        room = self._rooms[0][chosen]
        for rooms, limit in zip(self._rooms[1:], self._limits[1:], strict=True):
            np.minimum(room, rooms[chosen] * self._limits[0] // limit, out=room)
        return room

    def _add_children(self, chosen: Integers, number: int, rows: Integers) -> None:
        """Let rows of some groups take a document each, and drop the groups that have none left."""
        self._made.append((self._numbers[chosen], number, rows))
        size = self._sizes[number]
        children = [rooms[chosen] - part for rooms, part in zip(self._rooms, size, strict=True)]
        numbers = np.arange(self.count, self.count + len(chosen))
        self.count += len(chosen)
        self._rows[chosen] -= rows
        self._append(numbers, rows, children)

    def _add_chain(self, index: int, number: int, rows: int, documents: int) -> None:
        """Let rows of one group take several documents of a class each."""
        if rows == 0:
            return
        numbers = np.arange(self.count, self.count + documents)
        self._made.append((np.append(self._numbers[index], numbers[:-1]), number, np.full(documents, rows)))
        self.count += documents
        self._rows[index] -= rows
        size = self._sizes[number]
        rooms = [room[index : index + 1] - part * documents for room, part in zip(self._rooms, size, strict=True)]
        self._numbers = np.append(self._numbers, numbers[-1])
        self._rows = np.append(self._rows, rows)
        self._rooms = [np.append(old, new) for old, new in zip(self._rooms, rooms, strict=True)]

    def _append(self, numbers: Integers, rows: Integers, children: list[Integers]) -> None:
        keep = self._rows > 0
        # Groups that hold not even the smallest document are done.
        useful = children[0] >= self._least[0]
        for rooms, least in zip(children[1:], self._least[1:], strict=True):
            useful &= rooms >= least
        self._numbers = np.concatenate([self._numbers[keep], numbers[useful]])
        self._rows = np.concatenate([self._rows[keep], rows[useful]])
        self._rooms = [
            np.concatenate([old[keep], new[useful]]) for old, new in zip(self._rooms, children, strict=True)
        ]

    def _drop_full(self) -> None:
        keep = self._rows > 0
        for rooms, least in zip(self._rooms, self._least, strict=True):
            keep &= rooms >= least
        self._numbers, self._rows = self._numbers[keep], self._rows[keep]
        self._rooms = [rooms[keep] for rooms in self._rooms]
