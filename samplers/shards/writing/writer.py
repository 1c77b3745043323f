"""Write corpora: sample by sample, from parts in several processes, or from the samples of other shards.

>>> import numpy as np
>>> from tempfile import TemporaryDirectory
>>> with TemporaryDirectory() as folder:
...     with ShardWriter(folder, max_samples=2) as writer:
...         for key in "abc":
...             writer.write({"__key__": key, "tokens": np.arange(3)})
...     with ShardWriter(folder, max_samples=2, append=True) as writer:
...         existing = list(writer.keys)
...         writer.write({"__key__": "d", "tokens": np.arange(4)})
...     index = LengthIndex.open(Path(folder, "shard.ltx"))
...     names = sorted(path.name for path in Path(folder).iterdir())
>>> existing, list(index.keys), index.lengths.tolist()
(['a', 'b', 'c'], ['a', 'b', 'c', 'd'], [3, 3, 3, 4])
>>> [name for name in names if name.endswith(".tar")]
['shard-000000.tar', 'shard-000001.tar', 'shard-000002.tar']
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Unpack

from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.measuring import Decoder
from samplers.shards.storage.mirror import Mirror, open_target
from samplers.shards.storage.network.transport import check_transport
from samplers.shards.storage.reading import Shards
from samplers.shards.writing.existing import find_shards, refuse_shards, remove_leftovers
from samplers.shards.writing.parts import PartT, PartWriter, finished_parts, write_all
from samplers.shards.writing.sample_writer import SampleWriter, WriterOptions, check_writer_options
from samplers.shards.writing.source import Rename, read_shards


class ShardWriter(SampleWriter):
    """Write samples to numbered shards `PREFIX-000000.tar` in a folder, each with its index next to it.

    The folder may be a URL of an object store: a shard then appears there when it is complete, and takes room on this
    machine until it is sent. Only one writer at a time may write to it, because object stores have no locks.

    When the `with` block ends, the corpus file `PREFIX.ltx` joins the indexes. After an exception or a kill the
    finished shards stay, and a writer with `append=True` continues behind them.

    Numbers become fields of fixed size, and so do the arrays that `stack` names. All other arrays and tensors are
    sequences `[L, *F]`. The first sample defines the schema: fields, dtypes and feature shapes. Later samples must have
    the same.

    Attributes:
        shards: The finished shards, in their order.
    """

    @classmethod
    def write_parts(
        cls,
        folder: str | os.PathLike[str] | Mirror,
        samples: Callable[[PartT], Iterable[Mapping[str, Any]]],
        parts: Iterable[PartT],
        *,
        workers: int = 0,
        append: bool = False,
        progress: bool = False,
        **options: Unpack[WriterOptions],
    ) -> LengthIndex:
        """Write a corpus from parts, in several processes. Its bytes do not depend on their number.

        Part 3 goes to shards `PREFIX-000003-000000.tar` and so on, each under this name when it is complete. After an
        error or a kill the finished shards stay, and a call with `append=True` writes the remainder.

        Args:
            folder: A folder, or its URL in an object store, as for `ShardWriter`.
            samples: Gives the samples of a part, the same ones every time. Picklable, if processes are not forked.
            parts: Names of files, numbers or other values that `samples` takes. Picklable.
            workers: Number of processes. 0 stays in this one.
            append: Resume with the same parts, and possibly more behind them. Of a finished part only the first sample
                is read, and compared with what was written.
            progress: Show a progress bar.
            **options: As for `ShardWriter`.

        Returns:
            The index of the corpus, in the order of the parts.

        Raises:
            FileExistsError: The folder has shards of that prefix. With `append`: another writer is at work on them.
            RuntimeError: `samples` or the writing of its samples failed, or a process was killed. The message has the
                part.
            TypeError: A count is not an int, `stack` is a single string, or a part cannot be sent to a process.
            ValueError: `folder` is a URL over HTTP, an option is out of range, a key is in two parts, parts differ in
                their schema, or there is no sample.
        """
        values = list(parts)
        # Before anything is written: an option that only a worker refused would name a part that is not to blame.
        checked: dict[str, Any] = {name: value for name, value in options.items() if name != "transport"}
        check_writer_options(**{"layout": "blocks", "prefix": "shard", "stack": ()} | checked)
        prefix = options.get("prefix", "shard")
        folder, mirror = open_target(folder, prefix, check_transport(options.get("transport")))
        folder.mkdir(parents=True, exist_ok=True)
        if append:
            remove_leftovers(folder, prefix)
        else:
            refuse_shards(folder, prefix, "" if mirror is None else mirror.url)
        write_part = PartWriter(
            writer=cls,
            options=options,
            samples=samples,
            folder=folder,
            prefix=prefix,
            finished=finished_parts(folder, prefix),
            mirror=mirror,
        )
        try:
            return LengthIndex.open(write_all(write_part, values, workers, progress=progress))
        except BaseException:
            # The other processes were killed while they wrote. Files that another program is writing stay.
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
        """Write the samples of other shards as a new corpus, for example plain shards as blocks. A shard is a part.

        Args:
            folder: A folder, or its URL in an object store, as for `ShardWriter`.
            shards: Paths, brace patterns, wildcards, folders or URLs, or the `.ltx` file of a corpus.
            index: Index of these shards, in their order, or its file. None for the files next to them, if there are
                any. Samples are checked against its lengths and, if it has them, its checksums.
            fields: Fields to copy. None for all.
            decode: Functions from bytes to arrays, for fields in other encodings than npy and cls. Picklable.
            rename: `(shard, key) -> key`, for keys that are unique within their shard only. Picklable.
            workers: Number of processes. 0 stays in this one.
            append: Resume after an error or a kill.
            progress: Show a progress bar.
            **options: As for `ShardWriter`.

        Returns:
            The index of the new corpus.

        Raises:
            FileExistsError: The folder has shards of that prefix. With `append`: another writer is at work on them.
            FileNotFoundError: There are no shards, or some have an index and others none.
            RuntimeError: A shard could not be read or written, differs from the index, or a process was killed. The
                message has the shard.
            TypeError: A count is not an int, or `stack` or `fields` is a single string.
            ValueError: `folder` is a URL over HTTP, an option is out of range, the index does not fit, a key is in two
                shards, shards differ in their schema, or a shard would be read and overwritten.
        """
        source, slices = read_shards(shards, index, fields, decode=decode, rename=rename)
        local, mirror = open_target(folder, options.get("prefix", "shard"), check_transport(options.get("transport")))
        local.mkdir(parents=True, exist_ok=True)
        # A shard that is replaced while it is read would be a mixture.
        existing = find_shards(local, options.get("prefix", "shard")).values()
        targets = {str(path.absolute()) if mirror is None else mirror.url_of(path) for path in existing}
        for shard_slice in slices:
            shard = shard_slice.shard
            if (shard if "://" in shard else str(Path(shard).absolute())) in targets:
                raise ValueError(
                    f"{shard_slice.shard} would be read, and others of its prefix written: give another prefix"
                )
        return cls.write_parts(
            mirror or folder, source, slices, workers=workers, append=append, progress=progress, **options
        )
