"""The header of an index file: which arrays stand where, the fields, and the shards. `index_file` has the format."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from samplers.shards.format.npy import DTYPES, AnyArray
from samplers.shards.format.samples import field_of
from samplers.shards.indexing.tables import ARRAYS, Field, Rates, Shard, Tables, TablesLike, join_rates, key_width

# Bytes before the header: magic, version, sizes and checksums.
PREFIX_BYTES: Final = 24
# Name of an array in the file, where it is not that in `Tables`: version 1 of the format has fixed it.
NAME_IN_FILE: Final = {"offsets": "places"}
NAME_IN_TABLES: Final = {"places": "offsets"}
# Arrays start at multiples of 64 bytes.
_ALIGN: Final = 64


def plan_arrays(parts: Sequence[TablesLike], order: AnyArray) -> dict[str, dict[str, Any]]:
    """Dtype, shape and offset of each array in the file."""
    entries, offset = {}, 0
    for name, (_, shape) in (parts[0].shapes | {"order": (order.dtype, order.shape)}).items():
        rows = len(order) if name == "order" else sum(part.shapes[name][1][0] for part in parts)
        dtype = {"keys": f"|S{key_width(parts)}", "order": order.dtype.str}.get(name) or ARRAYS[name]
        entries[NAME_IN_FILE.get(name, name)] = {"dtype": dtype, "shape": [rows, *shape[1:]], "offset": offset}
        offset += round_up(math.prod([rows, *shape[1:]]) * np.dtype(dtype).itemsize)
    return entries


def encode_header(
    parts: Sequence[TablesLike], entries: dict[str, dict[str, Any]], folder: Path, length_id: str | None
) -> tuple[bytes, int]:
    """The header, and the offset of the arrays."""
    header: dict[str, Any] = {
        "layout": parts[0].layout,
        "fields": [asdict(field) for field in parts[0].fields],
        "shards": [asdict(shard) | {"path": _relate(shard.path, folder)} for part in parts for shard in part.shards],
        "arrays": entries,
    }
    if length_id is not None:
        header["length_id"] = length_id
    if rates := join_rates(parts):
        header["rates"] = dict(rates)
    text = json.dumps(header, separators=(",", ":")).encode()
    return text, round_up(PREFIX_BYTES + len(text))


def build_tables(header: dict[str, Any], content: AnyArray, start: int, path: str) -> tuple[Tables, AnyArray]:
    """The tables that a header describes, and the order.

    Raises:
        ValueError: Fields, shards and arrays do not fit each other.
    """
    entries = {NAME_IN_TABLES.get(name, name): entry for name, entry in header["arrays"].items()}
    arrays = {name: view_array(content, start, name, entry) for name, entry in entries.items()}
    fields = tuple(_read_field(entry, header["layout"]) for entry in header["fields"])
    folder = _folder_of(path)
    shards = tuple(_read_shard(entry, folder) for entry in header["shards"])
    if len({field.name for field in fields}) < len(fields) or not any(field.tracked for field in fields):
        raise ValueError(f"fields {[field.name for field in fields]}: they must differ, and one be tracked")
    samples, variable = sum(shard.samples for shard in shards), sum(field.variable for field in fields)
    expected = dict.fromkeys(["offsets", "sizes", "crcs"], (samples, len(fields)))
    expected |= {"lengths": (samples, variable), "blocks": (len(arrays.get("blocks", ())), 1 + len(fields) + variable)}
    for name, array in arrays.items():
        if array.shape != expected.get(name, (samples,)):
            raise ValueError(f"{name} is {list(array.shape)}, with {samples} samples")
    if ("blocks" in arrays, "sizes" in arrays) != (header["layout"] == "blocks", header["layout"] == "plain"):
        raise ValueError(f"{header['layout']} with {sorted(arrays)}")
    order, length_id = arrays.pop("order"), header.get("length_id")
    if not isinstance(length_id, str | None):
        raise ValueError(f"length_id is {length_id!r}")
    rates = _read_rates(header.get("rates", {}))
    return Tables(header["layout"], fields, shards, **arrays, length_id=length_id, rates=rates), order


def _read_rates(entries: dict[str, Any]) -> Rates:
    """The rates from the header.

    Raises:
        ValueError: No writer writes such an entry.
    """
    rates = tuple((name, tuple(values)) for name, values in entries.items())
    if not all(values and all(type(rate) is int and rate > 0 for rate in values) for _, values in rates):
        raise ValueError(f"rates are {entries}")
    return rates


def _read_field(entry: dict[str, Any], layout: str) -> Field:
    """A field from the header.

    Raises:
        ValueError: No writer writes such an entry.
    """
    field = Field(**entry | {"shape": tuple(entry["shape"])})
    valid_name = isinstance(field.suffix, str) and field_of(field.suffix)[0] == field.name != "__key__"
    # Other writers' plain shards may be big-endian, and members that are not arrays have no dtype.
    plain_dtype = layout == "plain" and field.dtype.replace(">", "<") in {"", *DTYPES}
    valid_dtype = (field.dtype in DTYPES or plain_dtype) and (field.is_array or not field.dtype)
    valid_flags = {type(field.variable), type(field.tracked)} == {bool} and field.variable >= field.tracked
    valid_shape = all(type(size) is int and size >= 0 for size in field.shape)
    if not (valid_dtype and valid_name and valid_flags and valid_shape):
        raise ValueError(f"no field is {entry}")
    return field


def _read_shard(entry: dict[str, Any], folder: str) -> Shard:
    """A shard from the header.

    Raises:
        ValueError: No writer writes such an entry.
    """
    shard = Shard(**entry | {"path": _resolve(entry["path"], folder)})
    texts = all(isinstance(text, str) for text in (shard.digest, shard.fingerprint))
    counts = all(type(count) is int and count >= 0 for count in (shard.size, shard.samples))
    if not texts or not counts or "\0" in os.fsdecode(os.fsencode(shard.path)):
        raise ValueError(f"no shard is {entry}")
    return shard


def check_blocks(tables: Tables) -> None:
    """Check that every block starts behind the one before.

    Raises:
        ValueError: One does not.
    """
    blocks = tables.blocks
    if blocks is None:
        return
    starts = np.append(blocks[:, 0], len(tables.keys))
    if starts[0] != 0 or (np.diff(starts) <= 0).any() or (blocks < 0).any():
        raise ValueError("blocks do not follow each other")


def check_values(tables: Tables, order: AnyArray) -> None:
    """Check the range of values, where the file was read whole anyway.

    Raises:
        ValueError: A length or an index is out of range.
    """
    for name, array, last in (("lengths", tables.lengths, None), ("order", order, len(order) - 1)):
        if array.size and (array.min() < 0 or (last is not None and array.max() > last)):
            raise ValueError(f"{name} holds {array.min()} to {array.max()}")


def view_array(content: AnyArray, start: int, name: str, entry: dict[str, Any]) -> AnyArray:
    """One of the arrays, without a copy.

    Raises:
        ValueError: Its entry in the header is not valid.
    """
    # Compared as text, because NumPy accepts many spellings of a dtype.
    expected = {"keys": r"\|S[1-9]\d{0,8}", "order": "<i[48]"}.get(name) or re.escape(ARRAYS[name])
    offset, shape = entry["offset"], entry["shape"]
    if not re.fullmatch(expected, entry["dtype"]) or offset % _ALIGN or not 0 <= offset <= len(content):
        raise ValueError(f"{name} is {entry}")
    if not all(type(size) is int and 0 <= size <= len(content) for size in shape):
        raise ValueError(f"{name} is {entry}")
    return np.ndarray(tuple(shape), entry["dtype"], content, start + offset)


def _relate(path: str, folder: Path) -> str:
    """A shard's path relative to the index, so that a folder can be moved. URLs and other paths stay as they are."""
    if "://" in path:
        return path
    absolute = Path(path).absolute()
    return absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else str(absolute)


def _folder_of(index: str) -> str:
    """The URL or folder, with its last slash, that goes before a relative path."""
    return index.rpartition("/")[0] + "/" if "://" in index else str(Path(index).parent / "_")[:-1]


def _resolve(path: str, folder: str) -> str:
    """The path of a shard, from the path in the index.

    Raises:
        TypeError: The path is not text.
    """
    # As text: with 100,000 shards, `Path` would take most of the time of opening their index.
    if not isinstance(path, str):
        raise TypeError(f"a path is {path!r}")
    absolute = path.startswith(("/", "\\")) or path[1:2] == ":"
    return path if absolute or "://" in path else folder + path


def round_up(size: int) -> int:
    """The next multiple of 64."""
    return -(-size // _ALIGN) * _ALIGN
