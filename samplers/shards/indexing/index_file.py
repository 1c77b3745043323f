"""Index files: tables on disk, mapped into memory.

`NAME.tar.ltx` is the index of one shard, any other `NAME.ltx` that of many shards. The format is the same. All numbers
are little-endian.

| bytes | content |
|---|---|
| 0-7 | magic: 89 4C 54 58 0D 0A 1A 0A |
| 8-11 | version of the format: 1 or 2 |
| 12-15 | h, size of the header |
| 16-19 | crc32 of the header |
| 20-23 | crc32 of all bytes from a on |
| 24 to 24 + h | header: JSON in UTF-8 |
| a to the end | arrays; a is 24 + h rounded up to a multiple of 64; gaps are zeros |

The header is an object with
- `layout`: `"plain"` or `"blocks"`;
- `fields`: M objects `{name, suffix, variable, dtype, shape, tracked}`, K of them variable (see `Field`);
- `shards`: objects `{path, size, samples, digest, fingerprint}` (see `Shard`), with paths relative to the index's
  folder where possible;
- `arrays`: name to `{dtype, shape, offset}`. Offsets count from a, each is a multiple of 64. In version 1 the arrays
  are `lengths` int32 `[N, K]`, `keys` bytes `[N]` padded with zeros, `places` int64 `[N, M]` (`Tables.offsets`),
  `order` (samples by the sum of their tracked lengths, longest first, stable) int32 or int64 `[N]`, in the plain layout
  `sizes` int64 `[N, M]`, in blocks `blocks` int64 `[G, 1 + M + K]`, and `crcs` uint32 `[N, M]` if payloads were read
  (see `Tables`). Version 2, for blocks only, stores lengths, keys and offsets smaller: see `index_arrays`;
- `keys`, in version 2: `{prefix, alphabet, width}` (see `packed_keys`);
- `length_id`, if it is known: what measured the lengths of fields that are not arrays: the name of a function,
  `sound headers`, or `declared in FIELD.KEY`;
- `rates`, if they are known: for such a field its steps in a second, ascending; several if samples differ.

An index of two samples of one shard. The lengths take 2 x 4 bytes, so the keys follow at offset 64:

>>> from tempfile import TemporaryDirectory
>>> tables = Tables(
...     "plain",
...     (Field("tokens", "tokens.npy", variable=True, dtype="<i4", tracked=True),),
...     (Shard("a.tar", size=5120, samples=2, digest="", fingerprint=""),),
...     lengths=np.array([[3], [7]], "<i4"),
...     keys=np.array([b"k0", b"k1"]),
...     offsets=np.array([[512], [1536]], "<i8"),
...     sizes=np.array([[140], [156]], "<i8"),
... )
>>> with TemporaryDirectory() as folder:
...     write_index(Path(folder, "a.tar.ltx"), [tables])
...     content = Path(folder, "a.tar.ltx").read_bytes()
...     same, order = read_index(str(Path(folder, "a.tar.ltx")))
>>> magic, version, size, _, _ = _PREFIX.unpack(content[:24])
>>> {name: (entry["dtype"], entry["offset"]) for name, entry in json.loads(content[24 : 24 + size])["arrays"].items()}
{'lengths': ('<i4', 0), 'keys': ('|S2', 64), 'places': ('<i8', 128), 'sizes': ('<i8', 192), 'order': ('<i4', 256)}
>>> same.lengths.tolist(), order.tolist()
([[3], [7]], [1, 0])
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from collate.widths import check_count
from samplers.shards.format.npy import AnyArray
from samplers.shards.indexing.index_arrays import (
    StoredArray,
    check_blocks,
    check_values,
    is_derivable,
    plan_arrays,
    plan_packed_arrays,
    round_up,
)
from samplers.shards.indexing.index_header import build_tables, encode_header, read_columns
from samplers.shards.indexing.tables import Field, Layout, Rates, Shard, Tables, TablesLike, check_alike
from samplers.shards.storage.atomic import AtomicFile
from samplers.shards.storage.checksum import crc32
from samplers.shards.storage.mirror import Mirror
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.network.remote import RemoteFile
from samplers.shards.storage.network.transport import DEFAULT, Transport
from samplers.shards.storage.reading import is_remote, open_file

SUFFIX: Final = ".ltx"
# Suffix of the index of a single shard.
SHARD_SUFFIX: Final = ".tar.ltx"
# What is written, and what is read. Version 2 is for blocks; the plain layout is written in version 1.
FORMAT_VERSION: Final = 2
_VERSIONS: Final = (1, 2)
# The remedy in most messages.
REBUILD: Final = "build the index again: `lengthtrack index`, or LengthIndex.build(shards).save(path)"

_MAGIC: Final = b"\x89LTX\r\n\x1a\n"
_PREFIX: Final = struct.Struct("<8sIIII")
# Files under 1 MiB are read, not mapped: Linux gives a process about 65,000 maps.
_MAPPED_FROM: Final = 1 << 20
# Of files over 256 MiB only `verify` checks the checksum, because opening would read all of them. Each sample is still
# compared with its shard when it is read.
_CHECKED_UP_TO: Final = 1 << 28


@dataclass(frozen=True, eq=False)
class FileTables:
    """Tables in an index file whose arrays are mapped when they are used: a permanent map would keep a descriptor open.

    Attributes:
        path: Path of the file.
        prefix: Its first 24 bytes, which contain the checksums of all others.
        layout: As of `Tables`.
        fields: As of `Tables`.
        shards: As of `Tables`.
        length_id: As of `Tables`.
        rates: As of `Tables`.
        shapes: As of `Tables`.
    """

    path: str
    prefix: bytes
    layout: Layout
    fields: tuple[Field, ...]
    shards: tuple[Shard, ...]
    length_id: str | None
    rates: Rates
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

    def array(self, name: str) -> AnyArray:
        """One of the arrays, mapped.

        Raises:
            ValueError: The file was replaced since it was opened.
        """
        content = _load_content(self.path)
        _check(self.path, "it was replaced while it was read", holds=content[: _PREFIX.size].tobytes() == self.prefix)
        header, start, version = _read_index_header(content, self.path)
        return np.asarray(read_columns(header, content, start, version)[name])


def open_tables(path: str, shard: str | None = None, *, transport: Transport = DEFAULT) -> TablesLike:
    """Open an index that is to be joined with others. A large local file is not kept open.

    Args:
        path: Path of the file.
        shard: Path of its shard, if it is the index of one. None for the path in the file.
        transport: How a remote file is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is foreign, of another version, truncated or damaged.
    """
    tables, _ = read_index(path, transport=transport)
    if shard is not None and len(tables.shards) == 1:
        tables = replace(tables, shards=(replace(tables.shards[0], path=shard),))
    if "://" in path or Path(path).stat().st_size < _MAPPED_FROM:
        return tables
    # `FileTables.array` compares these bytes, in case the file is replaced in between.
    with Path(path).open("rb") as file:
        prefix = file.read(_PREFIX.size)
    parts = (tables.layout, tables.fields, tables.shards, tables.length_id, tables.rates, tables.shapes)
    return FileTables(path, prefix, *parts)


def read_index(
    path: str, checked_up_to: int | None = _CHECKED_UP_TO, *, mapped: bool = True, transport: Transport = DEFAULT
) -> tuple[Tables, AnyArray | None]:
    """The tables in an index file, and the order of its samples by length, if it is stored.

    Args:
        path: Path or URL of the file.
        checked_up_to: The checksum of the arrays is computed for files up to this size in bytes. None for all files.
        mapped: Map a large file, which keeps a descriptor open, instead of reading it.
        transport: How a remote file is read. If it is damaged, it is read once more.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is foreign, of another version, truncated or damaged.
    """
    content = _load_content(path, mapped=mapped, transport=transport)
    try:
        return _parse_index(content, path, checked_up_to)
    except ValueError:
        if not is_remote(path):
            raise
        # A network may have damaged it.
        return _parse_index(_load_content(path, mapped=mapped, transport=transport), path, checked_up_to)


def _parse_index(content: AnyArray, path: str, checked_up_to: int | None) -> tuple[Tables, AnyArray | None]:
    """The tables in the bytes of an index file, see `read_index`.

    Raises:
        ValueError: The file is foreign, of another version, truncated or damaged.
    """
    header, start, version = _read_index_header(content, path)
    checked = checked_up_to is None or len(content) <= checked_up_to
    if checked:
        _check(
            path,
            "its checksum is wrong",
            holds=crc32(content[start:].data) == _PREFIX.unpack(content[: _PREFIX.size].data)[4],
        )
    try:
        tables, order = build_tables(header, content, start, path, version)
        if tables.blocks is not None:
            check_blocks(tables.blocks, len(tables.keys))
        if checked:
            check_values(tables, order)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{shown(path)}: its header is not valid ({error!r}); {REBUILD}") from None
    return tables, order


def write_index(
    path: Path,
    parts: Sequence[TablesLike] | Callable[[], Sequence[TablesLike]],
    version: int = FORMAT_VERSION,
) -> None:
    """Write an index file of the shards of all parts, complete or not at all.

    Args:
        path: Path of the file.
        parts: At least one, or a function that lists them. It is called when this process has the lock, so that no
            other process can finish a file of this name in between.
        version: Version of the format, 1 or 2. The plain layout is always written in version 1.

    Raises:
        FileExistsError: Another process writes the file.
        ValueError: The parts cannot be joined.
    """
    file = prepare_index(path, parts, version)
    try:
        file.commit()
    except BaseException:
        file.discard()
        raise


def send_index(url: str, tables: Tables, version: int, transport: Transport) -> None:
    """Write an index file to an object store. Shards in the same folder or below it have relative paths.

    Raises:
        OSError: It cannot be sent.
        ValueError: Nothing can be written there.
    """
    folder, _, name = url.rpartition("/")
    mirror = Mirror(folder, transport)
    path = mirror.folder / name
    write_index(path, [replace(tables, shards=tuple(_near(shard, mirror) for shard in tables.shards))], version)
    mirror.push([path])


def _near(shard: Shard, mirror: Mirror) -> Shard:
    """A shard whose path is in the local folder, if its URL is in the remote one, so that it becomes relative."""
    inside = shard.path.removeprefix(f"{mirror.url}/")
    return shard if inside == shard.path else replace(shard, path=str(mirror.folder / inside))


def prepare_index(
    path: Path,
    parts: Sequence[TablesLike] | Callable[[], Sequence[TablesLike]],
    version: int = FORMAT_VERSION,
) -> AtomicFile:
    """Write an index file, as `write_index` does, that does not have its name yet.

    Raises:
        FileExistsError: Another process writes the file.
        ValueError: The parts cannot be joined.
    """
    file = AtomicFile(path)
    try:
        parts = parts() if callable(parts) else parts
        length_id = check_alike(parts)
        version = version if parts[0].layout == "blocks" else 1
        arrays, extra = _plan(parts, version, path.name)
        entries: dict[str, dict[str, Any]] = {}
        offset = 0
        for array in arrays:
            entries[array.name] = {"dtype": array.dtype, "shape": list(array.shape), "offset": offset}
            offset += round_up(math.prod(array.shape) * np.dtype(array.dtype).itemsize)
        header, start = encode_header(parts, {"arrays": entries} | extra, path.absolute().parent, length_id)
        content = _Summed(file.stream, start)
        for array in arrays:
            content.pad_to(entries[array.name]["offset"])
            for rows in array.parts():
                content.write(rows.astype(array.dtype, order="C", copy=False))
        # The prefix has the checksum of the arrays, so it comes last.
        file.stream.seek(0)
        file.stream.write(_PREFIX.pack(_MAGIC, version, len(header), crc32(header), content.crc) + header)
        file.stream.flush()
    except BaseException:
        file.discard()
        raise
    return file


def _plan(parts: Sequence[TablesLike], version: int, name: str) -> tuple[list[StoredArray], dict[str, Any]]:
    """The arrays of a file, and the entries that they need in its header."""
    if version == 1:
        return plan_arrays(parts, sort_by_length(parts)), {}
    of_shard = name.endswith(SHARD_SUFFIX) and is_derivable(parts)
    return plan_packed_arrays(parts, None if of_shard else sort_by_length(parts))


def check_version(version: int) -> int:
    """Check a version of the format that is to be written.

    Raises:
        TypeError: It is not an int.
        ValueError: It is neither 1 nor 2.
    """
    check_count("version", version, least=1, hint="1 is what release 0.1 reads, 2 is smaller")
    if version not in _VERSIONS:
        raise ValueError(f"version must be 1 or 2, got {version}: 1 is what release 0.1 reads, 2 is smaller")
    return version


def sort_by_length(parts: Sequence[TablesLike]) -> AnyArray:
    """Samples by the sum of their tracked lengths, longest first, stable: int32 `[N]`, int64 from 2**31 samples on."""
    tracked = np.flatnonzero([field.tracked for field in parts[0].fields if field.variable])
    totals = np.concatenate([part.array("lengths")[:, tracked].sum(1, dtype=np.int64) for part in parts])
    # Negated, because a reversed stable sort would reverse equal lengths.
    order = np.argsort(-totals, kind="stable")
    return order.astype("<i4" if len(order) <= np.iinfo(np.int32).max else "<i8")


class _Summed:
    """Writes from an offset on, and computes the checksum."""

    def __init__(self, stream: BinaryIO, start: int) -> None:
        self.stream, self.size, self.crc = stream, 0, 0
        stream.seek(start)

    def write(self, data: AnyArray | bytes) -> None:
        data = data if isinstance(data, bytes) else data.tobytes()
        self.stream.write(data)
        self.crc = crc32(data, self.crc)
        self.size += len(data)

    def pad_to(self, offset: int) -> None:
        """Fill up with zeros to an offset."""
        self.write(bytes(offset - self.size))


def _read_index_header(content: AnyArray, path: str) -> tuple[dict[str, Any], int, int]:
    """The header, the offset of the arrays, and the version."""
    _check(path, "it is too short: truncated", holds=len(content) >= _PREFIX.size)
    magic, version, size, crc, _ = _PREFIX.unpack(content[: _PREFIX.size].data)
    _check(path, "it is no length index, or was sent as text", holds=magic == _MAGIC)
    _check(path, f"it has version {version}, this program reads 1 and 2", holds=version in _VERSIONS)
    text = content[_PREFIX.size : _PREFIX.size + size].tobytes()
    _check(path, "its header is damaged or truncated", holds=len(text) == size and crc32(text) == crc)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    _check(path, "its header is no JSON object", holds=isinstance(header, dict))
    return header, round_up(_PREFIX.size + size), version


def _load_content(path: str, *, mapped: bool = True, transport: Transport = DEFAULT) -> AnyArray:
    """The bytes of an index file, mapped if it is local and large.

    Raises:
        FileNotFoundError: There is no such file.
    """
    try:
        file = open_file(path, transport=transport)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no index {shown(path)}: build it with `lengthtrack index`, or LengthIndex.build(shards).save(path)"
        ) from None
    if not mapped or file.size < _MAPPED_FROM or isinstance(file, RemoteFile):
        return np.frombuffer(file.read(0, file.size), np.uint8)
    return np.memmap(path, np.uint8, "r")


def _check(path: str, reason: str, *, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{shown(path)}: {reason}; {REBUILD}")
