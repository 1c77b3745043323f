"""Lengths to batches: a plan holds all batches of an epoch, and is decided by lengths alone."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar, Unpack, overload

import numpy as np

from collate.widths import check_count
from samplers.planning.budget import Integers
from samplers.planning.options import Options, PlanOptions
from samplers.planning.report import LAGS, PlanReport, count_meeting, count_pairs, imbalance, lag_one
from samplers.planning.schedule import Course, Epoch
from samplers.planning.sorting import Lengths
from samplers.planning.tables.batch_table import Layout, Shape, Sizes
from samplers.planning.tables.choose_table import lay_out

T = TypeVar("T")


def plan_epoch(
    lengths: Lengths, *, epoch: int = 0, num_replicas: int = 1, **options: Unpack[PlanOptions]
) -> "BatchPlan":
    """Plan an epoch: the same lengths and options give the same plan on every rank, machine and version.

    Args:
        lengths: of all samples, in steps: integers `[N]`, or `[N, K]` for samples of K fields; a list, an array or a
            memory map, or an index that holds them.
        epoch: which one.
        num_replicas: W, how many share each step.
        options: those of `LengthBucketBatchSampler`.

    Returns:
        The plan; its batches are computed as they are asked for.

    Raises:
        TypeError: Lengths or an option have the wrong type.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no budget is given, no batch is left to plan, or the last step has
            fewer rows than replicas.

    Example:
        >>> plan = plan_epoch([3, 9, 4, 8, 3], max_tokens=20, shuffle=False)
        >>> list(plan.batches), plan.widths.tolist()
        ([[1, 3], [2, 0, 4]], [9, 4])
    """
    epoch = check_count("epoch", epoch, least=0, hint="count epochs from 0")
    replicas = check_count("num_replicas", num_replicas, least=1, hint="one process is 1")
    return BatchPlan(lay_out(lengths, Options(**options)), epoch, replicas)


class BatchPlan:
    """All batches of an epoch, over all replicas: replica r takes batch `t * num_replicas + r` in step t.

    Args:
        layout: the batches by number, from `lay_out`.
        epoch: which one.
        num_replicas: W, batches in a step.

    Raises:
        ValueError: The last step has fewer rows than replicas, or there is no step at all.
    """

    def __init__(self, layout: Layout, epoch: int, num_replicas: int) -> None:
        self.layout = layout
        self.epoch = epoch
        self.num_replicas = num_replicas
        self.course = Course(Epoch(layout.of_epoch(epoch, num_replicas), epoch, num_replicas), 0, num_replicas)
        if self.course.steps == 0:
            raise ValueError(
                f"an epoch must have a batch for each of {num_replicas} replicas, got {len(layout)} batches in all and "
                "drop_last=True: use fewer replicas or smaller batches"
            )

    def __repr__(self) -> str:
        return f"BatchPlan(epoch={self.epoch}, batches={len(self.batches)}, num_replicas={self.num_replicas})"

    @property
    def batches(self) -> "PlannedBatches":
        """The batches as lists of Python ints, samples of one field longest first; computed as they are asked for."""
        return PlannedBatches(self.course)

    @property
    def steps(self) -> int:
        """Batches that every replica takes."""
        return self.course.steps

    @property
    def shapes(self) -> list[Shape]:
        """The closed list of (rows, width) that batches of any epoch have at most; many are smaller."""
        return self.layout.shapes

    @property
    def batch_shapes(self) -> list[Shape]:
        """The different (rows, padded width) of this epoch's batches, widest first: what a compiled model sees."""
        rows, widths, _ = self._sizes
        shapes = np.unique(np.column_stack([widths, rows]), axis=0)[::-1].tolist()
        return [(rows, width[0] if len(width) == 1 else tuple(width)) for *width, rows in shapes]

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

    def report(self) -> PlanReport:
        """What the plan holds, wastes and leaves out; this computes four whole epochs."""
        sizes, layout = self._sizes, self.layout
        later = [type(self)(layout, self.epoch + lag, self.num_replicas) for lag in LAGS]
        meeting = [self._share_meeting_again(plan) for plan in later]
        corpus = layout.corpus
        padded = sizes.rows * sizes.widths.sum(1)
        use = layout.use_of(sizes)
        rows = sizes.rows.reshape(-1, self.num_replicas).sum(1)
        overall, worst = imbalance(padded.reshape(-1, self.num_replicas))
        sequences, real = int(sizes.rows.sum()), int(sizes.tokens.sum())
        return PlanReport(
            sequences=sequences,
            real_tokens=real,
            padded_tokens=int(padded.sum()),
            batches=len(padded),
            steps=self.steps,
            padding=1 - real / int(padded.sum()),
            budget_use=float(use.mean()),
            greatest_use=float(use[sizes.rows > 1].max(initial=0)),
            short=corpus.short,
            dropped=corpus.dropped,
            unused=len(corpus) - sequences,
            alone=corpus.alone,
            meeting_again=meeting[0],
            meeting_again_in_2=meeting[1],
            meeting_again_in_5=meeting[2],
            shapes=len(self.batch_shapes),
            shapes_of_4=len({shape for plan in (self, *later) for shape in plan.batch_shapes}),
            autocorrelation=lag_one(self.tokens / rows),
            imbalance=overall,
            worst_step=worst,
        )

    def unsort(self, outputs: Sequence[Sequence[T]]) -> list[T | None]:
        """Put a whole epoch's results into the dataset's order.

        Args:
            outputs: a result for each batch of the plan, in the order of `batches`: a list, array or tensor with an
                entry for each of the batch's samples, in the order in which the batch names them.

        Returns:
            `[N]`: an entry for each sample of the dataset, None for one that the plan leaves out.

        Raises:
            ValueError: Batches, or a batch's entries, are not as many as the plan's.
        """
        if len(outputs) != len(self.batches):
            raise ValueError(f"outputs must hold the plan's {len(self.batches)} batches, got {len(outputs)}")
        ordered: list[T | None] = [None] * len(self.layout.corpus.lengths)
        for number, (batch, output) in enumerate(zip(self.batches, outputs, strict=True)):
            if len(output) != len(batch):
                raise ValueError(
                    f"outputs must match the plan, got {len(output)} for {len(batch)} rows, batch {number}"
                )
            for sample, entry in zip(batch, output, strict=True):
                ordered[sample] = entry
        return ordered

    @cached_property
    def _sizes(self) -> Sizes:
        parts = [self.layout.sizes_of(*self.course.samples_of(numbers)) for numbers in self.course.chunks()]
        return Sizes(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def _share_meeting_again(self, plan: "BatchPlan") -> float:
        """The share of this epoch's pairs that share a batch of another one's."""
        later = np.full(len(self.layout.corpus.lengths), -1, np.int32)
        for numbers in plan.course.chunks():
            samples, rows = plan.course.samples_of(numbers)
            later[samples] = np.repeat(numbers, rows)
        met = 0
        for numbers in self.course.chunks():
            samples, rows = self.course.samples_of(numbers)
            met += count_meeting(np.repeat(numbers, rows), later[samples])
        return met / max(1, count_pairs(self._sizes.rows))


class PlannedBatches(Sequence[list[int]]):
    """The batches of a course, computed as they are asked for."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def __len__(self) -> int:
        return self._course.batches

    @overload
    def __getitem__(self, place: int) -> list[int]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[int]]: ...
    def __getitem__(self, place: int | slice) -> Any:
        numbers = np.arange(len(self))[place]
        if not isinstance(place, slice):
            return self._course.lists_of(np.array([numbers]))[0]
        return [self._course.lists_of(np.array([number]))[0] for number in numbers]

    def __iter__(self) -> Iterator[list[int]]:
        for numbers in self._course.chunks():
            yield from self._course.lists_of(numbers)
