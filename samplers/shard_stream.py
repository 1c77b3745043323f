"""ShardStream: collated batches of a sharded corpus, planned from its index and read window by window."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypedDict, Unpack, cast

import numpy as np
from torch.utils.data import IterableDataset

from collate.widths import Widths, check_count
from samplers.planning.budget import Cost, Count
from samplers.planning.mixtures.bucketed import make_bucket_mixture
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.mixtures.packed import WindowOptions, make_pack_mixture
from samplers.planning.options import Indices, Options, Overlong, PlanOptions, check_epoch, make_options
from samplers.planning.pack_batches.agreement import check_packing
from samplers.planning.pack_batches.options import PackingOptions, PackOptions, make_pack_options
from samplers.planning.pack_batches.packed_table import PackedTable
from samplers.planning.pack_batches.plan import PackPlan, rows_of_steps
from samplers.planning.pack_batches.window_packs import WindowPacks, make_window_packs
from samplers.planning.packs.documents import DocumentCost, OverlongDocuments
from samplers.planning.plan import BatchPlan
from samplers.planning.schedules.schedule import count_steps
from samplers.planning.schedules.updates import RowsOf
from samplers.planning.sorting import as_length_array
from samplers.planning.tables.batch_table import BatchTable
from samplers.planning.tables.clipping import check_collator
from samplers.planning.tables.epoch_table import EpochTable
from samplers.planning.tables.window_table import make_window_table
from samplers.progress.mixtures.mixed_shards import MixedShards
from samplers.progress.replica import find_replica
from samplers.progress.shared_cursor import SharedEpochCursor
from samplers.progress.stream_iterator import ReadingLoader, StreamIterator
from samplers.progress.window_reader import ShardsInOrder
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.measuring import Decoder
from samplers.shards.opening.read_ahead import READ_AHEAD_BYTES
from samplers.shards.skipping import Handler
from samplers.shards.storage.network.transport import Transport
from samplers.shards.storage.reading import Shards
from samplers.shards.storage.shard_cache import CACHE_BYTES

# Not pickled: as large as the corpus has samples, and computed again from the index.
_NOT_PICKLED: Final = "_planned"


class StreamOptions(TypedDict, total=False):
    """The keyword options of a stream, for type checkers: those of batches of a budget, or those of packs."""

    max_tokens: int | None
    batch_size: int | None
    cost: Cost | DocumentCost | None
    count_tokens: Count
    window: int | None
    shuffle: bool
    seed: int
    min_length: int
    max_length: int | None
    overlong: Overlong | OverlongDocuments
    drop_last: bool
    widths: Widths
    indices: Indices | None
    capacity: int | Sequence[int]
    rows: int
    multiple: int
    max_documents: int | None
    max_cost: float | None


class ShardStream(ReadingLoader, IterableDataset[Any]):
    """Batches of a sharded corpus, or of a mixture of them, planned from indexes, and collated where they are read.

    A window is a run of shuffled shards. It is planned as `LengthBucketBatchSampler` plans a corpus. Samples of local
    shards are read when their batch is due; a remote shard is fetched whole, with one request. The seed and the
    epoch decide everything. Every epoch has the same number of steps, the same on every replica, known before the first
    sample is read. Replicas read different windows, except for the few that lie across a border.

    Give it to a loader with `batch_size=None`; worker w of n takes every n-th step. The epoch advances by itself when
    an iteration takes its first batch, so that an iteration after an early break is the next epoch; `set_epoch`
    overrides, also with persistent workers. A copy or a pickle begins where the original stands, and then moves
    independently. The iterators have `state_dict` and `load_state_dict` for a `StatefulDataLoader` of as many workers
    and replicas; for any other loader, and for other numbers of either, there are `position` and `seek`. In
    `torchdata.nodes` it goes into a `SamplerWrapper`: an `IterableWrapper` asks no iterator for its state, and always
    resumes in the first epoch, even if another one was saved.

    The option `window` is how many samples a run of shards has at least (None: 10,000); of remote shards, a worker
    holds its part of a window in memory. The other options are those of `LengthBucketBatchSampler`; with `drop_last`,
    every window drops the batch that `batch_size` leaves short. Or, with `capacity`, they are those of
    `PackingBatchSampler`: the stream packs, and reads pieces of split samples itself. The last batch of a window of
    packs may have fewer rows. With several fields, packs have the same windows in each epoch.

    Of a `Mixture` each source is read as a corpus of its own, in windows of its own, and batches are in the order in
    which a sampler of the mixture has them: shares are as exact, and `seek` takes another mixture. A worker keeps the
    plan of an epoch, 8 bytes for each sample, and of remote shards its part of a window of each source.

    Args:
        shards: As in `ShardDataset`; or a `Mixture` whose sources are indexes (`LengthIndex`), of the same fields.
        index: The index of these shards, in their order, or its file; None for the files next to them.
        collate_fn: Makes a batch from a list of samples; it runs in the worker. A `PadCollator` must have the stream's
            `max_length` and `widths`, and no `widths` if the stream has none. For a function that has no attribute
            `max_length`, a warning is logged if samples are planned as cut. Where the stream packs, a `VarlenCollator`
            must have its `capacity`, `max_documents` and `align` (`multiple`), for several rows `arrange="given"` and
            no fewer `rows`, and its `max_length` if it cuts.
        fields: The fields that samples hold, next to their key; the others are not read. None for all.
        decode: Functions from bytes, for fields in other encodings, as in `ShardDataset`.
        memory_map: Copy batches from mapped shards, as in `ShardDataset`.
        handler: What happens to a sample that cannot be read, as in `ShardDataset`: if it returns True for the error,
            the sample is skipped, and its batch has one row fewer. `len`, positions and the plan do not change.
        max_failed: The share of samples that may be skipped, 0 to 1; None is a tenth, but at least 99 samples.
        transport: How a remote index and remote shards are read, as in `ShardDataset`.
        read_ahead_bytes: Bytes of remote shards that each worker fetches before their window is due; at least one
            shard, unless it is 0.
        cache: Folder in which remote shards are kept, and bytes that it may have (`cache_bytes`), as in `ShardDataset`.
        interleave: Windows that a replica reads side by side, batch by batch in turn. If shards are remote, give the
            number of workers, so that each fetches windows of its own; local shards do not need this.
        num_replicas: W; None takes the initialised process group's size, the number of SLURM's tasks, or 1.
        rank: Rank of this process; None takes that of the group or task, or 0.

    Attributes:
        data: The samples by index, as a `ShardDataset`; of a mixture as `MixedShards`, by the plan's sample indices.

    Raises:
        FileNotFoundError: There is no index.
        TypeError: An option is unknown or has the wrong type.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no budget is given, no batch is left to plan, the last step has
            fewer rows than replicas, or `collate_fn` cuts, pads or packs samples otherwise than they are
            planned; or for a mixture an index is given, or several windows to `interleave`.
        RuntimeError: A launcher started several processes, and their process group is not initialised.
    """

    options: Options | PackOptions
    _cursor: SharedEpochCursor
    _planned: BatchTable | PackedTable

    def __init__(
        self,
        shards: Shards | Mixture,
        index: LengthIndex | str | os.PathLike[str] | None = None,
        *,
        collate_fn: Callable[[list[Any]], Any],
        fields: Collection[str] | None = None,
        decode: Mapping[str, Decoder] | None = None,
        memory_map: bool = False,
        handler: Handler | None = None,
        max_failed: float | None = None,
        transport: Transport | None = None,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
        interleave: int = 1,
        num_replicas: int | None = None,
        rank: int | None = None,
        **options: Unpack[StreamOptions],
    ) -> None:
        super().__init__()
        if not callable(collate_fn):
            raise TypeError(f"collate_fn must be a function of a list of samples, got {collate_fn!r}")
        self.collate_fn = collate_fn
        # A row's capacity tells packs from batches of a budget.
        self._window = options.get("window")
        if "capacity" in options:
            packing = {name: value for name, value in options.items() if name != "window"}
            self.options = make_pack_options(cast(PackingOptions, packing))
        else:
            self.options = make_options(cast(PlanOptions, options))
        self.interleave = check_count("interleave", interleave, least=1, hint="1 reads one window after the other")
        self.num_replicas, self.rank = find_replica(num_replicas, rank)
        self._reading: dict[str, Any] = {
            "fields": fields,
            "decode": decode,
            "memory_map": memory_map,
            "handler": handler,
            "max_failed": max_failed,
            "transport": transport,
            "read_ahead_bytes": read_ahead_bytes,
            "cache": cache,
            "cache_bytes": cache_bytes,
        }
        data: ShardsInOrder | MixedShards
        if isinstance(shards, Mixture):
            _check_mixture(index, interleave)
            data, self._lengths = MixedShards(shards, **self._reading), shards
        else:
            data = ShardsInOrder(shards, index, **self._reading)
            self._lengths = data.index
        self._begin_with(data, self._make_table(self._lengths))
        self._cursor = SharedEpochCursor(self.num_replicas)
        self._begin_sharing()

    def __repr__(self) -> str:
        data = f"{len(self.data)} samples, {len(self.data.shards)} shards"
        who = f"num_replicas={self.num_replicas}, rank={self.rank}"
        return f"{type(self).__name__}({data}, {self.options.describe()}, {who}, batches={len(self)})"

    def __len__(self) -> int:
        """Batches of this replica in a whole epoch: the same in each epoch, and on every replica."""
        _ = self._table
        return self._steps

    def __iter__(self) -> StreamIterator:
        """An iterator over this worker's part of an epoch; it decides which epoch when it takes its first batch."""
        return StreamIterator(self, self._cursor)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != _NOT_PICKLED}
        if isinstance(self._table, WindowPacks):
            # Without the lengths, the classes and the windows are small, and take longer to find again than to send.
            state[_NOT_PICKLED] = replace(self._table, lengths=np.empty(0, np.int64))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A worker reads the index, which may be a memory map, instead of receiving the table.
        if _NOT_PICKLED in state:
            self._planned = replace(cast(WindowPacks, self._planned), lengths=as_length_array(self._lengths))
        else:
            # Of the stage in which a training begins; the shared text tells the present one.
            self._planned, self._seen = self._make_table(self._lengths), b""

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Samples that were skipped so far, in all workers: `{shard: {reason: count}}`, as in `ShardDataset`."""
        return self.data.skipped

    @property
    def transfers(self) -> dict[str, Any]:
        """What was transferred of remote shards so far, in all workers, as in `ShardDataset`."""
        return self.data.transfers

    @property
    def max_length(self) -> int | tuple[int, ...] | None:
        """Longer samples are planned with this many time steps; the collator must cut them to it.

        With several fields of packs, one number for each.
        """
        if isinstance(self._table, PackedTable):
            cut = self._table.max_length
            return cut[0] if cut is not None and len(cut) == 1 else cut
        limit: int | None = self._table.options.max_length
        return limit

    @property
    def widths(self) -> Widths:
        """The padded widths that batches are planned with, as given; `PadCollator.for_sampler` pads to them.

        Raises:
            AttributeError: The stream packs.
        """
        if isinstance(self.options, PackOptions):
            raise AttributeError("widths: a stream that packs has none, give it a VarlenCollator")
        return self.options.widths

    def plan(self, epoch: int) -> BatchPlan | PackPlan:
        """All batches of an epoch, over all replicas: a `BatchPlan`, or with `capacity` the plan of packs.

        Raises:
            TypeError: The epoch is not an int.
            ValueError: The epoch is negative.
        """
        if isinstance(self._table, PackedTable):
            return PackPlan(self._table, check_epoch(epoch), self.num_replicas)
        return BatchPlan(self._table, check_epoch(epoch), self.num_replicas)

    def _rows_of(self) -> RowsOf | None:
        return rows_of_steps if isinstance(self._table, PackedTable) else None

    def _make_table(self, lengths: Any) -> BatchTable | PackedTable:
        options, windows = self.options, self._window
        if isinstance(options, PackOptions):
            if isinstance(lengths, Mixture):
                return make_pack_mixture(lengths, options, self.num_replicas, windows=WindowOptions(windows))
            return make_window_packs(lengths, lengths.starts, options, window=windows, interleave=self.interleave)
        if isinstance(lengths, Mixture):
            return make_bucket_mixture(lengths, options, self.num_replicas, in_windows=True)
        return make_window_table(lengths, lengths.starts, options, self.interleave)

    def _begin_with(self, data: ShardsInOrder | MixedShards, table: BatchTable | PackedTable) -> None:
        """Take these samples and batches, if the collator makes what is planned."""
        if isinstance(table, PackedTable):
            check_packing(self.collate_fn, table, data.fields)
            data = data.with_pieces(table.pieces)
        else:
            check_collator(self.collate_fn, table.sorted_lengths, table.options, data.fields)
        # Refuses now what could not be shared in a later epoch.
        self._steps = count_steps(table, self.num_replicas)
        self.data, self._planned = data, table

    def _take_mixture(self, mixture: Mixture, table: EpochTable) -> None:
        """Let another mixture take over."""
        data = MixedShards(mixture, **self._reading)
        data.count_on(cast(MixedShards, self.data))
        self._begin_with(data, cast(BatchTable, table))
        self._lengths = mixture
        self.__dict__.pop("fingerprint", None)
        self._share_stage()


def _check_mixture(index: Any, interleave: int) -> None:
    """Check the options that a mixture cannot have.

    Raises:
        ValueError: One is given.
    """
    if index is not None:
        raise ValueError(
            f"index must be None with a mixture, whose sources are indexes, got {index!r}: give it as a source"
        )
    if interleave != 1:
        raise ValueError(
            f"interleave must be 1 with a mixture, got {interleave}: sources take turns, so that no worker has a "
            "window of its own; for remote shards and several workers give a cache, from which all of them read"
        )
