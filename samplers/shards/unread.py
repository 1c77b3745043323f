"""Samples of a batch that are not read yet: a list that reads itself when it is used, or fields for a collator.

A collator that knows of it asks for `unread_fields`, makes its batch, and has the samples read straight into it. Every
other use of the list reads the samples first. Then it is an ordinary list.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, Final, Self, TypeVar, cast

import numpy as np

from samplers.shards.format.keys import decode_all
from samplers.shards.format.npy import AnyArray
from samplers.shards.format.samples import Sample
from samplers.shards.sample_reader import SampleReader, Target

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class UnreadField:
    """A field of B samples that are not read yet.

    Attributes:
        lengths: Time steps of each sample, int64 `[B]`. None if all samples have one shape.
        dtype: Dtype, in the machine's byte order.
        shape: Axes behind the steps, or all axes.
    """

    lengths: AnyArray | None
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class UnreadSamples(list[Any]):
    """A list of samples, which `of_rows` lets be read at its first use.

    `UnreadSamples(items)` is an ordinary list: frameworks that move a batch to a device make the new one this way.
    """

    _read_rows: Callable[[AnyArray], list[Sample]] | None = None
    _reader: SampleReader | None = None
    _rows: AnyArray

    @classmethod
    def of_rows(
        cls, rows: AnyArray, read: Callable[[AnyArray], list[Sample]], reader: SampleReader | None = None
    ) -> Self:
        """The samples of some rows, not read yet.

        Args:
            rows: Rows, int64 `[B]`.
            read: Reads the samples of rows, in their order.
            reader: Reads whole batches of these rows. None if they must be read one by one.
        """
        samples = cls()
        samples._rows, samples._read_rows, samples._reader = rows, read, reader
        return samples

    def unread_fields(self) -> dict[str, UnreadField | list[str]] | None:
        """The fields in the order of a sample: its key as text, and the others unread.

        Returns:
            None if the samples must be read one by one: because the list was used, or a field has other encodings.
        """
        if self._read_rows is None or self._reader is None or not len(self._rows):
            return None
        return _fields_of(self._reader, self._rows, self._steps)

    def read_into(self, targets: Mapping[str, Target]) -> None:
        """Read the samples into memory, and check them as if they were read one by one.

        Args:
            targets: For each field that `unread_fields` gave, memory (uint8 `[bytes]`) and where each sample starts in
                it (int64 `[B]`). A sample takes its steps, one after the other, in the field's dtype.

        Raises:
            FileNotFoundError: A shard is absent.
            LengthError: The length of a sample differs from the index.
            RuntimeError: `unread_fields` gave no fields.
            ValueError: A shard has changed since it was indexed, or is damaged.
        """
        if self._reader is None:
            raise RuntimeError("these samples are read one by one: use the list")
        self._reader.read_into(self._rows, self._steps, targets)

    @cached_property
    def _steps(self) -> AnyArray:
        """Lengths of all variable fields in the index, int64 `[B, K]`."""
        return cast(SampleReader, self._reader).lengths[self._rows].astype(np.int64)

    def __len__(self) -> int:
        # Without reading: a collator asks for it.
        return super().__len__() if self._read_rows is None else len(self._rows)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled as an ordinary list."""
        return list, (self[:],)

    def _read(self) -> None:
        """Read the samples, unless they are read."""
        read, self._read_rows = self._read_rows, None
        if read is not None:
            try:
                super().extend(read(self._rows))
            except BaseException:
                # The next use raises the same error, instead of finding an empty list.
                self._read_rows = read
                raise


def _after_reading(method: Function) -> Function:
    """A method of a list that reads the samples first."""

    @wraps(method)
    def read_first(samples: UnreadSamples, *args: Any, **options: Any) -> Any:
        samples._read()  # noqa: SLF001
        return method(samples, *args, **options)

    return read_first  # type: ignore[return-value]


def _concatenated(samples: UnreadSamples, before: list[Any]) -> list[Any]:
    """A list and these samples after it. A list alone would take them for none."""
    return [*before, *samples]


# What a list can do without its items, or what makes the object itself.
_NOT_OF_ITEMS: Final = frozenset(["__len__", "__new__", "__class_getitem__", "__hash__", "__getattribute__"])
for _name, _method in vars(list).items():
    if callable(_method) and _name not in _NOT_OF_ITEMS:
        setattr(UnreadSamples, _name, _after_reading(_method))
UnreadSamples.__radd__ = _concatenated  # type: ignore[attr-defined]


def _fields_of(reader: SampleReader, rows: AnyArray, steps: AnyArray) -> dict[str, UnreadField | list[str]] | None:
    """The fields of rows in blocks; None in the plain layout, whose members must be decoded one by one."""
    if reader.stored is None:
        return None
    fields: dict[str, UnreadField | list[str]] = {"__key__": decode_all(reader.tables.keys[rows].tolist())}
    for field, dtype, length_column in reader.stored:
        fields[field.name] = UnreadField(steps[:, length_column] if field.variable else None, dtype, field.shape)
    return fields
