"""The batches of any epoch, by number: what is in a batch changes with the epoch, their number and shapes do not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, NamedTuple, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from collate.widths import padded_widths
from samplers.planning.budget import Floats, Integers
from samplers.planning.keyed_shuffle import Domains, Words, derive_key, draw, permute, stream_keys
from samplers.planning.options import Options
from samplers.planning.sorting import Corpus, Places
from samplers.planning.tables.buckets import Edge
from samplers.planning.tables.equal_lengths import Extents, Runs

# What a key is for, beside the purposes of `samplers.planning.schedule`: turns among epochs, samples of one length.
TURNS, RUNS = range(20, 22)
# What is large, and found again from the rest.
_FOUND_AGAIN: Final = frozenset(["_runs", "_run_numbers", "_epochs", "_known"])

Shape: TypeAlias = tuple[int, int | tuple[int, ...]]


class Sizes(NamedTuple):
    """Of each batch: rows `[n]`, padded widths `[n, K]` and real tokens over all fields `[n]`, int64."""

    rows: Integers
    widths: Integers
    tokens: Integers


class _Table(NamedTuple):
    """The edges as columns, int64 `[edges]`; `strata` numbers each edge's first stratum, `ends` counts batches."""

    first: Integers
    batches: Integers
    rows: Integers
    full: Integers
    rest: Integers
    skipped: Integers
    strata: Integers
    ends: Integers


class _Cells(NamedTuple):
    """Samples as strata hold them: the stratum, its first place and size, and an offset in it; int64 `[n]` each."""

    strata: Integers
    first: Integers
    size: Integers
    offset: Integers

    def shuffled(self, key: int) -> "_Cells":
        """Each stratum shuffled by a key of its own."""
        return self._replace(offset=permute_each(self.offset, self.size, stream_keys(key, self.strata)))


@dataclass(frozen=True, eq=False)
class Layout:
    """All batches, numbered so that those alike in shape stand next to each other.

    Batch j of an edge takes from every stratum the sample that a keyed bijection of the epoch sends j to.

    Attributes:
        corpus: the samples and their order.
        edges: in the order of their batches' numbers.
        options: what the layout was made by.
        turns: other layouts of as many batches, which epochs take in turn with this one.
    """

    corpus: Corpus
    edges: tuple[Edge, ...]
    options: Options
    turns: tuple["Layout", ...] = field(default=(), kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _FOUND_AGAIN}

    def of_epoch(self, epoch: int, replicas: int) -> Self:
        """The layout of an epoch that so many replicas begin: this one or another of as many batches."""
        del replicas
        turn = turn_of(epoch, 1 + len(self.turns), self.options.seed)
        return cast(Self, self.turns[turn - 1]) if turn else self

    def __len__(self) -> int:
        """Batches in an epoch, before any is split among replicas."""
        return int(self._table.ends[-1])

    @property
    def trials(self) -> Iterable[int]:
        """Epochs that show whether replicas can share the last step of every epoch."""
        # All turns have come by then, and a turn ends with the same number of rows each time.
        return range(max(2, 1 + len(self.turns)))

    def shares(self, rows: Integers, replicas: int) -> bool:
        """Whether the last step can be shared, if these batches `[n]` of so many rows are the last of an epoch."""
        partial = len(self) % replicas
        return partial == 0 or self.options.drop_last or int(rows[-partial:].sum()) >= replicas

    @property
    def shapes(self) -> list[Shape]:
        """The closed list of (rows, width) that batches have at most, in any epoch, without repetition."""
        return list(dict.fromkeys(shape for layout in (self, *self.turns) for shape in layout.own_shapes))

    @property
    def own_shapes(self) -> list[Shape]:
        """The (rows, width) of each edge."""
        return [(edge.rows, edge.width if len(edge.width) > 1 else edge.width[0]) for edge in self.edges]

    @property
    def unused(self) -> int:
        """Samples of the batch that `batch_size` left short and `drop_last` drops; not the same each epoch."""
        return len(self.corpus) - sum(
            (edge.batches - edge.rest - edge.skipped) * edge.full + edge.rest * edge.rows for edge in self.edges
        )

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when an edge or the choice of samples does."""
        chosen = b"" if self.options.indices is None else np.sort(self.corpus.order).astype("<i8").tobytes()
        return blake2b(self._decided.encode() + chosen, digest_size=8).hexdigest()

    @property
    def _decided(self) -> str:
        """What decides a plan beside the lengths, the seed and the choice of samples."""
        others = tuple(layout.edges for layout in self.turns)
        return repr((self.edges, others, self.options.shuffle, self.options.drop_last))

    def rows_of(self, numbers: Integers) -> Integers:
        """Rows of these batches: int64 `[n]`."""
        return self._rows(*self._locate(numbers))

    def samples_of(self, numbers: Integers, key: int) -> tuple[Places, Integers]:
        """The samples of these batches, one after the other, and how many each has; those of one field longest first.

        Args:
            numbers: of the batches, int64 `[n]`, each in `range(len(layout))`.
            key: of the epoch.

        Returns:
            Samples `[sum(rows)]`, and rows int64 `[n]`.
        """
        table = self._table
        edges, columns = self._locate(numbers)
        rows = self._rows(edges, columns)
        stratum: Integers = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        offset: Integers = np.repeat(columns, rows)
        if (table.rest[edges] == table.batches[edges]).all():
            size: Integers = np.repeat(table.batches[edges], rows)
            first: Integers = np.repeat(table.first[edges], rows) + stratum * size
        else:
            owner: Integers = np.repeat(edges, rows)
            first, size = self._bounds(owner, stratum)
            # Short strata have samples for the last batches of their edge only.
            offset -= table.batches[owner] - size
        if not self.options.shuffle:
            return self.corpus.order[first + offset], rows
        strata: Integers = np.repeat(table.strata[edges], rows) + stratum
        places = self._shuffled(np.repeat(self._runs.crossed(edges), rows), _Cells(strata, first, size, offset), key)
        samples: Places = self.corpus.order[places]
        return self._longest_first(samples, rows) if self._trades_lengths else samples, rows

    def use_of(self, sizes: Sizes) -> Floats:
        """The share of the budget that batches of these sizes use: float64 `[n]`."""
        widths = sizes.widths if self.corpus.fields > 1 else sizes.widths[:, 0]
        return self.options.budget.use(sizes.rows, widths, sizes.tokens)

    def sizes_of(self, samples: Places, rows: Integers) -> Sizes:
        """What batches measure.

        Args:
            samples: of the batches, one after the other: `[sum(rows)]`.
            rows: of each, at least one: int64 `[n]`.
        """
        lengths, starts = self.corpus.lengths_of(samples), np.cumsum(rows) - rows
        longest = np.maximum.reduceat(lengths, starts)
        tokens = np.add.reduceat(lengths.sum(1), starts)
        return Sizes(rows, padded_widths(longest, self.options.allowed_widths), tokens)

    def fill_of(self, sizes: Sizes) -> Floats:
        """Rows by the most rows of a shape as wide, float64 `[n]`: above 1 where no shape of the list holds a batch."""
        # Many batches are of one width, and many edges of one shape.
        widths, which = np.unique(sizes.widths, axis=0, return_inverse=True)
        shapes = np.unique([(*edge.width, edge.rows) for edge in self.edges], axis=0)
        most: Integers = np.array(
            [np.where((shapes[:, :-1] >= width).all(1), shapes[:, -1], 0).max() for width in widths]
        )[which.reshape(-1)]
        return np.where(most > 0, sizes.rows / np.maximum(most, 1), np.inf)

    @cached_property
    def _table(self) -> _Table:
        first, batches, rows, full, rest, skipped = np.array([edge[:6] for edge in self.edges], np.int64).T
        return _Table(
            first, batches, rows, full, rest, skipped, strata=np.cumsum(rows) - rows, ends=np.cumsum(batches - skipped)
        )

    def _shuffled(self, crossed: npt.NDArray[np.bool_], cells: _Cells, key: int) -> Integers:
        """The places of the order that stand, in an epoch, for cells; `crossed`: whether runs reach into their edge."""
        runs, run_key = self._runs, derive_key(key, RUNS)
        whole = crossed & runs.whole(cells.strata, cells.size) if crossed.any() else crossed
        if not whole.any():
            cells = cells.shuffled(key)
            places = cells.first + cells.offset
            if crossed.any():
                places = runs.exchange(cells.strata, cells.size, cells.offset, places, run_key)
            return places
        places = cells.first + cells.offset
        inside, apart = np.flatnonzero(whole), np.flatnonzero(~whole)
        places[inside] = runs.exchange_whole(cells.strata[inside], places[inside], run_key)
        if len(apart):
            some = _Cells(*(column[apart] for column in cells)).shuffled(key)
            places[apart] = runs.exchange(some.strata, some.size, some.offset, some.first + some.offset, run_key)
        return places

    def _longest_first(self, samples: Places, rows: Integers) -> Places:
        """Samples of one padded width, which have traded places, back in the order of their lengths."""
        lengths = self.corpus.lengths_of(samples).sum(1)
        batches = np.repeat(np.arange(len(rows)), rows)
        bits, most = len(samples).bit_length(), int(lengths.max(initial=0))
        if (len(rows) * (most + 1)) >> (62 - bits):
            return samples[np.lexsort([-lengths, batches])]
        # One number for each holds batch, length and place: a sort of numbers is faster than one of places.
        keys = ((batches * (most + 1) + most - lengths) << bits) + np.arange(len(samples))
        keys.sort()
        ordered: Places = samples[keys & ((1 << bits) - 1)]
        return ordered

    @property
    def _trades_lengths(self) -> bool:
        """Whether samples of different lengths trade places, because they are padded to one width."""
        return self.corpus.fields == 1 and self.options.allowed_widths is not None

    def _bounds(self, edges: Integers, stratum: Integers) -> tuple[Integers, Integers]:
        """Where strata begin in the order and how many samples they have, by their edge and their place in it."""
        table = self._table
        short = np.maximum(stratum - table.full[edges], 0)
        first = table.first[edges] + (stratum - short) * table.batches[edges] + short * table.rest[edges]
        return first, np.where(stratum >= table.full[edges], table.rest[edges], table.batches[edges])

    @cached_property
    def _runs(self) -> Runs:
        strata = np.append(self._table.strata, self._table.rows.sum())
        return Runs(Extents(self._width_at, self._regions), strata, self._bounds_of)

    def _bounds_of(self, numbers: Integers) -> tuple[Integers, Integers]:
        edges: Integers = np.searchsorted(self._table.strata, numbers, side="right") - 1
        return self._bounds(edges, numbers - self._table.strata[edges])

    @property
    def _regions(self) -> Integers:
        """The parts of the order that samples must stay in: where each begins, and the end of the last."""
        return np.array([0, len(self.corpus)])

    def _width_at(self, places: Integers) -> Integers:
        """What samples at these places of the order count for; samples of several fields, by the run they are in."""
        if self.corpus.fields > 1:
            return self._run_numbers[places]
        return self._counted(self.corpus.lengths_of(self.corpus.order[places]))[:, 0]

    @cached_property
    def _run_numbers(self) -> Integers:
        """Of samples with several fields, a number that falls by one where their widths change: int64 `[n]`."""
        widths = self._counted(self.corpus.lengths_at(0, len(self.corpus)))
        new = np.zeros(len(widths), np.int64)
        new[1:] = (widths[1:] != widths[:-1]).any(1)
        return -new.cumsum()

    def _counted(self, lengths: Integers) -> Integers:
        """The padded widths that single samples have, or where widths are not rounded or real tokens count, lengths."""
        rounded = self.options.allowed_widths is not None and self.options.count == "padded"
        return padded_widths(lengths, self.options.allowed_widths) if rounded else lengths

    def _locate(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Each batch's edge, and its place among the edge's batches."""
        table = self._table
        edges = np.searchsorted(table.ends, numbers, side="right")
        return edges, numbers - table.ends[edges] + table.batches[edges]

    def _rows(self, edges: Integers, columns: Integers) -> Integers:
        table = self._table
        return np.where(columns >= table.batches[edges] - table.rest[edges], table.rows[edges], table.full[edges])


def in_order(edges: Sequence[Edge], options: Options) -> list[Edge]:
    """Edges in the order in which their batches are numbered."""
    if options.shuffle:
        # An epoch ends with its last numbers, and only batches of many rows can be split among replicas there.
        return sorted(edges, key=lambda edge: edge.rows)
    return sorted(edges, key=lambda edge: -sum(edge.width))


def turn_of(epoch: int, turns: int, seed: int) -> int:
    """Which of `turns` alternatives an epoch takes, 0 to `turns` - 1.

    Each comes once in so many epochs. They follow each other in bit-reversed order, so that neighbours in number are
    far apart in time, and every cycle begins elsewhere, so that none comes back after a fixed number of epochs.
    """
    cycle, step = divmod(epoch, turns)
    order = sorted(range(turns), key=lambda turn: f"{turn:032b}"[::-1])
    return (order[step] + int(draw(np.array([cycle % (1 << 62)]), turns, derive_key(seed, TURNS))[0])) % turns


def permute_each(places: Integers, sizes: Integers, keys: Words) -> Integers:
    """`permute` in domains of several sizes, most of which are as large as the first."""
    if not len(places):
        return places
    usual = sizes == sizes[0]
    size = int(sizes[0])
    moved = permute(places if usual.all() else np.minimum(places, size - 1), size, keys)
    others = np.flatnonzero(~usual)
    if len(others):
        _, first, which = np.unique(sizes[others], return_index=True, return_inverse=True)
        domains = Domains(sizes[others][first])
        moved[others] = domains.permute(places[others], which, keys[others])
    return moved
