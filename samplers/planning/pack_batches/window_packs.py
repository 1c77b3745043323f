"""WindowPacks: the packs of a corpus in shards, which is read in order, some shards at a time.

A *window* is a run of shuffled shards, the same in every epoch; its samples are packed together, and each epoch plans
its rows again. Twelve samples in four shards of three, at least six in a window: two windows, the rows of two epochs.

>>> class Index:
...     lengths, fingerprint = np.array([7, 3, 5, 2, 2, 9, 4, 1, 6, 3, 8, 5]), "of these lengths"
>>> first = make_window_packs(Index(), np.arange(0, 13, 3), PackOptions(capacity=16, seed=1), window=6)
>>> [len(table) for table in first.windows]
[2, 2]
>>> for epoch in (0, 1):
...     batches = first.for_epoch(epoch, 1).rows_of_batches(np.arange(4))
...     print([Index.lengths[row].tolist() for row in np.split(batches.samples, batches.documents.cumsum()[:-1])])
[[9, 2], [6, 4, 2, 1], [7, 5, 3], [8, 5, 3]]
[[6, 4, 2, 1], [9, 2], [5, 5, 3, 3], [8, 7]]
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, permute
from samplers.planning.pack_batches.options import PackOptions
from samplers.planning.pack_batches.table import BatchRows, PackBatches, build_packs, choose_samples
from samplers.planning.packs.documents import Pieces, overlong_documents, to_units
from samplers.planning.packs.pack_table import PackTable, make_limits
from samplers.planning.sorting import IndexedLengths, as_length_array, refuse_negative
from samplers.planning.tables.window_order import WindowOrder
from samplers.planning.tables.window_table import DEFAULT_WINDOW, SHARDS, group_shards

# Purpose of a key, next to those of `row_order`: the rows of a window.
WINDOW_ROWS = 57


@dataclass(frozen=True, eq=False)
class WindowPacks(PackBatches):
    """Batches of the rows of all windows, window after window; the last batch of a window may be short.

    Attributes:
        windows: The rows of each window; `packs` is the first of them.
        shards: The shards of each window.
        interleave: Lanes of each replica.
        epoch: The epoch to which this table belongs.
        dropped_before: Samples that `overlong="drop"` has left out, before the windows were cut.
    """

    windows: tuple[PackTable, ...] = field(kw_only=True)
    shards: tuple[tuple[int, ...], ...] = field(kw_only=True)
    interleave: int = field(default=1, kw_only=True)
    epoch: int = field(default=0, kw_only=True)
    dropped_before: int = field(default=0, kw_only=True)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return int(self._ends[-1])

    @property
    def whole_batches(self) -> int:
        """All batches: those that are short stand anywhere in the epoch."""
        return len(self)

    @property
    def planned(self) -> int:
        """Documents in an epoch."""
        return sum(int(table.classes.counts.sum()) for table in self.windows)

    @property
    def dropped(self) -> int:
        """Samples that `overlong="drop"` leaves out."""
        return self.dropped_before

    @cached_property
    def pieces(self) -> Pieces | None:
        """Pieces of split samples, those of one window after the other, or None."""
        parts = [table.pieces for table in self.windows if table.pieces is not None]
        if not parts:
            return None
        columns = zip(*((part.samples, part.starts, part.stops) for part in parts), strict=True)
        return Pieces(*(np.concatenate(column) for column in columns))

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when the rows or the windows change."""
        digests = [table.digest for table in self.windows]
        text = repr((super().digest, digests, self.shards, self.interleave))
        return blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def trial_epochs(self) -> Iterable[int]:
        """Epochs that show whether replicas can share the last step of every epoch."""
        return range(2)

    def for_epoch(self, epoch: int, num_replicas: int) -> Self:
        """The table of an epoch."""
        del num_replicas
        return replace(self, epoch=epoch)

    def order(self, epoch: int, num_replicas: int) -> WindowOrder:
        """The order of this table's batches in an epoch that this many replicas begin."""
        return WindowOrder(
            len(self),
            self.options,
            epoch,
            num_replicas,
            window_sizes=np.diff(self._ends, prepend=0),
            interleave=self.interleave,
            can_share=partial(self._can_share_batches, num_replicas),
            patient=epoch not in self.trial_epochs,
            redraws_positions=True,
        )

    def rows_of_batches(self, batch_ids: Integers) -> BatchRows:
        """The rows of these batches, int64 `[n]`, at least one, in the order in which a collator cuts them."""
        owners = np.searchsorted(self._ends, batch_ids, side="right")
        parts = [
            self._window_rows(window, batch_ids[owners == window] - (self._ends[window - 1] if window else 0))
            for window in np.unique(owners).tolist()
        ]
        # Batches window by window, and back in the order that was asked for.
        entries = np.argsort(np.argsort(owners, kind="stable"), kind="stable").tolist()
        batches = [batch for part in parts for batch in part]
        chosen = [batches[entry] for entry in entries]
        return self._arrange(
            BatchRows(
                np.concatenate([row for batch in chosen for row in batch]),
                np.array([len(row) for batch in chosen for row in batch]),
                np.array([len(batch) for batch in chosen]),
            )
        )

    def _window_rows(self, window: int, batches: Integers) -> list[list[Integers]]:
        """The rows of batches of a window, each the samples of its documents."""
        table, rows = self.windows[window], self.options.rows
        positions = (batches[:, None] * rows + np.arange(rows)).ravel()
        positions = positions[positions < len(table)]
        counts = np.minimum(rows, len(table) - batches * rows)
        if self.options.shuffle and self.options.cost is None:
            # Neighbours are alike in composition; with a cost, replicas shall take alike batches at the same time.
            key = derive_key(self.options.seed, self.epoch, WINDOW_ROWS, window)
            positions = permute(positions, len(table), key)
        samples, documents = table.rows(self.epoch, positions)
        samples = np.where(samples >= len(self.lengths), samples + self._first_pieces[window], samples)
        split = np.split(samples, np.cumsum(documents)[:-1])
        ends = np.cumsum(counts).tolist()
        return [split[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]

    def _can_share_batches(self, num_replicas: int, batch_ids: Integers) -> bool:
        """Whether each replica gets a document of the last step, if these are the last batches of an epoch."""
        partial_batches = len(self) % num_replicas
        if partial_batches == 0 or self.options.drop_last:
            return True
        return int(self.batch_rows(batch_ids[-partial_batches:]).sum()) >= num_replicas

    @cached_property
    def _ends(self) -> Integers:
        """Where the batches of each window end."""
        return np.cumsum([-(-len(table) // self.options.rows) for table in self.windows])

    @cached_property
    def _first_pieces(self) -> list[int]:
        """The pieces of the windows before each."""
        counts = [0 if table.pieces is None else len(table.pieces.samples) for table in self.windows]
        firsts: list[int] = np.cumsum([0, *counts]).tolist()
        return firsts


def make_window_packs(
    lengths: IndexedLengths,
    shard_starts: Integers,
    options: PackOptions,
    *,
    window: int | None = None,
    interleave: int = 1,
) -> WindowPacks:
    """Cut a corpus in shards into windows, and pack each.

    Args:
        lengths: Lengths of all samples, in the order of their shards.
        shard_starts: Index of each shard's first sample, then N: int64 `[shards + 1]`.
        options: The planner's.
        window: Samples of a window at least, unless the corpus is smaller; None for the default.
        interleave: Lanes of each replica.

    Raises:
        LengthError: A document does not fit in a row, with `overlong="error"`.
        ValueError: An option is out of its range, or no sample is left to plan.
    """
    array = as_length_array(lengths)
    refuse_negative(array, None)
    indices, too_short = choose_samples(array, options)
    chosen = np.arange(len(array)) if indices is None else indices
    fitting = _drop_overlong(array, options, chosen) if options.overlong == "drop" else chosen
    shard_of: Integers = np.searchsorted(shard_starts, fitting, side="right") - 1
    samples = np.bincount(shard_of, minlength=len(shard_starts) - 1)
    key = derive_key(options.seed, SHARDS, 0, 0) if options.shuffle else None
    shards = group_shards(samples, window or DEFAULT_WINDOW, key)
    tables = tuple(build_packs(array, options, fitting[np.isin(shard_of, group)]) for group in shards)
    return WindowPacks(
        tables[0],
        array,
        options,
        too_short,
        windows=tables,
        shards=tuple(shards),
        interleave=interleave,
        dropped_before=len(chosen) - len(fitting),
    )


def _drop_overlong(array: npt.NDArray[Any], options: PackOptions, chosen: Integers) -> Integers:
    """The samples that fit in a row alone, so that no window loses all of its samples.

    Raises:
        ValueError: There is none.
    """
    rows = array[chosen].reshape(len(chosen), -1)
    limits = make_limits(
        rows.shape[1],
        capacity=options.capacity,
        multiple=options.multiple,
        max_documents=options.max_documents,
        cost=options.cost,
        max_cost=options.max_cost,
    )
    fitting = np.delete(chosen, overlong_documents(to_units(rows, limits.multiple), limits))
    if len(fitting) == 0:
        raise ValueError(f"capacity must hold a document, got {options.capacity}: overlong='drop' drops them all")
    return fitting
