"""Tar files: find members without reading their data, and write headers that are the same bytes every time.

A tar is a sequence of records of 512 bytes: for each member a header, then its data, padded to whole records; at the
end two records of zeros. A member of 600 bytes therefore takes 3 records:

>>> len(tar_header("a.x", 600)) + 600 + len(tar_padding(600))
1536
"""

import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple
from zlib import adler32

from samplers.shards.format.keys import decode_key
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.reading import RandomAccess

RECORD: Final = 512
# Two records of zeros end an archive.
END: Final = bytes(2 * RECORD)

# Bytes of data that are read together with a tar header: they contain the header of an array, mostly 128 bytes.
_HEAD: Final = 256
# A call costs as much as reading 10 KiB. So 16 KiB are read at once where headers are closer together than that.
_AHEAD: Final = 1 << 14
_REGULAR: Final = frozenset(b"\x0007")
# Types of links, devices, folders and pipes, which have no data, whatever size their header claims.
_DATALESS: Final = frozenset(b"123456")
# Types of extended headers: for the next member (x, L: its path and size; K: its link) or for all (g).
_EXTENSIONS: Final = frozenset(b"xgLK")
# No system takes longer paths. No valid extended header is larger: reject it, before it is read.
_LONGEST_NAME: Final = 4096
_LONGEST_EXTENSION: Final = 1 << 20
_SIZE: Final = re.compile(r"[0-9]{1,19}")
# Digits of the length of a record in an extended header.
_LONGEST_COUNT: Final = 20
# Names that webdataset skips, such as `__pax__`.
_SKIPPED: Final = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: Path in the tar.
        header: All header records before its data, with extended headers.
        data: Offset of its data.
        size: Bytes of its data.
        head: The first bytes of its data, up to 256.
    """

    name: str
    header: bytes
    data: int
    size: int
    head: bytes


def read_members(file: RandomAccess) -> Iterator[Member]:
    """The regular files of a tar in order. Their data is skipped.

    Yields:
        Name, offset and first bytes of each file.

    Raises:
        ValueError: The tar is compressed, damaged, truncated or sparse, or data follows its end mark. The message has
            the file and the offset.
    """
    offset = start = 0
    ahead = _Ahead(file)
    # Path and size of the next member, from its extended header.
    extension: dict[str, str] = {}
    while True:
        content = ahead.read(offset)
        if content[:1] == b"\0" and not any(content[:RECORD]) and len(content) >= RECORD:
            _check_end(file, offset, extension)
            return
        header = content[:RECORD]
        name, size, kind = _parse_tar_header(header, file, offset)
        data = offset + RECORD
        size = int(extension["size"]) if "size" in extension and kind in _REGULAR else size
        end = data if kind in _DATALESS else data + size
        if end > file.size:
            raise ValueError(
                _damage(file, offset, f"{name!r} should end at byte {end}, the file has {file.size}: truncated")
            )
        if kind in _REGULAR:
            name = extension.get("path", name)
            header = header if start == offset else file.read(start, data - start)
            yield Member(name, header, data, size, content[RECORD : RECORD + min(size, _HEAD)])
        elif kind in b"xL":
            records = _read_extension(file, offset, size, kind)
            # Of two extended headers, some readers use the first and some the second.
            if extension.keys() & records.keys() & {"path", "size"}:
                raise ValueError(_damage(file, offset, "a second extended header for the same member"))
            extension |= records
        elif kind == ord("S"):
            raise ValueError(_damage(file, offset, f"{name!r} is stored sparse: write the tar again"))
        offset = data + -(-(end - data) // RECORD) * RECORD
        if kind not in _EXTENSIONS:
            start, extension = offset, {}


def tar_header(name: str, size: int) -> bytes:
    """A ustar header of 512 bytes without time, owner or machine: the same bytes every time.

    Raises:
        ValueError: The name or the size do not fit.
    """
    info = tarfile.TarInfo(name)
    info.size = size
    header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    # A name over 100 bytes is split at a slash. A slash at its start can get lost then.
    if _name(header) != name:
        raise ValueError(f"it would read as {_name(header)!r}")
    return header


def tar_padding(size: int) -> bytes:
    """The zeros that fill the data of a member up to whole records."""
    return bytes(-size % RECORD)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case suffix of a member, or None for one that webdataset skips.

    >>> split_name("train/a.tokens.NPY")
    ('train/a', 'tokens.npy')
    """
    # The key ends at the first dot of the last path segment, and the key's last segment must not be empty. A regular
    # expression for this takes quadratic time in the length of the name.
    dot = name.find(".", name.rfind("/") + 1)
    before = name.rfind(".", 0, max(dot, 0))
    if dot < 1 or (before >= 0 and name.find("/", before, dot - 1) < 0) or (name[:2] == "__" and _SKIPPED.match(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()


def _check_end(file: RandomAccess, offset: int, extension: dict[str, str]) -> None:
    """Check that only zeros follow the end mark.

    Raises:
        ValueError: Something follows, or an extended header has no member.
    """
    if extension:
        raise ValueError(_damage(file, offset, "an extended header, and no member after it: damaged"))
    # A hole in a file also reads as zeros. Ending there would lose the members behind it in silence.
    while content := file.read(offset, 1 << 16):
        if any(content):
            raise ValueError(
                _damage(file, offset, "something follows the end mark: a hole in the file, or several archives in one")
            )
        offset += len(content)


class _Ahead:
    """Reads headers of a tar and the bytes behind them. Where members are small, one call reads many of them.

    Args:
        file: The tar.
    """

    def __init__(self, file: RandomAccess) -> None:
        self._file = file
        self._data, self._start = b"", -_AHEAD

    def read(self, offset: int) -> bytes:
        """Up to 768 bytes from `offset` on. Offsets must ascend."""
        first, size = offset - self._start, RECORD + _HEAD
        if first + size > len(self._data):
            at_once = _AHEAD if first < _AHEAD else size
            self._data, self._start, first = self._file.read(offset, at_once), offset, 0
        return self._data[first : first + size]


def _parse_tar_header(header: bytes, file: RandomAccess, offset: int) -> tuple[str, int, int]:
    """Name, size and type of a member.

    Raises:
        ValueError: It is not the header of a member.
    """
    if offset == 0 and header[:2] == b"\x1f\x8b":
        raise ValueError(
            _damage(file, offset, "compressed with gzip, which cannot be read at any offset: decompress it")
        )
    if len(header) < RECORD:
        raise ValueError(_damage(file, offset, "the archive has no end mark: truncated"))
    try:
        # A header stores the sum of its bytes, with the 8 bytes of that field counted as spaces. The low half of
        # Adler-32 is 1 + the sum of all bytes, modulo 65521, ten times faster than `sum`:
        # of b"ab" it is 1 + 97 + 98 = 196.
        total = _checksum(header[148:156])
        intact = adler32(header) & 0xFFFF == (total + 1) % 65521
        size = _number(header[124:136])
    except ValueError:
        intact, size = False, 0
    if not intact or size < 0:
        raise ValueError(_damage(file, offset, "not a tar header: damaged, or not a tar file"))
    return _name(header), size, header[156]


def _name(header: bytes) -> str:
    """The path in a header: the name, behind a prefix if there is one."""
    name = _decode_text(header[:100])
    return f"{_decode_text(header[345:500])}/{name}" if header[345] else name


# Sums and sizes recur from member to member, and parsing them is a third of the work on a header.
@lru_cache(maxsize=4096)
def _checksum(field: bytes) -> int:
    """The sum of all bytes of an intact header, from its field of the sum."""
    return _number(field) + sum(field) - 8 * ord(" ")


@lru_cache(maxsize=4096)
def _number(field: bytes) -> int:
    """An integer in a field of a header."""
    # Octal text. Sizes of 8 GiB and more do not fit, and are binary, with the first bit set.
    return int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b"\0 ") or b"0", 8)


def _decode_text(field: bytes) -> str:
    """The text in a field of a header, up to the first NUL."""
    return decode_key(field.partition(b"\0")[0])


def _read_extension(file: RandomAccess, offset: int, size: int, kind: int) -> dict[str, str]:
    """The records of an extended header: path and size of the next member.

    Raises:
        ValueError: It is damaged, or the member is stored sparse.
    """
    if size > _LONGEST_EXTENSION:
        raise ValueError(_damage(file, offset, f"an extended header of {size} bytes: damaged"))
    data = file.read(offset + RECORD, size)
    try:
        records = {"path": _decode_text(data)} if kind == ord("L") else dict(_read_records(data))
    except ValueError:
        raise ValueError(_damage(file, offset, "the extended header is damaged")) from None
    if any(name.startswith("GNU.sparse") for name in records) or not _SIZE.fullmatch(records.get("size", "0")):
        raise ValueError(_damage(file, offset, "stored sparse, or with a size that is no number: write the tar again"))
    path = records.get("path", "")
    if len(path) > _LONGEST_NAME or "\0" in path:
        raise ValueError(_damage(file, offset, f"a name of {len(path)} characters, or with a NUL: damaged"))
    return records


def _read_records(data: bytes) -> Iterator[tuple[str, str]]:
    r"""The records of a pax header. Each is "LENGTH NAME=VALUE\n", and the length counts itself.

    >>> dict(_read_records(b"12 path=a.x\n"))
    {'path': 'a.x'}

    Yields:
        Name and value.

    Raises:
        ValueError: A record is damaged.
    """
    start = 0
    while start < len(data):
        end = start + int(data[start : data.index(b" ", start, start + _LONGEST_COUNT)])
        name, separator, value = data[start:end].partition(b" ")[2].partition(b"=")
        if not separator or not start < end <= len(data):
            raise ValueError("no record")
        yield name.decode(), decode_key(value.removesuffix(b"\n"))
        start = end


def _damage(file: RandomAccess, offset: int, reason: str) -> str:
    """A message with the file and the offset."""
    return f"{shown(file.path)}: at offset {offset}: {reason}"
