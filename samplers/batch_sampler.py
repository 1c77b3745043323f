"""LengthBucketBatchSampler: batches of similar lengths for a `DataLoader`, for any number of replicas."""

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Unpack

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

from collate.widths import check_count
from samplers.planning.clipping import warn_of_longer
from samplers.planning.options import PlanOptions, make_options
from samplers.planning.schedule import batches_at_once, count_steps
from samplers.planning.sorting import Lengths
from samplers.planning.tables.pool_table import choose_table
from samplers.progress.epoch_cursor import EpochCursor, Iteration
from samplers.progress.loader import PlannedLoader
from samplers.progress.position import PositionDict, refuse_iterator_state


class LengthBucketBatchSampler(PlannedLoader, Sampler[list[int]]):
    """Batches of samples of similar length, each sample once an epoch: a `batch_sampler` of lists of Python ints.

    All replicas take the same number of batches in every epoch. The epoch advances by itself when an iterator takes its
    first batch. The state is in the iterators, whose `state_dict` and `load_state_dict` a `StatefulDataLoader` uses;
    for any other loader `position` and `seek` do the same.

    Args:
        lengths: Lengths of all samples, in time steps: integers `[N]`, or `[N, K]` for samples of K fields; a list, an
            array or a memory map, or an index that holds them.
        max_tokens: Tokens in a batch at most, counted as `count_tokens` says. This, `batch_size` or `cost` must be
            given; a batch keeps all limits that are given.
        batch_size: Rows in a batch at most.
        cost: A custom cost function: a batch fits if `cost(rows, width) <= 1`. It is called with int64 arrays `[n]`
            (`width` is `[n, K]` for K fields), returns `[n]` numbers, and must not fall as rows or width grow.
        count_tokens: `"padded"` (default): `max_tokens` limits rows x padded width, summed over fields. `"real"`: it
            limits the sum of lengths, for training without padding.
        window: Samples that are sorted by length together. More samples give less padding, and more pairs that share a
            batch again in the next epoch. It is rounded so that windows are even. There are at least two windows: with
            one, all epochs would have the same batches. None (default) chooses from the number of batches.
        shuffle: False for batches in the order of length, longest first, the same each epoch. Default True.
        seed: Seed of the shuffles, 0 to 2**64 - 1. Default 0.
        min_length: Shorter samples are left out and counted (with several fields: if any field is shorter). Default 0.
        max_length: Longer samples count as this long; the collator's `max_length` cuts them. Make the collator with
            `PadCollator.for_sampler(sampler)`, and both have the same; otherwise the first iteration logs a warning
            with the number of longer samples. Default None.
        overlong: What happens to a sample that alone exceeds the budget: `"error"` (default), `"drop"` (left out and
            counted) or `"alone"` (a batch of one row, counted).
        drop_last: Drop the last, partial step, and the batch that `batch_size` leaves short, instead of splitting the
            rows of that step among the replicas. Default False.
        widths: Padded widths, as the collator's: a multiple, or the allowed widths; None (default) pads to the longest
            row. The collator must have the same, as one from `PadCollator.for_sampler(sampler)` has.
        indices: Plan these samples only; None (default) plans all.
        num_replicas: W; None takes the initialised process group's size, or 1.
        rank: Rank of this process; None takes the process group's, or 0. `"all"` gives the batches of all replicas,
            step by step, to a loader that deals them itself, as accelerate's `prepare` does: batch i goes to replica
            i % W.

    Raises:
        TypeError: Lengths or an option have the wrong type, or an option is unknown.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no budget is given, no batch is left to plan, or the last step has
            fewer rows than replicas.
        RuntimeError: A launcher started several processes, and their process group is not initialised; or accelerate
            may split the batches a second time.

    Example:
        >>> sampler = LengthBucketBatchSampler([3, 9, 4, 8, 3], max_tokens=20, shuffle=False)
        >>> list(sampler), sampler.epoch
        ([[1, 3], [2, 0, 4]], 1)
    """

    _cursor: EpochCursor

    def __init__(
        self,
        lengths: Lengths,
        *,
        num_replicas: int | None = None,
        rank: int | Literal["all"] | None = None,
        **options: Unpack[PlanOptions],
    ) -> None:
        super().__init__()
        self.options = make_options(options)
        self.num_replicas, own_rank = find_replica(num_replicas, 0 if rank == "all" else rank)
        self.rank: int | Literal["all"] = "all" if rank == "all" else own_rank
        self._batches_per_step = self.num_replicas if rank == "all" else 1
        self._lengths = lengths
        self._table = choose_table(lengths, self.options)
        self._cursor = EpochCursor(self.num_replicas)
        self._is_cut_known = self.options.max_length is None
        # Refuses now what could not be shared in a later epoch.
        self._steps = count_steps(self._table, self.num_replicas)

    def __repr__(self) -> str:
        samples, who = len(self._table.sorted_lengths), f"num_replicas={self.num_replicas}, rank={self.rank!r}"
        return f"{type(self).__name__}({samples} samples, {self.options.describe()}, {who}, batches={len(self)})"

    def __len__(self) -> int:
        """Batches of this replica in a whole epoch: the same in each epoch, and on every replica."""
        return self._steps * self._batches_per_step

    def __iter__(self) -> "BatchIterator":
        """An iterator over one epoch's batches; it decides which epoch when it takes its first batch."""
        return BatchIterator(self, self._cursor)

    @property
    def sampler(self) -> "LengthBucketBatchSampler":
        """The sampler itself: trainers look here for `set_epoch`."""
        return self

    def acknowledge_max_length(self) -> None:
        """Say that longer samples are cut to `max_length`, so that no warning is logged.

        `PadCollator.for_sampler` calls it; call it if your own function cuts them.
        """
        self._is_cut_known = True

    def warn_of_longer_once(self) -> None:
        """Log how many samples are longer than `max_length`, unless that is known or was logged."""
        if not self._is_cut_known:
            warn_of_longer(self._table.sorted_lengths)
            self._is_cut_known = True


class BatchIterator(Iterator[list[int]]):
    """One iteration over an epoch, or over the remainder of one; only the iterator knows how far it is.

    Nothing is decided before the first batch is taken, since loaders make iterators that they never use.

    Args:
        sampler: The sampler whose batches it gives.
        cursor: The sampler's, shared with its other iterators.
    """

    def __init__(self, sampler: LengthBucketBatchSampler, cursor: EpochCursor) -> None:
        self._sampler, self._cursor = sampler, cursor
        # This iterator gives this many batches of each step; the first one is that of this rank.
        self._batches_per_step = sampler.num_replicas if sampler.rank == "all" else 1
        self._first_rank = 0 if sampler.rank == "all" else sampler.rank
        self._iteration: Iteration | None = None
        self._has_begun = False
        self._taken = 0
        self._ready: list[list[int]] = []

    def __next__(self) -> list[int]:
        if self._iteration is None or not self._has_begun:
            self._iteration = self._begin()
        if not self._ready:
            # Last batch first, so that `pop` gives them in order.
            self._ready = self._iteration.schedule.index_lists(self._next_slots(self._iteration))[::-1]
        if not self._ready:
            raise StopIteration
        self._taken += 1
        self._iteration.taken = self._taken // self._batches_per_step
        return self._ready.pop()

    def __copy__(self) -> "BatchIterator":
        new = self.__class__.__new__(self.__class__)
        new.__dict__.update(self.__dict__, _ready=self._ready.copy())
        return new

    def state_dict(self) -> PositionDict:
        """Where the epoch stands, in fresh primitive values, as `LengthBucketBatchSampler.position` gives it.

        In the middle of a step, where some replicas have their batch and others have not, the state of `rank="all"` has
        two more values: how many batches of the step are `dealt`, and to how many replicas (`num_replicas`).
        """
        steps, dealt = divmod(self._taken, self._batches_per_step)
        start = self._cursor.next_start if self._iteration is None else self._iteration.start
        state = self._sampler.position_after(start, steps)
        return state | {"dealt": dealt, "num_replicas": self._batches_per_step} if dealt else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a position; the sampler's next iterator begins the epoch after it.

        Raises:
            TypeError: The position is not a mapping, or one of its values has the wrong type.
            ValueError: It is of other lengths, options, seed or version, this number of replicas cannot share the
                remainder of its epoch, or it lies in the middle of a step of other replicas.
        """
        start = self._sampler.read_position(state)
        dealt = self._read_dealt(state)
        self._iteration = Iteration(start, self._sampler.schedule_from(start), is_resumed=True)
        # Noted now, and again at the first batch, because a trainer may call `set_epoch` in between.
        self._begin()
        self._has_begun, self._taken, self._ready = False, dealt, []

    def _begin(self) -> Iteration:
        """The iteration that was loaded, or the next one; it is noted as begun."""
        iteration = self._iteration
        if iteration is None:
            start = self._cursor.next_start
            iteration = Iteration(start, self._sampler.schedule_from(start), self._cursor.is_sought)
        self._sampler.warn_of_longer_once()
        self._cursor.begin(iteration)
        self._has_begun = True
        return iteration

    def _next_slots(self, iteration: Iteration) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Slots of the next batches: few at the start of an epoch, so that the first comes soon, and more later."""
        schedule = iteration.schedule
        step, dealt = divmod(self._taken, self._batches_per_step)
        # 1 step, then 9, 81, ...: up to as many as are computed together.
        ahead = min(8 * step + 1, 1 + batches_at_once(schedule.table) // self._batches_per_step)
        steps = np.arange(step, min(step + ahead, schedule.steps))
        ranks = np.arange(self._first_rank, self._first_rank + self._batches_per_step)
        return (steps[:, None] * schedule.num_replicas + ranks).ravel()[dealt:]

    def _read_dealt(self, state: Mapping[str, Any]) -> int:
        """Batches of the next step that were given before.

        Raises:
            ValueError: It was a step of other replicas.
        """
        if "dealt" not in state:
            refuse_iterator_state(state)
            return 0
        dealt = check_count("dealt", state["dealt"], least=1, hint="it is part of a state in the middle of a step")
        if state.get("num_replicas") != self._batches_per_step or dealt >= self._batches_per_step:
            raise ValueError(
                f"a state within a step ({dealt} batches of {state.get('num_replicas')} dealt out) must be given to an "
                f'iterator of rank="all" and as many replicas, got one that gives {self._batches_per_step} of each '
                "step: save when all replicas have had theirs"
            )
        return dealt


def find_replica(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """How many replicas there are, and which of them this process is.

    Args:
        num_replicas: None takes the initialised process group's size, or 1.
        rank: None takes the process group's rank, or 0 if there is none.

    Raises:
        TypeError: One of them is not an int.
        ValueError: They are out of range, or `num_replicas` is given without a rank and there is no process group.
        RuntimeError: A launcher started several processes, and their process group is not initialised; or accelerate
            may split the batches a second time.
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
    """Refuse a sampler of one rank where accelerate would split its batches among the ranks again.

    Raises:
        RuntimeError: accelerate would.
    """
    # accelerate's prepare would silently take every W-th batch of this rank's batches. Only if the program has imported
    # accelerate can it be in use; importing it here would make every start slow.
    accelerate = sys.modules.get("accelerate.state")
    if num_replicas > 1 and rank is None and accelerate is not None and accelerate.is_initialized():
        raise RuntimeError(
            f"accelerate runs {num_replicas} processes, and its prepare would split this replica's batches a second "
            'time: give rank="all" to a batch sampler whose loader goes through prepare; or keep the loader out of it, '
            "and give rank=accelerator.process_index"
        )


def _refuse_missing_group(*, grouped: bool) -> None:
    """Refuse a sampler in a process that a launcher started, but that does not know the other processes.

    Raises:
        RuntimeError: There are others, and no process group.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if not grouped and world.isdigit() and int(world) > 1:
        raise RuntimeError(
            f"a launcher started {world} processes (WORLD_SIZE), but torch.distributed is not initialised, and every "
            "process would train on all samples: call init_process_group first, or give num_replicas and rank"
        )
