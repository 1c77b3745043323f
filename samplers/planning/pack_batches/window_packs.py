"""WindowPacks: the packs of a corpus in shards, which is read in order, some shards at a time.

A *window* is a run of shuffled shards whose samples are packed together. Each epoch groups the shards into other
windows; all epochs have equally many batches. That takes a proof for each window that its rows hold its documents; the
rows themselves are planned when they are due. Twelve samples in four shards of three, at least six in a window: two
windows, and the rows of two epochs.

>>> class Index:
...     lengths, fingerprint = np.array([7, 3, 5, 2, 2, 9, 4, 1, 6, 3, 8, 5]), "of these lengths"
>>> first = make_window_packs(Index(), np.arange(0, 13, 3), PackOptions(capacity=16), window=6)
>>> for epoch in (0, 1):
...     table = first.for_epoch(epoch, 1)
...     batches = table.rows_of_batches(np.arange(4))
...     rows = np.split(batches.samples, batches.documents.cumsum()[:-1])
...     print([window.shards for window in table.windows], [Index.lengths[row].tolist() for row in rows])
[(0, 2), (3, 1)] [[6, 5, 4, 1], [7, 3], [8, 5, 3], [9, 2, 2]]
[(1, 0), (3, 2)] [[7, 3, 2], [9, 5, 2], [6, 4, 3], [8, 5, 1]]
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from hashlib import blake2b
from math import isqrt
from typing import Any, Final, NamedTuple, Self

import numpy as np

from collate.widths import check_count
from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, draw_until, permute
from samplers.planning.pack_batches.options import PackOptions
from samplers.planning.pack_batches.packed_table import BatchRows, PackedTable, choose_samples
from samplers.planning.pack_batches.shard_documents import ShardDocuments, make_shard_documents
from samplers.planning.packs.pack_table import PackTable
from samplers.planning.packs.row_count import EXTRA, Proof
from samplers.planning.sorting import IndexedLengths, as_length_array, refuse_negative
from samplers.planning.tables.epoch_order import choose_variant
from samplers.planning.tables.window_order import WindowOrder
from samplers.planning.tables.window_table import (
    COUNTED_GROUPINGS,
    DEFAULT_WINDOW,
    GROUPINGS,
    SHARDS,
    first_epoch,
    group_shards,
)

# Purpose of a key, next to those of `row_order`: the rows of a window.
WINDOW_ROWS = 57
# Windows whose rows are kept at least.
_KEPT_WINDOWS: Final = 4


class Window(NamedTuple):
    """A run of shards whose documents are packed together.

    Attributes:
        shards: In the order in which they are read.
        documents: How many they have.
        proof: Rows that hold them.
        rows: Rows of every epoch that has this window.
    """

    shards: tuple[int, ...]
    documents: int
    proof: Proof
    rows: int


@dataclass(frozen=True, eq=False)
class WindowPacks(PackedTable):
    """Batches of the rows of all windows, window after window; the last batch of a window may be short.

    Attributes:
        groupings: The ways to group the shards into windows.
        number: Number of the grouping that replaces those that will not do, whose windows are `usual`.
        usual: Its windows.
        windows: The windows of the epoch to which this table belongs.
        epoch: That epoch.
    """

    groupings: "PackGroupings" = field(kw_only=True)
    number: int = field(kw_only=True)
    usual: tuple[Window, ...] = field(kw_only=True)
    windows: tuple[Window, ...] = field(kw_only=True)
    epoch: int = field(default=0, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        # Without what is computed again where it is due.
        return {each.name: self.__dict__[each.name] for each in fields(self)}

    def __len__(self) -> int:
        """Batches in an epoch."""
        return int(self._ends[-1])

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when the rows or the windows change."""
        groupings = self.groupings
        # Other groupings may have other windows where these are the same.
        least = min(groupings.window, self.planned) if groupings.changes else None
        text = repr((super().digest, self.usual, self.number, groupings.interleave, least))
        return blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def trial_epochs(self) -> Iterable[int]:
        """Epochs that show whether replicas can share the last step of every epoch."""
        # One of the usual windows, which replace those that cannot be shared, and the first, which will be needed.
        return {0, first_epoch(self.number, self.options.seed)}

    def _make_epoch(self, epoch: int, num_replicas: int) -> Self:
        """The table of an epoch with the windows of its grouping, or else the usual ones."""
        number = choose_variant(epoch, GROUPINGS, self.options.seed)
        windows = None if number == self.number else self.groupings.find_windows(number, len(self))
        table = replace(self, windows=windows or self.usual, epoch=epoch)
        if windows is None or table.is_shared(num_replicas):
            return table
        return replace(self, windows=self.usual, epoch=epoch)

    def order(self, epoch: int, num_replicas: int) -> WindowOrder:
        """The order of this table's batches in an epoch that this many replicas begin."""
        return WindowOrder(
            len(self),
            self.options,
            epoch,
            num_replicas,
            window_sizes=self.window_sizes,
            interleave=self.groupings.interleave,
            can_share=partial(self._can_share_batches, num_replicas),
            # The usual windows must find an order in every epoch.
            patient=self.windows is self.usual and epoch not in self.trial_epochs,
            alike=True,
        )

    def is_shared(self, num_replicas: int) -> bool:
        """Whether this table's epoch ends with a document for each of this many replicas."""
        last = np.arange(len(self))[-num_replicas:]
        return self._can_share_batches(num_replicas, self.order(self.epoch, num_replicas).batch_at_position(last))

    def rows_of_batches(self, batch_ids: Integers) -> BatchRows:
        """The rows of these batches, int64 `[n]`, at least one, in the order in which a collator cuts them."""
        owners, numbers = self._locate(batch_ids)
        windows = np.unique(owners).tolist()
        parts = [self._window_rows(window, numbers[owners == window]) for window in windows]
        while len(self._tables) > max(_KEPT_WINDOWS, len(windows)):
            del self._tables[next(iter(self._tables))]
        # Batches window by window, and back in the order that was asked for.
        entries = np.argsort(np.argsort(owners, kind="stable"), kind="stable").tolist()
        batches = [batch for part in parts for batch in part]
        chosen = [batches[entry] for entry in entries]
        return self.arrange(
            BatchRows(
                np.concatenate([row for batch in chosen for row in batch]),
                np.array([len(row) for batch in chosen for row in batch]),
                np.array([len(batch) for batch in chosen]),
            )
        )

    def _window_rows(self, window: int, batches: Integers) -> list[list[Integers]]:
        """The rows of batches of a window, each the samples of its documents."""
        table, rows = self._table_of(window), self.options.rows
        positions = (batches[:, None] * rows + np.arange(min(rows, len(table)))).ravel()
        positions = positions[positions < len(table)]
        counts = np.minimum(rows, len(table) - batches * rows)
        if self.options.shuffle and self.options.cost is None:
            # Neighbours are alike in composition; with a cost, replicas shall take alike batches at the same time.
            key = derive_key(self.options.seed, self.epoch, WINDOW_ROWS, window)
            positions = permute(positions, len(table), key)
        samples, documents = table.rows(self.epoch, positions)
        split = np.split(samples, np.cumsum(documents)[:-1])
        ends = np.cumsum(counts).tolist()
        return [split[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]

    def _table_of(self, window: int) -> PackTable:
        """The rows of a window; those that were used last are kept."""
        table = self._tables.pop(window, None)
        if table is None:
            shards, _, proof, rows = self.windows[window]
            table = self.groupings.documents.table(shards, rows=rows, proof=proof)
        self._tables[window] = table
        return table

    def _can_share_batches(self, num_replicas: int, batch_ids: Integers) -> bool:
        """Whether each replica gets a document of the last step, if these are the last batches of an epoch."""
        partial_batches = len(self) % num_replicas
        if partial_batches == 0 or self.options.drop_last:
            return True
        return self.has_rows(batch_ids[-partial_batches:], num_replicas)

    def has_rows(self, batch_ids: Integers, count: int) -> bool:
        """Whether these batches have `count` documents; their windows are planned only until that is known."""
        # Each row has a document.
        known = self.count_rows(batch_ids)
        documents = int(known.sum())
        for batch, rows in zip(batch_ids.tolist(), known.tolist(), strict=True):
            if documents >= count:
                break
            documents += int(self.batch_rows(np.array([batch])).sum()) - rows
        return documents >= count

    def count_rows(self, batch_ids: Integers) -> Integers:
        """The rows of each of these batches, int64 `[n]`: the last one of a window may be short."""
        owners, numbers = self._locate(batch_ids)
        rows = np.array([window.rows for window in self.windows])
        return np.minimum(self.options.rows, rows[owners] - numbers * self.options.rows)

    def _locate(self, batch_ids: Integers) -> tuple[Integers, Integers]:
        """The window of each of these batches, and its number in that window: int64 `[n]` both."""
        owners = np.searchsorted(self._ends, batch_ids, side="right")
        return owners, batch_ids - (self._ends - self.window_sizes)[owners]

    @cached_property
    def window_sizes(self) -> Integers:
        """Batches of each window, int64 `[windows]`."""
        return np.array([-(-window.rows // self.options.rows) for window in self.windows])

    @cached_property
    def _ends(self) -> Integers:
        """Where the batches of each window end."""
        return np.cumsum(self.window_sizes)

    @cached_property
    def _tables(self) -> dict[int, PackTable]:
        """Rows of some windows, by number; the last one was used last."""
        return {}


@dataclass(frozen=True, eq=False)
class PackGroupings:
    """The ways to group a corpus' shards into windows.

    Attributes:
        documents: The documents of the shards.
        options: The planner's.
        window: Documents of a window at least.
        interleave: Lanes of each replica.
    """

    documents: ShardDocuments
    options: PackOptions
    window: int
    interleave: int

    @property
    def changes(self) -> bool:
        """Whether epochs have other windows: not without a shuffle, nor where a proof takes as long as an epoch."""
        return self.options.shuffle and len(self.documents.packs.limits.capacity) == 1

    def find_windows(self, number: int, batches: int) -> tuple[Window, ...] | None:
        """The windows of a grouping, with this many batches in all, if an attempt succeeds."""
        if not self.changes:
            return None
        return draw_until(lambda attempt: self.share_rows(self._cut(number, attempt), batches), lambda _: True)

    def first_windows(self) -> tuple[int, tuple[Window, ...]]:
        """The number and the windows of the grouping whose number of batches all others must have.

        Raises:
            RuntimeError: Windows have fewer documents than proved rows: a fault of this module.
        """
        drawn: list[tuple[Window, ...]] = []
        # As many rows as if the corpus were packed without windows: that leaves some to windows that need more.
        wanted = self._batches(len(self.documents.packs))
        several = self.documents.has_several_limits
        for number in range(COUNTED_GROUPINGS if self.changes else 1):
            drawn.append(self._cut(number, 0))
            counts = [sum(self._batches(window.proof.rows) for window in windows) for windows in drawn]
            if several and number == 0:
                # With several limits that leaves none.
                wanted = counts[0] + counts[0] // 500
            # The sums differ by some roundings of windows, unless shards differ in kind.
            room = wanted - max(counts) - 2 * (max(counts) - min(counts))
            # A grouping takes long to prove where there are several limits.
            if number + several and room >= 2 * isqrt(len(drawn[-1])):
                break
        number = counts.index(max(counts))
        most = sum(self._batches(window.documents) for window in drawn[number])
        windows = self.share_rows(drawn[number], max(counts[number], min(most, wanted)))
        if windows is None:
            raise RuntimeError(f"windows must hold the batches of their rows, got {counts[number]} and {wanted}")
        return number, windows

    def share_rows(self, windows: tuple[Window, ...], batches: int) -> tuple[Window, ...] | None:
        """Windows with this many batches in all; None if they need more, or have too few documents."""
        least = np.array([self._batches(window.proof.rows) for window in windows])
        most = np.array([self._batches(window.documents) for window in windows])
        if not least.sum() <= batches <= most.sum():
            return None
        counts = least
        while extra := batches - int(counts.sum()):
            # Two batches more for five windows of equal size: 0, 0, 1, 0 and 1.
            open_rows = np.where(counts < most, least, 0)
            shares = np.diff(open_rows.cumsum() * extra // int(open_rows.sum()), prepend=0)
            counts = np.minimum(counts + shares, most)
        return tuple(
            window._replace(rows=self._choose_rows(window, count))
            for window, count in zip(windows, counts.tolist(), strict=True)
        )

    def _choose_rows(self, window: Window, batches: int) -> int:
        """Rows of a window with this many batches: some more than proved, if they fit."""
        rows = self.options.rows
        wanted = window.proof.rows + window.proof.rows * EXTRA // 1_000
        return max((batches - 1) * rows + 1, min(batches * rows, window.documents, wanted))

    def _batches(self, rows: int) -> int:
        return -(-rows // self.options.rows)

    def _cut(self, number: int, attempt: int) -> tuple[Window, ...]:
        """The windows of an attempt at a grouping, with the rows that are proved."""
        keys = [derive_key(self.options.seed, SHARDS, number, attempt)] if self.options.shuffle else None
        counts = self.documents.counts
        (groups,) = group_shards(counts, self.window, keys)
        proofs = [self.documents.prove(group) for group in groups]
        return tuple(
            Window(group, int(counts[list(group)].sum()), proof, proof.rows)
            for group, proof in zip(groups, proofs, strict=True)
        )


def make_window_packs(
    lengths: IndexedLengths,
    shard_starts: Integers,
    options: PackOptions,
    *,
    window: int | None = None,
    interleave: int = 1,
) -> WindowPacks:
    """Cut a corpus in shards into windows, whose rows are planned when they are due.

    Args:
        lengths: Lengths of all samples, in the order of their shards.
        shard_starts: Index of each shard's first sample, then N: int64 `[shards + 1]`.
        options: The planner's.
        window: Documents of a window at least, unless the corpus is smaller; None for the default.
        interleave: Lanes of each replica.

    Raises:
        LengthError: A document does not fit in a row, with `overlong="error"`.
        TypeError: `window` is not an int.
        ValueError: An option is out of its range, or no sample is left to plan.
    """
    if window is None:
        window = DEFAULT_WINDOW
    window = check_count("window", window, least=1, hint="give a number of samples, or None for a default")
    array = as_length_array(lengths)
    refuse_negative(array, None)
    indices, too_short = choose_samples(array, options)
    documents = make_shard_documents(array, shard_starts, options, indices)
    groupings = PackGroupings(documents, options, window, interleave)
    number, windows = groupings.first_windows()
    return WindowPacks(
        documents.packs,
        array,
        options,
        too_short,
        groupings=groupings,
        number=number,
        usual=windows,
        windows=windows,
    )
