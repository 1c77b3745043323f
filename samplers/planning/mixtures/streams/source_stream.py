"""The batches of one source, pass after pass, in an order that does not depend on the number of replicas.

A pass has all batches that the source's own table plans for one epoch, shuffled. An epoch of the mixture takes the next
run of this stream, whatever replicas share it; so every epoch knows where each source stands, without any history.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, Self

import numpy as np

from samplers.planning.budget import Floats, Integers
from samplers.planning.keyed_shuffle import derive_key, draw, permute
from samplers.planning.mixtures.mixture import Unit
from samplers.planning.tables.epoch_table import EpochTable, keep

# Purposes of keys: batches in a pass, groups of W batches in a part of a pass, replicas in a group.
PASSES, GROUPS, ROTATIONS = range(60, 63)
# Passes whose order and units are kept: an epoch looks at those at its two ends again and again.
_KEPT_PASSES: Final = 4


class Cut(NamedTuple):
    """A part of a pass that was begun under another mixture, so that some of its batches were taken.

    Attributes:
        first: Index of its first batch, in the order that the pass has left.
        end: Index after its last batch.
        taken: How many batches of the part were taken, in the order in which replicas took them.
        epoch: The epoch in which that was.
        num_replicas: The replicas for which that epoch was laid out.
        lead: How many of its first batches completed a turn of the pass before.
    """

    first: int
    end: int
    taken: int
    epoch: int
    num_replicas: int
    lead: int


class StreamStart(NamedTuple):
    """Where a stream begins: in this pass, less what these cuts took, one after the other."""

    first_pass: int = 0
    cuts: tuple[Cut, ...] = ()


FIRST_START: Final = StreamStart()


class Segment(NamedTuple):
    """A run of the stream that lies in one pass.

    Attributes:
        pass_number: Which pass.
        first: Index of its first batch in what the stream has of the pass.
        batch_ids: Its batches in the order in which replicas take them, int64 `[n]`.
        lead: How many of its first batches complete a turn of the pass before.
    """

    pass_number: int
    first: int
    batch_ids: Integers
    lead: int


class LoadedBatches(NamedTuple):
    """Batches with their samples.

    Attributes:
        samples: Sample indices of the mixture, batch after batch: int64 `[sum(sizes)]`.
        sizes: Samples of each batch: int64 `[n]`.
        units: Units of each batch, as the mixture counts them: int64 `[n]`.
        documents: Where batches have rows of documents: the documents of each row, int64 `[sum(rows)]`; else empty.
        rows: The rows of each batch, int64 `[n]`; else empty.
    """

    samples: Integers
    sizes: Integers
    units: Integers
    documents: Integers
    rows: Integers


@dataclass(frozen=True, eq=False)
class SourceStream(ABC):
    """The endless batches of a source.

    Attributes:
        name: Of the source.
        table: Its batches by batch id; an epoch of the table is a pass.
        unit: What shares count.
        offset: Sample index of its first sample in the mixture.
        pieces_offset: What is added to the indices of pieces of split samples.
        start: Where the stream begins.
        phase: A batch counts as taken once this part of it lies within the units of its source, 0 to 1.
    """

    name: str
    table: EpochTable
    unit: Unit
    offset: int = 0
    pieces_offset: int = 0
    start: StreamStart = FIRST_START
    phase: float = 0.5
    _orders: dict[int, Integers] = field(default_factory=dict, repr=False)
    _sums: dict[int, Floats] = field(default_factory=dict, repr=False)
    _estimates: dict[int, Integers] = field(default_factory=dict, repr=False)
    _constants: dict[str, float] = field(default_factory=dict, repr=False)
    _ends: list[float] = field(default_factory=list, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_orders": {},
            "_sums": {},
            "_estimates": {},
            "_constants": {},
            "_ends": [],
        }

    @abstractmethod
    def estimate(self, pass_number: int) -> Integers:
        """The units of all batches of a pass by batch id, exact or nearly so: int64 `[len(table)]`."""

    @abstractmethod
    def load(self, pass_number: int, batch_ids: Integers) -> LoadedBatches:
        """The samples of these batches, int64 `[n]`."""

    @abstractmethod
    def likeness(self, pass_number: int, batch_ids: Integers) -> Integers:
        """Numbers by which neighbours are alike in width or cost, the most rows last: int64 `[n]`."""

    @property
    def reads_windows(self) -> bool:
        """Whether the samples of a pass are read window after window."""
        return False

    def windows_of(self, pass_number: int, batch_ids: Integers) -> Integers:
        """The window of each of these batches of a pass: int64 `[n]`."""
        del pass_number
        return np.zeros(len(batch_ids), np.int64)

    @property
    def has_equal_passes(self) -> bool:
        """Whether all passes have as many units; otherwise each is counted, up to the one that is asked for."""
        return True

    @property
    def batches_per_pass(self) -> int:
        """Batches of every pass."""
        return len(self.table)

    @property
    def units_per_pass(self) -> float:
        """Units of every pass, at least 1; where passes differ a little, those of the first."""
        return max(1.0, self.units_of_first_pass)

    @property
    def units_of_first_pass(self) -> float:
        """Units of the first pass: 0 where no sample has a token."""
        if "units" not in self._constants:
            self._constants["units"] = float(self._units_of(0).sum())
        return self._constants["units"]

    @property
    def _first_batches(self) -> int:
        """Batches of the pass in which the stream begins."""
        return self.batches_per_pass - sum(cut.first + cut.taken for cut in self.start.cuts)

    def order_of(self, pass_number: int) -> Integers:
        """The batch ids of what the stream has of a pass, in the order of the stream: int64 `[n]`."""
        if pass_number not in self._orders:
            keep(self._orders, pass_number, self._find_order(pass_number), most=_KEPT_PASSES)
        return self._orders[pass_number]

    def units_before(self, batches: int) -> float:
        """Units of the first batches of the stream."""
        pass_number, first = self._locate(batches)
        whole = self._units_before_pass(pass_number)
        return whole + (float(self._sums_of(pass_number)[first]) if first else 0.0)

    def batches_within(self, units: float) -> int:
        """Batches of the stream of which at least `phase` lies within its first units."""
        begun = self._units_before_pass(self.start.first_pass + 1)
        pass_number = self.start.first_pass
        if units >= begun:
            pass_number += 1 + int((units - begun) // self.units_per_pass)
            pass_number = self._find_pass(units, pass_number)
        sums = self._sums_of(pass_number)
        counted_at = sums[:-1] + self.phase * np.diff(sums)
        within = int(np.searchsorted(counted_at, units - self._units_before_pass(pass_number), side="right"))
        return self._batches_before_pass(pass_number) + within

    def segments(self, first: int, end: int, *, epoch: int, num_replicas: int) -> list[Segment]:
        """The batches from `first` to before `end` of the stream, as replicas take them in an epoch: one for each pass.

        There is at least one, which may be empty.
        """
        segments: list[Segment] = []
        filled = 0
        while filled < end - first or not segments:
            pass_number, start = self._locate(first + filled)
            part = self.order_of(pass_number)[start : start + end - first - filled]
            lead = -filled % num_replicas
            batch_ids = self.arrange(pass_number, part, epoch=epoch, num_replicas=num_replicas, lead=lead)
            segments.append(Segment(pass_number, start, batch_ids, lead))
            filled += len(part)
        return segments

    def arrange(self, pass_number: int, batch_ids: Integers, *, epoch: int, num_replicas: int, lead: int) -> Integers:
        """A part of a pass in groups of W batches that are alike; the groups are shuffled.

        With one replica it is the order of the stream, but for the batch of most rows, which is last: if the epoch ends
        with it, other replicas can share it. The first `lead` batches complete a group of the pass before.
        """
        if not self.table.options.shuffle or not len(batch_ids):
            return batch_ids
        head, body = batch_ids[:lead], batch_ids[lead:]
        likeness = self.likeness(pass_number, body)
        if num_replicas == 1:
            last = int(likeness.argmax()) if len(body) else 0
            return np.concatenate([head, np.delete(body, slice(last, last + 1)), body[last : last + 1]])
        body = body[np.argsort(likeness, kind="stable")]
        whole = len(body) // num_replicas
        groups, rest = body[: whole * num_replicas].reshape(whole, num_replicas), body[whole * num_replicas :]
        key = derive_key(self.table.options.seed, epoch, pass_number, GROUPS)
        moved = whole if len(rest) else whole - 1
        if moved > 1:
            groups = np.concatenate([groups[permute(np.arange(moved), moved, key)], groups[moved:]])
        turns = draw(np.arange(whole), num_replicas, derive_key(key, ROTATIONS))
        columns = (np.arange(num_replicas) + turns[:, None] * (np.arange(whole) < moved)[:, None]) % num_replicas
        return np.concatenate([head, np.take_along_axis(groups, columns, 1).ravel(), rest])

    def begin_at(self, start: StreamStart) -> Self:
        """The same source, where the stream begins elsewhere."""
        return replace(self, start=start, _orders={}, _sums={}, _constants={}, _ends=[])

    def start_after(self, first: int, end: int, taken: int, *, epoch: int, num_replicas: int) -> StreamStart:
        """Where the stream goes on within an epoch.

        Args:
            first: Where the epoch begins in the stream.
            end: Where it ends.
            taken: Batches of the epoch that were taken, in its order.
            epoch: Which epoch.
            num_replicas: The replicas for which it was laid out.
        """
        segments = self.segments(first, end, epoch=epoch, num_replicas=num_replicas)
        while taken > len(segments[0].batch_ids):
            taken -= len(segments.pop(0).batch_ids)
        segment, size = segments[0], len(segments[0].batch_ids)
        cut = Cut(segment.first, segment.first + size, taken, epoch, num_replicas, segment.lead)
        before = self.start.cuts if segment.pass_number == self.start.first_pass else ()
        start = StreamStart(segment.pass_number, (*before, cut) if cut.first + cut.taken else before)
        gone = sum(each.first + each.taken for each in start.cuts)
        return StreamStart(segment.pass_number + 1) if gone == self.batches_per_pass else start

    def _find_order(self, pass_number: int) -> Integers:
        order = self._order_pass(pass_number)
        if pass_number > self.start.first_pass:
            return order
        for cut in self.start.cuts:
            part = order[cut.first : cut.end]
            arranged = self.arrange(pass_number, part, epoch=cut.epoch, num_replicas=cut.num_replicas, lead=cut.lead)
            order = np.concatenate([arranged[cut.taken :], order[cut.end :]])
        return order

    def _order_pass(self, pass_number: int) -> Integers:
        """The batch ids of a whole pass, in its order: int64 `[n]`."""
        size, options = self.batches_per_pass, self.table.options
        order: Integers = np.arange(size)
        return permute(order, size, derive_key(options.seed, pass_number, PASSES)) if options.shuffle else order

    def _units_of(self, pass_number: int) -> Integers:
        """What `estimate` gives, for a few passes: int64 `[len(table)]`."""
        if pass_number not in self._estimates:
            keep(self._estimates, pass_number, self.estimate(pass_number), most=_KEPT_PASSES)
        return self._estimates[pass_number]

    def _sums_of(self, pass_number: int) -> Floats:
        """Units before each batch of what the stream has of a pass, and all of them: float64 `[n + 1]`."""
        if pass_number not in self._sums:
            units = self._units_of(pass_number)[self.order_of(pass_number)]
            keep(self._sums, pass_number, np.concatenate([[0.0], np.cumsum(units)]), most=_KEPT_PASSES)
        return self._sums[pass_number]

    def _locate(self, batches: int) -> tuple[int, int]:
        """The pass after the first batches of the stream, and the index in it."""
        first = self._first_batches
        if batches < first:
            return self.start.first_pass, batches
        later, index = divmod(batches - first, self.batches_per_pass)
        return self.start.first_pass + 1 + later, index

    def _batches_before_pass(self, pass_number: int) -> int:
        later = pass_number - self.start.first_pass - 1
        return 0 if later < 0 else self._first_batches + later * self.batches_per_pass

    def _units_before_pass(self, pass_number: int) -> float:
        later = pass_number - self.start.first_pass - 1
        if later < 0:
            return 0.0
        if self.has_equal_passes:
            return self._first_units + later * self.units_per_pass
        self._ends[:] = self._ends or [self._first_units]
        while len(self._ends) <= later:
            self._ends.append(self._ends[-1] + float(self._sums_of(self.start.first_pass + len(self._ends))[-1]))
        return self._ends[later]

    def _find_pass(self, units: float, near: int) -> int:
        """The pass in which the first units of the stream end, near to a guess."""
        while self._units_before_pass(near) > units:
            near -= 1
        while self._units_before_pass(near + 1) <= units:
            near += 1
        return near

    @property
    def _first_units(self) -> float:
        """Units of the pass in which the stream begins."""
        if "first" not in self._constants:
            whole = self.has_equal_passes and not self.start.cuts
            self._constants["first"] = self.units_per_pass if whole else float(self._sums_of(self.start.first_pass)[-1])
        return self._constants["first"]

    def _indices(self, samples: Any, size: int) -> Integers:
        """Sample indices of the mixture for those of the source, which has this many samples and then pieces."""
        indices: Integers = samples.astype(np.int64)
        return indices + np.where(indices < size, self.offset, self.pieces_offset)
