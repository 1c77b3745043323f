"""Shards that are being written, complete or not at all: in blocks or one group a sample.

With `block_size=2`, five samples become the groups `block-000000` (2), `block-000001` (2) and `block-000002` (1). Each
has `block.keys.npy`, then for each field `FIELD.lengths.npy` (if it is variable) and `FIELD.npy`:

>>> from tempfile import TemporaryDirectory
>>> schema = {"tokens": FieldSchema("<i4", (), variable=True)}
>>> with TemporaryDirectory() as folder:
...     shard = BlockShard(Path(folder, "a.tar"), schema, block_size=2, version=2)
...     for number in range(5):
...         shard.add(f"k{number}", {"tokens": np.arange(number, dtype="<i4")})
...     tables = shard.finish()
...     shard.file.commit()
>>> tables.lengths[:, 0].tolist(), tables.blocks[:, 0].tolist()
([0, 1, 2, 3, 4], [0, 2, 4])
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from samplers.shards.format.block_keys import KEYS, encode_block_keys
from samplers.shards.format.npy import MAX_ARRAY_BYTES, MAX_AXES, AnyArray, narrow_dtype, npy_header
from samplers.shards.format.tar import END, tar_header, tar_padding
from samplers.shards.indexing.scan import scan_shard
from samplers.shards.indexing.shard_groups import keys_fit
from samplers.shards.indexing.tables import Tables
from samplers.shards.storage.atomic import AtomicFile
from samplers.shards.storage.checksum import crc32
from samplers.shards.writing.schema import INTEGER, FieldSchema

# A block is in memory until it is full, and streams read it whole. So it is also full at 64 MiB.
BLOCK_BYTES: Final = 1 << 26
# A ustar header has 11 octal digits for the size, so at most 8 GiB. A block takes a sample on top of up to 64 MiB that
# it has, and a header.
_LARGEST_ARRAY: Final = 8**11 - 1 - BLOCK_BYTES - (1 << 16)


class ShardFile(ABC):
    """A shard that is being written.

    Everything that it takes can be read back: `check_schema_fits` and `check_fits` refuse what cannot, before the
    shard changes.
    """

    def __init__(self, path: Path, schema: Mapping[str, FieldSchema]) -> None:
        self.path, self.schema = path, schema
        self.file = AtomicFile(path, replace=False)
        self.samples = self.nbytes = 0
        self.crcs: list[list[int]] = []
        # Bytes of all keys, and of the longest key.
        self._key_bytes = self._key_width = 0
        # Bytes of all members so far.
        self._written = 0
        self._stores_keys_whole = True

    @staticmethod
    @abstractmethod
    def check_schema_fits(schema: Mapping[str, FieldSchema]) -> None:
        """Refuse fields that this layout cannot store.

        Raises:
            ValueError: There is one.
        """

    @staticmethod
    @abstractmethod
    def check_fits(key: str, arrays: Mapping[str, AnyArray], schema: Mapping[str, FieldSchema]) -> None:
        """Refuse a sample that this layout cannot store.

        Raises:
            ValueError: Its key or a value does not fit.
        """

    def has_room(self, key: str, size: int, max_samples: int, max_bytes: int) -> bool:
        """Whether a sample of `size` bytes may still be added."""
        key_bytes = len(key.encode())
        nbytes = self._stored_bytes() + size + key_bytes * self._stores_keys_whole
        # A shard with one very long key could not be read, because its key table would be too large. So it ends before.
        narrow = keys_fit(max(self._key_width, key_bytes), self.samples + 1, nbytes)
        return self.samples < max_samples and self.nbytes + size <= max_bytes and narrow

    def add(self, key: str, arrays: Mapping[str, AnyArray]) -> None:
        """Add a sample."""
        self.crcs.append(self._add(key, arrays))
        self.samples += 1
        self.nbytes += sum(array.nbytes for array in arrays.values())
        size = len(key.encode())
        self._key_bytes, self._key_width = self._key_bytes + size, max(self._key_width, size)

    def finish(self) -> Tables:
        """Finish the shard, and read it back. It still has its temporary name.

        Reading back is intended: the index describes the bytes on the disk, not what the writer meant to write. The
        checksums are of the values that were added, so that a later check compares with these.

        Returns:
            Its tables, with checksums.

        Raises:
            ValueError: The samples that are read back differ in number.
        """
        self._flush()
        self.file.stream.write(END)
        self.file.stream.flush()
        names = [name for name, field_schema in self.schema.items() if field_schema.variable]
        tables = scan_shard(str(self.file.temporary), names)
        if len(tables.keys) != self.samples:
            raise ValueError(f"{self.path}: {self.samples} samples were written, {len(tables.keys)} are read back")
        shard = replace(tables.shards[0], path=str(self.path))
        return replace(tables, crcs=np.array(self.crcs, "<u4"), shards=(shard,))

    def _stored_bytes(self) -> int:
        """A lower bound of the bytes of the finished shard."""
        return self.nbytes + self._key_bytes

    @abstractmethod
    def _add(self, key: str, arrays: Mapping[str, AnyArray]) -> list[int]:
        """Add a sample. Returns the crc32 of the stored bytes of each field."""

    @abstractmethod
    def _flush(self) -> None:
        """Write the samples that are still in memory."""

    def _write(self, name: str, parts: list[bytes]) -> None:
        """Write a member."""
        size = sum(map(len, parts))
        self.file.stream.writelines([tar_header(name, size), *parts, tar_padding(size)])
        self._written += size


class PlainShard(ShardFile):
    """One tar group a sample."""

    @staticmethod
    def check_schema_fits(schema: Mapping[str, FieldSchema]) -> None:
        """Nothing to refuse: whether a field's name fits a tar header depends on the key, see `check_fits`."""

    @staticmethod
    def check_fits(key: str, arrays: Mapping[str, AnyArray], schema: Mapping[str, FieldSchema]) -> None:
        """Refuse a key that is too long for a tar header, or values that are too large.

        Raises:
            ValueError: The key or a value is.
        """
        for name, field_schema in schema.items():
            _check_header(
                _member_name(key, name, field_schema), 'the key, or choose the layout "blocks", which takes any'
            )
            _check_size(name, arrays[name].nbytes)

    def _add(self, key: str, arrays: Mapping[str, AnyArray]) -> list[int]:
        members = {}
        for name, field_schema in self.schema.items():
            array = arrays[name]
            header = b"" if field_schema == INTEGER else npy_header(field_schema.dtype, array.shape)
            data = str(int(array)).encode() if field_schema == INTEGER else array.tobytes()
            members[_member_name(key, name, field_schema)] = header + data
        for name, data in members.items():
            self._write(name, [data])
        return [crc32(data) for data in members.values()]

    def _flush(self) -> None:
        pass


class BlockShard(ShardFile):
    """One tar group for many samples."""

    @staticmethod
    def check_schema_fits(schema: Mapping[str, FieldSchema]) -> None:
        """Refuse names of fields that are too long for a tar header, and arrays with too many axes.

        Raises:
            ValueError: There are such fields.
        """
        for name, field_schema in schema.items():
            _check_header(f"block-000000000.{name}.lengths.npy", "the name of the field")
            if len(field_schema.shape) + 1 > MAX_AXES:
                raise ValueError(
                    f"field {name!r}: {len(field_schema.shape)} axes, and a block puts one before them, of {MAX_AXES} "
                    'at most: reshape it, or choose the layout "plain"'
                )

    @staticmethod
    def check_fits(key: str, arrays: Mapping[str, AnyArray], schema: Mapping[str, FieldSchema]) -> None:
        """Refuse values that are too large for a member of a tar.

        Raises:
            ValueError: There is one.
        """
        for name, array in arrays.items():
            _check_size(name, array.nbytes)

    def __init__(self, path: Path, schema: Mapping[str, FieldSchema], *, block_size: int, version: int) -> None:
        super().__init__(path, schema)
        self._block_size, self._blocks, self._version = block_size, 0, version
        self._stores_keys_whole = version == 1
        # Bytes of the samples and of the keys in the open block, and characters of its longest key.
        self._size = self._text = self._width = 0
        self._clear()

    def _add(self, key: str, arrays: Mapping[str, AnyArray]) -> list[int]:
        if self._keys and not self._block_holds(arrays):
            self._flush()
        data = {name: arrays[name].tobytes() for name in self.schema}
        self._keys.append(key)
        self._width, self._text = max(self._width, len(key)), self._text + len(key.encode())
        for name, field_schema in self.schema.items():
            self._rows[name].append(data[name])
            if field_schema.variable:
                self._lengths[name].append(len(arrays[name]))
        self._size += sum(map(len, data.values()))
        # NumPy stores text with 4 bytes a character, at the width of the longest.
        key_table = 4 * self._width * len(self._keys) if self._stores_keys_whole else self._text
        full = self._size >= BLOCK_BYTES or key_table >= BLOCK_BYTES
        if len(self._keys) >= self._block_size or full:
            self._flush()
        return [crc32(row) for row in data.values()]

    def _stored_bytes(self) -> int:
        # How far the keys of the open block will be compressed is not known.
        return super()._stored_bytes() if self._stores_keys_whole else self._written + self._size

    def _block_holds(self, arrays: Mapping[str, AnyArray]) -> bool:
        """Whether the open block holds another sample as well."""
        # Arrays without values (an axis of size 0) may have more steps together than any array can have.
        for name, field_schema in self.schema.items():
            if 0 in field_schema.shape:
                rows = sum(self._lengths[name]) + len(arrays[name]) if field_schema.variable else len(self._keys) + 1
                if (
                    math.prod(size or 1 for size in (rows, *field_schema.shape)) * np.dtype(field_schema.dtype).itemsize
                    > MAX_ARRAY_BYTES
                ):
                    return False
        return True

    def _flush(self) -> None:
        if not self._keys:
            return
        group = f"block-{self._blocks:06}"
        self._write(f"{group}.{KEYS}", [encode_block_keys(self._keys, version=self._version)])
        for name, field_schema in self.schema.items():
            steps = len(self._keys)
            if field_schema.variable:
                steps = sum(self._lengths[name])
                lengths = np.array(self._lengths[name], self._length_dtype(name))
                self._write(
                    f"{group}.{name}.lengths.npy", [npy_header(lengths.dtype.str, lengths.shape), lengths.tobytes()]
                )
            self._write(
                f"{group}.{name}.npy",
                [npy_header(field_schema.dtype, (steps, *field_schema.shape)), *self._rows[name]],
            )
        self._blocks += 1
        self._clear()

    def _length_dtype(self, name: str) -> str:
        """The dtype of the lengths of a field in the open block: in version 2 the smallest that holds them."""
        return "<i4" if self._version == 1 else narrow_dtype(max(self._lengths[name]))

    def _clear(self) -> None:
        """Begin an empty block."""
        self._keys: list[str] = []
        self._size = self._text = self._width = 0
        self._rows: dict[str, list[bytes]] = {name: [] for name in self.schema}
        self._lengths: dict[str, list[int]] = {name: [] for name in self.schema}


def _member_name(key: str, name: str, field_schema: FieldSchema) -> str:
    """The name of a plain member in the tar."""
    return f"{key}.{name}.{'cls' if field_schema == INTEGER else 'npy'}"


def _check_header(name: str, remedy: str) -> None:
    """Refuse a name of a member that does not fit a tar header.

    Raises:
        ValueError: It does not.
    """
    try:
        tar_header(name, 0)
    except ValueError as error:
        raise ValueError(f"{name!r} does not fit a tar header ({error}): shorten {remedy}") from None


def _check_size(name: str, nbytes: int) -> None:
    """Refuse a value that does not fit a member of a tar.

    Raises:
        ValueError: It does not.
    """
    if nbytes > _LARGEST_ARRAY:
        raise ValueError(f"field {name!r}: {nbytes} bytes, a member of a tar holds {_LARGEST_ARRAY}: cut the sample")
