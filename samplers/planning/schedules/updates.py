"""Updates: which steps of an iteration make up each optimizer step, and what it holds over all replicas.

A replica that accumulates gradients runs several batches before the optimizer moves. The plan knows all batches of all
replicas, so that the scale of a loss needs no communication.

Five steps of 9, 9, 9, 9 and 4 tokens; an optimizer step should have 20:

>>> ends_near(np.array([9, 9, 9, 9, 4]), 20).tolist()
[2, 4, 5]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from collate.widths import check_count
from samplers.planning.budget import Integers
from samplers.planning.schedules.schedule import Schedule
from samplers.planning.tables.epoch_table import EpochTable

# Labels of samples: of all of them `[N]`, or from the lengths of some, `[n]` or `[n, K]` -> `[n]`.
Labels: TypeAlias = npt.ArrayLike | Callable[[Integers], npt.ArrayLike]

_NO_UPDATE: Final = "give accumulate, batches of each replica, or step_tokens, labelled tokens of all replicas"


@dataclass(frozen=True)
class Update:
    """One optimizer step, as one of its batches asks for it.

    Attributes:
        number: Its number in the iteration, from 0.
        is_last: Whether the batch is the last one: the optimizer moves after it.
        batches: Batches of each replica.
        tokens: Tokens with labels, over all batches and replicas.
        documents: Samples, or documents of packed rows, over all batches and replicas.
        rows: Rows; for packed batches, those that hold the documents.
        num_replicas: W.
    """

    number: int
    is_last: bool
    batches: int
    tokens: int
    documents: int
    rows: int
    num_replicas: int

    @property
    def token_scale(self) -> float:
        """What to multiply a batch's sum of losses by: W / tokens, for the mean over all tokens; 0 if there is none.

        DDP averages gradients over W replicas, which the factor W undoes.
        """
        return self.num_replicas / self.tokens if self.tokens else 0.0

    @property
    def document_scale(self) -> float:
        """What to multiply a batch's sum of documents' means by: W / documents, for the mean over all documents."""
        return self.num_replicas / self.documents


class Updates:
    """The optimizer steps of an iteration: run `u` has the batches from `ends[u - 1]` to before `ends[u]`.

    A sampler's `updates` makes them. They are the same on all replicas.

    Attributes:
        ends: Batches of each replica after which an update is complete, int64 `[U]`.
        num_replicas: W.

    Args:
        schedule: The batches.
        ends: As above.
        step_sums: Labelled tokens and documents of each step over all replicas, int64 `[steps, 2]`.
        rows_of: Rows of each step; None where each sample is a row.
    """

    def __init__(self, schedule: Schedule, ends: Integers, step_sums: Integers, rows_of: "RowsOf | None") -> None:
        self.ends, self.num_replicas = ends, schedule.num_replicas
        self._schedule, self._step_sums, self._rows_of = schedule, step_sums, rows_of

    def __len__(self) -> int:
        return len(self.ends)

    def __repr__(self) -> str:
        batches = int(self.ends[-1]) if len(self) else 0
        return f"Updates({len(self)} updates of {batches} batches, num_replicas={self.num_replicas})"

    @cached_property
    def batches(self) -> Integers:
        """Batches of each replica in each update, int64 `[U]`."""
        return np.diff(self.ends, prepend=0)

    @cached_property
    def tokens(self) -> Integers:
        """Tokens with labels in each update, over all replicas: int64 `[U]`."""
        tokens: Integers = self._sum(self._step_sums[:, 0])
        return tokens

    @cached_property
    def documents(self) -> Integers:
        """Samples or documents in each update, over all replicas: int64 `[U]`."""
        documents: Integers = self._sum(self._step_sums[:, 1])
        return documents

    @cached_property
    def rows(self) -> Integers:
        """Rows in each update, over all replicas: int64 `[U]`."""
        return self.documents if self._rows_of is None else self._sum(self._rows_of(self._schedule))

    def total(self, values: npt.ArrayLike) -> Any:
        """Sums of a number of each sample, such as its weight, in each update.

        Args:
            values: One for each sample of the dataset, `[N]`, and for each piece of split ones after them.

        Returns:
            `[U]`, int64 for integers or float64.

        Raises:
            ValueError: There is not one for each sample, or one is not finite.
        """
        array = _per_sample(values, self._schedule.table, "values")
        zeros = np.zeros(self._schedule.steps, array.dtype)
        return self._sum(_sum_steps(self._schedule, array.__getitem__, zeros))

    def at(self, batch: int, before: int = 0) -> Update:
        """The update to which a batch belongs.

        Args:
            batch: Number of the batch among those of its replica, from 0 at the start of the iteration.
            before: Batches that come before these.

        Raises:
            TypeError: `batch` is not an int.
            ValueError: The iteration has fewer batches.
        """
        batch = before + check_count("batch", batch, least=0, hint="count batches from 0 where the iteration starts")
        number = int(np.searchsorted(self.ends, batch, side="right"))
        if number == len(self):
            last = int(self.ends[-1]) if len(self) else 0
            raise ValueError(
                f"batch must be below {last - before}, the batches of the iteration, got {batch - before}: count them "
                "from 0 in each iteration"
            )
        return Update(
            number=number,
            is_last=bool(batch + 1 == self.ends[number]),
            batches=int(self.batches[number]),
            tokens=int(self.tokens[number]),
            documents=int(self.documents[number]),
            rows=int(self.rows[number]),
            num_replicas=self.num_replicas,
        )

    def _sum(self, of_steps: Any) -> Any:
        """Sums of runs of steps."""
        starts = self.ends - self.batches
        return np.add.reduceat(of_steps, starts) if len(starts) else of_steps[:0]


# Rows of each step of a schedule, int64 `[steps]`.
RowsOf: TypeAlias = Callable[[Schedule], Integers]


def make_updates(
    schedule: Schedule,
    rows_of: RowsOf | None = None,
    *,
    accumulate: int | None = None,
    step_tokens: int | None = None,
    labels: Labels | None = None,
) -> Updates:
    """The updates of the remaining batches of an epoch.

    Args:
        schedule: The batches.
        rows_of: Rows of each step; None where each sample is a row.
        accumulate: Batches of each replica in an update; the last one may have fewer.
        step_tokens: Labelled tokens of an update, over all replicas.
        labels: How many labelled tokens a sample has; None takes all its real tokens.

    Raises:
        TypeError: A number is not an int.
        ValueError: Neither or both of the first two are given, one is below 1, or labels are not one number from 0 on
            for each sample.
    """
    if (accumulate is None) == (step_tokens is None):
        got = "neither" if accumulate is None else "both"
        raise ValueError(f"accumulate or step_tokens must be given, got {got}: {_NO_UPDATE}")
    tokens_of = _labels_of(schedule, labels)
    sums = _sum_steps(
        schedule,
        lambda samples: np.stack([tokens_of(samples), np.ones(len(samples), np.int64)], axis=1),
        np.zeros((schedule.steps, 2), np.int64),
    )
    if accumulate is not None:
        each = check_count("accumulate", accumulate, least=1, hint=_NO_UPDATE)
        ends = np.append(np.arange(each, schedule.steps, each), schedule.steps)
    else:
        ends = ends_near(sums[:, 0], check_count("step_tokens", step_tokens, least=1, hint=_NO_UPDATE))
    return Updates(schedule, ends[: schedule.steps].astype(np.int64), sums, rows_of)


def ends_near(tokens: Integers, target: int) -> Integers:
    """The steps after which updates end, each with as nearly `target` tokens as whole steps allow.

    Args:
        tokens: Of each step, int64 `[steps]`.
        target: Tokens of an update. It is missed by half a step's tokens at most, except in the last update.

    Returns:
        int64 `[U]`, ascending; the last is the number of steps.
    """
    sums, steps = np.cumsum(tokens), len(tokens)
    ends: list[int] = []
    first, before = 0, 0
    while first < steps:
        # The step with which the target is reached.
        end = int(np.searchsorted(sums, before + target)) + 1
        if first < end - 1 and end <= steps:
            over, under = int(sums[end - 1]) - before - target, before + target - int(sums[end - 2])
            end -= under <= over
        first = min(end, steps)
        before = int(sums[first - 1])
        ends.append(first)
    return np.array(ends, np.int64)


def _per_sample(values: npt.ArrayLike, table: EpochTable, name: str) -> Any:
    """Numbers of all samples, checked: `[N]`, int64 or float64.

    Args:
        values: Of all samples, `[N]`.
        table: Knows how many there are.
        name: Of the values, for messages.

    Raises:
        ValueError: There is not one for each sample, or one is not finite.
    """
    array = np.asarray(values)
    if array.shape != (table.dataset_size,):
        pieces = getattr(table, "pieces", None)
        counted = "" if pieces is None else f", with the {len(pieces.samples)} pieces of split ones after them"
        raise ValueError(
            f"{name} must be one number for each of {table.dataset_size} samples{counted}, got {list(array.shape)}"
        )
    array = array.astype(np.int64 if array.dtype.kind in "iub" else np.float64)
    if not np.isfinite(array).all():
        sample = int((~np.isfinite(array)).argmax())
        raise ValueError(f"{name} must be finite, got {array[sample]} for sample {sample}")
    return array


def _labels_of(schedule: Schedule, labels: Labels | None) -> Callable[[Any], Any]:
    """How many labelled tokens samples have.

    Raises:
        ValueError: Labels are not integers from 0 on, one for each sample.
    """
    lengths_of = schedule.table.sample_lengths
    if labels is None:
        return lambda samples: lengths_of(samples).sum(1)
    if not callable(labels):
        given = np.asarray(labels)
        _check_labels(given, None)
        array = _per_sample(given, schedule.table, "labels")
        return lambda samples: array[samples]

    def count(samples: Any) -> Integers:
        lengths = lengths_of(samples)
        found = np.asarray(labels(lengths[:, 0] if lengths.shape[1] == 1 else lengths))
        if found.shape != (len(samples),):
            shape = list(found.shape)
            raise ValueError(f"labels must return one number for each of {len(samples)} lengths, got {shape}")
        _check_labels(found, lengths)
        return found.astype(np.int64)

    return count


def _check_labels(labels: npt.NDArray[Any], lengths: Integers | None) -> None:
    """Refuse what counts no tokens.

    Raises:
        ValueError: There is a number below 0, or that is not an integer.
    """
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got dtype {labels.dtype}")
    if (labels < 0).any():
        entry = int((labels < 0).argmax())
        of = f"sample {entry}" if lengths is None else f"a length of {lengths[entry].tolist()}"
        raise ValueError(f"labels must be 0 or more, got {labels[entry]} for {of}")


def _sum_steps(schedule: Schedule, values_of: Callable[[Any], Any], total: Any) -> Any:
    """Add numbers of each sample to the sums of its step.

    Args:
        schedule: The batches.
        values_of: Sample indices `[n]` -> `[n]` or `[n, k]`.
        total: Zeros, `[steps]` or `[steps, k]`.

    Returns:
        `total`.
    """
    for slots, samples in schedule.sample_slots():
        np.add.at(total, slots // schedule.num_replicas, values_of(samples))
    return total
