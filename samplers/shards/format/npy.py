"""`.npy` arrays: their headers and values. An array is read only when its header and its size agree.

>>> import numpy as np
>>> content = npy_header("<i4", (3,)) + np.array([7, 8, 9], "<i4").tobytes()
>>> header = read_npy_header(content, "here")
>>> header.shape, header.size, header.nbytes, len(content)
((3,), 128, 12, 140)
>>> decode_npy(content, "here")
array([7, 8, 9], dtype=int32)
"""

import math
import re
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

AnyArray: TypeAlias = npt.NDArray[Any]

# Dtypes that torch and NumPy share, with a fixed byte order.
DTYPES: Final = frozenset(
    ["|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16"]
)
# No valid array has a longer header; reject it.
LONGEST_HEADER: Final = 1 << 16
# NumPy's limits: axes of an array, and its bytes, where an axis of size 0 counts as 1.
MAX_AXES: Final = 64
MAX_ARRAY_BYTES: Final = np.iinfo(np.int64).max

# Magic and version of a `.npy` file, and the offset of the header's text. Its size has 2 bytes in version 1, else 4.
_TEXT_STARTS: Final = {b"\x93NUMPY\x01\x00": 10, b"\x93NUMPY\x02\x00": 12, b"\x93NUMPY\x03\x00": 12}
_TEXT: Final = re.compile(
    rb"\{\s*'descr':\s*'([^']*)',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([\d,\s]*)\),?\s*\}\s*"
)
# The last Unicode character, and the range below it that are not characters.
_LAST_CHARACTER: Final = 0x10FFFF
_SURROGATES: Final = (0xD800, 0xDFFF)


class NpyHeader(NamedTuple):
    """The header of a `.npy` file.

    Attributes:
        dtype: Dtype as stored.
        shape: Shape of the array.
        fortran: True if the first axis varies fastest.
        size: Bytes before the first value.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of a `.npy` file (version 1.0), the same bytes with every version of NumPy."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    # Values start at a multiple of 64 bytes: 10 bytes before the text, and a newline at its end.
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def read_npy_header(data: bytes, context: str) -> NpyHeader:
    """Read the header at the start of a `.npy` file.

    Args:
        data: First bytes of the file.
        context: Shard, key and field, for messages.

    Raises:
        ValueError: There is no such header, or the values are not plain numbers.
    """
    start, size = find_npy_header(data)
    if not start or len(data) < size:
        raise ValueError(f"{context}: not a .npy array, its first bytes are {data[:8]!r}")
    parsed = _parse_text(data[start:size])
    if parsed is None:
        raise ValueError(
            f"{context}: {data[start : min(size, start + 80)]!r} is not an array of numbers; objects would be pickles, "
            "which are never read: store a plain dtype"
        )
    return NpyHeader(*parsed, size)


def narrow_dtype(longest: int) -> str:
    """The dtype of lengths up to `longest`, which is at most 2**31 - 1: the smallest that holds them.

    >>> narrow_dtype(255), narrow_dtype(256), narrow_dtype(70_000)
    ('|u1', '<u2', '<i4')
    """
    if longest < 1 << 8:
        return "|u1"
    return "<u2" if longest < 1 << 16 else "<i4"


def find_npy_header(data: bytes) -> tuple[int, int]:
    """Start and end of the text of a `.npy` header. (0, 0) if the bytes do not start with one."""
    start = _TEXT_STARTS.get(data[:8], 0)
    return start, start and start + int.from_bytes(data[8:start], "little")


def check_npy_size(header: NpyHeader, size: int, context: str) -> None:
    """Compare a header with the size of its file, before memory is allocated.

    Raises:
        ValueError: They disagree. Or the shape is one that no array can have, although it has no values.
    """
    if math.prod(steps or 1 for steps in header.shape) * header.dtype.itemsize > MAX_ARRAY_BYTES and header.nbytes == 0:
        raise ValueError(f"{context}: the header claims {list(header.shape)} {header.dtype}, which no array can be")
    if header.size + header.nbytes != size:
        raise ValueError(
            f"{context}: the header claims {list(header.shape)} {header.dtype}, {header.nbytes} bytes, the member "
            f"holds {size - header.size}"
        )


def decode_npy(data: bytes, context: str) -> Any:
    """The array in a `.npy` file: writable, in native byte order, a copy. A scalar if it has no axis.

    Raises:
        ValueError: It is not an array of plain numbers, or its header and its size disagree.
    """
    header = read_npy_header(data, context)
    check_npy_size(header, len(data), context)
    order: Literal["C", "F"] = "F" if header.fortran else "C"
    view: AnyArray = np.ndarray(header.shape, header.dtype, data, header.size, order=order)
    array = np.array(view, header.dtype.newbyteorder("="), order="C")
    return array if array.ndim else array[()]


def decode_text_npy(data: bytes, context: str) -> npt.NDArray[np.str_]:
    """The list of text `[n]` in a `.npy` file.

    Raises:
        ValueError: It is not a list of text, or its header and its size disagree.
    """
    start, size = find_npy_header(data)
    match = _TEXT.fullmatch(data[start:size]) if start else None
    characters = re.fullmatch(rb"<U([1-9]\d{0,8})", match[1]) if match else None
    shape = _parse_shape(match[3]) if match else None
    if characters is None or shape is None or len(shape) != 1:
        raise ValueError(f"{context} must hold text [n], its header is {data[start:size][:80]!r}")
    dtype = np.dtype(f"<U{int(characters[1])}")
    check_npy_size(NpyHeader(dtype, shape, fortran=False, size=size), len(data), context)
    # NumPy stores text as 32-bit numbers of characters, and does not check them.
    numbers: AnyArray = np.ndarray((shape[0], int(characters[1])), "<u4", data, size)
    if ((numbers > _LAST_CHARACTER) | ((numbers >= _SURROGATES[0]) & (numbers <= _SURROGATES[1]))).any():
        raise ValueError(f"{context}: holds numbers that are no characters")
    return np.array(np.ndarray(shape, dtype, data, size))


# Most arrays of a corpus share few headers.
@lru_cache(maxsize=4096)
def _parse_text(text: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool] | None:
    """Dtype, shape and order in the text of a header. None if it is not one of plain numbers."""
    match = _TEXT.fullmatch(text)
    if match is None or match[1].decode("latin-1").replace(">", "<") not in DTYPES:
        return None
    shape = _parse_shape(match[3])
    return None if shape is None else (np.dtype(match[1].decode()), shape, match[2] == b"True")


def _parse_shape(text: bytes) -> tuple[int, ...] | None:
    """The sizes in a text such as `3, 4`. None if no array has as many axes or digits."""
    sizes = [size.strip() for size in text.split(b",") if size.strip()]
    if len(sizes) > MAX_AXES or not all(re.fullmatch(rb"\d{1,19}", size) for size in sizes):
        return None
    return tuple(map(int, sizes))
