"""Batches of several sources: the samples of a window of batches are cut into as many batches again, by length.

The batches of an epoch are laid out source by source first, so that shares and passes are exact at the end of every
window. Within a window the samples of all sources are sorted together. Batches of neighbours in length are never more
than before: of all ways to divide samples under a budget of rows and width, neighbours in length need the fewest
batches. A source that ends a pass within a window keeps its own batches there, so that none of its samples comes a
second time before its pass is through.
"""

from collections.abc import Callable
from itertools import pairwise
from math import isqrt
from typing import Final, NamedTuple, Protocol

import numpy as np

from samplers.planning.budget import Floats, Integers
from samplers.planning.keyed_shuffle import derive_key, permute, stream_keys
from samplers.planning.mixtures.sequence import MixedEpoch
from samplers.planning.tables.buckets import BATCHES_PER_SQUARED_WINDOW

# Batches of a window: as many as a corpus of one source has buckets, within these bounds.
FEWEST, MOST = 64, 1024
# Steps of which the next one is chosen.
CANDIDATES: Final = 32
# Purposes of keys: samples of equal width, and the order of turns.
EQUALS, TURNS = 65, 66


class Cutter(Protocol):
    """Divides the samples of a window into batches again."""

    def can_divide(self, epoch: MixedEpoch, positions: Integers) -> Integers:
        """Those of these batches whose samples may be divided again: int64 `[n]`."""
        ...

    def divide(self, epoch: MixedEpoch, positions: Integers, key: int) -> MixedEpoch | None:
        """As many batches with the samples of these, neighbours alike, the most rows last; None if more are needed.

        Args:
            epoch: All batches.
            positions: Those that are divided again, int64 `[n]`.
            key: Random key of the window.
        """
        ...


def blend(
    epoch: MixedEpoch,
    cutter: Cutter,
    shares: Floats,
    *,
    units_by_source: Callable[[MixedEpoch], Integers],
    num_replicas: int,
    window: int | None,
    key: int,
) -> MixedEpoch:
    """The batches of an epoch with samples of several sources in each, where their lengths are alike.

    Args:
        epoch: The batches of an epoch, each of one source, as one replica would take them.
        cutter: Divides samples into batches.
        shares: Share of each source, float64 `[sources]`.
        units_by_source: Gives the units of each source in each of these batches, int64 `[n, sources]`.
        num_replicas: W: each run of W batches of the result is a step.
        window: Batches of a window; None chooses from their number.
        key: Random key of the epoch.
    """
    edges = _find_edges(epoch, num_replicas, window)
    taken = np.zeros(len(shares))
    parts = []
    for number, (first, end) in enumerate(pairwise(edges)):
        divided, kept = _divide_window(epoch, np.arange(first, end), cutter, derive_key(key, number))
        both = MixedEpoch.join([divided, kept])
        units = units_by_source(both).astype(np.float64)
        blocks = _make_blocks(len(divided.sizes), len(kept.sizes), num_replicas)
        order = _order_blocks(blocks, units, shares, taken, key=derive_key(key, number, TURNS))
        parts.append(both.take(order))
        taken += units.sum(0)
    # Samples were exchanged within these windows, so that their shards are read together.
    groups = None if epoch.groups is None else np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    blended = MixedEpoch.join(parts)
    return blended._replace(sources=epoch.sources, passes=epoch.passes, borders=np.array(edges), groups=groups)


def _find_edges(epoch: MixedEpoch, num_replicas: int, window: int | None) -> list[int]:
    """The positions at which windows begin, and the end of the last. All but the last window have whole steps.

    A window of half the usual size or more ends where a source ends a pass, if then fewer batches are of sources that
    end one within.
    """
    batches = len(epoch.sources)
    if window is None:
        windows = max(2, isqrt(batches // BATCHES_PER_SQUARED_WINDOW))
        window = min(MOST, max(FEWEST, batches // windows))
    size = max(1, window // num_replicas) * num_replicas
    before, begins = _find_borders(epoch)
    edges = [0]
    while batches - edges[-1] > size * 3 // 2:
        start = edges[-1]
        # The ends that may be: where a pass begins, rounded down to whole steps, and the usual size.
        ends = begins[(begins >= start + max(num_replicas, size // 2)) & (begins <= start + size)]
        ends = np.append(np.unique(ends // num_replicas * num_replicas), start + size)
        within = [epoch.sources[np.unique(begins[(before >= start) & (begins < end)])] for end in ends.tolist()]
        lost = [np.isin(epoch.sources[start:end], each).mean() for each, end in zip(within, ends.tolist(), strict=True)]
        # Of equally good ends, the last.
        edges.append(int(ends[len(lost) - 1 - int(np.argmin(lost[::-1]))]))
    return [*edges, batches]


def _find_borders(epoch: MixedEpoch) -> tuple[Integers, Integers]:
    """The last batch of each pass that ends in the epoch, and the first of the next: positions, int64 `[n]`, `[n]`."""
    order = np.argsort(epoch.sources, kind="stable")
    sources, passes = epoch.sources[order], epoch.passes[order]
    ends = np.flatnonzero((np.diff(sources) == 0) & (np.diff(passes) != 0))
    return order[ends], order[ends + 1]


def _divide_window(epoch: MixedEpoch, positions: Integers, cutter: Cutter, key: int) -> tuple[MixedEpoch, MixedEpoch]:
    """The batches of a window that were divided again, and those that are as they were, in their order."""
    sources, passes = epoch.sources[positions], epoch.passes[positions]
    # Pass and source as one number: a source with two of them here ends a pass.
    pairs = np.unique(sources * (int(passes.max()) + 1) + passes) // (int(passes.max()) + 1)
    ending = np.flatnonzero(np.bincount(pairs) > 1)
    chosen = cutter.can_divide(epoch, positions[~np.isin(sources, ending)])
    divided = None
    if len(np.unique(epoch.sources[chosen])) > 1:
        divided = cutter.divide(epoch, chosen, key)
    if divided is None:
        chosen = chosen[:0]
        divided = epoch.take(chosen)
    return divided, epoch.take(np.setdiff1d(positions, chosen, assume_unique=True))


class Blocks(NamedTuple):
    """Batches of a window in blocks, by their index: the divided ones come before those that were kept.

    Attributes:
        divided: Steps of divided batches, in any order: int64 `[n, W]`.
        kept: Steps of batches that were kept, in this order: int64 `[m, W]`.
        last: The other batches, which are the last: fewer than two steps of them.
    """

    divided: Integers
    kept: Integers
    last: Integers


def _make_blocks(divided: int, kept: int, num_replicas: int) -> Blocks:
    """Blocks of the first `divided` batches and of those after them; the one of most rows is the very last.

    >>> _make_blocks(5, 3, 2)
    Blocks(divided=array([[0, 1],
           [2, 3]]), kept=array([[5, 6]]), last=array([7, 4]))
    """
    ends = divided // num_replicas * num_replicas, divided + kept // num_replicas * num_replicas
    if ends == (divided, divided + kept) and divided:
        # A whole window: its last step has the most rows, and other replicas may have to share it.
        ends = divided - num_replicas, divided + kept
    return Blocks(
        np.arange(ends[0]).reshape(-1, num_replicas),
        np.arange(divided, ends[1]).reshape(-1, num_replicas),
        np.concatenate([np.arange(ends[1], divided + kept), np.arange(ends[0], divided)]),
    )


def _order_blocks(blocks: Blocks, units: Floats, shares: Floats, taken: Floats, *, key: int) -> Integers:
    """An order of batches whose prefixes have the shares of the mixture: int64 `[n]`.

    Of some random steps, the next is always the one after which all sources together are nearest to their shares.

    Args:
        blocks: The steps.
        units: Units of each source in each batch, float64 `[n, sources]`.
        shares: Share of each source.
        taken: Units of each source before.
        key: Random key.
    """
    free = blocks.divided[permute(np.arange(len(blocks.divided)), len(blocks.divided), key)]
    steps = np.concatenate([free, blocks.kept])
    totals = units[steps].sum(1)
    changes = totals - totals.sum(1, keepdims=True) * shares
    error = taken - taken.sum() * shares
    # Each candidate is followed in its place by another step: kept ones by the next one kept, so that they stay in
    # their order.
    places = np.arange(min(CANDIDATES, len(free))).tolist() + [len(free)] * (len(blocks.kept) > 0)
    following, order = len(places) - (len(blocks.kept) > 0), []
    candidates = changes[places]
    while places:
        after = candidates + error
        best = int(np.einsum("ij,ij->i", after, after).argmin())
        order.append(places[best])
        error = after[best]
        if places[best] >= len(free):
            new = places[best] + 1 if places[best] + 1 < len(steps) else None
        else:
            new, following = (following, following + 1) if following < len(free) else (None, following)
        if new is None:
            del places[best]
            candidates = np.delete(candidates, best, 0)
        else:
            places[best] = new
            candidates[best] = changes[new]
    return np.concatenate([steps[order].ravel(), blocks.last])


def cut_evenly_into(rows: Integers, batches: int) -> Integers | None:
    """Cut samples, widest first, into this many batches of neighbours, as even as possible: rows of each `[batches]`.

    Seven samples, of which 2, 2, 3, 3, 3, 4 and 4 fit in a batch with the first of them; three batches:

    >>> cut_evenly_into(np.array([2, 2, 3, 3, 3, 4, 4]), 3).tolist()
    [2, 3, 2]

    Args:
        rows: Rows of a batch that begins with each sample, at least 1, ascending: int64 `[n]`.
        batches: How many there must be, at most n.

    Returns:
        int64 `[batches]`; None if there must be more.
    """
    limits = rows.tolist()
    needed = float((1.0 / rows).sum())
    # Shares of the rows that fit, in 64ths: from what is needed on average up to all of them.
    share = min(64, max(1, int(needed / batches * 64)))
    while share <= 64:
        sizes = _cut(limits, share)
        if len(sizes) <= batches:
            return _split(sizes, batches)
        share += 1
    return None


def _cut(limits: list[int], share: int) -> list[int]:
    """Rows of batches that each take this many 64ths of what fits; fractions of a row are carried over."""
    sizes, first, carry, samples = [], 0, 0, len(limits)
    while first < samples:
        limit = limits[first]
        carry += limit * share
        size = min(limit, max(1, carry >> 6), samples - first)
        carry = max(0, carry - (size << 6))
        sizes.append(size)
        first += size
    return sizes


def _split(sizes: list[int], batches: int) -> Integers:
    """The same batches, the largest in two parts, until there are enough."""
    lacking = batches - len(sizes)
    rows = np.array(sizes)
    while lacking > 0:
        halved = np.sort(np.argsort(-rows, kind="stable")[:lacking])
        halved = halved[rows[halved] > 1]
        parts = np.ones(len(rows), np.int64)
        parts[halved] = 2
        first = np.cumsum(parts) - parts
        grown = np.repeat(rows, parts)
        grown[first[halved]] = -(-rows[halved] // 2)
        grown[first[halved] + 1] = rows[halved] // 2
        lacking, rows = lacking - len(halved), grown
    return rows


def order_equals(widths: Integers, key: int) -> Integers:
    """Indices that sort widths `[n]` in descending order, equal ones in random order."""
    bits = len(widths).bit_length()
    drawn = (stream_keys(derive_key(key, EQUALS), np.arange(len(widths))) >> np.uint64(64 - bits - 8)).astype(np.int64)
    return np.lexsort((drawn, -widths))
