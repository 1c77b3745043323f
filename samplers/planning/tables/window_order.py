"""WindowOrder: the order of an epoch's batches, read window by window from several lanes.

The windows are read in a random order. The batches of that reading order are cut into *lanes*, contiguous parts, one or
more for each replica, and the epoch takes batches from the lanes in turn. Eight batches of two windows, two replicas:
lane 0 has batches 0 to 3, all of window 0, lane 1 has batches 4 to 7, all of window 1. In each step a replica takes a
batch of its own window, and a replica reads one window after the other:

>>> from samplers.planning.options import Options
>>> order = WindowOrder(8, Options(max_tokens=9, shuffle=False), 0, 2, window_sizes=np.array([4, 4]), interleave=1)
>>> order.batch_at_position(np.arange(8)).tolist()
[0, 4, 1, 5, 2, 6, 3, 7]
>>> order.group_at_position(np.arange(8)).tolist()
[0, 1, 0, 1, 0, 1, 0, 1]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, draw_until, permute, stream_keys
from samplers.planning.tables.epoch_order import EpochOrder

# Purposes of keys, next to those of `epoch_order`: windows in the epoch, batches in a window.
WINDOWS, BATCHES = 11, 12


class ReadingOrder(NamedTuple):
    """For each position of an epoch: the batch id and the read group, int64 `[batches]`."""

    batch_ids: Integers
    groups: Integers


def _accept_all(batch_ids: Integers) -> bool:
    """Every order will do."""
    del batch_ids
    return True


@dataclass(frozen=True, eq=False)
class WindowOrder(EpochOrder):
    """The order of an epoch's batches, taken from `num_replicas * interleave` lanes in turn.

    The batches of a window are ordered by random numbers that are drawn for steps, the same for all lanes. So replicas
    that are in different windows take batches of about the same rank in width, and wait little for each other. The last
    batch of the epoch has the most rows of all, since the last step may have to be split.

    Attributes:
        window_sizes: Batches of each window, int64 `[windows]`.
        interleave: Lanes of each replica.
        can_share: Whether each replica gets a row of the last step, if these are the last batch ids of the epoch.
        patient: Whether the epoch must find an order whose last step can be shared, see `draw_until`.
        alike: Whether batches have about as many rows: any window and any batch may be the last, and later attempts
            draw for positions in place of steps. With few steps, draws for steps leave the same batches to the last;
            saved positions of bucketed streams hold the orders that these gave.
    """

    window_sizes: Integers
    interleave: int
    can_share: Callable[[Integers], bool] = _accept_all
    patient: bool = False
    alike: bool = False

    def batch_at_position(self, positions: Integers) -> Integers:
        """The batch ids at these positions of the epoch: int64 `[n]`."""
        return self._reading_order.batch_ids[positions]

    def group_at_position(self, positions: Integers) -> Integers:
        """The read group at these positions: a lane's part of a window is read together; int64 `[n]`."""
        return self._reading_order.groups[positions]

    @cached_property
    def _reading_order(self) -> ReadingOrder:
        """The first draw whose last step the replicas can share."""
        if not self.options.shuffle:
            return self._draw(0)
        drawn = draw_until(
            self._draw, lambda order: self.can_share(order.batch_ids[-self.num_replicas :]), patient=self.patient
        )
        # Every draw is usable, so that the first is the answer where none is accepted.
        return self._draw(0) if drawn is None else drawn

    def _draw(self, attempt: int) -> ReadingOrder:
        """One attempt."""
        windows = self._order_windows(attempt)
        sizes = self.window_sizes[windows]
        # In reading order: the window of each batch, and the batches of each window in the order of the table.
        window = np.repeat(np.arange(len(windows)), sizes)
        first: Integers = (self.window_sizes.cumsum() - self.window_sizes)[windows]
        batch_ids: Integers = np.arange(self.batches) + np.repeat(first - (sizes.cumsum() - sizes), sizes)
        lane, position = self._deal_lanes()
        if self.options.shuffle:
            drawn_for = position if attempt and self.alike else position // self.num_replicas
            drawn = stream_keys(self._attempt_key(BATCHES, attempt), drawn_for)
            reading = np.lexsort((drawn, window))
            batch_ids[reading] = batch_ids.copy()
            self._put_longest_last(batch_ids)
        groups = np.concatenate([[0], ((np.diff(window) != 0) | (np.diff(lane) != 0)).cumsum()])
        read_at = np.empty_like(position)
        read_at[position] = np.arange(self.batches)
        return ReadingOrder(batch_ids[read_at], groups[read_at])

    def _attempt_key(self, purpose: int, attempt: int) -> int:
        """The key of an attempt; the first attempt has the key that plans had before there were attempts."""
        return derive_key(self.key(purpose), attempt) if attempt else self.key(purpose)

    def _order_windows(self, attempt: int) -> Integers:
        """The windows in random order; the one that holds the batch with the most rows is last, where steps split."""
        count = len(self.window_sizes)
        if not self.options.shuffle:
            return np.arange(count)
        shuffled = count if self.options.drop_last or self.alike else count - 1
        order = np.arange(count)
        order[:shuffled] = permute(order[:shuffled], shuffled, self._attempt_key(WINDOWS, attempt))
        return order

    def _deal_lanes(self) -> tuple[Integers, Integers]:
        """Cut the reading order into lanes: each batch's lane, and its position in the epoch."""
        lanes = self.num_replicas * self.interleave
        shortest, longer = divmod(self.batches, lanes)
        # The last lanes have one batch more, or the last batch that is read would not be the last of the epoch.
        sizes = shortest + (np.arange(lanes) >= lanes - longer)
        lane = np.repeat(np.arange(lanes), sizes)
        round_ = np.arange(self.batches) - np.repeat(sizes.cumsum() - sizes, sizes)
        return lane, round_ * lanes + (lane + longer) % lanes

    def _put_longest_last(self, batch_ids: Integers) -> None:
        """Exchange the last batch that is read for the one with the largest id, which has the most rows."""
        if not self.options.drop_last and not self.alike:
            largest = batch_ids.argmax()
            batch_ids[largest], batch_ids[-1] = batch_ids[-1], batch_ids[largest]
