"""Cutting the sorted order into buckets: runs of neighbours that give batches of one shape.

A bucket has one *stratum* for each row of its batches. A stratum has as many samples as the bucket has batches, and
each batch takes one sample of every stratum. Buckets are cut by the longest sample of each stratum, so that every batch
fits the budget, whichever samples a shuffle gives it.

Eleven samples, a budget of 20 tokens, two windows. Two rows of 9 fit, so the first bucket has two strata, (9 8) and
(7 7): one batch takes 9 and a 7, the other takes 8 and a 7. The remaining seven samples are one bucket of two batches,
one of four rows and one of three, with the strata (4 4), (3 3), (3 2) and (1): only the second batch takes from the
last. Both fit: four rows of 4 are 16 tokens.

>>> from samplers.planning.sorting import sort_lengths
>>> lengths = [9, 8, 7, 7, 4, 4, 3, 3, 3, 2, 1]
>>> options = Options(max_tokens=20)
>>> for bucket in cut_buckets(sort_lengths(lengths, options), options, windows=2):
...     print(bucket)
Bucket(first=0, batches=2, rows=2, full=2, rest=2, skipped=0, width=(9,))
Bucket(first=4, batches=2, rows=4, full=3, rest=1, skipped=0, width=(4,))
"""

from collections.abc import Sequence
from itertools import repeat
from math import isqrt
from operator import attrgetter
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from collate.widths import padded_width, padded_widths
from samplers.planning.budget import Integers
from samplers.planning.options import Options
from samplers.planning.sorting import SortedLengths

# The default is sqrt(batches of the epoch / 32) windows. Padding grows with windows / batches and repeated pairs fall
# with 1 / windows, so that the square root balances both, from a thousand samples to a thousand million.
BATCHES_PER_SQUARED_WINDOW: Final = 32
# With one window, every stratum would be a single sample, and batches would be the same in every epoch.
FEWEST_WINDOWS: Final = 2
# A power of two, so that bit-reversed order puts variants whose borders are near far apart in time.
MOST_VARIANTS: Final = 4
# Sorted indices at which the number of batches is estimated.
PROBES: Final = 1024
# From this many batches on, the default is more than the fewest windows.
MANY_BATCHES: Final = 200


class Bucket(NamedTuple):
    """A run of the sorted order that is cut into batches of one shape.

    Its first `full` strata have `batches` samples, one for every batch. Each later stratum has `rest` samples, and only
    the last `rest` batches take from it.

    Attributes:
        first: Sorted index of its first sample.
        batches: How many batches take from it.
        rows: Rows of its last `rest` batches; this is its number of strata.
        full: Rows of the batches before those.
        rest: How many batches have all `rows` rows.
        skipped: How many of its first batches are not planned, because `drop_last` drops them.
        width: Padded width of each field at most.
    """

    first: int
    batches: int
    rows: int
    full: int
    rest: int
    skipped: int
    width: tuple[int, ...]


def cut_variants(sorted_lengths: SortedLengths, options: Options) -> list[list[Bucket]]:
    """Up to four variants of the buckets, of equally many batches; each epoch uses one.

    In the first variant the buckets begin at the longest sample. In the others they are shifted by a quarter, a half
    and three quarters of a bucket, so that other samples share a bucket: pairs meet again in the next epoch about half
    as often as with fixed borders. A variant that cannot have as many batches as the others is left out.

    Forty samples of length 3, two windows of batches of two rows: the second variant begins with half a bucket.

    >>> from samplers.planning.sorting import sort_lengths
    >>> options = Options(batch_size=2, window=20)
    >>> variants = cut_variants(sort_lengths([3] * 40, options), options)
    >>> [[bucket.first for bucket in buckets][:4] for buckets in variants]
    [[0, 4, 8, 12], [0, 2, 6, 10]]
    """
    windows = count_windows(sorted_lengths, options)
    count = min(MOST_VARIANTS, 1 << (windows.bit_length() - 1)) if windows != 3 else 3
    shifts = [windows * variant // count for variant in range(count)]
    variants = [cut_buckets(sorted_lengths, options, windows, shift=shift) for shift in shifts]
    batches = max(count_batches(variants[0]), count_batches(variants[count // 2]))
    for variant, shift in enumerate(shifts):
        extra = batches - count_batches(variants[variant])
        if extra > 0:
            variants[variant] = cut_buckets(sorted_lengths, options, windows, shift=shift, extra=extra)
    equal = [buckets for buckets in variants if count_batches(buckets) == batches]
    return [buckets for variant, buckets in enumerate(equal) if buckets not in equal[:variant]]


def count_batches(buckets: Sequence[Bucket]) -> int:
    """Batches that are planned from these buckets."""
    return sum(bucket.batches - bucket.skipped for bucket in buckets)


def predict_batches(samples: int, options: Options) -> int | None:
    """How many batches `cut_buckets` makes of this number of samples, if `batch_size` alone decides; else None."""
    rows = options.budget.fixed_rows
    if rows is None:
        return None
    return samples // rows if options.drop_last else -(-samples // rows)


def cut_buckets(
    sorted_lengths: SortedLengths, options: Options, windows: int, *, shift: int = 0, extra: int = 0
) -> list[Bucket]:
    """Cut the sorted order into buckets, greedily from the longest sample; each batch is as full as the budget allows.

    Each bucket gives one batch to every window. The short end, of one to two such buckets, is one last bucket with as
    many batches as it needs; so a corpus smaller than two buckets is a single one.

    Args:
        sorted_lengths: The samples.
        options: The budget and the widths, mainly.
        windows: Batches of a bucket.
        shift: Batches of a first bucket that is only part of one: fewer than `windows`.
        extra: Batches that the last bucket has beyond those that it needs.
    """
    first, buckets = sorted_lengths.overlong_alone, []
    if first:
        buckets.append(even_bucket(0, first, 1, BucketSizer(sorted_lengths, options).width(0, first)))
    if shift and first < len(sorted_lengths):
        buckets += _cut_partial(sorted_lengths, options, first, windows=windows, batches=shift)
        first = sum(bucket.batches * bucket.rows for bucket in buckets)
    sizer = _make_sizer(sorted_lengths, options, first, windows)
    if options.budget.fixed_rows is not None:
        alike = _cut_alike(sorted_lengths, options, first, batches=windows, rows=options.budget.fixed_rows)
        buckets += alike
        first += len(alike) * windows * options.budget.fixed_rows
    while first < len(sorted_lengths):
        rows = sizer.rows_from(first)
        samples = rows * windows
        if len(sorted_lengths) - first < 2 * samples:
            return buckets + _cut_tail(first, sizer, contiguous=windows == 1, extra=extra)
        buckets.append(even_bucket(first, windows, rows, sizer.width(first, first + samples)))
        first += samples
    return buckets


def _cut_alike(sorted_lengths: SortedLengths, options: Options, first: int, *, batches: int, rows: int) -> list[Bucket]:
    """All buckets but the last, where all have these rows: at once, as there may be one for every second batch."""
    samples = batches * rows
    count = max(0, (len(sorted_lengths) - first) // samples - 1)
    # A sample of one field is the longest of its bucket if it is the first.
    stride = 1 if sorted_lengths.fields > 1 else samples
    lengths = sorted_lengths.lengths_between(first, first + count * samples, stride)
    longest = lengths.reshape(count, samples // stride, sorted_lengths.fields).max(1)
    widths = map(tuple, padded_widths(longest, options.allowed_widths).tolist())
    firsts = range(first, first + count * samples, samples)
    # `even_bucket` for all of them, in a third of the time.
    return list(map(Bucket._make, zip(firsts, *map(repeat, (batches, rows, rows, batches, 0)), widths, strict=False)))


def _cut_partial(
    sorted_lengths: SortedLengths, options: Options, first: int, *, windows: int, batches: int
) -> list[Bucket]:
    """A first bucket of fewer batches than windows, unless the corpus is too small for it."""
    sizer = _make_sizer(sorted_lengths, options, first, batches)
    rows = sizer.rows_from(first)
    if 2 * rows * windows >= len(sorted_lengths) - first:
        return []
    return [even_bucket(first, batches, rows, sizer.width(first, first + batches * rows))]


def count_windows(sorted_lengths: SortedLengths, options: Options, batches: int | None = None) -> int:
    """How many windows the corpus is split into: the batches of a bucket, and the samples of a stratum.

    Args:
        sorted_lengths: The samples.
        options: The budget and the window.
        batches: What `estimate_batches` gave; None to estimate.
    """
    if not options.shuffle:
        return 1
    if options.window is None:
        batches = estimate_batches(sorted_lengths, options) if batches is None else batches
        # The root of batches / 32, rounded to the nearest integer: 3,200 batches have 10 windows.
        wanted = (isqrt(4 * batches // BATCHES_PER_SQUARED_WINDOW) + 1) // 2
    else:
        wanted = (len(sorted_lengths) + options.window // 2) // options.window
    return min(len(sorted_lengths), max(FEWEST_WINDOWS, wanted))


def estimate_batches(sorted_lengths: SortedLengths, options: Options) -> int:
    """An estimate of the corpus' number of batches, from the rows that fit at up to 1,024 of its lengths."""
    # In integers, since a float's last bit may differ between machines.
    if options.budget.fixed_rows is not None:
        return len(sorted_lengths) * ((1 << 32) // options.budget.fixed_rows) >> 32
    probes = range(0, len(sorted_lengths), -(-len(sorted_lengths) // PROBES))
    lengths = sorted_lengths.lengths_between(0, len(sorted_lengths), probes.step)
    widths = padded_widths(lengths, options.allowed_widths)
    # NumPy takes several times as long for unique rows as for unique numbers.
    distinct, counts = np.unique(widths[:, 0] if widths.shape[1] == 1 else widths, axis=0, return_counts=True)
    if sorted_lengths.fields > 1:
        rows = np.array([options.budget.max_rows(tuple(width)) for width in distinct.tolist()])
    else:
        rows = options.budget.rows_at(distinct)
    # At most 1,024 shares of up to 2**32.
    shares = int((counts * ((1 << 32) // np.maximum(rows, 1))).sum())
    return len(sorted_lengths) * shares // (len(probes) << 32)


def even_bucket(first: int, batches: int, rows: int, width: tuple[int, ...]) -> Bucket:
    """A bucket whose batches all have equally many rows."""
    return Bucket(first, batches, rows, rows, batches, 0, width)


def sort_buckets(buckets: Sequence[Bucket], options: Options) -> list[Bucket]:
    """Buckets in the order in which their batches are numbered."""
    if options.shuffle:
        # An epoch ends with its last batch ids, and only batches of many rows can be split among replicas there.
        return sorted(buckets, key=attrgetter("rows"))
    return sorted(buckets, key=lambda bucket: -sum(bucket.width))


class BucketSizer:
    """Rows and width of a bucket whose longest sample is its first: one field, padded tokens.

    Args:
        sorted_lengths: The samples.
        options: The budget and the widths.
    """

    def __init__(self, sorted_lengths: SortedLengths, options: Options) -> None:
        self.sorted_lengths = sorted_lengths
        self.options = options
        # Read for every bucket.
        self._fields = sorted_lengths.fields
        # The width of one field depends on the first sample alone; rows and width of a bucket are asked for in turn.
        self._last: tuple[int, tuple[int, ...]] = -1, ()

    def rows_from(self, first: int) -> int:
        """Rows of the batches of a bucket that starts at this sorted index."""
        return self.rows_at(self.width(first, first + 1))

    def rows_at(self, width: tuple[int, ...]) -> int:
        """Rows that fit at a width whatever their lengths; 1 if none does, since its real tokens may still fit."""
        return max(1, self.options.budget.max_rows(width if len(width) > 1 else width[0]))

    def width(self, first: int, last: int) -> tuple[int, ...]:
        """Padded width of each field that holds every sample of this run."""
        if self._fields > 1:
            return self._round_up(self.sorted_lengths.lengths_between(first, last))
        if self._last[0] != first:
            longest = int(self.sorted_lengths.lengths[self.sorted_lengths.order[first]])
            cut = longest if self.options.max_length is None else min(longest, self.options.max_length)
            self._last = first, (padded_width(cut, self.options.allowed_widths),)
        return self._last[1]

    def _round_up(self, lengths: Integers) -> tuple[int, ...]:
        """The padded width of the longest of these lengths `[n, K]`."""
        return tuple(padded_widths(lengths.max(0), self.options.allowed_widths).tolist())


class PerSampleSizer(BucketSizer):
    """Rows of a bucket where each sample's lengths count: several fields, or a budget of real tokens.

    Args:
        sorted_lengths: The samples.
        options: The budget and the widths.
        first: Sorted index at which the strata begin.
        windows: Samples of a stratum.
    """

    def __init__(self, sorted_lengths: SortedLengths, options: Options, first: int, windows: int) -> None:
        super().__init__(sorted_lengths, options)
        self.first, self.windows = first, windows
        self._stratum_max = self._find_stratum_max()

    def rows_from(self, first: int) -> int:
        """Rows of the batches of a bucket that starts at this sorted index: the strata whose longest samples fit."""
        stratum = (first - self.first) // self.windows
        count = 16
        # Try 16 strata, then 32, ...: buckets of few rows are the usual case.
        while True:
            fits = self._fits(self._stratum_max[stratum : stratum + count])
            if not fits.all():
                return max(1, int(fits.argmin()))
            if stratum + count >= len(self._stratum_max):
                return max(1, len(fits))
            count *= 2

    def _find_stratum_max(self) -> Integers:
        """The largest length of each whole stratum, by field: int64 `[strata, K]`."""
        sorted_lengths, windows = self.sorted_lengths, self.windows
        strata = (len(sorted_lengths) - self.first) // windows
        last = self.first + strata * windows
        if sorted_lengths.fields == 1:
            return sorted_lengths.lengths_between(self.first, last, windows)
        lengths = sorted_lengths.lengths_between(self.first, last)
        stratum_max: Integers = lengths.reshape(strata, windows, sorted_lengths.fields).max(1)
        return stratum_max

    def _fits(self, stratum_max: Integers) -> npt.NDArray[np.bool_]:
        """Whether a batch from the first stratum fits, from the first two, and so on: bool `[n]`."""
        rows = np.arange(1, len(stratum_max) + 1)
        widths = padded_widths(np.maximum.accumulate(stratum_max), self.options.allowed_widths)
        tokens = np.maximum(stratum_max.sum(1), 1).cumsum()
        use = self.options.budget.use(rows, widths if self.sorted_lengths.fields > 1 else widths[:, 0], tokens)
        return np.less_equal(use, 1)


def _make_sizer(sorted_lengths: SortedLengths, options: Options, first: int, windows: int) -> BucketSizer:
    """The sizer that a corpus needs."""
    if options.budget.fixed_rows is None and (sorted_lengths.fields > 1 or options.count_tokens == "real"):
        return PerSampleSizer(sorted_lengths, options, first, windows)
    return BucketSizer(sorted_lengths, options)


def _cut_tail(first: int, sizer: BucketSizer, *, contiguous: bool, extra: int) -> list[Bucket]:
    """The remainder of the order: one bucket, or for a single window a short batch and full ones after it."""
    samples, options = len(sizer.sorted_lengths) - first, sizer.options
    width = sizer.width(first, len(sizer.sorted_lengths))
    fitting = sizer.rows_at(width)
    rows = min(fitting, samples)
    batches = -(-samples // rows)
    short = samples - (batches - 1) * rows
    drops = options.drop_last and fitting == options.batch_size and short < fitting
    if contiguous:
        return _cut_contiguous(first, rows, sizer, skipped=short if drops else 0)
    if fitting == options.batch_size and not extra:
        # `batch_size` decides alone: all batches are full but one, e.g. 8, 8 and 3 of 19 samples.
        return [Bucket(first, batches, rows, short, batches if short == rows else batches - 1, int(drops), width)]
    batches = min(batches + extra, samples)
    # Otherwise batches are even: 19 samples in 3 batches are one of 7 rows and two of 6.
    even, longer = divmod(samples, batches)
    if not longer:
        return [even_bucket(first, batches, even, width)]
    return [Bucket(first, batches, even + 1, even, longer, 0, width)]


def _cut_contiguous(first: int, rows: int, sizer: BucketSizer, *, skipped: int) -> list[Bucket]:
    """Batches of `rows` neighbours; the short batch comes first, so that the last has the most rows."""
    buckets = []
    last = len(sizer.sorted_lengths)
    while last > first + skipped:
        start = max(first, last - rows)
        buckets.append(even_bucket(start, 1, last - start, sizer.width(start, last)))
        last = start
    return buckets[::-1]
