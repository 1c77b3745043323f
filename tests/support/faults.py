"""Damage: what disks, networks and attackers make of shards and indexes, drawn from a seeded generator.

A mutator takes a generator and a file's bytes and gives other bytes; those of one group know the format, and repair the
checksums of what they change, as somebody would who means harm.
"""

import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any
from zlib import crc32

import numpy as np
from numpy.random import Generator

Mutator = Callable[[Generator, bytes], bytes]

BLOCK = 512
END = bytes(2 * BLOCK)
# Numbers at which programs break.
ODD_NUMBERS = [-1, 0, 1, 2, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64, 10**30]
ODD_VALUES: list[Any] = [
    *ODD_NUMBERS,
    1.5,
    float("inf"),
    None,
    True,
    "",
    "\0",
    "x",
    "../x",
    "|O",
    "<i8",
    ">f4",
    "S9",
    [],
    {},
    [[]],
]


# --- tars, member by member


def npy(value: object) -> bytes:
    """A value as NumPy saves it, objects as pickles among them."""
    file = io.BytesIO()
    np.save(file, np.asarray(value))
    return file.getvalue()


def npy_of(header: str, payload: bytes = b"") -> bytes:
    """An array's file with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + payload


def claim(shape: str, dtype: str = "<i8", payload: bytes = b"") -> bytes:
    """An array's file that claims a shape."""
    return npy_of(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}", payload)


def tar_of(members: Iterable[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of these members, one by one; a name may come more than once."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def header_of(name: str, size: int, kind: bytes = b"0", link: str = "") -> bytes:
    """A tar header of any type."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.USTAR_FORMAT)


def sealed(header: bytes) -> bytes:
    """The same tar header with a checksum that fits."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def take_apart(content: bytes) -> list[tuple[bytes, bytes]]:
    """Header and data of each member of an intact tar, extended headers as members of their own."""
    parts, offset = [], 0
    while any(header := content[offset : offset + BLOCK]):
        size = int(header[124:135], 8)
        parts.append((header, content[offset + BLOCK : offset + BLOCK + size]))
        offset += BLOCK + -(-size // BLOCK) * BLOCK
    return parts


def put_together(parts: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A tar of these members."""
    return b"".join(header + data + bytes(-len(data) % BLOCK) for header, data in parts) + END


def resized(header: bytes, size: int) -> bytes:
    """The same tar header with another size, octal where it fits and binary where not."""
    field = b"%011o\0" % size if 0 <= size < 8**11 else b"\x80" + (size % 2**88).to_bytes(11, "big")
    return sealed(header[:124] + field + header[136:])


def pax(records: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """An extended header that says these things of the next member."""
    data = b"".join(_record(f" {name}={value}\n".encode("utf-8", "surrogateescape")) for name, value in records.items())
    return [(header_of("x", len(data), b"x"), data)]


def _record(rest: bytes) -> bytes:
    size = len(rest)
    while len(str(size)) + len(rest) != size:
        size = len(str(size)) + len(rest)
    return str(size).encode() + rest


# --- blind mutators


def flip_bits(rng: Generator, content: bytes) -> bytes:
    """One to four bits are others, all in the first tenth one time in two, where headers are."""
    data = bytearray(content)
    size = len(data) if rng.random() < 0.5 else max(1, len(data) // 10)
    for offset in rng.integers(0, size, rng.integers(1, 5)).tolist():
        data[offset] ^= 1 << int(rng.integers(8))
    return bytes(data)


def cut(rng: Generator, content: bytes) -> bytes:
    """The end is missing, or a piece of the middle."""
    first, last = np.sort(rng.integers(0, len(content) + 1, 2)).tolist()
    return content[:first] if rng.random() < 0.6 else content[:first] + content[last:]


def cut_blocks(rng: Generator, content: bytes) -> bytes:
    """Whole tar blocks are missing, or came twice."""
    first, last = (np.sort(rng.integers(0, len(content) // BLOCK + 1, 2)) * BLOCK).tolist()
    return content[:first] + content[last:] if rng.random() < 0.5 else content[:last] + content[first:]


def splice(rng: Generator, content: bytes) -> bytes:
    """A piece lies over another place."""
    first, last, to = rng.integers(0, len(content), 3).tolist()
    piece = content[first : max(last, first + 1)][:4096]
    return content[:to] + piece + content[to + len(piece) :]


def overwrite(rng: Generator, content: bytes) -> bytes:
    """Some bytes are all zeros, all ones, or anything."""
    offset, size = int(rng.integers(len(content))), int(rng.choice([1, 2, 4, 8, 12, 64, 512, 4096]))
    new = [bytes(size), b"\xff" * size, rng.bytes(size)][rng.integers(3)]
    return (content[:offset] + new + content[offset + size :])[: len(content)]


def grow(rng: Generator, content: bytes) -> bytes:
    """Something follows the end."""
    return content + [bytes(1), bytes(512), rng.bytes(700), content][rng.integers(4)]


BLIND: list[Mutator] = [flip_bits, cut, cut_blocks, splice, overwrite, grow]


# --- mutators that know tars


def drop_member(rng: Generator, content: bytes) -> bytes:
    """A member is missing."""
    parts = take_apart(content)
    del parts[rng.integers(len(parts))]
    return put_together(parts)


def repeat_member(rng: Generator, content: bytes) -> bytes:
    """A member comes again somewhere."""
    parts = take_apart(content)
    parts.insert(int(rng.integers(len(parts) + 1)), parts[rng.integers(len(parts))])
    return put_together(parts)


def swap_members(rng: Generator, content: bytes) -> bytes:
    """Two members, or what they hold, have changed places."""
    parts = take_apart(content)
    a, b = rng.integers(0, len(parts), 2).tolist()
    if rng.random() < 0.5:
        parts[a], parts[b] = parts[b], parts[a]
    else:
        (head, data), (other, rest) = parts[a], parts[b]
        parts[a], parts[b] = (resized(head, len(rest)), rest), (resized(other, len(data)), data)
    return put_together(parts)


def resize_member(rng: Generator, content: bytes) -> bytes:
    """A header claims another size."""
    parts = take_apart(content)
    index = int(rng.integers(len(parts)))
    header, data = parts[index]
    size = int(rng.choice([len(data) - 1, len(data) + 1, len(data) + BLOCK])) if rng.random() < 0.5 else _odd(rng)
    parts[index] = resized(header, size), data
    return put_together(parts)


def retype_member(rng: Generator, content: bytes) -> bytes:
    """A member is a link, a folder, a device, sparse, or an extended header."""
    parts = take_apart(content)
    index = int(rng.integers(len(parts)))
    header, data = parts[index]
    kind = rng.choice(list(b"\x00123456789xgLKSDMNVAZ\xff"))
    parts[index] = sealed(header[:156] + bytes([kind]) + header[157:]), data
    return put_together(parts)


def rename_member(rng: Generator, content: bytes) -> bytes:
    """A member has an awkward name, or another's."""
    parts = take_apart(content)
    index = int(rng.integers(len(parts)))
    header, data = parts[index]
    other = parts[rng.integers(len(parts))][0][:100]
    names = [b"/etc/passwd", b"../../a.x.npy", b"k0.x.pkl", b"k0.npy", b"k0..npy", b"k0.__key__.npy", b"\xff.\xfe.npy"]
    names += [b"k0.block.keys.npy", b"g.x.lengths.npy", b"a.b/", b".npy", b"", b"a\n.b.npy", b"./a.x.npy"]
    name = other if rng.random() < 0.4 else names[rng.integers(len(names))]
    parts[index] = sealed(name.ljust(100, b"\0") + header[100:]), data
    return put_together(parts)


def extend_member(rng: Generator, content: bytes) -> bytes:
    """An extended header tells another name or size, or is no such thing."""
    parts = take_apart(content)
    name = ["k0.tokens.npy", "k" * 3000 + ".x.npy", "/" * 2000, "a\0b.x.npy", "é" * 300 + ".x"][rng.integers(5)]
    size = [str(_odd(rng)), "9" * 5000, "٣", "1_0", "", "0x10"][rng.integers(6)]
    extras = [
        pax({"path": name}),
        pax({"size": size}),
        pax({"path": name, "size": size, "mtime": "nan", "GNU.sparse.map"[: rng.integers(1, 15)]: "1"}),
        [(header_of("x", 30, b"x"), rng.bytes(30))],
        [(header_of("x", 9, b"x"), b"-3 path=a")],
        [(header_of("long", len(name.encode()), b"L"), name.encode())],
        [(header_of("k0.x.npy", 0, bytes([rng.choice(list(b"12"))]), link="/etc/passwd"), b"")],
    ]
    index = int(rng.integers(len(parts) + 1))
    return put_together(parts[:index] + extras[rng.integers(len(extras))] + parts[index:])


def edit_array_header(rng: Generator, content: bytes) -> bytes:
    """An array's header says something else; the member's size follows."""
    parts = take_apart(content)
    arrays = [index for index, (_, data) in enumerate(parts) if data[:6] == b"\x93NUMPY"]
    if not arrays:
        return flip_bits(rng, content)
    index = int(rng.choice(arrays))
    header, data = parts[index]
    data = _with_array_header(rng, data)
    parts[index] = resized(header, len(data)), data
    return put_together(parts)


def edit_array_values(rng: Generator, content: bytes) -> bytes:
    """Small integers in an array, lengths among them, are others."""
    parts = take_apart(content)
    index = int(rng.integers(len(parts)))
    header, data = parts[index]
    if len(data) > 136:
        start = 128 + int(rng.integers((len(data) - 128) // 4)) * 4
        data = data[:start] + (_odd(rng) % 2**32).to_bytes(4, "little") + data[start + 4 :]
    parts[index] = resized(header, len(data)), data
    return put_together(parts)


def edit_packed_keys(rng: Generator, content: bytes) -> bytes:
    """Compressed keys are others, more, fewer, no text, or far more than their member; sizes and headers follow."""
    parts = take_apart(content)
    packed = [index for index, (header, _) in enumerate(parts) if b".block.keys.npy" in header[:100]]
    packed = [index for index in packed if b"'|u1'" in parts[index][1][:40]]
    if not packed:
        return edit_array_values(rng, content)
    index = int(rng.choice(packed))
    header, data = parts[index]
    text = zlib.decompress(data[128:])
    forged = [
        *(text + b"\0more", text.partition(b"\0")[0], text + b"\0", b"\0" + text, b"", text.replace(b"k", b"\xff")),
        *(b"a" * (1 << 20), b"a\0" * (1 << 19) + b"a", b"x" * 4000 + text, text.replace(b"k", "é".encode())),
    ][rng.integers(10)]
    stream = zlib.compress(forged, int(rng.integers(10)) if len(forged) < 1 << 16 else 9)
    stream = [stream, stream, stream, stream + b"more", stream[:-3], stream[:4]][rng.integers(6)]
    data = packed_keys(stream)
    parts[index] = resized(header, len(data)), data
    return put_together(parts)


def packed_keys(stream: bytes) -> bytes:
    """The member of a block's keys in version 2, with any compressed stream."""
    return npy(np.frombuffer(stream, np.uint8))


TAR_WISE: list[Mutator] = [
    *(drop_member, repeat_member, swap_members, resize_member, retype_member, rename_member, extend_member),
    *(edit_array_header, edit_array_header, edit_array_values, edit_packed_keys),
]


def _with_array_header(rng: Generator, data: bytes) -> bytes:
    end = 10 + int.from_bytes(data[8:10], "little")
    text, payload = data[10:end].decode("latin-1"), data[end:]
    numbers = [_odd(rng) if rng.random() < 0.5 else int(rng.integers(9)) for _ in range(rng.integers(0, 4))]
    shapes = [
        "(" + "".join(f"{number}, " for number in numbers) + ")",
        *("(" + "1, " * 70 + ")", "(0, 9223372036854775808)", "(1 2,)", "(" + "9" * 5000 + ",)", "(-1,)", "(True,)"),
    ]
    dtype = rng.choice(["|O", "<i4", "<f8", ">i8", "<U0", "<U1", "<U99999999999", "|b1", "|V8", "<M8[s]", "<c16", "x"])
    edits = [
        re.sub(r"\([^)]*\)", lambda _: shapes[rng.integers(len(shapes))], text),
        re.sub(r"'[<|>][^']*'", repr(str(dtype)), text),
        text.replace("False", "True"),
        text.replace("shape", "shapes"),
        "{" + " " * int(rng.integers(1000)) + text[1:],
        text + "(" * int(rng.integers(1000)),
    ]
    new = edits[rng.integers(len(edits))].encode("latin-1")
    version = int(rng.choice([1, 2, 3]))
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(new)) + new + payload


# --- mutators that know indexes


def rewritten(content: bytes, header: object, arrays: bytes | None = None) -> bytes:
    """An index with another header, or other arrays, and checksums that fit."""
    arrays = index_arrays(content) if arrays is None else arrays
    text = json.dumps(header).encode()
    sums = struct.pack("<III", len(text), crc32(text), crc32(arrays))
    return content[:12] + sums + text + bytes(_aligned(24 + len(text)) - 24 - len(text)) + arrays


def index_header(content: bytes) -> Any:
    """The header of an intact index."""
    return json.loads(content[24 : 24 + int.from_bytes(content[12:16], "little")])


def index_arrays(content: bytes) -> bytes:
    """The arrays of an intact index."""
    return content[_aligned(24 + int.from_bytes(content[12:16], "little")) :]


def edit_index_header(rng: Generator, content: bytes) -> bytes:
    """A value in the header is another, is missing, or comes twice."""
    header = index_header(content)
    inside: Any = header
    while True:
        indices = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        index = indices[rng.integers(len(indices))]
        if not isinstance(inside[index], (dict, list)) or not inside[index] or rng.random() < 0.1:
            break
        inside = inside[index]
    choice = rng.random()
    if choice < 0.15:
        del inside[index]
    elif choice < 0.25 and isinstance(inside, list):
        inside.append(inside[index])
    else:
        inside[index] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    return rewritten(content, header)


def edit_index_values(rng: Generator, content: bytes) -> bytes:
    """A length, place, size, checksum or other number in the arrays is another."""
    header = index_header(content)
    arrays = bytearray(index_arrays(content))
    names = sorted(header["arrays"])
    entry = header["arrays"][names[rng.integers(len(names))]]
    width = int(re.sub(r"\D", "", entry["dtype"]))
    count = int(np.prod(entry["shape"]))
    offset = entry["offset"] + int(rng.integers(max(count, 1))) * width
    near = int.from_bytes(arrays[offset : offset + width], "little") + int(rng.integers(-3, 4))
    value = near if rng.random() < 0.5 else _odd(rng)
    arrays[offset : offset + width] = (value % 256**width).to_bytes(width, "little")
    return rewritten(content, header, bytes(arrays))


def cut_index_arrays(rng: Generator, content: bytes) -> bytes:
    """The arrays end early, or are followed by more."""
    return rewritten(content, index_header(content), [cut, grow][rng.integers(2)](rng, index_arrays(content)))


INDEX_WISE: list[Mutator] = [
    edit_index_header,
    edit_index_header,
    edit_index_values,
    edit_index_values,
    cut_index_arrays,
]


def _odd(rng: Generator) -> int:
    return ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
