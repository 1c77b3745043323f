"""Samples by place: a map-style dataset that reads slices of shards and holds every length against the index."""

import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from errno import EMFILE, ENFILE
from functools import lru_cache, partial
from importlib import import_module
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias
from zlib import crc32

import numpy as np
from torch.utils.data import Dataset

from collate.errors import LengthError
from samplers.shards.format.samples import Sample, decode_member, field_of
from samplers.shards.indexing.block_check import ReadColumns, check_block
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.index_file import REBUILD, SUFFIX
from samplers.shards.indexing.tables import Array, Field
from samplers.shards.skipping import Failed, Handler, is_damage, make_skipping, read_apart
from samplers.shards.storage.paths import expand_shards
from samplers.shards.storage.reading import RandomAccess, Shards, open_file

Decoder: TypeAlias = Callable[[bytes], Any]

# Shards that a process keeps open, and the share of all files it may open: the program has others.
HANDLES: Final = 128
_SHARE: Final = 8
_OF_A_PROCESS: Final = frozenset(["_tables", "_files", "_checked", "_process"])

# Open shards, and the part of a batch that is read from each.
Files: TypeAlias = list[tuple[RandomAccess, slice]]


class ShardDataset(Dataset[Sample]):
    """The samples of a corpus by place, in the order of its index.

    A sample is `{"__key__": str, field: array [L, *F] or scalar, ...}`; its arrays are writable, in native byte order
    and share memory with nothing. The length of what is read is the index's, or an error says where it is not.

    Attributes:
        index: the corpus's lengths, for a sampler.
    """

    def __init__(
        self,
        shards: Shards,
        index: LengthIndex | str | os.PathLike[str] | None = None,
        fields: Collection[str] | None = None,
        *,
        decode: Mapping[str, Decoder] | None = None,
        check: bool = True,
        handler: Handler | None = None,
        max_failed: float | None = None,
    ) -> None:
        """Open the index; shards are opened, and held against it, when they are first read.

        Args:
            shards: a folder or `.ltx` file that `ShardWriter` has made, or paths, brace patterns, wildcards or URLs.
            index: of these shards, in their order, or its file; None for the files beside them.
            fields: what samples hold beside their key; the others are not read. None for all.
            decode: functions from bytes for fields in other encodings than npy, cls, txt and json, which stay bytes
                without; what they give must have the length in the index.
            check: hold what is read against its crc32, where the index has one.
            handler: what becomes of a sample of a batch that cannot be read: a function from the error to True to skip
                it, or False to raise, as `webdataset.warn_and_continue`; None raises.
            max_failed: the share of samples that may be skipped, 0 to 1; None is a tenth, but no fewer than 99.

        Raises:
            FileNotFoundError: There is no index.
            TypeError: `fields` is a single string, `handler` no function, or `max_failed` no number.
            ValueError: The index is damaged or of other shards, a field is not there, or `max_failed` is no share.
        """
        if isinstance(fields, str):
            raise TypeError(f"fields must be a list of names, got the string {fields!r}")
        self.index = _open_index(shards, index)
        self._tables = self.index.tables
        self._check_crcs = check and self._tables.crcs is not None
        self._decode = dict(decode or {})
        self._columns = _choose(self._tables.fields, fields, self._decode)
        self._ends = self.index.starts[1:]
        self._skipping = make_skipping(handler, max_failed, len(self.index))
        self._forget()

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Samples that were skipped so far, in all workers: `{shard: {reason: count}}`.

        The reasons are `length`, `missing` (a shard), `unreadable`, `field` (missing) and `damaged`.
        """
        return {} if self._skipping is None else self._skipping.counts

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> Sample:
        """The sample at one place; an error is raised, whatever the handler. The errors are those of a batch."""
        return self._read(self._check_places([operator.index(place)]))[0]

    def __getitems__(self, places: Sequence[int]) -> list[Sample]:
        """The samples at these places, read in the order of the files, given in the order asked for.

        With a handler those that it skips are missing.

        Raises:
            FileNotFoundError: A shard is absent.
            IndexError: A place is not in the corpus.
            LengthError: The length of a sample is not that in the index; shard, key, field and both numbers are named.
            RuntimeError: All samples of the batch were skipped, or too many in all; those that failed are listed.
            TypeError: Places are not integers.
            ValueError: A shard has changed since it was indexed, or is damaged.
        """
        found = self._find(places)
        return found if self._skipping is None else self._skipping.sift(found)

    def _find(self, places: Sequence[int]) -> list[Any]:
        """Samples in the order asked for; with a handler, `Failed` in place of those that cannot be read."""
        wanted = self._check_places(places)
        order = np.argsort(wanted, kind="stable")
        read = self._read if self._skipping is None else self._read_whole
        samples = read(wanted[order]) if len(wanted) else []
        given: list[Any] = [None] * len(samples)
        for place, sample in zip(order.tolist(), samples, strict=True):
            given[place] = sample
        return given

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tables = self.index.tables
        self._forget()

    def _forget(self) -> None:
        # What belongs to a process: open files, and which blocks it has held against the index.
        self._process = os.getpid()
        self._files = lru_cache(maxsize=_count_handles())(open_file)
        blocks = self._tables.blocks
        self._checked = np.zeros(0 if blocks is None else len(blocks), np.bool_)

    def _check_places(self, places: Sequence[int]) -> Array:
        wanted = np.asarray(places) if len(places) else np.arange(0)
        if wanted.dtype.kind not in "iu" or wanted.ndim != 1:
            raise TypeError(f"places must be a list of integers, got {wanted.dtype} {list(wanted.shape)}")
        total = len(self)
        wanted = np.where(wanted < 0, wanted + total, wanted)
        odd = np.flatnonzero((wanted < 0) | (wanted >= total))
        if len(odd):
            raise IndexError(f"place {places[odd[0]]} is not among the {total} samples of the corpus")
        return wanted

    def _read_whole(self, rows: Array) -> list[Any]:
        try:
            return self._read(rows)
        except Exception as error:
            if not is_damage(error):
                raise
        shards = np.searchsorted(self._ends, rows, side="right")
        found = []
        for shard in np.unique(shards).tolist():
            try:
                self._file(shard)
            except Exception as error:
                if not is_damage(error):
                    raise
                # None of its samples can be read: one attempt tells.
                found += [self._fail(error, row) for row in rows[shards == shard].tolist()]
            else:
                found += read_apart(self._read, rows[shards == shard], self._fail)
        return found

    def _fail(self, error: Exception, row: int) -> Failed:
        shard = self._tables.shards[int(np.searchsorted(self._ends, row, side="right"))]
        return Failed(error, self.index.keys[row], shard.path)

    def _read(self, rows: Array) -> list[Sample]:
        if self._process != os.getpid():
            self._forget()
        shards = np.searchsorted(self._ends, rows, side="right")
        edges = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(rows)]
        at_once = self._files.cache_parameters()["maxsize"]
        samples: list[Sample] = []
        # No more shards than are kept open: a batch of short samples may be of a thousand.
        for first in range(0, len(edges) - 1, at_once):
            some = edges[first : first + at_once + 1]
            part = rows[some[0] : some[-1]]
            samples += self._read_shards(part, shards[some[0] : some[-1]], [edge - some[0] for edge in some])
        return samples

    def _read_shards(self, rows: Array, shards: Array, edges: list[int]) -> list[Sample]:
        files = [(self._file(int(shards[first])), slice(first, last)) for first, last in pairwise(edges)]
        samples: list[Sample] = [
            {"__key__": key.decode("utf-8", "surrogateescape")} for key in self._tables.keys[rows].tolist()
        ]
        if self._tables.blocks is not None:
            self._check_blocks(files, rows, self._tables.blocks)
            self._read_blocks(files, rows, samples)
        elif self._tables.sizes is not None:
            self._read_plain(files, rows, samples, self._tables.sizes)
        return samples

    def _file(self, shard: int) -> RandomAccess:
        known = self._tables.shards[shard]
        try:
            file = self._open(known.path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no shard {known.path}, which the index lists: give shards= where they are now, or {REBUILD}"
            ) from None
        if file.size != known.size:
            raise ValueError(
                f"{known.path}: {file.size} bytes, the index says {known.size}: changed since it was indexed; {REBUILD}"
            )
        return file

    def _open(self, path: str) -> RandomAccess:
        try:
            return self._files(path)
        except OSError as error:
            if error.errno not in {EMFILE, ENFILE}:
                raise
            # The rest of the program has more files open than was thought: those that only wait are closed.
            self._files.cache_clear()
            return self._files(path)

    def _read_blocks(self, files: Files, rows: Array, samples: list[Sample]) -> None:
        steps = self._tables.lengths[rows]
        for column, field, measure in self._columns:
            shapes = [field.shape] * len(rows)
            if field.variable:
                counts = steps[:, measure].tolist()
                shapes = [(count, *field.shape) for count in counts] if field.shape else counts
            arrays = list(map(np.empty, shapes, repeat(np.dtype(field.dtype))))
            self._fill(files, arrays, rows, column)
            values = arrays if field.variable or field.shape else [array[()] for array in arrays]
            for sample, value in zip(samples, values, strict=True):
                sample[field.name] = value

    def _read_plain(self, files: Files, rows: Array, samples: list[Sample], sizes: Array) -> None:
        for column, field, measure in self._columns:
            for file, part in files:
                starts, counts = self._tables.places[rows[part], column], sizes[rows[part], column]
                if ((starts < 0) | (counts < 0) | (starts > file.size - counts)).any():
                    raise ValueError(f"{file.path}: the index says that a member is not within the shard: {REBUILD}")
            arrays = [np.empty(size, np.uint8) for size in sizes[rows, column].tolist()]
            self._fill(files, arrays, rows, column)
            for sample, row, array in zip(samples, rows.tolist(), arrays, strict=True):
                # A sample may lack a field whose length does not count.
                if self._tables.places[row, column]:
                    sample[field.name] = self._decode_field(field, array.tobytes(), row, measure)

    def _fill(self, files: Files, arrays: list[Array], rows: Array, column: int) -> None:
        offsets = self._tables.places[rows, column].tolist()
        for file, part in files:
            file.fill(arrays[part], offsets[part])
        if self._check_crcs and self._tables.crcs is not None:
            buffers: Iterable[Any] = arrays
            expected = self._tables.crcs[rows, column].tolist()
            if list(map(crc32, buffers)) != expected:
                self._refuse_damage(arrays, expected, rows, column)

    def _refuse_damage(self, arrays: list[Array], expected: list[int], rows: Array, column: int) -> NoReturn:
        buffers: Iterable[Any] = arrays
        row = int(rows[[crc32(buffer) != crc for buffer, crc in zip(buffers, expected, strict=True)].index(True)])
        raise ValueError(
            f"{self._where(row, self._tables.fields[column])}, at offset {self._tables.places[row, column]}: the bytes "
            "do not have the checksum in the index: the shard is damaged or has changed"
        )

    def _decode_field(self, field: Field, data: bytes, row: int, measure: int) -> Any:
        decode = self._decode.get(field.name)
        # To say where a sample is takes a quarter of the time of reading it: only an error says it.
        context = partial(self._where, row, field)
        value = _ask(decode, data, context) if decode else _decode(field, data, context)
        # Left undecoded, bytes do not tell their steps.
        if field.variable and not isinstance(value, bytes):
            _hold_steps(value, int(self._tables.lengths[row, measure]), context)
        return value

    def _check_blocks(self, files: Files, rows: Array, starts: Array) -> None:
        blocks = np.searchsorted(starts[:, 0], rows, side="right") - 1
        if self._checked[blocks].all():
            return
        for file, part in files:
            for block in np.unique(blocks[part][~self._checked[blocks[part]]]).tolist():
                first, *members = starts[block].tolist()
                last = int(starts[block + 1, 0]) if block + 1 < len(starts) else len(self)
                check_block(file, self._tables, members, slice(first, last), self._columns)
                self._checked[block] = True

    def _where(self, row: int, field: Field) -> str:
        shard = self._tables.shards[int(np.searchsorted(self._ends, row, side="right"))]
        return f"{shard.path}: sample {self.index.keys[row]!r}, field {field.name!r}"


def _count_handles() -> int:
    try:
        # Windows has no such limit.
        most = import_module("resource").getrlimit(import_module("resource").RLIMIT_NOFILE)[0]
    except ImportError:
        return HANDLES
    return HANDLES if most < 0 else max(1, min(HANDLES, most // _SHARE))


def _ask(decode: Decoder, data: bytes, context: Callable[[], str]) -> Any:
    try:
        return decode(data)
    except Exception as error:
        error.add_note(f"decode= was given {context()}")
        raise


def _decode(field: Field, data: bytes, context: Callable[[], str]) -> Any:
    encoding = field_of(field.suffix)[1]
    try:
        return decode_member(encoding, data, "")
    except ValueError:
        return decode_member(encoding, data, context())


def _hold_steps(value: Any, expected: int, context: Callable[[], str]) -> None:
    try:
        steps = len(value)
    except TypeError:
        raise LengthError(
            f"{context()}: the index says {expected} steps, the shard holds a single value: {REBUILD}"
        ) from None
    if steps != expected:
        raise LengthError(f"{context()}: the index says {expected} steps, the shard {steps}: {REBUILD}")


def _open_index(shards: Shards, index: LengthIndex | str | os.PathLike[str] | None) -> LengthIndex:
    if index is not None:
        index = index if isinstance(index, LengthIndex) else LengthIndex.open(index)
        return index.moved_to(shards)
    if isinstance(shards, (str, os.PathLike)):
        path = Path(shards)
        if path.suffix == SUFFIX:
            return LengthIndex.open(shards)
        corpora = [file for file in path.glob(f"*{SUFFIX}") if not file.name.endswith(f".tar{SUFFIX}")]
        if len(corpora) > 1:
            raise ValueError(f"{path} holds several corpora: give one of {sorted(map(str, corpora))}")
        if corpora:
            return LengthIndex.open(corpora[0])
    indexes = [f"{shard}{SUFFIX}" for shard in expand_shards(shards)]
    # Absolute, for workers may stand in another folder.
    return LengthIndex.open_all([index if "://" in index else str(Path(index).absolute()) for index in indexes])


def _choose(fields: Sequence[Field], chosen: Collection[str] | None, decode: Collection[str]) -> ReadColumns:
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
