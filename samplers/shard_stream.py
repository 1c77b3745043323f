"""ShardStream: collated batches of a sharded corpus, planned from its index and read window by window."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypedDict, Unpack, cast

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from collate.widths import Widths, check_count
from samplers.planning.budget import Cost, Count
from samplers.planning.options import Indices, Options, Overlong, PlanOptions, make_options
from samplers.planning.pack_batches.agreement import check_packing
from samplers.planning.pack_batches.options import PackingOptions, PackOptions, make_pack_options
from samplers.planning.pack_batches.plan import PackPlan, rows_of_steps
from samplers.planning.pack_batches.window_packs import WindowPacks, make_window_packs
from samplers.planning.packs.documents import DocumentCost, OverlongDocuments
from samplers.planning.plan import BatchPlan
from samplers.planning.schedules.schedule import count_steps
from samplers.planning.schedules.updates import RowsOf
from samplers.planning.sorting import as_length_array
from samplers.planning.tables.clipping import check_collator
from samplers.planning.tables.window_table import WindowTable, make_window_table
from samplers.progress.loader import PlannedLoader
from samplers.progress.position import check_epoch, warn_of_drop
from samplers.progress.replica import find_replica
from samplers.progress.shared_cursor import WORKERS, SharedEpochCursor, WorkerIteration
from samplers.progress.window_reader import ShardsInOrder, StepReader
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.measuring import Decoder
from samplers.shards.opening.read_ahead import READ_AHEAD_BYTES
from samplers.shards.skipping import Handler
from samplers.shards.storage.network.transport import Transport
from samplers.shards.storage.reading import Shards
from samplers.shards.storage.shard_cache import CACHE_BYTES

# Not pickled: as large as the corpus has samples, and computed again from the index.
_NOT_PICKLED: Final = "_table"


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


class ShardStream(PlannedLoader, IterableDataset[Any]):
    """Batches of a sharded corpus, planned from its index, and collated where they are read.

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

    Args:
        shards: As in `ShardDataset`.
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
        data: The samples by index, as a `ShardDataset`.

    Raises:
        FileNotFoundError: There is no index.
        TypeError: An option is unknown or has the wrong type.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no budget is given, no batch is left to plan, the last step has
            fewer rows than replicas, or `collate_fn` cuts, pads or packs samples otherwise than they are
            planned.
        RuntimeError: A launcher started several processes, and their process group is not initialised.
    """

    options: Options | PackOptions
    _cursor: SharedEpochCursor
    _table: WindowTable | WindowPacks

    def __init__(
        self,
        shards: Shards,
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
        self.data = ShardsInOrder(
            shards,
            index,
            fields,
            decode=decode,
            memory_map=memory_map,
            handler=handler,
            max_failed=max_failed,
            transport=transport,
            read_ahead_bytes=read_ahead_bytes,
            cache=cache,
            cache_bytes=cache_bytes,
        )
        self._lengths = self.data.index
        self._table = self._make_table()
        if isinstance(self._table, WindowPacks):
            check_packing(collate_fn, self._table, self.data.index.fields)
            self.data = self.data.with_pieces(self._table.pieces)
        else:
            check_collator(collate_fn, self._table.sorted_lengths, self._table.options, self.data.index.fields)
        self._cursor = SharedEpochCursor(self.num_replicas)
        # Refuses now what could not be shared in a later epoch.
        self._steps = count_steps(self._table, self.num_replicas)

    def __repr__(self) -> str:
        data = f"{len(self.data)} samples, {len(self.data.index.shards)} shards"
        who = f"num_replicas={self.num_replicas}, rank={self.rank}"
        return f"{type(self).__name__}({data}, {self.options.describe()}, {who}, batches={len(self)})"

    def __len__(self) -> int:
        """Batches of this replica in a whole epoch: the same in each epoch, and on every replica."""
        return self._steps

    def __iter__(self) -> "StreamIterator":
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
            self._table = replace(cast(WindowPacks, self._table), lengths=as_length_array(self.data.index))
        else:
            self._table = self._make_table()

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
        if isinstance(self._table, WindowPacks):
            cut = self._table.max_length
            return cut[0] if cut is not None and len(cut) == 1 else cut
        return self._table.options.max_length

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
        if isinstance(self._table, WindowPacks):
            return PackPlan(self._table, check_epoch(epoch), self.num_replicas)
        return BatchPlan(self._table, check_epoch(epoch), self.num_replicas)

    def _rows_of(self) -> RowsOf | None:
        return rows_of_steps if isinstance(self._table, WindowPacks) else None

    def _make_table(self) -> WindowTable | WindowPacks:
        index = self.data.index
        if isinstance(self.options, PackOptions):
            return make_window_packs(index, index.starts, self.options, window=self._window, interleave=self.interleave)
        return make_window_table(index, index.starts, self.options, self.interleave)


class StreamIterator(Iterator[Any]):
    """One worker's part of an iteration over an epoch, or over the remainder of one.

    Args:
        stream: The stream whose batches it gives.
        cursor: The stream's, shared with its other iterators.

    Raises:
        ValueError: The loader has more than 1024 workers.
    """

    def __init__(self, stream: ShardStream, cursor: SharedEpochCursor) -> None:
        info = get_worker_info()
        self._stream, self._cursor = stream, cursor
        self._worker, self._workers = (info.id, info.num_workers) if info else (0, 1)
        if self._workers > WORKERS:
            raise ValueError(f"a loader must have at most {WORKERS} workers, got {self._workers}: use fewer")
        self._iteration: WorkerIteration | None = None
        self._reader: StepReader | None = None
        # Of this worker, from the start of the iteration on.
        self._steps = 0

    def __next__(self) -> Any:
        if self._iteration is None or self._reader is None:
            # Only now: a loader makes iterators that it never uses, and they must not take an epoch.
            self._iteration = self._cursor.begin(self._iteration)
            self._warn_of_drop(self._iteration)
            self._reader = self._open(self._iteration)
            self._steps = self._iteration.taken + len(self._reader)
        if len(self._reader) == 0:
            raise StopIteration
        batch = self._stream.collate_fn(self._reader.take())
        # After the collator, which reads local samples: a batch that failed must not be missing after a resume.
        self._cursor.note_taken(self._iteration, self._steps - len(self._reader))
        return batch

    def state_dict(self) -> dict[str, int | str]:
        """Where the epoch stands for this worker, in fresh primitive values, under 1 kB."""
        iteration = self._iteration
        start, taken = (self._cursor.peek(), 0) if iteration is None else (iteration.record.start, iteration.taken)
        return start.as_dict(self._stream.fingerprint) | self._worker_numbers | {"taken": taken}

    @property
    def _worker_numbers(self) -> dict[str, int]:
        """The numbers on which a state depends, by name."""
        return {"worker": self._worker, "workers": self._workers, "num_replicas": self._stream.num_replicas}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state of the same worker, of as many workers and replicas; the next epoch comes after it.

        Raises:
            TypeError: The state is not a mapping, or one of its values has the wrong type.
            ValueError: It is of other lengths, options, seed, version, workers or replicas.
        """
        start = self._stream.read_position(state)
        # `taken` counts this worker's batches; with other numbers of workers or replicas they would be different
        # batches.
        saved = {name: state.get(name) for name in self._worker_numbers}
        if saved != self._worker_numbers:
            raise ValueError(
                f"a state must be of the same worker, and of as many workers and replicas, got {saved}, this is "
                f"{self._worker_numbers}: keep these numbers, or use position and seek, which take any"
            )
        taken = check_count("taken", state.get("taken"), least=0, hint="it is part of every state")
        self._iteration, self._reader = self._cursor.load(start, taken), None

    def _open(self, iteration: WorkerIteration) -> StepReader:
        """A reader of this worker's remaining steps: worker w of n takes steps w, w + n, w + 2 n, ..."""
        schedule = self._stream.schedule_from(iteration.record.start)
        steps = np.arange(self._worker + iteration.taken * self._workers, schedule.steps, self._workers)
        return StepReader(self._stream.data, schedule, self._stream.rank, steps)

    def _warn_of_drop(self, iteration: WorkerIteration) -> None:
        """Log that the previous iteration resumed from a position and was dropped; one worker logs it for all."""
        dropped = self._cursor.dropped_before(iteration) if self._worker == 0 else None
        if dropped is not None:
            start, before, taken = dropped
            warn_of_drop(start.epoch, taken, self._stream.schedule_from(start).steps - before)
