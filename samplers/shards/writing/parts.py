"""A corpus from parts. Each has its own writer; all have one schema; no key comes twice; they stay in order.

With the prefix `shard`, part 3 goes to `shard-000003-000000.tar`, `shard-000003-000001.tar` and so on. When it is
finished, its marker `shard-000003.ltx` says so. The corpus file `shard.ltx` comes when all parts are finished, and then
the markers go. So after a kill, a call with `append=True` finds for each part

- a marker, or its shards in the corpus file: it is finished, and only its first sample is read, to compare the key;
- shards without a marker: their samples are skipped, after a comparison of keys, and the part is continued;
- nothing: it is written from its start.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

from samplers.shards.indexing.index_file import FORMAT_VERSION, SUFFIX, open_tables, read_index, write_index
from samplers.shards.indexing.tables import Tables, TablesLike, check_alike
from samplers.shards.storage.mirror import Mirror
from samplers.shards.storage.process_pool import run_in_processes, shorten
from samplers.shards.writing.existing import find_shards, read_corpus
from samplers.shards.writing.sample_writer import SampleWriter, WriterOptions
from samplers.shards.writing.schema import FieldSchema, read_schema

PartT = TypeVar("PartT")


@dataclass(frozen=True)
class Part(Generic[PartT]):
    """A part: its index among all parts, and the value from which its samples are made."""

    index: int
    value: PartT

    def __repr__(self) -> str:
        return f"part {self.index}, {shorten(self.value)}"


@dataclass(frozen=True, kw_only=True)
class PartWriter(Generic[PartT]):
    """Writes parts, in any process. Picklable, if `samples` is.

    Attributes:
        writer: Class of the writers.
        options: Options of the writers.
        samples: Gives the samples of a part's value.
        folder: Folder of all shards, or the local one of a mirror.
        prefix: Prefix of the corpus.
        finished: Indices of the parts that are in the corpus file.
        mirror: Where the shards are sent. None for a local folder.
    """

    writer: type[SampleWriter]
    options: WriterOptions
    samples: Callable[[PartT], Iterable[Mapping[str, Any]]]
    folder: Path
    prefix: str
    finished: frozenset[int]
    mirror: Mirror | None = None

    def __call__(self, part: Part[PartT]) -> list[Path]:
        """Write a part, or the missing end of it.

        Returns:
            Its shards. Empty if it has no samples.

        Raises:
            RuntimeError: Any error. The message has the part.
        """
        try:
            return self._write(part)
        except Exception as error:
            raise RuntimeError(
                f"{part!r}: {type(error).__name__}: {error}; finished shards stay: continue with append=True"
            ) from error

    def done_marker(self, index: int) -> Path:
        """The file that marks a part as finished."""
        return self.folder / f"{self.prefix}-{index:06}{SUFFIX}"

    def is_finished(self, index: int) -> bool:
        """Whether all of a part is written."""
        return index in self.finished or self.done_marker(index).exists()

    def _write(self, part: Part[PartT]) -> list[Path]:
        """Skip the samples that are written, then write the others.

        Raises:
            ValueError: A sample that is written has another key now.
        """
        options: WriterOptions = {**self.options, "prefix": f"{self.prefix}-{part.index:06}"}
        writer = self.writer(self.mirror or self.folder, append=True, **options)
        stream = iter(self.samples(part.value))
        finished = self.is_finished(part.index)
        # The samples must be the same ones as before, or some would be lost and others repeated.
        written = list(writer.keys)
        for key in written[:1] if finished else written:
            sample = next(stream, {})
            if sample.get("__key__") != key:
                raise ValueError(
                    f"sample {key!r} was written before, now {sample.get('__key__')!r} comes instead: give the same "
                    "parts in the same order, or write to another folder"
                )
        first = None if finished else next(stream, None)
        # Without another sample the writer is entered all the same, because its end writes the marker.
        if first is not None or (writer.local_shards and not finished):
            with writer:
                for sample in chain([first] if first is not None else [], stream):
                    writer.write(sample)
        return writer.local_shards


def write_all(write_part: PartWriter[PartT], values: Sequence[PartT], workers: int, *, progress: bool) -> str:
    """Write all parts, then the corpus file of all shards of the prefix.

    Returns:
        Path or URL of the corpus file.

    Raises:
        RuntimeError: A part failed, or its process was killed. The message has the part.
        ValueError: A key is in two parts, parts differ in their schema, there is no sample, or a part that is not
            finished is not among `values`.
    """
    folder, prefix = write_part.folder, write_part.prefix
    corpus = _Corpus()
    # First the shards that no part here will write: of a writer without parts, and of parts behind these.
    for number, shard in find_shards(folder, prefix).items():
        if len(number) == 1 or number[0] >= len(values):
            if len(number) > 1 and not write_part.is_finished(number[0]):
                raise ValueError(
                    f"{shard} is of a part that is not finished, got only {len(values)} parts: give it too"
                )
            corpus.add(shard)
    parts = [Part(index, value) for index, value in enumerate(values)]
    with closing(run_in_processes(write_part, parts, workers, unit="part", progress=progress)) as results:
        for _, shards in results:
            for shard in shards:
                corpus.add(shard)
    path = folder / f"{prefix}{SUFFIX}"
    corpus.write(path, find_shards(folder, prefix).values(), write_part.options.get("version", FORMAT_VERSION))
    # The corpus file has all parts now. Until here a kill must leave the markers.
    markers = [write_part.done_marker(index) for index in range(len(values))]
    if write_part.mirror is not None:
        write_part.mirror.push([path])
        write_part.mirror.remove(markers)
        return write_part.mirror.url_of(path)
    for marker in markers:
        marker.unlink(missing_ok=True)
    return str(path)


def finished_parts(folder: Path, prefix: str) -> frozenset[int]:
    """Indices of the parts that are in a corpus file.

    Raises:
        FileNotFoundError: The file lists a shard that does not exist.
        ValueError: The file is damaged.
    """
    shards = find_shards(folder, prefix)
    listed = read_corpus(folder, prefix, list(shards.values()))
    return frozenset(number[0] for number, shard in shards.items() if len(number) > 1 and shard.name in listed)


class _Corpus:
    """Shards of one schema without a key that comes twice. They may be added in any order."""

    def __init__(self) -> None:
        self._tables: dict[Path, TablesLike] = {}
        self._schema: dict[str, FieldSchema] = {}
        # The number of the shard, in the order of adding, that has a key.
        self._owners: dict[bytes, int] = {}

    def add(self, shard: Path) -> None:
        """Add a finished shard.

        Raises:
            ValueError: Its schema differs, or it has a key of another shard.
        """
        tables, _ = read_index(f"{shard}{SUFFIX}")
        first = next(iter(self._tables.values()), tables)
        check_alike([first, tables])
        schema = read_schema(tables)
        self._schema = self._schema or schema
        for name, field in schema.items():
            if field != self._schema[name]:
                raise ValueError(
                    f"{shard}: field {name!r} is {field}, in {first.shards[0].path} {self._schema[name]}: a corpus has "
                    "one schema"
                )
        self._add_keys(tables)
        # Not the tables themselves: the keys and lengths of all shards would fill the memory.
        self._tables[shard] = open_tables(f"{shard}{SUFFIX}")

    def write(self, path: Path, shards: Iterable[Path], version: int) -> None:
        """Write the corpus file, in the order of these shards and in this version of the format.

        Raises:
            ValueError: There are none.
        """
        parts = [self._tables[shard] for shard in shards]
        if not parts:
            raise ValueError(f"nothing was written to {path.parent}: a corpus needs a sample")
        write_index(path, parts, version)

    def _add_keys(self, tables: Tables) -> None:
        """Remember the keys of the next shard.

        Raises:
            ValueError: A key is in another shard.
        """
        number = len(self._tables)
        for key in tables.keys.tolist():
            owner = self._owners.setdefault(key, number)
            if owner != number:
                shards = f"{list(self._tables)[owner]} and {tables.shards[0].path}"
                raise ValueError(
                    f"__key__ must be unique over all parts, {key.decode()!r} is in {shards}: make the part's name a "
                    "part of it, and write to another folder"
                )
