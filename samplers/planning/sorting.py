"""Lengths to a sorted order: which samples are planned, sorted once, longest first."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from collate.errors import LengthError
from collate.widths import padded_widths
from samplers.planning.budget import Integers
from samplers.planning.options import Options, check_indices
from samplers.sources.masked import refuse_masked

# Indices of samples, or sorted indices: int32 where that is enough.
IndexArray: TypeAlias = npt.NDArray[np.signedinteger[Any]]

# Arrays of up to this many lengths are hashed whole; of larger ones, a tenth as many evenly spaced values.
HASHED_WHOLE: Final = 10_000_000
# Samples in a leaf of the tree that orders samples of several fields.
LEAF: Final = 128
# No sample has as many fields: these are the steps of sequences.
MOST_FIELDS: Final = 64
_SEQUENCES: Final = (
    "if these are the sequences themselves, give their lengths: lengths_of(sequences), or lengths_of(dataset, column)"
)
LONGEST_LENGTH: Final = (1 << 63) - 1
_MASKED: Final = (
    "measure them, or give lengths.filled(0) and plan the others alone with "
    "indices=np.flatnonzero(~np.ma.getmaskarray(lengths))"
)


@runtime_checkable
class IndexedLengths(Protocol):
    """Lengths with a fingerprint, such as a `LengthIndex`."""

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Integers `[N]` or `[N, K]`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that changes when a length changes."""
        ...


@runtime_checkable
class RankedLengths(IndexedLengths, Protocol):
    """Indexed lengths that also store their sorted order, so that planning needs no sort."""

    @property
    def order(self) -> npt.NDArray[Any]:
        """Indices of the samples, longest first, stable: integers `[N]`."""
        ...


Lengths: TypeAlias = npt.ArrayLike | IndexedLengths
"""Lengths of samples in time steps: integers `[N]` or `[N, K]` for K fields, or an index that holds them."""


@dataclass(frozen=True, eq=False)
class SortedLengths:
    """The planned samples in the order of their lengths.

    Attributes:
        lengths: Integers `[N]` or `[N, K]`, which no later write of the caller changes.
        order: Indices of the planned samples, longest first; samples that alone exceed the budget come before all
            others: `[n]`. A *sorted index* is an index into this array.
        max_length: Longer samples count as this long.
        overlong_alone: How many samples exceed the budget alone and are planned nevertheless.
        too_short: How many samples `min_length` left out.
        overlong_dropped: How many samples `overlong="drop"` left out.
    """

    lengths: npt.NDArray[Any]
    order: IndexArray
    max_length: int | None = None
    overlong_alone: int = 0
    too_short: int = 0
    overlong_dropped: int = 0

    def __len__(self) -> int:
        return len(self.order)

    @property
    def fields(self) -> int:
        """K: how many lengths a sample has."""
        return 1 if self.lengths.ndim == 1 else self.lengths.shape[1]

    def sample_lengths(self, sample_indices: IndexArray) -> Integers:
        """The lengths of these samples, cut to `max_length`: int64 `[n, K]`."""
        return _cut(self.lengths[sample_indices], self.max_length)

    def lengths_between(self, first: int, last: int, stride: int = 1) -> Integers:
        """The lengths at every `stride`-th sorted index from `first` to before `last`: int64 `[n, K]`."""
        if self.lengths.ndim > 1:
            return self._lengths_in_order[first:last:stride]
        return _cut(self.lengths[self.order[first:last:stride]], self.max_length)

    @cached_property
    def _lengths_in_order(self) -> Integers:
        # Cutting buckets reads all fields of all samples, several times; of a single field it reads a few entries.
        return self.sample_lengths(self.order)

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when a length changes."""
        return digest_lengths(self.lengths)


def sort_lengths(lengths: Lengths, options: Options) -> SortedLengths:
    """Sort the samples that the options keep.

    Six samples, of which `min_length=3` leaves out sample 3; samples 1 and 4 are equal and keep their order:

    >>> sorted_lengths = sort_lengths([4, 9, 3, 2, 9, 5], Options(max_tokens=20, min_length=3))
    >>> sorted_lengths.order.tolist(), sorted_lengths.too_short
    ([1, 4, 5, 0, 2], 1)

    Args:
        lengths: Integers `[N]` or `[N, K]`, or an index that holds them.
        options: Used here: `min_length`, `max_length`, `indices`, `overlong`, and the budget, which tells over-long
            samples.

    Raises:
        TypeError: Lengths are not integers.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: Lengths have a shape other than `[N]` or `[N, K]`, or no sample is left to plan.
    """
    array = as_length_array(lengths)
    order, too_short = _sort_chosen(lengths, array, options)
    sorted_lengths = SortedLengths(array, order, options.max_length, too_short=too_short)
    overlong = _count_overlong(sorted_lengths, options)
    if options.overlong == "drop":
        sorted_lengths = replace(sorted_lengths, order=order[overlong:], overlong_dropped=overlong)
    elif overlong and options.overlong == "alone":
        sorted_lengths = replace(sorted_lengths, overlong_alone=overlong)
    elif overlong:
        raise LengthError(_overlong_message(sorted_lengths, overlong, options))
    if len(sorted_lengths) == 0:
        raise ValueError(
            f"no sample is left to plan: min_length={options.min_length} leaves out {too_short}, overlong='drop' "
            f"{sorted_lengths.overlong_dropped}; lower min_length or raise the budget"
        )
    return sorted_lengths


def as_length_array(lengths: Lengths) -> npt.NDArray[Any]:
    """The array of lengths; negative values are found later, when they are sorted.

    An array or a tensor is copied, because plans and fingerprints are computed when they are needed: later writes would
    change the epochs of a sampler. A memory map and a read-only array are taken as they are.

    Raises:
        TypeError: Lengths are not integers, or masked.
        ValueError: Their shape is neither `[N]` nor `[N, K]`, or there are none.
    """
    if isinstance(lengths, IndexedLengths):
        lengths = lengths.lengths
    if isinstance(lengths, np.ma.MaskedArray):
        refuse_masked(lengths, "lengths", _MASKED)
    _refuse_dataset(lengths)
    try:
        array = np.asarray(lengths)
    except ValueError as error:
        raise ValueError(
            f"lengths must be [N] or [N, K]: every sample must have as many, got sequences of several; {_SEQUENCES}"
        ) from error
    if array.ndim not in {1, 2} or array.size == 0:
        hint = f"; {_SEQUENCES}" if array.ndim > 2 else ""
        raise ValueError(f"lengths must be [N] or [N, K] with N and K at least 1, got {list(array.shape)}{hint}")
    if array.ndim == 2 and array.shape[1] > MOST_FIELDS:
        raise ValueError(
            f"lengths must be [N] or [N, K] with K at most {MOST_FIELDS} fields, got {list(array.shape)}; {_SEQUENCES}"
        )
    if isinstance(lengths, (list, tuple)) and (array.ndim > 1 or array.dtype.kind == "f"):
        # In a list, NumPy overlooks the masks of rows, and makes a float of a masked number.
        masks = [np.ma.is_masked(row) for row in lengths]
        refuse_masked(np.ma.array(masks, mask=masks), "lengths", _MASKED)
    if array.dtype.kind not in "iu":
        hint = "count whole steps" if array.dtype.kind == "f" else _SEQUENCES
        raise TypeError(f"lengths must be integers, got {array.dtype}{_first_fraction(array)}: {hint}")
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    is_shared = array.flags.writeable and not isinstance(lengths, (list, tuple, np.memmap))
    return array.copy() if is_shared else array


def _refuse_dataset(lengths: object) -> None:
    """Refuse a dataset in place of its lengths.

    Raises:
        TypeError: It is one. The message says where its lengths are.
    """
    kind = type(lengths).__name__
    if hasattr(lengths, "shares_of"):
        raise TypeError(
            "lengths must be of one corpus, got a Mixture: batch samplers, ShardStream and plan_epoch take one"
        )
    if hasattr(getattr(lengths, "index", None), "lengths"):
        raise TypeError(f"lengths must be integers, got a {kind}: give its index, .index, which holds them")
    if hasattr(lengths, "column_names") or isinstance(lengths, Mapping):
        raise TypeError(f"lengths must be integers, got a {kind}: give lengths_of(dataset, column)")


def argsort_longest_first(values: npt.NDArray[Any]) -> IndexArray:
    """Indices that sort non-negative integers `[n]` in descending order; equal values keep their order.

    A radix sort by 16 bits at a time, several times faster than a comparison sort of 64-bit keys.

    >>> argsort_longest_first(np.array([3, 9, 4, 9])).tolist()
    [1, 3, 2, 0]
    """
    inverted = (values.max() - values).astype(np.uint64)
    order = np.argsort((inverted & np.uint64(0xFFFF)).astype(np.uint16), kind="stable")
    for shift in range(16, int(inverted.max()).bit_length(), 16):
        digits = (inverted >> np.uint64(shift)).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order.astype(np.int32) if len(order) <= np.iinfo(np.int32).max else order


def digest_lengths(lengths: npt.NDArray[Any]) -> str:
    """Sixteen hexadecimal digits of an array's shape and values (evenly spaced values, if it is large)."""
    spacing = 1 if len(lengths) <= HASHED_WHOLE else -(-len(lengths) * 10 // HASHED_WHOLE)
    values = np.ascontiguousarray(lengths[::spacing], "<i8")
    return blake2b(repr(lengths.shape).encode() + values.tobytes(), digest_size=8).hexdigest()


def _sort_chosen(lengths: Lengths, array: npt.NDArray[Any], options: Options) -> tuple[IndexArray, int]:
    """The samples that are long enough, sorted, and how many were too short."""
    chosen = None if options.indices is None else check_indices(options.indices, len(array))
    if array.ndim == 2:
        return _sort_fields(array, np.arange(len(array)) if chosen is None else chosen, options)
    if chosen is None and isinstance(lengths, RankedLengths):
        order = lengths.order
    else:
        values = array if chosen is None else array[chosen]
        refuse_negative(values, chosen)
        order = argsort_longest_first(values) if chosen is None else chosen[argsort_longest_first(values)]
    # Lengths fall along the order: bisect for the first sample that is too short.
    end = bisect_left(range(len(order)), 1 - options.min_length, key=lambda i: -int(array[order[i]]))
    return order[:end], len(order) - end


def _sort_fields(array: npt.NDArray[Any], chosen: IndexArray, options: Options) -> tuple[IndexArray, int]:
    """The same for samples of several fields: over-long samples first, then neighbours alike in every field."""
    rows = array[chosen]
    refuse_negative(rows, chosen)
    long_enough: npt.NDArray[np.bool_] = np.greater_equal(rows, options.min_length).all(1)
    chosen, rows = chosen[long_enough], _cut(rows[long_enough], options.max_length)
    exceeds = _exceeds_alone(rows, options)
    overlong, fitting = np.flatnonzero(exceeds), np.flatnonzero(~exceeds)
    overlong = overlong[np.argsort(-rows[overlong].sum(1), kind="stable")]
    # Padded widths are what costs; under a budget of real tokens it is the lengths.
    keys = rows if options.count_tokens == "real" else padded_widths(rows, options.allowed_widths)
    fitting = fitting[argsort_alike(keys[fitting])]
    return chosen[np.concatenate([overlong, fitting])], int(np.sum(~long_enough))


def argsort_alike(rows: Integers) -> IndexArray:
    """Indices that order samples `[n, K]` so that neighbours are alike in every field; equal samples are adjacent.

    The order of the leaves of a k-d tree (Bentley, 1975): samples are halved by the field in which they differ most,
    and a leaf is sorted by the sum of fields. Two unrelated fields pad half as much as when sorted by their sum.

    >>> argsort_alike(np.array([[3, 1], [9, 9], [1, 3], [9, 9]])).tolist()
    [1, 3, 0, 2]

    Returns:
        `[n]`.
    """
    # NumPy sums a long row in a quarter of the time that a long and narrow column takes.
    return _order_leaves(np.arange(len(rows)), np.ascontiguousarray(rows.T))


def _order_leaves(indices: IndexArray, columns: Integers) -> IndexArray:
    """These samples `[n]`, of lengths `[K, n]`, leaf after leaf."""
    if len(indices) <= LEAF:
        return indices[_argsort_sums(columns)]
    # In integers, since a float's last bit may differ between machines.
    means = columns.sum(1) // len(indices)
    spread = np.abs(columns - means[:, None]).sum(1)
    if not spread.any():
        return indices
    longer = mark_longer_half(columns[spread.argmax()])
    halves = np.flatnonzero(longer), np.flatnonzero(~longer)
    return np.concatenate([_order_leaves(indices[half], columns.take(half, 1)) for half in halves])


def _argsort_sums(columns: Integers) -> IndexArray:
    """Indices `[n]` in descending order of the sum of fields `[K, n]`, then of each field: equal samples adjacent."""
    keys, bound = columns.sum(0), int(columns.sum(0).max(initial=0)) + 1
    for column in columns[:-1]:
        # Sum and fields become the digits of one number, as long as it fits in 62 bits.
        base = int(column.max(initial=0)) + 1
        bound *= base
        if bound >> 62:
            return np.lexsort([*-columns[::-1], -columns.sum(0)])
        keys = keys * base + column
    return np.argsort(-keys, kind="stable")


def mark_longer_half(values: Integers) -> npt.NDArray[np.bool_]:
    """Whether each of `values` `[n]` is above a threshold that halves them as well as possible: bool `[n]`.

    Equal values are never separated. The middle value is the same on every machine, however it is found.

    >>> mark_longer_half(np.array([3, 9, 4, 9, 9])).tolist()
    [False, True, False, True, True]
    """
    middle = np.partition(values, len(values) // 2)[len(values) // 2]
    above: npt.NDArray[np.bool_] = np.greater(values, middle)
    at_least: npt.NDArray[np.bool_] = np.greater_equal(values, middle)
    count_above, count_at_least = int(above.sum()), int(at_least.sum())
    # Of [3, 9, 4, 9, 9], the middle value is 9: none is above it, three are at least 9, and three is near half of five.
    above_is_nearer = count_above and abs(2 * count_above - len(values)) < abs(2 * count_at_least - len(values))
    return above if count_at_least == len(values) or above_is_nearer else at_least


def _count_overlong(sorted_lengths: SortedLengths, options: Options) -> int:
    """How many samples alone exceed the budget: they come before all others, so bisect for the first that fits."""
    return bisect_left(
        range(len(sorted_lengths)),
        x=True,
        key=lambda i: not _exceeds_alone(sorted_lengths.lengths_between(i, i + 1), options)[0],
    )


def _exceeds_alone(rows: Integers, options: Options) -> npt.NDArray[np.bool_]:
    """Whether each sample `[n, K]` exceeds the budget in a batch of one row: bool `[n]`."""
    widths = padded_widths(rows, options.allowed_widths)
    by_field = widths[:, 0] if widths.shape[1] == 1 else widths
    return np.greater(options.budget.use(np.ones(len(rows), np.int64), by_field, rows.sum(1)), 1)


def _overlong_message(sorted_lengths: SortedLengths, overlong: int, options: Options) -> str:
    """The error text for over-long samples."""
    longest = int(sorted_lengths.order[0])
    limits = ", ".join(
        f"{name}={value}" for name in ("max_tokens", "cost") if (value := getattr(options, name)) is not None
    )
    return (
        f"{overlong} of {len(sorted_lengths)} samples alone exceed the budget ({limits}), the worst is sample "
        f"{longest} of length {sorted_lengths.lengths[longest]}: raise the budget, set max_length, or choose "
        "overlong='drop' or overlong='alone'"
    )


def _cut(lengths: npt.NDArray[Any], max_length: int | None) -> Integers:
    """Lengths `[n]` or `[n, K]` as int64 `[n, K]`, at most `max_length`."""
    rows = (lengths[:, None] if lengths.ndim == 1 else lengths).astype(np.int64)
    return rows if max_length is None else np.minimum(rows, min(max_length, LONGEST_LENGTH))


def _first_fraction(array: npt.NDArray[Any]) -> str:
    """The first float that is no whole number, for the error text."""
    if array.dtype.kind != "f":
        return ""
    fractions = np.argwhere(array != np.floor(array))
    return f" ({array[tuple(fractions[0])]} at sample {fractions[0][0]})" if len(fractions) else ""


def refuse_negative(values: npt.NDArray[Any], samples: IndexArray | None) -> None:
    """Check signs, also of unsigned integers that a subtraction has taken below zero.

    Raises:
        LengthError: A length is negative, or above 2**63 - 1.
    """
    wrapped = values.dtype == np.uint64 and values.max() > LONGEST_LENGTH
    if values.min() >= 0 and not wrapped:
        return
    entry = np.argwhere(values > LONGEST_LENGTH if wrapped else values < 0)[0]
    sample = entry[0] if samples is None else samples[entry[0]]
    value = values[tuple(entry)]
    why = f" ({int(value) - (1 << 64)} as a signed number: subtract in int64)" if wrapped else ""
    raise LengthError(f"lengths must be from 0 to 2**63 - 1, got {value}{why} at sample {sample}")
