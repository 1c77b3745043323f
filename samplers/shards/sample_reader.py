"""Reads samples of a corpus by row, and checks what it reads: one by one, or a whole batch into given memory."""

import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NoReturn, TypeAlias

import numpy as np

from samplers.shards.field_value import check_length, decode_field
from samplers.shards.format.keys import decode_key
from samplers.shards.format.npy import AnyArray
from samplers.shards.format.packed_offsets import PackedOffsets
from samplers.shards.format.samples import Sample
from samplers.shards.indexing.index_file import REBUILD
from samplers.shards.indexing.measuring import Decoder
from samplers.shards.indexing.tables import Field, Tables
from samplers.shards.indexing.verify import ReadColumns, check_block, find_headers
from samplers.shards.opening.open_shards import Files, OpenShards
from samplers.shards.storage.checksum import crc32
from samplers.shards.storage.memory import ShardMemory
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.network.remote import RemoteFile, prefetch
from samplers.shards.storage.ranges import Ranges, are_scattered, read_ranges, read_scattered
from samplers.shards.storage.reading import RandomAccess, fill_again, fill_all
from samplers.shards.storage.shard_cache import CachedFile

# Memory for a field of a batch, uint8 `[bytes]`, and the first byte of each sample in it, int64 `[B]`.
Target: TypeAlias = tuple[AnyArray, AnyArray]


class SampleReader:
    """Reads samples by row. It is not shared with another process.

    Args:
        tables: Tables of the corpus.
        columns: The fields to read.
        decode: Functions from bytes, for fields in encodings of the user.
        checksums: Compare what is read with the checksums of the index, if it has any.
        shards: Opens shards.
        memory: Where whole shards are kept, from which batches are copied. None reads them for each batch.

    Attributes:
        tables: Tables of the corpus.
        columns: The fields to read.
        stored: For each of them the field, its dtype and the column of its lengths, if their values are in the shards
            as they are in memory. Else None, and samples are read one by one.
        shards: Opens shards.
        lengths: Lengths of all samples, `[N, K]`.
    """

    def __init__(
        self,
        tables: Tables,
        columns: ReadColumns,
        decode: Mapping[str, Decoder],
        *,
        checksums: bool,
        shards: OpenShards,
        memory: ShardMemory | None = None,
    ) -> None:
        self.shards, self._memory = shards, memory
        self.tables, self.columns, self._decode = tables, columns, decode
        self.stored = _stored_fields(tables, columns)
        # Plain arrays: to index a memory map takes twice as long.
        self.lengths = np.asarray(tables.lengths)
        self._offsets: Any = np.asarray(tables.offsets) if isinstance(tables.offsets, np.ndarray) else tables.offsets
        self._crcs = None if tables.crcs is None or not checksums else np.asarray(tables.crcs)
        self._checked = np.zeros(0 if tables.blocks is None else len(tables.blocks), np.bool_)
        self._all_are_checked = False
        # Samples in memory do not change. So each is compared with its checksum once.
        self._compared = None if memory is None or self._crcs is None else np.zeros(self._crcs.shape, np.bool_)
        # Row and column of what was read a second time. A damaged sample is read again only once, not for each search.
        self._read_again: set[tuple[int, int]] = set()

    def read(self, rows: AnyArray) -> list[Sample]:
        """The samples of ascending rows."""
        samples: list[Sample] = []
        for part, shards, borders in self.shards.split(rows):
            files = self.shards.open_all(shards, borders)
            more: list[Sample] = [{"__key__": decode_key(key)} for key in self.tables.keys[part].tolist()]
            if self.tables.blocks is not None:
                self._check_blocks(files, part, self.tables.blocks)
                self._read_blocks(files, part, more)
            elif self.tables.sizes is not None:
                self._read_plain(files, part, more, self.tables.sizes)
            samples += more
        return samples

    def count_bytes(self, rows: AnyArray) -> int:
        """Bytes of the fields of these rows, as they are stored."""
        total = 0
        for column, field, length_column in self.columns:
            if self.tables.sizes is not None:
                total += int(self.tables.sizes[rows, column].sum())
            else:
                steps = self.lengths[rows, length_column].sum(dtype=np.int64) if field.variable else len(rows)
                total += int(steps) * field.row_bytes
        return total

    def read_into(self, rows: AnyArray, steps: AnyArray, targets: Mapping[str, Target]) -> None:
        """Read fields of samples in blocks into the memory of a batch.

        Args:
            rows: Rows in any order, int64 `[B]`.
            steps: Their lengths in the index, int64 `[B, K]`.
            targets: For each field, where its samples go.
        """
        if self._memory is not None:
            self._copy_into(self._memory, rows, steps, targets)
            return
        if not (targets := self._read_open_into(rows, steps, targets)):
            return
        if (shard := self.shards.find_one(rows)) is not None:
            # One file is read in any order.
            self._read_part_into([(self.shards.open(shard), slice(0, len(rows)))], rows, steps, targets)
            return
        order = np.argsort(rows, kind="stable")
        done = 0
        for part, shards, borders in self.shards.split(rows[order]):
            within = order if len(part) == len(rows) else order[done : done + len(part)]
            cut = {name: (memory, starts[within]) for name, (memory, starts) in targets.items()}
            self._read_part_into(self.shards.open_all(shards, borders), part, steps[within], cut)
            done += len(part)

    def _read_open_into(self, rows: AnyArray, steps: AnyArray, targets: Mapping[str, Target]) -> Mapping[str, Target]:
        """Read scattered rows in any order, if their local shards are open and their blocks have been compared.

        This is what most batches of a local corpus come to. So nothing here is done shard by shard.

        Returns:
            The targets of fields that were not read: they are not scattered, or a read has failed without an error.

        Raises:
            ValueError: A checksum differs.
        """
        # As long as it is in use here, no other thread closes the files.
        descriptors, shards = self.shards.descriptors, self.shards.shards_of(rows)
        found = descriptors.find(shards)
        if found is None or not self._are_compared(rows):
            return targets
        left = dict(targets)
        for column, field, number in self.columns:
            offsets = self._offsets_of(rows, column) if field.name in targets else None
            if offsets is None or not are_scattered(shards, offsets):
                continue
            ranges = _make_ranges(targets[field.name], (column, field, number), offsets, steps)
            if read_scattered(found, ranges):
                # Right after the read, while the bytes are in the processor's cache.
                if damaged := self._find_damaged(ranges.views, rows, column):
                    self._refuse_damage(int(rows[damaged].min()), column)
                del left[field.name]
        return left

    def _are_compared(self, rows: AnyArray) -> bool:
        """Whether the blocks of these rows have all been compared with the index."""
        if self._all_are_checked or self.tables.blocks is None:
            return True
        if not self._checked[_blocks_of(rows, self.tables.blocks)].all():
            return False
        self._all_are_checked = bool(self._checked.all())
        return True

    def _read_part_into(self, files: Files, rows: AnyArray, steps: AnyArray, targets: Mapping[str, Target]) -> None:
        """Read rows whose shards are open."""
        if self.tables.blocks is not None:
            self._check_blocks(files, rows, self.tables.blocks)
        fields = self._ranges_of(rows, steps, targets)
        read_ranges(files, [ranges for _, ranges in fields])
        for column, ranges in fields:
            self._check_crcs(files, ranges.views, rows, column)

    def _copy_into(self, memory: ShardMemory, rows: AnyArray, steps: AnyArray, targets: Mapping[str, Target]) -> None:
        """Copy rows from memory, into which their shards are read first.

        Raises:
            ValueError: The index says that a sample is not within its shard, or a checksum differs.
        """
        shards = self.shards.shards_of(rows)
        for shard in memory.missing(shards):
            self._keep(memory, shard)
        for column, ranges in self._ranges_of(rows, steps, targets):
            ranges.check()
            if (ranges.offsets < 0).any() or (ranges.offsets + ranges.sizes > memory.sizes[shards]).any():
                raise ValueError(f"the index says that a sample is not within its shard: {REBUILD}")
            starts = ranges.offsets + memory.starts[shards]
            for view, start, end in zip(ranges.views, starts.tolist(), (starts + ranges.sizes).tolist(), strict=True):
                view[:] = memory.bytes[start:end]
            if self._compared is not None and not self._compared[rows, column].all():
                for position in self._find_damaged(ranges.views, rows, column):
                    self._refuse_damage(int(rows[position]), column)
                self._compared[rows, column] = True

    def _keep(self, memory: ShardMemory, shard: int) -> None:
        """Read a whole shard, and compare its blocks with the index. The errors are those of other reads."""
        file, within = self.shards.open(shard), np.arange(*self.tables.starts[shard : shard + 2])
        if self.tables.blocks is not None:
            self._check_blocks([(file, slice(None))], within, self.tables.blocks)
        file.fill([memory.part(shard)], [0])
        memory.note_read(shard)

    def _ranges_of(self, rows: AnyArray, steps: AnyArray, targets: Mapping[str, Target]) -> list[tuple[int, Ranges]]:
        """For each field to read: its column, where its values lie in the shards, and where they go."""
        return [
            (column, _make_ranges(targets[field.name], (column, field, number), self._offsets_of(rows, column), steps))
            for column, field, number in self.columns
            if field.name in targets
        ]

    def _offsets_of(self, rows: AnyArray, column: int) -> AnyArray:
        """The offsets of a field of each row, int64 `[n]`."""
        if isinstance(self._offsets, PackedOffsets):
            return self._offsets.at(rows, column)
        offsets: AnyArray = self._offsets[rows, column]
        return offsets

    def _read_blocks(self, files: Files, rows: AnyArray, samples: list[Sample]) -> None:
        """Read the fields of samples in blocks: slices of flat arrays."""
        steps = self.lengths[rows]
        columns = []
        for _, field, length_column in self.columns:
            shapes = [field.shape] * len(rows)
            if field.variable:
                counts = steps[:, length_column].tolist()
                shapes = [(count, *field.shape) for count in counts] if field.shape else counts
            columns.append(list(map(np.empty, shapes, repeat(np.dtype(field.dtype)))))
        self._fill(files, columns, rows)
        for (_, field, _), arrays in zip(self.columns, columns, strict=True):
            values = arrays if field.variable or field.shape else [array[()] for array in arrays]
            for sample, value in zip(samples, values, strict=True):
                sample[field.name] = value

    def _read_plain(self, files: Files, rows: AnyArray, samples: list[Sample], sizes: AnyArray) -> None:
        """Read the fields of plain samples: whole members.

        Raises:
            ValueError: A member is not within the shard.
        """
        columns = []
        for column, _, _ in self.columns:
            for file, part in files:
                starts, counts = self._offsets[rows[part], column], sizes[rows[part], column]
                if ((starts < 0) | (counts < 0) | (starts > file.size - counts)).any():
                    outside = "the index says that a member is not within the shard"
                    raise ValueError(f"{shown(file.path)}: {outside}: {REBUILD}")
            columns.append([np.empty(size, np.uint8) for size in sizes[rows, column].tolist()])
        self._fill(files, columns, rows)
        for (column, field, length_column), arrays in zip(self.columns, columns, strict=True):
            for sample, row, array in zip(samples, rows.tolist(), arrays, strict=True):
                # Offset 0: a sample may lack a field whose length does not count.
                if self._offsets[row, column]:
                    sample[field.name] = self._decode_field(field, array.tobytes(), row, length_column)

    def _fill(self, files: Files, columns: list[list[AnyArray]], rows: AnyArray) -> None:
        """Read all fields of each row into arrays, and compare checksums."""
        offsets = [self._offsets[rows, column].tolist() for column, _, _ in self.columns]
        fill_all(files, list(zip(columns, offsets, strict=True)))
        for (column, _, _), arrays in zip(self.columns, columns, strict=True):
            self._check_crcs(files, arrays, rows, column)

    def _check_crcs(self, files: Files, buffers: Sequence[Any], rows: AnyArray, column: int) -> None:
        """Compare the bytes of a field of each row with the checksums in the index.

        Raises:
            ValueError: One differs. The message names the first sample.
        """
        damaged = self._find_damaged(buffers, rows, column)
        for file, part in files if damaged else ():
            for position in range(*part.indices(len(rows))):
                row = int(rows[position])
                if position in damaged and not self._reread(file, buffers[position], row, column):
                    self._refuse_damage(row, column)

    def _find_damaged(self, buffers: Sequence[Any], rows: AnyArray, column: int) -> list[int]:
        """Positions of the buffers that do not have the checksum in the index."""
        if self._crcs is None:
            return []
        expected = self._crcs[rows, column].tolist()
        found = list(map(crc32, buffers))
        if found == expected:
            return []
        return [position for position, checksum in enumerate(found) if checksum != expected[position]]

    def _reread(self, file: RandomAccess, buffer: Any, row: int, column: int) -> bool:
        """Read a sample of a remote shard once more, since a network may damage it. False if it is still damaged."""
        if self._crcs is None or (row, column) in self._read_again:
            return False
        again = fill_again(file, buffer, int(self._offsets[row, column]))
        if again and crc32(buffer) == self._crcs[row, column]:
            return True
        self._read_again.add((row, column))
        return False

    def _refuse_damage(self, row: int, column: int) -> NoReturn:
        """Refuse a sample whose checksum differs.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self._context(row, self.tables.fields[column])}, at offset {self._offsets[row, column]}: the "
            "bytes do not have the checksum in the index: the shard is damaged or has changed"
        )

    def _decode_field(self, field: Field, data: bytes, row: int, length_column: int) -> Any:
        """The value of a plain field, with the length that the index says."""
        context = partial(self._context, row, field)
        decoder = self._decode.get(field.name)
        value = decode_field(field, data, decoder, context)
        # Bytes that stay undecoded have no length in steps.
        if field.variable and not isinstance(value, bytes):
            check_length(value, int(self.tables.lengths[row, length_column]), context, decoder)
        return value

    def _check_blocks(self, files: Files, rows: AnyArray, table: AnyArray) -> None:
        """Compare the blocks of these rows with the index, each once in this process."""
        if self._are_compared(rows):
            return
        blocks = _blocks_of(rows, table)
        unchecked = [
            (file, np.unique(blocks[part][~self._checked[blocks[part]]]).tolist())
            for file, part in files
            if not self._checked[blocks[part]].all()
        ]
        # Headers of remote shards come with one round of requests.
        prefetch((file, self._find_headers(found)) for file, found in unchecked if isinstance(file, RemoteFile))
        for file, found in unchecked:
            for block in found:
                self._check_block(file, block)
            if isinstance(file, RemoteFile):
                file.hold([])

    def _check_block(self, file: RandomAccess, block: int) -> None:
        """Compare a block with the index. One that was damaged in the cache is read again, where it came from.

        Raises:
            ValueError: It differs.
        """
        try:
            check_block(file, self.tables, block, self.columns)
        except ValueError:
            if not isinstance(file, CachedFile):
                raise
            file.drop()
            check_block(file, self.tables, block, self.columns)
        self._checked[block] = True

    def _find_headers(self, blocks: list[int]) -> list[tuple[int, int]]:
        """Offsets and sizes of what `check_block` reads."""
        return [span for block in blocks for span in find_headers(self.tables, block, self.columns)]

    def _context(self, row: int, field: Field) -> str:
        return f"{shown(self.shards.path_of(row))}: sample {decode_key(self.tables.keys[row])!r}, field {field.name!r}"


def _make_ranges(target: Target, of: tuple[int, Field, int], offsets: AnyArray, steps: AnyArray) -> Ranges:
    """Where the values of a field lie, and where they go.

    Args:
        target: Where they go.
        of: One of the columns to read.
        offsets: Where they lie, int64 `[B]`.
        steps: Lengths of all variable fields, int64 `[B, K]`.
    """
    (memory, starts), (_, field, length_column) = target, of
    counts = steps[:, length_column] if field.variable else np.ones(len(offsets), np.int64)
    return Ranges(memory, starts, offsets, counts * field.row_bytes)


def _stored_fields(tables: Tables, columns: ReadColumns) -> list[tuple[Field, np.dtype[Any], int]] | None:
    """What `SampleReader.stored` is: None in the plain layout, whose members must be decoded one by one."""
    if tables.blocks is None or sys.byteorder != "little":
        return None
    fields = [(field, np.dtype(field.dtype), length_column) for _, field, length_column in columns]
    return fields if all(dtype.isnative for _, dtype, _ in fields) else None


def _blocks_of(rows: AnyArray, table: AnyArray) -> AnyArray:
    """The block of each row, int64 `[n]`."""
    blocks: AnyArray = np.searchsorted(table[:, 0], rows, side="right") - 1
    return blocks


def select_columns(fields: Sequence[Field], chosen: Collection[str] | None, decode: Collection[str]) -> ReadColumns:
    """The columns of the fields to read.

    Raises:
        ValueError: There is no such field.
    """
    names = [field.name for field in fields]
    unknown = sorted({*(chosen or ()), *decode} - set(names))
    if unknown:
        raise ValueError(f"no field {unknown[0]!r} in the index, there are {names}")
    variable = [field.name for field in fields if field.variable]
    return [
        (column, field, variable.index(field.name) if field.variable else -1)
        for column, field in enumerate(fields)
        if chosen is None or field.name in chosen
    ]
