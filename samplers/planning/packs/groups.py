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
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from samplers.planning.budget import Integers

# Number of groups for which there is room at first.
_BUFFER: Final = 256
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

    Attributes:
        count: Groups so far.
        lost: Room by the first limit that no document can use any more, over all rows.
    """

    def __init__(self, sizes: Integers, limits: Integers, rows: int) -> None:
        self._sizes: list[list[int]] = sizes.tolist()
        self._limits: list[int] = limits.tolist()
        self._least: list[int] = sizes.min(0).tolist()
        # Open groups: number, rows without a child, and room by each limit. Where no row is left, the room is negative.
        self._open = np.empty((2 + len(self._limits), _BUFFER), np.int64)
        self._open[:, 0] = [0, rows, *self._limits]
        self._used = 1
        self._made: list[tuple[Integers, int, Integers]] = []
        self._root_rows = rows
        self.count = 1
        self.lost = 0

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
            if len(chosen) > 1:
                chosen = chosen[ranking(self._room(chosen), self._open[0, chosen])]
            rows = self._open[1, chosen]
            ends = rows.cumsum()
            last = int(ends.searchsorted(count))
            if last < len(chosen):
                chosen, rows = chosen[: last + 1], rows[: last + 1]
                rows[-1] -= int(ends[last]) - count
            count -= int(ends[-1]) if last == len(ends) else count
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
        for rooms, size in zip(self._open[2:], self._sizes[number], strict=True):
            if size:
                np.minimum(each, rooms[chosen] // size, out=each)
        fills, opened = each.tolist(), self._open[1, chosen].tolist()
        # The buffer is emptied of full groups only where it is full: until then indices stay.
        for index, group, fill, rows in zip(
            chosen.tolist(), self._open[0, chosen].tolist(), fills, opened, strict=True
        ):
            taken = min(rows, count // fill)
            chains = [(taken, fill)] if taken else []
            count -= taken * fill
            if taken < rows and count:
                chains.append((1, count))
                count = 0
            rooms = self._open[2:, index].copy()
            self._open[1, index] -= sum(number_of_rows for number_of_rows, _ in chains)
            if self._open[1, index] == 0:
                self._open[2, index] = -1
            for chain_rows, documents in chains:
                self._add_chain(group, rooms, number, rows=chain_rows, documents=documents)
            if count == 0:
                break
        return count

    def tree(self) -> Tree:
        """The groups so far."""
        sizes = [len(rows) for _, _, rows in self._made]
        classes = np.repeat(np.array([-1, *(number for _, number, _ in self._made)]), [1, *sizes])
        parents = np.concatenate([np.array([-1]), *(made for made, _, _ in self._made)])
        rows = np.concatenate([np.array([self._root_rows]), *(through for _, _, through in self._made)])
        return Tree(parents, classes, rows)

    def _fitting(self, number: int) -> Integers:
        """Where, among the open groups, those stand that hold a document of a class."""
        size = self._sizes[number]
        rooms = self._open[2:, : self._used]
        fits = rooms[0] >= size[0]
        for limit in range(1, len(size)):
            fits &= rooms[limit] >= size[limit]
        return np.flatnonzero(fits)

    def _room(self, chosen: Integers) -> Integers:
        """The room of groups in units of the first limit: by the limit that is nearest."""
        room: Integers = self._open[2, chosen]
        for rooms, limit in zip(self._open[3:], self._limits[1:], strict=True):
            np.minimum(room, rooms[chosen] * self._limits[0] // limit, out=room)
        return room

    def _add_children(self, chosen: Integers, number: int, rows: Integers) -> None:
        """Let rows of some groups take a document each."""
        self._made.append((self._open[0, chosen], number, rows))
        children = self._open[:, chosen]
        children[0] = np.arange(self.count, self.count + len(chosen))
        children[1] = rows
        for limit, part in enumerate(self._sizes[number], start=2):
            children[limit] -= part
        self.count += len(chosen)
        # All groups but the last give all their rows.
        rest = int(self._open[1, chosen[-1]]) - int(rows[-1])
        self._open[2, chosen if rest == 0 else chosen[:-1]] = -1
        self._open[1, chosen[-1]] = rest
        self._append(children)

    def _add_chain(self, group: int, rooms: Integers, number: int, *, rows: int, documents: int) -> None:
        """Let rows of one group take several documents of a class each."""
        numbers = np.arange(self.count, self.count + documents)
        self._made.append((np.append(group, numbers[:-1]), number, np.full(documents, rows)))
        self.count += documents
        left = rooms - documents * np.array(self._sizes[number])
        self._append(np.array([[numbers[-1]], [rows], *left[:, None]]), compact=False)

    def _append(self, children: Integers, *, compact: bool = True) -> None:
        """Add open groups, but not those that hold not even the smallest document."""
        useful = children[2] >= self._least[0]
        for limit, least in enumerate(self._least[1:], start=3):
            useful &= children[limit] >= least
        if not useful.all():
            lost = ~useful
            self.lost += int(children[1, lost] @ children[2, lost])
            children = children[:, useful]
        if self._used + children.shape[1] > self._open.shape[1]:
            if compact:
                opened = self._open[2, : self._used] >= 0
                kept = self._open[:, : self._used][:, opened]
            else:
                kept = self._open[:, : self._used]
            self._used = kept.shape[1]
            self._open = np.empty((len(kept), 2 * (self._used + children.shape[1]) + _BUFFER), np.int64)
            self._open[:, : self._used] = kept
        self._open[:, self._used : self._used + children.shape[1]] = children
        self._used += children.shape[1]
