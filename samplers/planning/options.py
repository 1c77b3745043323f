"""The planner's options: checked once, on creation, and then passed as one value."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Final, Literal, Protocol, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from collate.deprecated.names import with_present_names
from collate.widths import AllowedWidths, Widths, check_count, check_widths
from samplers.planning.budget import Budget, Cost, Count
from samplers.sources.masked import refuse_masked

Overlong: TypeAlias = Literal["error", "drop", "alone"]
"""What happens to a sample that alone exceeds the budget: an error, left out, or a batch of one row."""
Indices: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
"""Indices of samples."""

LARGEST_SEED: Final = (1 << 64) - 1
LARGEST_EPOCH: Final = 2**31 - 1


class EpochOptions(Protocol):
    """The options that every planner has."""

    @property
    def seed(self) -> int:
        """Seed of the shuffles."""
        ...

    @property
    def shuffle(self) -> bool:
        """Whether epochs differ."""
        ...

    @property
    def drop_last(self) -> bool:
        """Whether the last, partial step is dropped."""
        ...

    def describe(self) -> str:
        """The options that are not the default, as text."""
        ...


class PlanOptions(TypedDict, total=False):
    """The keyword options of every planned loader and of `plan_epoch`, for type checkers.

    `LengthBucketBatchSampler` documents them; `Options` has their defaults and checks.
    """

    max_tokens: int | None
    batch_size: int | None
    cost: Cost | None
    count_tokens: Count
    window: int | None
    shuffle: bool
    seed: int
    min_length: int
    max_length: int | None
    overlong: Overlong
    drop_last: bool
    widths: Widths
    indices: Indices | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """All that decides a plan, except the lengths, the epoch and the number of replicas.

    Args: those of `PlanOptions`, as `LengthBucketBatchSampler` documents them.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range, or no budget is given.
    """

    max_tokens: int | None = None
    batch_size: int | None = None
    cost: Cost | None = None
    count_tokens: Count = "padded"
    window: int | None = None
    shuffle: bool = True
    seed: int = 0
    min_length: int = 0
    max_length: int | None = None
    overlong: Overlong = "error"
    drop_last: bool = False
    widths: Widths = None
    indices: Indices | None = None

    def __post_init__(self) -> None:
        # The checks of `budget` and `allowed_widths` run when these are first read: here, so that a wrong option is
        # refused where it is given.
        _ = self.budget
        check_flag("shuffle", self.shuffle)
        check_flag("drop_last", self.drop_last)
        self._check_count("seed", 0, "give a number from 0 to 2**64 - 1")
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed must be at most 2**64 - 1, got {self.seed}: take it modulo 2**64")
        self._check_count("min_length", 0, "0 keeps every sample")
        if self.window is not None:
            self._check_count("window", 1, "give a number of samples, or None for a default")
        if self.max_length is not None:
            self._check_count("max_length", 1, "give a number of time steps, or None for no limit")
        if self.overlong not in {"error", "drop", "alone"}:
            raise ValueError(f"overlong must be 'error', 'drop' or 'alone', got {self.overlong!r}")
        _ = self.allowed_widths
        object.__setattr__(self, "indices", copy_indices(self.indices))

    def describe(self) -> str:
        """The options that are not the default, as text for a `repr`; of `indices` their number.

        >>> Options(max_tokens=100, batch_size=8, indices=range(5)).describe()
        'max_tokens=100, batch_size=8, indices=<5>'
        """
        return describe_options(self)

    @cached_property
    def budget(self) -> Budget:
        """What a batch may cost."""
        return Budget(
            max_tokens=self.max_tokens,
            batch_size=self.batch_size,
            cost=self.cost,
            count_tokens=self.count_tokens,
        )

    def for_source(self, **changed: Any) -> "Options":
        """These options with others in place of some that are not of the budget, which both share.

        It keeps the rows of each width, which hundreds of sources ask for.
        """
        new = replace(self, **changed)
        new.__dict__["budget"] = self.budget
        return new

    @cached_property
    def allowed_widths(self) -> AllowedWidths:
        """The checked `widths`, as `padded_widths` takes them."""
        return check_widths(self.widths)

    def _check_count(self, name: str, least: int, hint: str) -> None:
        """Check an integer option, and store it as a Python int."""
        # A NumPy integer would end in saved positions, which JSON does not hold. The class is frozen, so not `setattr`.
        object.__setattr__(self, name, check_count(name, getattr(self, name), least=least, hint=hint))


def describe_options(options: Any) -> str:
    """The options of a dataclass that are not the default, as text for a `repr`; of `indices` their number."""
    values = {each.name: getattr(options, each.name) for each in fields(options)}
    given = {each.name for each in fields(options) if values[each.name] is not each.default}
    # An array is not compared, and not printed.
    if "indices" in given:
        values["indices"] = f"<{len(values['indices'])}>"
    return ", ".join(
        f"{name}={value}" if name == "indices" else f"{name}={value!r}"
        for name, value in values.items()
        if name in given
    )


def make_options(options: PlanOptions) -> Options:
    """Check the options that a user gave as keywords; `count` is the former name of `count_tokens`.

    Raises:
        TypeError: An option is unknown, has the wrong type, or is given by both names.
        ValueError: An option is out of its range, or no budget is given.
    """
    present: dict[str, Any] = dict(options)
    if "count" in present:
        with_present_names(present, {"count": "count_tokens"}, "a plan", stacklevel=5)
    unknown = sorted(present.keys() - Options.__dataclass_fields__.keys())
    if unknown:
        raise TypeError(f"options must be among {', '.join(Options.__dataclass_fields__)}, got {', '.join(unknown)}")
    return Options(**present)


def check_flag(name: str, value: object) -> None:
    """Check an option that is on or off.

    Raises:
        TypeError: It is not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")


def check_epoch(epoch: int) -> int:
    """Check the number of an epoch.

    Raises:
        TypeError: It is not an int.
        ValueError: It is negative, or above 2**31 - 1.
    """
    epoch = check_count("epoch", epoch, least=0, hint="count epochs from 0")
    if epoch > LARGEST_EPOCH:
        raise ValueError(f"epoch must be at most {LARGEST_EPOCH}, got {epoch}: count epochs from 0")
    return epoch


def copy_indices(indices: Indices | None) -> Indices | None:
    """A copy of indices that can change: a worker or an unpickled copy plans again, after later writes of the caller.

    Args:
        indices: Integers `[n]`, or None.

    Raises:
        TypeError: They are masked.
    """
    if indices is None or isinstance(indices, (range, tuple)):
        return indices
    refuse_masked(indices, "indices", "leave them out with .compressed()")
    return np.asarray(indices).copy()


def check_indices(indices: Indices, samples: int) -> npt.NDArray[np.int64]:
    """The chosen samples, ascending: int64 `[n]`.

    Args:
        indices: Indices of samples, in any order.
        samples: Size of the dataset.

    Raises:
        TypeError: They are not integers, or masked.
        ValueError: One is out of range or given twice, or there is none.
    """
    refuse_masked(indices, "indices", "leave them out with .compressed()")
    array = np.asarray(indices)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"indices must name at least one sample, got shape {list(array.shape)}: None plans all")
    if array.dtype.kind not in "iu":
        raise TypeError(f"indices must be integers, got {array.dtype}: np.flatnonzero turns a mask into indices")
    outside = (array < 0) | (array >= samples)
    if outside.any():
        entry = int(outside.argmax())
        raise ValueError(f"indices must be in range({samples}), got {array[entry]} as entry {entry}")
    # Indices 3, 0 and 3 have the counts 1, 0, 0 and 2: sample 3 was given twice.
    times = np.bincount(array, minlength=samples)
    if times.max() > 1:
        raise ValueError(f"indices must differ, got sample {times.argmax()} {times.max()} times")
    return np.flatnonzero(times)
