"""The lengths that `report` plans: of an index, or of tables of other programs, with their text and their rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from samplers.cli.arguments import check_exists, printable
from samplers.cli.describing import count, describe_index
from samplers.cli.opening import open_sources
from samplers.planning.sorting import Lengths
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.storage.paths import expand_shards
from samplers.sources.arrow_lengths import TextUnit, list_columns
from samplers.sources.files import (
    TABLES,
    default_columns,
    is_dataset_folder,
    load_dataset_folder,
    read_file_lengths,
)
from samplers.sources.lengths_of import lengths_of


@dataclass(frozen=True)
class ReportedLengths:
    """Lengths with a description.

    Attributes:
        lengths: As a sampler takes them.
        description: What they are the lengths of.
        index: The index that has them, for the keys of samples. None for other sources.
        rate: Steps in a second. None if unknown or if samples differ.
    """

    lengths: Lengths
    description: str
    index: LengthIndex | None = None
    rate: int | None = None

    def name_of(self, sample_index: int) -> str:
        """The key or number of a sample."""
        return f"sample {sample_index}" if self.index is None else printable(self.index.keys[sample_index])


@dataclass(frozen=True)
class LengthRequest:
    """What of a source is asked for.

    Attributes:
        fields: Fields or columns. None for the default ones.
        split: Split of a Hugging Face dataset.
        text: What counts in text.
        rate: Steps in a second. None for the one that an index knows.
    """

    fields: Sequence[str] | None = None
    split: str | None = None
    text: TextUnit | None = None
    rate: int | None = None


def open_reported(sources: Sequence[str], request: LengthRequest) -> ReportedLengths:
    """The lengths of an index, of shards, or of tables.

    Raises:
        FileNotFoundError: A source does not exist.
        UsageError: Options do not fit it.
        ValueError: It is damaged, or has no such field or column.
    """
    for source in sources:
        # For an index that is absent, the library has a better message.
        if not source.endswith(SUFFIX):
            check_exists(source)
    by_source = [_table_parts(source, request) for source in sources]
    parts = [part for parts in by_source for part in parts]
    if parts and not all(by_source):
        other = sources[by_source.index([])]
        raise ValueError(f"{other} has an index and others are tables: give one kind")
    if parts:
        lengths = np.concatenate(parts) if len(parts) > 1 else parts[0]
        names = ", ".join(request.fields) if request.fields else _describe_default(sources[0], request)
        what = f", lengths of {names}" if names else ""
        return ReportedLengths(lengths, count(len(lengths), "sample") + what, rate=request.rate)
    if request.split is not None or request.text is not None:
        raise click.UsageError("--split and --text are for datasets and tables, and the sources are shards")
    return _of_index(open_sources(sources), request)


def _of_index(index: LengthIndex, request: LengthRequest) -> ReportedLengths:
    """The lengths of an index, or of some of its fields.

    Raises:
        ValueError: It has no such field.
    """
    lengths: Any = index
    names = list(index.fields)
    if request.fields is not None and list(request.fields) != names:
        unknown = [name for name in request.fields if name not in names]
        if unknown:
            raise ValueError(f"the index has no lengths of {unknown[0]!r}, there are {names}")
        columns = [names.index(name) for name in request.fields]
        lengths = index.lengths.reshape(len(index), -1)[:, columns]
        names = list(request.fields)
    rates = {rate for name in names for rate in index.rates.get(name, (0,))} if request.rate is None else {request.rate}
    rate = rates.pop() if len(rates) == 1 else 0
    return ReportedLengths(lengths, describe_index(index, names), index, rate or None)


def _table_parts(source: str, request: LengthRequest) -> list[npt.NDArray[Any]]:
    """The lengths of a source that is a table, file by file. Empty if it is one of shards."""
    if is_dataset_folder(source):
        dataset = load_dataset_folder(source, request.split)
        return [_of_columns(request, lambda name: lengths_of(dataset, name, text=request.text))]
    return [
        _of_columns(request, lambda name, path=path: read_file_lengths(path, name, text=request.text))
        for path in _table_files(source)
    ]


def _table_files(source: str) -> list[str]:
    """The files of a source that is a table. Empty if it is one of shards."""
    folder = Path(source)
    if folder.is_dir() and any(folder.glob("*.parquet")):
        source = str(folder / "*.parquet")
    return list(expand_shards(source)) if source.endswith(TABLES) else []


def _describe_default(source: str, request: LengthRequest) -> str:
    """The column that was chosen because none was named. Empty for bare lengths."""
    if is_dataset_folder(source):
        names = list_columns(load_dataset_folder(source, request.split).data.schema)
    else:
        names = default_columns(_table_files(source)[0])
    first, others = "".join(names[:1]), ", ".join(names[1:])
    return f"{first} (as long as {others})" if others else first


def _of_columns(request: LengthRequest, read: Any) -> npt.NDArray[Any]:
    """The lengths of one column `[N]`, or of several `[N, K]`."""
    if not request.fields:
        lengths: npt.NDArray[Any] = read(None)
        return lengths
    columns = [read(name) for name in request.fields]
    return columns[0] if len(columns) == 1 else np.stack(columns, 1)
