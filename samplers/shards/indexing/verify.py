"""Compare an index with its shards: headers, lengths and, with checksums, every byte of the payloads.

`check_shard` scans a whole shard. `check_block` reads the headers of one block, before a dataset reads its samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final, TypeAlias, overload

import numpy as np

from collate.errors import LengthError
from samplers.shards.format.header_lengths import header_length_of
from samplers.shards.format.keys import decode_key
from samplers.shards.format.npy import LONGEST_HEADER, AnyArray, NpyHeader, read_npy_header
from samplers.shards.indexing.index_file import REBUILD
from samplers.shards.indexing.measuring import Measure
from samplers.shards.indexing.scan import scan_shard
from samplers.shards.indexing.tables import Field, Tables
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.network.transport import DEFAULT, Transport
from samplers.shards.storage.process_pool import run_in_processes
from samplers.shards.storage.reading import RandomAccess, is_remote, open_file

# Fields to read: column in the tables, field, and column of its lengths (-1 for a field of fixed size).
ReadColumns: TypeAlias = list[tuple[int, Field, int]]

# Bytes that hold nearly every header of an array: NumPy and `ShardWriter` write 128.
_USUAL_HEADER: Final = 512


def complete_measure(tables: Tables, measure: Measure) -> Measure:
    """A measure that also reads the headers from which the index has its lengths."""
    return replace(measure, header=header_length_of(tables.length_id))


def check_shard(tables: Tables, measure: Measure, *, checksums: bool, transport: Transport = DEFAULT) -> None:
    """Compare the tables of one shard with the shard.

    Args:
        tables: Tables of one shard.
        measure: Measures the lengths that no header has.
        checksums: Read payloads, and compare their crc32.
        transport: How a remote shard is read. What does not fit is read once more before it is an error.

    Raises:
        FileNotFoundError: The shard is absent.
        LengthError: The length of a sample differs. The message has shard, key, field and both lengths.
        ValueError: The shard has changed since it was indexed, or is damaged.
    """
    try:
        _check_shard(tables, measure, checksums=checksums, transport=transport)
    except ValueError:
        if not is_remote(tables.shards[0].path):
            raise
        # A network may have damaged it.
        _check_shard(tables, measure, checksums=checksums, transport=transport)


def _check_shard(tables: Tables, measure: Measure, *, checksums: bool, transport: Transport) -> None:
    """Compare the tables of one shard with the shard, see `check_shard`.

    Raises:
        ValueError: They differ.
    """
    [shard] = tables.shards
    size = open_file(shard.path, transport=transport).size
    changed = f"{shown(shard.path)}: changed since it was indexed"
    if size != shard.size:
        raise ValueError(f"{changed}: {size} bytes, the index says {shard.size}; {REBUILD}")
    fields = [field.name for field in tables.variable if field.tracked]
    scanned = scan_shard(shard.path, fields, measure, checksums=checksums, transport=transport)
    if (scanned.layout, scanned.fields, scanned.keys.tolist()) != (tables.layout, tables.fields, tables.keys.tolist()):
        raise ValueError(f"{changed}: its layout, fields or keys are others; {REBUILD}")
    for column, field in enumerate(scanned.variable):
        if field.is_array or measure.measures(field.name):
            indexed, stored = tables.lengths[:, column], scanned.lengths[:, column]
            refuse_wrong_length(shard.path, tables.array("keys"), field, indexed=indexed, stored=stored)
    if scanned.crcs is not None and tables.crcs is not None:
        _compare_crcs(scanned, tables.crcs)
    # Last, because the checks above have better messages.
    if scanned.shards[0].digest != shard.digest:
        raise ValueError(f"{changed}: its headers are others; {REBUILD}")


def refuse_wrong_length(path: str, keys: AnyArray, field: Field, *, indexed: AnyArray, stored: AnyArray) -> None:
    """Compare lengths `[n]` in the index with those in the shard.

    Raises:
        LengthError: One differs.
    """
    rows = np.flatnonzero(indexed != stored)
    if len(rows):
        row = rows[0]
        raise LengthError(
            f"{shown(path)}: sample {decode_key(keys[row])!r}, field {field.name!r}: the index says {indexed[row]} "
            f"steps, the shard {stored[row]}; {REBUILD}"
        )


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
    # A damaged index must not cause a read far behind the end.
    if max(members) > file.size:
        raise ValueError(f"{shown(file.path)}: the index says that a member is not within the shard: {REBUILD}")
    for column, field, length_column in columns:
        steps = np.ones(rows.stop - rows.start, np.int64)
        if field.variable:
            steps = tables.lengths[rows, length_column].astype(np.int64)
            offset = members[len(tables.fields) + length_column]
            _check_block_lengths(file, offset, steps=steps, keys=tables.keys[rows], field=field)
        context = f"{shown(file.path)}: block of sample {decode_key(tables.keys[rows.start])!r}, field {field.name!r}"
        _, header = _read_array(file, members[column], 0, context)
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


def find_headers(tables: Tables, block: int, columns: ReadColumns) -> Iterator[tuple[int, int]]:
    """Where the parts of a block lie that `check_block` reads.

    Yields:
        Offset and bytes.
    """
    rows, members = _block_entry(tables, block)
    for column, field, length_column in columns:
        yield members[column], _USUAL_HEADER
        if field.variable:
            yield members[len(tables.fields) + length_column], _USUAL_HEADER + 8 * (rows.stop - rows.start)


def _read_array(file: RandomAccess, offset: int, size: int, context: str) -> tuple[bytes, NpyHeader]:
    """The header of an array, and at least `size` bytes behind it, if the file has them.

    Raises:
        ValueError: It is no array of plain numbers.
    """
    content = file.read(offset, _USUAL_HEADER + size)
    try:
        return content, read_npy_header(content, context)
    except ValueError:
        content = file.read(offset, LONGEST_HEADER + size)
        return content, read_npy_header(content, context)


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


def _check_block_lengths(file: RandomAccess, offset: int, *, steps: AnyArray, keys: AnyArray, field: Field) -> None:
    """Compare the lengths of a block with the index.

    Raises:
        ValueError: They are not integers, one for each sample.
    """
    context = f"{shown(file.path)}: block of sample {decode_key(keys[0])!r}, field {field.name!r}"
    content, header = _read_array(file, offset, steps.nbytes, context)
    if header.shape != steps.shape or header.dtype.kind not in "iu" or len(content) < header.size + header.nbytes:
        raise ValueError(f"{context}: the index says {len(steps)} samples, the block has lengths {header}: {REBUILD}")
    stored: AnyArray = np.ndarray(header.shape, header.dtype, content, header.size)
    refuse_wrong_length(file.path, keys, field, indexed=steps, stored=stored)


def check_request(tables: Tables, measure: Measure, *, checksums: bool) -> None:
    """Refuse a verification that this index does not allow.

    Raises:
        ValueError: Payloads are to be checked, and the index has no checksums. Or a decoder is given for a field whose
            length needs no measuring.
    """
    unknown = sorted(set(measure.decode) - set(tables.measured))
    if unknown:
        raise ValueError(f"decode names {unknown[0]!r}, and a function measures the lengths of {tables.measured} alone")
    if checksums and tables.crcs is None:
        raise ValueError(
            "the index holds no checksums of payloads: build it with checksums=True, or `lengthtrack index --checksums`"
        )


def find_errors(
    tables: Tables,
    *,
    checksums: bool,
    measure: Measure | None = None,
    workers: int = 0,
    transport: Transport = DEFAULT,
) -> Iterator[str | None]:
    """Compare every shard with the index, and continue after an error.

    Args:
        tables: Tables of the index.
        checksums: Read payloads, and compare their crc32.
        measure: Measures the lengths that no header has. Picklable, if there are workers.
        workers: Number of processes. 0 stays in this one.
        transport: How remote shards are read.

    Yields:
        For each shard, in order: None, or its first error.

    Raises:
        ProcessKilledError: A process was killed.
        TypeError: `workers` is not an int.
        ValueError: The index does not allow this verification, or `workers` is negative.
    """
    check = _ShardCheck(complete_measure(tables, measure or Measure()), checksums=checksums, transport=transport)
    check_request(tables, check.measure, checksums=checksums)
    # Workers finish in any order: errors of later shards wait here for those of earlier ones.
    waiting: dict[int, str | None] = {}
    number = 0
    with closing(run_in_processes(check, _TablesByShard(tables), workers, unit="shard")) as results:
        for index, error in results:
            waiting[index] = error
            while number in waiting:
                yield waiting.pop(number)
                number += 1


class _TablesByShard(Sequence[Tables]):
    """The tables of each shard, cut when they are used: all at once would be a second copy of the index."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def __len__(self) -> int:
        return len(self._tables.shards)

    @overload
    def __getitem__(self, number: int) -> Tables: ...
    @overload
    def __getitem__(self, number: slice) -> list[Tables]: ...
    def __getitem__(self, number: int | slice) -> Tables | list[Tables]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        if not 0 <= number < len(self):
            raise IndexError(f"no shard {number}, there are {len(self)}")
        return self._tables.of_shard(number)


@dataclass(frozen=True)
class _ShardCheck:
    """Finds the first error of a shard. Picklable."""

    measure: Measure
    checksums: bool
    transport: Transport

    def __call__(self, tables: Tables) -> str | None:
        try:
            check_shard(tables, self.measure, checksums=self.checksums, transport=self.transport)
        except FileNotFoundError:
            return f"{shown(tables.shards[0].path)}: the index lists this shard, but there is no such file"
        except (ValueError, OSError, RuntimeError) as error:
            # A decoder's error does not name the sample. The note that `measure` has added does.
            return ": ".join([*getattr(error, "__notes__", ()), str(error)])
        return None


def _compare_crcs(scanned: Tables, crcs: AnyArray) -> None:
    """Compare checksums `[n, M]` in the index with those of the shard.

    Raises:
        ValueError: One differs.
    """
    differing = np.argwhere(scanned.crcs != crcs)
    if len(differing):
        row, column = differing[0].tolist()
        raise ValueError(
            f"{shown(scanned.shards[0].path)}: sample {decode_key(scanned.keys[row])!r}, field "
            f"{scanned.fields[column].name!r}, at offset {scanned.offsets[row, column]}: the bytes do not have the "
            "checksum in the index: damaged or changed"
        )
