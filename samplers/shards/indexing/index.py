"""The index of a corpus: every sample's length, place and checksum, in a small file beside the shards."""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self, overload

import numpy as np

from collate.errors import LengthError
from samplers.shards.indexing.cache import IndexCache
from samplers.shards.indexing.index_file import REBUILD, open_tables, read_index, sort_by_length, write_index
from samplers.shards.indexing.measuring import Decoder, Measure, identify
from samplers.shards.indexing.scan import LengthOf, scan_shard
from samplers.shards.indexing.tables import Array, Shard, Tables, join_tables
from samplers.shards.storage.atomic import local_path
from samplers.shards.storage.paths import expand_shards, refuse_twice
from samplers.shards.storage.process_pool import run_in_processes
from samplers.shards.storage.reading import Shards, open_file

_NONE: Final = np.arange(0)


class Keys(Sequence[str]):
    """Sample keys, decoded when they are asked for."""

    def __init__(self, keys: Array) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> "Keys": ...
    def __getitem__(self, place: int | slice) -> "str | Keys":
        if isinstance(place, slice):
            return Keys(self._keys[place])
        return decode_key(self._keys[place])


class LengthIndex:
    """The lengths of a corpus on disk, and where its samples are.

    It takes the place of lengths in a sampler: `LengthBucketBatchSampler(index, ...)`.
    """

    def __init__(
        self, tables: Tables, *, path: str | None = None, order: Array | None = None, moved: bool = False
    ) -> None:
        """Made by `build`, `open` and `concat`."""
        self.tables = tables
        self._path, self._order, self._moved = path, order, moved
        tracked = [field.tracked for field in tables.variable]
        lengths = tables.lengths if all(tracked) else tables.lengths[:, np.flatnonzero(tracked)]
        self._lengths = lengths.reshape(-1) if sum(tracked) == 1 else lengths

    @classmethod
    def build(
        cls,
        shards: Shards,
        fields: Collection[str] | None = None,
        length: LengthOf | None = None,
        *,
        workers: int = 0,
        checksums: bool = False,
        resume: bool | str | os.PathLike[str] = False,
        length_id: str | None = None,
        progress: bool = False,
    ) -> Self:
        """Index shards, reading their headers and seeking over their payloads.

        With `resume=True` each shard's own index `SHARD.ltx` is written beside it as soon as it is scanned, and a shard
        whose index is there is not scanned again, so that a build that was killed goes on. An index is taken if it is
        whole, was written since the shard was changed or put where it is, and names its size; `verify` reads more.

        Args:
            shards: paths, brace patterns, wildcards, folders or URLs.
            fields: those whose lengths count; None for every `.npy` array with an axis.
            length: `(field, bytes) -> steps`, for fields in other encodings; picklable where there are workers.
            workers: processes; 0 stays in this one.
            checksums: read payloads too, and keep a crc32 of every sample and field.
            resume: keep an index of each shard beside it, or in a local folder, which suits shards that are remote or
                read-only; take those that are there. Where `fields` is None, it is then theirs.
            length_id: a name for `length`, which the index records, so that no index by another function is taken. None
                makes one of its source without comments and of the constants and functions of its module that it uses,
                not of what it calls elsewhere: change the name when that changes.
            progress: show a bar.

        Raises:
            FileExistsError: Another process writes the index of a shard.
            FileNotFoundError: A shard is absent.
            LengthError: A block's lengths do not fit what it holds, or `length` gives no length.
            RuntimeError: A process was killed; the shard at which it worked is named.
            TypeError: `fields` is a single string, or `length_id` is no text.
            ValueError: A shard is named twice, is damaged or empty or holds a pickle, or samples differ in kind; the
                index that is kept of one is of other fields or by another function, or nobody can tell by which; or
                `resume=True` with a remote shard.
        """
        if isinstance(fields, str):
            raise TypeError(f"fields must be a list of names, got the string {fields!r}")
        if length_id is not None and (not isinstance(length_id, str) or not length_id):
            raise TypeError(f"length_id must be a name, got {length_id!r}")
        cache_dir = resume if isinstance(resume, bool) else local_path(resume, "resume")
        if isinstance(cache_dir, Path):
            cache_dir.mkdir(parents=True, exist_ok=True)
        paths = expand_shards(shards)
        length_id = identify(length) if length_id is None and length is not None else length_id
        scan = IndexCache(fields, length, checksums, cache_dir, length_id).inherit_fields(paths)
        with closing(run_in_processes(scan, paths, workers, unit="shard", progress=progress)) as scanned:
            parts = dict(scanned)
        return cls(join_tables([parts[place] for place in range(len(paths))]))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map an index file into memory; nothing is read but its header, and a checksum of files up to 256 MiB.

        Args:
            path: of a `.ltx` file; a URL is read whole.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is foreign, of another version, truncated or damaged; it is named, and why.
        """
        # Absolute, for workers may stand in another folder.
        path = path if isinstance(path, str) and "://" in path else str(Path(path).absolute())
        tables, order = read_index(path)
        return cls(tables, path=path, order=order)

    @classmethod
    def concat(cls, indexes: Sequence["LengthIndex"]) -> Self:
        """The samples of several indexes, in their order.

        Raises:
            ValueError: There are none, one shard is in two, or their shards differ in layout, fields or checksums.
        """
        refuse_twice((shard, name) for index in indexes for name in [repr(index)] for shard in index.shards)
        return cls(join_tables([index.tables for index in indexes]))

    @classmethod
    def open_all(cls, paths: Sequence[str]) -> Self:
        """The samples of several index files, in their order; no file stays open, and each may be a URL.

        Raises:
            FileNotFoundError: One of them is absent.
            ValueError: One is damaged, one shard is in two, or their shards differ in layout, fields or checksums.
        """
        parts = [open_tables(path) for path in paths]
        refuse_twice((shard.path, path) for part, path in zip(parts, paths, strict=True) for shard in part.shards)
        return cls(join_tables(parts))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a local file, whole or not at all.

        Args:
            path: best beside the shards, which are then named relative to it, so that their folder can be moved.

        Raises:
            FileExistsError: Another process writes the file.
            ValueError: It is a URL.
        """
        write_index(local_path(path, "path"), [self.tables])

    def __len__(self) -> int:
        return len(self.tables.keys)

    def __repr__(self) -> str:
        return f"LengthIndex({len(self)} samples, {len(self.tables.shards)} shards, fields={self.fields})"

    @property
    def lengths(self) -> Array:
        """Steps: int32 `[N]`, or `[N, K]` where several fields are tracked; mapped from the file, read-only."""
        return self._lengths

    @property
    def fields(self) -> tuple[str, ...]:
        """The variable-length fields that `lengths` tells of, in its order."""
        return tuple(field.name for field in self.tables.variable if field.tracked)

    @property
    def length_id(self) -> str | None:
        """Which function measured the lengths of fields that are no arrays; None where none did, or nobody knows."""
        return self.tables.length_id

    @property
    def keys(self) -> Keys:
        """The samples' keys, by place."""
        return Keys(self.tables.keys)

    @property
    def shards(self) -> list[str]:
        """Paths or URLs of the shards."""
        return [shard.path for shard in self.tables.shards]

    @cached_property
    def starts(self) -> Array:
        """The place of each shard's first sample, then N: int64 `[S + 1]`."""
        return np.cumsum([0, *(shard.samples for shard in self.tables.shards)])

    @cached_property
    def order(self) -> Array:
        """Samples by (the sum of) their lengths, longest first, stable: int32 or int64 `[N]`; kept in the file."""
        return sort_by_length([self.tables]) if self._order is None else self._order

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of all keys and lengths by shard: equal for the same corpus, wherever it is."""
        parts = [*self.fields, *(shard.fingerprint for shard in self.tables.shards)]
        return blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()

    def verify(
        self,
        *,
        payload: bool = False,
        length: LengthOf | None = None,
        decode: Mapping[str, Decoder] | None = None,
    ) -> tuple[str, ...]:
        """Hold the index against its shards, and its own file against its checksum.

        The lengths of fields that are no arrays are measured again, if you say how; without, only their headers speak
        for them.

        Args:
            payload: read every sample too, and hold it against its crc32.
            length: `(field, bytes) -> steps`, as for `build`.
            decode: functions from bytes to a sequence, by field; where there is one, its length counts.

        Returns:
            The fields whose lengths were not measured; none if all agree.

        Raises:
            FileNotFoundError: A shard is absent.
            LengthError: A sample's length differs; shard, key, field and both numbers are named.
            ValueError: A shard has changed since it was indexed or is damaged, there are no checksums to hold a
                payload against, or `decode` names a field whose length needs no measuring.
        """
        measured, decode = self.tables.measured, dict(decode or {})
        unknown = sorted(decode.keys() - set(measured))
        if unknown:
            raise ValueError(f"decode names {unknown[0]!r}, and a function measures the lengths of {measured} alone")
        measure = Measure(length, decode)
        if payload and self.tables.crcs is None:
            raise ValueError("the index holds no checksums of payloads: build it with checksums=True")
        if self._path is not None:
            read_index(self._path, checked_up_to=None)
        for shard, first, last in zip(self.tables.shards, self.starts[:-1], self.starts[1:], strict=True):
            _verify_shard(self, shard, slice(first, last), measure, payload=payload)
        return tuple(name for name in measured if not measure.measures(name))

    def moved_to(self, shards: Shards) -> "LengthIndex":
        """The same index for the same shards in another place.

        Raises:
            ValueError: The shards are not as many, or have other names.
        """
        paths = expand_shards(shards)
        names = [[PurePosixPath(path).name for path in paths_] for paths_ in (self.shards, paths)]
        if names[0] != names[1]:
            raise ValueError(
                f"the index is of {len(names[0])} shards, {names[0][:3]}..., given are {len(names[1])}, {names[1][:3]}"
                "...: give the same shards in the same order, or build another index"
            )
        moved = tuple(replace(shard, path=path) for shard, path in zip(self.tables.shards, paths, strict=True))
        return LengthIndex(replace(self.tables, shards=moved), path=self._path, order=self._order, moved=True)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker maps the file again; sent are its name and what it held.
        if self._path is None:
            return _restore, (self.tables,)
        return _reopen, (self._path, self.fingerprint, self.shards if self._moved else None)


def decode_key(key: bytes) -> str:
    """A key as text, whatever bytes a tar held."""
    return key.decode("utf-8", "surrogateescape")


def _verify_shard(index: LengthIndex, shard: Shard, rows: slice, measure: Measure, *, payload: bool) -> None:
    size = open_file(shard.path).size
    changed = f"{shard.path}: changed since it was indexed"
    if size != shard.size:
        raise ValueError(f"{changed}: {size} bytes, the index says {shard.size}; {REBUILD}")
    fresh = scan_shard(shard.path, index.fields, measure, checksums=payload)
    if (fresh.layout, fresh.fields, fresh.keys.tolist()) != (
        index.tables.layout,
        index.tables.fields,
        index.tables.keys[rows].tolist(),
    ):
        raise ValueError(f"{changed}: its layout, fields or keys are others; {REBUILD}")
    _compare_lengths(index, fresh, rows, measure)
    if fresh.crcs is not None and index.tables.crcs is not None:
        _compare_crcs(fresh, index.tables.crcs[rows])
    if fresh.shards[0].digest != shard.digest:
        raise ValueError(f"{changed}: its headers are others; {REBUILD}")


def _compare_lengths(index: LengthIndex, fresh: Tables, rows: slice, measure: Measure) -> None:
    known = index.tables.lengths[rows]
    for column, field in enumerate(fresh.variable):
        told = field.is_array or measure.measures(field.name)
        odd = np.flatnonzero(known[:, column] != fresh.lengths[:, column]) if told else _NONE
        if len(odd):
            raise LengthError(
                f"{fresh.shards[0].path}: sample {decode_key(fresh.keys[odd[0]])!r}, field {field.name!r}: the index "
                f"says {known[odd[0], column]} steps, the shard {fresh.lengths[odd[0], column]}; {REBUILD}"
            )


def _compare_crcs(fresh: Tables, known: Array) -> None:
    odd = np.argwhere(fresh.crcs != known)
    if len(odd):
        row, column = odd[0].tolist()
        raise ValueError(
            f"{fresh.shards[0].path}: sample {decode_key(fresh.keys[row])!r}, field {fresh.fields[column].name!r}, at "
            f"offset {fresh.places[row, column]}: the bytes do not have the checksum in the index: damaged or changed"
        )


def _restore(tables: Tables) -> LengthIndex:
    return LengthIndex(tables)


def _reopen(path: str, fingerprint: str, shards: list[str] | None) -> LengthIndex:
    index = LengthIndex.open(path)
    if index.fingerprint != fingerprint:
        raise ValueError(f"{path}: the index was replaced while it was in use: start again")
    return index if shards is None else index.moved_to(shards)
