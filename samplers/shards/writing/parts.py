"""A corpus from parts, each with a writer of its own: alike in every field, no key twice, joined in their order."""

from collections.abc import Callable, Iterable, KeysView, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from samplers.shards.indexing.index_file import SUFFIX, open_tables, read_index, write_index
from samplers.shards.indexing.tables import Tables, TablesLike, check_alike
from samplers.shards.storage.process_pool import run_in_processes, shorten
from samplers.shards.writing.existing import find_shards, read_corpus
from samplers.shards.writing.schema import FieldSchema, read_schema

PartT = TypeVar("PartT")


class Writer(Protocol):
    """What writes a part.

    Attributes:
        shards: those that are finished.
    """

    shards: list[Path]

    @property
    def keys(self) -> KeysView[str]:
        """The keys of the samples that are written, in their order."""
        ...

    def __enter__(self) -> Self: ...
    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample."""
        ...

    def __exit__(
        self, field_schema: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class Part(Generic[PartT]):
    """A part and its place among all of them."""

    index: int
    part: PartT

    def __repr__(self) -> str:
        return f"part {self.index}, {shorten(self.value)}"


@dataclass(frozen=True)
class PartWriter(Generic[PartT]):
    """Writes parts to shards `PREFIX-PLACE-000000.tar` and so on; `PREFIX-PLACE.ltx` says that a part is finished.

    Attributes:
        open_writer: from a prefix to a writer that goes on where one of that prefix ended.
        samples: of a part.
        folder: of all shards.
        prefix: of the corpus.
        finished: places of parts that are in the corpus already.
    """

    open_writer: Callable[[str], Writer]
    samples: Callable[[PartT], Iterable[Mapping[str, Any]]]
    folder: Path
    prefix: str
    finished: frozenset[int]

    def __call__(self, part: Part[PartT]) -> list[Path]:
        """Write a part, or what is missing of it.

        Returns:
            Its shards; none if it has no samples.

        Raises:
            RuntimeError: Whatever went wrong; the part is named.
        """
        try:
            return self._write(part)
        except Exception as error:
            raise RuntimeError(
                f"{part!r}: {type(error).__name__}: {error}; finished shards stay: go on with append=True"
            ) from error

    def done_marker(self, index: int) -> Path:
        """The file that says that a part is finished."""
        return self.folder / f"{self.prefix}-{index:06}{SUFFIX}"

    def is_finished(self, index: int) -> bool:
        """Whether all of a part is written."""
        return index in self.finished or self.done_marker(index).exists()

    def _write(self, part: Part[PartT]) -> list[Path]:
        writer = self.open_writer(f"{self.prefix}-{part.index:06}")
        stream = iter(self.samples(part.value))
        finished = self.is_finished(part.index)
        written = list(writer.keys)
        for key in written[:1] if finished else written:
            sample = next(stream, {})
            if sample.get("__key__") != key:
                raise ValueError(
                    f"sample {key!r} was written before, now {sample.get('__key__')!r} comes in its place: give the "
                    "same parts in the same order, or write to another folder"
                )
        first = None if finished else next(stream, None)
        if first is not None or (writer.shards and not finished):
            with writer:
                for sample in chain([first] if first is not None else [], stream):
                    writer.write(sample)
        return writer.shards


def write_all(write_part: PartWriter[PartT], parts: Sequence[PartT], workers: int, *, progress: bool) -> Path:
    """Write all parts, and the corpus file of all shards of the prefix.

    Returns:
        The corpus file.

    Raises:
        RuntimeError: A part failed, or its process was killed; it is named.
        ValueError: A key is in two parts, parts differ in kind, there is no sample, or a part is finished by nobody.
    """
    folder, prefix = write_part.folder, write_part.prefix
    corpus = _Corpus()
    for number, shard in find_shards(folder, prefix).items():
        if len(number) == 1 or number[0] >= len(parts):
            if len(number) > 1 and not write_part.is_finished(number[0]):
                raise ValueError(f"{shard} is of a part that is not finished, got only {len(parts)} parts: give it too")
            corpus.add(shard)
    tasks = [Part(index, part) for index, part in enumerate(parts)]
    with closing(run_in_processes(write_part, tasks, workers, unit="part", progress=progress)) as done:
        for _, shards in done:
            for shard in shards:
                corpus.add(shard)
    path = folder / f"{prefix}{SUFFIX}"
    corpus.write(path, find_shards(folder, prefix).values())
    for index in range(len(parts)):
        write_part.done_marker(index).unlink(missing_ok=True)
    return path


def finished_parts(folder: Path, prefix: str) -> frozenset[int]:
    """The places of the parts that are in a corpus file.

    Raises:
        FileNotFoundError: The file lists a shard that is not there.
        ValueError: The file is damaged.
    """
    found = find_shards(folder, prefix)
    listed = read_corpus(folder, prefix, list(found.values()))
    return frozenset(number[0] for number, shard in found.items() if len(number) > 1 and shard.name in listed)


class _Corpus:
    """Shards that are alike and have no key twice; they may come in any order."""

    def __init__(self) -> None:
        self._parts: dict[Path, TablesLike] = {}
        self._schema: dict[str, FieldSchema] = {}
        self._owners: dict[bytes, int] = {}

    def add(self, shard: Path) -> None:
        tables, _ = read_index(f"{shard}{SUFFIX}")
        first = next(iter(self._parts.values()), tables)
        check_alike([first, tables])
        schema = read_schema(tables)
        self._schema = self._schema or schema
        for name, field_schema in schema.items():
            if field_schema != self._schema[name]:
                raise ValueError(
                    f"{shard}: field {name!r} is {field_schema}, in {first.shards[0].path} {self._schema[name]}: a corpus has "
                    "one kind"
                )
        self._own(tables)
        self._parts[shard] = open_tables(f"{shard}{SUFFIX}")

    def write(self, path: Path, shards: Iterable[Path]) -> None:
        """Write the corpus file, in the order of these shards.

        Raises:
            ValueError: There are none.
        """
        parts = [self._parts[shard] for shard in shards]
        if not parts:
            raise ValueError(f"nothing was written to {path.parent}: a corpus needs a sample")
        write_index(path, parts)

    def _own(self, tables: Tables) -> None:
        index = len(self._parts)
        for key in tables.keys.tolist():
            owner = self._owners.setdefault(key, index)
            if owner != index:
                shards = f"{list(self._parts)[owner]} and {tables.shards[0].path}"
                raise ValueError(
                    f"__key__ must be unique over all parts, {key.decode()!r} is in {shards}: make the part's name a "
                    "part of it, and write to another folder"
                )
