"""LoopUpdates: the optimizer steps of a training loop, epoch after epoch, as it asks for them batch by batch."""

from collections.abc import Callable

from samplers.planning.schedules.updates import Update, Updates
from samplers.planning.tables.epoch_table import EpochTable
from samplers.progress.position import Position


class LoopUpdates:
    """Says of each batch of the present iteration to which optimizer step it belongs.

    A sampler's `updates` makes it, once for all epochs.

    Args:
        find_start: Where the present iteration began, steps of each replica that were taken before, and the table of
            batches, which may be another one after a `seek`.
        make: The updates from a position on.
    """

    def __init__(
        self, find_start: Callable[[], tuple[Position, int, EpochTable]], make: Callable[[Position], Updates]
    ) -> None:
        self._find_start, self._make = find_start, make
        self._last: tuple[Position, EpochTable, Updates] | None = None

    def __repr__(self) -> str:
        return f"LoopUpdates(of {self.present!r})"

    @property
    def present(self) -> Updates:
        """All updates of the present iteration: the last one that has taken a batch, or the next if none has."""
        return self._find()[0]

    def at(self, batch: int) -> Update:
        """The update to which a batch of the present iteration belongs.

        Args:
            batch: Its number among this replica's batches, from 0 at the start of the iteration, as `enumerate(loader)`
                counts them. Call it inside the loop: an iteration begins with its first batch.

        Raises:
            TypeError: It is not an int.
            ValueError: The iteration has fewer batches.
        """
        updates, before = self._find()
        return updates.at(batch, before)

    def _find(self) -> tuple[Updates, int]:
        """The updates of the present iteration, and steps that were taken before it."""
        start, before, table = self._find_start()
        if self._last is None or self._last[0] != start or self._last[1] is not table:
            self._last = start, table, self._make(start)
        return self._last[2], before
