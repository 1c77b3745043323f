"""Tables: lengths, keys, offsets and checksums of samples, for one shard or many.

Two shards of the layout `"blocks"` with one field `tokens`: the first has a block of 2 samples and a block of 1, the
second has a block of 2. Joined, the first sample of each block is counted from the start of the corpus:

>>> def one_shard(path, lengths, blocks):
...     keys = np.array([f"{path}{row}".encode() for row in range(len(lengths))])
...     fields = (Field("tokens", "tokens.npy", variable=True, dtype="<i4", tracked=True),)
...     shard = Shard(path, size=4096, samples=len(lengths), digest="", fingerprint="")
...     column = np.array(lengths, "<i4")[:, None]
...     return Tables("blocks", fields, (shard,), column, keys, column.astype("<i8"), blocks=np.array(blocks, "<i8"))
>>> a = one_shard("a", [3, 1, 2], [[0, 1024, 512], [2, 2560, 2048]])
>>> b = one_shard("b", [5, 4], [[0, 1024, 512]])
>>> both = join_tables([a, b])
>>> both.lengths[:, 0].tolist(), both.keys.tolist()
([3, 1, 2, 5, 4], [b'a0', b'a1', b'a2', b'b0', b'b1'])
>>> both.blocks.tolist()
[[0, 1024, 512], [2, 2560, 2048], [3, 1024, 512]]
>>> both.of_shard(1).blocks.tolist()
[[0, 1024, 512]]

In a row of `blocks`, 1024 is the offset of `tokens.npy` and 512 that of `tokens.lengths.npy`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np

from samplers.shards.format.npy import AnyArray
from samplers.shards.format.packed_keys import PackedKeys
from samplers.shards.format.packed_offsets import PackedOffsets

# Steps in a second, by field: ascending, more than one if samples differ.
Rates: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]

Layout: TypeAlias = Literal["plain", "blocks"]
"""How shards are written: a member for each sample and field, or blocks of many samples."""

# Arrays of `Tables` and their dtypes, little-endian.
ARRAYS: Final = {"lengths": "<i4", "keys": "S", "offsets": "<i8", "sizes": "<i8", "crcs": "<u4", "blocks": "<i8"}


@dataclass(frozen=True)
class Field:
    """A field of every sample, as the shards store it.

    Attributes:
        name: Name of the field.
        suffix: Suffix of its members.
        variable: True if samples differ in length. The tables have these lengths.
        dtype: Dtype of its arrays as stored. Empty if the members are not arrays of one dtype and shape.
        shape: `F`, the axes behind the steps. All axes, if the size is fixed.
        tracked: True if `LengthIndex.lengths` has its lengths.
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
        """Bytes of a step. Bytes of a sample, if the size is fixed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Shard:
    """A shard as it was indexed.

    Attributes:
        path: Path or URL.
        size: Size in bytes.
        samples: Number of samples.
        digest: Digest (blake2b, 8 bytes, hexadecimal) of each member's tar headers and first 256 bytes, and of the
            whole keys and lengths of a block.
        fingerprint: The same kind of digest of the samples' keys and lengths.
    """

    path: str
    size: int
    samples: int
    digest: str
    fingerprint: str


class TablesLike(Protocol):
    """What `join_tables` joins: tables in memory, or an index file whose arrays are mapped when they are used."""

    @property
    def layout(self) -> Layout:
        """Layout of the shards."""
        ...

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields, in the order of their members."""
        ...

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards, in the order of their samples."""
        ...

    @property
    def length_id(self) -> str | None:
        """Name of the function that measured lengths."""
        ...

    @property
    def rates(self) -> Rates:
        """Steps in a second of the fields where they are known."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each array, by name."""
        ...

    def array(self, name: str) -> AnyArray:
        """One of the arrays."""
        ...


@dataclass(frozen=True, eq=False)
class Tables:
    """Tables of N samples with M fields, K of them of variable length, in one shard or many.

    Attributes:
        layout: Layout of the shards.
        fields: The M fields, in the order of their members.
        shards: The shards, in the order of their samples.
        lengths: Lengths in steps, int32 `[N, K]`.
        keys: Keys in UTF-8, fixed-width bytes `[N]`, or packed from a file of version 2.
        offsets: Offsets in the shard, int64 `[N, M]`, or packed from a file of version 2: of the sample's first value
            in blocks, of the member in the plain layout, where 0 means that the sample lacks the field.
        sizes: Bytes of the member, int64 `[N, M]`. None in blocks, where length and dtype give them.
        crcs: crc32 of these bytes, uint32 `[N, M]`. None if payloads were not read.
        blocks: int64 `[G, 1 + M + K]`, a row for each block: its first sample, the offsets of its fields' members, and
            the offsets of the lengths of its variable fields. None in the plain layout.
        length_id: Name of the function that measured the lengths of fields that are not arrays. None if there is no
            such field, or the function is unknown.
        rates: Steps in a second, by field, where headers have them.
    """

    layout: Layout
    fields: tuple[Field, ...]
    shards: tuple[Shard, ...]
    lengths: AnyArray
    keys: AnyArray | PackedKeys
    offsets: AnyArray | PackedOffsets
    sizes: AnyArray | None = None
    crcs: AnyArray | None = None
    blocks: AnyArray | None = None
    length_id: str | None = None
    rates: Rates = ()

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        # Pickles of release 0.1 call the offsets `places`.
        self.__dict__.update({"offsets" if name == "places" else name: value for name, value in state.items()})

    @property
    def variable(self) -> list[Field]:
        """The K fields of variable length."""
        return [field for field in self.fields if field.variable]

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that are not None, by name. Some may be packed."""
        values = {name: getattr(self, name) for name in ARRAYS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def shapes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each array, by name."""
        return {name: (array.dtype, array.shape) for name, array in self.arrays.items()}

    @property
    def measured(self) -> list[str]:
        """The fields that are not arrays, so that `length_id` says what measured their lengths."""
        return [field.name for field in self.fields if field.tracked and not field.is_array]

    @cached_property
    def starts(self) -> AnyArray:
        """Index of each shard's first sample, then N: int64 `[S + 1]`."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)])

    def array(self, name: str) -> AnyArray:
        """One of the arrays. A packed one is unpacked."""
        return np.asarray(self.arrays[name])

    def offsets_of(self, rows: AnyArray, column: int) -> AnyArray:
        """The offsets of a field in the shards of these samples: int64 `[n]`.

        Args:
            rows: Sample indices, int64 `[n]`, not negative.
            column: Index of the field in `fields`.
        """
        if isinstance(self.offsets, PackedOffsets):
            return self.offsets.at(rows, column)
        offsets: AnyArray = self.offsets[rows, column]
        return offsets

    def of_shard(self, number: int) -> "Tables":
        """The tables of one shard, as an index of that shard alone would have them."""
        first, last = self.starts[number : number + 2].tolist()
        arrays: dict[str, Any] = {name: array[first:last] for name, array in self.arrays.items() if name != "blocks"}
        if self.blocks is not None:
            start, end = np.searchsorted(self.blocks[:, 0], [first, last])
            arrays["blocks"] = self.blocks[start:end].copy()
            arrays["blocks"][:, 0] -= first
        return Tables(
            self.layout, self.fields, (self.shards[number],), **arrays, length_id=self.length_id, rates=self.rates
        )


def join_tables(parts: Sequence[TablesLike]) -> Tables:
    """The tables of several lists of shards as one, in their order.

    Raises:
        ValueError: There are none, or they differ in layout, fields, checksums or the function that measured lengths.
    """
    length_id = check_alike(parts)
    shards = tuple(shard for part in parts for shard in part.shards)
    arrays = {name: _concatenate(parts, name) for name in parts[0].shapes}
    return Tables(parts[0].layout, parts[0].fields, shards, **arrays, length_id=length_id, rates=join_rates(parts))


def check_alike(parts: Sequence[TablesLike]) -> str | None:
    """Refuse tables that cannot be joined.

    Returns:
        The function that measured all of their lengths. None if it is unknown for one of them.

    Raises:
        ValueError: There are none, or they differ in layout, fields, checksums or the function that measured lengths.
    """
    if not parts:
        raise ValueError("indexes must be at least one, got none")
    first = parts[0]
    for part in parts:
        paths = f"{part.shards[0].path} and {first.shards[0].path}"
        # Field by field: dtype and feature shape decide how bytes are cut into samples.
        if (part.layout, part.fields) != (first.layout, first.fields):
            raise ValueError(f"{paths} cannot be one corpus: {_describe_tables(part)}, and {_describe_tables(first)}")
        if part.shapes.keys() != first.shapes.keys():
            raise ValueError(f"of {paths} one is indexed without checksums: build both with the same checksums=")
    by_id = {part.length_id: part for part in parts}
    names = [name for name in by_id if name is not None]
    if len(names) > 1:
        paths = " and ".join(by_id[name].shards[0].path for name in names[:2])
        raise ValueError(
            f"the lengths of {paths} were measured by two functions, {names[0]!r} and {names[1]!r}: build both indexes "
            "with one, or with one length_id= if both measure the same"
        )
    return names[0] if names and None not in by_id else None


def join_rates(parts: Sequence[TablesLike]) -> Rates:
    """The rates of all parts, for the fields whose rates all of them know.

    >>> from types import SimpleNamespace
    >>> a, b = (SimpleNamespace(rates=(("wav", (rate,)),)) for rate in (16000, 8000))
    >>> join_rates([a, b, a]), join_rates([a, SimpleNamespace(rates=())])
    ((('wav', (8000, 16000)),), ())
    """
    by_part = [dict(part.rates) for part in parts]
    names = [name for name in by_part[0] if all(name in rates for rates in by_part)]
    return tuple((name, tuple(sorted({rate for rates in by_part for rate in rates[name]}))) for name in names)


def concat_column(parts: Sequence[TablesLike], name: str) -> Iterator[AnyArray]:
    """One array of the joined tables, part by part.

    Yields:
        The rows of each part.
    """
    width = key_width(parts)
    first = 0
    for part in parts:
        array = part.array(name)
        if name == "keys":
            # The file has one width for all keys, that of the longest in any part.
            array = array.astype(f"S{width}")
        elif name == "blocks":
            array = array.copy()
            # The first sample of a block is counted from the start of the corpus.
            array[:, 0] += first
        first += part.shapes["keys"][1][0]
        yield array


def key_width(parts: Sequence[TablesLike]) -> int:
    """Bytes of the longest key."""
    return max(part.shapes["keys"][0].itemsize for part in parts)


def _concatenate(parts: Sequence[TablesLike], name: str) -> AnyArray:
    """One array of the joined tables."""
    # Copied part by part: of 2,000 index files, each is open only while it is copied.
    dtype, shape = parts[0].shapes[name]
    rows = sum(part.shapes[name][1][0] for part in parts)
    whole = np.empty((rows, *shape[1:]), f"S{key_width(parts)}" if name == "keys" else dtype)
    first = 0
    for array in concat_column(parts, name):
        whole[first : first + len(array)] = array
        first += len(array)
    return whole


def _describe_tables(part: TablesLike) -> str:
    """The layout and the fields of tables, as text."""
    fields = [f"{f.suffix} {f.dtype} {list(f.shape)}{' variable' * f.variable}".strip() for f in part.fields]
    return f"{part.layout} of {', '.join(fields)}"
