"""The batch sampler: batches alike in length for a `DataLoader`, on any number of replicas, from any position."""

import os
import sys
from collections.abc import Iterator, Mapping
from copy import copy
from functools import partial
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

from collate.widths import Widths, check_count
from samplers.planning.budget import Cost, Count
from samplers.planning.options import Indices, Options, Overlong
from samplers.planning.plan import BatchPlan
from samplers.planning.schedule import Course, chunk_steps
from samplers.planning.sorting import Lengths
from samplers.planning.tables.batch_table import Shape
from samplers.planning.tables.choose_table import lay_out
from samplers.progress.position import Cursor, Pass, PositionDict, check_epoch, make_fingerprint, refuse_iterator_state


class LengthBucketBatchSampler(Sampler[list[int]]):
    """Batches of samples alike in length, every sample once an epoch: a `batch_sampler` of lists of Python ints.

    All replicas take the same number of batches in every epoch. An epoch advances by itself at its first batch. The
    cursor lives in the iterators, whose `state_dict` and `load_state_dict` a `StatefulDataLoader` uses; for any other
    loader `position` and `seek` do the same.

    Args:
        lengths: of all samples, in steps: integers `[N]`, or `[N, K]` for samples of K fields; a list, an array or a
            memory map, or an index that holds them.
        max_tokens: tokens in a batch at most, counted as `count` says.
        batch_size: rows in a batch at most.
        cost: a measure of one's own: `cost(rows, width) <= 1` fits. It is called with int64 arrays `[n]` (`width` is
            `[n, K]` for K fields), returns `[n]` numbers, and must not fall as rows or width grow.
        count: `"padded"`: `max_tokens` is rows x padded width, summed over fields. `"real"`: it is the sum of lengths.
        window: samples that are sorted by length together. More: less padding, and more pairs that meet again in the
            next epoch. It is rounded so that windows are even, and there are two at least, for with one the batches
            of an epoch would be those of any other. None: chosen from the number of batches.
        shuffle: False for batches in the order of length, longest first, the same each epoch.
        seed: of the shuffles, 0 to 2**64 - 1.
        min_length: shorter samples are left out and counted.
        max_length: longer ones count as this long; the collator's `max_length` cuts them. Make the collator with
            `PadCollator.for_sampler(sampler)`, and both have the same; otherwise the first iteration logs a warning
            with the number of longer samples.
        overlong: what happens to a sample that alone exceeds the budget: `"error"`, `"drop"` (left out and counted) or
            `"alone"` (a batch of one, counted).
        drop_last: drop the last, partial step, and the batch that `batch_size` leaves short, instead of splitting the
            rows of that step among the replicas.
        widths: padded widths, as the collator's: a multiple, or the allowed ones; None pads to the longest row. The
            collator must have the same, as one of `PadCollator.for_sampler(sampler)` has.
        indices: plan these samples only; None plans all.
        num_replicas: W; None takes the initialised process group's size, or 1.
        rank: of this process; None takes the process group's, or 0. `"all"` gives the batches of all replicas, step by
            step, to a loader that deals them out itself, as accelerate's `prepare` does: batch i goes to replica i % W.

    Raises:
        TypeError: Lengths or an option have the wrong type.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no budget is given, no batch is left to plan, or the last step has
            fewer rows than replicas.
        RuntimeError: A launcher started several processes, and their process group is not initialised, or accelerate
            may deal the batches out a second time.
    """

    def __init__(
        self,
        lengths: Lengths,
        *,
        max_tokens: int | None = None,
        batch_size: int | None = None,
        cost: Cost | None = None,
        count: Count = "padded",
        window: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        min_length: int = 0,
        max_length: int | None = None,
        overlong: Overlong = "error",
        drop_last: bool = False,
        widths: Widths = None,
        indices: Indices | None = None,
        num_replicas: int | None = None,
        rank: int | Literal["all"] | None = None,
    ) -> None:
        super().__init__()
        options = Options(
            max_tokens=max_tokens,
            batch_size=batch_size,
            cost=cost,
            count=count,
            window=window,
            shuffle=shuffle,
            seed=seed,
            min_length=min_length,
            max_length=max_length,
            overlong=overlong,
            drop_last=drop_last,
            widths=widths,
            indices=indices,
        )
        self.num_replicas, found = find_replica(num_replicas, 0 if rank == "all" else rank)
        self.rank: int | Literal["all"] = "all" if rank == "all" else found
        layout = lay_out(lengths, options)
        self._layout = layout
        self._cursor = Cursor(layout, self.num_replicas, partial(make_fingerprint, lengths, layout))
        # Other epochs are cut elsewhere: what cannot be shared is refused now, and not in one of them.
        self._steps = min(self.plan(epoch).steps for epoch in layout.trials)

    def __len__(self) -> int:
        """Batches of this replica in a whole epoch: the same in each, and on every replica."""
        return self._steps * self._share

    def __iter__(self) -> Iterator[list[int]]:
        """An iterator over one epoch's batches; which epoch is decided when it takes its first."""
        return BatchIterator(self._cursor, self.rank)

    def __copy__(self) -> "LengthBucketBatchSampler":
        new = self.__class__.__new__(self.__class__)
        # What a copy takes is none of the other's business.
        new.__dict__.update(self.__dict__, _cursor=copy(self._cursor))
        return new

    @property
    def _share(self) -> int:
        """Batches that an iterator gives in each step."""
        return self.num_replicas if self.rank == "all" else 1

    @property
    def sampler(self) -> "LengthBucketBatchSampler":
        """Itself: trainers look here for `set_epoch`."""
        return self

    @property
    def epoch(self) -> int:
        """The epoch that the next iterator begins."""
        return self._cursor.epoch

    @property
    def max_length(self) -> int | None:
        """The steps that longer samples are planned with, as given; `PadCollator.for_sampler` cuts to them."""
        return self._layout.options.max_length

    @property
    def widths(self) -> Widths:
        """The padded widths that batches are planned with, as given; `PadCollator.for_sampler` pads to them."""
        return self._layout.options.widths

    @property
    def shapes(self) -> list[Shape]:
        """The closed list of (rows, width) that batches have at most, in any epoch; width is a tuple for K fields.

        A batch that is split or left short is smaller than one of them.
        """
        return self._layout.shapes

    @property
    def remaining(self) -> int:
        """Batches that the next iterator will give: `len`, or fewer after `seek`."""
        return self._cursor.coming.steps * self._share

    @property
    def next_position(self) -> PositionDict:
        """Where the next iterator will begin: a position, as `position` gives those of the present iteration."""
        return self._cursor.save(self._cursor.coming, 0)

    def plan(self, epoch: int) -> BatchPlan:
        """All batches of an epoch, over all replicas.

        Raises:
            TypeError: The epoch is not an int.
            ValueError: The epoch is negative.
        """
        return BatchPlan(self._layout, check_epoch(epoch), self.num_replicas)

    def acknowledge_max_length(self) -> None:
        """Say that longer samples are cut to `max_length`, so that no warning is logged.

        `PadCollator.for_sampler` calls it; call it where a function of your own cuts them.
        """
        self._cursor.acknowledge_max_length()

    def set_epoch(self, epoch: int) -> None:
        """Let the next iterator begin this epoch; a position that was sought in another epoch is forgotten.

        Raises:
            TypeError: The epoch is not an int.
            ValueError: The epoch is negative.
        """
        self._cursor.set_epoch(epoch)

    def position(self, steps: int) -> PositionDict:
        """Where the epoch stands after this replica's first `steps` batches of the present iteration.

        A loader's workers run ahead of training, so that only the training loop knows how many batches it has used.

        Args:
            steps: batches that each replica has used since the present iteration began: the last that has taken a
                batch, or if none has since `seek` or `set_epoch` to another epoch, the one to come.

        Returns:
            Five primitive values, under 1 kB, the same on all replicas: for `seek`, or for an iterator's
            `load_state_dict`, on any number of replicas.

        Raises:
            TypeError: `steps` is not an int.
            ValueError: The iteration has fewer batches.
        """
        course = self._cursor.present
        steps = check_count("steps", steps, least=0, hint="count the batches used since the iteration began")
        if steps > course.steps:
            raise ValueError(f"steps must be at most {course.steps}, the iteration's batches, got {steps}")
        return self._cursor.save(course, steps)

    def seek(self, position: Mapping[str, Any]) -> None:
        """Let the first iterator that takes a batch go on from a position, once; the next begins the next epoch.

        `set_epoch` to the position's epoch keeps it, to another one clears it.

        Raises:
            TypeError: The position is not a mapping, or one of its values has the wrong type.
            ValueError: It is of other lengths, options, seed or version, or the rest of its epoch cannot be shared by
                this number of replicas.
        """
        self._cursor.seek(position)


class BatchIterator(Iterator[list[int]]):
    """One pass over an epoch, or over the rest of one: how far it has come is known here and nowhere else.

    Nothing is decided before the first batch is taken, since loaders make iterators that they never use.

    Args:
        cursor: shared with the sampler and its other iterators.
        rank: whose batches to give; `"all"` for those of all replicas, step by step.
    """

    def __init__(self, cursor: Cursor, rank: int | Literal["all"]) -> None:
        self._cursor = cursor
        # Batches of a step that are given here: from the first on, so many.
        self._first, self._share = (0, cursor.num_replicas) if rank == "all" else (rank, 1)
        self._pass: Pass | None = None
        self._begun = False
        self._taken = 0
        self._ready: list[list[int]] = []

    def __next__(self) -> list[int]:
        if self._pass is None or not self._begun:
            self._pass, self._begun = self._cursor.begin(self._pass), True
        if not self._ready:
            self._ready = self._next_batches(self._pass.course)
        if not self._ready:
            raise StopIteration
        self._taken += 1
        self._pass.taken = self._taken // self._share
        return self._ready.pop()

    def __copy__(self) -> "BatchIterator":
        new = self.__class__.__new__(self.__class__)
        new.__dict__.update(self.__dict__, _ready=self._ready.copy())
        return new

    def state_dict(self) -> PositionDict:
        """Where the epoch stands, in fresh primitive values, as `LengthBucketBatchSampler.position` gives it.

        Within a step, of which some replicas have their batch and others not, the state of `rank="all"` has two values
        more: how many batches of the step are `dealt`, to how many replicas (`num_replicas`).
        """
        steps, dealt = divmod(self._taken, self._share)
        state = self._cursor.save(self._cursor.coming if self._pass is None else self._pass.course, steps)
        return state | {"dealt": dealt, "num_replicas": self._share} if dealt else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position; the sampler's next iterator begins the epoch after it.

        Raises:
            TypeError: The position is not a mapping, or one of its values has the wrong type.
            ValueError: It is of other lengths, options, seed or version, the rest of its epoch cannot be shared by
                this number of replicas, or it lies within a step of other replicas.
        """
        course = self._cursor.read(state)
        dealt = self._read_dealt(state)
        self._pass = self._cursor.begin(Pass(course, sought=True))
        self._begun, self._taken, self._ready = False, dealt, []

    def _read_dealt(self, state: Mapping[str, Any]) -> int:
        """Batches of the step that comes that were given before.

        Raises:
            ValueError: It was a step of other replicas.
        """
        if "dealt" not in state:
            refuse_iterator_state(state)
            return 0
        dealt = check_count("dealt", state["dealt"], least=1, hint="it is part of a state within a step")
        if state.get("num_replicas") != self._share or dealt >= self._share:
            raise ValueError(
                f"a state within a step ({dealt} batches of {state.get('num_replicas')} dealt out) must be given to an "
                f'iterator of rank="all" and as many replicas, got one that gives {self._share} of each step: save '
                "when all replicas have had theirs"
            )
        return dealt

    def _next_batches(self, course: Course) -> list[list[int]]:
        """The next batches, last first: few at the start of an epoch, so that the first comes soon, and more later."""
        step, dealt = divmod(self._taken, self._share)
        ahead = min(8 * step + 1, 1 + chunk_steps(course.epoch.layout) // self._share)
        numbers = np.arange(step, min(step + ahead, course.steps))[:, None] * course.replicas + np.arange(
            self._first, self._first + self._share
        )
        return course.lists_of(numbers.ravel()[dealt:])[::-1] if len(numbers) else []


def find_replica(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """How many replicas there are, and which of them this process is.

    Args:
        num_replicas: None takes the initialised process group's size, or 1.
        rank: None takes the process group's rank, or 0 of 1.

    Raises:
        TypeError: One of them is not an int.
        ValueError: They are out of range, or `num_replicas` is given without a rank that could be found.
        RuntimeError: A launcher started several processes, and their process group is not initialised, or accelerate
            may deal the batches out a second time.
    """
    grouped = dist.is_available() and dist.is_initialized()
    if num_replicas is None:
        _refuse_missing_group(grouped=grouped)
        num_replicas = dist.get_world_size() if grouped else 1
        _refuse_second_sharding(num_replicas, rank)
    num_replicas = check_count("num_replicas", num_replicas, least=1, hint="one process is 1")
    if rank is None:
        if num_replicas > 1 and not grouped:
            raise ValueError(f"rank must be given with num_replicas={num_replicas}: no process group is initialised")
        rank = dist.get_rank() if grouped and num_replicas > 1 else 0
    rank = check_count("rank", rank, least=0, hint="count replicas from 0")
    if rank >= num_replicas:
        raise ValueError(f"rank must be below num_replicas={num_replicas}, got {rank}: count replicas from 0")
    return num_replicas, rank


def _refuse_second_sharding(num_replicas: int, rank: object) -> None:
    # accelerate's prepare takes every W-th batch of what is the W-th part already, and says nothing.
    accelerate = sys.modules.get("accelerate.state")
    if num_replicas > 1 and rank is None and accelerate is not None and accelerate.is_initialized():
        raise RuntimeError(
            f"accelerate runs {num_replicas} processes, and its prepare would deal this replica's share out a second "
            'time: give rank="all" to a batch sampler whose loader goes through prepare; or keep the loader out of it, '
            "and give rank=accelerator.process_index"
        )


def _refuse_missing_group(*, grouped: bool) -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if not grouped and world.isdigit() and int(world) > 1:
        raise RuntimeError(
            f"a launcher started {world} processes (WORLD_SIZE), but torch.distributed is not initialised, and every "
            "process would train on all samples: call init_process_group first, or give num_replicas and rank"
        )
