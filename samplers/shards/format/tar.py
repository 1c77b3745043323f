"""Tar files: their members found without reading what they hold, and headers that are the same bytes every time."""

import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple
from zlib import adler32

from samplers.shards.storage.reading import RandomAccess

BLOCK: Final = 512
# Two blocks of zeros end an archive.
END: Final = bytes(2 * BLOCK)

# Read together with a tar header: an array's own header, which is nearly always of 128 bytes.
_HEAD: Final = 256
# A call costs as much as reading some 10 KiB: so many bytes are read at once where headers lie no further apart.
_AHEAD: Final = 1 << 14
_REGULAR: Final = frozenset(b"\x0007")
# Links, devices, folders and pipes have no data, whatever size they claim.
_DATALESS: Final = frozenset(b"123456")
# Extensions that speak of the next member (x, L: its path and size; K: its link) or of all (g).
_EXTENSIONS: Final = frozenset(b"xgLK")
# Paths that systems take are no longer, and greater extended headers would be a hoax.
_LONGEST_NAME: Final = 4096
_LONGEST_EXTENSION: Final = 1 << 20
_SIZE: Final = re.compile(r"[0-9]{1,19}")
_LONGEST_COUNT: Final = 20
_SKIPPED: Final = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: path in the tar.
        header: all header blocks before its data, extended ones included.
        data: offset of its bytes.
        size: number of its bytes.
        head: its first bytes, up to 256.
    """

    name: str
    header: bytes
    data: int
    size: int
    head: bytes


def read_members(file: RandomAccess) -> Iterator[Member]:
    """The regular files of a tar in order, seeking over what they hold.

    Yields:
        Each file's name, place and first bytes.

    Raises:
        ValueError: The tar is compressed, damaged, truncated or sparse, or something follows its end mark; the file
            and the offset are named.
    """
    offset = start = 0
    ahead = _Ahead(file)
    named: dict[str, str] = {}
    while True:
        block = ahead.read(offset)
        if block[:1] == b"\0" and not any(block[:BLOCK]) and len(block) >= BLOCK:
            _check_end(file, offset, named)
            return
        header = block[:BLOCK]
        name, size, kind = _parse_tar_header(header, file, offset)
        data = offset + BLOCK
        size = int(named["size"]) if "size" in named and kind in _REGULAR else size
        end = data if kind in _DATALESS else data + size
        if end > file.size:
            raise ValueError(
                _damage(file, offset, f"{name!r} should end at byte {end}, the file has {file.size}: truncated")
            )
        if kind in _REGULAR:
            name = named.get("path", name)
            header = header if start == offset else file.read(start, data - start)
            yield Member(name, header, data, size, block[BLOCK : BLOCK + min(size, _HEAD)])
        elif kind in b"xL":
            records = _read_extension(file, offset, size, kind)
            # Readers differ in which of two they believe.
            if named.keys() & records.keys() & {"path", "size"}:
                raise ValueError(_damage(file, offset, "a second extended header for the same member"))
            named |= records
        elif kind == ord("S"):
            raise ValueError(_damage(file, offset, f"{name!r} is stored sparse: write the tar anew"))
        offset = data + -(-(end - data) // BLOCK) * BLOCK
        if kind not in _EXTENSIONS:
            start, named = offset, {}


def tar_header(name: str, size: int) -> bytes:
    """A ustar header of 512 bytes that says nothing of when, where or by whom it was written.

    Raises:
        ValueError: The name or the size do not fit.
    """
    info = tarfile.TarInfo(name)
    info.size = size
    block = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    # A long name is divided at a slash, and one that begins with it may lose it.
    if _name(block) != name:
        raise ValueError(f"it would read as {_name(block)!r}")
    return block


def tar_padding(size: int) -> bytes:
    """The zeros that fill a member of this size up to a whole number of tar blocks."""
    return bytes(-size % BLOCK)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case suffix of a member, or None for one that webdataset skips.

    >>> split_name("train/a.tokens.NPY")
    ('train/a', 'tokens.npy')
    """
    # The key is all before the last path segment's first dot, and its own last part must not be empty. A regular
    # expression for this takes the square of a long name's length.
    dot = name.find(".", name.rfind("/") + 1)
    before = name.rfind(".", 0, max(dot, 0))
    if dot < 1 or (before >= 0 and name.find("/", before, dot - 1) < 0) or (name[:2] == "__" and _SKIPPED.match(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()


def _check_end(file: RandomAccess, offset: int, named: dict[str, str]) -> None:
    if named:
        raise ValueError(_damage(file, offset, "an extended header, and no member after it: damaged"))
    # A hole in a file reads as zeros too, and must not end it in silence.
    while rest := file.read(offset, 1 << 16):
        if any(rest):
            raise ValueError(
                _damage(file, offset, "something follows the end mark: a hole in the file, or several archives in one")
            )
        offset += len(rest)


class _Ahead:
    """Headers of a tar and what follows them; where members are small, many are read with one call.

    Args:
        file: the tar.
    """

    def __init__(self, file: RandomAccess) -> None:
        self._file = file
        self._data, self._start = b"", -_AHEAD

    def read(self, offset: int) -> bytes:
        """Up to 768 bytes from `offset` on, offsets ascending."""
        place, wanted = offset - self._start, BLOCK + _HEAD
        if place + wanted > len(self._data):
            size = _AHEAD if place < _AHEAD else wanted
            self._data, self._start, place = self._file.read(offset, size), offset, 0
        return self._data[place : place + wanted]


def _parse_tar_header(block: bytes, file: RandomAccess, offset: int) -> tuple[str, int, int]:
    if offset == 0 and block[:2] == b"\x1f\x8b":
        raise ValueError(
            _damage(file, offset, "compressed with gzip, which cannot be read at any place: decompress it")
        )
    if len(block) < BLOCK:
        raise ValueError(_damage(file, offset, "the archive has no end mark: truncated"))
    try:
        # The sum counts its own eight bytes as spaces. Adler-32 holds the sum of all bytes, and 1, modulo 65521, and is
        # ten times faster than `sum`.
        total = _checksum(block[148:156])
        intact = adler32(block) & 0xFFFF == (total + 1) % 65521
        size = _number(block[124:136])
    except ValueError:
        intact, size = False, 0
    if not intact or size < 0:
        raise ValueError(_damage(file, offset, "not a tar header: damaged, or not a tar file"))
    return _name(block), size, block[156]


def _name(block: bytes) -> str:
    name = _decode_text(block[:100])
    return f"{_decode_text(block[345:500])}/{name}" if block[345] else name


# Sums and sizes recur from member to member, and parsing them is a third of the work on a header.
@lru_cache(maxsize=4096)
def _checksum(field: bytes) -> int:
    # The sum of all bytes of an intact header, its own eight as they are.
    return _number(field) + sum(field) - 8 * ord(" ")


@lru_cache(maxsize=4096)
def _number(field: bytes) -> int:
    # Sizes of 8 GiB and more are binary, with the first bit set.
    return int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b"\0 ") or b"0", 8)


def _decode_text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _read_extension(file: RandomAccess, offset: int, size: int, kind: int) -> dict[str, str]:
    if size > _LONGEST_EXTENSION:
        raise ValueError(_damage(file, offset, f"an extended header of {size} bytes: damaged"))
    data = file.read(offset + BLOCK, size)
    try:
        records = {"path": _decode_text(data)} if kind == ord("L") else dict(_read_records(data))
    except ValueError:
        raise ValueError(_damage(file, offset, "the extended header is damaged")) from None
    if any(name.startswith("GNU.sparse") for name in records) or not _SIZE.fullmatch(records.get("size", "0")):
        raise ValueError(_damage(file, offset, "stored sparse, or with a size that is no number: write the tar anew"))
    path = records.get("path", "")
    if len(path) > _LONGEST_NAME or "\0" in path:
        raise ValueError(_damage(file, offset, f"a name of {len(path)} characters, or with a NUL: damaged"))
    return records


def _read_records(data: bytes) -> Iterator[tuple[str, str]]:
    # Each is "LENGTH NAME=VALUE\n", the length counting itself.
    start = 0
    while start < len(data):
        end = start + int(data[start : data.index(b" ", start, start + _LONGEST_COUNT)])
        name, separator, value = data[start:end].partition(b" ")[2].partition(b"=")
        if not separator or not start < end <= len(data):
            raise ValueError("no record")
        yield name.decode(), value.removesuffix(b"\n").decode("utf-8", "surrogateescape")
        start = end


def _damage(file: RandomAccess, offset: int, reason: str) -> str:
    return f"{file.path}: at offset {offset}: {reason}"
