"""The schema of a corpus: dtype and shape of each field, from a sample or from existing shards."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch import Tensor, bfloat16, strided

from samplers.shards.format.npy import DTYPES, LONGEST_HEADER, AnyArray, read_npy_header
from samplers.shards.indexing.shard_groups import MAX_STEPS
from samplers.shards.indexing.tables import Field, Tables
from samplers.shards.storage.reading import open_file
from samplers.sources.masked import refuse_masked

# webdataset reads suffixes in lower case, splits them at dots, and reserves leading underscores.
_FIELD_NAME: Final = re.compile(r"[^./\\_][^./\\]*")
# How Python's numbers are stored.
_PYTHON_NUMBERS: Final = ((bool, "?"), (int, "<i8"), (float, "<f8"), (complex, "<c16"))


@dataclass(frozen=True)
class FieldSchema:
    """Dtype and shape of a field, the same in every sample.

    Attributes:
        dtype: Dtype as stored.
        shape: `F`, the axes behind the steps. All axes, if the size is fixed.
        variable: True if samples differ in length.

    >>> print(FieldSchema("<f4", (80,), variable=True))
    float32 [L, 80]
    """

    dtype: str
    shape: tuple[int, ...]
    variable: bool

    def __str__(self) -> str:
        shape = ["L", *self.shape] if self.variable else list(self.shape)
        return f"{np.dtype(self.dtype)} [{', '.join(map(str, shape))}]"


# Class numbers, in webdataset `.cls`.
INTEGER: Final = FieldSchema("<i8", (), variable=False)


def infer_schema(arrays: Mapping[str, AnyArray], stack: Collection[str], key: str) -> dict[str, FieldSchema]:
    """The schema of a corpus, from its first sample.

    Args:
        arrays: Values of the sample.
        stack: Fields of fixed size.
        key: Key of the sample, for messages.

    Raises:
        ValueError: A field has an invalid name, a field of `stack` is missing, or none is a sequence.
    """
    for name in arrays:
        if not _FIELD_NAME.fullmatch(name) or name != name.lower() or not name.isprintable():
            raise ValueError(
                f"sample {key!r}: fields must be named in lower case without dots and slashes, and not with an "
                f"underscore first, got {name!r}"
            )
    missing = sorted(set(stack) - arrays.keys())
    if missing:
        raise ValueError(f"stack names {missing}, the fields are {sorted(arrays)}")
    schema = {}
    for name, array in arrays.items():
        variable = array.ndim > 0 and name not in stack
        schema[name] = FieldSchema(array.dtype.str, array.shape[variable:], variable)
    if not any(field_schema.variable for field_schema in schema.values()):
        raise ValueError(f"sample {key!r}: at least one field must be a sequence [L, *F], got {sorted(arrays)}")
    return schema


def check_schema(arrays: Mapping[str, AnyArray], schema: Mapping[str, FieldSchema], key: str, like: str) -> None:
    """Check a sample against the schema.

    Args:
        arrays: Values of the sample.
        schema: Schema of the corpus.
        key: Key of the sample.
        like: Origin of the schema, for messages.

    Raises:
        TypeError: A dtype differs.
        ValueError: A field is missing or new, its feature shape differs, or it has too many steps.
    """
    for name in [*schema, *arrays]:
        if name not in arrays or name not in schema:
            problem = "missing" if name in schema else "new"
            raise ValueError(
                f"sample {key!r}: field {name!r} is {problem}: every sample must have {sorted(schema)} like {like}"
            )
    for name, array in arrays.items():
        field_schema = schema[name]
        features = array.shape[1:] if field_schema.variable and array.ndim else array.shape
        if (
            array.dtype.str != field_schema.dtype
            or features != field_schema.shape
            or (field_schema.variable and not array.ndim)
        ):
            error = TypeError if array.dtype.str != field_schema.dtype else ValueError
            raise error(
                f"sample {key!r}, field {name!r}: must be {field_schema} like {like}, got {array.dtype} "
                f"{list(array.shape)}"
            )
        if field_schema.variable and len(array) > MAX_STEPS:
            raise ValueError(f"sample {key!r}, field {name!r}: {len(array)} steps, at most {MAX_STEPS} are possible")


def read_schema(tables: Tables) -> dict[str, FieldSchema]:
    """The schema of a shard.

    Args:
        tables: Tables of the shard. For fields without a dtype there, its first sample is read.

    Raises:
        ValueError: A field is stored in an encoding that the writer does not write.
    """
    schema = {}
    for column, field in enumerate(tables.fields):
        if field.dtype:
            schema[field.name] = FieldSchema(field.dtype, field.shape, field.variable)
        else:
            schema[field.name] = _read_field_schema(tables, column, field)
    return schema


def _read_field_schema(tables: Tables, column: int, field: Field) -> FieldSchema:
    """The schema of a plain field of fixed size, from the first sample that has it.

    Raises:
        ValueError: It is stored in an encoding that the writer does not write.
    """
    path = tables.shards[0].path
    if field.suffix == f"{field.name}.cls":
        return INTEGER
    if field.suffix != f"{field.name}.npy":
        raise ValueError(f"{path}: field {field.name!r} is stored as {field.suffix!r}, to which no array can be added")
    offset = int(tables.offsets[np.flatnonzero(tables.offsets[:, column])[0], column])
    header = read_npy_header(open_file(path).read(offset, LONGEST_HEADER), f"{path}: field {field.name!r}")
    return FieldSchema(header.dtype.str, header.shape, variable=False)


def as_array(value: object, context: str) -> AnyArray:
    """A value as it is stored: a little-endian, C-contiguous array.

    Args:
        value: Array, tensor or number.
        context: Sample and field, for messages.

    Raises:
        OverflowError: An integer does not fit 64 bits.
        TypeError: It is none of these, has masked values, or its dtype cannot be stored.
    """
    if isinstance(value, Tensor):
        value = _from_tensor(value, context)
    elif isinstance(value, (bool, int, float, complex)) and not isinstance(value, np.generic):
        # In this order, because a bool is also an int.
        value = np.asarray(value, next(stored for number, stored in _PYTHON_NUMBERS if isinstance(value, number)))
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(
            f"{context}: must be an array, a tensor or a number, got {type(value).__name__}: lists need a dtype, as in "
            "np.asarray(values, np.float32); text can be np.frombuffer(text.encode(), np.uint8)"
        )
    refuse_masked(value, f"{context}: all values", "drop them with .compressed(), or replace them with .filled(value)")
    dtype = value.dtype.newbyteorder("<")
    if dtype.hasobject:
        raise TypeError(f"{context}: holds Python objects, which could only be pickled: give it a plain dtype")
    if dtype.str not in DTYPES:
        raise TypeError(f"{context}: {value.dtype} cannot be stored, only {sorted(np.dtype(d).name for d in DTYPES)}")
    return np.asarray(value, dtype, order="C")


def _from_tensor(value: Tensor, context: str) -> AnyArray:
    """A tensor as an array.

    Raises:
        TypeError: NumPy has no such dtype, or the tensor is not dense or not on the CPU.
    """
    if value.dtype == bfloat16:
        raise TypeError(
            f"{context}: NumPy has no bfloat16: store value.view(torch.int16) and view it as torch.bfloat16 when it is "
            "read, or store value.float()"
        )
    if value.device.type != "cpu" or value.layout != strided:
        raise TypeError(
            f"{context}: must be a dense tensor on the CPU, got {value.layout} on {value.device}: use .cpu()"
        )
    try:
        return value.numpy(force=True)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{context}: {value.dtype} cannot be stored ({error})") from None
