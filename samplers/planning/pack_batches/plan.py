"""PackPlan: all rows of an epoch, decided by the lengths alone."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

from samplers.planning.budget import Floats, Integers
from samplers.planning.fitting.cost_fit import FittedCost
from samplers.planning.pack_batches.packed_table import BatchRows, PackedTable
from samplers.planning.pack_batches.report import (
    PackReport,
    chance_of_pairs,
    measure_balance,
    measure_spread,
    share_repeated,
)
from samplers.planning.packs.documents import to_units
from samplers.planning.plan import EpochPlan
from samplers.planning.report import LAGS, measure_waiting
from samplers.planning.schedules.schedule import Schedule, make_schedule
from samplers.planning.schedules.updates import RowsOf


class PackPlan(EpochPlan[PackedTable]):
    """All batches of an epoch of packs, over all replicas: replica r takes batch `t * num_replicas + r` in step t.

    `plan` of a packing sampler makes one. A batch is a list of documents in row order; `rows` has them row by row.

    Args:
        table: The batches of any epoch.
        epoch: Number of the epoch.
        num_replicas: W, batches in a step.

    Raises:
        ValueError: The last rows have fewer documents than replicas, or there is no step at all.
    """

    @property
    def rows(self) -> "PlannedRows":
        """The rows of each batch, as lists of Python ints; computed when they are asked for."""
        return PlannedRows(self._schedule)

    @property
    def tokens(self) -> Integers:
        """Real tokens of each step over all replicas and fields: int64 `[steps]`."""
        tokens: Integers = _sum_runs(self._steps_of_documents.sum(1), self._step_sizes)
        return tokens

    @cached_property
    def row_fill(self) -> Floats:
        """The share of its capacity that each row uses, of its fullest field: float64 `[rows]`."""
        capacity = np.array(self._table.packs.limits.capacity)
        fill: Floats = (_sum_runs(self._steps_of_documents, self._rows.documents) / capacity).max(1)
        return fill

    @property
    def row_documents(self) -> Integers:
        """Documents of each row: int64 `[rows]`."""
        return self._rows.documents

    @cached_property
    def batch_costs(self) -> Floats:
        """Cost of each replica's batch in each step: float64 `[steps, W]`; without `cost`, its steps."""
        costs: Floats = _sum_runs(self._costs_of_documents, self._rows.sizes)
        return costs.reshape(-1, self.num_replicas)

    def report(self) -> PackReport:
        """What the plan holds, wastes and leaves out; this computes four whole epochs."""
        table, sizes = self._table, self._rows.documents
        rows = np.repeat(np.arange(len(sizes)), sizes)
        repeated = []
        for lag in LAGS:
            later = all_rows(make_schedule(table, self.epoch + lag, self.num_replicas))
            row_of = np.full(table.dataset_size, -1, np.int32)
            row_of[later.samples] = np.repeat(np.arange(len(later.documents)), later.documents)
            repeated.append(share_repeated(rows, self._rows.samples, row_of, sizes))
        steps = self._steps_of_documents
        step_milliseconds, waiting = measure_waiting(self._predict())
        imbalance, worst, mean = measure_balance(self.batch_costs.ravel(), self.num_replicas)
        capacity = np.array(table.packs.limits.capacity)
        documents = len(self._rows.samples)
        return PackReport(
            documents=documents,
            real_tokens=int(steps.sum()),
            rows=len(sizes),
            batches=len(self.batches),
            steps=self.steps,
            waste=1 - float((steps.sum(0) / (capacity * len(sizes))).max()),
            least_full=float(self.row_fill.min()),
            documents_per_row=float(sizes.mean()),
            documents_deviation=float(sizes.std() / sizes.mean()),
            too_short=table.too_short,
            overlong_dropped=table.dropped,
            overlong_split=0 if table.pieces is None else len(np.unique(table.pieces.samples)),
            last_dropped=table.count_dropped(documents),
            repeated_pairs=repeated[0],
            repeated_pairs_in_2=repeated[1],
            repeated_pairs_in_5=repeated[2],
            random_pairs=chance_of_pairs(sizes),
            imbalance=imbalance,
            worst_imbalance=worst,
            costliest_document=float(self._costs_of_documents.max()) / mean,
            spread=measure_spread(steps.sum(1), self._step_sizes),
            step_milliseconds=step_milliseconds,
            waiting=waiting,
        )

    def _predict(self) -> Floats | None:
        cost = self._table.packs.limits.cost
        return self.batch_costs + cost.factors["constant"] if isinstance(cost, FittedCost) else None

    def _rows_of(self) -> RowsOf:
        return rows_of_steps

    @cached_property
    def _rows(self) -> BatchRows:
        return all_rows(self._schedule)

    @cached_property
    def _steps_of_documents(self) -> Integers:
        return self._table.sample_lengths(self._rows.samples)

    @cached_property
    def _costs_of_documents(self) -> Floats:
        """What each document costs: float64 `[n]`."""
        limits, steps = self._table.packs.limits, self._steps_of_documents
        if limits.cost is None:
            return np.asarray(steps.sum(1), np.float64)
        return limits.costs(to_units(steps, limits.multiple))

    @cached_property
    def _step_sizes(self) -> Integers:
        """Documents of each step: int64 `[steps]`."""
        sizes: Integers = self._rows.sizes.reshape(-1, self.num_replicas).sum(1)
        return sizes


class PlannedRows(Sequence[list[list[int]]]):
    """The rows of the batches of a schedule, computed when they are asked for."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def __len__(self) -> int:
        return self._schedule.slots

    @overload
    def __getitem__(self, slot: int) -> list[list[int]]: ...
    @overload
    def __getitem__(self, slot: slice) -> list[list[list[int]]]: ...
    def __getitem__(self, slot: int | slice) -> Any:
        slots = np.arange(len(self))[slot]
        if not isinstance(slot, slice):
            return _row_lists(rows_in_slots(self._schedule, np.array([slots])))[0]
        return [_row_lists(rows_in_slots(self._schedule, np.array([one])))[0] for one in slots]

    def __iter__(self) -> Iterator[list[list[int]]]:
        for slots in self._schedule.slot_ranges():
            yield from _row_lists(rows_in_slots(self._schedule, slots))


def all_rows(schedule: Schedule) -> BatchRows:
    """The rows of all slots."""
    return _join([rows_in_slots(schedule, slots) for slots in schedule.slot_ranges()])


def rows_of_steps(schedule: Schedule) -> Integers:
    """Rows of each step over all replicas: int64 `[steps]`."""
    rows: Integers = all_rows(schedule).rows.reshape(-1, schedule.num_replicas).sum(1)
    return rows


def rows_in_slots(schedule: Schedule, slots: Integers) -> BatchRows:
    """The rows of the batches in these slots, int64 `[n]`, at least one, ascending."""
    table: Any = schedule.table
    whole = schedule.whole_steps * schedule.num_replicas
    parts = []
    if (slots < whole).any():
        positions = schedule.taken + slots[slots < whole]
        parts.append(table.rows_of_batches(schedule.order.batch_at_position(positions)))
    if (slots >= whole).any():
        last = np.arange(len(table) - schedule.partial, len(table))
        shares = table.share_rows_of(schedule.order.batch_at_position(last), schedule.num_replicas)
        parts += [shares[slot - whole] for slot in slots[slots >= whole].tolist()]
    return _join(parts)


def _join(parts: list[BatchRows]) -> BatchRows:
    return BatchRows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _row_lists(batches: BatchRows) -> list[list[list[int]]]:
    """For each batch its rows, as lists of samples."""
    rows = [row.tolist() for row in np.split(batches.samples, np.cumsum(batches.documents)[:-1])]
    ends = np.cumsum(batches.rows).tolist()
    return [rows[end - count : end] for end, count in zip(ends, batches.rows.tolist(), strict=True)]


def _sum_runs(values: Any, sizes: Integers) -> Any:
    """Sums of runs of these sizes, at least one each."""
    return np.add.reduceat(values, np.cumsum(sizes) - sizes)
