"""Outputs as plain arrays: what a file or an array can hold.

Three outputs of 2, 0 and 1 steps become one array of 3 steps and their lengths:

>>> from samplers.inference.outputs import Outputs
>>> arrays = to_arrays(Outputs(np.arange(3), [np.array([1.0, 2.0]), np.array([]), np.array([3.0])]))
>>> arrays.schema.kind, arrays.values, arrays.lengths
('variable', array([1., 2., 3.]), array([2, 0, 1]))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

from samplers.inference.outputs import Outputs
from samplers.planning.budget import Integers
from samplers.shards.format.npy import AnyArray

Kind: TypeAlias = Literal["fixed", "variable", "text"]


class OutputSchema(NamedTuple):
    """What all outputs of a run have in common.

    Attributes:
        kind: `"fixed"`: all outputs have one shape; `"variable"`: each has its own number of steps; `"text"`.
        dtype: NumPy's name of the values' type; of text `"|u1"`, its UTF-8 bytes.
        shape: Shape of an output, or of one step of it.
    """

    kind: Kind
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        if self.kind == "text":
            return "text"
        steps = ["steps"] if self.kind == "variable" else []
        return f"{np.dtype(self.dtype)} [{', '.join([*steps, *map(str, self.shape)])}]"


@dataclass(frozen=True, eq=False)
class OutputArrays:
    """Outputs of some samples as arrays.

    Attributes:
        schema: Kind, dtype and shape.
        samples: Sample index of each output: int64 `[n]`.
        values: `[n, *F]` if all outputs have one shape, else their steps one after the other, `[sum(lengths), *F]`.
        lengths: Steps of each output, of text its bytes: int64 `[n]`; None if all have one shape.
    """

    schema: OutputSchema
    samples: Integers
    values: AnyArray
    lengths: Integers | None = None


def to_arrays(outputs: Outputs) -> OutputArrays:
    """Outputs as arrays.

    Raises:
        TypeError: They have no type that NumPy has.
        ValueError: They differ in dtype or shape.
    """
    entries = outputs.entries
    if isinstance(entries, np.ndarray) and entries.dtype.kind == "U" and entries.ndim == 1:
        entries = entries.tolist()
    if not isinstance(entries, list):
        return _fixed(outputs.samples, to_numpy(entries))
    if all(isinstance(entry, str) for entry in entries):
        texts = [np.frombuffer(entry.encode(), np.uint8) for entry in entries]
        return _variable(outputs.samples, texts, "text")
    arrays = [to_numpy(entry) for entry in entries]
    first = arrays[0]
    for sample, array in zip(outputs.samples, arrays, strict=True):
        if (array.dtype, array.ndim, array.shape[1:]) != (first.dtype, first.ndim, first.shape[1:]):
            raise ValueError(
                f"outputs must agree in dtype and in the shape of a step, got {_described(array)} for sample {sample} "
                f"and {_described(first)} for sample {outputs.samples[0]}"
            )
    return _variable(outputs.samples, arrays, "variable") if first.ndim else _fixed(outputs.samples, np.stack(arrays))


def to_numpy(value: object) -> AnyArray:
    """A number, tensor or array as an array that a file can hold.

    Raises:
        TypeError: There is no such type in NumPy, as for bfloat16, or it is an object.
    """
    if isinstance(value, Tensor):
        try:
            return value.numpy()
        except TypeError as error:
            raise TypeError(
                f"outputs must have a dtype and layout that NumPy has, got {value.dtype} {value.layout}: return "
                'output.float(), or keep tensors in memory with container="torch"'
            ) from error
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise TypeError(
            f"outputs must be numbers, tensors, arrays or text, got {type(value).__name__} {value!r:.80}: return "
            'those, or keep any object in memory with container="list"'
        )
    # Files hold the byte order of this machine.
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def join_arrays(pieces: Sequence[OutputArrays]) -> OutputArrays:
    """The outputs of several batches as one."""
    lengths = [piece.lengths for piece in pieces if piece.lengths is not None]
    return OutputArrays(
        pieces[0].schema,
        np.concatenate([piece.samples for piece in pieces]),
        np.concatenate([piece.values for piece in pieces]),
        np.concatenate(lengths) if lengths else None,
    )


def check_same_schema(schema: OutputSchema, first: OutputSchema, context: str) -> None:
    """Check that outputs have the schema of those before.

    Raises:
        ValueError: They have not.
    """
    if schema != first:
        raise ValueError(
            f"outputs must have one dtype and shape, got {schema} {context}, and {first} before: if rows are as wide "
            "as their batch, return batch.with_padded(output), whose padding is removed, or a list of rows"
        )


def _fixed(samples: Integers, values: AnyArray) -> OutputArrays:
    return OutputArrays(OutputSchema("fixed", values.dtype.str, values.shape[1:]), samples, values)


def _variable(samples: Integers, arrays: Sequence[AnyArray], kind: Kind) -> OutputArrays:
    lengths = np.array([len(array) for array in arrays], np.int64)
    values = np.concatenate(arrays)
    return OutputArrays(OutputSchema(kind, values.dtype.str, values.shape[1:]), samples, values, lengths)


def _described(array: AnyArray) -> str:
    return f"{array.dtype} {list(array.shape)}"
