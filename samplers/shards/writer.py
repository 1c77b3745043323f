"""Samples to shards: in blocks or one by one, each shard and its index whole or not at all."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from zlib import crc32

import numpy as np
from torch import Tensor, bfloat16, strided

from samplers.shards.files import NewFile
from samplers.shards.format import DTYPES, KEYS, array_header
from samplers.shards.indexfile import SUFFIX, read_index, write_index
from samplers.shards.scan import LONGEST, scan_shard
from samplers.shards.tables import Array, Layout, Tables
from samplers.shards.tar import END, split_name, tar_header, tar_padding

# A block is held in memory until it is full, and read whole by streams.
BLOCK_BYTES: Final = 1 << 26
# A block keeps its keys as text of one width.
_LONGEST_KEY: Final = 1024
# webdataset reads suffixes in lower case, cuts them at dots and keeps leading underscores for itself.
_FIELD_NAME: Final = re.compile(r"[^./\\_][^./\\]*")


class ShardWriter:
    """Write samples to numbered shards `PREFIX-000000.tar` in a folder, each with its index beside it.

    When the `with` block ends, the corpus file `PREFIX.ltx` joins the indexes. After an exception the finished shards
    stay; `LengthIndex.build(folder).save(...)` makes a corpus of them.

    Numbers become fields of fixed size, and so do the arrays that `stack` names; all other arrays and tensors are
    sequences `[L, *F]`. The first sample says which fields there are and of what kind; later ones must be alike.

    Attributes:
        shards: those that are finished.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        layout: Layout = "blocks",
        max_samples: int = 100_000,
        max_bytes: int = 1 << 28,
        block_size: int = 2000,
        prefix: str = "shard",
        stack: Collection[str] = (),
    ) -> None:
        """Prepare to write; the folder is made if it is absent.

        Args:
            folder: a local folder.
            layout: `"blocks"`, read fast; `"plain"`, one tar group a sample.
            max_samples: most samples in a shard.
            max_bytes: most bytes of samples in a shard, headers apart; a greater sample has a shard of its own.
            block_size: most samples in a block; one is also full at 64 MiB.
            prefix: of the file names.
            stack: arrays of the same size in every sample.

        Raises:
            FileExistsError: The folder holds shards of that prefix.
            TypeError: `stack` is a single string.
            ValueError: An option is out of range.
        """
        _check_options(layout, prefix, stack, max_samples=max_samples, max_bytes=max_bytes, block_size=block_size)
        self._folder, self._prefix = Path(folder), prefix
        self._new_shard = partial(_BlockShard, block_size=block_size) if layout == "blocks" else _PlainShard
        self._plain = layout == "plain"
        self._max_samples, self._max_bytes = max_samples, max_bytes
        self._stack = frozenset(stack)
        self._kinds: dict[str, _Kind] = {}
        self._keys: set[str] = set()
        self._open: _NewShard | None = None
        self._entered = False
        self.shards: list[Path] = []
        self._folder.mkdir(parents=True, exist_ok=True)
        found = sorted([*self._folder.glob(f"{prefix}-*.tar*"), *self._folder.glob(f"{prefix}{SUFFIX}*")])
        if found:
            raise FileExistsError(
                f"{self._folder} already holds {found[0].name}: write to another folder, give another prefix=, or "
                f"delete {prefix}-*.tar* and {prefix}{SUFFIX}*"
            )

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample.

        Args:
            sample: `__key__`, a text that no other sample has, and at least one sequence `[L, *F]`: arrays or tensors
                on the CPU, and numbers. What is added is copied.

        Raises:
            RuntimeError: The writer is not, or no longer, in its `with` block.
            TypeError: A value is not an array of plain numbers, or of another dtype than in earlier samples.
            ValueError: The key is a duplicate or not fit for the layout, a field is missing or new, or its feature
                shape differs from earlier samples'.
        """
        if not self._entered:
            raise RuntimeError("write within the with block: with ShardWriter(folder) as writer: writer.write(...)")
        key = self._check_key(sample.get("__key__"))
        arrays = {
            name: _as_array(value, f"sample {key!r}, field {name!r}")
            for name, value in sample.items()
            if name != "__key__"
        }
        self._check_kinds(arrays, key)
        size = sum(array.nbytes for array in arrays.values())
        if self._open is not None and not self._open.has_room(size, self._max_samples, self._max_bytes):
            self._finish()
        if self._open is None:
            self._open = self._new_shard(self._folder / f"{self._prefix}-{len(self.shards):06}.tar", self._kinds)
        self._open.add(key, arrays)
        self._keys.add(key)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        if kind is not None:
            self._discard()
            return
        self._finish()
        if not self.shards:
            raise ValueError(f"nothing was written to {self._folder}: a corpus needs a sample")
        parts = [read_index(f"{shard}{SUFFIX}")[0] for shard in self.shards]
        write_index(self._folder / f"{self._prefix}{SUFFIX}", parts)

    def _check_key(self, key: object) -> str:
        if not isinstance(key, str):
            raise TypeError(f"__key__ must be a str, got {key!r}")
        if not 0 < len(key) <= _LONGEST_KEY or "\0" in key or not _is_unicode(key):
            raise ValueError(f"__key__ must be 1 to {_LONGEST_KEY} characters of Unicode without NUL, got {key[:80]!r}")
        if key in self._keys:
            raise ValueError(f"__key__ must be unique, {key!r} was written before")
        if self._plain and split_name(f"{key}.x") != (key, "x"):
            raise ValueError(
                f"__key__ must do as a file name in the plain layout, without dots in its last part, got {key!r}: "
                'rename it, or choose layout="blocks", which takes any text'
            )
        return key

    def _check_kinds(self, arrays: dict[str, Array], key: str) -> None:
        if not self._kinds:
            self._kinds = self._first_kinds(arrays, key)
        for name in [*self._kinds, *arrays]:
            if name not in arrays or name not in self._kinds:
                state = "missing" if name in self._kinds else "new"
                raise ValueError(
                    f"sample {key!r}: field {name!r} is {state}: every sample must have {sorted(self._kinds)}"
                )
        for name, array in arrays.items():
            kind = self._kinds[name]
            features = array.shape[1:] if kind.variable and array.ndim else array.shape
            if array.dtype.str != kind.dtype or features != kind.shape or (kind.variable and not array.ndim):
                wrong = TypeError if array.dtype.str != kind.dtype else ValueError
                raise wrong(
                    f"sample {key!r}, field {name!r}: must be {kind} like the first sample's, got {array.dtype} "
                    f"{list(array.shape)}"
                )
            if kind.variable and len(array) > LONGEST:
                raise ValueError(f"sample {key!r}, field {name!r}: {len(array)} steps, at most {LONGEST} are possible")

    def _first_kinds(self, arrays: dict[str, Array], key: str) -> dict[str, "_Kind"]:
        for name in arrays:
            if not _FIELD_NAME.fullmatch(name) or name != name.lower() or not name.isprintable():
                raise ValueError(
                    f"sample {key!r}: fields must be named in lower case without dots and slashes, and not with an "
                    f"underscore first, got {name!r}"
                )
        if self._stack - arrays.keys():
            raise ValueError(f"stack names {sorted(self._stack - arrays.keys())}, the fields are {sorted(arrays)}")
        kinds = {}
        for name, array in arrays.items():
            variable = array.ndim > 0 and name not in self._stack
            kinds[name] = _Kind(array.dtype.str, array.shape[variable:], variable)
        if not any(kind.variable for kind in kinds.values()):
            raise ValueError(f"sample {key!r}: at least one field must be a sequence [L, *F], got {sorted(arrays)}")
        return kinds

    def _finish(self) -> None:
        if self._open is None:
            return
        try:
            tables = self._open.finish()
        except BaseException:
            self._discard()
            raise
        path = self._open.path
        self._open = None
        write_index(path.with_name(path.name + SUFFIX), [tables])
        self.shards.append(path)

    def _discard(self) -> None:
        if self._open is not None:
            self._open.file.discard()
            self._open = None


@dataclass(frozen=True)
class _Kind:
    """What every sample's array is like in one field."""

    dtype: str
    shape: tuple[int, ...]
    variable: bool

    def __str__(self) -> str:
        shape = ["L", *self.shape] if self.variable else list(self.shape)
        return f"{np.dtype(self.dtype)} [{', '.join(map(str, shape))}]"


class _NewShard(ABC):
    """A shard that is being written."""

    def __init__(self, path: Path, kinds: Mapping[str, _Kind]) -> None:
        self.path, self.kinds = path, kinds
        self.file = NewFile(path)
        self.samples = self.nbytes = 0
        self.crcs: list[list[int]] = []

    def has_room(self, size: int, max_samples: int, max_bytes: int) -> bool:
        return self.samples < max_samples and self.nbytes + size <= max_bytes

    def add(self, key: str, arrays: Mapping[str, Array]) -> None:
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


class _PlainShard(_NewShard):
    """One tar group a sample."""

    def _add(self, key: str, arrays: Mapping[str, Array]) -> list[int]:
        members = {}
        for name, kind in self.kinds.items():
            array = arrays[name]
            if kind == _INTEGER:
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


class _BlockShard(_NewShard):
    """One tar group for many samples."""

    def __init__(self, path: Path, kinds: Mapping[str, _Kind], *, block_size: int) -> None:
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


# Class numbers, which webdataset knows as `.cls`.
_INTEGER: Final = _Kind("<i8", (), variable=False)


def _check_options(layout: str, prefix: str, stack: Collection[str], **counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    if layout not in {"blocks", "plain"}:
        raise ValueError(f'layout must be "blocks" or "plain", got {layout!r}')
    if not prefix or set(prefix) & set("./\\*?[]{}"):
        raise ValueError(f"prefix must be a file name without dots, slashes, braces and wildcards, got {prefix!r}")
    if isinstance(stack, str):
        raise TypeError(f"stack must be a list of field names, got the string {stack!r}")


def _check_fits(name: str) -> None:
    try:
        tar_header(name, 0)
    except ValueError as error:
        raise ValueError(
            f'{name!r} does not fit a tar header ({error}): shorten the key, or choose layout="blocks", which takes any'
        ) from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_array(value: object, where: str) -> Array:
    # Little-endian and C-contiguous, whatever was given.
    if isinstance(value, Tensor):
        value = _from_tensor(value, where)
    elif isinstance(value, (bool, int, float, complex)):
        value = np.asarray(value, {bool: "?", int: "<i8", float: "<f8", complex: "<c16"}[type(value)])
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(
            f"{where}: must be an array, a tensor or a number, got {type(value).__name__}: lists need a dtype, as in "
            "np.asarray(values, np.float32); text can be np.frombuffer(text.encode(), np.uint8)"
        )
    dtype = value.dtype.newbyteorder("<")
    if dtype.hasobject:
        raise TypeError(f"{where}: holds Python objects, which could only be pickled: give it a plain dtype")
    if dtype.str not in DTYPES:
        raise TypeError(f"{where}: {value.dtype} cannot be stored, only {sorted(np.dtype(d).name for d in DTYPES)}")
    return np.asarray(value, dtype, order="C")


def _from_tensor(value: Tensor, where: str) -> Array:
    if value.dtype == bfloat16:
        raise TypeError(
            f"{where}: NumPy has no bfloat16: store value.view(torch.int16) and view it as torch.bfloat16 when it is "
            "read, or store value.float()"
        )
    if value.device.type != "cpu" or value.layout != strided:
        raise TypeError(f"{where}: must be a dense tensor on the CPU, got {value.layout} on {value.device}: use .cpu()")
    try:
        return value.numpy(force=True)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{where}: {value.dtype} cannot be stored ({error})") from None
