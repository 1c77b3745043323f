"""The order of an epoch's batches: positions in the epoch to batch ids.

Six batches, two replicas: three steps. Steps 0 and 1 are shuffled, the last step stays last, because the batches with
the most rows are there, and in a step it is random which replica gets which batch:

>>> from samplers.planning.options import Options
>>> orders = [EpochOrder(6, Options(max_tokens=9, seed=3), epoch, 2) for epoch in (0, 1)]
>>> [order.batch_at_position(np.arange(6)).tolist() for order in orders]
[[3, 2, 1, 0, 4, 5], [2, 3, 1, 0, 4, 5]]
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, draw, permute, permute_one
from samplers.planning.options import EpochOptions

# Purposes of keys: samples in strata, steps in the epoch, batches in a step, the step that is dropped.
SAMPLES, STEPS, REPLICAS, DROPPED = range(4)
# The variant of an epoch.
VARIANTS: Final = 20


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The order of an epoch's batches, made for the number of replicas with which the epoch began.

    A step has batches of similar width, so that replicas finish together; steps are shuffled over the whole epoch. The
    last batch has the most rows, since the last step may have to be split by rows.

    Attributes:
        batches: Batches of the epoch.
        options: The planner's.
        epoch: Number of the epoch.
        num_replicas: Batches in a step.
    """

    batches: int
    options: EpochOptions
    epoch: int
    num_replicas: int

    def key(self, purpose: int) -> int:
        """The random key of this epoch for a purpose."""
        return derive_key(self.options.seed, self.epoch, purpose)

    def batch_at_position(self, positions: Integers) -> Integers:
        """The batch ids at these positions of the epoch: int64 `[n]`."""
        if not self.options.shuffle:
            return positions
        steps, replicas = np.divmod(positions, self.num_replicas)
        shuffled = steps < self._shuffled_steps
        steps = np.where(
            shuffled,
            permute(np.minimum(steps, self._shuffled_steps - 1), self._shuffled_steps, self.key(STEPS)),
            steps,
        )
        rotated = (replicas + draw(steps, self.num_replicas, self.key(REPLICAS))) % self.num_replicas
        batch_ids = steps * self.num_replicas + np.where(shuffled, rotated, replicas)
        return self._around_dropped(batch_ids)

    def group_at_position(self, positions: Integers) -> Integers:
        """The read group at these positions: batches of one group are read together; int64 `[n]`."""
        # Without shards, all batches are equally far away.
        return np.zeros(len(positions), np.int64)

    @cached_property
    def _shuffled_steps(self) -> int:
        """How many of the first steps are shuffled."""
        steps, partial = divmod(self.batches, self.num_replicas)
        return steps if partial or self.options.drop_last else steps - 1

    def _around_dropped(self, batch_ids: Integers) -> Integers:
        """With `drop_last`, choose which batches are dropped: not those with the last ids in every epoch."""
        steps, partial = divmod(self.batches, self.num_replicas)
        if not self.options.drop_last or partial == 0:
            return batch_ids
        hole = permute_one(0, steps + 1, self.key(DROPPED)) * self.num_replicas
        return move_hole_last(batch_ids, hole, whole=steps * self.num_replicas, partial=partial)


class PositionOrder(EpochOrder):
    """The order of a table whose batches are numbered as an epoch takes them."""

    def batch_at_position(self, positions: Integers) -> Integers:
        """The batch ids at these positions of the epoch: the positions."""
        return positions


def move_hole_last(batch_ids: Integers, hole: int, *, whole: int, partial: int) -> Integers:
    """Batch ids in an order whose last ones, which are dropped, are those from `hole` on.

    Eight batches, three replicas: two whole steps, and two batches are dropped. With the hole at 3, these are 3 and 4;
    the later ones move up:

    >>> move_hole_last(np.arange(8), 3, whole=6, partial=2).tolist()
    [0, 1, 2, 5, 6, 7, 3, 4]

    Args:
        batch_ids: int64 `[n]`, as if the last ones were dropped.
        hole: The first batch id that is dropped instead, at most `whole`.
        whole: Batches that are not dropped.
        partial: Batches that are dropped.
    """
    return np.where(batch_ids >= whole, batch_ids - whole + hole, batch_ids + partial * (batch_ids >= hole))


def choose_variant(epoch: int, variants: int, seed: int) -> int:
    """Which of the variants an epoch uses, 0 to `variants` - 1.

    A cycle of as many epochs uses each variant once. Variants follow each other in bit-reversed order, so that
    neighbours in number are far apart in time, and each cycle begins with a random one, so that no variant comes back
    after a fixed number of epochs.

    >>> [choose_variant(epoch, 4, seed=0) for epoch in range(8)]
    [1, 3, 2, 0, 2, 0, 3, 1]
    """
    cycle, step = divmod(epoch, variants)
    order = sorted(range(variants), key=lambda variant: f"{variant:032b}"[::-1])
    start = int(draw(np.array([cycle % (1 << 62)]), variants, derive_key(seed, VARIANTS))[0])
    return (order[step] + start) % variants
