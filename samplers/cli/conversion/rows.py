"""Convert rows to samples: of shards, JSON lines, Parquet and Hugging Face datasets, a few at a time."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from samplers.cli.arguments import check_exists
from samplers.cli.conversion.exact_numbers import as_numbers, cast_exactly
from samplers.cli.conversion.tokenizer import Tokenizer
from samplers.shards.dataset import ShardDataset
from samplers.shards.format.npy import AnyArray
from samplers.shards.indexing.index import LengthIndex, tables_of
from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.storage.paths import expand_shards
from samplers.sources.extras import load_extra
from samplers.sources.files import is_dataset_folder, load_dataset_folder
from samplers.sources.json_lines import JSON_LINES, read_json_lines

# The origin of a row, for messages, and its values by column.
NamedRows: TypeAlias = Iterator[tuple[str, dict[str, Any]]]

_ARROW: Final = "samplers.cli.conversion.arrow"
# Samples that are read together from a shard.
SAMPLES_PER_READ: Final = 500
_INPUTS: Final = "a folder or pattern of .tar shards, .jsonl or .parquet files, or a folder written by save_to_disk"


@dataclass(frozen=True, kw_only=True)
class ColumnSelection:
    """The columns of a row that become fields of a sample, and their dtypes.

    Attributes:
        fields: Column for each field. None takes all columns under their own names.
        key: Column of the keys. None takes `__key__`, or else the row number.
        text: Fields that are text, stored as UTF-8 bytes, uint8 `[L]`, or as tokens.
        tokenizer: Makes tokens of them. None stores bytes.
        dtypes: Dtypes of fields.
        rounded: Fields whose numbers may be rounded to their dtype.
    """

    fields: Mapping[str, str] | None = None
    key: str | None = None
    text: Collection[str] = ()
    tokenizer: Tokenizer | None = None
    dtypes: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    rounded: Collection[str] = ()

    @property
    def columns(self) -> list[str] | None:
        """The columns to read; None for all."""
        if self.fields is None:
            return None
        return [*dict.fromkeys([*self.fields.values(), *([self.key] if self.key else [])])]


def read_input_rows(inputs: Sequence[str], selection: ColumnSelection, split: str | None = None) -> NamedRows:
    """The rows of files or folders, in order.

    Args:
        inputs: Paths and patterns.
        selection: Columns to read.
        split: Split of a Hugging Face dataset.

    Yields:
        The origin of a row, and its values by column.

    Raises:
        FileNotFoundError: An input does not exist.
        ValueError: An input cannot be converted, or is damaged.
    """
    for path in inputs:
        check_exists(path)
        folder = Path(path)
        if is_dataset_folder(path):
            yield from load_extra(_ARROW, "convert").read_dataset(path, selection.columns, split)
            continue
        if folder.is_dir() and any(folder.glob("*.parquet")):
            yield from _read_files(str(folder / "*.parquet"), selection)
            continue
        yield from _read_files(path, selection)


def count_input_rows(inputs: Sequence[str], split: str | None = None) -> int | None:
    """The number of rows of all inputs, without reading their values. None if it is unknown."""
    counts = [_count(path, split) for path in inputs]
    return None if None in counts else sum(count or 0 for count in counts)


def _count(path: str, split: str | None) -> int | None:
    """The number of rows of one input."""
    folder = Path(path)
    if is_dataset_folder(path):
        return int(load_dataset_folder(path, split).num_rows)
    if folder.is_dir() and any(folder.glob("*.parquet")):
        path = str(folder / "*.parquet")
    if path.endswith(".parquet"):
        parquet = load_extra("pyarrow.parquet", "convert")
        return sum(int(parquet.read_metadata(file).num_rows) for file in expand_shards(path))
    if path.endswith(JSON_LINES) and not path.endswith(".gz"):
        return sum(_count_lines(file) for file in expand_shards(path))
    if path.endswith((".tar", SUFFIX)) or folder.is_dir():
        shards = [path] if path.endswith(SUFFIX) else [shard + SUFFIX for shard in expand_shards(path)]
        indexed = all(Path(shard).exists() for shard in shards)
        return sum(len(LengthIndex.open(shard)) for shard in shards) if indexed else None
    return None


def _count_lines(path: str) -> int:
    """The number of lines that are not empty, with or without a line break at the end."""
    with Path(path).open("rb") as file:
        return sum(1 for line in file if line.strip())


def stacked_fields(inputs: Sequence[str], selection: ColumnSelection) -> list[str]:
    """The fields that have a fixed size in the shards that are converted."""
    first = inputs[0]
    if not (first.endswith((".tar", SUFFIX)) or any(Path(first).glob("*.tar"))):
        return []
    tables = tables_of(next(_datasets(first, None)).index)
    fixed = {each.name for each in tables.fields if tables.layout == "blocks" and not each.variable and each.shape}
    names = {each.name: each.name for each in tables.fields} if selection.fields is None else selection.fields
    return [name for name, column in names.items() if column in fixed]


class SampleMaker:
    """Makes samples from rows: keys, and arrays whose dtype stays the same."""

    def __init__(self, selection: ColumnSelection) -> None:
        self._selection = selection
        # One step of the first value of each field, for its dtype and feature shape.
        self._examples: dict[str, AnyArray] = {}
        self._made = 0

    def make(self, context: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """The sample of a row.

        Raises:
            ValueError: A column is missing, or a value is not a number or a list of numbers, or differs in dtype from
                earlier ones. The message has its origin.
        """
        key = self._key(context, row)
        names = self._selection.fields
        if names is None:
            names = {name: name for name in row if name != self._selection.key and not name.startswith("__")}
        missing = [column for column in names.values() if column not in row]
        if missing:
            raise ValueError(f"{context}: no field {missing[0]!r}, there are {sorted(row)}")
        self._made += 1
        values = {name: self._value(f"{context}, field {name!r}", name, row[column]) for name, column in names.items()}
        return {"__key__": key, **values}

    def skip(self, context: str, row: Mapping[str, Any]) -> str:
        """The key of a row whose sample exists already.

        Raises:
            ValueError: As `make` does.
        """
        fields = self._selection.fields or [name for name in row if name != self._selection.key]
        # The first values of a field decide its dtype, also for later rows.
        if len(self._examples) < len([name for name in fields if name not in {"__key__", *self._selection.text}]):
            return str(self.make(context, row)["__key__"])
        key = self._key(context, row)
        self._made += 1
        return key

    def _key(self, context: str, row: Mapping[str, Any]) -> str:
        if self._selection.key is None and "__key__" not in row:
            return f"{self._made:09}"
        name = self._selection.key or "__key__"
        key = row.get(name)
        if isinstance(key, bool) or not isinstance(key, (str, int, np.integer)):
            raise ValueError(f"{context}: the key {name!r} must be a text or an integer, got {key!r}")
        return str(key)

    def _value(self, context: str, name: str, value: Any) -> Any:
        """A value as an array of the field's dtype; text as its UTF-8 bytes.

        Raises:
            ValueError: It is not a number or a list of numbers, or does not fit the dtype.
        """
        if isinstance(value, str) and name in self._selection.text:
            tokenizer = self._selection.tokenizer
            if tokenizer is None:
                return np.frombuffer(_encode(context, value), np.uint8)
            tokens = tokenizer(value, context)
            return self._cast(context, name, tokens, self._selection.dtypes.get(name, tokens.dtype))
        if not isinstance(value, (bool, int, float, list, np.ndarray, np.generic)):
            type_name = "text" if isinstance(value, str) else type(value).__name__
            way_out = f"store a text as its UTF-8 bytes with --text {name}"
            if isinstance(value, bytes):
                way_out = "leave encoded sound in its shards, whose lengths `lengthtrack index` reads"
            raise ValueError(
                f"{context}: is {type_name}, and shards hold numbers: choose fields with --fields, or {way_out}"
            )
        # `np.asarray([])` is float64, whatever the field holds.
        if isinstance(value, list) and not value:
            return self._empty(context, name)
        array = as_numbers(value, context)
        array = self._cast(context, name, array, self._selection.dtypes.get(name, array.dtype))
        return self._keep_dtype(context, name, array)

    def _cast(self, context: str, name: str, array: AnyArray, dtype: np.dtype[Any]) -> AnyArray:
        hint = f": choose another --dtype{f', or --round {name} to let it be rounded' * (dtype.kind == 'f')}"
        return cast_exactly(array, dtype, context, rounds=name in self._selection.rounded, hint=hint)

    def _empty(self, context: str, name: str) -> AnyArray:
        """An empty sequence, with the dtype and feature shape of earlier ones: the list itself has neither.

        Raises:
            ValueError: There is no earlier one, and no dtype.
        """
        example = self._examples.get(name)
        if example is not None:
            return example[:0] if example.ndim else example.reshape(1)[:0]
        if name not in self._selection.dtypes:
            raise ValueError(f"{context}: the first list is empty: give its dtype with --dtype {name}=int64")
        return np.empty(0, self._selection.dtypes[name])

    def _keep_dtype(self, context: str, name: str, array: AnyArray) -> AnyArray:
        """The array in the dtype of earlier ones. JSON has both 1 and 1.5, so integers may become floats.

        Raises:
            ValueError: The dtypes do not fit.
        """
        example = self._examples.get(name)
        if example is None:
            # A copy of one step: a view would keep the memory of a thousand rows.
            self._examples[name] = array[:1].copy() if array.ndim else array
        elif example.dtype != array.dtype:
            if example.dtype.kind != "f" or array.dtype.kind not in "iu":
                raise ValueError(
                    f"{context}: holds {array.dtype}, and {example.dtype} before: choose one with --dtype "
                    f"{name}=float32"
                )
            return self._cast(context, name, array, example.dtype)
        return array


def _encode(context: str, text: str) -> bytes:
    """Text as UTF-8.

    Raises:
        ValueError: It has half a character.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{context}: half a character, which UTF-8 cannot hold: {error}") from None


def _read_files(pattern: str, selection: ColumnSelection) -> NamedRows:
    if pattern.endswith(JSON_LINES):
        for path in expand_shards(pattern):
            yield from read_json_lines(path)
    elif pattern.endswith(".parquet"):
        yield from load_extra(_ARROW, "convert").read_parquet(expand_shards(pattern), selection.columns)
    elif pattern.endswith((".tar", SUFFIX)) or Path(pattern).is_dir():
        yield from _read_shards(pattern, selection.columns)
    else:
        raise ValueError(f"{pattern}: of no kind that can be converted: give {_INPUTS}")


def _read_shards(pattern: str, columns: list[str] | None) -> NamedRows:
    for dataset in _datasets(pattern, columns):
        for first in range(0, len(dataset), SAMPLES_PER_READ):
            for sample in dataset.__getitems__(range(first, min(first + SAMPLES_PER_READ, len(dataset)))):
                yield f"{pattern}: sample {sample['__key__']!r}", sample


def _datasets(pattern: str, columns: list[str] | None) -> Iterator[ShardDataset]:
    """The samples of an index file, or of shards, with the index next to each if there is one.

    Yields:
        The dataset of the index, or one for each shard.
    """
    fields = None if columns is None else [name for name in columns if name != "__key__"]
    if pattern.endswith(SUFFIX):
        yield ShardDataset(pattern, fields=fields)
        return
    for shard in expand_shards(pattern):
        path = Path(shard + SUFFIX)
        index = LengthIndex.open(path) if path.exists() else LengthIndex.build([shard])
        yield ShardDataset([shard], index, fields)
