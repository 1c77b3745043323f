"""What a shard holds, found from headers alone: the length, the place and the checksum of each sample's fields."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from typing import Any, Final, TypeAlias
from zlib import crc32

import numpy as np
import numpy.typing as npt

from collate.errors import LengthError
from samplers.shards.files import RandomAccess, open_file
from samplers.shards.format import (
    DTYPES,
    KEYS,
    ArrayHeader,
    check_array_size,
    check_block_lengths,
    decode_array,
    decode_keys,
    field_of,
    read_array_header,
    refuse_pickle,
    split_block,
)
from samplers.shards.tables import Field, Shard, Tables
from samplers.shards.tar import Member, read_members, split_name

Array: TypeAlias = npt.NDArray[Any]
LengthOf: TypeAlias = Callable[[str, bytes], int]
Members: TypeAlias = dict[str, Member]

LONGEST: Final = np.iinfo(np.int32).max
# A longer header of an array would be a hoax.
_LONGEST_HEADER: Final = 1 << 16


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
                raise ValueError(f"{self.where(key)}: two members {suffix!r}")
            members[suffix], last = member, key
        if last is not None:
            yield last, members

    def where(self, key: str) -> str:
        return f"{self.file.path}: group {key!r}"

    def array_header(self, member: Member, where: str) -> ArrayHeader:
        head = member.head
        try:
            header = read_array_header(head, where)
        except ValueError:
            if member.size <= len(head):
                raise
            header = read_array_header(self.file.read(member.data, min(member.size, _LONGEST_HEADER)), where)
        check_array_size(header, member.size, where)
        return header

    def content(self, member: Member) -> bytes:
        return self.file.read(member.data, member.size)

    def digested(self, member: Member) -> bytes:
        """What a member holds, made part of the digest."""
        data = self.content(member)
        self._digest.update(data[len(member.head) :])
        return data

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
        where = source.where(key)
        if KEYS not in members:
            raise ValueError(f"{where}: a single sample among blocks: a shard holds one layout")
        blocks.append(_read_block(source, members, fields, where))
        if blocks[-1].fields != blocks[0].fields:
            raise ValueError(f"{where}: fields {_describe(blocks[-1])}, in the first block {_describe(blocks[0])}")
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


def _read_block(source: _Source, members: Members, fields: Collection[str] | None, where: str) -> _Block:
    keys = decode_keys(source.digested(members[KEYS]), where)
    variable = split_block(members, where)
    tracked = [name for name in variable if variable[name]] if fields is None else list(fields)
    odd = [name for name in tracked if not variable.get(name)]
    if odd or not tracked or not len(keys):
        raise ValueError(
            f"{where}: {len(keys)} samples, variable-length fields {[name for name in variable if variable[name]]}, "
            f"wanted {tracked}: a block needs a sample, and each field that counts a member FIELD.lengths.npy"
        )
    columns = [
        _read_column(source, members, keys, Field(name, f"{name}.npy", varies, tracked=name in tracked), where)
        for name, varies in variable.items()
    ]
    return _Block(np.strings.encode(keys, "utf-8", "surrogateescape"), columns)


def _read_column(source: _Source, members: Members, keys: Array, field: Field, where: str) -> _BlockColumn:
    where = f"{where}, field {field.name!r}"
    member = members[field.suffix]
    header = source.array_header(member, where)
    if header.dtype.str not in DTYPES or not header.shape or header.fortran:
        raise ValueError(f"{where}: a block's arrays are little-endian, row-major and have an axis, got {header}")
    offsets: tuple[int, ...] = (member.data,)
    lengths = None
    if field.variable:
        declared = members[f"{field.name}.lengths.npy"]
        offsets += (declared.data,)
        lengths = decode_array(source.digested(declared), f"{where} (lengths)")
        lengths = check_block_lengths(lengths, keys, header.shape[0], where)
        check_longest(int(lengths.max()), where)
    elif header.shape[0] != len(keys):
        raise ValueError(f"{where}: {len(keys)} keys, but an array of shape {list(header.shape)}")
    field = replace(field, dtype=header.dtype.str, shape=header.shape[1:])
    steps = np.ones(len(keys), np.int64) if lengths is None else lengths
    ends = np.cumsum(steps) * field.row_bytes + header.size
    starts = ends - steps * field.row_bytes
    crcs = _crcs(source.content(member), starts, ends) if source.checksums else []
    return _BlockColumn(field, lengths, starts + member.data, crcs, offsets)


class _PlainScan:
    """A shard of one sample a group, read group by group."""

    def __init__(self, source: _Source, fields: Collection[str] | None, length: LengthOf | None) -> None:
        self.source, self.length = source, length
        self.tracked = None if fields is None else list(fields)
        self.keys: dict[str, None] = {}
        self.lengths: list[list[int]] = []
        # Of each sample, by suffix: place, size and checksum.
        self.rows: list[dict[str, tuple[int, int, int]]] = []
        self.fields: dict[str, Field] = {}

    def add(self, key: str, members: Members) -> None:
        where = self.source.where(key)
        if KEYS in members or key in self.keys:
            raise ValueError(f"{where}: {'a block among single samples' if KEYS in members else 'the key comes twice'}")
        if self.tracked is None:
            self.tracked = self._variable_arrays(members, where)
        self.keys[key] = None
        lengths = {}
        for suffix, member in members.items():
            field = self._field(suffix, where)
            steps = self._measure(field, member, f"{where}, field {field.name!r}")
            if field.tracked:
                lengths[field.name] = steps
        missing = [name for name in self.tracked if name not in lengths]
        if missing:
            raise ValueError(
                f"{where}: no field {missing[0]!r}, there are {[field_of(suffix)[0] for suffix in members]}"
            )
        self.lengths.append([lengths[name] for name in self.tracked])
        self.rows.append({suffix: (m.data, m.size, self._crc(m)) for suffix, m in members.items()})

    def tables(self) -> Tables:
        """All that was added."""
        absent = (0, 0, 0)
        rows = np.array([[row.get(suffix, absent) for suffix in self.fields] for row in self.rows], np.int64)
        fields = tuple(self.fields.values())
        tracked = [field.name for field in fields if field.tracked]
        order = [(self.tracked or []).index(name) for name in tracked]
        lengths = np.array(self.lengths, "<i4")[:, order]
        keys = np.array([key.encode("utf-8", "surrogateescape") for key in self.keys])
        crcs = rows[..., 2].astype("<u4") if self.source.checksums else None
        shard = self.source.shard(lengths, keys)
        return Tables("plain", fields, (shard,), lengths, keys, rows[..., 0], rows[..., 1], crcs)

    def _variable_arrays(self, members: Members, where: str) -> list[str]:
        # What counts when the caller does not say: the first sample's arrays with an axis.
        names = [
            field_of(suffix)[0]
            for suffix, member in members.items()
            if field_of(suffix)[1] == "npy" and self.source.array_header(member, where).shape
        ]
        if not names:
            raise ValueError(
                f"{where}: none of {sorted(members)} is a .npy array with an axis: name the fields whose lengths "
                "count, and give length= to measure other encodings"
            )
        return names

    def _field(self, suffix: str, where: str) -> Field:
        if suffix not in self.fields:
            refuse_pickle(suffix, where)
            name = field_of(suffix)[0]
            if any(field.name == name for field in self.fields.values()):
                raise ValueError(f"{where}: field {name!r} comes in two encodings: rename one")
            tracked = name in (self.tracked or ())
            self.fields[suffix] = Field(name, suffix, variable=tracked, tracked=tracked)
        return self.fields[suffix]

    def _measure(self, field: Field, member: Member, where: str) -> int:
        if field_of(field.suffix)[1] != "npy":
            return self._ask(field.name, member, where) if field.tracked else 0
        header = self.source.array_header(member, where)
        if not field.tracked:
            return 0
        if not header.shape:
            raise ValueError(f"{where}: a number has no length: leave the field out of those whose lengths count")
        if not field.dtype:
            field = replace(field, dtype=header.dtype.str, shape=header.shape[1:])
            self.fields[field.suffix] = field
        if (header.dtype.str, header.shape[1:]) != (field.dtype, field.shape):
            raise ValueError(
                f"{where}: {header.dtype} with features {list(header.shape[1:])}, earlier samples have "
                f"{field.dtype} with features {list(field.shape)}: a field is of one kind"
            )
        return check_longest(header.shape[0], where)

    def _ask(self, name: str, member: Member, where: str) -> int:
        if self.length is None:
            raise ValueError(f"{where}: not a .npy array: give length=, a function (field, bytes) -> steps")
        steps = self.length(name, self.source.content(member))
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
            raise LengthError(f"{where}: length= must give a non-negative int, got {steps!r}")
        return check_longest(int(steps), where)

    def _crc(self, member: Member) -> int:
        return crc32(self.source.content(member)) if self.source.checksums else 0


def check_longest(steps: int, where: str) -> int:
    """Pass a length on.

    Raises:
        LengthError: It does not fit the tables' 32 bits.
    """
    if steps > LONGEST:
        raise LengthError(f"{where}: {steps} steps, at most {LONGEST} are possible: cut the sequence")
    return steps


def _stack(blocks: list[_Block], name: str) -> Array:
    return np.concatenate([np.stack([getattr(column, name) for column in block.columns], 1) for block in blocks])


def _crcs(data: bytes, starts: Array, ends: Array) -> list[int]:
    view = memoryview(data)
    return [crc32(view[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def _refuse_duplicates(keys: Array, path: str) -> None:
    values, counts = np.unique(keys, return_counts=True)
    if counts.max() > 1:
        raise ValueError(f"{path}: the key {values[counts.argmax()].decode()!r} comes {counts.max()} times")


def _describe(block: _Block) -> str:
    return str({field.name: (field.dtype, list(field.shape), field.variable) for field in block.fields})
