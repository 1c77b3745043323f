"""Lengths to an order: which samples a plan holds, sorted once, longest first."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from collate.errors import LengthError
from collate.widths import padded_widths
from samplers.masked import refuse_masked
from samplers.planning.budget import Integers
from samplers.planning.options import Options, check_indices

Places: TypeAlias = npt.NDArray[np.signedinteger[Any]]

# Arrays up to this many lengths are fingerprinted whole, greater ones by a tenth as many evenly spaced values.
FINGERPRINTED_WHOLE: Final = 10_000_000
LEAF: Final = 128
_LONGEST: Final = (1 << 63) - 1
_MASKED: Final = (
    "measure them, or give lengths.filled(0) and plan the others alone with "
    "indices=np.flatnonzero(~np.ma.getmaskarray(lengths))"
)


@runtime_checkable
class IndexedLengths(Protocol):
    """Lengths that are kept with a fingerprint of their own, as a `LengthIndex` does."""

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Integers `[N]` or `[N, K]`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when a length does."""
        ...


@runtime_checkable
class RankedLengths(IndexedLengths, Protocol):
    """Indexed lengths that are kept with their order, so that a plan needs no sort."""

    @property
    def order(self) -> npt.NDArray[Any]:
        """Samples by length, longest first, stable: integers `[N]`."""
        ...


Lengths: TypeAlias = npt.ArrayLike | IndexedLengths


@dataclass(frozen=True, eq=False)
class Corpus:
    """The samples that a plan holds, in the order of their lengths.

    Attributes:
        lengths: as given: integers `[N]` or `[N, K]`, never copied.
        order: the planned samples, longest first, those that alone exceed the budget before all others: `[n]`.
        max_length: what longer ones count as.
        alone: how many exceed the budget alone and are planned nevertheless.
        short: how many `min_length` left out.
        dropped: how many `overlong="drop"` left out.
    """

    lengths: npt.NDArray[Any]
    order: Places
    max_length: int | None = None
    alone: int = 0
    short: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.order)

    @property
    def fields(self) -> int:
        """K: how many lengths a sample has."""
        return 1 if self.lengths.ndim == 1 else self.lengths.shape[1]

    def lengths_of(self, samples: Places) -> Integers:
        """The lengths that count of these samples: int64 `[n, K]`."""
        return _clip(self.lengths[samples], self.max_length)

    def lengths_at(self, first: int, last: int, stride: int = 1) -> Integers:
        """The lengths that count at every `stride`-th of these places of the order: int64 `[n, K]`."""
        if self.fields > 1:
            return self._ordered[first:last:stride]
        return self.lengths_of(self.order[first:last:stride])

    @cached_property
    def _ordered(self) -> Integers:
        # Cutting reads all fields of all samples, several times; a single field's order is read here and there only.
        return self.lengths_of(self.order)

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when a length does."""
        return digest_lengths(self.lengths)


def rank_lengths(lengths: Lengths, options: Options) -> Corpus:
    """Sort the samples that the options keep.

    Args:
        lengths: integers `[N]` or `[N, K]`, or an index that holds them.
        options: `min_length`, `max_length`, `indices`, `overlong`, and the budget that makes a sample over-long.

    Raises:
        TypeError: Lengths are not integers.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: Lengths have a shape other than `[N]` or `[N, K]`, or no sample is left to plan.
    """
    array = check_lengths(lengths)
    order, short = _sorted_samples(lengths, array, options)
    corpus = Corpus(array, order, options.max_length, short=short)
    over = _count_overlong(corpus, options)
    if options.overlong == "drop":
        corpus = Corpus(array, order[over:], options.max_length, short=short, dropped=over)
    elif over and options.overlong == "alone":
        corpus = Corpus(array, order, options.max_length, alone=over, short=short)
    elif over:
        raise LengthError(_describe_overlong(corpus, over, options))
    if len(corpus) == 0:
        raise ValueError(
            f"no sample is left to plan: min_length={options.min_length} leaves out {short}, overlong='drop' "
            f"{corpus.dropped}; lower min_length or raise the budget"
        )
    return corpus


def check_lengths(lengths: Lengths) -> npt.NDArray[Any]:
    """The array behind what was given as lengths; signs are checked where they are sorted.

    Raises:
        TypeError: Lengths are not integers, or masked.
        ValueError: Their shape is neither `[N]` nor `[N, K]`, or there are none.
    """
    if isinstance(lengths, IndexedLengths):
        lengths = lengths.lengths
    refuse_masked(lengths, "lengths", _MASKED)
    try:
        array = np.asarray(lengths)
    except ValueError as error:
        raise ValueError(f"lengths must be [N] or [N, K]: every sample must have as many ({error})") from error
    if array.ndim not in {1, 2} or array.size == 0:
        raise ValueError(f"lengths must be [N] or [N, K] with N and K at least 1, got {list(array.shape)}")
    if isinstance(lengths, (list, tuple)) and (array.ndim > 1 or array.dtype.kind == "f"):
        # Of a list, NumPy overlooks the masks of rows, and makes a float of a number that is masked.
        masks = [np.ma.is_masked(row) for row in lengths]
        refuse_masked(np.ma.array(masks, mask=masks), "lengths", _MASKED)
    if array.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {array.dtype}{_first_odd(array)}: count whole steps")
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def longest_first(values: npt.NDArray[Any]) -> Places:
    """Places of non-negative integers `[n]` in descending order, equal ones in the order given.

    A radix sort by 16 bits at a time, several times faster than a comparison sort of 64-bit keys.
    """
    inverted = (values.max() - values).astype(np.uint64)
    order = np.argsort((inverted & np.uint64(0xFFFF)).astype(np.uint16), kind="stable")
    for shift in range(16, int(inverted.max()).bit_length(), 16):
        digits = (inverted >> np.uint64(shift)).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order.astype(np.int32) if len(order) <= np.iinfo(np.int32).max else order


def digest_lengths(lengths: npt.NDArray[Any]) -> str:
    """Sixteen hexadecimal digits of an array's shape and values (of evenly spaced ones, if it is large)."""
    spacing = 1 if len(lengths) <= FINGERPRINTED_WHOLE else -(-len(lengths) * 10 // FINGERPRINTED_WHOLE)
    values = np.ascontiguousarray(lengths[::spacing], "<i8")
    return blake2b(repr(lengths.shape).encode() + values.tobytes(), digest_size=8).hexdigest()


def _sorted_samples(lengths: Lengths, array: npt.NDArray[Any], options: Options) -> tuple[Places, int]:
    """The samples long enough to keep, sorted, and how many were not."""
    chosen = None if options.indices is None else check_indices(options.indices, len(array))
    if array.ndim == 2:
        return _sort_fields(array, np.arange(len(array)) if chosen is None else chosen, options)
    if chosen is None and isinstance(lengths, RankedLengths):
        order = lengths.order
    else:
        values = array if chosen is None else array[chosen]
        _refuse_negative(values, chosen)
        order = longest_first(values) if chosen is None else chosen[longest_first(values)]
    # The order falls, so that the first place that is too short ends what is kept.
    kept = bisect_left(range(len(order)), 1 - options.min_length, key=lambda place: -int(array[order[place]]))
    return order[:kept], len(order) - kept


def _sort_fields(array: npt.NDArray[Any], chosen: Places, options: Options) -> tuple[Places, int]:
    rows = array[chosen]
    _refuse_negative(rows, chosen)
    long_enough: npt.NDArray[np.bool_] = np.greater_equal(rows, options.min_length).all(1)
    chosen, rows = chosen[long_enough], _clip(rows[long_enough], options.max_length)
    over = _exceeds(rows, options)
    worst, fitting = np.flatnonzero(over), np.flatnonzero(~over)
    worst = worst[np.argsort(-rows[worst].sum(1), kind="stable")]
    # What counts is the padded width; real tokens count as they are.
    counted = rows if options.count == "real" else padded_widths(rows, options.allowed_widths)
    fitting = fitting[near_in_all_fields(counted[fitting])]
    return chosen[np.concatenate([worst, fitting])], int(np.sum(~long_enough))


def near_in_all_fields(rows: Integers) -> Places:
    """Samples `[n, K]` ordered so that neighbours are alike in every field, and equal ones follow each other: `[n]`.

    The order of the leaves of a k-d tree (Bentley, 1975), which halves its samples by the field in which they differ
    most; a leaf is sorted by the sum of fields. Two unrelated fields pad half as much as in the order of their sum.
    """
    # NumPy sums a long row in a quarter of the time of a long and narrow column.
    return _leaves(np.arange(len(rows)), np.ascontiguousarray(rows.T))


def _leaves(places: Places, columns: Integers) -> Places:
    """The places `[n]` of samples with lengths `[K, n]`, leaf after leaf."""
    if len(places) <= LEAF:
        return places[_by_sum(columns)]
    # In whole numbers, since a float's last bit may differ between machines.
    means = columns.sum(1) // len(places)
    spread = np.abs(columns - means[:, None]).sum(1)
    if not spread.any():
        return places
    longer = longer_part(columns[spread.argmax()])
    parts = np.flatnonzero(longer), np.flatnonzero(~longer)
    return np.concatenate([_leaves(places[part], columns.take(part, 1)) for part in parts])


def _by_sum(columns: Integers) -> Places:
    """Places `[n]` in descending order of the sum of fields `[K, n]`, and then of every field: equal ones together."""
    keys, bound = columns.sum(0), int(columns.sum(0).max(initial=0)) + 1
    for column in columns[:-1]:
        most = int(column.max(initial=0)) + 1
        bound *= most
        if bound >> 62:
            return np.lexsort([*-columns[::-1], -columns.sum(0)])
        keys = keys * most + column
    return np.argsort(-keys, kind="stable")


def longer_part(values: Integers) -> npt.NDArray[np.bool_]:
    """Whether each of `values` `[n]` is above a threshold that halves them as well as it can: bool `[n]`.

    Equal values are never parted. The value in the middle is the same on every machine, however it is found.

    >>> longer_part(np.array([3, 9, 4, 9, 9])).tolist()
    [False, True, False, True, True]
    """
    middle = np.partition(values, len(values) // 2)[len(values) // 2]
    above: npt.NDArray[np.bool_] = np.greater(values, middle)
    from_there: npt.NDArray[np.bool_] = np.greater_equal(values, middle)
    more, at_least = int(above.sum()), int(from_there.sum())
    if at_least == len(values) or (more and abs(2 * more - len(values)) < abs(2 * at_least - len(values))):
        return above
    return from_there


def _count_overlong(corpus: Corpus, options: Options) -> int:
    """How many samples alone exceed the budget; they stand before all others."""
    return bisect_left(
        range(len(corpus)),
        x=True,
        key=lambda place: not _exceeds(corpus.lengths_at(place, place + 1), options)[0],
    )


def _exceeds(rows: Integers, options: Options) -> npt.NDArray[np.bool_]:
    widths = padded_widths(rows, options.allowed_widths)
    use = options.budget.use(np.ones(len(rows), np.int64), _by_field(widths), rows.sum(1))
    return np.greater(use, 1)


def _describe_overlong(corpus: Corpus, over: int, options: Options) -> str:
    worst = int(corpus.order[0])
    limits = ", ".join(
        f"{name}={value}" for name in ("max_tokens", "cost") if (value := getattr(options, name)) is not None
    )
    return (
        f"{over} of {len(corpus)} samples alone exceed the budget ({limits}), the worst is sample {worst} of length "
        f"{corpus.lengths[worst]}: raise the budget, set max_length, or choose overlong='drop' or overlong='alone'"
    )


def _by_field(rows: Integers) -> Integers:
    return rows[:, 0] if rows.shape[1] == 1 else rows


def _clip(lengths: npt.NDArray[Any], max_length: int | None) -> Integers:
    rows = (lengths[:, None] if lengths.ndim == 1 else lengths).astype(np.int64)
    return rows if max_length is None else np.minimum(rows, min(max_length, _LONGEST))


def _first_odd(array: npt.NDArray[Any]) -> str:
    if array.dtype.kind != "f":
        return ""
    odd = np.argwhere(array != np.floor(array))
    return f" ({array[tuple(odd[0])]} at sample {odd[0][0]})" if len(odd) else ""


def _refuse_negative(values: npt.NDArray[Any], samples: Places | None) -> None:
    """Check signs, also of unsigned integers that a subtraction has carried below zero.

    Raises:
        LengthError: A length is negative, or above 2**63 - 1.
    """
    wrapped = values.dtype == np.uint64 and values.max() > _LONGEST
    if values.min() >= 0 and not wrapped:
        return
    place = np.argwhere(values > _LONGEST if wrapped else values < 0)[0]
    sample = place[0] if samples is None else samples[place[0]]
    value = values[tuple(place)]
    why = f" ({int(value) - (1 << 64)} as a signed number: subtract in int64)" if wrapped else ""
    raise LengthError(f"lengths must be from 0 to 2**63 - 1, got {value}{why} at sample {sample}")
