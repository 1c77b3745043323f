"""Lengths of the rows of Arrow columns: from the offsets of lists, so that no value is read.

A list column of Arrow is one flat array of values and the offset of each row in it. `[[7, 8, 9], [], [4]]` has the
offsets 0, 3, 3, 4, and their differences are the lengths 3, 0, 1.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from samplers.sources.extras import load_extra

# What counts in a text.
TextUnit: TypeAlias = Literal["bytes", "characters"]
LengthArray: TypeAlias = npt.NDArray[np.int64]
"""Lengths in time steps: int64 `[N]`."""

_EXTRA: Final = "convert"


def arrow_lengths(column: Any, context: str, *, text: TextUnit | None = None, first_row: int = 0) -> LengthArray:
    """The length of each row of a column: int64 `[N]`.

    Args:
        column: A pyarrow `ChunkedArray` or `Array` of lists of any kind, of text, or of integers, which are lengths.
        context: Origin of the column, for messages.
        text: What counts in a text.
        first_row: Number of the first row, for messages.

    Raises:
        ValueError: The column is of another type, text without `text`, or has null. The message has the row.
    """
    lengths, missing = nullable_lengths(column, context, text=text)
    refuse_null(missing, context, first_row=first_row)
    return lengths


def nullable_lengths(
    column: Any, context: str, *, text: TextUnit | None = None
) -> tuple[LengthArray, npt.NDArray[np.bool_] | None]:
    """The lengths of the rows, and which rows are null; None if none are.

    Raises:
        ValueError: The column is of another type, or text without `text`.
    """
    pa = load_extra("pyarrow", _EXTRA)
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    pieces = [_measure(chunk, context, text) for chunk in chunks]
    if not pieces:
        # The type is checked even if there is no row.
        pieces = [_measure(pa.array([], column.type), context, text)]
    lengths = np.concatenate([lengths for lengths, _ in pieces])
    if not any(missing is not None and missing.any() for _, missing in pieces):
        return lengths, None
    masks = [np.zeros(len(part), np.bool_) if missing is None else missing for part, missing in pieces]
    return lengths, np.concatenate(masks)


def refuse_null(missing: npt.NDArray[np.bool_] | None, context: str, *, first_row: int = 0) -> None:
    """Refuse rows without a value.

    Raises:
        ValueError: There is one. The message has its number.
    """
    if missing is not None and missing.any():
        rows = np.flatnonzero(missing)
        raise ValueError(
            f"{context}: row {first_row + int(rows[0])} is null, as are {len(rows)} of {len(missing)}: leave such rows "
            "out, or give them an empty list"
        )


def find_column(table: Any, name: str, context: str) -> Any:
    """A column of a pyarrow table, also within structs: `audio.frames`.

    Raises:
        ValueError: There is none.
    """
    names = list(table.column_names)
    if name in names:
        return table.column(name)
    parents = [each for each in names if name.startswith(f"{each}.")]
    path = name.removeprefix(f"{max(parents, key=len)}.").split(".") if parents else []
    # Arrow's errors are of several types, and none names the column.
    with suppress(KeyError, TypeError, ValueError, NotImplementedError):
        if path:
            pc = load_extra("pyarrow.compute", _EXTRA)
            return pc.struct_field(table.column(max(parents, key=len)), path)
    raise ValueError(f"{context}: no column {name!r}, there are {names}")


def list_columns(schema: Any) -> list[str]:
    """The names of the columns that hold lists."""
    return [each.name for each in schema if _is_list(_storage_type(each.type))]


def choose_lengths(lengths: dict[str, LengthArray], names: Sequence[str], context: str) -> LengthArray:
    """The lengths of the only list column, or of several that agree in every row.

    Args:
        lengths: Lengths of the list columns.
        names: All columns, for messages.
        context: Origin of the columns, for messages.

    Raises:
        ValueError: There are none, or they differ.
    """
    if not lengths:
        raise ValueError(
            f"{context}: no column holds lists, there are {list(names)}: name the column whose lengths count; text "
            "needs to be tokenised, or measured with text="
        )
    first, *others = lengths
    for other in others:
        rows = np.flatnonzero(lengths[first] != lengths[other])
        if len(rows):
            raise ValueError(
                f"{context}: the lists {first!r} and {other!r} differ in length, first in row {rows[0]} "
                f"({lengths[first][rows[0]]} and {lengths[other][rows[0]]}): name the column whose lengths count"
            )
    return lengths[first]


def _measure(chunk: Any, context: str, text: TextUnit | None) -> tuple[LengthArray, npt.NDArray[np.bool_] | None]:
    """The lengths of one array, and which are null.

    Raises:
        ValueError: It is of no type that has lengths.
    """
    pa, pc = load_extra("pyarrow", _EXTRA), load_extra("pyarrow.compute", _EXTRA)
    while isinstance(chunk, pa.ExtensionArray):
        chunk = chunk.storage
    missing = np.asarray(chunk.is_null().to_numpy(zero_copy_only=False), np.bool_) if chunk.null_count else None
    if _is_list(chunk.type):
        lengths = pc.list_value_length(chunk)
    elif _is_text(chunk.type):
        _require_unit(chunk.type, context, text)
        # utf8_length counts characters, which bytes do not have.
        characters = text == "characters" and not _is_binary(chunk.type)
        lengths = pc.utf8_length(chunk) if characters else pc.binary_length(chunk)
    elif pa.types.is_integer(chunk.type):
        lengths = chunk
    else:
        raise ValueError(
            f"{context}: {chunk.type} has no length: name a column of lists or text, or of integers, which are lengths"
        )
    return np.asarray(lengths.fill_null(0).to_numpy(zero_copy_only=False), np.int64), missing


def _require_unit(arrow_type: Any, context: str, text: TextUnit | None) -> None:
    """Refuse text without a unit.

    Raises:
        ValueError: It has none.
    """
    if text not in ("bytes", "characters"):
        raise ValueError(
            f"{context}: {arrow_type} has no time steps: tokenise it first, or say what counts: text='bytes' or "
            f"text='characters' (--text of a command), got {text!r}"
        )


def _storage_type(arrow_type: Any) -> Any:
    pa = load_extra("pyarrow", _EXTRA)
    while isinstance(arrow_type, pa.BaseExtensionType):
        arrow_type = arrow_type.storage_type
    return arrow_type


def _is_list(arrow_type: Any) -> bool:
    types = load_extra("pyarrow", _EXTRA).types
    kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(is_kind(arrow_type) for is_kind in kinds)


def _is_text(arrow_type: Any) -> bool:
    types = load_extra("pyarrow", _EXTRA).types
    return bool(types.is_string(arrow_type) or types.is_large_string(arrow_type) or _is_binary(arrow_type))


def _is_binary(arrow_type: Any) -> bool:
    types = load_extra("pyarrow", _EXTRA).types
    return bool(types.is_binary(arrow_type) or types.is_large_binary(arrow_type))
