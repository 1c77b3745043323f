"""The index of a corpus: every sample's length, offset and checksum, in a small file next to the shards."""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np

from collate.deprecated.names import renamed_arguments
from samplers.shards.format.header_lengths import DeclaredLength, SoundHeaders, header_length_of
from samplers.shards.format.keys import Keys
from samplers.shards.format.npy import AnyArray
from samplers.shards.indexing.cache import IndexCache
from samplers.shards.indexing.find_index import find_index_files, refuse_unfinished
from samplers.shards.indexing.index_file import (
    FORMAT_VERSION,
    check_version,
    open_tables,
    read_index,
    send_index,
    sort_by_length,
    write_index,
)
from samplers.shards.indexing.measuring import Decoder, LengthOf, Measure, identify
from samplers.shards.indexing.tables import Tables, join_tables
from samplers.shards.indexing.verify import check_request, check_shard, complete_measure
from samplers.shards.storage.atomic import is_url, local_path
from samplers.shards.storage.mirror import check_writable
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.network.transport import DEFAULT, Transport, check_transport
from samplers.shards.storage.paths import expand_shards, refuse_twice
from samplers.shards.storage.process_pool import run_in_processes, run_in_threads
from samplers.shards.storage.reading import Shards, is_remote


class LengthIndex:
    """The lengths of a corpus on disk, and the offsets of its samples.

    A sampler takes it in place of lengths: `LengthBucketBatchSampler(index, ...)`. Make one with `build`, `open`,
    `open_all` or `concat`: the arguments of the class itself are internal.
    """

    def __init__(
        self,
        tables: Tables,
        *,
        path: str | None = None,
        order: AnyArray | None = None,
        moved: bool = False,
        transport: Transport = DEFAULT,
    ) -> None:
        """Internal: use `build`, `open`, `open_all` or `concat`."""
        self._tables = tables
        self._path, self._order, self._moved = path, order, moved
        self._transport = transport
        self._fingerprint: str | None = None
        tracked = [field.tracked for field in tables.variable]
        lengths = tables.lengths if all(tracked) else tables.lengths[:, np.flatnonzero(tracked)]
        self._lengths = lengths.reshape(-1) if sum(tracked) == 1 else lengths

    @classmethod
    @renamed_arguments(fields="length_fields")
    def build(
        cls,
        shards: Shards,
        length_fields: Collection[str] | None = None,
        length: LengthOf | None = None,
        *,
        workers: int = 0,
        checksums: bool = False,
        resume: bool | str | os.PathLike[str] = False,
        length_id: str | None = None,
        length_field: str | None = None,
        progress: bool = False,
        transport: Transport | None = None,
    ) -> Self:
        """Index shards: read their headers and skip their payloads.

        Sound has its frames in its header too: wav, flac, ogg, opus and mp3, which `soundfile` reads (install
        `lengthtrack[speech]`). Their lengths are frames, and `rates` has the frames in a second.

        With `resume=True` the index `SHARD.ltx` of each shard is written next to it as soon as the shard is scanned,
        also in an object store, and a shard with such an index is not scanned again. So a build that was killed resumes
        where it was. An index is used if it is complete, is not older than the shard, and has the shard's size;
        `verify` checks more. Remote shards are scanned several at a time.

        Args:
            shards: Paths, brace patterns, wildcards, folders or URLs.
            length_fields: Fields whose lengths count. None for every `.npy` array with an axis; if there is none, all
                sound.
            length: `(field, bytes) -> steps`, for fields in other encodings. Picklable, if there are workers.
            workers: Number of processes. 0 stays in this one.
            checksums: Read payloads too, and store a crc32 of every sample and field.
            resume: Write the index of each shard next to it, or in a folder or its URL (for shards that are read-only),
                and use those that exist. If `length_fields` is None, their fields are used.
            length_id: A name for `length`, which the index records, so that an index by another function is refused.
                None makes one from its source without comments and from the constants and functions of its module
                that it uses, but not from what it calls in other modules: change the name when those change.
            length_field: The member that declares the lengths of fields that are not arrays, instead of `length`: such
                as `json.num_samples`, the key `num_samples` in the member `json`. Where `length_fields` names none, the
                field is the one that is sound, or `json` itself. A list there counts with its length.
            progress: Show a progress bar.
            transport: How remote shards are read: connections, timeouts and retries. None for the defaults.

        Raises:
            FileExistsError: Another process is writing the index of a shard.
            FileNotFoundError: A shard is absent.
            LengthError: A block's lengths do not fit its steps, or `length` or `length_field` gives no length.
            ModuleNotFoundError: soundfile is needed, and not installed.
            OSError: A shard cannot be read, for a remote one after all retries.
            ProcessKilledError: A process was killed. The message has its shard. A `RuntimeError`.
            TypeError: `length_fields` is a single string, or another argument has the wrong type.
            ValueError: A shard comes twice, is damaged or empty or has a pickle, or samples differ in their fields; an
                existing index of a shard is of other fields or by another function, or a function has no name;
                a sound file has no length in its header; `length_field` names no field or comes with `length`;
                `resume=True` with a shard over HTTP that has no index; or `workers` is negative.
        """
        if isinstance(length_fields, str):
            raise TypeError(f"length_fields must be a list of names, got the string {length_fields!r}")
        if length_id is not None and (not isinstance(length_id, str) or not length_id):
            raise TypeError(f"length_id must be a name, got {length_id!r}")
        if header_length_of(length_id) is not None:
            raise ValueError(f"length_id={length_id!r} is a name for lengths from headers: choose another")
        if length_field is not None and length is not None:
            raise ValueError("length_field and length both measure: give one")
        cache_dir = resume if isinstance(resume, bool) or is_url(resume) else local_path(resume, "resume")
        if isinstance(cache_dir, Path):
            cache_dir.mkdir(parents=True, exist_ok=True)
        transport = check_transport(transport)
        paths = expand_shards(shards, transport)
        refuse_unfinished(paths)
        length_id = identify(length) if length_id is None and length is not None else length_id
        header = SoundHeaders() if length_field is None else DeclaredLength(length_field)
        if not isinstance(cache_dir, (bool, Path)):
            cache_dir = os.fspath(cache_dir)
            check_writable(cache_dir)
        cache = IndexCache(length_fields, length, checksums, cache_dir, length_id, header, transport).inherit_fields(
            paths
        )
        # `closing` kills the workers when this process is interrupted.
        run = (
            run_in_threads if not workers and any(map(is_remote, paths)) else partial(run_in_processes, workers=workers)
        )
        with closing(run(cache, paths, unit="shard", progress=progress)) as results:
            parts = dict(results)
        # Workers finish in any order. The index has the order of the shards.
        return cls(join_tables([parts[number] for number in range(len(paths))]), transport=transport)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, transport: Transport | None = None) -> Self:
        """Map an index file into memory. Only its header is read, and files up to 256 MiB for their checksum.

        Args:
            path: Path of an `.ltx` file. A URL is read whole.
            transport: How a remote file, and later its shards, are read. None for the defaults.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: It cannot be read, if it is remote after all retries.
            TypeError: `transport` is not a `Transport`.
            ValueError: The file is not an index, of another version, truncated or damaged. The message says which.
        """
        path = _absolute(os.fspath(path))
        transport = check_transport(transport)
        tables, order = read_index(path, transport=transport)
        return cls(tables, path=path, order=order, transport=transport)

    @classmethod
    def concat(cls, indexes: Sequence["LengthIndex"]) -> Self:
        """The samples of several indexes, in their order.

        Raises:
            ValueError: There are none, one shard is in two, or their shards differ in layout, fields or checksums.
        """
        refuse_twice((shard, name) for index in indexes for name in [repr(index)] for shard in index.shards)
        return cls(join_tables([tables_of(index) for index in indexes]))

    @classmethod
    def open_all(cls, paths: Sequence[str], *, transport: Transport | None = None) -> Self:
        """The samples of several index files, in their order. No file stays open, and each may be a URL.

        Args:
            paths: Paths or URLs.
            transport: How remote files, and later their shards, are read. None for the defaults.

        Raises:
            FileNotFoundError: One of them is absent.
            OSError: One cannot be read, if it is remote after all retries.
            TypeError: `transport` is not a `Transport`.
            ValueError: One is damaged, one shard is in two, or their shards differ in layout, fields or checksums.
        """
        transport = check_transport(transport)
        open_part = partial(open_tables, transport=transport)
        absolute = list(map(_absolute, paths))
        if any(map(is_remote, paths)):
            parts = [part for _, part in sorted(run_in_threads(open_part, absolute), key=lambda each: each[0])]
        else:
            parts = list(map(open_part, absolute))
        refuse_twice((shard.path, path) for part, path in zip(parts, paths, strict=True) for shard in part.shards)
        return cls(join_tables(parts), transport=transport)

    def save(self, path: str | os.PathLike[str], *, version: int = FORMAT_VERSION) -> None:
        """Write the index to a file, complete or not at all.

        Args:
            path: A path, or a URL in an object store. Best in the folder of the shards: their paths are then relative,
                and the folder can be moved.
            version: Version of the file: 2, or 1 for release 0.1. Plain shards always have version 1.

        Raises:
            FileExistsError: Another process is writing the file.
            TypeError: `version` is not an int.
            OSError: A remote file cannot be written.
            ValueError: `path` is a URL over HTTP, or `version` is neither 1 nor 2.
        """
        if not is_url(path):
            write_index(local_path(path, "path"), [self._tables], check_version(version))
            return
        send_index(os.fspath(path), self._tables, check_version(version), self._transport)

    def __len__(self) -> int:
        return len(self._tables.keys)

    def __repr__(self) -> str:
        return f"LengthIndex({len(self)} samples, {len(self._tables.shards)} shards, fields={self.fields})"

    @property
    def lengths(self) -> AnyArray:
        """Lengths in steps: int32 `[N]`, or `[N, K]` for several fields. Mapped from the file, read-only."""
        return self._lengths

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of `lengths`, in their order."""
        return tuple(field.name for field in self._tables.variable if field.tracked)

    @property
    def length_id(self) -> str | None:
        """What measured the lengths of fields that are not arrays. None if nothing did or it is unknown.

        The name of a function, `sound headers`, or `declared in FIELD.KEY`.
        """
        return self._tables.length_id

    @property
    def rates(self) -> dict[str, tuple[int, ...]]:
        """Steps in a second, by field, where headers have them: ascending, several if samples differ."""
        return dict(self._tables.rates)

    @property
    def keys(self) -> Keys:
        """The key of each sample, by index."""
        return Keys(self._tables.keys)

    @property
    def shards(self) -> list[str]:
        """Paths or URLs of the shards."""
        return [shard.path for shard in self._tables.shards]

    @property
    def starts(self) -> AnyArray:
        """Index of each shard's first sample, then N: int64 `[S + 1]`."""
        return self._tables.starts

    @property
    def order(self) -> AnyArray:
        """Samples by (the sum of) their lengths, longest first, stable: int32 or int64 `[N]`. Stored in the file."""
        if self._order is None:
            self._order = sort_by_length([self._tables])
        return self._order

    # A property, and not a cached one: type checkers take no descriptor of another kind for one of a protocol.
    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of all keys and lengths by shard: equal for the same corpus in any folder."""
        # Without paths, so that a moved corpus keeps its positions.
        if self._fingerprint is None:
            parts = [*self.fields, *(shard.fingerprint for shard in self._tables.shards)]
            self._fingerprint = blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
        return self._fingerprint

    @renamed_arguments(payload="checksums")
    def verify(
        self,
        *,
        checksums: bool = False,
        length: LengthOf | None = None,
        decode: Mapping[str, Decoder] | None = None,
        transport: Transport | None = None,
    ) -> tuple[str, ...]:
        """Compare the index with its shards, and its own file with its checksum.

        Lengths from the headers of sound, or declared in another member, are read again. Those by a function need it
        again, as `length` or `decode`: without, they are not compared.

        Args:
            checksums: Read every sample too, and compare its crc32.
            length: `(field, bytes) -> steps`, as for `build`.
            decode: Functions from bytes to a sequence, by field. They come before `length`.
            transport: How remote shards are read. None as the index was opened. What does not fit is read once more
                before it is an error.

        Returns:
            The fields whose lengths were not measured. Empty if everything was compared.

        Raises:
            FileNotFoundError: A shard is absent.
            LengthError: The length of a sample differs. The message has shard, key, field and both lengths.
            ValueError: A shard has changed since it was indexed or is damaged, there are no checksums to compare, or
                `decode` names a field whose length needs no measuring.
            OSError: A shard cannot be read, for a remote one after all retries.
            TypeError: `decode` returns a masked array with masked values, or `transport` is not a `Transport`.
        """
        transport = self._transport if transport is None else check_transport(transport)
        measure = complete_measure(self._tables, Measure(length, dict(decode or {})))
        check_request(self._tables, measure, checksums=checksums)
        if self._path is not None:
            read_index(self._path, checked_up_to=None, transport=transport)
        for number in range(len(self._tables.shards)):
            check_shard(self._tables.of_shard(number), measure, checksums=checksums, transport=transport)
        return tuple(name for name in self._tables.measured if not measure.measures(name))

    def moved_to(self, shards: Shards) -> "LengthIndex":
        """The same index for the same shards at other paths.

        Raises:
            ValueError: The number of shards or their file names differ.
        """
        shards = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
        if [os.fspath(shard) for shard in shards] == self.shards:
            # Names in an index are no patterns: `{0..99999999}` in one of a stranger would take all memory.
            return self
        paths = expand_shards(shards, self._transport)
        # File names must agree: shards in another order would give wrong samples without an error.
        names = [_names_of(self.shards), _names_of(paths)]
        if names[0] != names[1]:
            raise ValueError(
                f"the index is of {len(names[0])} shards, {names[0][:3]}..., given are {len(names[1])}, {names[1][:3]}"
                "...: give the same shards in the same order, or build another index"
            )
        moved = tuple(replace(shard, path=path) for shard, path in zip(self._tables.shards, paths, strict=True))
        tables = replace(self._tables, shards=moved)
        return LengthIndex(tables, path=self._path, order=self._order, moved=True, transport=self._transport)

    def __reduce__(self) -> tuple[Any, ...]:
        # An index with a file pickles as its path: a worker maps the file again, and compares the fingerprint.
        if self._path is None:
            return _restore, (self._tables, self._transport)
        return _reopen, (self._path, self.fingerprint, self.shards if self._moved else None, self._transport)


def _names_of(paths: Sequence[str]) -> list[str]:
    """The file names of shards: of URLs without their queries, which may be signatures."""
    whole = [PurePosixPath(path).name for path in paths]
    plain = [PurePosixPath(path.partition("?")[0] if "://" in path else path).name for path in paths]
    # Of /get?file=a and /get?file=b the queries are the names.
    return plain if len(set(plain)) == len(set(whole)) else whole


def tables_of(index: LengthIndex) -> Tables:
    """The tables of an index, for the modules that read samples. Users need the attributes of `LengthIndex` alone."""
    return index._tables  # noqa: SLF001


def open_index(shards: Shards, transport: Transport = DEFAULT) -> LengthIndex:
    """The index of shards: of index files, of a folder, or of the files next to the shards.

    Args:
        shards: As of `find_index_files`.
        transport: How remote files are read.

    Raises:
        FileNotFoundError: A file is absent.
        ValueError: A file is damaged, a folder has several corpora, or the indexes do not fit each other.
    """
    paths = find_index_files(shards, transport)
    if len(paths) == 1:
        return LengthIndex.open(paths[0], transport=transport)
    return LengthIndex.open_all(paths, transport=transport)


def _absolute(path: str) -> str:
    """The path of an index that another process can open."""
    # A worker may run in another folder.
    return path if "://" in path else str(Path(path).absolute())


def _restore(tables: Tables, transport: Transport = DEFAULT) -> LengthIndex:
    """Unpickle an index without a file."""
    return LengthIndex(tables, transport=transport)


def _reopen(path: str, fingerprint: str, shards: list[str] | None, transport: Transport = DEFAULT) -> LengthIndex:
    """Unpickle an index with a file.

    Raises:
        ValueError: The file is another one now.
    """
    index = LengthIndex.open(path, transport=transport)
    if index.fingerprint != fingerprint:
        raise ValueError(f"{shown(path)}: the index was replaced while it was in use: start again")
    return index if shards is None else index.moved_to(shards)
