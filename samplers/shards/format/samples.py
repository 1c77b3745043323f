"""Shards: tar members and groups, `.npy` headers, and the two layouts of samples in them.

A shard is an uncompressed tar as webdataset reads it: members `KEY.SUFFIX`, those of one key side by side, make a
group. The suffix `tokens.npy` is the field `tokens` encoded as `npy`; `wav` alone is the field `wav`.

- plain: a group is a sample, and its key the sample's.
- blocks: a group is some thousand samples. `block.keys.npy` holds their keys as text `[n]` and marks the layout,
  `FIELD.npy` and `FIELD.lengths.npy` (int32 `[n]`) a variable-length field as flat `[sum(L), *F]`, `FIELD.npy` alone a
  field of fixed size as `[n, *F]`.

Nothing here is executed: no pickle is read, and an array is believed only when its header and its size agree.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from collate.errors import LengthError

Array: TypeAlias = npt.NDArray[Any]
Sample: TypeAlias = dict[str, Any]

KEYS: Final = "block.keys.npy"
# What torch and NumPy both know and every machine spells alike.
DTYPES: Final = frozenset(
    ["|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16"]
)

# NumPy's limits: bytes of an array, counting axes of none as one, and axes.
_MOST: Final = np.iinfo(np.int64).max
_MOST_AXES: Final = 64
# The last character of Unicode, and the first and last number below that are none.
_LAST_POINT: Final = 0x10FFFF
_SURROGATES: Final = (0xD800, 0xDFFF)

# Magic and version of a `.npy` file, to the place of the header's text: its size has two bytes in version 1, else four.
_TEXT_STARTS: Final = {b"\x93NUMPY\x01\x00": 10, b"\x93NUMPY\x02\x00": 12, b"\x93NUMPY\x03\x00": 12}
_PICKLES: Final = re.compile(r"(?:^|\.)(pkl|pickle|pyd|pth)(?:\.gz)*$", re.IGNORECASE)
_NPY: Final = re.compile(
    rb"\{\s*'descr':\s*'([^']*)',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([\d,\s]*)\),?\s*\}\s*"
)


class ArrayHeader(NamedTuple):
    """What a `.npy` file says of itself.

    Attributes:
        dtype: as stored.
        shape: of the array.
        fortran: True where the first axis varies fastest.
        size: bytes before the first value.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def field_of(suffix: str) -> tuple[str, str]:
    """Field name and encoding of a suffix.

    >>> field_of("tokens.npy"), field_of("wav")
    (('tokens', 'npy'), ('wav', 'wav'))
    """
    stem, _, encoding = suffix.rpartition(".")
    return stem or encoding, encoding


def refuse_pickle(suffix: str, context: str) -> None:
    """Refuse what other readers would unpickle.

    Raises:
        ValueError: The suffix is that of a pickle; it is named.
    """
    if _PICKLES.search(suffix):
        raise ValueError(f"{context}: {suffix!r} is a pickle, which can run any program: store arrays as .npy")


def read_array_header(data: bytes, context: str) -> ArrayHeader:
    """Read the header at the start of a `.npy` file.

    Args:
        data: the file's first bytes.
        context: shard, key and field, for messages.

    Raises:
        ValueError: This is no such header, or the values are not plain numbers.
    """
    start, size = find_array_header(data)
    if not start or len(data) < size:
        raise ValueError(f"{context}: not a .npy array, its first bytes are {data[:8]!r}")
    found = _parse_array_header(data[start:size])
    if found is None:
        raise ValueError(
            f"{context}: {data[start : min(size, start + 80)]!r} is not an array of numbers; objects would be pickles, "
            "which are never read: store a plain dtype"
        )
    return ArrayHeader(*found, size)


def find_array_header(data: bytes) -> tuple[int, int]:
    """Where the text of a `.npy` header starts and ends; 0 and 0 if the bytes start with no such header."""
    start = _TEXT_STARTS.get(data[:8], 0)
    return start, start and start + int.from_bytes(data[8:start], "little")


def check_array_size(header: ArrayHeader, size: int, context: str) -> None:
    """Hold what a header claims against the bytes there are, before anything is allocated.

    Raises:
        ValueError: They differ; both numbers are named. Or no array can have this shape, though it holds nothing.
    """
    if math.prod(steps or 1 for steps in header.shape) * header.dtype.itemsize > _MOST and header.nbytes == 0:
        raise ValueError(f"{context}: the header claims {list(header.shape)} {header.dtype}, which no array can be")
    if header.size + header.nbytes != size:
        raise ValueError(
            f"{context}: the header claims {list(header.shape)} {header.dtype}, {header.nbytes} bytes, the member holds "
            f"{size - header.size}"
        )


def array_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of a `.npy` file (version 1.0), the same bytes with every version of NumPy."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    # Values begin at a multiple of 64 bytes; the text ends with a newline.
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def decode_array(data: bytes, context: str) -> Any:
    """The array in a `.npy` file: writable, in native byte order, in memory of its own; a scalar where it has no axis.

    Raises:
        ValueError: It is not one of plain numbers, or its header and its size disagree.
    """
    header = read_array_header(data, context)
    check_array_size(header, len(data), context)
    order: Literal["C", "F"] = "F" if header.fortran else "C"
    view: Array = np.ndarray(header.shape, header.dtype, data, header.size, order=order)
    array = np.array(view, header.dtype.newbyteorder("="), order="C")
    return array if array.ndim else array[()]


def decode_member(encoding: str, data: bytes, context: str) -> Any:
    """Decode `npy`, `cls` (an integer), `txt` and `json`; the rest stay bytes.

    Raises:
        ValueError: The bytes are not what the encoding says.
    """
    if encoding == "npy":
        return decode_array(data, context)
    try:
        if encoding == "cls":
            return np.int64(int(data))
        if encoding == "txt":
            return data.decode()
        return json.loads(data) if encoding == "json" else data
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{context}: not {encoding}: {error}") from None


def decode_groups(source: Iterable[Mapping[str, Any]], fields: Collection[str] | None = None) -> Iterator[Sample]:
    """Turn webdataset's groups of raw bytes, of either layout, into samples: a stage for `.compose`.

    It takes the place of `.decode()`, which would unpickle. `functools.partial(decode_groups, fields=["tokens"])`
    names what is decoded.

    Args:
        source: mappings of `__key__`, `__url__` and suffixes to bytes.
        fields: the fields to decode; None for all.

    Yields:
        `{"__key__": str, field: array [L, *F] or scalar, ...}`, arrays writable and in memory of their own.

    Raises:
        TypeError: A member is no longer bytes: this stage comes before any that decodes.
        ValueError: A field asked for is a pickle, damaged or missing; the shard, group and field are named.
        LengthError: A block's lengths do not add up to what it holds.
    """
    for group in source:
        context = f"{group.get('__url__', 'shard')}: group {group.get('__key__')!r}"
        members = {suffix: data for suffix, data in group.items() if not suffix.startswith("__")}
        if KEYS in members:
            yield from _decode_block(members, fields, context)
        else:
            yield _decode_sample(str(group["__key__"]), members, fields, context)


def split_block(suffixes: Iterable[str], context: str) -> dict[str, bool]:
    """The fields of a block, in order: True where a field is of variable length.

    Raises:
        ValueError: A member does not belong in a block.
    """
    names = {}
    for suffix in suffixes:
        refuse_pickle(suffix, context)
        name = field_of(suffix)[0]
        if f"{name}.npy" != suffix or name == "__key__":
            raise ValueError(f"{context}: a member must be FIELD.npy: a block holds .npy members alone, got {suffix!r}")
        names[name] = True
    fields = [name for name in names if f"{name}.npy" != KEYS and not _is_lengths(name)]
    strays = [name for name in names if _is_lengths(name) and name.removesuffix(".lengths") not in names]
    if strays:
        raise ValueError(f"{context}: {strays[0]}.npy has no {strays[0].removesuffix('.lengths')}.npy beside it")
    return {name: f"{name}.lengths" in names for name in fields}


def check_block_lengths(lengths: Any, keys: Any, rows: int, context: str) -> npt.NDArray[np.int64]:
    """Hold a block's lengths against its keys `[n]` and the steps that are there.

    Returns:
        The lengths, int64 `[n]`.

    Raises:
        LengthError: They are not n non-negative integers that sum to `rows`.
    """
    if np.shape(lengths) != np.shape(keys) or lengths.dtype.kind not in "iu":
        raise LengthError(
            f"{context}: lengths must be integers [{len(keys)}], one for each key, got {lengths.dtype} "
            f"{list(np.shape(lengths))}"
        )
    odd = np.flatnonzero(lengths < 0)
    if len(odd):
        raise LengthError(f"{context}: sample {str(keys[odd[0]])!r} has length {lengths[odd[0]]}")
    # Exact, for 64-bit sums come around.
    total = sum(lengths.tolist())
    if total != rows:
        raise LengthError(f"{context}: the lengths sum to {total}, the field holds {rows} steps")
    return np.asarray(lengths, np.int64)


def read_block_keys(data: bytes, context: str) -> npt.NDArray[np.str_]:
    """The keys of a block: text `[n]`.

    Raises:
        ValueError: They are not a list of text, or the header and the size disagree.
    """
    start, size = find_array_header(data)
    found = _NPY.fullmatch(data[start:size]) if start else None
    kind = re.fullmatch(rb"<U([1-9]\d{0,8})", found[1]) if found else None
    shape = _read_shape(found[3]) if found else None
    if kind is None or shape is None or len(shape) != 1:
        raise ValueError(f"{context}: block.keys.npy must hold text [n], its header is {data[start:size][:80]!r}")
    dtype = np.dtype(f"<U{int(kind[1])}")
    check_array_size(ArrayHeader(dtype, shape, fortran=False, size=size), len(data), f"{context}, block.keys.npy")
    points: Array = np.ndarray((shape[0], int(kind[1])), "<u4", data, size)
    if ((points > _LAST_POINT) | ((points >= _SURROGATES[0]) & (points <= _SURROGATES[1]))).any():
        raise ValueError(f"{context}, block.keys.npy: holds numbers that are no characters")
    return np.array(np.ndarray(shape, dtype, data, size))


def _decode_sample(key: str, members: Mapping[str, Any], fields: Collection[str] | None, context: str) -> Sample:
    sample: Sample = {"__key__": key}
    for suffix, data in members.items():
        name, encoding = field_of(suffix)
        if fields is None or name in fields:
            refuse_pickle(suffix, context)
            if name in sample:
                raise ValueError(f"{context}: two members are called {name!r}: rename one")
            sample[name] = decode_member(encoding, _raw(data, suffix, context), f"{context}, field {name!r}")
    _refuse_missing(sample, fields, context)
    return sample


def _decode_block(members: Mapping[str, Any], fields: Collection[str] | None, context: str) -> Iterator[Sample]:
    keys = read_block_keys(_raw(members[KEYS], KEYS, context), context)
    chosen = {name: v for name, v in split_block(members, context).items() if fields is None or name in fields}
    _refuse_missing(chosen, fields, context)
    columns = {}
    for name, variable in chosen.items():
        columns[name] = _cut_column(name, members, keys, context, variable=variable)
    for place, key in enumerate(keys.tolist()):
        yield {"__key__": key} | {name: column[place] for name, column in columns.items()}


def _cut_column(
    name: str, members: Mapping[str, Any], keys: npt.NDArray[np.str_], context: str, *, variable: bool
) -> list[Any]:
    context = f"{context}, field {name!r}"
    column = decode_array(_raw(members[f"{name}.npy"], name, context), context)
    if not np.ndim(column):
        raise ValueError(f"{context}: {len(keys)} keys, but an array of shape []")
    if variable:
        lengths = decode_array(_raw(members[f"{name}.lengths.npy"], name, context), f"{context} (lengths)")
        ends = check_block_lengths(lengths, keys, len(column), context).cumsum().tolist()
        # Copies, or one sample kept in a buffer would keep its whole block.
        return [column[first:last].copy() for first, last in zip([0, *ends], ends, strict=False)]
    if np.shape(column)[:1] != keys.shape:
        raise ValueError(f"{context}: {len(keys)} keys, but an array of shape {list(np.shape(column))}")
    return [row.copy() for row in column]


def _refuse_missing(found: Collection[str], fields: Collection[str] | None, context: str) -> None:
    missing = [name for name in fields or () if name not in found]
    if missing:
        raise ValueError(f"{context}: no field {missing[0]!r}, there are {sorted(set(found) - {'__key__'})}")


def _raw(data: object, suffix: str, context: str) -> bytes:
    if not isinstance(data, bytes):
        raise TypeError(
            f"{context}: {suffix!r} must still be bytes, got {type(data).__name__}: it comes before stages that decode"
        )
    return data


def _is_lengths(name: str) -> bool:
    return name.endswith(".lengths")


@lru_cache(maxsize=4096)
def _parse_array_header(text: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool] | None:
    found = _NPY.fullmatch(text)
    if found is None or found[1].decode("latin-1").replace(">", "<") not in DTYPES:
        return None
    shape = _read_shape(found[3])
    return None if shape is None else (np.dtype(found[1].decode()), shape, found[2] == b"True")


def _read_shape(text: bytes) -> tuple[int, ...] | None:
    # None where it is no shape, or one of more axes or digits than any array has.
    sizes = [size.strip() for size in text.split(b",") if size.strip()]
    if len(sizes) > _MOST_AXES or not all(re.fullmatch(rb"\d{1,19}", size) for size in sizes):
        return None
    return tuple(map(int, sizes))
