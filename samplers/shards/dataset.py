"""Samples by index: a map-style dataset that reads slices of shards, and checks every length against the index."""

import operator
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from errno import EMFILE, ENFILE
from functools import lru_cache, partial
from importlib import import_module
from itertools import pairwise, repeat
from typing import Any, Final, NoReturn, Self, TypeAlias, cast
from zlib import crc32

import numpy as np
from torch.utils.data import Dataset

from collate.deprecated.names import renamed_arguments
from samplers.shards.field_value import as_decoders, check_length, decode_field
from samplers.shards.format.keys import decode_key
from samplers.shards.format.npy import AnyArray
from samplers.shards.format.samples import Sample
from samplers.shards.indexing.index import LengthIndex, open_index, tables_of
from samplers.shards.indexing.index_file import REBUILD
from samplers.shards.indexing.measuring import Decoder
from samplers.shards.indexing.tables import Field
from samplers.shards.indexing.verify import ReadColumns, check_block
from samplers.shards.skipping import Failed, Handler, is_damage, make_skipping, read_apart
from samplers.shards.split_dataset import PieceCutter, PieceTable, check_range
from samplers.shards.storage.reading import RandomAccess, Shards, open_file

# Shards that a process keeps open: 128, but at most an eighth of the files that it may open, because the program opens
# other files too.
HANDLES: Final = 128
_SHARE: Final = 8
# Attributes that are not pickled.
_OF_A_PROCESS: Final = frozenset(["_tables", "_files", "_checked", "_process"])

# Open shards, and the part of a batch that is read from each.
Files: TypeAlias = list[tuple[RandomAccess, slice]]


class ShardDataset(Dataset[Sample]):
    """The samples of a corpus by index, in the order of its `LengthIndex`.

    A sample is `{"__key__": str, field: array [L, *F] or scalar, ...}`. Its arrays are writable copies in native byte
    order. Every sample has the length that the index says, or an error names it.

    Attributes:
        index: The lengths of the corpus, for a sampler.
    """

    # Of the class, since former pickles have none.
    _pieces: PieceCutter | None = None

    @renamed_arguments(check="checksums")
    def __init__(
        self,
        shards: Shards,
        index: LengthIndex | str | os.PathLike[str] | None = None,
        fields: Collection[str] | None = None,
        *,
        decode: Mapping[str, Decoder] | None = None,
        checksums: bool = True,
        handler: Handler | None = None,
        max_failed: float | None = None,
    ) -> None:
        """Open the index. Shards are opened, and checked against it, when they are first read.

        Args:
            shards: A folder or `.ltx` file that `ShardWriter` has made, or paths, brace patterns, wildcards or URLs.
            index: Index of these shards, in their order, or its file. None for the files next to them.
            fields: Fields of the samples besides the key. Others are not read. None for all.
            decode: Functions from bytes, for fields in other encodings than npy, cls, txt and json. Without one such a
                field stays bytes. Their results must have the length in the index.
            checksums: Compare what is read with its crc32, if the index has checksums.
            handler: Called with the error of a sample of a batch that cannot be read. It returns True to skip the
                sample, or False to raise, as `webdataset.warn_and_continue` does. None raises.
            max_failed: Fraction of samples that may be skipped, 0 to 1. None is a tenth, but at least 99 samples.

        Raises:
            FileNotFoundError: There is no index.
            TypeError: `fields` is a single string, `decode` a function, `handler` not a function, or `max_failed` not a
                number.
            ValueError: The index is damaged or of other shards, a field does not exist, or `max_failed` is not
                between 0 and 1.
        """
        if isinstance(fields, str):
            raise TypeError(f"fields must be a list of names, got the string {fields!r}")
        self.index = _open_index(shards, index)
        self._tables = tables_of(self.index)
        self._check_crcs = checksums and self._tables.crcs is not None
        self._decode = as_decoders(decode)
        self._columns = _select_columns(self._tables.fields, fields, self._decode)
        self._ends = self.index.starts[1:]
        self._skipping = make_skipping(handler, max_failed, len(self.index))
        self._forget()

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Skipped samples so far, in all workers: `{shard: {reason: count}}`.

        The reasons are `length`, `missing` (a shard), `unreadable`, `field` (missing) and `damaged`.
        """
        return {} if self._skipping is None else self._skipping.counts

    def with_pieces(self, pieces: PieceTable | None, *, fields: Collection[str] | None = None) -> Self:
        """The same corpus with the pieces of its long samples: indices from N on, as a packing sampler numbers them.

        A piece is read as its sample is, with the same checks, and then cut.

        Args:
            pieces: `sampler.pieces`. None where no sample is split.
            fields: Fields that are cut, each of the length with which the sample was planned. Others are whole. None
                for all fields of variable length that are read.

        Raises:
            TypeError: `fields` is a single string.
            ValueError: A piece is of a sample that the corpus does not have.
        """
        new = copy(self)
        variable = [field.name for _, field, _ in self._columns if field.variable]
        chosen = variable if fields is None else fields
        new.__dict__["_pieces"] = None if pieces is None else PieceCutter(pieces, len(self.index), chosen)
        return new

    def __len__(self) -> int:
        return len(self.index) + (0 if self._pieces is None else len(self._pieces))

    def __repr__(self) -> str:
        fields = [field.name for _, field, _ in self._columns]
        return f"{type(self).__name__}({len(self)} samples, {len(self.index.shards)} shards, fields={fields})"

    def __getitem__(self, index: int) -> Sample:
        """The sample of one index. Errors are those of `__getitems__`, and are raised even with a handler."""
        rows = check_range([operator.index(index)], len(self))
        [sample] = self._cut(rows, self._read(self._sources(rows)))
        return cast(Sample, sample)

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices, in this order. They are read in the order of the files.

        With a handler, skipped samples are left out.

        Raises:
            FileNotFoundError: A shard is absent.
            IndexError: An index is not in the corpus.
            LengthError: The length of a sample differs from the index. The message has shard, key, field and both
                lengths.
            RuntimeError: All samples of the batch were skipped, or too many in total. The message lists the failures.
            TypeError: Indices are not integers.
            ValueError: A shard has changed since it was indexed, or is damaged.
        """
        samples = self._read_in_order(indices)
        return samples if self._skipping is None else self._skipping.sift(samples)

    def _read_in_order(self, indices: Sequence[int]) -> list[Any]:
        """Samples in the given order. With a handler, `Failed` stands for those that cannot be read."""
        rows = check_range(indices, len(self))
        sources = self._sources(rows)
        order = np.argsort(sources, kind="stable")
        read = self._read if self._skipping is None else self._read_tolerantly
        samples = read(sources[order]) if len(rows) else []
        batch: list[Any] = [None] * len(samples)
        for slot, sample in zip(order.tolist(), samples, strict=True):
            batch[slot] = sample
        return self._cut(rows, batch)

    def _sources(self, rows: AnyArray) -> AnyArray:
        """The samples of these indices, of samples or pieces."""
        return rows if self._pieces is None else self._pieces.sources(rows)

    def _cut(self, rows: AnyArray, samples: list[Any]) -> list[Any]:
        """Samples, or the pieces of them that these indices name."""
        if self._pieces is None:
            return samples
        pairs = zip(rows.tolist(), samples, strict=True)
        return [each if isinstance(each, Failed) else self._pieces.cut(row, each) for row, each in pairs]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tables = tables_of(self.index)
        self._forget()

    def _forget(self) -> None:
        """Start without the state of another process: open files, and the blocks that were checked."""
        self._process = os.getpid()
        self._files = lru_cache(maxsize=_count_handles())(open_file)
        blocks = self._tables.blocks
        self._checked = np.zeros(0 if blocks is None else len(blocks), np.bool_)

    def _read_tolerantly(self, rows: AnyArray) -> list[Any]:
        """Read samples. `Failed` stands for those whose data is damaged."""
        try:
            return self._read(rows)
        except Exception as error:
            if not is_damage(error):
                raise
        shards = np.searchsorted(self._ends, rows, side="right")
        samples = []
        for shard in np.unique(shards).tolist():
            try:
                self._file(shard)
            except Exception as error:
                if not is_damage(error):
                    raise
                # Then none of its samples can be read: one attempt is enough.
                samples += [self._fail(error, row) for row in rows[shards == shard].tolist()]
            else:
                samples += read_apart(self._read, rows[shards == shard], self._fail)
        return samples

    def _fail(self, error: Exception, row: int) -> Failed:
        """The failure of a sample, with its key and shard."""
        shard = self._tables.shards[int(np.searchsorted(self._ends, row, side="right"))]
        return Failed(error, self.index.keys[row], shard.path)

    def _read(self, rows: AnyArray) -> list[Sample]:
        """The samples of ascending rows."""
        if self._process != os.getpid():
            self._forget()
        shards = np.searchsorted(self._ends, rows, side="right")
        # Rows 3, 5 and 9 of the shards 0, 0 and 2 give the bounds 0, 2, 3: two shards, with two samples and one.
        bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(rows)]
        at_once = self._files.cache_parameters()["maxsize"]
        samples: list[Sample] = []
        # At most as many shards as may be open: a batch of short samples may come from a thousand.
        for first in range(0, len(bounds) - 1, at_once):
            part = bounds[first : first + at_once + 1]
            within = slice(part[0], part[-1])
            samples += self._read_shards(rows[within], shards[within], [bound - part[0] for bound in part])
        return samples

    def _read_shards(self, rows: AnyArray, shards: AnyArray, bounds: list[int]) -> list[Sample]:
        """The samples of some shards, whose rows lie between neighbouring bounds."""
        files = [(self._file(int(shards[first])), slice(first, last)) for first, last in pairwise(bounds)]
        samples: list[Sample] = [{"__key__": decode_key(key)} for key in self._tables.keys[rows].tolist()]
        if self._tables.blocks is not None:
            self._check_blocks(files, rows, self._tables.blocks)
            self._read_blocks(files, rows, samples)
        elif self._tables.sizes is not None:
            self._read_plain(files, rows, samples, self._tables.sizes)
        return samples

    def _file(self, shard: int) -> RandomAccess:
        """An open shard.

        Raises:
            FileNotFoundError: It is absent.
            ValueError: Its size differs from the index.
        """
        indexed = self._tables.shards[shard]
        try:
            file = self._open(indexed.path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no shard {indexed.path}, which the index lists: put it back, give shards= their new paths, or "
                f"{REBUILD}"
            ) from None
        if file.size != indexed.size:
            raise ValueError(
                f"{indexed.path}: {file.size} bytes, the index says {indexed.size}: changed since it was indexed; "
                f"{REBUILD}"
            )
        return file

    def _open(self, path: str) -> RandomAccess:
        """Open a file, or take it from the cache.

        Raises:
            OSError: It cannot be opened.
        """
        try:
            return self._files(path)
        except OSError as error:
            if error.errno not in {EMFILE, ENFILE}:
                raise
            # The rest of the program has more files open than expected. Close the shards that are not in use.
            self._files.cache_clear()
            return self._files(path)

    def _read_blocks(self, files: Files, rows: AnyArray, samples: list[Sample]) -> None:
        """Read the fields of samples in blocks: slices of flat arrays."""
        steps = self._tables.lengths[rows]
        for column, field, length_column in self._columns:
            shapes = [field.shape] * len(rows)
            if field.variable:
                counts = steps[:, length_column].tolist()
                shapes = [(count, *field.shape) for count in counts] if field.shape else counts
            arrays = list(map(np.empty, shapes, repeat(np.dtype(field.dtype))))
            self._fill(files, arrays, rows, column)
            values = arrays if field.variable or field.shape else [array[()] for array in arrays]
            for sample, value in zip(samples, values, strict=True):
                sample[field.name] = value

    def _read_plain(self, files: Files, rows: AnyArray, samples: list[Sample], sizes: AnyArray) -> None:
        """Read the fields of plain samples: whole members.

        Raises:
            ValueError: A member is not within the shard.
        """
        for column, field, length_column in self._columns:
            for file, part in files:
                starts, counts = self._tables.offsets[rows[part], column], sizes[rows[part], column]
                if ((starts < 0) | (counts < 0) | (starts > file.size - counts)).any():
                    raise ValueError(f"{file.path}: the index says that a member is not within the shard: {REBUILD}")
            arrays = [np.empty(size, np.uint8) for size in sizes[rows, column].tolist()]
            self._fill(files, arrays, rows, column)
            for sample, row, array in zip(samples, rows.tolist(), arrays, strict=True):
                # Offset 0: a sample may lack a field whose length does not count.
                if self._tables.offsets[row, column]:
                    sample[field.name] = self._decode_field(field, array.tobytes(), row, length_column)

    def _fill(self, files: Files, arrays: list[AnyArray], rows: AnyArray, column: int) -> None:
        """Read a field of each row into an array, and compare checksums."""
        offsets = self._tables.offsets_of(rows, column).tolist()
        for file, part in files:
            file.fill(arrays[part], offsets[part])
        if self._check_crcs and self._tables.crcs is not None:
            buffers: Iterable[Any] = arrays
            expected = self._tables.crcs[rows, column].tolist()
            if list(map(crc32, buffers)) != expected:
                self._refuse_damage(arrays, expected, rows, column)

    def _refuse_damage(self, arrays: list[AnyArray], expected: list[int], rows: AnyArray, column: int) -> NoReturn:
        """Refuse the first sample whose checksum differs.

        Raises:
            ValueError: Always.
        """
        buffers: Iterable[Any] = arrays
        row = int(rows[[crc32(buffer) != crc for buffer, crc in zip(buffers, expected, strict=True)].index(True)])
        raise ValueError(
            f"{self._context(row, self._tables.fields[column])}, at offset {self._tables.offsets[row, column]}: the "
            "bytes do not have the checksum in the index: the shard is damaged or has changed"
        )

    def _decode_field(self, field: Field, data: bytes, row: int, length_column: int) -> Any:
        """The value of a plain field, with the length that the index says."""
        context = partial(self._context, row, field)
        decoder = self._decode.get(field.name)
        value = decode_field(field, data, decoder, context)
        # Bytes that stay undecoded have no length in steps.
        if field.variable and not isinstance(value, bytes):
            check_length(value, int(self._tables.lengths[row, length_column]), context, decoder)
        return value

    def _check_blocks(self, files: Files, rows: AnyArray, table: AnyArray) -> None:
        """Compare the blocks of these rows with the index, each once in this process."""
        blocks = np.searchsorted(table[:, 0], rows, side="right") - 1
        if self._checked[blocks].all():
            return
        for file, part in files:
            for block in np.unique(blocks[part][~self._checked[blocks[part]]]).tolist():
                check_block(file, self._tables, block, self._columns)
                self._checked[block] = True

    def _context(self, row: int, field: Field) -> str:
        shard = self._tables.shards[int(np.searchsorted(self._ends, row, side="right"))]
        return f"{shard.path}: sample {self.index.keys[row]!r}, field {field.name!r}"


def _count_handles() -> int:
    """Number of shards that a process keeps open."""
    try:
        # Windows has no such limit, and no such module.
        limit = import_module("resource").getrlimit(import_module("resource").RLIMIT_NOFILE)[0]
    except ImportError:
        return HANDLES
    return HANDLES if limit < 0 else max(1, min(HANDLES, limit // _SHARE))


def _open_index(shards: Shards, index: LengthIndex | str | os.PathLike[str] | None) -> LengthIndex:
    """The given index for these shards, or the one that lies with them."""
    if index is not None:
        index = index if isinstance(index, LengthIndex) else LengthIndex.open(index)
        return index.moved_to(shards)
    return open_index(shards)


def _select_columns(fields: Sequence[Field], chosen: Collection[str] | None, decode: Collection[str]) -> ReadColumns:
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
