"""Scan shards of the layout `"blocks"`: keys and lengths stand in members of their own, one read for each block.

The offset of a sample's first value follows from the lengths. In a block with the lengths 3, 1 and 2 of an int32 field,
whose `tokens.npy` starts at offset 1536 with a header of 128 bytes:

>>> lengths, row_bytes = np.array([3, 1, 2]), 4
>>> ends = 128 + np.cumsum(lengths) * row_bytes
>>> (1536 + ends - lengths * row_bytes).tolist()
[1664, 1676, 1680]
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from samplers.shards.format.block_keys import KEYS, read_block_keys
from samplers.shards.format.keys import decode_key
from samplers.shards.format.npy import DTYPES, AnyArray, decode_npy
from samplers.shards.format.samples import check_block_lengths, split_block
from samplers.shards.indexing.shard_groups import Members, ShardGroups, check_stored_length
from samplers.shards.indexing.tables import Field, Tables
from samplers.shards.storage.checksum import crc32
from samplers.shards.storage.network.failures import shown


@dataclass
class _BlockColumn:
    """A field of a block of n samples.

    Attributes:
        field: The field.
        lengths: `[n]`. None for a field of fixed size.
        offsets: `[n]`, offset of each sample's first value in the shard.
        crcs: crc32 of each sample's bytes. Empty without checksums.
        members: Offsets of the member, and of its lengths if the field is variable.
    """

    field: Field
    lengths: AnyArray | None
    offsets: AnyArray
    crcs: list[int]
    members: tuple[int, ...]


@dataclass
class _Block:
    """A block: its keys as bytes `[n]`, and its fields."""

    keys: AnyArray
    columns: list[_BlockColumn]

    @property
    def fields(self) -> tuple[Field, ...]:
        return tuple(column.field for column in self.columns)

    @property
    def lengths(self) -> AnyArray:
        return np.stack([column.lengths for column in self.columns if column.lengths is not None], 1)

    @property
    def members(self) -> list[int]:
        """Offsets of the fields' members, then of their lengths."""
        return [c.members[0] for c in self.columns] + [c.members[1] for c in self.columns if c.field.variable]


def scan_blocks(groups: ShardGroups, pairs: Iterable[tuple[str, Members]], fields: Collection[str] | None) -> Tables:
    """The tables of a shard of blocks.

    Args:
        groups: The shard.
        pairs: Its groups, key and members.
        fields: Fields whose lengths count. None for all of variable length.

    Raises:
        LengthError: A block's lengths do not fit its steps.
        ValueError: A block is damaged, a key comes twice, or blocks differ in their fields.
    """
    blocks: list[_Block] = []
    for key, members in pairs:
        context = groups.context(key)
        if KEYS not in members:
            raise ValueError(f"{context}: a single sample among blocks: a shard holds one layout")
        blocks.append(_read_block(groups, members, fields, context))
        if blocks[-1].fields != blocks[0].fields:
            raise ValueError(
                f"{context}: fields {_describe_block(blocks[-1])}, in the first block {_describe_block(blocks[0])}"
            )
    # Before the keys are joined: one long key would widen all of them.
    groups.check_key_width([block.keys.dtype.itemsize for block in blocks], sum(len(block.keys) for block in blocks))
    keys = np.concatenate([block.keys for block in blocks])
    _refuse_duplicates(keys, groups.file.path)
    lengths = np.concatenate([block.lengths for block in blocks]).astype("<i4")
    # Blocks of 3, 2 and 4 samples start at 0, 3 and 5.
    starts = np.cumsum([0, *(len(block.keys) for block in blocks)])[:-1]
    return Tables(
        "blocks",
        blocks[0].fields,
        (groups.shard(lengths, keys),),
        lengths,
        keys,
        _stack(blocks, "offsets").astype("<i8"),
        crcs=_stack(blocks, "crcs").astype("<u4") if groups.checksums else None,
        blocks=np.column_stack([starts, [block.members for block in blocks]]).astype("<i8"),
    )


def _read_block(groups: ShardGroups, members: Members, fields: Collection[str] | None, context: str) -> _Block:
    """Read the keys, lengths and headers of a block.

    Raises:
        ValueError: It has no sample, or a field whose lengths count has none.
    """
    variable = split_block(members, context)
    keys = read_block_keys(
        groups.digested_content(members[KEYS]), partial(_count_samples, groups, members, variable, context), context
    )
    tracked = [name for name in variable if variable[name]] if fields is None else list(fields)
    if not tracked or not len(keys) or any(not variable.get(name) for name in tracked):
        raise ValueError(
            f"{context}: {len(keys)} samples, variable-length fields {[name for name in variable if variable[name]]}, "
            f"wanted {tracked}: a block needs a sample, and each field that counts a member FIELD.lengths.npy"
        )
    columns = [
        _read_column(
            groups, members, keys, Field(name, f"{name}.npy", varies, tracked=name in tracked), context=context
        )
        for name, varies in variable.items()
    ]
    # Before the table is made: one long key would widen all of them.
    width = max(map(len, keys))
    groups.check_key_width([width], len(keys))
    return _Block(np.array(keys, f"S{max(width, 1)}"), columns)


def _count_samples(groups: ShardGroups, members: Members, variable: dict[str, bool], context: str) -> int:
    """The samples of a block, as the lengths of a field say. 0 if no field has any."""
    names = [f"{name}.lengths.npy" for name, varies in variable.items() if varies]
    shapes = [groups.npy_header(members[name], f"{context}: {name}").shape for name in names[:1]]
    # Of two axes, the second might be 0, and the first then anything.
    return shapes[0][0] if shapes and len(shapes[0]) == 1 else 0


def _read_column(
    groups: ShardGroups, members: Members, keys: list[bytes], field: Field, *, context: str
) -> _BlockColumn:
    """Read the header and the lengths of a field of a block.

    Raises:
        ValueError: The array cannot be sliced into samples, or does not fit the keys.
    """
    context = f"{context}, field {field.name!r}"
    member = members[field.suffix]
    header = groups.npy_header(member, context)
    if header.dtype.str not in DTYPES or not header.shape or header.fortran:
        raise ValueError(f"{context}: a block's arrays are little-endian, row-major and have an axis, got {header}")
    member_offsets: tuple[int, ...] = (member.data,)
    lengths = None
    if field.variable:
        lengths_member = members[f"{field.name}.lengths.npy"]
        member_offsets += (lengths_member.data,)
        lengths = decode_npy(groups.digested_content(lengths_member), f"{context} (lengths)")
        lengths = check_block_lengths(lengths, keys, header.shape[0], context)
        check_stored_length(int(lengths.max()), context)
    elif header.shape[0] != len(keys):
        raise ValueError(f"{context}: {len(keys)} keys, but an array of shape {list(header.shape)}")
    field = replace(field, dtype=header.dtype.str, shape=header.shape[1:])
    # A sample of a field of fixed size is one row.
    rows = np.ones(len(keys), np.int64) if lengths is None else lengths
    ends = np.cumsum(rows) * field.row_bytes + header.size
    starts = ends - rows * field.row_bytes
    crcs = _slice_crcs(groups.content(member), starts, ends) if groups.checksums else []
    return _BlockColumn(field, lengths, starts + member.data, crcs, member_offsets)


def _stack(blocks: list[_Block], name: str) -> AnyArray:
    """An attribute of all columns of all blocks, `[N, M]`."""
    return np.concatenate([np.stack([getattr(column, name) for column in block.columns], 1) for block in blocks])


def _slice_crcs(data: bytes, starts: AnyArray, ends: AnyArray) -> list[int]:
    """crc32 of each slice."""
    # Slices of bytes would copy them.
    view = memoryview(data)
    return [crc32(view[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def _refuse_duplicates(keys: AnyArray, path: str) -> None:
    values, counts = np.unique(keys, return_counts=True)
    if counts.max() > 1:
        raise ValueError(f"{shown(path)}: the key {decode_key(values[counts.argmax()])!r} comes {counts.max()} times")


def _describe_block(block: _Block) -> str:
    """The fields of a block, as text."""
    return str({field.name: (field.dtype, list(field.shape), field.variable) for field in block.fields})
