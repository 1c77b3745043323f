"""Samples from shards, JSON lines, Parquet and Hugging Face datasets to shards, a few at a time."""

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from samplers.cli.exact_numbers import as_numbers, cast_exactly
from samplers.cli.extras import load_extra
from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.storage.paths import expand_shards

NamedRows: TypeAlias = Iterator[tuple[str, dict[str, Any]]]

# Samples that are read together from a shard.
CHUNK: Final = 500
# A number that may be too great for a float: by its exponent or by its digits.
_GREAT: Final = re.compile(r"\d[eE]\+?\d{3}|\d{300}")
_JSON: Final = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_KINDS: Final = "a folder or pattern of .tar shards, .jsonl or .parquet files, or a folder written by save_to_disk"


@dataclass(frozen=True, kw_only=True)
class ColumnSelection:
    """What of a row becomes a sample, and as what.

    Attributes:
        fields: names in the shards, to names in the rows; None takes all under their own names.
        key: the column that names samples; None takes `__key__`, or else the number of the row.
        text: names of fields that are text, stored as UTF-8 bytes, uint8 `[L]`.
        dtypes: of fields, by name.
        rounded: names of fields whose numbers may be rounded to the floats that they are stored as.
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
    """The rows of files or folders of one kind, in order.

    Args:
        inputs: paths and patterns.
        selection: the columns that are read.
        split: of a Hugging Face dataset.

    Yields:
        Where a row stands, and its values by column.

    Raises:
        FileNotFoundError: An input is not there.
        ValueError: An input is of no kind that is known, or damaged.
    """
    for given in inputs:
        check_exists(given)
        folder = Path(given)
        if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
            yield from load_extra("samplers.cli.arrow", "convert").read_dataset(given, selection.columns, split)
            continue
        if folder.is_dir() and any(folder.glob("*.parquet")):
            given = str(folder / "*.parquet")
        yield from _read_files(given, selection)


def check_exists(given: str) -> None:
    """Refuse a path that is not there; patterns and URLs are left to who reads them.

    Raises:
        FileNotFoundError: There is no such file or folder.
    """
    if not any(character in given for character in "*?[{") and "://" not in given and not Path(given).exists():
        raise FileNotFoundError(f"no file or folder {given}")


def stacked_fields(inputs: Sequence[str], selection: ColumnSelection) -> list[str]:
    """The fields that are arrays of fixed size in shards that are converted."""
    first = inputs[0]
    if not (first.endswith((".tar", SUFFIX)) or any(Path(first).glob("*.tar"))):
        return []
    tables = next(_datasets(first, None)).index.tables
    fixed = {each.name for each in tables.fields if tables.layout == "blocks" and not each.variable and each.shape}
    names = {each.name: each.name for each in tables.fields} if selection.fields is None else selection.fields
    return [name for name, column in names.items() if column in fixed]


class SampleMaker:
    """Rows to samples: keys, and arrays of a dtype that stays the same."""

    def __init__(self, selection: ColumnSelection) -> None:
        self._selection = selection
        self._known: dict[str, npt.NDArray[Any]] = {}
        self._made = 0

    def make(self, context: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """The sample of a row.

        Raises:
            ValueError: A column is missing, or a value is no number, no list of numbers, or of another kind than
                before; where it stands is named.
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
            raise ValueError(f"{context}: the key {name!r} must be a text or a whole number, got {key!r}")
        return str(key)

    def _value(self, context: str, name: str, value: Any) -> Any:
        if isinstance(value, str) and name in self._selection.text:
            return np.frombuffer(_encode(context, value), np.uint8)
        if not isinstance(value, (bool, int, float, list, np.ndarray, np.generic)):
            kind = "text" if isinstance(value, str) else type(value).__name__
            raise ValueError(
                f"{context}: is {kind}, and shards hold numbers: choose fields with --fields, or store a text as its "
                f"UTF-8 bytes with --text {name}"
            )
        if isinstance(value, list) and not value:
            return self._empty(context, name)
        array = as_numbers(value, context)
        array = self._cast(context, name, array, self._selection.dtypes.get(name, array.dtype))
        return self._like_before(context, name, array)

    def _cast(self, context: str, name: str, array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        hint = f": choose another --dtype{f', or --round {name} to let it be rounded' * (dtype.kind == 'f')}"
        return cast_exactly(array, dtype, context, rounds=name in self._selection.rounded, hint=hint)

    def _empty(self, context: str, name: str) -> npt.NDArray[Any]:
        # An empty list says neither its dtype nor the shape of a step.
        known = self._known.get(name)
        if known is not None:
            return known[:0] if known.ndim else known.reshape(1)[:0]
        if name not in self._selection.dtypes:
            raise ValueError(f"{context}: the first list is empty: say what it holds with --dtype {name}=int64")
        return np.empty(0, self._selection.dtypes[name])

    def _like_before(self, context: str, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        known = self._known.get(name)
        if known is None:
            # One step of its own memory, or a thousand rows would be kept for it.
            self._known[name] = array[:1].copy() if array.ndim else array
        elif known.dtype != array.dtype:
            if known.dtype.kind != "f" or array.dtype.kind not in "iu":
                raise ValueError(
                    f"{context}: holds {array.dtype}, and {known.dtype} before: choose one with --dtype {name}=float32"
                )
            return self._cast(context, name, array, known.dtype)
        return array


def _encode(context: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{context}: half a character, which UTF-8 cannot hold: {error}") from None


def _read_files(given: str, selection: ColumnSelection) -> NamedRows:
    if given.endswith(_JSON):
        for path in expand_shards(given):
            yield from _read_json(path)
    elif given.endswith(".parquet"):
        yield from load_extra("samplers.cli.arrow", "convert").read_parquet(expand_shards(given), selection.columns)
    elif given.endswith((".tar", SUFFIX)) or Path(given).is_dir():
        yield from _read_shards(given, selection.columns)
    else:
        raise ValueError(f"{given}: of no kind that can be converted: give {_KINDS}")


def _read_json(path: str) -> NamedRows:
    for number, data in enumerate(_read_lines(path), start=1):
        context = f"{path}, line {number}"
        if not data.strip():
            continue
        try:
            line = data.decode()
            # Python reads what is too great for a float as infinity.
            parse_float = _parse_float if _GREAT.search(line) else None
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
        try:
            for line in lines:
                number += 1
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged or cut short behind line {number}: {error}") from None


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python takes the last, and says nothing of the others.
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice in one object")
    return values


def _parse_float(text: str) -> float:
    number = float(text)
    if number in {float("inf"), float("-inf")}:
        raise ValueError(f"{text} is greater than any float64")
    return number


def _read_shards(given: str, columns: list[str] | None) -> NamedRows:
    for dataset in _datasets(given, columns):
        for first in range(0, len(dataset), CHUNK):
            for sample in dataset.__getitems__(range(first, min(first + CHUNK, len(dataset)))):
                yield f"{given}: sample {sample['__key__']!r}", sample


def _datasets(given: str, columns: list[str] | None) -> Iterator[ShardDataset]:
    """The samples of an index, or of one shard after the other, held against the index beside it if there is one.

    Yields:
        The index's dataset, or one for each shard.
    """
    fields = None if columns is None else [name for name in columns if name != "__key__"]
    if given.endswith(SUFFIX):
        yield ShardDataset(given, fields=fields)
        return
    for shard in expand_shards(given):
        beside = Path(shard + SUFFIX)
        index = LengthIndex.open(beside) if beside.exists() else LengthIndex.build([shard])
        yield ShardDataset([shard], index, fields)
