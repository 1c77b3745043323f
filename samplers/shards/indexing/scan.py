"""What a shard holds, found from headers alone: the length, the place and the checksum of each sample's fields."""

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from typing import Any, Final, TypeAlias
from zlib import crc32

import numpy as np
import numpy.typing as npt

from collate.errors import LengthError
from samplers.shards.format.samples import (
    DTYPES,
    KEYS,
    ArrayHeader,
    check_array_size,
    check_block_lengths,
    decode_array,
    field_of,
    find_array_header,
    read_array_header,
    read_block_keys,
    refuse_pickle,
    split_block,
)
from samplers.shards.format.tar import Member, read_members, split_name
from samplers.shards.indexing.tables import Field, Shard, Tables
from samplers.shards.storage.reading import RandomAccess, open_file

Array: TypeAlias = npt.NDArray[Any]
LengthOf: TypeAlias = Callable[[str, bytes], int]
Members: TypeAlias = dict[str, Member]

LONGEST: Final = np.iinfo(np.int32).max
# A longer header of an array would be a hoax.
_LONGEST_HEADER: Final = 1 << 16
# A table of keys may be so many times as large as their shard.
_TABLE: Final = 8
# Headers that are remembered.
_KNOWN: Final = 10_000


def scan_shard(
    path: str, fields: Collection[str] | None = None, length: LengthOf | None = None, *, checksums: bool = False
) -> Tables:
    """Read the headers of a shard.

    Args:
        path: path or URL.
        fields: those whose lengths count; None for all arrays with an axis.
        length: `(field, bytes) -> steps` for fields that are not arrays.
        checksums: read the payload too.

    Raises:
        FileNotFoundError: There is no such shard.
        LengthError: A block's lengths do not fit what it holds, or `length` gives no length.
        ValueError: The shard is damaged, empty, holds pickles, or its samples differ in kind; shard, key and field are
            named.
    """
    source = _Source(open_file(path), checksums=checksums)
    groups = source.groups()
    first = next(groups, None)
    if first is None:
        raise ValueError(f"{path}: holds no samples: members must be named KEY.SUFFIX")
    every = chain([first], groups)
    if KEYS in first[1]:
        return _scan_blocks(source, every, fields)
    scan = _PlainScan(source, fields, length)
    for key, members in every:
        scan.add(key, members)
    return scan.tables()


def read_groups(path: str) -> Iterator[dict[str, Any]]:
    """The groups of a shard as webdataset hands them over, with what they hold.

    Yields:
        `{"__key__": str, "__url__": path, suffix: bytes, ...}`.

    Raises:
        FileNotFoundError: There is no such shard.
        ValueError: The shard is damaged.
    """
    source = _Source(open_file(path), checksums=False)
    for key, members in source.groups():
        yield {"__key__": key, "__url__": path} | {suffix: source.content(each) for suffix, each in members.items()}


class _Source:
    """A shard's groups, and what its headers amount to once all are read."""

    def __init__(self, file: RandomAccess, *, checksums: bool) -> None:
        self.file, self.checksums = file, checksums
        self._digest = blake2b(digest_size=8)

    def groups(self) -> Iterator[tuple[str, Members]]:
        # Neighbours of one key, by suffix.
        members: Members = {}
        last = None
        for member in read_members(self.file):
            self._digest.update(member.header + member.head)
            key, suffix = split_name(member.name) or (None, "")
            if key is None:
                continue
            if key != last and last is not None:
                yield last, members
                members = {}
            if suffix in members:
                raise ValueError(f"{self.context(key)}: two members {suffix!r}")
            members[suffix], last = member, key
        if last is not None:
            yield last, members

    def context(self, key: str) -> str:
        return f"{self.file.path}: group {key!r}"

    def array_header(self, member: Member, context: str) -> ArrayHeader:
        head = member.head
        try:
            header = read_array_header(head, context)
        except ValueError:
            if member.size <= len(head):
                raise
            header = read_array_header(self.file.read(member.data, min(member.size, _LONGEST_HEADER)), context)
        check_array_size(header, member.size, context)
        return header

    def content(self, member: Member) -> bytes:
        return self.file.read(member.data, member.size)

    def digested(self, member: Member) -> bytes:
        """What a member holds, made part of the digest."""
        data = self.content(member)
        self._digest.update(data[len(member.head) :])
        return data

    def check_width(self, sizes: Iterable[int], count: int) -> None:
        """Refuse keys that would be a table far greater than the shard, for they all take the longest one's bytes.

        Raises:
            ValueError: They would; the shard is named.
        """
        width = max(sizes)
        if not fits_table(width, count, self.file.size):
            raise ValueError(f"{self.file.path}: a key of {width} bytes among {count} samples: shorten the key")

    def shard(self, lengths: Array, keys: Array) -> Shard:
        fingerprint = blake2b(lengths.astype("<i8").tobytes(), digest_size=8)
        fingerprint.update(b"\0".join(keys.tolist()))
        file = self.file
        return Shard(file.path, file.size, len(keys), self._digest.hexdigest(), fingerprint.hexdigest())


@dataclass
class _BlockColumn:
    """A field of a block: its `[n]` lengths (None for a field of fixed size), places and checksums, and offsets."""

    field: Field
    lengths: Array | None
    places: Array
    crcs: list[int]
    members: tuple[int, ...]


@dataclass
class _Block:
    keys: Array
    columns: list[_BlockColumn]

    @property
    def fields(self) -> tuple[Field, ...]:
        return tuple(column.field for column in self.columns)

    @property
    def lengths(self) -> Array:
        return np.stack([column.lengths for column in self.columns if column.lengths is not None], 1)

    @property
    def members(self) -> list[int]:
        """Offsets of the fields' members, then of their lengths."""
        return [c.members[0] for c in self.columns] + [c.members[1] for c in self.columns if c.field.variable]


def _scan_blocks(source: _Source, groups: Iterable[tuple[str, Members]], fields: Collection[str] | None) -> Tables:
    blocks: list[_Block] = []
    for key, members in groups:
        context = source.context(key)
        if KEYS not in members:
            raise ValueError(f"{context}: a single sample among blocks: a shard holds one layout")
        blocks.append(_read_block(source, members, fields, context))
        if blocks[-1].fields != blocks[0].fields:
            raise ValueError(
                f"{context}: fields {_describe_block(blocks[-1])}, in the first block {_describe_block(blocks[0])}"
            )
    source.check_width([block.keys.dtype.itemsize for block in blocks], sum(len(block.keys) for block in blocks))
    keys = np.concatenate([block.keys for block in blocks])
    _refuse_duplicates(keys, source.file.path)
    lengths = np.concatenate([block.lengths for block in blocks]).astype("<i4")
    starts = np.cumsum([0, *(len(block.keys) for block in blocks)])[:-1]
    return Tables(
        "blocks",
        blocks[0].fields,
        (source.shard(lengths, keys),),
        lengths,
        keys,
        _stack(blocks, "places").astype("<i8"),
        crcs=_stack(blocks, "crcs").astype("<u4") if source.checksums else None,
        blocks=np.column_stack([starts, [block.members for block in blocks]]).astype("<i8"),
    )


def _read_block(source: _Source, members: Members, fields: Collection[str] | None, context: str) -> _Block:
    keys = read_block_keys(source.digested(members[KEYS]), context)
    variable = split_block(members, context)
    tracked = [name for name in variable if variable[name]] if fields is None else list(fields)
    odd = [name for name in tracked if not variable.get(name)]
    if odd or not tracked or not len(keys):
        raise ValueError(
            f"{context}: {len(keys)} samples, variable-length fields {[name for name in variable if variable[name]]}, "
            f"wanted {tracked}: a block needs a sample, and each field that counts a member FIELD.lengths.npy"
        )
    columns = [
        _read_column(source, members, keys, Field(name, f"{name}.npy", varies, tracked=name in tracked), context)
        for name, varies in variable.items()
    ]
    return _Block(np.strings.encode(keys, "utf-8", "surrogateescape"), columns)


def _read_column(source: _Source, members: Members, keys: Array, field: Field, context: str) -> _BlockColumn:
    context = f"{context}, field {field.name!r}"
    member = members[field.suffix]
    header = source.array_header(member, context)
    if header.dtype.str not in DTYPES or not header.shape or header.fortran:
        raise ValueError(f"{context}: a block's arrays are little-endian, row-major and have an axis, got {header}")
    offsets: tuple[int, ...] = (member.data,)
    lengths = None
    if field.variable:
        declared = members[f"{field.name}.lengths.npy"]
        offsets += (declared.data,)
        lengths = decode_array(source.digested(declared), f"{context} (lengths)")
        lengths = check_block_lengths(lengths, keys, header.shape[0], context)
        check_longest(int(lengths.max()), context)
    elif header.shape[0] != len(keys):
        raise ValueError(f"{context}: {len(keys)} keys, but an array of shape {list(header.shape)}")
    field = replace(field, dtype=header.dtype.str, shape=header.shape[1:])
    steps = np.ones(len(keys), np.int64) if lengths is None else lengths
    ends = np.cumsum(steps) * field.row_bytes + header.size
    starts = ends - steps * field.row_bytes
    crcs = _crcs(source.content(member), starts, ends) if source.checksums else []
    return _BlockColumn(field, lengths, starts + member.data, crcs, offsets)


class _PlainColumn:
    """A field of a plain shard: a number of each kind for every sample, 0 for those that lack the field."""

    def __init__(self, field: Field) -> None:
        self.field = field
        # Flat arrays, for the garbage collector would walk a million small tuples again and again.
        self.places, self.sizes, self.crcs, self.lengths = (array("q") for _ in range(4))

    def append(self, sample: int, place: int, size: int, crc: int, length: int) -> None:
        if sample > len(self.places):
            self.pad(sample)
        self.places.append(place)
        self.sizes.append(size)
        self.crcs.append(crc)
        self.lengths.append(length)

    def pad(self, samples: int) -> None:
        for column in (self.places, self.sizes, self.crcs, self.lengths):
            column.extend([0] * (samples - len(column)))


class _PlainScan:
    """A shard of one sample a group, read group by group."""

    def __init__(self, source: _Source, fields: Collection[str] | None, length: LengthOf | None) -> None:
        self.source, self.length = source, length
        self.tracked = None if fields is None else list(fields)
        self.keys: dict[str, None] = {}
        self.columns: dict[str, _PlainColumn] = {}
        # Lengths of arrays by what tells them: suffix, size and header. Parsing is most of the work, and they recur.
        self.known: dict[tuple[str, int, bytes], int] = {}

    def add(self, key: str, members: Members) -> None:
        if KEYS in members or key in self.keys:
            state = "a block among single samples" if KEYS in members else "the key comes twice"
            raise ValueError(f"{self.source.context(key)}: {state}")
        if self.tracked is None:
            self.tracked = self._variable_arrays(members, self.source.context(key))
        sample, tracked = len(self.keys), 0
        self.keys[key] = None
        for suffix, member in members.items():
            column = self.columns.get(suffix) or self._new_column(suffix, self.source.context(key))
            crc = crc32(self.source.content(member)) if self.source.checksums else 0
            column.append(sample, member.data, member.size, crc, self._length(column, member, key))
            tracked += column.field.tracked
        if tracked < len(self.tracked):
            names = [field_of(suffix)[0] for suffix in members]
            missing = [name for name in self.tracked if name not in names]
            raise ValueError(f"{self.source.context(key)}: no field {missing[0]!r}, there are {names}")

    def tables(self) -> Tables:
        """All that was added."""
        columns = list(self.columns.values())
        for column in columns:
            column.pad(len(self.keys))
        lengths = np.stack([column.lengths for column in columns if column.field.tracked], 1).astype("<i4")
        encoded = [key.encode("utf-8", "surrogateescape") for key in self.keys]
        self.source.check_width(map(len, encoded), len(encoded))
        keys = np.array(encoded)
        return Tables(
            "plain",
            tuple(column.field for column in columns),
            (self.source.shard(lengths, keys),),
            lengths,
            keys,
            np.stack([column.places for column in columns], 1).astype("<i8"),
            np.stack([column.sizes for column in columns], 1).astype("<i8"),
            np.stack([column.crcs for column in columns], 1).astype("<u4") if self.source.checksums else None,
        )

    def _variable_arrays(self, members: Members, context: str) -> list[str]:
        # What counts when the caller does not say: the first sample's arrays with an axis.
        names = [
            field_of(suffix)[0]
            for suffix, member in members.items()
            if field_of(suffix)[1] == "npy" and self.source.array_header(member, context).shape
        ]
        if not names:
            raise ValueError(
                f"{context}: none of {sorted(members)} is a .npy array with an axis: name the fields whose lengths "
                "count, and give length= to measure other encodings"
            )
        return names

    def _new_column(self, suffix: str, context: str) -> _PlainColumn:
        refuse_pickle(suffix, context)
        name = field_of(suffix)[0]
        if name == "__key__":
            raise ValueError(f"{context}: a field cannot be called {name!r}: rename {suffix!r}")
        if any(column.field.name == name for column in self.columns.values()):
            raise ValueError(f"{context}: field {name!r} comes in two encodings: rename one")
        tracked = name in (self.tracked or ())
        self.columns[suffix] = _PlainColumn(Field(name, suffix, variable=tracked, tracked=tracked))
        return self.columns[suffix]

    def _length(self, column: _PlainColumn, member: Member, key: str) -> int:
        if not column.field.is_array:
            return self._ask(column.field.name, member, key) if column.field.tracked else 0
        header = header_of(member.head)
        told = (column.field.suffix, member.size, header)
        steps = self.known.get(told)
        if steps is None:
            if len(self.known) == _KNOWN:
                self.known.clear()
            steps = self._measure(column, member, key)
            # A header that goes on behind the first bytes is not told by them.
            if len(header) < len(member.head) or member.size == len(member.head):
                self.known[told] = steps
        return steps

    def _measure(self, column: _PlainColumn, member: Member, key: str) -> int:
        # Arrays whose length does not count are held against their size all the same.
        field = column.field
        context = f"{self.source.context(key)}, field {field.name!r}"
        header = self.source.array_header(member, context)
        if not field.tracked:
            return 0
        if not header.shape:
            raise ValueError(f"{context}: a number has no length: leave the field out of those whose lengths count")
        if not field.dtype:
            field = column.field = replace(field, dtype=header.dtype.str, shape=header.shape[1:])
        if (header.dtype.str, header.shape[1:]) != (field.dtype, field.shape):
            raise ValueError(
                f"{context}: {header.dtype} with features {list(header.shape[1:])}, earlier samples have "
                f"{field.dtype} with features {list(field.shape)}: a field is of one kind"
            )
        return check_longest(header.shape[0], context)

    def _ask(self, name: str, member: Member, key: str) -> int:
        context = f"{self.source.context(key)}, field {name!r}"
        if self.length is None:
            raise ValueError(f"{context}: not a .npy array: give length=, a function (field, bytes) -> steps")
        try:
            steps = self.length(name, self.source.content(member))
        except Exception as error:
            error.add_note(f"length= was asked for {context}")
            raise
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
            raise LengthError(f"{context}: length= must give a non-negative int, got {steps!r}")
        return check_longest(int(steps), context)


def fits_table(width: int, count: int, size: int) -> bool:
    """Whether the keys of a shard of so many bytes make no table that is far greater.

    Args:
        width: bytes of the longest key.
        count: samples.
        size: bytes of the shard.
    """
    return width * count <= size * _TABLE + (1 << 20)


def header_of(head: bytes) -> bytes:
    """All of an array's header that the first bytes of its file hold."""
    # Not a byte of the payload, or hardly any would recur.
    _, end = find_array_header(head)
    return head[:end]


def check_longest(steps: int, context: str) -> int:
    """Pass a length on.

    Raises:
        LengthError: It does not fit the tables' 32 bits.
    """
    if steps > LONGEST:
        raise LengthError(f"{context}: {steps} steps, at most {LONGEST} are possible: cut the sequence")
    return steps


def _stack(blocks: list[_Block], name: str) -> Array:
    return np.concatenate([np.stack([getattr(column, name) for column in block.columns], 1) for block in blocks])


def _crcs(data: bytes, starts: Array, ends: Array) -> list[int]:
    view = memoryview(data)
    return [crc32(view[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def _refuse_duplicates(keys: Array, path: str) -> None:
    values, counts = np.unique(keys, return_counts=True)
    if counts.max() > 1:
        key = values[counts.argmax()].decode("utf-8", "surrogateescape")
        raise ValueError(f"{path}: the key {key!r} comes {counts.max()} times")


def _describe_block(block: _Block) -> str:
    return str({field.name: (field.dtype, list(field.shape), field.variable) for field in block.fields})
