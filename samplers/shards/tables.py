"""What is known of samples without reading them: lengths, keys, places and checksums, of one shard or of many."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

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

    @property
    def variable(self) -> list[Field]:
        """The K fields whose lengths are known."""
        return [each for each in self.fields if each.variable]

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays that there are, by name."""
        values = {name: getattr(self, name) for name in ARRAYS}
        return {name: value for name, value in values.items() if value is not None}


def join_tables(parts: Sequence[Tables]) -> Tables:
    """The tables of several lists of shards as one, in their order.

    Raises:
        ValueError: There are none, or they differ in layout, fields or checksums.
    """
    check_alike(parts)
    shards = tuple(shard for part in parts for shard in part.shards)
    arrays = {name: np.concatenate(list(joined(parts, name))) for name in parts[0].arrays}
    return Tables(parts[0].layout, parts[0].fields, shards, **arrays)


def check_alike(parts: Sequence[Tables]) -> None:
    """Refuse tables that cannot be joined.

    Raises:
        ValueError: There are none, or they differ in layout, fields or checksums.
    """
    if not parts:
        raise ValueError("indexes must be at least one, got none")
    first = parts[0]
    for part in parts:
        paths = f"{part.shards[0].path} and {first.shards[0].path}"
        if (part.layout, part.fields) != (first.layout, first.fields):
            raise ValueError(f"{paths} cannot be one corpus: {_describe(part)}, and {_describe(first)}")
        if part.arrays.keys() != first.arrays.keys():
            raise ValueError(f"of {paths} one is indexed without checksums: build both with the same checksums=")


def joined(parts: Sequence[Tables], name: str) -> Iterator[Array]:
    """One array of all these tables, as it stands in the whole.

    Yields:
        Each part's share.
    """
    width = max(part.keys.dtype.itemsize for part in parts)
    first = 0
    for part in parts:
        array = part.arrays[name]
        if name == "keys":
            array = array.astype(f"S{width}")
        elif name == "blocks":
            array = array + np.eye(1, array.shape[1], dtype=array.dtype) * first
        first += len(part.keys)
        yield array


def _describe(part: Tables) -> str:
    kinds = [f"{f.suffix} {f.dtype} {list(f.shape)}{' variable' * f.variable}".strip() for f in part.fields]
    return f"{part.layout} of {', '.join(kinds)}"
