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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.sorting import IndexArray
from samplers.planning.tables.epoch_order import SAMPLES, EpochOrder
from samplers.planning.tables.epoch_table import EpochTable

# Batches are computed for many steps at once, as many as hold about this many samples: enough to hide the cost of a
# NumPy call, few enough that the arrays stay in the processor's cache.
SAMPLES_AT_ONCE: Final = 1 << 16
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

    table: EpochTable
    order: EpochOrder
    taken: int
    num_replicas: int

    def __post_init__(self) -> None:
        if self.taken > len(self.table):
            raise ValueError(f"a position must lie in an epoch of {len(self.table)} batches, got {self.taken}")
        if self.partial and not self._drops and not self.table.has_rows(self._last_batches, self.num_replicas):
            raise ValueError(
                f"the last step must have a {self.table.item} for each of {self.num_replicas} replicas, got "
                f"{self.last_rows} {self.table.item}s in {self.partial} batches: set drop_last=True, use fewer "
                f"replicas, or allow batches of more {self.table.item}s"
            )

    @property
    def slots(self) -> int:
        """Batches of the schedule, over all replicas."""
        return self.steps * self.num_replicas

    @property
    def whole_steps(self) -> int:
        """Steps in which every replica takes a whole batch."""
        return max(0, self.table.whole_batches - self.taken) // self.num_replicas

    @property
    def partial(self) -> int:
        """Batches that remain for the last step: fewer than replicas, or as many if one of them is short."""
        return len(self.table) - self.taken - self.whole_steps * self.num_replicas

    @property
    def steps(self) -> int:
        """Batches of each replica."""
        return self.whole_steps + (self.partial > 0 and not self._drops)

    @property
    def last_rows(self) -> int:
        """Rows of the batches of the last, partial step."""
        return int(self.table.batch_rows(self._last_batches).sum())

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

    @property
    def _drops(self) -> bool:
        return self.table.options.drop_last

    @property
    def _last_batches(self) -> Integers:
        """The batch ids of the last, partial step."""
        end = len(self.table)
        return self.order.batch_at_position(np.arange(end - self.partial, end))

    @cached_property
    def _pieces(self) -> list[IndexArray]:
        """The last step, split: a piece for each replica."""
        return self.table.share_batches(self._last_batches, self.order.key(SAMPLES), self.num_replicas)


def make_schedule(
    table: EpochTable, epoch: int, num_replicas: int, *, laid_for: int | None = None, taken: int = 0
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


def count_steps(table: EpochTable, num_replicas: int) -> int:
    """Steps of each replica in every epoch.

    Epochs have different batches: the trial epochs show now what could not be shared later.

    Raises:
        ValueError: The last step has fewer rows than replicas, or there is no step at all.
    """
    if table.whole_batches == len(table) and table.has_whole_steps(num_replicas):
        # Nothing is shared in any epoch, so that none has to be planned.
        schedules = [Schedule(table, table.order(0, num_replicas), 0, num_replicas)]
    else:
        schedules = [make_schedule(table, epoch, num_replicas) for epoch in table.trial_epochs]
    for schedule in schedules:
        check_steps(schedule)
    return min(schedule.steps for schedule in schedules)


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


def batches_at_once(table: EpochTable) -> int:
    """How many batches are computed together."""
    return 1 + SAMPLES_AT_ONCE * len(table) // table.planned
