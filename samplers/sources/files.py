"""Lengths in files: NumPy, Parquet, JSON lines, Megatron's index, and folders of Hugging Face datasets."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from samplers.sources.arrow_lengths import (
    LengthArray,
    TextUnit,
    arrow_lengths,
    choose_lengths,
    find_column,
    list_columns,
)
from samplers.sources.extras import load_extra
from samplers.sources.json_lines import JSON_LINES, read_json_lines
from samplers.sources.megatron import read_megatron_lengths

# Rows in memory at a time.
_ROWS_AT_ONCE: Final = 16_384
TABLES: Final = (".npy", ".parquet", ".idx", *JSON_LINES)


def is_dataset_folder(path: str) -> bool:
    """Whether `save_to_disk` of a Hugging Face dataset has written a folder."""
    return any(Path(path, name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def load_dataset_folder(path: str, split: str | None = None) -> Any:
    """A Hugging Face dataset that `save_to_disk` has written, mapped.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
        ValueError: It has several splits, and none of that name.
    """
    dataset = load_extra("datasets", "convert").load_from_disk(path)
    if isinstance(dataset, dict):
        if split is None and len(dataset) == 1:
            return next(iter(dataset.values()))
        if split not in dataset:
            got = "" if split is None else f", got {split!r}"
            raise ValueError(
                f"{path}: holds the splits {list(dataset)}{got}: choose one with --split, or give "
                f"load_from_disk({path!r})[{next(iter(dataset))!r}]"
            )
        return dataset[split]
    if split is not None:
        raise ValueError(f"{path}: has no splits, got {split!r}: leave it out")
    return dataset


def read_file_lengths(path: str, column: str | None, *, text: TextUnit | None = None) -> npt.NDArray[Any]:
    """The lengths in a file.

    Args:
        path: A file whose name ends in one of `TABLES`.
        column: Column of Parquet or JSON lines. None for the only one of lists.
        text: What counts in a text.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of another kind, or has no such column.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.endswith(".npy"):
        return _read_npy(path)
    if path.endswith(".idx"):
        return read_megatron_lengths(path)
    if path.endswith(".parquet"):
        return _read_parquet(path, column, text)
    if path.endswith(JSON_LINES):
        return _read_json(path, column, text)
    raise ValueError(f"{path}: of no kind that has lengths: give a file that ends in {', '.join(TABLES)}")


def default_columns(path: str) -> list[str]:
    """The columns of lists, which `read_file_lengths` reads where none is named; none in a file of bare lengths."""
    if path.endswith(".parquet"):
        return list_columns(load_extra("pyarrow.parquet", "convert").read_schema(path))
    if path.endswith(JSON_LINES):
        _, row = next(read_json_lines(path))
        return _list_names(row)
    return []


def _read_npy(path: str) -> npt.NDArray[Any]:
    try:
        lengths: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error} Save an integer array with np.save") from None
    return lengths


def _read_parquet(path: str, column: str | None, text: TextUnit | None) -> LengthArray:
    pa, pq = load_extra("pyarrow", "convert"), load_extra("pyarrow.parquet", "convert")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = list_columns(schema) if column is None else [column]
            # Of a column within a struct, the struct is read.
            stored = sorted({next((n for n in schema.names if c == n or c.startswith(f"{n}.")), c) for c in columns})
            missing = [name for name in stored if name not in schema.names]
            if missing:
                raise ValueError(f"{path}: no column {missing[0]!r}, there are {schema.names}")
            pieces: dict[str, list[LengthArray]] = {name: [] for name in columns}
            row = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=stored):
                table = pa.Table.from_batches([batch])
                for name, lengths in pieces.items():
                    found = find_column(table, name, path)
                    lengths.append(arrow_lengths(found, f"{path}, column {name!r}", text=text, first_row=row))
                row += len(batch)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, ValueError) and not isinstance(error, pa.ArrowException):
            raise
        raise ValueError(f"{path}: damaged, or no Parquet file: {error}") from error
    whole = {name: np.concatenate([np.zeros(0, np.int64), *lengths]) for name, lengths in pieces.items()}
    return choose_lengths(whole, schema.names, path)


def _read_json(path: str, column: str | None, text: TextUnit | None) -> LengthArray:
    pieces: dict[str, list[int]] | None = None if column is None else {column: []}
    names: list[str] = []
    for context, row in read_json_lines(path):
        names = names or list(row)
        if pieces is None:
            pieces = {name: [] for name in _list_names(row)}
        for name, lengths in pieces.items():
            lengths.append(measure_value(_look_up(row, name, context), f"{context}, column {name!r}", text))
    if not names:
        raise ValueError(f"{path}: holds no line")
    return choose_lengths({name: np.array(part, np.int64) for name, part in (pieces or {}).items()}, names, path)


def _list_names(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row that hold lists."""
    return [name for name, value in row.items() if isinstance(value, list)]


def _look_up(row: Mapping[str, Any], name: str, context: str) -> Any:
    """A value of a row, also within objects: `audio.frames`.

    Raises:
        ValueError: There is none.
    """
    value: Any = row
    for key in [name] if name in row else name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"{context}: no column {name!r}, there are {sorted(row)}")
        value = value[key]
    return value


def measure_value(value: Any, context: str, text: TextUnit | None) -> int:
    """The length of one value: of a list, of a text, or an integer, which is a length.

    Raises:
        ValueError: It is none of these, or text without `text`.
    """
    if isinstance(value, (str, bytes)):
        counts: dict[str | None, Callable[[], int]] = {
            "bytes": lambda: len(value.encode() if isinstance(value, str) else value),
            "characters": lambda: len(value),
        }
        if text not in counts:
            raise ValueError(
                f"{context}: is text, which has no time steps: tokenise it first, or say what counts: text='bytes' or "
                f"text='characters' (--text of a command), got {text!r}"
            )
        return counts[text]()
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    if value is None or isinstance(value, Mapping) or not hasattr(value, "__len__"):
        what = "null" if value is None else type(value).__name__
        raise ValueError(f"{context}: is {what}, which has no length: name a column of sequences")
    return len(value)
