"""The arrays of an index file, in both versions of the format: how they are written, and what is read from them.

In version 1 every array of `Tables` is stored as it is. Version 2, for blocks, is smaller:

- `lengths` have the smallest dtype that holds them, or int32 where they are too many to be widened in memory;
- `keys` are stored as `packed_keys` says, and `offsets` as `packed_offsets`;
- the index of a single shard has neither `order` nor `offsets`, which follow from the lengths if the values of a block
  begin 128 bytes behind the start of their member. Here that is at 1024 + 128:

>>> field = Field("tokens", "tokens.npy", variable=True, dtype="<i4", tracked=True)
>>> derive_offsets([field], np.array([[3], [1], [2]]), np.array([[0, 1024, 512]]))[:, 0].tolist()
[1152, 1164, 1168]
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from samplers.shards.format.npy import MAX_ARRAY_BYTES, AnyArray, narrow_dtype
from samplers.shards.format.packed_keys import LONGEST_PREFIX, PAIRED, KeyForm, PackedKeys, find_key_form
from samplers.shards.format.packed_offsets import PackedOffsets, find_bases, group_count, subtract_bases
from samplers.shards.indexing.tables import ARRAYS, Field, Tables, TablesLike, concat_column, key_width

# Name of an array in version 1, where it is not that in `Tables`.
_NAMES_IN_FILE: Final = {"offsets": "places"}
_NAMES_IN_TABLES: Final = {stored: name for name, stored in _NAMES_IN_FILE.items()}
# Dtypes of the arrays of each version, as patterns. As text, because NumPy accepts many spellings of a dtype.
_EACH: Final = {"keys": r"\|S[1-9]\d{0,8}", "order": "<i[48]"}
_DTYPES: Final = {name: re.escape(dtype) for name, dtype in ARRAYS.items()} | _EACH
_DTYPES_2: Final = _DTYPES | {
    "lengths": r"\|u1|<u2|<i4",
    "keys": r"\|u1|\|S[1-9]\d{0,8}",
    "offsets": "<u4|<i8",
    "offset_bases": "<i8",
}
# Lengths of more samples are int32 in the file too: as a memory map all processes share them, a copy they would not.
_MOST_WIDENED: Final = 1 << 20
# An index of a single shard with more samples has its offsets and its order too, for the same reason.
_MOST_DERIVED: Final = 1 << 17
# Bytes of the header of most `.npy` files.
_HEADER: Final = 128
_ALIGN: Final = 64


@dataclass(frozen=True)
class StoredArray:
    """An array of an index file.

    Attributes:
        name: Its name in the file.
        dtype: Its dtype there.
        shape: Its shape.
        parts: Gives its rows, part by part.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[AnyArray]]


def plan_arrays(parts: Sequence[TablesLike], order: AnyArray) -> list[StoredArray]:
    """The arrays of version 1."""
    dtypes = ARRAYS | {"keys": f"|S{key_width(parts)}"}
    planned = [_plan_whole(parts, name, dtypes[name], _NAMES_IN_FILE.get(name)) for name in parts[0].shapes]
    return [*planned, _plan_order(order)]


def plan_packed_arrays(parts: Sequence[TablesLike], order: AnyArray | None) -> tuple[list[StoredArray], dict[str, Any]]:
    """The arrays of version 2, for blocks, and the entry of the header that is needed to read the keys.

    Args:
        parts: Tables of blocks.
        order: The order of the samples. None for the index of a single shard, which has none.
    """
    samples = sum(part.shapes["keys"][1][0] for part in parts)
    form = find_key_form(part.array("keys") for part in parts)
    dtype = "<i4"
    if samples <= _MOST_WIDENED:
        dtype = narrow_dtype(max(int(part.array("lengths").max(initial=0)) for part in parts))
    planned = [
        _plan_whole(parts, "lengths", dtype),
        StoredArray(
            "keys", form.dtype, (samples, *form.shape), lambda: (form.encode(part.array("keys")) for part in parts)
        ),
    ]
    if order is not None or not _can_derive(parts[0]):
        planned += _plan_offsets(parts, samples)
    planned += [_plan_whole(parts, name, ARRAYS[name]) for name in ("crcs", "blocks") if name in parts[0].shapes]
    if order is not None:
        planned.append(_plan_order(order))
    texts = {"prefix": form.prefix.decode("latin-1"), "alphabet": form.alphabet.decode("latin-1")}
    return planned, {"keys": texts | {"width": form.width}}


def is_derivable(parts: Sequence[TablesLike]) -> bool:
    """Whether these are the tables of a single shard, small enough to do without offsets and order."""
    return len(parts) == 1 and len(parts[0].shards) == 1 and parts[0].shapes["keys"][1][0] <= _MOST_DERIVED


def read_arrays(header: dict[str, Any], content: AnyArray, start: int) -> dict[str, AnyArray]:
    """The arrays of version 1, by their names in `Tables`, and the order.

    Raises:
        KeyError: An entry is missing, or has another name.
        TypeError: An entry is of another type.
        ValueError: An entry is not valid.
    """
    entries = {_NAMES_IN_TABLES.get(name, name): entry for name, entry in header["arrays"].items()}
    return {name: _view_array(content, start, name, entry, _DTYPES) for name, entry in entries.items()}


def read_packed_arrays(
    header: dict[str, Any], content: AnyArray, start: int, fields: Sequence[Field]
) -> dict[str, Any]:
    """The arrays of version 2, by their names in `Tables`, and the order if there is one.

    Raises:
        KeyError: An entry is missing, or has another name.
        TypeError: An entry is of another type.
        ValueError: An entry is not valid, or arrays do not fit each other.
    """
    entries = header["arrays"]
    arrays: dict[str, Any] = {
        name: _view_array(content, start, name, entry, _DTYPES_2) for name, entry in entries.items()
    }
    keys, lengths = arrays["keys"], arrays["lengths"]
    arrays["keys"] = PackedKeys(_read_key_form(header["keys"], keys), keys)
    if lengths.dtype.itemsize < np.dtype("<i4").itemsize:
        arrays["lengths"] = lengths.astype("<i4")
        arrays["lengths"].flags.writeable = False
    bases = arrays.pop("offset_bases", None)
    if "offsets" not in arrays:
        # Each takes 8 bytes, which 4 bytes in the file must stand for.
        if arrays["crcs"].shape != (len(lengths), len(fields)):
            raise ValueError(f"crcs is {list(arrays['crcs'].shape)}, with {len(lengths)} samples")
        check_blocks(arrays["blocks"], len(lengths))
        arrays["offsets"] = derive_offsets(fields, arrays["lengths"], arrays["blocks"])
    elif arrays["offsets"].dtype.itemsize == np.dtype("<u4").itemsize:
        differences = arrays["offsets"]
        if differences.ndim != 2 or bases.shape != (group_count(len(differences)), *differences.shape[1:]):
            raise ValueError(f"offset_bases is {list(bases.shape)}, offsets {list(differences.shape)}")
        arrays["offsets"] = PackedOffsets(bases, differences)
    elif bases is not None:
        raise ValueError("offset_bases without offsets of 4 bytes")
    return arrays


def check_blocks(blocks: AnyArray, samples: int) -> None:
    """Check that every block starts behind the one before.

    Raises:
        ValueError: One does not.
    """
    starts = np.append(blocks[:, 0], samples)
    if starts[0] != 0 or (np.diff(starts) <= 0).any() or (blocks < 0).any():
        raise ValueError("blocks do not follow each other")


def check_values(tables: Tables, order: AnyArray | None) -> None:
    """Check the range of values, where the file was read whole anyway.

    Raises:
        ValueError: A length, an index or a character of a key is out of range.
    """
    ranges: list[tuple[str, AnyArray, int | None]] = [("lengths", tables.lengths, None)]
    if order is not None:
        ranges.append(("order", order, len(order) - 1))
    for name, array, last in ranges:
        if array.size and (array.min() < 0 or (last is not None and array.max() > last)):
            raise ValueError(f"{name} holds {array.min()} to {array.max()}")
    if isinstance(tables.keys, PackedKeys):
        form, stored = tables.keys.form, tables.keys.stored
        count = len(form.alphabet)
        if count and stored.size and max(int((stored >> 4).max()), int((stored & (PAIRED - 1)).max())) >= count:
            raise ValueError(f"keys hold characters beyond the {count} of their alphabet")


def derive_offsets(fields: Sequence[Field], lengths: AnyArray, blocks: AnyArray) -> AnyArray:
    """The offsets `[N, M]` of samples in blocks, if the values of each member begin behind a header of 128 bytes.

    Args:
        fields: The M fields, K of them variable.
        lengths: `[N, K]`.
        blocks: `[G, 1 + M + K]`, as in `Tables`.

    Raises:
        ValueError: The arrays are not of these shapes, or a field is larger than any array can be.
    """
    variable = sum(field.variable for field in fields)
    if lengths.shape[1:] != (variable,) or blocks.shape[1:] != (1 + len(fields) + variable,):
        raise ValueError(f"lengths are {list(lengths.shape)}, blocks {list(blocks.shape)}")
    offsets = np.empty((len(lengths), len(fields)), np.int64)
    sizes = np.diff(blocks[:, 0], append=len(lengths))
    column = 0
    for number, field in enumerate(fields):
        if field.row_bytes > MAX_ARRAY_BYTES:
            raise ValueError(f"field {field.name!r} has {field.row_bytes} bytes for a step")
        steps = lengths[:, column].astype(np.int64) if field.variable else np.ones(len(lengths), np.int64)
        column += field.variable
        # In a damaged index the sums may overflow. Its offsets are then wrong, and refused when they are used.
        starts = np.cumsum(steps) - steps
        first_values = blocks[:, 1 + number] + _HEADER - starts[blocks[:, 0]] * field.row_bytes
        offsets[:, number] = np.repeat(first_values, sizes) + starts * field.row_bytes
    return offsets


def round_up(size: int) -> int:
    """The next multiple of 64."""
    return -(-size // _ALIGN) * _ALIGN


def _plan_whole(parts: Sequence[TablesLike], name: str, dtype: str, stored: str | None = None) -> StoredArray:
    """An array of `Tables` as it is, in another dtype and under another name where these are given."""
    rows = sum(part.shapes[name][1][0] for part in parts)
    shape = (rows, *parts[0].shapes[name][1][1:])
    return StoredArray(stored or name, dtype, shape, lambda: concat_column(parts, name))


def _plan_order(order: AnyArray) -> StoredArray:
    return StoredArray("order", order.dtype.str, order.shape, lambda: [order])


def _plan_offsets(parts: Sequence[TablesLike], samples: int) -> list[StoredArray]:
    """The offsets in four bytes and their bases, or in eight bytes if differences are too large."""
    fields = len(parts[0].fields)
    bases = find_bases((part.array("offsets") for part in parts), samples, fields)
    if bases is None:
        return [_plan_whole(parts, "offsets", "<i8")]
    return [
        StoredArray(
            "offsets",
            "<u4",
            (samples, fields),
            lambda: subtract_bases((part.array("offsets") for part in parts), bases),
        ),
        StoredArray("offset_bases", "<i8", bases.shape, lambda: [bases]),
    ]


def _can_derive(part: TablesLike) -> bool:
    """Whether the offsets of tables follow from their lengths, and there are checksums, as readers require."""
    if "crcs" not in part.shapes:
        return False
    derived = derive_offsets(part.fields, part.array("lengths"), part.array("blocks"))
    return bool((derived == part.array("offsets")).all())


def _read_key_form(entry: dict[str, Any], stored: AnyArray) -> KeyForm:
    """How keys are stored, from the header.

    Raises:
        TypeError: An entry is not text.
        ValueError: The entry does not fit the stored array.
    """
    prefix, alphabet = (entry[name].encode("latin-1") for name in ("prefix", "alphabet"))
    if len(prefix) > LONGEST_PREFIX:
        raise ValueError(f"keys have a common start of {len(prefix)} bytes")
    if len(alphabet) > PAIRED or len(set(alphabet)) < len(alphabet) or b"\0" in prefix:
        raise ValueError(f"keys are {entry} and {stored.dtype}")
    form = KeyForm(prefix, entry["width"], alphabet)
    if (
        type(form.width) is not int
        or form.width < 1
        or form.dtype != stored.dtype.str
        or form.shape != stored.shape[1:]
    ):
        raise ValueError(f"keys are {list(stored.shape)} {stored.dtype}, with remainders of {form.width} bytes")
    return form


def _view_array(content: AnyArray, start: int, name: str, entry: dict[str, Any], dtypes: dict[str, str]) -> AnyArray:
    """One of the arrays, without a copy.

    Raises:
        ValueError: Its entry in the header is not valid.
    """
    offset, shape = entry["offset"], entry["shape"]
    if not re.fullmatch(dtypes[name], entry["dtype"]) or offset % _ALIGN or not 0 <= offset <= len(content):
        raise ValueError(f"{name} is {entry}")
    if not all(type(size) is int and 0 <= size <= len(content) for size in shape):
        raise ValueError(f"{name} is {entry}")
    return np.ndarray(tuple(shape), entry["dtype"], content, start + offset)
