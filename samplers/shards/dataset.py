"""Samples by index: a map-style dataset that reads slices of shards, and checks every length against the index."""

import operator
import os
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any, Final, Self, cast

import numpy as np
from torch.utils.data import Dataset

from collate.deprecated.names import renamed_arguments
from samplers.shards.field_value import as_decoders
from samplers.shards.format.npy import AnyArray
from samplers.shards.format.samples import Sample
from samplers.shards.indexing.index import LengthIndex, open_index, tables_of
from samplers.shards.indexing.measuring import Decoder
from samplers.shards.opening.followed import FollowedBatches
from samplers.shards.opening.open_shards import OpenShards
from samplers.shards.opening.read_ahead import READ_AHEAD_BYTES, check_read_ahead
from samplers.shards.opening.transfers import Transfers
from samplers.shards.sample_reader import SampleReader, select_columns
from samplers.shards.skipping import Failed, Handler, is_damage, make_skipping, read_apart
from samplers.shards.split_dataset import PieceCutter, PieceTable, check_range
from samplers.shards.storage.atomic import local_path
from samplers.shards.storage.memory import ShardMemory
from samplers.shards.storage.network.counts import UNCOUNTED, Counts
from samplers.shards.storage.network.transport import DEFAULT, Transport, check_transport
from samplers.shards.storage.reading import Shards
from samplers.shards.storage.shard_cache import CACHE_BYTES, ShardCache, make_cache
from samplers.shards.unread import UnreadSamples

# Attributes that are not pickled. Those of release 0.1 are among them.
_OF_A_PROCESS: Final = frozenset(
    ["_tables", "_reader", "_followed", "is_local", "_files", "_checked", "_process", "_memory"]
)


class ShardDataset(Dataset[Sample]):
    """The samples of a corpus by index, in the order of its `LengthIndex`.

    A sample is `{"__key__": str, field: array [L, *F] or scalar, ...}`. Its arrays are writable copies in native byte
    order. Every sample has the length that the index says, or an error names it.

    Attributes:
        index: The lengths of the corpus, for a sampler.
    """

    # Of the class, since former pickles have none.
    _pieces: PieceCutter | None = None
    _memory_map = _in_memory = False
    _transport = DEFAULT
    _read_ahead_bytes = 0
    _counts: Counts = UNCOUNTED
    _sampler: Any = None
    _cache: str | None = None
    _cache_bytes = CACHE_BYTES

    @renamed_arguments(check="checksums")
    def __init__(
        self,
        shards: Shards,
        index: LengthIndex | str | os.PathLike[str] | None = None,
        fields: Collection[str] | None = None,
        *,
        decode: Mapping[str, Decoder] | None = None,
        checksums: bool = True,
        memory_map: bool = False,
        in_memory: bool = False,
        handler: Handler | None = None,
        max_failed: float | None = None,
        transport: Transport | None = None,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Open the index. Shards are opened, and checked against it, when they are first read.

        Args:
            shards: A folder or `.ltx` file that `ShardWriter` has made, or paths, brace patterns, wildcards or URLs.
            index: Index of these shards, in their order, or its file. None for the files next to them.
            fields: Fields of the samples besides the key. Others are not read. None for all.
            decode: Functions from bytes, for fields in other encodings than npy, cls, txt and json. Without one such a
                field stays bytes. Their results must have the length in the index.
            checksums: Compare what is read with its crc32, if the index has checksums.
            memory_map: Copy whole batches from memory maps of local shards, without a system call for each sample. Then
                nobody may write to the shards: one that is cut while it is copied from ends the process by a signal.
                The pages that were read count as memory of the process, although the system can take them back.
            in_memory: Copy whole batches from memory, into which each local shard is read when one of its samples is
                first needed. It needs memory for all shards. Forked workers share it; others have their own.
            handler: Called with the error of a sample of a batch that cannot be read. It returns True to skip the
                sample, or False to raise, as `webdataset.warn_and_continue` does. None raises.
            max_failed: Fraction of samples that may be skipped, 0 to 1. None is a tenth, but at least 99 samples.
            transport: How a remote index and remote shards are read: connections, timeouts and retries. None for the
                defaults.
            read_ahead_bytes: Bytes of remote samples that each process reads before they are asked for, see `follow`.
            cache: Folder on this machine in which remote shards are kept whole, for the next epoch and for other
                processes. A shard is fetched whole when one of its samples is first read. None keeps none.
            cache_bytes: Bytes that this folder may have. The shards that were not used for longest are removed.

        Raises:
            FileNotFoundError: There is no index.
            OSError: The index cannot be read, if it is remote after all retries.
            TypeError: `fields` is a single string, `decode` a function, `handler` not a function, `max_failed` not a
                number, or `transport` not a `Transport`.
            ValueError: The index is damaged or of other shards, a field does not exist, `max_failed` is not between 0
                and 1, or `in_memory` is given for remote shards, or together with `memory_map`.
        """
        if isinstance(fields, str):
            raise TypeError(f"fields must be a list of names, got the string {fields!r}")
        self._transport = check_transport(transport)
        self.index = _open_index(shards, index, self._transport)
        self._tables = tables_of(self.index)
        self._memory_map, self._in_memory = memory_map, in_memory
        if in_memory and (memory_map or not self.is_local):
            raise ValueError(
                "in_memory must be False with memory_map=True, and for remote shards: give cache=FOLDER for these"
            )
        self._memory = self._make_memory()
        self._read_ahead_bytes = check_read_ahead(read_ahead_bytes)
        if not self.is_local:
            self._counts = Transfers()
        # Absolute, since a worker may run in another folder.
        self._cache = None if cache is None else str(local_path(cache, "cache").absolute())
        self._cache_bytes = cache_bytes
        self._check_crcs = checksums and self._tables.crcs is not None
        self._decode = as_decoders(decode)
        self._columns = select_columns(self._tables.fields, fields, self._decode)
        self._skipping = make_skipping(handler, max_failed, len(self.index))
        self._forget()

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Skipped samples so far, in all workers: `{shard: {reason: count}}`.

        The reasons are `length`, `missing` (a shard), `unreadable`, `field` (missing) and `damaged`.
        """
        return {} if self._skipping is None else self._skipping.counts

    @property
    def transfers(self) -> dict[str, Any]:
        """What was transferred of remote shards so far, by all workers, and how long readers stood still.

        `requests`, with all tries; `retries`; `second_requests`, sent because the first took long; `bytes` received;
        `cache_hits` and `cache_misses`, shards; and `waited_seconds`, in which a reader stood still. A shallow copy and
        `with_pieces` count together with this dataset; a deep copy and a pickle start from zero.
        """
        return self._counts.as_dict()

    def follow(self, sampler: Any) -> Self:
        """Read batches of remote shards ahead, in the order of a sampler's plan, up to `read_ahead_bytes`.

        For local shards it changes nothing. Batches that the sampler does not plan are read when they are asked for.

        Args:
            sampler: The `LengthBucketBatchSampler` or `PackingBatchSampler` of the loader. None ends it.

        Returns:
            This dataset.

        Raises:
            TypeError: It is something else.
            ValueError: The sampler gives the batches of all ranks.

        Examples:
            >>> sampler = LengthBucketBatchSampler(dataset.index, max_tokens=8000)  # doctest: +SKIP
            >>> loader = DataLoader(dataset.follow(sampler), batch_sampler=sampler)  # doctest: +SKIP
        """
        if sampler is not None and not hasattr(sampler, "follower"):
            raise TypeError(
                f"sampler must be a LengthBucketBatchSampler or PackingBatchSampler, whose plan tells what comes next, "
                f"got a {type(sampler).__name__}"
            )
        if sampler is not None:
            # Refuses what cannot be followed.
            sampler.follower()
        self._sampler = sampler
        self._forget()
        return self

    @cached_property
    def is_local(self) -> bool:
        """Whether no shard is remote, so that a batch can be read by itself."""
        return not any("://" in shard.path and not shard.path.startswith("file://") for shard in self._tables.shards)

    def with_pieces(self, pieces: PieceTable | None, *, fields: Collection[str] | None = None) -> Self:
        """The same corpus with the pieces of its long samples: indices from N on, as a packing sampler numbers them.

        A piece is read as its sample is, with the same checks, and then cut.

        Args:
            pieces: `sampler.pieces`. None where no sample is split.
            fields: Fields that are cut, each of the length with which the sample was planned. Others are whole. None
                for all fields of variable length that are read.

        Raises:
            TypeError: `fields` is a single string.
            ValueError: A piece is of a sample that the corpus does not have.
        """
        new = copy(self)
        variable = [field.name for _, field, _ in self._columns if field.variable]
        chosen = variable if fields is None else fields
        new.__dict__["_pieces"] = None if pieces is None else PieceCutter(pieces, len(self.index), chosen)
        new.__dict__["_memory"] = self._memory
        # Its reader takes samples from the same memory, and what is read ahead is cut.
        if self._memory is not None or self._sampler is not None:
            new._forget()  # noqa: SLF001
        return new

    def __len__(self) -> int:
        return len(self.index) + (0 if self._pieces is None else len(self._pieces))

    def __repr__(self) -> str:
        fields = [field.name for _, field, _ in self._columns]
        return f"{type(self).__name__}({len(self)} samples, {len(self.index.shards)} shards, fields={fields})"

    def __getitem__(self, index: int) -> Sample:
        """The sample of one index. Errors are those of `__getitems__`, and are raised even with a handler."""
        rows = check_range([operator.index(index)], len(self))
        [sample] = self._cut(rows, self._read(self._sources(rows)))
        return cast(Sample, sample)

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices, in this order. They are read in the order of the files.

        The list is read when something is done with it, with the errors below. A `PadCollator` or `VarlenCollator`
        reads the samples of blocks into its batch instead. With a handler, samples are read at once, and skipped ones
        are left out.

        Raises:
            FileNotFoundError: A shard is absent.
            IndexError: An index is not in the corpus.
            LengthError: The length of a sample differs from the index. The message has shard, key, field and both
                lengths.
            OSError: A shard cannot be read, for a remote one after all retries. The message has the URL, the bytes, the
                number of tries and the last cause.
            RuntimeError: All samples of the batch were skipped, or too many in total. The message lists the failures.
            TypeError: Indices are not integers.
            ValueError: A shard has changed since it was indexed, or is damaged.
        """
        rows = check_range(indices, len(self))
        reader = self._here()
        if self._followed is not None:
            samples = self._followed.take(rows)
            return samples if self._skipping is None else self._skipping.sift(samples)
        if self._skipping is not None:
            return self._skipping.sift(self._read_in_order(rows))
        has_pieces = self._pieces is not None and bool((rows >= len(self.index)).any())
        # A piece is cut from its whole sample, whose checksum is compared first.
        return UnreadSamples.of_rows(rows, self._read_in_order, None if has_pieces else reader)

    def _read_in_order(self, rows: AnyArray) -> list[Any]:
        """Samples in the given order. With a handler, `Failed` stands for those that cannot be read."""
        sources = self._sources(rows)
        order = np.argsort(sources, kind="stable")
        read = self._read if self._skipping is None else self._read_tolerantly
        samples = read(sources[order]) if len(rows) else []
        batch: list[Any] = [None] * len(samples)
        for slot, sample in zip(order.tolist(), samples, strict=True):
            batch[slot] = sample
        return self._cut(rows, batch)

    def _sources(self, rows: AnyArray) -> AnyArray:
        """The samples of these indices, of samples or pieces."""
        return rows if self._pieces is None else self._pieces.sources(rows)

    def _cut(self, rows: AnyArray, samples: list[Any]) -> list[Any]:
        """Samples, or the pieces of them that these indices name."""
        if self._pieces is None:
            return samples
        pairs = zip(rows.tolist(), samples, strict=True)
        return [each if isinstance(each, Failed) else self._pieces.cut(row, each) for row, each in pairs]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tables = tables_of(self.index)
        self._memory = self._make_memory()
        self._forget()

    def _make_memory(self) -> ShardMemory | None:
        return ShardMemory([shard.size for shard in self._tables.shards]) if self._in_memory else None

    def _forget(self) -> None:
        """Start without the state of another process: open files, and the blocks that were checked."""
        self._reader = SampleReader(
            self._tables,
            self._columns,
            self._decode,
            checksums=self._check_crcs,
            shards=self._open_shards(),
            memory=self._memory,
        )
        self._followed: FollowedBatches | None = None
        if self._sampler is not None and self._read_ahead_bytes and not self.is_local:
            self._followed = FollowedBatches(
                self._sampler.follower(),
                self._read_in_order,
                lambda rows: self._reader.count_bytes(self._sources(rows)),
                self._read_ahead_bytes,
                self._counts,
            )

    def _open_shards(self) -> OpenShards:
        """What opens the shards."""
        return OpenShards(
            self._tables,
            memory_map=self._memory_map,
            transport=self._transport,
            counts=self._counts,
            cache=self._make_cache(),
        )

    def _make_cache(self) -> ShardCache | None:
        return make_cache(self._cache, self._cache_bytes, self._transport.deadline, self._counts)

    def _here(self) -> SampleReader:
        """The reader of this process."""
        if self._reader.shards.process != os.getpid():
            self._forget()
        return self._reader

    def _read(self, rows: AnyArray) -> list[Sample]:
        """The samples of ascending rows."""
        return self._here().read(rows)

    def _read_tolerantly(self, rows: AnyArray) -> list[Any]:
        """Read samples. `Failed` stands for those whose data is damaged."""
        try:
            return self._read(rows)
        except Exception as error:
            if not is_damage(error):
                raise
        open_shards = self._here().shards
        shards = open_shards.shards_of(rows)
        samples = []
        for shard in np.unique(shards).tolist():
            try:
                open_shards.open(shard)
            except Exception as error:
                if not is_damage(error):
                    raise
                # Then none of its samples can be read: one attempt is enough.
                samples += [self._fail(error, row) for row in rows[shards == shard].tolist()]
            else:
                samples += read_apart(self._read, rows[shards == shard], self._fail)
        return samples

    def _fail(self, error: Exception, row: int) -> Failed:
        """The failure of a sample, with its key and shard."""
        return Failed(error, self.index.keys[row], self._here().shards.path_of(row))


def _open_index(
    shards: Shards, index: LengthIndex | str | os.PathLike[str] | None, transport: Transport
) -> LengthIndex:
    """The given index for these shards, or the one that lies with them."""
    if isinstance(shards, LengthIndex):
        # Of its own shards, for the sources of a mixture.
        return shards
    if index is not None:
        index = index if isinstance(index, LengthIndex) else LengthIndex.open(index, transport=transport)
        return index.moved_to(shards)
    return open_index(shards, transport)
