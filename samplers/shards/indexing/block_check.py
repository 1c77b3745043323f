"""A block held against the index: what its headers and lengths say, before any sample of it is read."""

from typing import Final, TypeAlias

import numpy as np

from collate.errors import LengthError
from samplers.shards.format.samples import read_array_header
from samplers.shards.indexing.index import decode_key
from samplers.shards.indexing.index_file import REBUILD
from samplers.shards.indexing.tables import Array, Field, Tables
from samplers.shards.storage.reading import RandomAccess

# Fields to read, by column and column of lengths.
ReadColumns: TypeAlias = list[tuple[int, Field, int]]

# A longer header of an array would be a hoax.
_LONGEST_HEADER: Final = 1 << 16


def check_block(file: RandomAccess, tables: Tables, members: list[int], rows: slice, columns: ReadColumns) -> None:
    """Hold what a block says of itself against the index.

    Args:
        file: the shard.
        tables: of the corpus.
        members: offsets of the block's fields, then of their lengths.
        rows: the block's samples.
        columns: the fields that are read.

    Raises:
        LengthError: The length of a sample differs.
        ValueError: A dtype, feature shape or place differs.
    """
    if max(members) > file.size:
        raise ValueError(f"{file.path}: the index says that a member is not within the shard: {REBUILD}")
    for column, field, measure in columns:
        steps = np.ones(rows.stop - rows.start, np.int64)
        if field.variable:
            steps = tables.lengths[rows, measure].astype(np.int64)
            _hold_lengths(file, members[len(tables.fields) + measure], steps, tables.keys[rows], field)
        context = f"{file.path}: block of sample {decode_key(tables.keys[rows.start])!r}, field {field.name!r}"
        header = read_array_header(file.read(members[column], _LONGEST_HEADER), context)
        starts = members[column] + header.size + (np.cumsum(steps) - steps) * field.row_bytes
        moved = " at another" if (starts != tables.places[rows, column]).any() else ""
        expected = (field.dtype, (int(steps.sum()), *field.shape), False)
        if moved or (header.dtype.str, header.shape, header.fortran) != expected:
            raise ValueError(
                f"{context}: holds {header.dtype.str} {list(header.shape)} at offset {members[column]}, the index says "
                f"{expected[0]} {list(expected[1])}{moved}: {REBUILD}"
            )
        # Before room is made for it.
        end = members[column] + header.size + header.nbytes
        if end > file.size:
            raise ValueError(f"{context}: should end at byte {end}, the file has {file.size}: truncated")


def _hold_lengths(file: RandomAccess, offset: int, steps: Array, keys: Array, field: Field) -> None:
    context = f"{file.path}: block of sample {decode_key(keys[0])!r}, field {field.name!r}"
    content = file.read(offset, _LONGEST_HEADER + steps.nbytes)
    header = read_array_header(content, context)
    if header.shape != steps.shape or header.dtype.kind not in "iu" or len(content) < header.size + header.nbytes:
        raise ValueError(f"{context}: the index says {len(steps)} samples, the block has lengths {header}: {REBUILD}")
    stored: Array = np.ndarray(header.shape, header.dtype, content, header.size)
    odd = np.flatnonzero(stored != steps)
    if len(odd):
        raise LengthError(
            f"{file.path}: sample {decode_key(keys[odd[0]])!r}, field {field.name!r}: the index says {steps[odd[0]]} "
            f"steps, the shard {stored[odd[0]]}: {REBUILD}"
        )
