"""Samples in shards: tar groups, fields, and the two layouts.

A shard is an uncompressed tar as webdataset reads it. Its members are named `KEY.SUFFIX`, and neighbours of one key
form a group. The suffix `tokens.npy` is the field `tokens` with the encoding `npy`; `wav` alone is the field `wav`.

- plain: a group is a sample, and its key is the key of the sample.
- blocks: a group is a block of some thousand samples. `block.keys.npy` holds their keys (see `block_keys`) and marks
  the layout. A field of variable length is `FIELD.npy`, flat `[sum(L), *F]`, with `FIELD.lengths.npy`, integers `[n]`.
  A field of fixed size is `FIELD.npy` alone, `[n, *F]`.

The same two samples in both layouts, as webdataset gives the raw groups:

>>> import numpy as np
>>> from samplers.shards.format.npy import npy_header
>>> def npy(values, dtype="<i4"):
...     array = np.array(values, dtype)
...     return npy_header(array.dtype.str, array.shape) + array.tobytes()
>>> plain = [
...     {"__key__": "a", "tokens.npy": npy([1, 2, 3]), "label.cls": b"0"},
...     {"__key__": "b", "tokens.npy": npy([4]), "label.cls": b"1"},
... ]
>>> block = {
...     "__key__": "block-000000",
...     "block.keys.npy": npy(["a", "b"], "<U1"),
...     "tokens.lengths.npy": npy([3, 1]),
...     "tokens.npy": npy([1, 2, 3, 4]),
...     "label.npy": npy([0, 1], "<i8"),
... }
>>> [(sample["__key__"], sample["tokens"].tolist(), int(sample["label"])) for sample in decode_groups(plain)]
[('a', [1, 2, 3], 0), ('b', [4], 1)]
>>> [(sample["__key__"], sample["tokens"].tolist(), int(sample["label"])) for sample in decode_groups([block])]
[('a', [1, 2, 3], 0), ('b', [4], 1)]

Nothing is executed here: pickles are refused.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from collate.errors import LengthError
from samplers.shards.format.block_keys import KEYS, read_block_keys
from samplers.shards.format.keys import decode_all, decode_key
from samplers.shards.format.npy import check_npy_size, decode_npy, read_npy_header

Sample: TypeAlias = dict[str, Any]
"""The fields of a sample by name, with `__key__`."""

NO_SAMPLES: Final = "holds no samples: members must be named KEY.SUFFIX"

_PICKLES: Final = re.compile(r"(?:^|\.)(pkl|pickle|pyd|pth)(?:\.gz)*$", re.IGNORECASE)


def field_of(suffix: str) -> tuple[str, str]:
    """Field name and encoding of a suffix.

    >>> field_of("tokens.npy"), field_of("wav")
    (('tokens', 'npy'), ('wav', 'wav'))
    """
    stem, _, encoding = suffix.rpartition(".")
    return stem or encoding, encoding


def refuse_pickle(suffix: str, context: str) -> None:
    """Refuse a member that other readers would unpickle.

    Raises:
        ValueError: The suffix is that of a pickle.
    """
    if _PICKLES.search(suffix):
        raise ValueError(f"{context}: {suffix!r} is a pickle, which can run any program: store arrays as .npy")


def decode_member(encoding: str, data: bytes, context: str) -> Any:
    """Decode `npy`, `cls` (an integer), `txt` and `json`. Other encodings stay bytes.

    Raises:
        ValueError: The bytes do not have that encoding.
    """
    if encoding == "npy":
        return decode_npy(data, context)
    try:
        # As webdataset decodes them.
        if encoding == "cls":
            return np.int64(int(data))
        if encoding == "txt":
            return data.decode()
        return json.loads(data) if encoding == "json" else data
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{context}: not {encoding}: {error}") from None


def decode_groups(source: Iterable[Mapping[str, Any]], fields: Collection[str] | None = None) -> Iterator[Sample]:
    """Turn webdataset's groups of raw bytes, of either layout, into samples. A stage for `.compose`.

    Use it instead of `.decode()`, which would unpickle. `functools.partial(decode_groups, fields=["tokens"])` selects
    fields.

    Args:
        source: Mappings of `__key__`, `__url__` and suffixes to bytes.
        fields: Fields to decode. None decodes all.

    Yields:
        `{"__key__": str, field: array [L, *F] or scalar, ...}`. Arrays are writable copies.

    Raises:
        TypeError: A member is not bytes: put this stage before stages that decode.
        ValueError: A field is a pickle, damaged or missing. The message has shard, group and field.
        LengthError: A block's lengths do not sum to its steps.
    """
    for group in source:
        # webdataset adds `__key__` and `__url__`. Names with two underscores are never fields.
        context = f"{group.get('__url__', 'shard')}: group {group.get('__key__')!r}"
        members = {suffix: data for suffix, data in group.items() if not suffix.startswith("__")}
        if KEYS in members:
            yield from _decode_block(members, fields, context)
        else:
            yield _decode_sample(str(group["__key__"]), members, fields, context)


def split_block(suffixes: Iterable[str], context: str) -> dict[str, bool]:
    """The fields of a block, in order: True for a field of variable length.

    >>> split_block(["block.keys.npy", "tokens.lengths.npy", "tokens.npy", "label.npy"], "here")
    {'tokens': True, 'label': False}

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
        raise ValueError(f"{context}: {strays[0]}.npy has no {strays[0].removesuffix('.lengths')}.npy next to it")
    return {name: f"{name}.lengths" in names for name in fields}


def check_block_lengths(lengths: Any, keys: Sequence[bytes], rows: int, context: str) -> npt.NDArray[np.int64]:
    """Check a block's lengths against its keys `[n]` and the number of steps that the field holds.

    Returns:
        The lengths, int64 `[n]`.

    Raises:
        LengthError: They are not n non-negative integers that sum to `rows`.
    """
    if np.shape(lengths) != (len(keys),) or lengths.dtype.kind not in "iu":
        raise LengthError(
            f"{context}: lengths must be integers [{len(keys)}], one for each key, got {lengths.dtype} "
            f"{list(np.shape(lengths))}"
        )
    negative = np.flatnonzero(lengths < 0)
    if len(negative):
        raise LengthError(f"{context}: sample {decode_key(keys[negative[0]])!r} has length {lengths[negative[0]]}")
    # Python ints, because an int64 sum could overflow.
    total = sum(lengths.tolist())
    if total != rows:
        raise LengthError(f"{context}: the lengths sum to {total}, the field holds {rows} steps")
    return np.asarray(lengths, np.int64)


def _decode_sample(key: str, members: Mapping[str, Any], fields: Collection[str] | None, context: str) -> Sample:
    """The sample of a plain group.

    Raises:
        ValueError: Two members have one field name, or a field is missing.
    """
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
    """The samples of a block.

    Yields:
        Samples in the order of the keys.
    """
    every = split_block(members, context)
    keys = read_block_keys(
        _raw(members[KEYS], KEYS, context), partial(_count_samples, members, every, context), context
    )
    variable = {name: varies for name, varies in every.items() if fields is None or name in fields}
    _refuse_missing(variable, fields, context)
    columns = {name: _cut_column(name, members, keys, context, variable=v) for name, v in variable.items()}
    for row, key in enumerate(decode_all(keys)):
        yield {"__key__": key} | {name: column[row] for name, column in columns.items()}


def _count_samples(members: Mapping[str, Any], variable: Mapping[str, bool], context: str) -> int:
    """The samples of a block, as another member than that of the keys says. 0 if none does."""
    lengths = [f"{name}.lengths.npy" for name, varies in variable.items() if varies]
    names = lengths or [f"{name}.npy" for name in variable]
    if not names:
        return 0
    data = _raw(members[names[0]], names[0], context)
    header = read_npy_header(data, f"{context}: {names[0]}")
    check_npy_size(header, len(data), f"{context}: {names[0]}")
    return header.shape[0] if header.shape else 0


def _cut_column(
    name: str, members: Mapping[str, Any], keys: Sequence[bytes], context: str, *, variable: bool
) -> list[Any]:
    """The values of one field of a block, one for each sample.

    Raises:
        ValueError: The array does not fit the keys.
    """
    context = f"{context}, field {name!r}"
    column = decode_npy(_raw(members[f"{name}.npy"], name, context), context)
    if not np.ndim(column):
        raise ValueError(f"{context}: {len(keys)} keys, but an array of shape []")
    if variable:
        lengths = decode_npy(_raw(members[f"{name}.lengths.npy"], name, context), f"{context} (lengths)")
        ends = check_block_lengths(lengths, keys, len(column), context).cumsum().tolist()
        # Copies: a view of one sample in a buffer would keep the memory of its whole block.
        return [column[first:last].copy() for first, last in zip([0, *ends], ends, strict=False)]
    if np.shape(column)[:1] != (len(keys),):
        raise ValueError(f"{context}: {len(keys)} keys, but an array of shape {list(np.shape(column))}")
    # Copies, for the same reason as above.
    return [row.copy() for row in column]


def _refuse_missing(names: Collection[str], fields: Collection[str] | None, context: str) -> None:
    """Refuse a sample or block without a field that was asked for.

    Raises:
        ValueError: A field is missing.
    """
    missing = [name for name in fields or () if name not in names]
    if missing:
        raise ValueError(f"{context}: no field {missing[0]!r}, there are {sorted(set(names) - {'__key__'})}")


def _raw(data: object, suffix: str, context: str) -> bytes:
    """The bytes of a member, if no stage has decoded it.

    Raises:
        TypeError: It is not bytes any more.
    """
    if not isinstance(data, bytes):
        raise TypeError(
            f"{context}: {suffix!r} must still be bytes, got {type(data).__name__}: put this stage before stages that "
            "decode"
        )
    return data


def _is_lengths(name: str) -> bool:
    """Whether a member of a block holds the lengths of a field."""
    return name.endswith(".lengths")
