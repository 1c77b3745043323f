"""Tar files: their members found without reading what they hold, and headers that are the same bytes every time."""

import re
import tarfile
from collections.abc import Iterator
from typing import Final, NamedTuple
from zlib import adler32

from samplers.shards.files import RandomAccess

BLOCK: Final = 512
# Two blocks of zeros end an archive.
END: Final = bytes(2 * BLOCK)

# Read together with a tar header: an array's own header, which is nearly always of 128 bytes.
_HEAD: Final = 256
_REGULAR: Final = frozenset(b"\x0007")
# Links, devices, folders and pipes have no data, whatever size they claim.
_DATALESS: Final = frozenset(b"123456")
# Extensions that speak of the next member (x, L: its path and size; K: its link) or of all (g).
_EXTENSIONS: Final = frozenset(b"xgLK")
_NAME: Final = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
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
        ValueError: The tar is compressed, damaged, truncated or sparse; the file and the offset are named.
    """
    offset = start = 0
    named: dict[str, str] = {}
    while True:
        block = file.read(offset, BLOCK + _HEAD)
        if block[:1] == b"\0" and not any(block[:BLOCK]) and len(block) >= BLOCK:
            return
        name, size, kind = _read_header(block[:BLOCK], file, offset)
        data = offset + BLOCK
        size = int(named.get("size", size)) if kind in _REGULAR else size
        end = data if kind in _DATALESS else data + size
        if end > file.size:
            raise ValueError(
                _damage(file, offset, f"{name!r} should end at byte {end}, the file has {file.size}: truncated")
            )
        if kind in _REGULAR:
            name = named.get("path", name)
            header = block[:BLOCK] if start == offset else file.read(start, data - start)
            yield Member(name, header, data, size, block[BLOCK : BLOCK + min(size, _HEAD)])
        elif kind in b"xL":
            named |= _read_extension(file.read(data, size), kind, file, offset)
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
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


def tar_padding(size: int) -> bytes:
    """The zeros that fill a member of this size up to a whole number of tar blocks."""
    return bytes(-size % BLOCK)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case suffix of a member, or None for one that webdataset skips.

    >>> split_name("train/a.tokens.NPY")
    ('train/a', 'tokens.npy')
    """
    found = None if name[:2] == "__" and _SKIPPED.match(name) else _NAME.fullmatch(name)
    return None if found is None else (found[1], found[2].lower())


def _read_header(block: bytes, file: RandomAccess, offset: int) -> tuple[str, int, int]:
    if offset == 0 and block[:2] == b"\x1f\x8b":
        raise ValueError(
            _damage(file, offset, "compressed with gzip, which cannot be read at any place: decompress it")
        )
    if len(block) < BLOCK:
        raise ValueError(_damage(file, offset, "the archive has no end mark: truncated"))
    try:
        # The sum counts its own eight bytes as spaces. Adler-32 holds the sum of all bytes, and 1, modulo 65521, and is
        # ten times faster than `sum`.
        total = _number(block[148:156]) + sum(block[148:156]) - 8 * ord(" ")
        intact = adler32(block) & 0xFFFF == (total + 1) % 65521
        size = _number(block[124:136])
    except ValueError:
        intact, size = False, 0
    if not intact or size < 0:
        raise ValueError(_damage(file, offset, "not a tar header: damaged, or not a tar file"))
    name = _text(block[:100])
    return f"{_text(block[345:500])}/{name}" if block[345] else name, size, block[156]


def _number(field: bytes) -> int:
    # Sizes of 8 GiB and more are binary, with the first bit set.
    return int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b"\0 ") or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _read_extension(data: bytes, kind: int, file: RandomAccess, offset: int) -> dict[str, str]:
    if kind == ord("L"):
        return {"path": _text(data)}
    try:
        records = dict(_read_records(data))
    except ValueError:
        raise ValueError(_damage(file, offset, "the extended header is damaged")) from None
    if any(name.startswith("GNU.sparse") for name in records) or not records.get("size", "0").isdecimal():
        raise ValueError(_damage(file, offset, "stored sparse, or with a size that is no number: write the tar anew"))
    return records


def _read_records(data: bytes) -> Iterator[tuple[str, str]]:
    # Each is "LENGTH NAME=VALUE\n", the length counting itself.
    while data:
        length = int(data[: data.index(b" ")])
        name, separator, value = data[:length].partition(b" ")[2].partition(b"=")
        if not separator or length > len(data):
            raise ValueError("no record")
        yield name.decode(), value.removesuffix(b"\n").decode("utf-8", "surrogateescape")
        data = data[length:]


def _damage(file: RandomAccess, offset: int, reason: str) -> str:
    return f"{file.path}: at offset {offset}: {reason}"
