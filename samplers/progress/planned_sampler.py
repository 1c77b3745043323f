"""PlannedBatchSampler: a `batch_sampler` over planned batches, and the iterators that know how far an epoch is."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from collate.widths import check_count
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.schedules.schedule import batches_at_once, count_steps
from samplers.planning.sorting import Lengths
from samplers.progress.epoch_cursor import EpochCursor, Iteration
from samplers.progress.loader import PlannedLoader
from samplers.progress.plan_follower import PlanFollower
from samplers.progress.position import Position, PositionDict, refuse_iterator_state
from samplers.progress.replica import find_replica


class PlannedBatchSampler(PlannedLoader, Sampler[list[int]]):
    """Planned batches of one replica, or of all, as lists of Python ints; each sample comes once an epoch.

    Args:
        lengths: What is planned, with the fingerprint that an index has; or a mixture.
        num_replicas: W; None takes the initialised process group's size, or 1.
        rank: Rank of this process; None takes the group's or task's, or 0. `"all"` gives the batches of all replicas,
            step by step.

    Raises:
        TypeError: `num_replicas` or `rank` is not an int.
        ValueError: One of them is out of its range, or the replicas cannot share the last step.
        RuntimeError: A launcher started several processes, and their process group is not initialised; or accelerate
            may split the batches a second time.
    """

    _cursor: EpochCursor

    def __init__(self, lengths: Lengths | Mixture, num_replicas: int | None, rank: int | Literal["all"] | None) -> None:
        super().__init__()
        self.num_replicas, own_rank = find_replica(num_replicas, 0 if rank == "all" else rank)
        self.rank: int | Literal["all"] = "all" if rank == "all" else own_rank
        self._batches_per_step = self.num_replicas if rank == "all" else 1
        self._lengths = lengths
        self._table = self._make_table(lengths)
        self._cursor = EpochCursor(self.num_replicas)
        # Refuses now what could not be shared in a later epoch.
        self._steps = count_steps(self._table, self.num_replicas)

    def __repr__(self) -> str:
        samples, who = self._table.planned, f"num_replicas={self.num_replicas}, rank={self.rank!r}"
        return f"{type(self).__name__}({samples} samples, {self.options.describe()}, {who}, batches={len(self)})"

    def __len__(self) -> int:
        """Batches of this replica in a whole epoch: the same in each epoch, and on every replica."""
        return self._steps * self._batches_per_step

    def __iter__(self) -> "BatchIterator":
        """An iterator over one epoch's batches; it decides which epoch when it takes its first batch."""
        return BatchIterator(self, self._cursor)

    @abstractmethod
    def _make_table(self, lengths: Lengths | Mixture) -> Any:
        """The batches of any epoch of these lengths, with this sampler's options."""

    @property
    def possible_starts(self) -> tuple[Position, ...]:
        """Where the epoch that is being read may have begun: the last iteration, or the next one."""
        return self._cursor.last_start[0], self._cursor.next_start

    def follower(self) -> PlanFollower:
        """What finds the batches that come next, for a dataset that reads them ahead.

        Raises:
            ValueError: The sampler gives the batches of all ranks.
        """
        if self.rank == "all":
            raise ValueError('a sampler of rank="all" cannot be followed: a process reads the batches of one rank')
        return PlanFollower(self)

    @property
    def sampler(self) -> "PlannedBatchSampler":
        """Itself: trainers look here for `set_epoch`."""
        return self

    def _note_start(self) -> None:
        """Called when an iteration begins."""


class BatchIterator(Iterator[list[int]]):
    """One iteration over an epoch, or over the remainder of one; only the iterator knows how far it is.

    Nothing is decided before the first batch is taken, since loaders make iterators that they never use.

    Args:
        sampler: The sampler whose batches it gives.
        cursor: The sampler's, shared with its other iterators.
    """

    def __init__(self, sampler: PlannedBatchSampler, cursor: EpochCursor) -> None:
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
        """Where the epoch stands, in fresh primitive values, as `position` of the sampler gives it.

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
        self._sampler._note_start()  # noqa: SLF001
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
