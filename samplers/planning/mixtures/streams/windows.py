"""Streams of sources in shards: a pass is read window after window, so that few shards of each source are open.

The windows of a pass are those of the source's own table, in the order in which a stream of this source alone reads
them. What an epoch takes of a pass is cut into *lanes*, one for each replica: the batches of a turn are one of each
lane, so that replicas read different windows. Eight batches of two windows, two replicas, one turn after the other:

>>> deal_lanes(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 2).tolist()
[0, 4, 1, 5, 2, 6, 3, 7]

An epoch that begins elsewhere, three replicas; two batches are left without a turn:

>>> deal_lanes(np.array([1, 0, 1, 0, 0]), 3).tolist()
[0, 2, 1, 3, 4]
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, stream_keys
from samplers.planning.mixtures.streams.buckets import BucketStream
from samplers.planning.mixtures.streams.packs import PackStream
from samplers.planning.mixtures.streams.source_stream import SourceStream
from samplers.planning.pack_batches.window_packs import WindowPacks
from samplers.planning.sorting import IndexArray
from samplers.planning.tables.window_table import WindowTable

# Purpose of a key: which batches of their windows the replicas take at the same time.
LANES = 68


@dataclass(frozen=True, eq=False)
class WindowStream(SourceStream):
    """What the streams of sources in shards have in common."""

    table: WindowTable | WindowPacks

    @property
    def reads_windows(self) -> bool:
        """Whether the samples of a pass are read window after window."""
        return True

    def windows_of(self, pass_number: int, batch_ids: Integers) -> Integers:
        """The window of each of these batches of a pass: int64 `[n]`."""
        ends = np.cumsum(self.table.for_epoch(pass_number, 1).window_sizes)
        return np.searchsorted(ends, batch_ids, side="right")

    def arrange(self, pass_number: int, batch_ids: Integers, *, epoch: int, num_replicas: int, lead: int) -> Integers:
        """A part of a pass in turns of W batches, each of another lane; the batch of most rows is last.

        Batches of a window are taken by numbers that are drawn for turns, the same for all lanes, so that the batches
        of a turn have about the same rank in likeness. The first `lead` batches complete a turn of the pass before.
        """
        head, body = batch_ids[:lead], batch_ids[lead:]
        if not len(body):
            return batch_ids
        windows = self.windows_of(pass_number, body)
        order = deal_lanes(windows, num_replicas)
        if not self.table.options.shuffle:
            return np.concatenate([head, body[order]])
        if num_replicas > 1:
            turns = np.empty_like(order)
            turns[order] = np.arange(len(order)) // num_replicas
            drawn = stream_keys(derive_key(self.table.options.seed, epoch, pass_number, LANES), turns)
            slots, ranked = np.lexsort((drawn, windows)), np.lexsort((self.likeness(pass_number, body), windows))
            mixed = np.empty_like(body)
            mixed[slots] = body[ranked]
            body = mixed
        dealt, windows = body[order], windows[order]
        longest = find_longest(self._rows_of(pass_number, dealt), windows == windows[-1])
        dealt[[longest, -1]] = dealt[[-1, longest]]
        return np.concatenate([head, dealt])

    def _order_pass(self, pass_number: int) -> Integers:
        """The batch ids of a whole pass, as one replica alone reads them: int64 `[n]`."""
        table = self.table.for_epoch(pass_number, 1)
        return table.order(pass_number, 1).batch_at_position(np.arange(len(table)))

    @abstractmethod
    def _rows_of(self, pass_number: int, batch_ids: Integers) -> Integers:
        """Rows of these batches of a pass: int64 `[n]`."""


@dataclass(frozen=True, eq=False)
class WindowBucketStream(WindowStream, BucketStream):
    """The endless batches of a source in shards, of samples of similar length."""

    table: WindowTable

    def _rows_of(self, pass_number: int, batch_ids: Integers) -> Integers:
        return self.table.for_epoch(pass_number, 1).batch_rows(batch_ids)


@dataclass(frozen=True, eq=False)
class WindowPackStream(WindowStream, PackStream):
    """The endless batches of a source in shards whose documents share rows."""

    table: WindowPacks

    @property
    def has_equal_passes(self) -> bool:
        """Whether all passes have as many units: windows of another grouping have as many batches, not as many rows."""
        return self.unit != "padded"

    def _rows_of(self, pass_number: int, batch_ids: Integers) -> Integers:
        return self.table.for_epoch(pass_number, 1).count_rows(batch_ids)

    @property
    def _documents(self) -> IndexArray:
        documents = self.table.groupings.documents
        return np.arange(len(documents.class_of)) if documents.samples is None else documents.samples


def find_longest(rows: Integers, is_last: npt.NDArray[np.bool_]) -> int:
    """The batch that shall be last, because other replicas may have to share it: the last one of most rows.

    It is of the window that is read last, so that no window is read for a batch of it alone; unless one of another
    window has more than twice the rows, as where little of that window is in the epoch.

    >>> find_longest(np.array([9, 5, 3, 5, 4]), np.array([False, False, True, True, True]))
    3

    Args:
        rows: Rows of each batch, int64 `[n]`.
        is_last: Whether it is of the window that is read last, bool `[n]`.
    """
    of_last = np.where(is_last, rows, 0)
    chosen = of_last if 2 * of_last.max() >= rows.max() else rows
    return len(rows) - 1 - int(chosen[::-1].argmax())


def deal_lanes(windows: Integers, num_replicas: int) -> Integers:
    """The order in which replicas take batches of these windows, int64 `[n]`: indices into them.

    Args:
        windows: The window of each batch, in the order of the stream: int64 `[n]`. A lane reads one window after the
            other, also where another mixture has left them in between each other.
        num_replicas: W.
    """
    _, first, owner = np.unique(windows, return_index=True, return_inverse=True)
    reading = np.argsort(first[owner], kind="stable")
    turns = len(windows) // num_replicas
    whole = turns * num_replicas
    return np.concatenate([reading[:whole].reshape(num_replicas, turns).T.ravel(), reading[whole:]])
