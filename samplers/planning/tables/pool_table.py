"""The batches of a small corpus: every epoch sorts chunks of its own, and has as many batches as any other.

Edges that stay, or take turns, leave a corpus of a few batches little to mix: half of it may be one edge. Such a corpus
is small enough to be dealt out again in each epoch: its samples go to as many chunks as there are windows, at random,
each chunk is sorted by length, and cut into batches as full as the budget lets them be. How many batches come out
depends on the draw; an epoch takes the first draw that has no more than all epochs shall have. Replicas would wait for
each other where batches are short: for them, the draw is cut again into batches of even shares of the budget.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import Final, NamedTuple, Self

import numpy as np

from samplers.planning.budget import Floats, Integers
from samplers.planning.keyed_shuffle import derive_key, permute
from samplers.planning.options import Options
from samplers.planning.sorting import Corpus, Places
from samplers.planning.tables.batch_table import Layout, Shape, Sizes
from samplers.planning.tables.buckets import MANY_BATCHES, count_windows, estimate_batches

# An epoch is sorted when its first batch is due: some milliseconds.
MANY_SAMPLES: Final = 1 << 15
# Draws that tell how many batches an epoch shall have, and those that an epoch makes to have no more.
SAMPLED: Final = 8
TRIED: Final = 32
# Shares of the budget are even to about a thousandth; so many shares on either side are tried.
UNITS: Final = 1 << 10
NEAR: Final = 12
# Batches at the end of each chunk that are cut again together with those of the others.
TAIL: Final = 3
# By so many times more draws than the first epochs do the others look for a last step that replicas can share.
PATIENCE: Final = 32
# What a key is for, beside the purposes of `samplers.planning.tables.batch_table`.
CHUNKS: Final = 30


class Draw(NamedTuple):
    """An epoch's batches: samples one batch after the other, and the rows of each."""

    samples: Places
    rows: Integers


class Deal(NamedTuple):
    """An order of samples, and its parts.

    Attributes:
        places: in the order of lengths, chunk after chunk and longest first.
        ends: where each chunk ends.
        bounds: where each batch begins, and the end of the last.
    """

    places: Integers
    ends: list[int]
    bounds: list[int]


@dataclass(frozen=True, eq=False)
class ChunkLayout(Layout):
    """The batches of a small corpus, those alike in shape next to each other; what is in them is drawn in each epoch.

    Attributes:
        chunks: into which an epoch deals the corpus.
        batches: of every epoch.
        drawn: the batches of the epoch that this is the layout of; None before one is chosen.
    """

    chunks: int = 2
    batches: int = 0
    drawn: Draw | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        """Batches in an epoch, before any is split among replicas."""
        return self.batches

    def of_epoch(self, epoch: int, replicas: int) -> Self:
        """The layout of an epoch that so many replicas begin."""
        found = self._epochs.get((epoch, replicas))
        if found is None:
            found = replace(self, drawn=self._draw(epoch, replicas))
            self._epochs[epoch, replicas] = found
            while len(self._epochs) > 2:
                del self._epochs[next(iter(self._epochs))]
        return found

    @property
    def shapes(self) -> list[Shape]:
        """The closed list of (rows, width) that batches have at most, in any epoch, without repetition."""
        left = len(self.corpus) - self.corpus.alone
        alone = self._width_at(np.arange(self.corpus.alone))
        widest = dict.fromkeys((1, width) for width in alone.tolist())
        most = {width: min(left, self.options.budget.max_rows(width)) for width in np.unique(self._widths).tolist()}
        return [*widest, *((rows, width) for width, rows in sorted(most.items(), reverse=True))]

    @property
    def unused(self) -> int:
        """Samples of the batch that `batch_size` left short and `drop_last` drops; others in each epoch."""
        rows = self.full_rows
        return len(self._widths) % rows if rows and self.options.drop_last else 0

    @property
    def _decided(self) -> str:
        return repr((self.chunks, self.batches, self.shapes, self.options.drop_last))

    def rows_of(self, numbers: Integers) -> Integers:
        """Rows of these batches: int64 `[n]`."""
        return self._present.rows[numbers]

    def samples_of(self, numbers: Integers, key: int) -> tuple[Places, Integers]:
        """The samples of these batches, one batch after the other, each longest first, and how many each has.

        Args:
            numbers: of the batches, int64 `[n]`, each in `range(len(layout))`.
            key: of the epoch, which has decided the draw already.

        Returns:
            Samples `[sum(rows)]`, and rows int64 `[n]`.
        """
        del key
        samples, all_rows = self._present
        rows = all_rows[numbers]
        within: Integers = np.arange(rows.sum()) - np.repeat(rows.cumsum() - rows, rows)
        return samples[np.repeat((all_rows.cumsum() - all_rows)[numbers], rows) + within], rows

    def fill_of(self, sizes: Sizes) -> Floats:
        """Rows by the most rows of a shape as wide, float64 `[n]`: above 1 where no shape of the list holds a batch."""
        most = [max(1, self.options.budget.max_rows(width)) for width in sizes.widths[:, 0].tolist()]
        fill: Floats = sizes.rows / np.array(most)
        return fill

    @property
    def _present(self) -> Draw:
        return self._draw(0, 1) if self.drawn is None else self.drawn

    @cached_property
    def _epochs(self) -> dict[tuple[int, int], Self]:
        return {}

    @cached_property
    def _counts(self) -> Integers:
        """What samples that do not exceed the budget alone are sorted by, longest first: int64 `[n]`."""
        return self._width_at(np.arange(self.corpus.alone, len(self.corpus)))

    @cached_property
    def _widths(self) -> Integers:
        """The padded widths of these samples: int64 `[n]`."""
        return np.maximum(self._counts, 1)

    @property
    def full_rows(self) -> int:
        """Rows of every batch but one where `batch_size` alone decides them, else 0."""
        size = self.options.batch_size
        return size if size is not None and self.options.budget.max_rows(int(self._widths[0])) == size else 0

    def _draw(self, epoch: int, replicas: int) -> Draw:
        """The first draw of few enough batches whose last step the replicas can share."""
        seed, first = self.options.seed, None
        most = self.options.budget.max_rows(int(self._widths[-1]))
        hopeless = not self.shares(np.full(self.batches, most), replicas)
        # What passes the trials is so likely that later epochs find it.
        for turn in range(TRIED if epoch in self.trials else PATIENCE * TRIED):
            if turn >= TRIED and first is None:
                break
            deal = self._deal(derive_key(seed, epoch, CHUNKS, turn))
            if self._count(deal) <= self.batches:
                draw = self._finish(deal, replicas)
                if hopeless or self.shares(draw.rows, replicas):
                    return draw
                first = draw if first is None else first
        if first is None:
            few = min((self._deal(derive_key(CHUNKS, number)) for number in range(SAMPLED)), key=self._count)
            first = self._finish(few, replicas)
        return first

    def usual_batches(self) -> int:
        """How many batches draws have on average, rounded up; the same for every seed."""
        counts = [self._count(self._deal(derive_key(CHUNKS, draw))) for draw in range(SAMPLED)]
        return -(-sum(counts) // SAMPLED)

    def _count(self, deal: Deal) -> int:
        return len(deal.bounds) - 1 + self.corpus.alone

    def _deal(self, key: int) -> Deal:
        """Deal the samples to chunks, sort these, and cut them into batches."""
        samples, full = len(self._widths), self.full_rows
        slots = permute(np.arange(samples), samples, key)
        kept = samples - self.unused
        if full:
            ends = -(-kept // full) * np.arange(1, self.chunks + 1) // self.chunks * full
        else:
            ends = samples * np.arange(1, self.chunks + 1) // self.chunks
        ends = np.minimum(ends, kept)
        # Of equal samples, those come first that the draw has put first.
        places = np.lexsort([slots, -self._counts, np.searchsorted(ends, slots, side="right")])[:kept]
        widths, bounds = self._widths[places], [0]
        for end in ends.tolist():
            bounds += self._cut(widths, bounds[-1], end, UNITS)
        return Deal(places, ends.tolist(), bounds)

    def _cut(self, widths: Integers, first: int, end: int, share: int) -> list[int]:
        """Where batches end that are cut from `first` to `end`, each of a share of the rows that fit, in units."""
        bounds, carry = [], 0
        while first < end:
            # Fractions of a row are carried on, so that a little more share is a few rows more in all.
            carry += self.options.budget.max_rows(int(widths[first])) * share
            rows = max(1, carry // UNITS)
            carry = max(0, carry - rows * UNITS)
            first = min(end, first + rows)
            bounds.append(first)
        return bounds

    def _even(self, deal: Deal) -> Deal:
        """Cut the chunks again into as many batches, and those that the epoch lacks, of even shares of the budget.

        The last batch of a chunk is short else, and the replicas of its step would wait for those with a full one. The
        last batches of all chunks are cut again together, so that one of the epoch is short at most, and hardly.
        """
        widths, cuts, first = self._widths[deal.places], [], 0
        counts = np.diff(np.searchsorted(deal.bounds, [0, *deal.ends])).tolist()
        lacking = self.batches - self._count(deal)
        for number, (end, count) in enumerate(zip(deal.ends, counts, strict=True)):
            cuts.append([first, *self._cut_into(widths, first, end, count + (lacking + number) // self.chunks)])
            first = end
        kept = [cut[: max(1, len(cut) - TAIL)] for cut in cuts]
        tails = [np.arange(keep[-1], end) for keep, end in zip(kept, deal.ends, strict=True)]
        heads = [np.arange(start, keep[-1]) for start, keep in zip([0, *deal.ends], kept, strict=False)]
        tail = np.concatenate(tails)
        tail = tail[np.argsort(-self._counts[deal.places[tail]], kind="stable")]
        places = deal.places[np.concatenate([*heads, tail])]
        sizes = [size for keep in kept for size in np.diff(keep).tolist()]
        most = sum(map(len, cuts)) - sum(map(len, kept))
        begin = len(places) - len(tail)
        ends = self._cut_into(self._widths[places], begin, len(places), most)
        return Deal(places, deal.ends, [*np.cumsum([0, *sizes]).tolist(), *ends])

    def _cut_into(self, widths: Integers, first: int, end: int, most: int) -> list[int]:
        """Where batches end that are cut from `first` to `end`, as many as `most` if that can be, of an even share."""
        low, high = 0, UNITS
        while high - low > 1:
            middle = (low + high) // 2
            fits = len(self._cut(widths, first, end, middle)) <= most
            low, high = (low, middle) if fits else (middle, high)
        # Of the shares nearby, one whose last batch is as full as the others.
        near = range(max(1, high - NEAR), min(UNITS, high + NEAR) + 1)
        cuts = [self._cut(widths, first, end, share) for share in near]
        fitting = [cut for cut in cuts if len(cut) <= most]
        return max(fitting, key=lambda cut: self._least_use(widths, [first, *cut]))

    def _least_use(self, widths: Integers, bounds: list[int]) -> float:
        """The smallest share of the rows that fit in one of these batches."""
        return min(
            (end - first) / max(1, self.options.budget.max_rows(int(widths[first]))) for first, end in pairwise(bounds)
        )

    def _finish(self, deal: Deal, replicas: int) -> Draw:
        """Split the largest batches until there are enough, and sort them by rows; those alone come first."""
        if replicas > 1 and not self.full_rows:
            deal = self._even(deal)
        sizes = np.diff(deal.bounds).tolist()
        parts = [1] * len(sizes)
        largest = [(-float(size), number) for number, size in enumerate(sizes)]
        heapify(largest)
        for _ in range(self.batches - self._count(deal)):
            number = largest[0][1]
            parts[number] += 1
            heapreplace(largest, (-sizes[number] / parts[number], number))
        split = [np.array_split(np.arange(size), part) for size, part in zip(sizes, parts, strict=True)]
        rows: Integers = np.array([len(piece) for pieces in split for piece in pieces])
        starts = rows.cumsum() - rows
        order = np.lexsort([-self._widths[deal.places[starts]], rows])
        starts = starts[order]
        rows = rows[order]
        within: Integers = np.arange(rows.sum()) - np.repeat(rows.cumsum() - rows, rows)
        samples: Places = self.corpus.order[self.corpus.alone + deal.places[np.repeat(starts, rows) + within]]
        if self._trades_lengths:
            samples = self._longest_first(samples, rows)
        alone = self.corpus.order[: self.corpus.alone]
        return Draw(np.concatenate([alone, samples]), np.concatenate([np.ones(len(alone), np.int64), rows]))


def lay_out_chunks(corpus: Corpus, options: Options) -> ChunkLayout | None:
    """The layout of a small corpus; None of one that is large, or has several fields, or whose real tokens count."""
    if not options.shuffle or corpus.fields > 1 or options.count == "real":
        return None
    left = len(corpus) - corpus.alone
    if not 0 < left <= MANY_SAMPLES:
        return None
    windows, batches = count_windows(corpus, options), estimate_batches(corpus, options)
    layout = ChunkLayout(corpus, (), options, chunks=windows)
    least = windows if layout.full_rows else 2 * windows
    if not windows > 1 or not least <= batches < MANY_BATCHES:
        return None
    if options.drop_last and options.batch_size is not None and not layout.full_rows:
        # Which batches `batch_size` leaves short depends on the draw.
        return None
    return replace(layout, batches=layout.usual_batches())
