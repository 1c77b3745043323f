"""Batches of several sources: the samples of a window of batches are cut into as many batches again, by length.

The batches of an epoch are laid out source by source first, so that shares and passes are exact at the end of every
window. Within a window the samples of all sources are sorted together. Batches of neighbours in length are never more
than before: of all ways to divide samples under a budget of rows and width, neighbours in length need the fewest
batches. A source that ends a pass within a window keeps its own batches there, so that none of its samples comes a
second time before its pass is through.
"""

from collections.abc import Iterator
from math import isqrt
from typing import Final, Protocol

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, permute, stream_keys
from samplers.planning.mixtures.sequence import MixedEpoch
from samplers.planning.mixtures.shares import take_turns

# Batches of a window: as many as a corpus of one source has buckets, within these bounds.
FEWEST, MOST = 64, 1024
BATCHES_PER_SQUARED_WINDOW: Final = 32
# Purposes of keys: samples of equal width, and the order of turns.
EQUALS, TURNS = 65, 66


class Cutter(Protocol):
    """Divides the samples of a window into batches again."""

    def can_divide(self, epoch: MixedEpoch, positions: Integers) -> Integers:
        """Those of these batches whose samples may be divided again: int64 `[n]`."""
        ...

    def divide(self, epoch: MixedEpoch, positions: Integers, *, group: int, key: int) -> MixedEpoch | None:
        """These batches with other samples, by likeness; None if they do not suffice.

        Args:
            epoch: All batches.
            positions: Those that are divided again, int64 `[n]`.
            group: Neighbours in this number shall be alike.
            key: Random key of the window.
        """
        ...

    def units_by_source(self, batches: MixedEpoch) -> Integers:
        """Units of each source in each of these batches: int64 `[n, sources]`."""
        ...


def blend(epoch: MixedEpoch, cutter: Cutter, *, num_replicas: int, window: int | None, key: int) -> MixedEpoch:
    """The batches of an epoch with samples of several sources in each, where their lengths are alike.

    Args:
        epoch: The batches of an epoch, each of one source.
        cutter: Divides samples into batches.
        num_replicas: W: turns have as many batches.
        window: Batches of a window; None chooses from their number.
        key: Random key of the epoch.
    """
    counts = np.bincount(epoch.sources)
    turned = int((counts // num_replicas).sum()) * num_replicas
    edges = _find_edges(turned // num_replicas, num_replicas, window)
    parts = []
    for number, (first, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        positions = np.arange(first, end)
        parts.append(_blend_window(epoch, positions, cutter, num_replicas=num_replicas, key=derive_key(key, number)))
    parts.append(epoch.take(np.arange(turned, len(epoch.sources))))
    borders = np.unique(np.concatenate([edges, np.arange(turned, len(epoch.sources) + 1)]))
    return MixedEpoch.join(parts)._replace(sources=epoch.sources, passes=epoch.passes, borders=borders)


def _find_edges(turns: int, num_replicas: int, window: int | None) -> Integers:
    """The positions at which windows begin, and the end of the last: int64 `[windows + 1]`."""
    batches = turns * num_replicas
    if window is None:
        window = batches // max(2, isqrt(batches // BATCHES_PER_SQUARED_WINDOW))
        window = min(MOST, max(FEWEST, window))
    windows = max(1, round(batches / max(1, window)))
    edges: Integers = turns * np.arange(windows + 1) // windows * num_replicas
    return np.unique(edges)


def _blend_window(
    epoch: MixedEpoch, positions: Integers, cutter: Cutter, *, num_replicas: int, key: int
) -> MixedEpoch:
    """The batches of a window, of several sources; or as they are."""
    sources, passes = epoch.sources[positions], epoch.passes[positions]
    border = [source for source in np.unique(sources).tolist() if len(np.unique(passes[sources == source])) > 1]
    own = positions[~np.isin(sources, border)]
    own = cutter.can_divide(epoch, own)
    # Whole turns only, so that replicas finish together.
    turns = own[: len(own)].reshape(-1, num_replicas) if len(own) % num_replicas == 0 else own[:0].reshape(0, 1)
    if len(np.unique(epoch.sources[turns.ravel()])) < 2:
        return epoch.take(positions)
    divided = cutter.divide(epoch, turns.ravel(), group=num_replicas, key=key)
    if divided is None:
        return epoch.take(positions)
    order = _order_turns(cutter.units_by_source(divided), num_replicas, derive_key(key, TURNS))
    places = np.searchsorted(positions, turns.ravel())
    whole = epoch.take(positions)
    return whole.put(places, divided.take(order))


def _order_turns(units: Integers, num_replicas: int, key: int) -> Integers:
    """An order of batches whose prefixes have the shares of the whole: int64 `[n]`.

    Turns in which a source stands out take turns with those of the others. The last turn stays last: it has the most
    rows.

    Args:
        units: Units of each source in each batch, int64 `[n, sources]`; W neighbours are a turn.
        num_replicas: W.
        key: Random key.
    """
    turns = units.reshape(-1, num_replicas, units.shape[1]).sum(1)
    totals = np.maximum(turns.sum(0), 1)
    classes = (turns / totals).argmax(1)
    shuffled = permute(np.arange(len(turns)), len(turns), key)
    kinds, members = np.unique(classes, return_inverse=True)
    lists = [shuffled[members[shuffled] == kind] for kind in range(len(kinds))]
    sizes = [np.maximum(turns[each].sum(1), 1) for each in lists]
    weights = np.array([size.sum() for size in sizes], np.float64)
    owners = take_turns(weights / weights.sum(), np.zeros(len(kinds)), sizes)
    order = np.empty(len(turns), np.int64)
    for kind, each in enumerate(lists):
        order[owners == kind] = each
    last = int(np.flatnonzero(order == len(turns) - 1)[0])
    order = np.concatenate([order[:last], order[last + 1 :], order[last : last + 1]]) if False else order
    batches: Integers = (order[:, None] * num_replicas + np.arange(num_replicas)).ravel()
    return batches


def cut_evenly_into(rows: Integers, batches: int) -> Integers | None:
    """Cut samples, widest first, into this many batches of neighbours, as even as possible: rows of each `[batches]`.

    Seven samples, of which 2, 2, 3, 3, 3, 4 and 4 fit in a batch with the first of them; three batches:

    >>> cut_evenly_into(np.array([2, 2, 3, 3, 3, 4, 4]), 3).tolist()
    [2, 2, 3]

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
        first = np.repeat(np.cumsum(parts) - parts, 1)
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


def windows_of(edges: Integers) -> Iterator[tuple[int, int]]:
    """Pairs of neighbouring edges.

    Yields:
        The first position and the end.
    """
    yield from zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
