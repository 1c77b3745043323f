"""The options of a packing sampler: checked once, on creation, and then passed as one value."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypedDict

import numpy as np

from collate.widths import check_count
from samplers.planning.options import LARGEST_SEED, Indices, check_flag, copy_indices, describe_options
from samplers.planning.packs.documents import DocumentCost, OverlongDocuments

# More would not be numbers of int64 when they are multiplied.
LARGEST_ROWS: Final = 1 << 31


class PackingOptions(TypedDict, total=False):
    """The keyword options of every loader that packs, for type checkers.

    `PackingBatchSampler` documents them; `PackOptions` has their defaults and checks.
    """

    capacity: int | Sequence[int]
    rows: int
    multiple: int
    max_documents: int | None
    cost: DocumentCost | None
    max_cost: float | None
    overlong: OverlongDocuments
    shuffle: bool
    seed: int
    min_length: int
    drop_last: bool
    indices: Indices | None


@dataclass(frozen=True, kw_only=True, eq=False)
class PackOptions:
    """All that decides packs, except the lengths, the epoch and the number of replicas.

    Args: those of `PackingOptions`. The limits of a row are checked with the lengths, when it is known how many fields
        there are.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range.
    """

    capacity: int | Sequence[int]
    rows: int = 1
    multiple: int = 1
    max_documents: int | None = None
    cost: DocumentCost | None = None
    max_cost: float | None = None
    overlong: OverlongDocuments = "error"
    shuffle: bool = True
    seed: int = 0
    min_length: int = 0
    drop_last: bool = False
    indices: Indices | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacity", _own_capacity(self.capacity))
        object.__setattr__(self, "indices", copy_indices(self.indices))
        check_flag("shuffle", self.shuffle)
        check_flag("drop_last", self.drop_last)
        self._check_count("seed", 0, "give a number from 0 to 2**64 - 1")
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed must be at most 2**64 - 1, got {self.seed}: take it modulo 2**64")
        self._check_count("rows", 1, "give the rows of a batch")
        if self.rows > LARGEST_ROWS:
            raise ValueError(f"rows must be at most 2**31, got {self.rows}: give the rows of a batch")
        self._check_count("min_length", 0, "0 keeps every sample")

    def describe(self) -> str:
        """The options that are not the default, as text for a `repr`; of `indices` their number.

        >>> PackOptions(capacity=100, rows=4).describe()
        'capacity=100, rows=4'
        """
        return describe_options(self)

    def for_source(self, **changed: Any) -> "PackOptions":
        """These options with others in place of some."""
        return replace(self, **changed)

    def _check_count(self, name: str, least: int, hint: str) -> None:
        """Check an integer option, and store it as a Python int."""
        object.__setattr__(self, name, check_count(name, getattr(self, name), least=least, hint=hint))


def _own_capacity(capacity: Any) -> Any:
    """A capacity that the caller cannot change, of Python ints; what is no number stays, for its message."""
    if isinstance(capacity, (np.ndarray, np.integer)):
        capacity = capacity.tolist()
    return tuple(capacity) if isinstance(capacity, list) else capacity


def make_pack_options(options: PackingOptions) -> PackOptions:
    """Check the options that a user gave as keywords.

    Raises:
        TypeError: An option is unknown, has the wrong type, or `capacity` is missing.
        ValueError: An option is out of its range.
    """
    present: dict[str, Any] = dict(options)
    names = PackOptions.__dataclass_fields__
    unknown = sorted(present.keys() - names.keys())
    if unknown:
        raise TypeError(f"options must be among {', '.join(names)}, got {', '.join(unknown)}")
    if present.get("capacity") is None:
        raise TypeError("capacity must be given, the steps that a row holds, got none")
    return PackOptions(**present)
