"""Convert rows to samples: of shards, JSON lines, Parquet and Hugging Face datasets, a few at a time."""

import gzip
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias, cast

import numpy as np

from samplers.cli.arguments import check_exists
from samplers.cli.exact_numbers import as_numbers, cast_exactly
from samplers.extras import load_extra
from samplers.shards.dataset import ShardDataset
from samplers.shards.format.npy import AnyArray
from samplers.shards.indexing.index import LengthIndex, tables_of
from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.storage.paths import expand_shards

# The origin of a row, for messages, and its values by column.
NamedRows: TypeAlias = Iterator[tuple[str, dict[str, Any]]]

# Samples that are read together from a shard.
SAMPLES_PER_READ: Final = 500
# A number in JSON that may be too large for a float64 (1e308): an exponent of three digits, or 300 digits.
_LARGE: Final = re.compile(r"\d[eE]\+?\d{3}|\d{300}")
_JSON: Final = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_INPUTS: Final = "a folder or pattern of .tar shards, .jsonl or .parquet files, or a folder written by save_to_disk"


@dataclass(frozen=True, kw_only=True)
class ColumnSelection:
    """The columns of a row that become fields of a sample, and their dtypes.

    Attributes:
        fields: Column for each field. None takes all columns under their own names.
        key: Column of the keys. None takes `__key__`, or else the row number.
        text: Fields that are text, stored as UTF-8 bytes, uint8 `[L]`.
        dtypes: Dtypes of fields.
        rounded: Fields whose numbers may be rounded to their dtype.
    """

    fields: Mapping[str, str] | None = None
    key: str | None = None
    text: Collection[str] = ()
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
        if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
            yield from load_extra("samplers.cli.arrow", "convert").read_dataset(path, selection.columns, split)
            continue
        if folder.is_dir() and any(folder.glob("*.parquet")):
            yield from _read_files(str(folder / "*.parquet"), selection)
            continue
        yield from _read_files(path, selection)


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

    def _key(self, context: str, row: Mapping[str, Any]) -> str:
        if self._selection.key is None and "__key__" not in row:
            return f"{self._made:09}"
        name = self._selection.key or "__key__"
        key = row.get(name)
        if isinstance(key, bool) or not isinstance(key, (str, int, np.integer)):
            raise ValueError(f"{context}: the key {name!r} must be a text or an integer, got {key!r}")
        return str(key)

    def _value(self, context: str, name: str, value: Any) -> Any:
        if isinstance(value, str) and name in self._selection.text:
            return np.frombuffer(_encode(context, value), np.uint8)
        if not isinstance(value, (bool, int, float, list, np.ndarray, np.generic)):
            type_name = "text" if isinstance(value, str) else type(value).__name__
            raise ValueError(
                f"{context}: is {type_name}, and shards hold numbers: choose fields with --fields, or store a text as "
                f"its UTF-8 bytes with --text {name}"
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
    if pattern.endswith(_JSON):
        for path in expand_shards(pattern):
            yield from _read_json(path)
    elif pattern.endswith(".parquet"):
        yield from load_extra("samplers.cli.arrow", "convert").read_parquet(expand_shards(pattern), selection.columns)
    elif pattern.endswith((".tar", SUFFIX)) or Path(pattern).is_dir():
        yield from _read_shards(pattern, selection.columns)
    else:
        raise ValueError(f"{pattern}: of no kind that can be converted: give {_INPUTS}")


def _read_json(path: str) -> NamedRows:
    for number, data in enumerate(_read_lines(path), start=1):
        context = f"{path}, line {number}"
        if number == 1:
            # Programs on Windows put one at the start of a file.
            data = data.removeprefix(BOM_UTF8)
        if data.startswith(BOM_UTF8):
            raise ValueError(f"{context}: not JSON: a byte order mark, which only a file may begin with: take it out")
        # Many writers end a file with an empty line.
        if not data.strip():
            continue
        try:
            line = data.decode()
            # By default Python reads a number that is too large for a float as infinity.
            parse_float = _parse_float if _LARGE.search(line) else None
            row = json.loads(line, parse_float=parse_float, object_pairs_hook=_refuse_twice)
        except UnicodeDecodeError as error:
            raise ValueError(f"{context}: not UTF-8: {error}: convert the file to it") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{context}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{context}: must be an object, got {type(row).__name__}")
        yield context, row


def _read_lines(path: str) -> Iterator[bytes]:
    with Path(path).open("rb") as file:
        lines = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.endswith(".gz") else file
        number = 0
        # The damage of a gzip file shows when its lines are read.
        try:
            for line in lines:
                number += 1
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged or cut short behind line {number}: {error}") from None


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without a repeated name. Python would take the last value in silence.

    Raises:
        ValueError: A name comes twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice in one object")
    return values


def _parse_float(text: str) -> float:
    number = float(text)
    if number in {float("inf"), float("-inf")}:
        raise ValueError(f"{text} is larger than any float64")
    return number


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
