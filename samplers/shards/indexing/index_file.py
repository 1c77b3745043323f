"""Index files: tables on disk, mapped into memory.

The file `NAME.tar.ltx` holds one shard's index, any other `NAME.ltx` those of many shards; the format is the same. All
numbers are little-endian.

| bytes | what |
|---|---|
| 0-7 | magic: 89 4C 54 58 0D 0A 1A 0A |
| 8-11 | version of the format: 1 |
| 12-15 | h, size of the header |
| 16-19 | crc32 of the header |
| 20-23 | crc32 of all bytes from a on |
| 24 to 24 + h | header: JSON in UTF-8 |
| a to the end | arrays; a is 24 + h rounded up to a multiple of 64, zeros fill gaps |

The header is an object with
- `layout`: `"plain"` or `"blocks"`;
- `fields`: M objects `{name, suffix, variable, dtype, shape, tracked}`, K of them variable (see `Field`);
- `shards`: objects `{path, size, samples, digest, fingerprint}` (see `Shard`), paths relative to the index's own
  folder where they can be;
- `arrays`: name to `{dtype, shape, offset}`, offsets counted from a, each a multiple of 64. There are `lengths` int32
  `[N, K]`, `keys` bytes `[N]` padded with zeros, `places` int64 `[N, M]`, `order` (samples by the sum of their tracked
  lengths, longest first, stable) int32 or int64 `[N]`, in the plain layout `sizes` int64 `[N, M]`, in blocks `blocks`
  int64 `[G, 1 + M + K]`, and `crcs` uint32 `[N, M]` where payloads were read (see `Tables`);
- `length_id`, where it is known: which function measured the lengths of fields that are no arrays.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final
from zlib import crc32

import numpy as np

from samplers.shards.format.samples import DTYPES, field_of
from samplers.shards.indexing.tables import (
    ARRAYS,
    Array,
    Field,
    Layout,
    Shard,
    Tables,
    TablesLike,
    check_alike,
    concat_column,
    key_width,
)
from samplers.shards.storage.atomic import AtomicFile
from samplers.shards.storage.reading import open_file
from samplers.shards.storage.remote import RemoteFile

SUFFIX: Final = ".ltx"
FORMAT_VERSION: Final = 1
# The way out of most errors: an index can always be made again.
REBUILD: Final = "build the index again with LengthIndex.build(shards).save(path)"

_MAGIC: Final = b"\x89LTX\r\n\x1a\n"
_PREFIX: Final = struct.Struct("<8sIIII")
_ALIGN: Final = 64
# Smaller files are read instead of mapped: a process may hold only some 65,000 maps.
_MAPPED_FROM: Final = 1 << 20
# Greater files are checked by `verify` alone, or opening would read them whole; each sample is still held against its
# shard when it is read.
_CHECKED_UP_TO: Final = 1 << 28


@dataclass(frozen=True, eq=False)
class FileTables:
    """An index file whose arrays are read when they are asked for: a map of it would hold a descriptor all the time.

    Attributes:
        path: of the file.
        prefix: its first bytes, which hold the checksums of all others.
        layout, fields, shards, length_id, shapes: what it says, as of `Tables`.
    """

    path: str
    prefix: bytes
    layout: Layout
    fields: tuple[Field, ...]
    shards: tuple[Shard, ...]
    length_id: str | None
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

    def array(self, name: str) -> Array:
        """One of the arrays, mapped.

        Raises:
            ValueError: The file was replaced since it was opened.
        """
        content = _load_content(self.path)
        _check(self.path, "it was replaced while it was read", holds=content[: _PREFIX.size].tobytes() == self.prefix)
        header, start = _read_index_header(content, self.path)
        return _view(content, start, name, header["arrays"][name])


def open_tables(path: str, shard: str | None = None) -> TablesLike:
    """An index to be joined with others: a large local file is not kept open.

    Args:
        path: of the file.
        shard: where its shard is, if it is of one alone; None for what the file says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is foreign, of another version, truncated or damaged.
    """
    tables, _ = read_index(path)
    if shard is not None and len(tables.shards) == 1:
        tables = replace(tables, shards=(replace(tables.shards[0], path=shard),))
    if "://" in path or Path(path).stat().st_size < _MAPPED_FROM:
        return tables
    with Path(path).open("rb") as file:
        prefix = file.read(_PREFIX.size)
    return FileTables(path, prefix, tables.layout, tables.fields, tables.shards, tables.length_id, tables.shapes)


def read_index(path: str, checked_up_to: int | None = _CHECKED_UP_TO, *, mapped: bool = True) -> tuple[Tables, Array]:
    """The tables in an index file, and the order of its samples by length.

    Args:
        path: of the file.
        checked_up_to: size in bytes up to which the checksum of the arrays is computed; None for all.
        mapped: map a large file, which holds a descriptor, instead of reading it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is foreign, of another version, truncated or damaged.
    """
    content = _load_content(path, mapped=mapped)
    header, start = _read_index_header(content, path)
    checked = checked_up_to is None or len(content) <= checked_up_to
    if checked:
        _check(
            path,
            "its checksum is wrong",
            holds=crc32(content[start:].data) == _PREFIX.unpack(content[: _PREFIX.size].data)[4],
        )
    try:
        tables, order = _build_tables(header, content, start, path)
        _check_blocks(tables)
        if checked:
            _check_values(tables, order)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its header does not say what it must ({error!r}); {REBUILD}") from None
    return tables, order


def write_index(path: Path, parts: Sequence[TablesLike] | Callable[[], Sequence[TablesLike]]) -> None:
    """Write an index file of the shards of all parts, part by part, whole or not at all.

    Args:
        path: of the file.
        parts: at least one, or what finds them: it is called when nobody else can finish a file of this name.

    Raises:
        FileExistsError: Another process writes the file.
        ValueError: The parts cannot be joined.
    """
    file = AtomicFile(path)
    try:
        parts = parts() if callable(parts) else parts
        length_id = check_alike(parts)
        order = sort_by_length(parts)
        layout = _lay_out(parts, order)
        header, start = _encode_header(parts, layout, path.absolute().parent, length_id)
        content = _Summed(file.stream, start)
        for name, entry in layout.items():
            content.pad_to(entry["offset"])
            for array in [order] if name == "order" else concat_column(parts, name):
                content.write(array.astype(entry["dtype"], order="C"))
        file.stream.seek(0)
        file.stream.write(_PREFIX.pack(_MAGIC, FORMAT_VERSION, len(header), crc32(header), content.crc) + header)
        file.commit()
    except BaseException:
        file.discard()
        raise


def sort_by_length(parts: Sequence[TablesLike]) -> Array:
    """Samples by the sum of their tracked lengths, longest first, stable: int32 `[N]`, int64 for very many."""
    tracked = np.flatnonzero([field.tracked for field in parts[0].fields if field.variable])
    totals = np.concatenate([part.array("lengths")[:, tracked].sum(1, dtype=np.int64) for part in parts])
    order = np.argsort(-totals, kind="stable")
    return order.astype("<i4" if len(order) <= np.iinfo(np.int32).max else "<i8")


class _Summed:
    """What is written from `start` on, with its checksum."""

    def __init__(self, stream: BinaryIO, start: int) -> None:
        self.stream, self.size, self.crc = stream, 0, 0
        stream.seek(start)

    def write(self, data: Array | bytes) -> None:
        data = data if isinstance(data, bytes) else data.tobytes()
        self.stream.write(data)
        self.crc = crc32(data, self.crc)
        self.size += len(data)

    def pad_to(self, offset: int) -> None:
        self.write(bytes(offset - self.size))


def _lay_out(parts: Sequence[TablesLike], order: Array) -> dict[str, dict[str, Any]]:
    """Dtype, shape and offset of each array in the file."""
    layout, offset = {}, 0
    for name, (_, shape) in (parts[0].shapes | {"order": (order.dtype, order.shape)}).items():
        rows = len(order) if name == "order" else sum(part.shapes[name][1][0] for part in parts)
        dtype = {"keys": f"|S{key_width(parts)}", "order": order.dtype.str}.get(name) or ARRAYS[name]
        layout[name] = {"dtype": dtype, "shape": [rows, *shape[1:]], "offset": offset}
        offset += _aligned(math.prod([rows, *shape[1:]]) * np.dtype(dtype).itemsize)
    return layout


def _encode_header(
    parts: Sequence[TablesLike], layout: dict[str, dict[str, Any]], folder: Path, length_id: str | None
) -> tuple[bytes, int]:
    """The header, and where the arrays begin."""
    header: dict[str, Any] = {
        "layout": parts[0].layout,
        "fields": [asdict(field) for field in parts[0].fields],
        "shards": [asdict(shard) | {"path": _relate(shard.path, folder)} for part in parts for shard in part.shards],
        "arrays": layout,
    }
    if length_id is not None:
        header["length_id"] = length_id
    text = json.dumps(header, separators=(",", ":")).encode()
    return text, _aligned(_PREFIX.size + len(text))


def _read_index_header(content: Array, path: str) -> tuple[dict[str, Any], int]:
    """The header, and where the arrays begin."""
    _check(path, "it is too short: truncated", holds=len(content) >= _PREFIX.size)
    magic, version, size, crc, _ = _PREFIX.unpack(content[: _PREFIX.size].data)
    _check(path, "it is no length index, or was sent as text", holds=magic == _MAGIC)
    _check(path, f"it has version {version}, this program reads {FORMAT_VERSION}", holds=version == FORMAT_VERSION)
    text = content[_PREFIX.size : _PREFIX.size + size].tobytes()
    _check(path, "its header is damaged or truncated", holds=len(text) == size and crc32(text) == crc)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    _check(path, "its header is no JSON object", holds=isinstance(header, dict))
    return header, _aligned(_PREFIX.size + size)


def _build_tables(header: dict[str, Any], content: Array, start: int, path: str) -> tuple[Tables, Array]:
    arrays = {name: _view(content, start, name, entry) for name, entry in header["arrays"].items()}
    fields = tuple(_read_field(entry, header["layout"]) for entry in header["fields"])
    folder = _folder_of(path)
    shards = tuple(_read_shard(entry, folder) for entry in header["shards"])
    if len({field.name for field in fields}) < len(fields) or not any(field.tracked for field in fields):
        raise ValueError(f"fields {[field.name for field in fields]}: they must differ, and one be tracked")
    samples, known = sum(shard.samples for shard in shards), sum(field.variable for field in fields)
    expected = dict.fromkeys(["places", "sizes", "crcs"], (samples, len(fields)))
    expected |= {"lengths": (samples, known), "blocks": (len(arrays.get("blocks", ())), 1 + len(fields) + known)}
    for name, array in arrays.items():
        if array.shape != expected.get(name, (samples,)):
            raise ValueError(f"{name} is {list(array.shape)}, with {samples} samples")
    if ("blocks" in arrays, "sizes" in arrays) != (header["layout"] == "blocks", header["layout"] == "plain"):
        raise ValueError(f"{header['layout']} with {sorted(arrays)}")
    order, length_id = arrays.pop("order"), header.get("length_id")
    if not isinstance(length_id, str | None):
        raise ValueError(f"length_id is {length_id!r}")
    return Tables(header["layout"], fields, shards, **arrays, length_id=length_id), order


def _read_field(entry: dict[str, Any], layout: str) -> Field:
    field = Field(**entry | {"shape": tuple(entry["shape"])})
    known = field.dtype in DTYPES or (layout == "plain" and field.dtype.replace(">", "<") in {"", *DTYPES})
    named = isinstance(field.suffix, str) and field_of(field.suffix)[0] == field.name != "__key__"
    known &= field.is_array or not field.dtype
    flags = {type(field.variable), type(field.tracked)} == {bool} and field.variable >= field.tracked
    if not (known and named and flags and all(type(size) is int and size >= 0 for size in field.shape)):
        raise ValueError(f"no field is {entry}")
    return field


def _read_shard(entry: dict[str, Any], folder: str) -> Shard:
    shard = Shard(**entry | {"path": _resolve(entry["path"], folder)})
    texts = all(isinstance(text, str) for text in (shard.digest, shard.fingerprint))
    counts = all(type(count) is int and count >= 0 for count in (shard.size, shard.samples))
    if not texts or not counts or "\0" in os.fsdecode(os.fsencode(shard.path)):
        raise ValueError(f"no shard is {entry}")
    return shard


def _check_blocks(tables: Tables) -> None:
    blocks = tables.blocks
    if blocks is None:
        return
    starts = np.append(blocks[:, 0], len(tables.keys))
    if starts[0] != 0 or (np.diff(starts) <= 0).any() or (blocks < 0).any():
        raise ValueError("blocks do not follow each other")


def _check_values(tables: Tables, order: Array) -> None:
    # Only where the file was read whole anyway.
    for name, array, last in (("lengths", tables.lengths, None), ("order", order, len(order) - 1)):
        if array.size and (array.min() < 0 or (last is not None and array.max() > last)):
            raise ValueError(f"{name} holds {array.min()} to {array.max()}")


def _load_content(path: str, *, mapped: bool = True) -> Array:
    # Mapped if it is local and large.
    try:
        file = open_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no index {path}: build it with LengthIndex.build(shards).save(path)") from None
    if not mapped or file.size < _MAPPED_FROM or isinstance(file, RemoteFile):
        return np.frombuffer(file.read(0, file.size), np.uint8)
    return np.memmap(path, np.uint8, "r")


def _view(content: Array, start: int, name: str, entry: dict[str, Any]) -> Array:
    # Compared as text, for NumPy takes much for a dtype.
    expected = {"keys": r"\|S[1-9]\d{0,8}", "order": "<i[48]"}.get(name) or re.escape(ARRAYS[name])
    offset, shape = entry["offset"], entry["shape"]
    if not re.fullmatch(expected, entry["dtype"]) or offset % _ALIGN or not 0 <= offset <= len(content):
        raise ValueError(f"{name} is {entry}")
    if not all(type(size) is int and 0 <= size <= len(content) for size in shape):
        raise ValueError(f"{name} is {entry}")
    return np.ndarray(tuple(shape), entry["dtype"], content, start + offset)


def _relate(path: str, folder: Path) -> str:
    # As seen from the index, so that a folder can be moved; URLs and files elsewhere keep their whole name.
    if "://" in path:
        return path
    absolute = Path(path).absolute()
    return absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else str(absolute)


def _folder_of(index: str) -> str:
    """What a shard's relative path follows: a URL or a folder, up to the last slash, or nothing."""
    return index.rpartition("/")[0] + "/" if "://" in index else str(Path(index).parent / "_")[:-1]


def _resolve(path: str, folder: str) -> str:
    # By text alone: of 100,000 shards, paths would take most of the time of opening their index.
    absolute = str.startswith(path, ("/", "\\")) or path[1:2] == ":"
    return path if absolute or "://" in path else folder + path


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _check(path: str, reason: str, *, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{path}: {reason}; {REBUILD}")
