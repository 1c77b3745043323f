"""Shards that are being written: in blocks or one by one, whole or not at all."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final
from zlib import crc32

import numpy as np

from samplers.shards.files import NewFile
from samplers.shards.format import KEYS, array_header
from samplers.shards.kinds import INTEGER, Kind
from samplers.shards.scan import scan_shard
from samplers.shards.tables import Array, Tables
from samplers.shards.tar import END, tar_header, tar_padding

# A block is held in memory until it is full, and read whole by streams.
BLOCK_BYTES: Final = 1 << 26


class NewShard(ABC):
    """A shard that is being written."""

    def __init__(self, path: Path, kinds: Mapping[str, Kind]) -> None:
        self.path, self.kinds = path, kinds
        self.file = NewFile(path, replace=False)
        self.samples = self.nbytes = 0
        self.crcs: list[list[int]] = []

    def has_room(self, size: int, max_samples: int, max_bytes: int) -> bool:
        """Whether a sample of `size` bytes may still be added."""
        return self.samples < max_samples and self.nbytes + size <= max_bytes

    def add(self, key: str, arrays: Mapping[str, Array]) -> None:
        """Take a sample."""
        self.crcs.append(self._add(key, arrays))
        self.samples += 1
        self.nbytes += sum(array.nbytes for array in arrays.values())

    def finish(self) -> Tables:
        """Give the shard its name; what is in it, with the checksums of what was to be."""
        self._flush()
        self.file.stream.write(END)
        self.file.commit()
        tables = scan_shard(str(self.path), [name for name, kind in self.kinds.items() if kind.variable])
        return replace(tables, crcs=np.array(self.crcs, "<u4"))

    @abstractmethod
    def _add(self, key: str, arrays: Mapping[str, Array]) -> list[int]:
        """Take a sample; the crc32 of what is stored of each field."""

    @abstractmethod
    def _flush(self) -> None:
        """Write what was taken."""

    def _write(self, name: str, parts: list[bytes]) -> None:
        size = sum(map(len, parts))
        self.file.stream.writelines([tar_header(name, size), *parts, tar_padding(size)])


class PlainShard(NewShard):
    """One tar group a sample."""

    def _add(self, key: str, arrays: Mapping[str, Array]) -> list[int]:
        members = {}
        for name, kind in self.kinds.items():
            array = arrays[name]
            if kind == INTEGER:
                members[f"{key}.{name}.cls"] = str(int(array)).encode()
            else:
                members[f"{key}.{name}.npy"] = array_header(kind.dtype, array.shape) + array.tobytes()
        for name in members:
            _check_fits(name)
        for name, data in members.items():
            self._write(name, [data])
        return [crc32(data) for data in members.values()]

    def _flush(self) -> None:
        pass


class BlockShard(NewShard):
    """One tar group for many samples."""

    def __init__(self, path: Path, kinds: Mapping[str, Kind], *, block_size: int) -> None:
        super().__init__(path, kinds)
        self._block_size, self._blocks = block_size, 0
        self._clear()

    def _add(self, key: str, arrays: Mapping[str, Array]) -> list[int]:
        data = {name: arrays[name].tobytes() for name in self.kinds}
        self._keys.append(key)
        for name, kind in self.kinds.items():
            self._rows[name].append(data[name])
            if kind.variable:
                self._lengths[name].append(len(arrays[name]))
        self._size += sum(map(len, data.values()))
        if len(self._keys) >= self._block_size or self._size >= BLOCK_BYTES:
            self._flush()
        return [crc32(row) for row in data.values()]

    def _flush(self) -> None:
        if not self._keys:
            return
        group = f"block-{self._blocks:06}"
        keys = np.array(self._keys).astype("<U")
        self._write(f"{group}.{KEYS}", [array_header(keys.dtype.str, keys.shape), keys.tobytes()])
        for name, kind in self.kinds.items():
            steps = len(keys)
            if kind.variable:
                lengths = np.array(self._lengths[name], "<i4")
                steps = int(lengths.sum(dtype=np.int64))
                self._write(f"{group}.{name}.lengths.npy", [array_header("<i4", lengths.shape), lengths.tobytes()])
            self._write(f"{group}.{name}.npy", [array_header(kind.dtype, (steps, *kind.shape)), *self._rows[name]])
        self._blocks += 1
        self._clear()

    def _clear(self) -> None:
        self._keys: list[str] = []
        self._size = 0
        self._rows: dict[str, list[bytes]] = {name: [] for name in self.kinds}
        self._lengths: dict[str, list[int]] = {name: [] for name in self.kinds}


def _check_fits(name: str) -> None:
    try:
        tar_header(name, 0)
    except ValueError as error:
        raise ValueError(
            f'{name!r} does not fit a tar header ({error}): shorten the key, or choose layout="blocks", which takes any'
        ) from None
