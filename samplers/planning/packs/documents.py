"""What is packed: samples whole, or in pieces where they are longer than a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from collate.errors import LengthError
from samplers.planning.budget import Integers

OverlongDocuments: TypeAlias = Literal["error", "drop", "cut", "split"]
"""What happens to a document that fits in no row: an error, left out, cut by the collator, or split into pieces."""
DocumentCost: TypeAlias = Callable[[Integers], Any]
"""Cost of documents: from lengths int64 `[n]` (K fields: `[n, K]`) to `[n]`."""

# Products of two capacities, and of a length with 30 bits of noise, stay within 63 bits.
LARGEST_CAPACITY: Final = 1 << 31
LONGEST_DOCUMENT: Final = 1 << 40


@dataclass(frozen=True, kw_only=True, eq=False)
class RowLimits:
    """What a row may hold; all limits hold together.

    Attributes:
        capacity: Steps of each field, each a multiple of `multiple`.
        multiple: Lengths are rounded up to multiples of it.
        max_documents: Documents in a row, or None.
        cost: Cost of each document from its rounded length, or None.
        max_cost: Sum of the costs in a row, or None.
    """

    capacity: tuple[int, ...]
    multiple: int = 1
    max_documents: int | None = None
    cost: DocumentCost | None = None
    max_cost: float | None = None

    @property
    def units(self) -> tuple[int, ...]:
        """The capacity of each field, in units of `multiple` steps."""
        return tuple(steps // self.multiple for steps in self.capacity)

    def costs(self, units: Integers) -> npt.NDArray[np.float64]:
        """The cost of documents of these sizes.

        Args:
            units: Sizes in units, int64 `[n, K]`.

        Returns:
            float64 `[n]`; zeros without a `cost`.

        Raises:
            TypeError: `cost` returns no numbers.
            ValueError: It returns another shape than `[n]`, or a number that is negative or not finite.
        """
        if self.cost is None:
            return np.zeros(len(units))
        steps = units * self.multiple
        given = np.asarray(self.cost(steps[:, 0] if steps.shape[1] == 1 else steps))
        if given.dtype.kind not in "biuf":
            raise TypeError(f"cost must return numbers, got {given.dtype}: return one for each document")
        costs = given.astype(np.float64)
        if costs.shape != (len(units),):
            raise ValueError(f"cost must return one number per document, [{len(units)}], got {list(costs.shape)}")
        if not np.isfinite(costs).all() or costs.min(initial=0) < 0:
            index = int((~np.isfinite(costs) | (costs < 0)).argmax())
            raise ValueError(
                f"cost must return finite numbers from 0, got {costs[index]} for a document of {steps[index].tolist()} "
                "steps"
            )
        return costs

    def fit_alone(self, units: Integers) -> npt.NDArray[np.bool_]:
        """Whether documents of these sizes `[n, K]` fit in a row of their own: `[n]`."""
        fits: npt.NDArray[np.bool_] = np.logical_and.reduce(units <= np.array(self.units), 1)
        if self.max_cost is not None:
            fits[fits] = self.costs(units[fits]) <= self.max_cost
        return fits


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of split samples: piece j has the sample index N + j.

    Attributes:
        samples: The sample that each piece is cut from, int64 `[P]`.
        starts: Its first step in the sample, int64 `[P]`.
        stops: The step after its last, int64 `[P]`.
    """

    samples: Integers
    starts: Integers
    stops: Integers


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents with their planned sizes.

    Attributes:
        units: Size of each document in units, integers `[M, K]`, at least 1 in one field.
        samples: The sample index of each document, int64 `[M]`; None where document i is sample i.
        pieces: Of samples that were split, or None.
        dropped: Samples that `overlong="drop"` leaves out.
    """

    units: Integers
    samples: Integers | None
    pieces: Pieces | None = None
    dropped: int = 0


def plan_documents(
    lengths: Integers, limits: RowLimits, *, overlong: OverlongDocuments = "error", indices: Integers | None = None
) -> Documents:
    """The documents that samples of these lengths give.

    Args:
        lengths: In steps, integers `[N]` or `[N, K]`, not negative. A document without steps takes one unit.
        limits: Of a row.
        overlong: For documents that do not fit in a row alone: `"error"`, `"drop"` them, `"cut"` them to the longest
            that fits, or `"split"` them into such pieces and a rest.
        indices: The samples that take part, int64 `[n]`; None for all.

    Raises:
        LengthError: A document does not fit in a row, with `overlong="error"`.
        ValueError: There are no documents, or `overlong` is unknown or cannot be done for several fields.
    """
    if overlong not in get_args(OverlongDocuments):
        raise ValueError(
            f"overlong must be one of {', '.join(map(repr, get_args(OverlongDocuments)))}, got {overlong!r}"
        )
    lengths = lengths if lengths.ndim == 2 else lengths[:, None]
    taken = lengths if indices is None else lengths[indices]
    if len(taken) == 0:
        raise ValueError("lengths must have at least one sample to pack, got none")
    units = to_units(taken, limits.multiple)
    longer = overlong_documents(units, limits)
    if len(longer) == 0:
        return Documents(units, indices)
    samples = np.arange(len(units)) if indices is None else indices
    if overlong == "error":
        raise LengthError(_describe_overlong(taken, samples, longer, limits))
    if overlong == "drop":
        rest = np.delete(np.arange(len(units)), longer)
        if len(rest) == 0:
            raise ValueError(f"capacity must hold a document, got {limits.capacity}: overlong='drop' drops them all")
        return Documents(units[rest], samples[rest], dropped=len(longer))
    if overlong == "cut":
        units[longer] = _cut_units(units[longer], limits)
        return Documents(units, indices)
    return _split(taken[longer, 0], longer, documents=Documents(units, samples), limits=limits, first=len(lengths))


def longest_units(limits: RowLimits) -> int:
    """The longest document of one field that fits in a row alone, in units: costs must not fall with the length.

    Raises:
        ValueError: Not even a document of one unit fits.
    """
    low, high = 0, limits.units[0] + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = limits.fit_alone(np.array([[middle]], np.int64))[0]
        low, high = (middle, high) if fits else (low, middle)
    if low == 0:
        raise ValueError(
            f"max_cost must allow a document of {limits.multiple} steps, got {limits.max_cost}: raise it, or use "
            "overlong='drop'"
        )
    return low


def to_units(lengths: Integers, multiple: int) -> Integers:
    """Sizes in units: rounded up, and one for a document without a single step in any field."""
    units: Integers = lengths.copy() if multiple == 1 else -(-lengths.astype(np.int64) // multiple)
    if lengths.shape[1] == 1:
        return np.maximum(units, 1, out=units)
    units[units.max(1) == 0, 0] = 1
    return units


def overlong_documents(units: Integers, limits: RowLimits) -> Integers:
    """The documents that do not fit in a row alone, int64 `[n]`, ascending."""
    if limits.max_cost is not None:
        # Few sizes are different, and a user's function may take its time.
        sizes, which = np.unique(units, axis=0, return_inverse=True)
        return np.flatnonzero(~limits.fit_alone(sizes.astype(np.int64))[which.reshape(-1)])
    if (units.max(0) <= np.array(limits.units)).all():
        return np.empty(0, np.int64)
    return np.flatnonzero((units > np.array(limits.units)).any(1))


def _cut_units(units: Integers, limits: RowLimits) -> Integers:
    """The sizes `[n, K]` of documents that are cut to fit.

    Raises:
        ValueError: Documents of several fields cost more than `max_cost`.
    """
    if units.shape[1] == 1:
        return np.minimum(units, longest_units(limits))
    shorter: Integers = np.minimum(units, np.array(limits.units))
    if not limits.fit_alone(shorter).all():
        raise ValueError(
            "overlong='cut' must be told where to cut documents of several fields that cost more than max_cost: cut "
            "them yourself, or use overlong='drop'"
        )
    return shorter


def _split(lengths: Integers, longer: Integers, *, documents: Documents, limits: RowLimits, first: int) -> Documents:
    """Documents of which some, `longer`, are split: their pieces follow the others, numbered from `first` on.

    Raises:
        ValueError: There are several fields.
    """
    if documents.units.shape[1] > 1:
        raise ValueError("overlong='split' must have one field, got several: nobody knows where all fields divide")
    size = longest_units(limits) * limits.multiple
    lengths = lengths.astype(np.int64)
    counts = -(-lengths // size)
    copies = np.repeat(np.arange(len(longer)), counts)
    starts = (np.arange(len(copies)) - (np.cumsum(counts) - counts)[copies]) * size
    stops = np.minimum(starts + size, lengths[copies])
    samples = np.arange(len(documents.units)) if documents.samples is None else documents.samples
    rest = np.delete(np.arange(len(documents.units)), longer)
    units = np.concatenate(
        [documents.units[rest].astype(np.int64), to_units((stops - starts)[:, None], limits.multiple)]
    )
    indices = np.concatenate([samples[rest], first + np.arange(len(copies))])
    return Documents(units, indices, Pieces(samples[longer][copies], starts, stops))


def _describe_overlong(lengths: Integers, samples: Integers, longer: Integers, limits: RowLimits) -> str:
    worst = longer[lengths[longer].sum(1).argmax()]
    steps = lengths[worst].tolist()
    limit = f"capacity {limits.capacity[0] if len(limits.capacity) == 1 else limits.capacity}"
    if limits.max_cost is not None:
        limit += f" and max_cost {limits.max_cost}"
    return (
        f"lengths must fit in a row of {limit}, got {steps[0] if len(steps) == 1 else steps} steps at sample "
        f"{samples[worst]} ({len(longer)} samples do not fit): raise the limit, or set overlong to 'drop', 'cut' or "
        "'split'"
    )
