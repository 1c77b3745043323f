"""PackBatches: the rows of a pack table as the batches of an epoch.

Twelve documents fill three rows of 20 steps in every epoch. With two rows in a batch, an epoch has two batches, and the
second is short; two replicas then share the three rows, one of them takes two:

>>> from samplers.planning.schedules.schedule import make_schedule
>>> lengths = np.array([7, 3, 5, 2, 2, 9, 4, 1, 6, 3, 8, 5])
>>> table = pack_batches(lengths, PackOptions(capacity=20, rows=2, seed=5))
>>> for replicas in (1, 2):
...     print([lengths[batch].tolist() for batch in make_schedule(table, 0, replicas).index_lists(np.arange(2))])
[[8, 5, 4, 3, 9, 7, 2, 1], [6, 5, 3, 2]]
[[8, 5, 4, 3, 6, 5, 3, 2], [9, 7, 2, 1]]
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.pack_batches.options import PackOptions
from samplers.planning.pack_batches.packed_table import BatchRows, PackedTable, build_packs, choose_samples
from samplers.planning.packs.pack_table import SPARE_EPOCH
from samplers.planning.packs.row_order import RowOrder
from samplers.planning.sorting import Lengths, as_length_array, refuse_negative
from samplers.planning.tables.epoch_order import EpochOrder, PositionOrder


@dataclass(frozen=True, eq=False)
class PackBatches(PackedTable):
    """Batches of rows. Once an epoch is chosen, batch ids are positions in its order.

    Attributes:
        row_order: The rows in the order of the epoch to which this table belongs; None before an epoch is chosen.
    """

    row_order: RowOrder | None = field(default=None, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_epochs"}

    def __len__(self) -> int:
        """Batches in an epoch: the last one may be short."""
        return -(-len(self.packs) // self.options.rows)

    @property
    def whole_batches(self) -> int:
        """Batches with all of their rows."""
        return len(self.packs) // self.options.rows

    @property
    def trial_epochs(self) -> Iterable[int]:
        """The spare recipes: where replicas can share their last rows, they can in every epoch."""
        return (SPARE_EPOCH,)

    def _make_epoch(self, epoch: int, num_replicas: int) -> Self:
        """The table of an epoch with its order of rows."""
        order = RowOrder(self.packs, epoch, num_replicas, self.options.rows, self.options.drop_last)
        return replace(self, row_order=order)

    def order(self, epoch: int, num_replicas: int) -> EpochOrder:
        """The order of this table's batches, which is that of their ids."""
        return PositionOrder(len(self), self.options, epoch, num_replicas)

    def rows_of_batches(self, batch_ids: Integers) -> BatchRows:
        """The rows of these batches, int64 `[n]`, at least one, in the order in which a collator cuts them."""
        rows = self.options.rows
        positions = (batch_ids[:, None] * rows + np.arange(min(rows, len(self.packs)))).ravel()
        positions = positions[positions < len(self.packs)]
        samples, documents = self._order.samples(positions)
        return self.arrange(BatchRows(samples, documents, np.minimum(rows, len(self.packs) - batch_ids * rows)))

    @property
    def _order(self) -> RowOrder:
        """The rows in the order of this table's epoch; of epoch 0, if it belongs to none."""
        return RowOrder(self.packs, 0, 1, self.options.rows) if self.row_order is None else self.row_order


def pack_batches(lengths: Lengths, options: PackOptions, *, is_brief: bool = False) -> PackBatches:
    """Plan the rows of any epoch.

    Args:
        lengths: Integers `[N]` or `[N, K]`, or an index that holds them.
        options: The planner's.
        is_brief: Whether the plan of the rows is found in fewer attempts, see `choose_rows`.

    Raises:
        LengthError: A length is negative or above 2**40, or a document does not fit in a row, with `overlong="error"`.
        TypeError: A limit is not an int, lengths or indices are not integers, or `cost` is not a function.
        ValueError: A limit is out of its range or not one for each field, or no sample is left to plan.
    """
    array = as_length_array(lengths)
    refuse_negative(array, None)
    indices, too_short = choose_samples(array, options)
    return PackBatches(build_packs(array, options, indices, is_brief=is_brief), array, options, too_short)
