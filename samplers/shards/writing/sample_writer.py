"""Write samples to numbered shards, each complete or not at all."""

import os
from collections.abc import Collection, Iterator, KeysView, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Final, Self, TypedDict

from collate.widths import check_count
from samplers.shards.format.keys import decode_all
from samplers.shards.format.npy import AnyArray
from samplers.shards.format.tar import split_name
from samplers.shards.indexing.index_file import (
    FORMAT_VERSION,
    SUFFIX,
    check_version,
    open_tables,
    prepare_index,
    read_index,
    write_index,
)
from samplers.shards.indexing.tables import Layout, TablesLike
from samplers.shards.storage.mirror import Mirror, open_target
from samplers.shards.storage.network.transport import Transport, check_transport
from samplers.shards.writing.existing import adopt_shards, find_shards, read_corpus, refuse_shards, remove_leftovers
from samplers.shards.writing.schema import FieldSchema, as_array, check_schema, infer_schema, read_schema
from samplers.shards.writing.shard_file import BlockShard, PlainShard, ShardFile
from samplers.shards.writing.shard_group import FinishedShard, ShardGroup

# A block stores its keys as text of one width, so one long key makes all of them long.
_LONGEST_KEY: Final = 1024


class WriterOptions(TypedDict, total=False):
    """How shards are written: the options of a writer besides the folder."""

    layout: Layout
    max_samples: int
    max_bytes: int
    block_size: int
    prefix: str
    stack: Collection[str]
    version: int
    transport: Transport | None


class SampleWriter:
    """Writes samples to shards `PREFIX-000000.tar` and so on. Users have `ShardWriter`, which documents the options.

    Attributes:
        local_shards: The finished shards, in their order, where they were written: in the folder, or in the local
            folder of a mirror.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | Mirror,
        *,
        layout: Layout = "blocks",
        max_samples: int = 100_000,
        max_bytes: int = 1 << 28,
        block_size: int = 2000,
        prefix: str = "shard",
        stack: Collection[str] = (),
        version: int = FORMAT_VERSION,
        append: bool = False,
        transport: Transport | None = None,
    ) -> None:
        """Prepare to write. The folder is made if it does not exist.

        Args:
            folder: A folder, or its URL in an object store. Shards are then written in a temporary folder, and sent
                as soon as they are finished, each before its index.
            layout: `"blocks"`, which reads fast, or `"plain"`, one tar group for each sample.
            max_samples: Largest number of samples in a shard.
            max_bytes: Largest number of bytes of samples in a shard, without headers. A larger sample has a shard of
                its own.
            block_size: Largest number of samples in a block. A block is also full at 64 MiB.
            prefix: Start of the file names.
            stack: Arrays that have the same size in every sample.
            version: Version of the format of blocks and their indexes: 2, or 1, which is larger, for release 0.1.
                One corpus may hold shards of both; then its index has the version of the last writer. The plain layout
                is the same in both.
            append: Continue behind existing shards of that prefix. They stay as they are and define the schema.
                Leftovers of a killed writer are removed. `keys` has the samples that exist.
            transport: How files are sent to a URL: timeouts and retries. None for the defaults.

        Raises:
            FileExistsError: The folder has shards of that prefix. With `append`: another writer is at work on them.
            FileNotFoundError: The corpus file lists a shard that does not exist.
            OSError: A remote folder cannot be read.
            TypeError: A count or `version` is not an int, `stack` is a single string, or `transport` no `Transport`.
            ValueError: `folder` is a URL over HTTP, an option is out of range, or an existing shard has another layout
                or schema, or has changed since it was indexed.
        """
        counts = {"max_samples": max_samples, "max_bytes": max_bytes, "block_size": block_size}
        check_writer_options(layout, prefix, stack, version, **counts)
        self._prefix = prefix
        self._folder, self._mirror = open_target(folder, prefix, check_transport(transport))
        self._shard_class: type[ShardFile] = BlockShard if layout == "blocks" else PlainShard
        in_blocks = partial(BlockShard, block_size=block_size, version=version)
        self._new_shard = in_blocks if layout == "blocks" else PlainShard
        self._layout: Layout = layout
        self._version = version
        self._max_samples, self._max_bytes = max_samples, max_bytes
        self._stack = frozenset(stack)
        self._schema: dict[str, FieldSchema] = {}
        self._schema_origin = "the first sample's"
        # A dict, because it keeps the order of writing.
        self._keys: dict[str, None] = {}
        self._number = 0
        self._open: ShardFile | None = None
        self._group = ShardGroup(self._add_named)
        self._entered = False
        self._failure: str | None = None
        self._lock = Lock()
        self.local_shards: list[Path] = []
        self._folder.mkdir(parents=True, exist_ok=True)
        if append:
            self._adopt_shards()
        else:
            refuse_shards(self._folder, prefix, self._where)

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __repr__(self) -> str:
        name = f"{self._where!r}, prefix={self._prefix!r}, layout={self._layout!r}"
        return f"{type(self).__name__}({name}, {len(self._keys)} samples, {len(self.shards)} finished shards)"

    @property
    def shards(self) -> list[Any]:
        """The finished shards, in their order: paths, or URLs if the folder is remote."""
        return self.local_shards if self._mirror is None else list(map(self._mirror.url_of, self.local_shards))

    @property
    def _where(self) -> str:
        """The folder, or its URL, for messages."""
        return str(self._folder) if self._mirror is None else self._mirror.url

    @property
    def keys(self) -> KeysView[str]:
        """The keys of all samples in their order, also of those that existed before."""
        return self._keys.keys()

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample. Threads may write at the same time; the samples of a shard are then in the order of arrival.

        Args:
            sample: `__key__`, a text that no other sample has, and at least one sequence `[L, *F]`: arrays or tensors
                on the CPU, and numbers. Values are copied.

        Raises:
            FileExistsError: Another writer is at work in the folder.
            OSError: The disk is full, or fails. The writer then takes no more samples.
            RuntimeError: The writer is not in its `with` block, or has failed before.
            TypeError: A value is not an array of plain numbers, or has another dtype than in earlier samples.
            ValueError: The key is a duplicate or does not fit the layout, a field is missing or new, or its feature
                shape differs from earlier samples.
        """
        if not self._entered:
            raise RuntimeError("write within the with block: with ShardWriter(folder) as writer: writer.write(...)")
        if not isinstance(sample, Mapping):
            raise TypeError(f'a sample must be {{"__key__": str, field: array, ...}}, got {type(sample).__name__}')
        # Threads that prepare samples may share a writer.
        with self._lock:
            self._write(sample)

    def _write(self, sample: Mapping[str, Any]) -> None:
        """Check a sample and add it."""
        self._refuse_failed()
        key = self._check_key(sample.get("__key__"))
        arrays = {
            name: as_array(value, f"sample {key!r}, field {name!r}")
            for name, value in sample.items()
            if name != "__key__"
        }
        schema = self._schema or infer_schema(arrays, self._stack, key)
        check_schema(arrays, schema, key, self._schema_origin)
        if not self._schema:
            self._shard_class.check_schema_fits(schema)
        self._shard_class.check_fits(key, arrays, schema)
        self._add(key, arrays, schema)
        # Only a sample that was written defines the schema and owns its key.
        self._schema = schema
        self._keys[key] = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        if kind is not None:
            self._discard()
            return
        self._refuse_failed()
        with self._failing():
            self._finish()
            self._group.commit()
        corpus = self._folder / f"{self._prefix}{SUFFIX}"
        write_index(corpus, self._list_tables, self._version)
        if self._mirror is not None:
            self._mirror.push([corpus])

    def _adopt_shards(self) -> None:
        """Continue behind existing shards.

        Raises:
            ValueError: A shard belongs to a part that is not finished.
        """
        remove_leftovers(self._folder, self._prefix)
        existing = find_shards(self._folder, self._prefix)
        self.local_shards = list(existing.values())
        listed = read_corpus(self._folder, self._prefix, self.local_shards)
        for number, shard in existing.items():
            if len(number) > 1 and shard.name not in listed:
                raise ValueError(
                    f"{shard} is of a part, and not all parts are written: continue with ShardWriter.write_parts(..., "
                    "append=True)"
                )
        tables = adopt_shards(self.local_shards, self._layout, self._stack, self._version)
        self._number = max((number[0] + 1 for number in existing), default=0)
        self._keys = dict.fromkeys(key for part in tables for key in decode_all(part.array("keys").tolist()))
        if tables:
            first, _ = read_index(f"{self.local_shards[0]}{SUFFIX}")
            self._schema, self._schema_origin = read_schema(first), f"in {self.local_shards[0]}"

    def _check_key(self, key: object) -> str:
        """The key, if a sample may have it.

        Raises:
            TypeError: It is not text.
            ValueError: It is too long, a duplicate, or not fit for the layout.
        """
        if not isinstance(key, str):
            raise TypeError(f"__key__ must be a str, got {key!r}")
        if not 0 < len(key) <= _LONGEST_KEY or "\0" in key or not _is_unicode(key):
            raise ValueError(f"__key__ must be 1 to {_LONGEST_KEY} characters of Unicode without NUL, got {key[:80]!r}")
        if key in self._keys:
            raise ValueError(f"__key__ must be unique, {key!r} was written before")
        if self._layout == "plain" and split_name(f"{key}.x") != (key, "x"):
            raise ValueError(
                f"__key__ must do as a file name in the plain layout, without dots in its last part, got {key!r}: "
                'rename it, or choose the layout "blocks", which takes any text'
            )
        return key

    def _add(self, key: str, arrays: Mapping[str, AnyArray], schema: dict[str, FieldSchema]) -> None:
        """Add a sample to the open shard, or to the next one."""
        size = sum(array.nbytes for array in arrays.values())
        if self._open is not None and not self._open.has_room(key, size, self._max_samples, self._max_bytes):
            with self._failing():
                self._finish()
        if self._open is None:
            self._open = self._new_shard(self._folder / f"{self._prefix}-{self._number:06}.tar", schema)
        with self._failing():
            self._open.add(key, arrays)

    def _finish(self) -> None:
        """Finish the open shard, and write its index. They get their names soon, with those of other shards."""
        if self._open is None:
            return
        path = self._open.path
        tables = self._open.finish()
        index = prepare_index(path.with_name(path.name + SUFFIX), [tables], self._version)
        finished = FinishedShard(self._open.file, index, self._open.samples, tables.shards[0].size)
        self._open = None
        self._number += 1
        self._group.add(finished)

    def _add_named(self, paths: list[Path]) -> None:
        """Count shards as finished that have their final names."""
        if self._mirror is not None:
            self._mirror.push([each for path in paths for each in (path, path.with_name(path.name + SUFFIX))])
        self.local_shards += paths

    def _discard(self) -> None:
        """Remove the open shard, and forget the keys of its samples. Finished shards get their names, if they can."""
        if self._open is not None:
            # The sample that failed is counted in the shard, but its key was not yet stored if it was the first.
            self._forget(self._open.samples)
            self._open.file.discard()
            self._open = None
        # There was an error before, which this one must not hide.
        with suppress(OSError):
            self._group.commit()
        self._forget(self._group.lost_samples)
        self._group.lost_samples = 0

    def _forget(self, samples: int) -> None:
        """Forget the keys of the last samples."""
        for _ in range(min(samples, len(self._keys))):
            self._keys.popitem()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Let the writer fail for good on an error."""
        try:
            yield
        except BaseException as error:
            # Half a block may be on the disk. To try again would write its samples twice.
            self._discard()
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def _refuse_failed(self) -> None:
        """Refuse to continue after an error.

        Raises:
            RuntimeError: There was one.
        """
        if self._failure is not None:
            raise RuntimeError(
                f"{self._where}: writing failed before ({self._failure}), and the samples behind the last finished "
                "shard are lost: continue with a new writer, append=True, and the samples that are not in its keys"
            )

    def _list_tables(self) -> list[TablesLike]:
        """The tables of all shards for the corpus file.

        Raises:
            ValueError: There are none.
        """
        # Listed again: another writer may have added shards behind those that this one adopted. Shards of a part count
        # only when all parts are written.
        existing = find_shards(self._folder, self._prefix)
        written = set(self.local_shards)
        listed = {shard.name for shard in written}
        listed |= read_corpus(self._folder, self._prefix, list(existing.values()))
        shards = [shard for number, shard in existing.items() if len(number) == 1 or shard.name in listed]
        # A shard without an index belongs to another writer, which lists it when it has finished.
        tables = [
            open_tables(f"{shard}{SUFFIX}", str(shard))
            for shard in shards
            if shard in written or Path(f"{shard}{SUFFIX}").exists()
        ]
        if not tables:
            raise ValueError(f"nothing was written to {self._where}: a corpus needs a sample")
        return tables


def check_writer_options(
    layout: str, prefix: str, stack: Collection[str], version: int = FORMAT_VERSION, **counts: int
) -> None:
    """Check the options of a writer.

    Raises:
        TypeError: A count or the version is not an int, or `stack` is a single string.
        ValueError: An option is out of range.
    """
    for name, value in counts.items():
        check_count(name, value, least=1, hint="give a number, or leave it out for the default")
    check_version(version)
    if layout not in {"blocks", "plain"}:
        raise ValueError(f'layout must be "blocks" or "plain", got {layout!r}')
    if not prefix or set(prefix) & set("./\\*?[]{}"):
        raise ValueError(f"prefix must be a file name without dots, slashes, braces and wildcards, got {prefix!r}")
    if isinstance(stack, str):
        raise TypeError(f"stack must be a list of field names, got the string {stack!r}")


def _is_unicode(text: str) -> bool:
    """Whether a text has only whole characters."""
    # Half a surrogate pair is not a character, and has no UTF-8.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
