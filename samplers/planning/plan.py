"""BatchPlan: all batches of an epoch, decided by the lengths alone."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar, overload

import numpy as np

from samplers.planning.budget import Floats, Integers
from samplers.planning.fitting.cost_fit import FittedCost
from samplers.planning.report import (
    LAGS,
    PlanReport,
    autocorrelation,
    count_pairs,
    count_repeated_pairs,
    measure_imbalance,
    measure_waiting,
    simulate_random_padding,
)
from samplers.planning.schedules.schedule import Schedule, check_steps, make_schedule
from samplers.planning.schedules.updates import Labels, RowsOf, Updates, make_updates
from samplers.planning.tables.batch_table import BatchSizes, BatchTable
from samplers.planning.tables.epoch_table import EpochTable, Shape

T = TypeVar("T")
TableT = TypeVar("TableT", bound=EpochTable)


class EpochPlan(Generic[TableT]):
    """All batches of an epoch, over all replicas: replica r takes batch `t * num_replicas + r` in step t.

    Args:
        table: The batches of any epoch.
        epoch: Number of the epoch.
        num_replicas: W, batches in a step.

    Raises:
        ValueError: The last step cannot be shared among the replicas, or there is no step at all.
    """

    def __init__(self, table: TableT, epoch: int, num_replicas: int) -> None:
        self.epoch = epoch
        self.num_replicas = num_replicas
        # A schedule has the order of this epoch; the table has what is the same in all, such as the shapes.
        self._table = table
        self._schedule = make_schedule(table, epoch, num_replicas)
        check_steps(self._schedule)

    def __repr__(self) -> str:
        batches = len(self.batches)
        return f"{type(self).__name__}(epoch={self.epoch}, batches={batches}, num_replicas={self.num_replicas})"

    @property
    def batches(self) -> "PlannedBatches":
        """The batches as lists of Python ints; computed when they are asked for."""
        return PlannedBatches(self._schedule)

    @property
    def steps(self) -> int:
        """Batches of each replica."""
        return self._schedule.steps

    def updates(
        self, *, accumulate: int | None = None, step_tokens: int | None = None, labels: Labels | None = None
    ) -> Updates:
        """The optimizer steps of a loop that accumulates gradients, and what each holds over all replicas.

        Args:
            accumulate: Batches of each replica in an update; the last update may have fewer.
            step_tokens: Instead, labelled tokens of an update over all replicas. It ends with the step that comes
                nearest: half a step off at most, except in the last update.
            labels: How many labelled tokens a sample has: integers `[N]`, or a function of the planned lengths, int64
                `[n]` or `[n, K]` -> `[n]`, such as `lambda lengths: lengths - 1` where each step predicts the next.
                None takes all real tokens, of all fields.

        Raises:
            TypeError: A number is not an int.
            ValueError: Neither or both of the first two are given, one is below 1, or labels are not one number from 0
                on for each sample.

        Examples:
            >>> from samplers import plan_epoch
            >>> updates = plan_epoch([5, 4, 4, 3, 2, 2], batch_size=1, shuffle=False).updates(step_tokens=8)
            >>> updates.batches.tolist(), updates.tokens.tolist()
            ([2, 2, 2], [9, 7, 4])
        """
        return make_updates(
            self._schedule, self._rows_of(), accumulate=accumulate, step_tokens=step_tokens, labels=labels
        )

    @property
    def milliseconds(self) -> Floats:
        """Predicted time of each replica in each step, if the `cost` is from `fit_cost`: float64 `[steps, W]`.

        A step lasts as long as its slowest replica, for which the others wait.

        Raises:
            ValueError: The plan's cost does not tell times.
        """
        predicted = self._predict()
        if predicted is None:
            raise ValueError("milliseconds need a cost from fit_cost, which the plan has not: give it as `cost`")
        return predicted

    def _rows_of(self) -> RowsOf | None:
        """What counts the rows of each step, where they hold several samples."""
        return None

    def _predict(self) -> Floats | None:
        """The same; None where the cost does not tell."""
        raise NotImplementedError

    def unsort(self, outputs: Sequence[Sequence[T]]) -> list[T | None]:
        """Put a whole epoch's results into the dataset's order.

        Args:
            outputs: A result for each batch of the plan, in the order of `batches`: a list, array or tensor with an
                entry for each of the batch's samples, in the order of the batch.

        Returns:
            `[N]`: an entry for each sample of the dataset, None for a sample that the plan leaves out.

        Raises:
            ValueError: The number of batches, or of a batch's entries, is not the plan's.
        """
        if len(outputs) != len(self.batches):
            raise ValueError(f"outputs must hold the plan's {len(self.batches)} batches, got {len(outputs)}")
        ordered: list[T | None] = [None] * self._schedule.table.dataset_size
        for slot, (batch, output) in enumerate(zip(self.batches, outputs, strict=True)):
            if len(output) != len(batch):
                raise ValueError(f"outputs must match the plan, got {len(output)} for {len(batch)} rows, batch {slot}")
            for sample_index, entry in zip(batch, output, strict=True):
                ordered[sample_index] = entry
        return ordered


class BatchPlan(EpochPlan[BatchTable]):
    """All batches of an epoch, over all replicas: replica r takes batch `t * num_replicas + r` in step t.

    `plan_epoch` makes one, and so does `plan` of a batch sampler or a shard stream. Samples of one field come longest
    first in a batch.

    Args:
        table: The batches of any epoch.
        epoch: Number of the epoch.
        num_replicas: W, batches in a step.

    Raises:
        ValueError: The last step has fewer rows than replicas, or there is no step at all.
    """

    @property
    def shapes(self) -> list[Shape]:
        """Shapes `(rows, (width, ...))`, a width for each field, that hold every batch of any epoch."""
        return self._table.shapes

    @property
    def batch_shapes(self) -> list[Shape]:
        """The different shapes of this epoch's batches, widest first: the shapes that a compiled model meets."""
        return self._sizes.shapes

    @property
    def widths(self) -> Integers:
        """Padded width of each batch: its longest row, rounded up by `widths`; int64 `[batches]` or `[batches, K]`."""
        widths: Integers = self._sizes.widths
        return widths[:, 0] if widths.shape[1] == 1 else widths

    @property
    def tokens(self) -> Integers:
        """Real tokens of each step over all replicas and fields: int64 `[steps]`."""
        tokens: Integers = self._sizes.tokens.reshape(-1, self.num_replicas).sum(1)
        return tokens

    @cached_property
    def random_padding(self) -> float:
        """Share of padding if the samples came in random order under the same budget: 0 to 1.

        It is simulated when it is first asked for, on at most a hundred thousand random samples.
        """
        return simulate_random_padding(self._table.sorted_lengths, self._table.options)

    def report(self) -> PlanReport:
        """The figures of the plan; this computes four whole epochs."""
        sizes, table, sorted_lengths = self._sizes, self._table, self._table.sorted_lengths
        later = [make_schedule(table, self.epoch + lag, self.num_replicas) for lag in LAGS]
        repeated = [self._share_repeated_pairs(schedule) for schedule in later]
        all_sizes = [sizes, *(measure_schedule(table, schedule) for schedule in later)]
        # Three samples of widths 8 and 2 are 3 x (8 + 2) padded tokens.
        padded = sizes.rows * sizes.widths.sum(1)
        use = table.budget_use(sizes)
        # Slots are numbered step by step, so that a row of this array is a step.
        rows = sizes.rows.reshape(-1, self.num_replicas).sum(1)
        step_milliseconds, waiting = measure_waiting(self._predict())
        imbalance, worst_imbalance = measure_imbalance(padded.reshape(-1, self.num_replicas))
        sequences, real_tokens = int(sizes.rows.sum()), int(sizes.tokens.sum())
        return PlanReport(
            sequences=sequences,
            real_tokens=real_tokens,
            padded_tokens=int(padded.sum()),
            batches=len(padded),
            steps=self.steps,
            padding=1 - real_tokens / int(padded.sum()),
            budget_use=float(use.mean()),
            max_budget_use=float(use[(sizes.rows > 1) | (use <= 1)].max(initial=0)),
            too_short=sorted_lengths.too_short,
            overlong_dropped=sorted_lengths.overlong_dropped,
            last_dropped=table.count_dropped(sequences),
            overlong_alone=sorted_lengths.overlong_alone,
            repeated_pairs=repeated[0],
            repeated_pairs_in_2=repeated[1],
            repeated_pairs_in_5=repeated[2],
            shapes=len(sizes.shapes),
            shapes_in_4_epochs=len({shape for each in all_sizes for shape in each.shapes}),
            autocorrelation=autocorrelation(self.tokens / rows),
            imbalance=imbalance,
            worst_imbalance=worst_imbalance,
            step_milliseconds=step_milliseconds,
            waiting=waiting,
        )

    def _predict(self) -> Floats | None:
        cost, sizes = self._table.options.cost, self._sizes
        if not isinstance(cost, FittedCost):
            return None
        return cost.milliseconds(sizes.rows, sizes.widths, sizes.tokens).reshape(-1, self.num_replicas)

    @cached_property
    def _sizes(self) -> BatchSizes:
        return measure_schedule(self._table, self._schedule)

    def _share_repeated_pairs(self, later: Schedule) -> float:
        """The share of this epoch's pairs that share a batch of another epoch."""
        # By sample index; -1 for samples that are in no batch, e.g. those that `drop_last` drops there.
        later_slot = np.full(len(self._table.sorted_lengths.lengths), -1, np.int32)
        for slots, samples in later.sample_slots():
            later_slot[samples] = slots
        repeated = 0
        for slots, samples in self._schedule.sample_slots():
            repeated += count_repeated_pairs(slots, later_slot[samples])
        return repeated / max(1, count_pairs(self._sizes.rows))


def measure_schedule(table: BatchTable, schedule: Schedule) -> BatchSizes:
    """Rows, widths and tokens of every batch of a schedule, in the order of its slots."""
    parts = [table.measure_batches(*schedule.batch_samples(slots)) for slots in schedule.slot_ranges()]
    return BatchSizes(*(np.concatenate(part) for part in zip(*parts, strict=True)))


class PlannedBatches(Sequence[list[int]]):
    """The batches of a schedule, computed when they are asked for."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def __len__(self) -> int:
        return self._schedule.slots

    @overload
    def __getitem__(self, slot: int) -> list[int]: ...
    @overload
    def __getitem__(self, slot: slice) -> list[list[int]]: ...
    def __getitem__(self, slot: int | slice) -> Any:
        slots = np.arange(len(self))[slot]
        if not isinstance(slot, slice):
            return self._schedule.index_lists(np.array([slots]))[0]
        # One by one, since a slice may be in any order.
        return [self._schedule.index_lists(np.array([one]))[0] for one in slots]

    def __iter__(self) -> Iterator[list[int]]:
        for slots in self._schedule.slot_ranges():
            yield from self._schedule.index_lists(slots)


def random_padding(plan: BatchPlan) -> float:
    """`plan.random_padding`, under the name that it had before it was a property."""
    return plan.random_padding
