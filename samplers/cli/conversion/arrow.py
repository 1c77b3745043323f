"""Rows of Parquet files and Hugging Face datasets as arrays. Needs pyarrow, and for datasets also `datasets`."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from samplers.sources.files import load_dataset_folder

# Rows in memory at a time.
ROWS_AT_ONCE: Final = 1000


def read_parquet(paths: Sequence[str], columns: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of Parquet files, a thousand at a time.

    Args:
        paths: Paths of the files, in order.
        columns: Columns to read. None for all.

    Yields:
        The origin of a row, and its values by column: arrays `[L, *F]`, NumPy scalars and text.

    Raises:
        ValueError: A file is damaged, or a column does not exist or is not text or numbers of one dtype and shape.
    """
    for path in paths:
        try:
            yield from _read_file(path, columns)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: damaged, or no Parquet file: {error}") from error


def read_dataset(path: str, columns: Sequence[str] | None, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a dataset that `Dataset.save_to_disk` has written, a thousand at a time.

    Args:
        path: Folder of the dataset.
        columns: Columns to read. None for all.
        split: Split of a dataset that has several.

    Yields:
        As `read_parquet` does.

    Raises:
        ValueError: A column or split does not exist, or a column is not text or numbers of one dtype and shape.
    """
    dataset = load_dataset_folder(path, split)
    _check_columns(dataset.column_names, columns, path)
    # Without this, `datasets` would also read the columns that are not wanted.
    chosen = dataset if columns is None else dataset.select_columns(list(columns))
    for number, table in enumerate(chosen.with_format("arrow").iter(ROWS_AT_ONCE)):
        yield from _batch_rows(table.combine_chunks().to_batches()[0], path, number * ROWS_AT_ONCE)


def _read_file(path: str, columns: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    with pq.ParquetFile(path) as file:
        _check_columns(file.schema_arrow.names, columns, path)
        first = 0
        # A row group may be larger than memory, so rows come in batches.
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
            yield from _batch_rows(batch, path, first)
            first += len(batch)


def _check_columns(names: Sequence[str], columns: Sequence[str] | None, path: str) -> None:
    missing = [name for name in columns or () if name not in names]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]!r}, there are {list(names)}")


def _batch_rows(batch: Any, path: str, first: int) -> Iterator[tuple[str, dict[str, Any]]]:
    names = batch.schema.names
    context = f"{path}, rows {first} to {first + len(batch) - 1}"
    columns = [_values(batch.column(name), f"{context}, column {name!r}") for name in names]
    for number, values in enumerate(zip(*columns, strict=True), start=first):
        yield f"{path}, row {number}", dict(zip(names, values, strict=True))


def _values(column: Any, context: str) -> list[Any] | npt.NDArray[Any]:
    """The values of a column, one for each row."""
    column = _plain(column, context)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return list(column.to_pylist())
    if not _is_list(column.type):
        return _dense_array(column, context)
    # One flat array, cut into rows: to convert row by row is many times slower.
    ends = np.cumsum(_list_lengths(column)).tolist()
    steps = _dense_array(column.flatten(), context)
    return [steps[first:last] for first, last in pairwise([0, *ends])]


def _dense_array(column: Any, context: str) -> npt.NDArray[Any]:
    """A column of numbers, or of lists of one length, as one array `[n, *F]`.

    Raises:
        ValueError: It is not such a column.
    """
    column = _plain(column, context)
    arrow_type = column.type
    if pa.types.is_fixed_size_list(arrow_type):
        inner = _dense_array(column.flatten(), context)
        return inner.reshape(len(column), arrow_type.list_size, *inner.shape[1:])
    if _is_list(arrow_type):
        # Lists of one length are an axis of the steps.
        sizes = np.unique(_list_lengths(column))
        if len(sizes) > 1:
            raise ValueError(f"{context}: steps must have one shape, got lists of {sizes[0]} and {sizes[-1]} values")
        inner = _dense_array(column.flatten(), context)
        return inner.reshape(len(column), sizes[0] if len(sizes) else 0, *inner.shape[1:])
    if not (pa.types.is_boolean(arrow_type) or pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type)):
        raise ValueError(
            f"{context}: {arrow_type} is not a number, a text or a list of numbers: choose others with --fields"
        )
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _plain(column: Any, context: str) -> Any:
    """A column without extension types and null.

    Raises:
        ValueError: It has null.
    """
    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{context}: holds null, first at value {row}: fill it in, or choose others with --fields")
    return column


def _is_list(arrow_type: Any) -> bool:
    return bool(
        pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type)
    )


def _list_lengths(column: Any) -> npt.NDArray[np.int64]:
    return np.asarray(pc.list_value_length(column).to_numpy(zero_copy_only=False), np.int64)
