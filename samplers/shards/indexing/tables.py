"""What is known of samples without reading them: lengths, keys, places and checksums, of one shard or of many."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Layout: TypeAlias = Literal["plain", "blocks"]


# What `Tables` may hold, each little-endian.
ARRAYS: Final = {"lengths": "<i4", "keys": "S", "places": "<i8", "sizes": "<i8", "crcs": "<u4", "blocks": "<i8"}


@dataclass(frozen=True)
class Field:
    """A field of every sample.

    Attributes:
        name: of the field.
        suffix: of its members.
        variable: True where samples differ in length, which the tables then hold.
        dtype: of its arrays as stored; empty where members are not arrays of one kind.
        shape: `F`, the axes behind the steps; of a field of fixed size, all axes.
        tracked: True where `LengthIndex.lengths` shows its lengths.
    """

    name: str
    suffix: str
    variable: bool = False
    dtype: str = ""
    shape: tuple[int, ...] = ()
    tracked: bool = False

    @cached_property
    def is_array(self) -> bool:
        """Whether its members are `.npy` files."""
        return self.suffix.endswith(".npy") or self.suffix == "npy"

    @property
    def row_bytes(self) -> int:
        """Bytes of a step; of a sample, where the size is fixed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Shard:
    """A shard as it was indexed.

    Attributes:
        path: path or URL.
        size: bytes.
        samples: how many it holds.
        digest: blake2b, 8 bytes in hexadecimal, of each member's tar headers and first 256 bytes, and of all of a
            block's keys and lengths.
        fingerprint: the same of the samples' keys and lengths.
    """

    path: str
    size: int
    samples: int
    digest: str
    fingerprint: str


class TablesLike(Protocol):
    """What can be joined: tables in memory, or a file whose arrays are read when they are asked for."""

    @property
    def layout(self) -> Layout:
        """Of the shards."""
        ...

    @property
    def fields(self) -> tuple[Field, ...]:
        """In the order of their members."""
        ...

    @property
    def shards(self) -> tuple[Shard, ...]:
        """In the order of their samples."""
        ...

    @property
    def length_id(self) -> str | None:
        """Which function measured lengths."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each array that there is, by name."""
        ...

    def array(self, name: str) -> Array:
        """One of the arrays."""
        ...


@dataclass(frozen=True, eq=False)
class Tables:
    """What is known of N samples with M fields, K of them variable, in one shard or many.

    Attributes:
        layout: of the shards.
        fields: M fields, in the order of their members.
        shards: in the order of their samples.
        lengths: steps, int32 `[N, K]`.
        keys: UTF-8, fixed-width bytes `[N]`.
        places: int64 `[N, M]`, offsets in the shard: of the sample's first value in blocks, of the member in the plain
            layout, where 0 means that the sample lacks the field.
        sizes: bytes of the member, int64 `[N, M]`; None in blocks, where length and dtype tell.
        crcs: crc32 of those bytes, uint32 `[N, M]`; None if they were not asked for.
        blocks: int64 `[G, 1 + M + K]`: each block's first sample, the offsets of its fields' members and of its
            variable fields' lengths; None in the plain layout.
        length_id: which function measured the lengths of fields that are no arrays; None where none did, or nobody
            knows.
    """

    layout: Layout
    fields: tuple[Field, ...]
    shards: tuple[Shard, ...]
    lengths: Array
    keys: Array
    places: Array
    sizes: Array | None = None
    crcs: Array | None = None
    blocks: Array | None = None
    length_id: str | None = None

    @property
    def variable(self) -> list[Field]:
        """The K fields whose lengths are known."""
        return [each for each in self.fields if each.variable]

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays that there are, by name."""
        values = {name: getattr(self, name) for name in ARRAYS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def shapes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each of them."""
        return {name: (array.dtype, array.shape) for name, array in self.arrays.items()}

    @property
    def measured(self) -> list[str]:
        """The fields whose lengths no header tells: a function of the user's has measured them."""
        return [field.name for field in self.fields if field.tracked and not field.is_array]

    def array(self, name: str) -> Array:
        """One of the arrays."""
        return self.arrays[name]


def join_tables(parts: Sequence[TablesLike]) -> Tables:
    """The tables of several lists of shards as one, in their order.

    Raises:
        ValueError: There are none, or they differ in layout, fields, checksums or what measured their lengths.
    """
    length_id = check_alike(parts)
    shards = tuple(shard for part in parts for shard in part.shards)
    arrays = {name: _concatenate(parts, name) for name in parts[0].shapes}
    return Tables(parts[0].layout, parts[0].fields, shards, **arrays, length_id=length_id)


def check_alike(parts: Sequence[TablesLike]) -> str | None:
    """Refuse tables that cannot be joined.

    Returns:
        Which function measured the lengths of all of them; None where that is not known of each.

    Raises:
        ValueError: There are none, or they differ in layout, fields, checksums or what measured their lengths.
    """
    if not parts:
        raise ValueError("indexes must be at least one, got none")
    first = parts[0]
    for part in parts:
        paths = f"{part.shards[0].path} and {first.shards[0].path}"
        if (part.layout, part.fields) != (first.layout, first.fields):
            raise ValueError(f"{paths} cannot be one corpus: {_describe_tables(part)}, and {_describe_tables(first)}")
        if part.shapes.keys() != first.shapes.keys():
            raise ValueError(f"of {paths} one is indexed without checksums: build both with the same checksums=")
    found = {part.length_id: part for part in parts}
    named = [name for name in found if name is not None]
    if len(named) > 1:
        paths = " and ".join(found[name].shards[0].path for name in named[:2])
        raise ValueError(
            f"the lengths of {paths} were measured by two functions, {named[0]!r} and {named[1]!r}: build both indexes "
            "with one, or with one length_id= if both measure the same"
        )
    return named[0] if named and None not in found else None


def concat_column(parts: Sequence[TablesLike], name: str) -> Iterator[Array]:
    """One array of all these tables, as it stands in the whole.

    Yields:
        Each part's share.
    """
    width = key_width(parts)
    first = 0
    for part in parts:
        array = part.array(name)
        if name == "keys":
            array = array.astype(f"S{width}")
        elif name == "blocks":
            array = array + np.eye(1, array.shape[1], dtype=array.dtype) * first
        first += part.shapes["keys"][1][0]
        yield array


def key_width(parts: Sequence[TablesLike]) -> int:
    """Bytes of the longest key."""
    return max(part.shapes["keys"][0].itemsize for part in parts)


def _concatenate(parts: Sequence[TablesLike], name: str) -> Array:
    # One part after the other: of 2,000 files, each is open no longer than it is read.
    dtype, shape = parts[0].shapes[name]
    rows = sum(part.shapes[name][1][0] for part in parts)
    whole = np.empty((rows, *shape[1:]), f"S{key_width(parts)}" if name == "keys" else dtype)
    first = 0
    for array in concat_column(parts, name):
        whole[first : first + len(array)] = array
        first += len(array)
    return whole


def _describe_tables(part: TablesLike) -> str:
    kinds = [f"{f.suffix} {f.dtype} {list(f.shape)}{' variable' * f.variable}".strip() for f in part.fields]
    return f"{part.layout} of {', '.join(kinds)}"
