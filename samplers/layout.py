"""The batches of any epoch, by number: what is in a batch changes with the epoch, their number and shapes do not."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Final, NamedTuple, Self, TypeAlias, cast

import numpy as np

from samplers.budget import Floats, Integers
from samplers.corpus import Corpus, Lengths, Places, rank_lengths
from samplers.edges import Edge, cut_turns
from samplers.options import Options
from samplers.shuffle import Words, permute, stream_keys
from samplers.ties import Ties
from samplers.widths import round_up

# Strata whose ends are read when the layout is first used: a fraction of a second.
MOST_TIED: Final = 1 << 18

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


@dataclass(frozen=True, eq=False)
class Layout:
    """All batches, numbered so that those alike in shape stand next to each other.

    Batch j of an edge takes from every stratum the sample that a keyed bijection of the epoch sends j to.

    Attributes:
        corpus: the samples and their order.
        edges: in the order of their batches' numbers.
        options: what the layout was made by.
        odd: the layout of odd epochs, where it is another.
    """

    corpus: Corpus
    edges: tuple[Edge, ...]
    options: Options
    odd: "Layout | None" = field(default=None, kw_only=True)

    def of_epoch(self, epoch: int) -> Self:
        """The layout of an epoch: this one, or in odd epochs another of as many batches, if there is one."""
        return self if self.odd is None or epoch % 2 == 0 else cast(Self, self.odd)

    def __len__(self) -> int:
        """Batches in an epoch, before any is split among replicas."""
        return int(self._table.ends[-1])

    @property
    def shapes(self) -> list[Shape]:
        """The closed list of (rows, width) that batches have at most, in any epoch, without repetition."""
        edges = self.edges if self.odd is None else self.edges + self.odd.edges
        return list({(edge.rows, edge.width if len(edge.width) > 1 else edge.width[0]): None for edge in edges})

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
        odd = None if self.odd is None else self.odd.edges
        decided = repr((self.edges, odd, self.options.shuffle, self.options.drop_last)).encode()
        return blake2b(decided + chosen, digest_size=8).hexdigest()

    def rows_of(self, numbers: Integers) -> Integers:
        """Rows of these batches: int64 `[n]`."""
        return self._rows(*self._locate(numbers))

    def samples_of(self, numbers: Integers, key: int) -> tuple[Places, Integers]:
        """The samples of these batches, one batch after the other, each longest first, and how many each has.

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
        column: Integers = np.repeat(columns, rows)
        size: Integers = np.repeat(table.batches[edges], rows)
        place: Integers = np.repeat(table.first[edges], rows) + stratum * size
        if (table.rest[edges] != table.batches[edges]).any():
            owner: Integers = np.repeat(edges, rows)
            self._shift_short_strata(owner, stratum, place, column, size)
        if self.options.shuffle:
            strata: Integers = np.repeat(table.strata[edges], rows) + stratum
            if self._ties is not None:
                place = self._ties.move(strata, place, key)
            column = _permute_each(column, size, stream_keys(key, strata))
        return self.corpus.order[place + column], rows

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
        return Sizes(rows, round_up(longest, self.options.allowed_widths), tokens)

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

    @cached_property
    def _ties(self) -> Ties | None:
        """Strata that may trade places; none where there are very many, since pairs hardly meet again there."""
        table, total = self._table, sum(edge.rows for edge in self.edges)
        if self.corpus.fields > 1 or total > MOST_TIED:
            return None
        edge: Integers = np.repeat(np.arange(len(self.edges)), table.rows)
        places = table.first[edge] + (np.arange(total) - table.strata[edge]) * table.batches[edge]
        # In an edge with strata of two sizes, or a batch that is not planned, all stay.
        samples: Integers = np.where((table.rest == table.batches) & (table.skipped == 0), table.batches, 0)[edge]
        first, last = (self._widths_at(np.where(samples > 0, ends, 0)) for ends in (places, places + samples - 1))
        apart = (first.max() + 1) * self._regions[edge]
        return Ties.find(places, samples, first + apart, last + apart)

    @property
    def _regions(self) -> Integers:
        """Of each edge the part of the corpus that its samples must stay in: int64 `[edges]`."""
        return np.zeros(len(self.edges), np.int64)

    def _widths_at(self, places: Integers) -> Integers:
        """What samples at these places of the order count for in the budget of one field: int64 `[n]`."""
        lengths = self.corpus.lengths_of(self.corpus.order[places])[:, 0]
        return lengths if self.options.count == "real" else round_up(lengths, self.options.allowed_widths)

    def _locate(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Each batch's edge, and its place among the edge's batches."""
        table = self._table
        edges = np.searchsorted(table.ends, numbers, side="right")
        return edges, numbers - table.ends[edges] + table.batches[edges]

    def _rows(self, edges: Integers, columns: Integers) -> Integers:
        table = self._table
        return np.where(columns >= table.batches[edges] - table.rest[edges], table.rows[edges], table.full[edges])

    def _shift_short_strata(
        self, edges: Integers, stratum: Integers, place: Integers, column: Integers, size: Integers
    ) -> None:
        """Correct, in place, what was computed as if all strata of an edge were of one size."""
        table = self._table
        late = np.flatnonzero(stratum >= table.full[edges])
        edge = edges[late]
        missing = table.batches[edge] - table.rest[edge]
        place[late] -= (stratum[late] - table.full[edge]) * missing
        column[late] -= missing
        size[late] -= missing


def lay_out(lengths: Lengths, options: Options) -> Layout:
    """Sort the lengths and cut the batch edges, once for all epochs.

    Raises:
        TypeError: Lengths or indices are not integers.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: Lengths have the wrong shape, or no batch is left to plan.
    """
    corpus = rank_lengths(lengths, options)
    even, odd = (tuple(in_order(edges, options)) for edges in cut_turns(corpus, options))
    layout = Layout(corpus, even, options, odd=None if odd == even else Layout(corpus, odd, options))
    if not even or len(layout) == 0:
        raise ValueError(
            f"no batch is left to plan: drop_last drops all {len(corpus)} samples, fewer than "
            f"batch_size={options.batch_size}; lower batch_size or keep the last batch"
        )
    return layout


def in_order(edges: Sequence[Edge], options: Options) -> list[Edge]:
    """Edges in the order in which their batches are numbered."""
    if options.shuffle:
        # An epoch ends with its last numbers, and only batches of many rows can be split among replicas there.
        return sorted(edges, key=lambda edge: edge.rows)
    return sorted(edges, key=lambda edge: -sum(edge.width))


def _permute_each(columns: Integers, sizes: Integers, keys: Words) -> Integers:
    if len(sizes) and (sizes == sizes[0]).all():
        return permute(columns, int(sizes[0]), keys)
    moved = np.empty_like(columns)
    for size in np.unique(sizes).tolist():
        chosen = sizes == size
        moved[chosen] = permute(columns[chosen], size, keys[chosen])
    return moved
