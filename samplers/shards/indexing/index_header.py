"""The header of an index file: which arrays stand where, the fields, and the shards. `index_file` has the format."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from samplers.shards.format.npy import DTYPES, MAX_ARRAY_BYTES, AnyArray
from samplers.shards.format.samples import field_of
from samplers.shards.indexing.index_arrays import read_arrays, read_packed_arrays, round_up
from samplers.shards.indexing.tables import Field, Rates, Shard, Tables, TablesLike, join_rates
from samplers.shards.storage.untrusted import refuse_file_system

# Bytes before the header: magic, version, sizes and checksums.
PREFIX_BYTES: Final = 24


def encode_header(
    parts: Sequence[TablesLike], entries: Mapping[str, dict[str, Any]], folder: Path, length_id: str | None
) -> tuple[bytes, int]:
    """The header, and the offset of the arrays.

    Args:
        parts: The tables.
        entries: `arrays`, and in version 2 `keys`.
        folder: Folder of the index.
        length_id: Function that measured lengths.
    """
    header: dict[str, Any] = {
        "layout": parts[0].layout,
        "fields": [asdict(field) for field in parts[0].fields],
        "shards": [asdict(shard) | {"path": _relate(shard.path, folder)} for part in parts for shard in part.shards],
        **entries,
    }
    if length_id is not None:
        header["length_id"] = length_id
    if rates := join_rates(parts):
        header["rates"] = dict(rates)
    text = json.dumps(header, separators=(",", ":")).encode()
    return text, round_up(PREFIX_BYTES + len(text))


def read_columns(header: dict[str, Any], content: AnyArray, start: int, version: int) -> dict[str, Any]:
    """The arrays of an index file, by their names in `Tables`, and the order, if there is one.

    Raises:
        KeyError: An entry is missing, or has another name.
        TypeError: An entry is of another type.
        ValueError: An entry is not valid, or arrays do not fit each other.
    """
    if version == 1:
        return read_arrays(header, content, start)
    if header["layout"] != "blocks":
        raise ValueError(f"layout is {header['layout']!r} in version {version}, which is for blocks")
    return read_packed_arrays(header, content, start, _read_fields(header))


def build_tables(
    header: dict[str, Any], content: AnyArray, start: int, path: str, version: int
) -> tuple[Tables, AnyArray | None]:
    """The tables that a header describes, and the order. The index of a single shard may have none.

    Raises:
        ValueError: Fields, shards and arrays do not fit each other.
    """
    arrays, fields = read_columns(header, content, start, version), _read_fields(header)
    folder = _folder_of(path)
    shards = tuple(_read_shard(entry, folder, path) for entry in header["shards"])
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
    order = arrays.pop("order") if version == 1 else arrays.pop("order", None)
    length_id = header.get("length_id")
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


def _read_fields(header: dict[str, Any]) -> tuple[Field, ...]:
    """The fields from the header."""
    return tuple(_read_field(entry, header["layout"]) for entry in header["fields"])


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
    valid = valid_dtype and valid_name and valid_flags and valid_shape
    # Larger arrays do not exist, and their offsets would not fit 64 bits.
    if not valid or (field.dtype and field.row_bytes > MAX_ARRAY_BYTES):
        raise ValueError(f"no field is {entry}")
    return field


def _read_shard(entry: dict[str, Any], folder: str, index: str) -> Shard:
    """A shard from the header.

    Raises:
        ValueError: No writer writes such an entry.
    """
    shard = Shard(**entry | {"path": _resolve(entry["path"], folder)})
    refuse_file_system(shard.path, index)
    texts = all(isinstance(text, str) for text in (shard.digest, shard.fingerprint))
    counts = all(type(count) is int and count >= 0 for count in (shard.size, shard.samples))
    if not texts or not counts or "\0" in os.fsdecode(os.fsencode(shard.path)):
        raise ValueError(f"no shard is {entry}")
    return shard


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
