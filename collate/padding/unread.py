"""Samples that are still on disk: fields that are read straight into the values of a batch.

A sampler's dataset may give samples that are not read yet. A collator that finds their fields here makes the batch
around them: it allocates the values, fills the padding, and notes where each sample goes. Then all samples of all
fields are read at once. There is no array for a sample, and nothing is copied twice.

>>> from types import SimpleNamespace
>>> from collate.padding.unread import read_unread
>>> tokens = SimpleNamespace(lengths=np.array([1, 2]), dtype=np.dtype(np.int64), shape=())
>>> def read_into(targets):
...     memory, starts = targets["tokens"]
...     for start, steps in zip(starts.tolist(), [[7], [8, 9]]):
...         memory[start : start + 8 * len(steps)] = np.array(steps, np.int64).view(np.uint8)
>>> samples = SimpleNamespace(unread_fields=lambda: {"__key__": ["a", "b"], "tokens": tokens}, read_into=read_into)
>>> columns = read_unread(samples, stack=())
>>> padded = columns["tokens"].pad(np.array([1, 0]), (2, 2), padding_value=0)
>>> finish_reading(columns)
True
>>> columns["__key__"], padded
(['a', 'b'], tensor([[8, 9],
        [7, 0]]))
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collate.padding.padding_value import bits_of_number
from collate.padding.rows import RaggedRows
from collate.tensors.numpy_view import Int64Array, bits_of
from collate.tensors.slabs.sending import new_values
from collate.tensors.steps import PaddingValue

# Memory of a batch's values, uint8 `[bytes]`, and the first byte of each sample in it, int64 `[B]`.
Destination: TypeAlias = tuple[npt.NDArray[np.uint8], Int64Array]

# Values up to this size are filled with padding as a whole, which takes 1 us; writing 64 tails one by one takes 19 us.
_SMALL: Final = 1 << 17


class FieldOnDisk(Protocol):
    """What is known of a field before it is read."""

    @property
    def lengths(self) -> Int64Array | None:
        """Time steps of each sample, int64 `[B]`; None if all have one shape."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype, in the machine's byte order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes behind the time steps, or all axes."""


class SamplesOnDisk(Protocol):
    """Samples that a dataset reads when it is asked to."""

    def __len__(self) -> int:
        """B, how many there are."""

    def unread_fields(self) -> Mapping[str, FieldOnDisk | list[str]] | None:
        """The fields of the samples: their keys, and what is not read yet; None if they are read one by one."""

    def read_into(self, targets: Mapping[str, Destination]) -> None:
        """Read the samples into the memory of each field."""


@dataclass
class _Reading:
    """The samples, and where each field goes."""

    samples: SamplesOnDisk
    targets: dict[str, Destination] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class UnreadRows(RaggedRows):
    """Rows that are not read yet; `items` is empty.

    Attributes:
        reading: Where the values will go, which the rows add to.
        field: Name of the field on disk.
    """

    reading: _Reading
    field: str

    def pad(self, order: Int64Array, shape: tuple[int, int], padding_value: PaddingValue) -> Tensor:
        """Allocate padded values and fill the padding; arguments and result as of `join_rows`, which are read later."""
        lengths = self.lengths[order]
        if self._is_small(shape):
            padded = self._full(shape, padding_value)
        else:
            padded = new_values((*shape, *self.features), self.dtype)
            cells, padding = bits_of(padded), bits_of_number(padding_value, self.dtype)
            # All tails are right of the shortest row's end. What else is there is overwritten.
            shortest = int(lengths.min())
            if 2 * shortest > shape[1]:
                cells[:, shortest:] = padding
            else:
                for row, length in zip(cells, lengths.tolist(), strict=False):
                    row[length:] = padding
            cells[len(order) :] = padding
        self._read_later(padded, _starts_of(order, shape[1] * self.step_bytes))
        return padded

    def pad_documents(self, first_steps: Int64Array, shape: tuple[int, int], padding_value: PaddingValue) -> Tensor:
        """Allocate the values of rows that hold several documents, and fill the gaps between them.

        Args:
            first_steps: First step of each document among all R x C, int64 `[N]`, in source order.
            shape: R and C.
            padding_value: What the gaps hold.

        Returns:
            `[R, C, *F]`, which are read later.
        """
        if self._is_small(shape):
            values = self._full(shape, padding_value)
        else:
            values = new_values((*shape, *self.features), self.dtype)
            steps, padding = bits_of(values.flatten(0, 1)), bits_of_number(padding_value, self.dtype)
            order = np.argsort(first_steps, kind="stable")
            ends = (first_steps + self.lengths)[order].tolist()
            # From the end of a document to the next one. Documents are read later, so that none is overwritten.
            for end, start in zip([0, *ends], [*first_steps[order].tolist(), len(steps)], strict=True):
                steps[end:start] = padding
        self._read_later(values, first_steps * self.step_bytes)
        return values

    def _is_small(self, shape: tuple[int, int]) -> bool:
        return shape[0] * shape[1] * self.step_bytes <= _SMALL

    def _full(self, shape: tuple[int, int], padding_value: PaddingValue) -> Tensor:
        return torch.full((*shape, *self.features), padding_value, dtype=self.dtype, device="cpu")

    def _read_later(self, values: Tensor, starts: Int64Array) -> None:
        self.reading.targets[self.field] = _memory_of(values), starts


@dataclass(frozen=True, eq=False)
class UnreadStack:
    """Samples of one shape that are not read yet, for one tensor `[B, *F]`."""

    reading: _Reading
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def stack(self, order: Int64Array, rows: int) -> Tensor:
        """Allocate the tensor, `[rows, *F]`; rows without a sample are zeros."""
        stacked = torch.zeros((rows, *self.shape), dtype=self.dtype, device="cpu")
        size = math.prod(self.shape) * self.dtype.itemsize
        self.reading.targets[self.field] = _memory_of(stacked), _starts_of(order, size)
        return stacked


# A field of unread samples: rows, numbers of one shape, or keys.
UnreadColumn: TypeAlias = UnreadRows | UnreadStack | list[str]


def read_unread(samples: object, stack: Collection[str]) -> dict[str, UnreadColumn] | None:
    """The fields of samples that are not read yet, as a collator's columns.

    Args:
        samples: What a dataset has given.
        stack: Fields of one shape that become one tensor.

    Returns:
        None if samples must be read one by one.
    """
    # An ordinary list is what most users have.
    find = None if type(samples) is list else getattr(samples, "unread_fields", None)
    fields: Mapping[str, FieldOnDisk | list[str]] | None = None if find is None else find()
    if fields is None or all(isinstance(found, list) for found in fields.values()):
        return None
    reading = _Reading(cast(SamplesOnDisk, samples))
    columns: dict[str, UnreadColumn] = {}
    for name, found in fields.items():
        if isinstance(found, list):
            columns[name] = found
            continue
        dtype = _torch_dtype(found.dtype)
        if found.lengths is None and (name in stack or not found.shape):
            columns[name] = UnreadStack(reading, name, dtype, found.shape)
        elif name in stack:
            # Samples that are only equally long by chance are compared one by one.
            return None
        else:
            lengths = np.full(len(reading.samples), found.shape[0]) if found.lengths is None else found.lengths
            features = found.shape[1:] if found.lengths is None else found.shape
            columns[name] = UnreadRows((), lengths, features, dtype, f"field {name!r}", reading, name)
    return columns


def finish_reading(columns: Mapping[str, object]) -> bool:
    """Read all samples of these columns, with the dataset's errors.

    Returns:
        False if they were read one by one, so that there is nothing left to read.
    """
    for column in columns.values():
        if isinstance(column, (UnreadRows, UnreadStack)):
            column.reading.samples.read_into(column.reading.targets)
            return True
    return False


@lru_cache(maxsize=64)
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The same dtype of torch; all dtypes of shards have one."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _memory_of(values: Tensor) -> npt.NDArray[np.uint8]:
    """The memory of contiguous values."""
    return bits_of(values).reshape(-1).view(np.uint8)


def _starts_of(order: Int64Array, size: int) -> Int64Array:
    """The first byte of each sample, int64 `[B]`, where row r of `size` bytes is that of sample `order[r]`."""
    starts = np.empty(len(order), np.int64)
    starts[order] = np.arange(len(order)) * size
    return starts
