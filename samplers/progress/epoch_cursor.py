"""EpochCursor: which epoch a batch sampler's next iterator begins, and where."""

from dataclasses import dataclass

from samplers.planning.schedules.schedule import Schedule
from samplers.progress.position import Position, warn_of_drop


@dataclass(eq=False)
class Iteration:
    """One iteration over a schedule.

    Attributes:
        start: Where the iteration begins.
        schedule: Its batches.
        is_resumed: Whether it resumes from a position that was sought or loaded.
        taken: Steps that its iterator has given.
    """

    start: Position
    schedule: Schedule
    is_resumed: bool
    taken: int = 0


class EpochCursor:
    """State that a batch sampler's iterators share: the next epoch, a position that was sought, the last iteration.

    Args:
        num_replicas: Replicas that share an epoch.
    """

    def __init__(self, num_replicas: int) -> None:
        self._next_epoch = 0
        self._num_replicas = num_replicas
        self._sought: Position | None = None
        self._began: Position | None = None
        self._last: Iteration | None = None

    @property
    def next_start(self) -> Position:
        """Where the next iteration begins."""
        return Position(self._next_epoch, self._num_replicas) if self._sought is None else self._sought

    @property
    def last_start(self) -> tuple[Position, int]:
        """Where the last iteration began, and steps that were taken before: none.

        If no iteration has begun since `seek` or `set_epoch` to another epoch: where the next one begins.
        """
        return self.next_start if self._began is None else self._began, 0

    @property
    def is_sought(self) -> bool:
        """Whether the next iteration resumes from a position."""
        return self._sought is not None

    def begin(self, iteration: Iteration) -> None:
        """Note that an iteration begins; the next epoch comes after it."""
        last = self._last
        if last is not None and last.is_resumed and not iteration.is_resumed:
            warn_of_drop(last.start.epoch, last.taken, last.schedule.steps)
        # `_last` warns if a resumed iteration is dropped; `_began` is what `position` counts from, until another epoch
        # is set.
        self._last, self._began = iteration, iteration.start
        self._sought = None
        self._next_epoch = iteration.start.epoch + 1

    def set_epoch(self, epoch: int) -> None:
        """Make another epoch the next; a position that was sought in this epoch is kept."""
        self._next_epoch = epoch
        # Trainers set the epoch of a position after they have sought it.
        if self._sought is not None and self._sought.epoch != epoch:
            self._sought = None
        if self._began is not None and self._began.epoch != epoch:
            self._began = None

    def seek(self, position: Position) -> None:
        """Let the next iteration begin at a position."""
        self._sought, self._began = position, None
        self._next_epoch = position.epoch
