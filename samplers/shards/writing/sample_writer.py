"""Samples to shards: in blocks or one by one, from one process or many, each shard whole or not at all."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, KeysView, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypedDict, TypeVar, Unpack

from samplers.shards.dataset import Decoder
from samplers.shards.format.tar import split_name
from samplers.shards.indexing.index import LengthIndex, decode_key
from samplers.shards.indexing.index_file import SUFFIX, open_tables, read_index, write_index
from samplers.shards.indexing.tables import Layout, TablesLike
from samplers.shards.format.npy import AnyArray
from samplers.shards.storage.atomic import local_path
from samplers.shards.storage.reading import Shards
from samplers.shards.writing.existing import adopt_shards, find_shards, read_corpus, refuse_shards, remove_leftovers
from samplers.shards.writing.parts import PartWriter, finished_parts, write_all
from samplers.shards.writing.schema import FieldSchema, as_array, check_schema, infer_schema, read_schema
from samplers.shards.writing.shard_file import BlockShard, PlainShard, ShardFile
from samplers.shards.writing.source import Rename, read_shards

PartT = TypeVar("PartT")

# A block keeps its keys as text of one width.
_LONGEST_KEY: Final = 1024


class WriterOptions(TypedDict, total=False):
    """How shards are written: what `ShardWriter` takes beside the folder."""

    layout: Layout
    max_samples: int
    max_bytes: int
    block_size: int
    prefix: str
    stack: Collection[str]


class ShardWriter:
    """Write samples to numbered shards `PREFIX-000000.tar` in a folder, each with its index beside it.

    When the `with` block ends, the corpus file `PREFIX.ltx` joins the indexes. After an exception or a kill the
    finished shards stay, and a writer with `append=True` goes on behind them.

    Numbers become fields of fixed size, and so do the arrays that `stack` names; all other arrays and tensors are
    sequences `[L, *F]`. The first sample says which fields there are and of what kind; later ones must be alike.

    Attributes:
        shards: those that are finished, in their order.
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
        append: bool = False,
    ) -> None:
        """Prepare to write; the folder is made if it is absent.

        Args:
            folder: a local folder; URLs are refused.
            layout: `"blocks"`, read fast; `"plain"`, one tar group a sample.
            max_samples: most samples in a shard.
            max_bytes: most bytes of samples in a shard, headers apart; a greater sample has a shard of its own.
            block_size: most samples in a block; one is also full at 64 MiB.
            prefix: of the file names.
            stack: arrays of the same size in every sample.
            append: go on behind the shards of that prefix, if there are any. They stay as they are and say of what kind
                the fields are; what a killed writer did not finish is removed. `keys` tells what is there.

        Raises:
            FileExistsError: The folder holds shards of that prefix; with `append`, another writer is at work on them.
            FileNotFoundError: The corpus file lists a shard that is gone.
            TypeError: `stack` is a single string.
            ValueError: `folder` is a URL, an option is out of range, or a shard that is there is in another layout, of
                another kind, or has changed since it was indexed.
        """
        _check_options(layout, prefix, stack, max_samples=max_samples, max_bytes=max_bytes, block_size=block_size)
        self._folder, self._prefix = local_path(folder, "folder"), prefix
        self._shard_class: type[ShardFile] = BlockShard if layout == "blocks" else PlainShard
        self._new_shard = partial(BlockShard, block_size=block_size) if layout == "blocks" else PlainShard
        self._layout: Layout = layout
        self._max_samples, self._max_bytes = max_samples, max_bytes
        self._stack = frozenset(stack)
        self._schema: dict[str, FieldSchema] = {}
        self._like = "the first sample's"
        # In the order of writing.
        self._keys: dict[str, None] = {}
        self._number = 0
        self._open: ShardFile | None = None
        self._entered = False
        self._failure: str | None = None
        self.shards: list[Path] = []
        self._folder.mkdir(parents=True, exist_ok=True)
        if append:
            self._adopt_shards()
        else:
            refuse_shards(self._folder, prefix)

    def __enter__(self) -> Self:
        self._entered = True
        return self

    @property
    def keys(self) -> KeysView[str]:
        """The keys of all samples, those written before too, in their order."""
        return self._keys.keys()

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample.

        Args:
            sample: `__key__`, a text that no other sample has, and at least one sequence `[L, *F]`: arrays or tensors
                on the CPU, and numbers. What is added is copied.

        Raises:
            FileExistsError: Another writer is at work in the folder.
            OSError: The disk is full, or fails. The writer takes no more samples then.
            RuntimeError: The writer is not, or no longer, in its `with` block, or has failed before.
            TypeError: A value is not an array of plain numbers, or of another dtype than in earlier samples.
            ValueError: The key is a duplicate or not fit for the layout, a field is missing or new, or its feature
                shape differs from earlier samples'.
        """
        if not self._entered:
            raise RuntimeError("write within the with block: with ShardWriter(folder) as writer: writer.write(...)")
        if not isinstance(sample, Mapping):
            raise TypeError(f'a sample must be {{"__key__": str, field: array, ...}}, got {type(sample).__name__}')
        self._refuse_failed()
        key = self._check_key(sample.get("__key__"))
        arrays = {
            name: as_array(value, f"sample {key!r}, field {name!r}")
            for name, value in sample.items()
            if name != "__key__"
        }
        schema = self._schema or infer_schema(arrays, self._stack, key)
        check_schema(arrays, schema, key, self._like)
        if not self._schema:
            self._shard_class.check_schema_fits(schema)
        self._shard_class.check_fits(key, arrays, schema)
        self._add(key, arrays, schema)
        self._schema = schema
        self._keys[key] = None

    def __exit__(
        self, field_schema: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        if field_schema is not None:
            self._discard()
            return
        self._refuse_failed()
        self._finish()
        write_index(self._folder / f"{self._prefix}{SUFFIX}", self._list_parts)

    @classmethod
    def write_parts(
        cls,
        folder: str | os.PathLike[str],
        samples: Callable[[PartT], Iterable[Mapping[str, Any]]],
        parts: Iterable[PartT],
        *,
        workers: int = 0,
        append: bool = False,
        progress: bool = False,
        **options: Unpack[WriterOptions],
    ) -> LengthIndex:
        """Write a corpus from parts, in several processes; its bytes do not depend on how many.

        Part 3 goes to shards `PREFIX-000003-000000.tar` and so on, which appear under these names when they are whole.
        After an error or a kill the finished ones stay, and a call with `append=True` writes the rest.

        Args:
            folder: a local folder; URLs are refused.
            samples: gives the samples of a part, the same ones every time; picklable where processes are not forked.
            parts: names of files, numbers or whatever else `samples` takes; picklable.
            workers: processes; 0 stays in this one.
            append: go on with the same parts, and more behind them; of a finished part only the first sample is asked
                for, and held against what was written.
            progress: show a bar.
            **options: as for `ShardWriter`.

        Returns:
            The index of the corpus, which is in the order of the parts.

        Raises:
            FileExistsError: The folder holds shards of that prefix; with `append`, another writer is at work on them.
            RuntimeError: `samples` or the writing of its samples failed, or a process was killed; the part is named.
            TypeError: `stack` is a single string, or a part cannot be sent to a process.
            ValueError: `folder` is a URL, an option is out of range, a key is in two parts, parts differ in kind, or
                there is no sample.
        """
        part_list = list(parts)
        _check_options(**{"layout": "blocks", "prefix": "shard", "stack": ()} | options)
        folder, prefix = local_path(folder, "folder"), options.get("prefix", "shard")
        folder.mkdir(parents=True, exist_ok=True)
        if append:
            remove_leftovers(folder, prefix)
        else:
            refuse_shards(folder, prefix)
        open_writer = _Opener(cls, folder, options)
        write_part = PartWriter(open_writer, samples, folder, prefix, finished_parts(folder, prefix))
        try:
            return LengthIndex.open(write_all(write_part, part_list, workers, progress=progress))
        except BaseException:
            # The other processes were killed at their work; other programs' are let be.
            with suppress(FileExistsError):
                remove_leftovers(folder, prefix)
            raise

    @classmethod
    def rewrite(
        cls,
        folder: str | os.PathLike[str],
        shards: Shards,
        index: LengthIndex | str | os.PathLike[str] | None = None,
        fields: Collection[str] | None = None,
        *,
        decode: Mapping[str, Decoder] | None = None,
        rename: Rename | None = None,
        workers: int = 0,
        append: bool = False,
        progress: bool = False,
        **options: Unpack[WriterOptions],
    ) -> LengthIndex:
        """Write a corpus of the samples of other shards, as of plain ones in blocks; each shard is a part.

        Args:
            folder: a local folder; URLs are refused.
            shards: paths, brace patterns, wildcards, folders or URLs, or the `.ltx` file of a corpus.
            index: of these shards, in their order, or its file; None for the files beside them, where there are any. It
                tells the lengths and, where it has them, the checksums that what is read must have.
            fields: those to take over; None for all.
            decode: functions from bytes to arrays, for fields in other encodings than npy and cls; picklable.
            rename: `(shard, key) -> key`, for keys that are unique in their shard alone; picklable.
            workers: processes; 0 stays in this one.
            append: go on after an error or a kill.
            progress: show a bar.
            **options: as for `ShardWriter`.

        Returns:
            The index of the new corpus.

        Raises:
            FileExistsError: The folder holds shards of that prefix; with `append`, another writer is at work on them.
            FileNotFoundError: There are no shards, or some have an index and others none.
            RuntimeError: A shard could not be read or written, is not what the index says, or a process was killed; it
                is named.
            TypeError: `stack` or `fields` is a single string.
            ValueError: `folder` is a URL, an option is out of range, the index does not fit, a key is in two shards,
                shards differ in kind, or a shard is among those to be written.
        """
        folder = local_path(folder, "folder")
        source, slices = read_shards(shards, index, fields, decode, rename)
        folder.mkdir(parents=True, exist_ok=True)
        own = {path.absolute() for path in find_shards(folder, options.get("prefix", "shard")).values()}
        for shard_slice in slices:
            if Path(shard_slice.shard).absolute() in own:
                raise ValueError(
                    f"{shard_slice.shard} would be read, and others of its prefix written: give another prefix="
                )
        return cls.write_parts(folder, source, slices, workers=workers, append=append, progress=progress, **options)

    def _adopt_shards(self) -> None:
        remove_leftovers(self._folder, self._prefix)
        found = find_shards(self._folder, self._prefix)
        listed = read_corpus(self._folder, self._prefix, list(found.values()))
        for number, shard in found.items():
            if len(number) > 1 and shard.name not in listed:
                raise ValueError(
                    f"{shard} is of a part, and not all parts are written: go on with ShardWriter.write_parts(..., "
                    "append=True)"
                )
        parts = adopt_shards(list(found.values()), self._layout, self._stack)
        self.shards = list(found.values())
        self._number = max((number[0] + 1 for number in found), default=0)
        self._keys = dict.fromkeys(decode_key(key) for part in parts for key in part.array("keys").tolist())
        if parts:
            first, _ = read_index(f"{self.shards[0]}{SUFFIX}")
            self._schema, self._like = read_schema(first), f"in {self.shards[0]}"

    def _check_key(self, key: object) -> str:
        if not isinstance(key, str):
            raise TypeError(f"__key__ must be a str, got {key!r}")
        if not 0 < len(key) <= _LONGEST_KEY or "\0" in key or not _is_unicode(key):
            raise ValueError(f"__key__ must be 1 to {_LONGEST_KEY} characters of Unicode without NUL, got {key[:80]!r}")
        if key in self._keys:
            raise ValueError(f"__key__ must be unique, {key!r} was written before")
        if self._layout == "plain" and split_name(f"{key}.x") != (key, "x"):
            raise ValueError(
                f"__key__ must do as a file name in the plain layout, without dots in its last part, got {key!r}: "
                'rename it, or choose layout="blocks", which takes any text'
            )
        return key

    def _add(self, key: str, arrays: Mapping[str, AnyArray], schema: dict[str, FieldSchema]) -> None:
        size = sum(array.nbytes for array in arrays.values())
        if self._open is not None and not self._open.has_room(key, size, self._max_samples, self._max_bytes):
            with self._failing():
                self._finish()
        if self._open is None:
            self._open = self._new_shard(self._folder / f"{self._prefix}-{self._number:06}.tar", schema)
        with self._failing():
            self._open.add(key, arrays)

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
        self._number += 1

    def _discard(self) -> None:
        if self._open is not None:
            for _ in range(min(self._open.samples, len(self._keys))):
                self._keys.popitem()
            self._open.file.discard()
            self._open = None

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            # Half a block may be written, and writing it again would write its samples twice.
            self._discard()
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def _refuse_failed(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"{self._folder}: writing failed before ({self._failure}), and the samples behind the last finished "
                "shard are lost: go on with a new writer, append=True, and the samples that are not in its keys"
            )

    def _list_parts(self) -> list[TablesLike]:
        # Listed anew: another writer may have gone on behind the shards that this one found, and the shards of a part
        # count only when all parts are written.
        found = find_shards(self._folder, self._prefix)
        listed = {shard.name for shard in self.shards} | read_corpus(self._folder, self._prefix, list(found.values()))
        shards = [shard for number, shard in found.items() if len(number) == 1 or shard.name in listed]
        indexes = [Path(f"{shard}{SUFFIX}") for shard in shards]
        # One without an index is another writer's, who lists it when it is finished.
        parts = [
            open_tables(str(index), str(shard))
            for shard, index in zip(shards, indexes, strict=True)
            if shard in self.shards or index.exists()
        ]
        if not parts:
            raise ValueError(f"nothing was written to {self._folder}: a corpus needs a sample")
        return parts


@dataclass(frozen=True)
class _Opener:
    """Opens writers of parts, in whatever process."""

    writer: type[ShardWriter]
    folder: Path
    options: WriterOptions

    def __call__(self, prefix: str) -> ShardWriter:
        return self.writer(self.folder, append=True, **self.options | {"prefix": prefix})


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


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
