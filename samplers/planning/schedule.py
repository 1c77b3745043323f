"""Schedule: the remaining batches of an epoch, dealt to any number of replicas.

Ten batches, two of them taken by the two replicas with which the epoch began; three replicas take the other eight. In
step t, replica r takes the batch in *slot* t * 3 + r. There are two whole steps, and two batches are left for three
replicas: the rows of the last step are split, so that each replica gets a batch there too.

>>> from samplers.planning.options import Options
>>> from samplers.planning.tables.pool_table import choose_table
>>> table = choose_table([5] * 40, Options(batch_size=4, shuffle=False))
>>> schedule = make_schedule(table, 0, 3, laid_for=2, taken=2)
>>> schedule.whole_steps, schedule.partial, schedule.steps
(2, 2, 3)
>>> [len(batch) for batch in schedule.index_lists(np.arange(9))]
[4, 4, 4, 4, 4, 4, 3, 2, 3]
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.sorting import IndexArray
from samplers.planning.tables.batch_table import BatchSizes, BatchTable
from samplers.planning.tables.epoch_order import SAMPLES, EpochOrder
from samplers.planning.tables.pool_table import split_largest

# Batches are computed for many steps at once, as many as hold about this many samples: enough to hide the cost of a
# NumPy call, few enough that the arrays stay in the processor's cache.
SAMPLES_AT_ONCE: Final = 1 << 16
# Rounds in which the pieces of the last step are made more even.
EVENING_ROUNDS: Final = 4
# Costs are counted in millionths of the budget.
BUDGET_UNITS: Final = 1 << 20
# The read group of a batch that was split among replicas.
SPLIT: Final = -1


@dataclass(frozen=True, eq=False)
class Schedule:
    """The remaining batches of an epoch, dealt to replicas: in step t, replica r takes the batch in slot t * W + r.

    Attributes:
        table: The epoch's batches by id.
        order: The order of the epoch.
        taken: Positions of the order that were taken before.
        num_replicas: W; not always as many as the epoch's order was made for.
    """

    table: BatchTable
    order: EpochOrder
    taken: int
    num_replicas: int

    def __post_init__(self) -> None:
        if self.taken > len(self.table):
            raise ValueError(f"a position must lie in an epoch of {len(self.table)} batches, got {self.taken}")
        if self.partial and not self._drops and self.last_rows < self.num_replicas:
            raise ValueError(
                f"the last step must have a row for each of {self.num_replicas} replicas, got {self.last_rows} rows in "
                f"{self.partial} batches: set drop_last=True, use fewer replicas, or allow batches of more rows"
            )

    @property
    def slots(self) -> int:
        """Batches of the schedule, over all replicas."""
        return self.steps * self.num_replicas

    @property
    def whole_steps(self) -> int:
        """Steps in which every replica takes a whole batch."""
        return (len(self.table) - self.taken) // self.num_replicas

    @property
    def partial(self) -> int:
        """Batches that remain for the last step, fewer than replicas."""
        return (len(self.table) - self.taken) % self.num_replicas

    @property
    def steps(self) -> int:
        """Batches of each replica."""
        return self.whole_steps + (self.partial > 0 and not self._drops)

    @property
    def last_rows(self) -> int:
        """Rows of the batches of the last, partial step."""
        return int(self.table.batch_rows(self.order.batch_at_position(self._last_positions)).sum())

    def taken_after(self, steps: int) -> int:
        """Positions of the order that are taken after this many steps of the schedule."""
        return min(self.taken + steps * self.num_replicas, len(self.table))

    def batch_samples(self, slots: Integers) -> tuple[IndexArray, Integers]:
        """The samples of the batches in these slots, one batch after the other.

        Args:
            slots: int64 `[n]`, ascending, each in `range(schedule.slots)`.

        Returns:
            Sample indices `[sum(rows)]`, and the rows of each batch, int64 `[n]`.
        """
        whole = self.whole_steps * self.num_replicas
        positions = self.taken + slots[slots < whole]
        samples, rows = self.table.batch_samples(self.order.batch_at_position(positions), self.order.key(SAMPLES))
        if len(positions) == len(slots):
            return samples, rows
        pieces = [self._pieces[slot - whole] for slot in slots[slots >= whole].tolist()]
        return np.concatenate([samples, *pieces]), np.concatenate([rows, [len(piece) for piece in pieces]])

    def index_lists(self, slots: Integers) -> list[list[int]]:
        """The samples of each of these batches, as lists of Python ints."""
        samples, rows = self.batch_samples(slots)
        flat, ends = samples.tolist(), np.cumsum(rows).tolist()
        return [flat[end - count : end] for end, count in zip(ends, rows.tolist(), strict=True)]

    def read_groups(self, slots: Integers) -> Integers:
        """The read group of each of these batches: batches of one group are read together; int64 `[n]`.

        Args:
            slots: int64 `[n]`, each in `range(schedule.slots)`; those of a split step are a group by themselves.
        """
        groups = np.full(len(slots), SPLIT)
        is_whole = slots < self.whole_steps * self.num_replicas
        groups[is_whole] = self.order.group_at_position(self.taken + slots[is_whole])
        return groups

    def slot_ranges(self) -> Iterator[Integers]:
        """All slots, as many at a time as are computed together.

        Yields:
            Slots, int64 `[n]`.
        """
        size = batches_at_once(self.table)
        for first in range(0, self.slots, size):
            yield np.arange(first, min(first + size, self.slots))

    def sample_slots(self) -> Iterator[tuple[Integers, IndexArray]]:
        """All samples, many at a time, with the slots of their batches.

        Yields:
            Slots int64 `[n]`, and sample indices `[n]`.
        """
        for slots in self.slot_ranges():
            samples, rows = self.batch_samples(slots)
            yield np.repeat(slots, rows), samples

    def measure_batches(self) -> BatchSizes:
        """Rows, widths and tokens of every batch, in the order of slots."""
        parts = [self.table.measure_batches(*self.batch_samples(slots)) for slots in self.slot_ranges()]
        return BatchSizes(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    @property
    def _drops(self) -> bool:
        return self.table.options.drop_last

    @property
    def _last_positions(self) -> Integers:
        """Positions of the last, partial step."""
        end = len(self.table)
        return np.arange(end - self.partial, end)

    @cached_property
    def _pieces(self) -> list[IndexArray]:
        """The last step, split by rows: a piece for each replica."""
        batch_ids = self.order.batch_at_position(self._last_positions)
        samples, rows = self.table.batch_samples(batch_ids, self.order.key(SAMPLES))
        pieces = self._even_pieces(samples)
        return pieces or split_batches(np.split(samples, np.cumsum(rows)[:-1]), self.num_replicas)

    def _even_pieces(self, samples: IndexArray) -> list[IndexArray] | None:
        """Cut the rows of the last step, sorted together, into pieces of even cost; None if one exceeds the budget."""
        table = self.table
        samples = samples[np.argsort(-table.sorted_lengths.sample_lengths(samples).sum(1), kind="stable")]
        single = _count_costs(table, table.measure_batches(samples, np.ones(len(samples), np.int64)))
        rows = cut_by_cost(
            single,
            self.num_replicas,
            measure=lambda rows: _count_costs(table, table.measure_batches(samples, rows)),
            limit=BUDGET_UNITS,
        )
        return None if rows is None else np.split(samples, rows.cumsum()[:-1])


def make_schedule(
    table: BatchTable, epoch: int, num_replicas: int, *, laid_for: int | None = None, taken: int = 0
) -> Schedule:
    """The remaining batches of an epoch.

    Args:
        table: The batches of any epoch.
        epoch: Number of the epoch.
        num_replicas: W, who take the remaining batches.
        laid_for: Replicas with which the epoch began, which decide its order; None for the same.
        taken: Positions of the order that are taken.

    Raises:
        ValueError: More batches are taken than the epoch has, or the last step has fewer rows than replicas.
    """
    laid_for = num_replicas if laid_for is None else laid_for
    epoch_table = table.for_epoch(epoch, laid_for)
    return Schedule(epoch_table, epoch_table.order(epoch, laid_for), taken, num_replicas)


def count_steps(table: BatchTable, num_replicas: int) -> int:
    """Steps of each replica in every epoch.

    Epochs have different batches: the trial epochs show now what could not be shared later.

    Raises:
        ValueError: The last step has fewer rows than replicas, or there is no step at all.
    """
    fewest = len(table)
    for epoch in table.trial_epochs:
        schedule = make_schedule(table, epoch, num_replicas)
        check_steps(schedule)
        fewest = min(fewest, schedule.steps)
    return fewest


def check_steps(schedule: Schedule) -> None:
    """Check that each replica has a batch.

    Raises:
        ValueError: There is no step.
    """
    if schedule.steps == 0:
        raise ValueError(
            f"an epoch must have a batch for each of {schedule.num_replicas} replicas, got {len(schedule.table)} "
            "batches in all and drop_last=True: use fewer replicas or smaller batches"
        )


def batches_at_once(table: BatchTable) -> int:
    """The number of batches that are computed together."""
    return 1 + SAMPLES_AT_ONCE * len(table) // len(table.sorted_lengths)


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


def _count_costs(table: BatchTable, sizes: BatchSizes) -> Integers:
    """Shares of the budget, or of the rows of a wide enough shape if that is more, in units.

    Rounded up, and integers, because sums of floats may differ between machines.
    """
    shares = np.minimum(np.maximum(table.budget_use(sizes), table.shape_fill(sizes)), 2.0)
    units: Integers = np.maximum(1, np.ceil(shares * BUDGET_UNITS)).astype(np.int64)
    return units
