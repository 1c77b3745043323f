"""The rows of any epoch, by number: which documents share a row changes with the epoch, the number of rows does not.

Twelve documents of 55 steps fill three rows of 20 steps in every epoch, each time with other neighbours:

>>> lengths = np.array([7, 3, 5, 2, 2, 9, 4, 1, 6, 3, 8, 5])
>>> table = PackTable.build(lengths, capacity=20, seed=5)
>>> for epoch in range(2):
...     samples, documents = table.rows(epoch, np.arange(len(table)))
...     print(*(lengths[row].tolist() for row in np.split(samples, np.cumsum(documents)[:-1])))
[6, 5, 3, 2] [9, 7, 2, 1] [8, 5, 4, 3]
[7, 5, 3, 2] [9, 4, 3, 2] [8, 6, 5, 1]
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from numbers import Real
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from collate.widths import check_count
from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import Domains, derive_key, stream_keys
from samplers.planning.packs.documents import (
    LARGEST_CAPACITY,
    LONGEST_DOCUMENT,
    DocumentCost,
    Documents,
    OverlongDocuments,
    Pieces,
    RowLimits,
    plan_documents,
)
from samplers.planning.packs.groups import Tree
from samplers.planning.packs.ladder import LADDER, PackTask, attempt
from samplers.planning.packs.length_classes import LengthClasses, make_classes
from samplers.planning.packs.recipes import Recipes
from samplers.planning.packs.row_count import RowPlan, choose_rows

# What a key is for, next to the purposes of other tables.
RECIPES, POOLS = range(50, 52)
SPARES: Final = 56
# Stands for the recipes that epochs take whose attempts fail; no epoch has such a number.
SPARE_EPOCH: Final = 1 << 62
# Attempts of an epoch at each of its rungs.
DRAWS: Final = 4
# Costs are counted in whole units, since sums of floats may differ between machines: this many fill a row, or are the
# longest document's where no row has a limit.
COST_UNITS: Final = 1 << 20
# Positions of two epochs may be asked for in turn, at the end of one.
_KEPT_EPOCHS: Final = 2
_DERIVED: Final = frozenset(["_recipes", "_domains", "_task", "_spare"])


class LastRows(NamedTuple):
    """The rows of most documents, which the last step splits among the replicas.

    Attributes:
        rows: How many.
        replicas: Each needs a document.
    """

    rows: int
    replicas: int


@dataclass(frozen=True, eq=False)
class PackTable:
    """All rows of every epoch. Row ids are `range(len(table))`; neighbours are alike in cost.

    Attributes:
        classes: The documents, sorted into length classes, longest first.
        samples: The sample index of each document, int64 `[M]`; None where document i is sample i.
        limits: What a row may hold.
        plan: The number of rows, and how epochs fill them.
        seed: Seed of the shuffles.
        shuffle: Whether epochs differ; without it every epoch is the spare plan, and classes are not shuffled.
        pieces: Of split samples, or None.
        dropped: Samples that `overlong="drop"` leaves out.
    """

    classes: LengthClasses
    samples: Integers | None
    limits: RowLimits
    plan: RowPlan
    seed: int
    shuffle: bool = True
    pieces: Pieces | None = None
    dropped: int = 0
    _recipes: dict[tuple[int, LastRows | None], Recipes] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        lengths: npt.ArrayLike,
        *,
        capacity: int | Sequence[int],
        multiple: int = 1,
        max_documents: int | None = None,
        cost: DocumentCost | None = None,
        max_cost: float | None = None,
        overlong: OverlongDocuments = "error",
        seed: int = 0,
        shuffle: bool = True,
        indices: Integers | None = None,
        is_brief: bool = False,
    ) -> Self:
        """Plan rows for samples of these lengths.

        Args:
            lengths: In steps, integers `[N]` or `[N, K]`.
            capacity: Steps of a row; one number for each field.
            multiple: Lengths are rounded up to multiples of it; `capacity` must be one.
            max_documents: Documents in a row.
            cost: Cost of documents, `cost(lengths)` -> `[n]` numbers from 0, which must not fall with the length. It
                is called with rounded lengths, int64 `[n]` (`[n, K]` for K fields). Rows are numbered by cost.
            max_cost: Sum of the costs of a row's documents.
            overlong: What to do with a document that does not fit in a row alone.
            seed: Seed of the shuffles; the number of rows does not depend on it.
            shuffle: False for the same rows in each epoch.
            indices: The samples that take part, int64 `[n]`; None for all.
            is_brief: Whether the plan of the rows is found in fewer attempts, see `choose_rows`.

        Raises:
            LengthError: A document does not fit in a row, with `overlong="error"`.
            TypeError: A limit is not an int, lengths are not integers, or `cost` is not a function.
            ValueError: A limit is below 1, `capacity` is not a multiple of `multiple` or not one for each field, there
                are no documents, or `max_cost` has no `cost`.
        """
        array = check_pack_lengths(lengths)
        limits = make_limits(
            1 if array.ndim == 1 else array.shape[1],
            capacity=capacity,
            multiple=multiple,
            max_documents=max_documents,
            cost=cost,
            max_cost=max_cost,
        )
        documents = plan_documents(array, limits, overlong=overlong, indices=indices)
        classes, plan = _plan(documents, limits, is_brief=is_brief)
        return cls(
            classes, documents.samples, limits, plan, seed, shuffle, pieces=documents.pieces, dropped=documents.dropped
        )

    def __len__(self) -> int:
        """Rows of every epoch."""
        return self.plan.rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _recipes={})

    @property
    def tokens(self) -> int:
        """Steps of all documents, rounded up to `multiple`, over all fields."""
        return sum(self.classes.tokens) * self.limits.multiple

    @property
    def waste(self) -> float:
        """The share of the rows' steps that holds no document; with several fields, of the fullest field."""
        return 1 - max(
            tokens / (self.plan.rows * units)
            for tokens, units in zip(self.classes.tokens, self.limits.units, strict=True)
        )

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when the classes, the limits, the rows or the rungs do."""
        decided = repr((self.limits.capacity, self.limits.multiple, self.limits.max_documents, self.limits.max_cost))
        decided += repr((self.plan.rows, self.plan.rungs, self.shuffle, DRAWS))
        hashed = blake2b(decided.encode(), digest_size=8)
        for column in (self.classes.units, self.classes.counts, self._costs):
            hashed.update(column.astype("<i8").tobytes())
        return hashed.hexdigest()

    def rows(self, epoch: int, row_ids: Integers, last: LastRows | None = None) -> tuple[Integers, Integers]:
        """The samples of these rows.

        Args:
            epoch: Which epoch, from 0.
            row_ids: int64 `[n]`, each in `range(len(table))`.
            last: What the last rows must hold, as for `recipes`.

        Returns:
            Sample indices row after row, int64 `[sum(documents)]`, the longest documents of a row first as a rule, and
            the documents of each row, int64 `[n]`. Pieces of split samples have indices from N on.
        """
        numbers, slots, documents = self.recipes(epoch, last).slots(row_ids)
        if self.shuffle:
            keys = stream_keys(derive_key(self.seed, epoch, POOLS), np.arange(len(self.classes.counts)))
            slots = self._domains.permute(slots, numbers, keys[numbers])
        samples = self.classes.order[self.classes.starts[numbers] + slots]
        if self.samples is not None:
            samples = self.samples[samples]
        return samples.astype(np.int64), documents

    def row_documents(self, epoch: int, row_ids: Integers) -> Integers:
        """Documents of each of these rows, int64 `[n]`."""
        return self.recipes(epoch).row_documents(row_ids)

    def row_cost(self, epoch: int, row_ids: Integers) -> Integers:
        """The cost of each of these rows, int64 `[n]`: the sum over its slots, in whole units."""
        return self.recipes(epoch).row_costs(row_ids)

    def recipes(self, epoch: int, last: LastRows | None = None) -> Recipes:
        """The recipes of an epoch; those of two epochs are kept.

        Args:
            epoch: Which epoch, from 0, or `SPARE_EPOCH`.
            last: An epoch takes the first recipes whose last rows hold a document for each replica. None for any. The
                spare recipes follow where all attempts fail: where these do, every epoch does.
        """
        recipes = self._recipes.get((epoch, last))
        if recipes is None:
            recipes = self._find_recipes(epoch, last)
            while len(self._recipes) >= _KEPT_EPOCHS:
                self._recipes.pop(next(iter(self._recipes)), None)
            self._recipes[epoch, last] = recipes
        return recipes

    def _find_recipes(self, epoch: int, last: LastRows | None) -> Recipes:
        if not self.shuffle or (epoch == SPARE_EPOCH and _is_shared(self._spare, last)):
            return self._spare
        # Where the spare recipes do not do, others are drawn in their place, the same for every seed.
        words = (SPARES,) if epoch == SPARE_EPOCH else (self.seed, epoch, RECIPES)
        for index, rung in enumerate(self.plan.rungs):
            # The last rung draws nothing: its recipes are the spare ones.
            for draw in range(DRAWS if rung != LADDER[-1] else 0):
                tree = attempt(self._task, self.plan.rows, rung, derive_key(*words, DRAWS * index + draw))
                if tree is not None and _is_shared(recipes := Recipes(tree, self._costs), last):
                    return recipes
        return self._spare if epoch == SPARE_EPOCH or last is None else self.recipes(SPARE_EPOCH, last)

    @cached_property
    def _spare(self) -> Recipes:
        spare = self.plan.spare
        tree = spare if isinstance(spare, Tree) else spare.fill(self._task, len(self))
        return Recipes(tree, self._costs)

    @cached_property
    def _task(self) -> PackTask:
        return make_task(self.classes, self.limits)

    @cached_property
    def _costs(self) -> Integers:
        """Cost of a slot of each class in whole units; its steps where there is no `cost`."""
        if self.limits.cost is None:
            return np.asarray(self.classes.units.sum(1) * self.limits.multiple, np.int64)
        return _slot_costs(self.classes, self.limits)

    @cached_property
    def _domains(self) -> Domains:
        return Domains(self.classes.counts)


def _is_shared(recipes: Recipes, last: LastRows | None) -> bool:
    """Whether the last rows hold a document for each replica."""
    return last is None or recipes.most_documents(last.rows) >= last.replicas


def check_pack_lengths(lengths: npt.ArrayLike) -> Integers:
    """Check that lengths are integers `[N]` or `[N, K]` from 0.

    Raises:
        TypeError: They are not integers.
        ValueError: They have another shape, or one is negative.
    """
    array = np.asarray(lengths)
    if array.ndim not in {1, 2} or array.size == 0:
        raise ValueError(f"lengths must be [N] or [N, K] with N >= 1, got {list(array.shape)}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {array.dtype}: count whole steps")
    if int(array.min()) < 0 or int(array.max()) > LONGEST_DOCUMENT:
        value = int(array.min()) if int(array.min()) < 0 else int(array.max())
        sample = int((array == value).reshape(len(array), -1).any(1).argmax())
        raise ValueError(f"lengths must be from 0 to 2**40, got {value} at sample {sample}")
    # Unsigned numbers of 64 bits become floats next to signed ones.
    return array.astype(np.int64) if array.dtype == np.uint64 else array


def make_limits(
    fields: int,
    *,
    capacity: int | Sequence[int],
    multiple: int = 1,
    max_documents: int | None = None,
    cost: DocumentCost | None = None,
    max_cost: float | None = None,
) -> RowLimits:
    """Check the limits of a row, for samples of that number of fields.

    Raises:
        TypeError: A limit is not an int, or `cost` is not a function.
        ValueError: A limit is below 1, `capacity` is not a multiple of `multiple` or not one for each field, or
            `max_cost` has no `cost`.
    """
    multiple = check_count("multiple", multiple, least=1, hint="give 1 for exact lengths")
    # A list, a tuple or an array: `tolist` keeps what is no number for its message.
    if isinstance(capacity, np.ndarray):
        capacity = capacity.tolist()
    steps: tuple[int, ...] = tuple(capacity) if isinstance(capacity, Sequence) else (capacity,)
    if len(steps) != fields:
        raise ValueError(f"capacity must have one number for each of {fields} fields, got {capacity}")
    for number in steps:
        check_count("capacity", number, least=1, hint="give the steps that a row holds")
        if number % multiple or number > LARGEST_CAPACITY:
            raise ValueError(f"capacity must be a multiple of multiple={multiple}, at most 2**31, got {number}")
    if max_documents is not None:
        max_documents = check_count("max_documents", max_documents, least=1, hint="give None for no such limit")
    if cost is not None and not callable(cost):
        raise TypeError(f"cost must be a function of lengths, got {cost!r}")
    if max_cost is not None and (isinstance(max_cost, bool) or not isinstance(max_cost, Real)):
        raise TypeError(f"max_cost must be a number, got {max_cost!r}: give None for no such limit")
    if max_cost is not None and (cost is None or not max_cost > 0):
        raise ValueError(f"max_cost must be above 0 and have a cost, got max_cost={max_cost} and cost={cost!r}")
    return RowLimits(
        capacity=tuple(int(number) for number in steps),
        multiple=multiple,
        max_documents=max_documents,
        cost=cost,
        # As a float: 9 and 9.0 are one limit, and a position of one is a position of the other.
        max_cost=None if max_cost is None else float(max_cost),
    )


def _plan(documents: Documents, limits: RowLimits, *, is_brief: bool) -> tuple[LengthClasses, RowPlan]:
    """Classes in the order in which their documents are placed, and the rows."""
    classes = make_classes(documents.units, limits.units, None if limits.max_cost is None else limits.fit_alone)
    # Refuses a wrong cost now, which is needed when an epoch begins.
    limits.costs(classes.units)
    task = make_task(classes, limits)
    if task.sizes.shape[1] > 1:
        order = np.argsort(-task.shares, kind="stable")
        classes = LengthClasses(
            classes.units[order],
            classes.counts[order],
            classes.starts[order],
            classes.order,
            classes.tokens,
            classes.rows,
        )
        task = make_task(classes, limits)
    return classes, choose_rows(task, classes.rows if task.sizes.shape[1] == 1 else None, is_brief=is_brief)


def make_task(classes: LengthClasses, limits: RowLimits) -> PackTask:
    """What a document of each class takes of each limit: fields, `max_documents`, `max_cost`."""
    columns, caps = [classes.units], list(limits.units)
    if limits.max_documents is not None:
        columns.append(np.ones((len(classes.counts), 1), np.int64))
        caps.append(min(limits.max_documents, int(classes.counts.sum())))
    if limits.max_cost is not None:
        columns.append(_slot_costs(classes, limits)[:, None])
        caps.append(COST_UNITS)
    return PackTask(np.concatenate(columns, 1), classes.counts, np.array(caps))


def _slot_costs(classes: LengthClasses, limits: RowLimits) -> Integers:
    """The cost of a slot of each class, in whole units, rounded up."""
    costs = limits.costs(classes.units)
    most = float(costs.max()) if limits.max_cost is None else limits.max_cost
    return np.ceil(costs * COST_UNITS / max(most, np.finfo(np.float64).tiny)).astype(np.int64)
