"""Which batches a loader will ask for next, given one that it asks for now.

A loader's workers get lists of indices, and not their position in the plan. With two workers, worker 1 is asked for the
batches 1, 3, 5, ...: asked for batch 3, it finds that at step 3 of the epoch, and reads batch 5 ahead.
"""

from typing import Final, Literal, Protocol

import numpy as np

from samplers.planning.schedules.schedule import Schedule
from samplers.planning.sorting import IndexArray
from samplers.progress.position import Position

# Steps that are searched for a batch, from each position where an epoch may have begun.
_SEARCHED: Final = 512
# Steps that are planned together.
_TOGETHER: Final = 64
# Batches that are left alone at most after one that was not found.
_LONGEST_PAUSE: Final = 1024


class Planned(Protocol):
    """A batch sampler of planned epochs.

    Attributes:
        num_replicas: W.
        rank: Rank of the batches that it gives.
    """

    num_replicas: int
    rank: int | Literal["all"]

    @property
    def possible_starts(self) -> tuple[Position, ...]:
        """Where the epoch that is being read may have begun."""
        ...

    def schedule_from(self, start: Position) -> Schedule:
        """The batches from a position on."""
        ...


class PlanFollower:
    """Finds batches in a sampler's plan.

    Args:
        sampler: A sampler of one rank. In a worker, its copy stands where the original stood when the worker began.
    """

    def __init__(self, sampler: Planned) -> None:
        self._sampler = sampler
        self._start: Position | None = None
        self._schedule: Schedule | None = None
        self._step = 0
        self._planned: dict[int, IndexArray] = {}
        self._pause = self._paused = 0

    def find(self, batch: IndexArray, every: int) -> int | None:
        """The step of a batch; None if it is not found.

        Args:
            batch: Sample indices, int64 `[B]`.
            every: The loader's workers: this one is asked for each `every`-th batch.
        """
        if self._schedule is not None and self._is_at(self._step + every, batch, every):
            self._step += every
            return self._step
        if self._paused:
            self._paused -= 1
            return None
        # After the search for a batch of another sampler, pauses get longer: 1, 2, 4, ... batches.
        found = self._search(batch)
        self._pause = 0 if found else min(max(1, 2 * self._pause), _LONGEST_PAUSE)
        self._paused = self._pause
        return self._step if found else None

    def batch_at(self, step: int, every: int) -> IndexArray | None:
        """The batch of a step of the epoch in which the last one was found; None behind its end."""
        if self._schedule is None or step >= self._schedule.steps:
            return None
        if step not in self._planned:
            self._planned = self._plan(np.arange(step, min(step + every * _TOGETHER, self._schedule.steps), every))
        return self._planned[step]

    def _is_at(self, step: int, batch: IndexArray, every: int) -> bool:
        expected = self.batch_at(step, every)
        return expected is not None and np.array_equal(expected, batch)

    def _plan(self, steps: IndexArray) -> dict[int, IndexArray]:
        """The batches of some steps, ascending."""
        if self._schedule is None or not len(steps):
            return {}
        rank = 0 if self._sampler.rank == "all" else self._sampler.rank
        samples, rows = self._schedule.batch_samples(steps * self._schedule.num_replicas + rank)
        return dict(zip(steps.tolist(), np.split(samples, np.cumsum(rows)[:-1]), strict=True))

    def _search(self, batch: IndexArray) -> bool:
        """Search where an epoch may have begun: the next one, the sampler's next and its present one."""
        present, starts = self._start, list(self._sampler.possible_starts)
        if present is not None:
            starts = [present, Position(present.epoch + 1, self._sampler.num_replicas), *starts]
        for start in dict.fromkeys(starts):
            self._start, self._schedule = start, self._sampler.schedule_from(start)
            # In the epoch that is being read, a loader may be a little further than expected.
            first = max(0, self._step - _SEARCHED // 2) if start == present else 0
            self._planned = self._plan(np.arange(first, min(first + _SEARCHED, self._schedule.steps)))
            for step, planned in self._planned.items():
                if np.array_equal(planned, batch):
                    self._step = step
                    return True
        self._start = self._schedule = None
        return False
