"""`lengths_of`: the lengths of a dataset's rows, in their order, as a sampler takes them."""

import os
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np

from samplers.sources.arrow_lengths import (
    LengthArray,
    TextUnit,
    arrow_lengths,
    choose_lengths,
    find_column,
    list_columns,
    nullable_lengths,
    refuse_null,
)
from samplers.sources.extras import load_extra
from samplers.sources.files import is_dataset_folder, load_dataset_folder, measure_value, read_file_lengths

_TAKES: Final = (
    "a Hugging Face dataset, a pyarrow table or array, a path of .parquet, .jsonl, .npy or .idx, or a list of rows"
)


def lengths_of(
    dataset: Any, column: str | None = None, *, text: Literal["bytes", "characters"] | None = None
) -> LengthArray:
    """The length of each row of a dataset, in the order of the rows, for a sampler.

    Of Arrow data, such as a Hugging Face dataset in memory or on disk, only the offsets of lists are read, no values:
    ten million rows take about a second. A dataset may be shuffled, filtered, sliced or concatenated.

    Args:
        dataset: A Hugging Face dataset (not a stream); a pyarrow table, record batch or array; the path of a Parquet,
            JSON lines, NumPy or Megatron `.idx` file, or of a folder that `save_to_disk` has written; or a list of
            rows, which are mappings if `column` is given.
        column: The column whose lengths count; a field of a struct is `struct.field`. A column of integers holds the
            lengths themselves. None for the only column of lists, or several that have equal lengths.
        text: What counts in a column of text: `"bytes"` (of UTF-8) or `"characters"`. None refuses text, because its
            time steps are tokens.

    Returns:
        int64 `[N]`.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: pyarrow or `datasets` is needed and not installed.
        TypeError: The dataset is a stream, has several splits, or is of another kind.
        ValueError: There is no such column, it has no lengths or is text without `text`, or a row is null. The message
            has the row.

    Examples:
        >>> rows = [{"tokens": [7, 8, 9]}, {"tokens": []}, {"tokens": [4]}]
        >>> lengths_of(rows, "tokens")
        array([3, 0, 1])
    """
    if isinstance(dataset, (str, os.PathLike)):
        return _of_path(os.fspath(dataset), column, text)
    if isinstance(dataset, (list, tuple)):
        return _of_rows(dataset, column, text)
    package = type(dataset).__module__.partition(".")[0]
    if package == "pyarrow":
        return _of_arrow(dataset, column, text)
    # `dataset["tokens"]` is a view of a column.
    if package == "datasets" and hasattr(dataset, "column_name") and hasattr(dataset, "source"):
        return lengths_of(dataset.source, dataset.column_name if column is None else column, text=text)
    if hasattr(dataset, "column_names") and hasattr(getattr(dataset, "data", None), "column"):
        return _of_dataset(dataset, column, text)
    raise TypeError(_refusal(dataset))


def _of_path(path: str, column: str | None, text: TextUnit | None) -> LengthArray:
    if is_dataset_folder(path):
        return lengths_of(load_dataset_folder(path), column, text=text)
    return np.asarray(read_file_lengths(path, column, text=text), np.int64)


def _of_rows(rows: Any, column: str | None, text: TextUnit | None) -> LengthArray:
    """Lengths of a list of rows.

    Raises:
        ValueError: A row has no such column.
    """
    lengths = []
    for number, row in enumerate(rows):
        value = row
        if column is not None:
            if not isinstance(row, Mapping) or column not in row:
                there = sorted(row) if isinstance(row, Mapping) else f"a {type(row).__name__}"
                raise ValueError(f"row {number} has no column {column!r}, there is {there}")
            value = row[column]
        elif isinstance(row, Mapping):
            raise ValueError(f"row {number} is a mapping: name the column whose lengths count, one of {sorted(row)}")
        lengths.append(measure_value(value, f"row {number}", text))
    return np.array(lengths, np.int64)


def _of_arrow(data: Any, column: str | None, text: TextUnit | None) -> LengthArray:
    """Lengths of a pyarrow table or array."""
    if not hasattr(data, "column_names"):
        # A record batch has a schema, an array has not.
        if not hasattr(data, "schema"):
            return arrow_lengths(data, "the array", text=text)
        data = load_extra("pyarrow", "convert").Table.from_batches([data])
    names = list_columns(data.schema) if column is None else [column]
    lengths = {
        name: arrow_lengths(find_column(data, name, "the table"), f"column {name!r}", text=text) for name in names
    }
    return choose_lengths(lengths, data.column_names, "the table")


def _of_dataset(dataset: Any, column: str | None, text: TextUnit | None) -> LengthArray:
    """Lengths of a Hugging Face dataset."""
    table = dataset.data
    rows = _chosen_rows(dataset)
    if rows is None and len(table) != len(dataset):
        # A future release may keep the chosen rows elsewhere: copied rows have their order.
        table = load_extra("pyarrow", "convert").concat_tables(
            dataset.with_format("arrow").iter(batch_size=max(1, len(dataset)))
        )
    names = list_columns(table.schema) if column is None else [column]
    lengths = {}
    for name in names:
        context = f"column {name!r}"
        measured, missing = nullable_lengths(find_column(table, name, "the dataset"), context, text=text)
        # Null in a row that was filtered out is no error.
        refuse_null(missing if missing is None or rows is None else missing[rows], context)
        lengths[name] = measured if rows is None else measured[rows]
    return choose_lengths(lengths, dataset.column_names, "the dataset")


def _chosen_rows(dataset: Any) -> Any:
    """The rows of the table that a shuffled or filtered dataset consists of. None for all, in their order."""
    indices = getattr(dataset, "_indices", None)
    return None if indices is None else np.asarray(indices.column(0).to_numpy(), np.int64)


def _refusal(dataset: Any) -> str:
    """Why this is no dataset with lengths, and the way out."""
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        return f"a {kind} holds {list(dataset)}: choose a split, such as dataset[{next(iter(dataset), 'train')!r}]"
    if type(dataset).__module__.startswith("datasets") and not hasattr(dataset, "__len__"):
        return f"a {kind} is a stream, whose lengths nobody knows in advance: use bucket_by_length or LengthBucketNode"
    if hasattr(dataset, "index") and hasattr(dataset.index, "lengths"):
        return f"a {kind} has its lengths in an index: give dataset.index to the sampler"
    return f"a {kind} has no columns of lengths: give {_TAKES}"
