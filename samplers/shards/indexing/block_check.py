"""Compare a block with the index before any of its samples is read: its headers, lengths and offsets."""

from typing import TypeAlias

import numpy as np

from samplers.shards.format.keys import decode_key
from samplers.shards.format.npy import LONGEST_HEADER, AnyArray, read_npy_header
from samplers.shards.indexing.index_file import REBUILD
from samplers.shards.indexing.tables import Field, Tables
from samplers.shards.indexing.verify import refuse_wrong_length
from samplers.shards.storage.reading import RandomAccess

# Fields to read: column in the tables, field, and column of its lengths (-1 for a field of fixed size).
ReadColumns: TypeAlias = list[tuple[int, Field, int]]


def check_block(file: RandomAccess, tables: Tables, block: int, columns: ReadColumns) -> None:
    """Compare a block with the index.

    Args:
        file: The shard.
        tables: Tables of the corpus, with blocks.
        block: Index of the block.
        columns: Fields to read.

    Raises:
        LengthError: The length of a sample differs.
        ValueError: A dtype, feature shape or offset differs.
    """
    rows, members = _block_entry(tables, block)
    if max(members) > file.size:
        raise ValueError(f"{file.path}: the index says that a member is not within the shard: {REBUILD}")
    for column, field, length_column in columns:
        steps = np.ones(rows.stop - rows.start, np.int64)
        if field.variable:
            steps = tables.lengths[rows, length_column].astype(np.int64)
            _check_lengths(file, members[len(tables.fields) + length_column], steps, tables.keys[rows], field)
        context = f"{file.path}: block of sample {decode_key(tables.keys[rows.start])!r}, field {field.name!r}"
        header = read_npy_header(file.read(members[column], LONGEST_HEADER), context)
        starts = members[column] + header.size + (np.cumsum(steps) - steps) * field.row_bytes
        moved = " at another offset" if (starts != tables.offsets[rows, column]).any() else ""
        expected = (field.dtype, (int(steps.sum()), *field.shape), False)
        if moved or (header.dtype.str, header.shape, header.fortran) != expected:
            raise ValueError(
                f"{context}: holds {header.dtype.str} {list(header.shape)} at offset {members[column]}, the index says "
                f"{expected[0]} {list(expected[1])}{moved}: {REBUILD}"
            )
        # Before memory is allocated for its samples.
        end = members[column] + header.size + header.nbytes
        if end > file.size:
            raise ValueError(f"{context}: should end at byte {end}, the file has {file.size}: truncated")


def _block_entry(tables: Tables, block: int) -> tuple[slice, list[int]]:
    """The rows of a block in the tables, and the offsets of its members.

    Raises:
        ValueError: The layout has no blocks.
    """
    blocks = tables.blocks
    if blocks is None:
        raise ValueError(f'a shard of the layout "{tables.layout}" has no blocks')
    first, *members = blocks[block].tolist()
    last = int(blocks[block + 1, 0]) if block + 1 < len(blocks) else len(tables.keys)
    return slice(first, last), members


def _check_lengths(file: RandomAccess, offset: int, steps: AnyArray, keys: AnyArray, field: Field) -> None:
    """Compare the lengths of a block with the index.

    Raises:
        ValueError: They are not integers, one for each sample.
    """
    context = f"{file.path}: block of sample {decode_key(keys[0])!r}, field {field.name!r}"
    content = file.read(offset, LONGEST_HEADER + steps.nbytes)
    header = read_npy_header(content, context)
    if header.shape != steps.shape or header.dtype.kind not in "iu" or len(content) < header.size + header.nbytes:
        raise ValueError(f"{context}: the index says {len(steps)} samples, the block has lengths {header}: {REBUILD}")
    stored: AnyArray = np.ndarray(header.shape, header.dtype, content, header.size)
    refuse_wrong_length(file.path, keys, field, steps, stored)
