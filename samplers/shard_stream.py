"""ShardStream: collated batches of a sharded corpus, planned from its index and read window after window."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy
from functools import cached_property
from typing import Any, Final, Unpack

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from collate.widths import Widths, check_count
from samplers.batch_sampler import find_replica
from samplers.planning.clipping import check_collator
from samplers.planning.options import Options, PlanOptions
from samplers.planning.plan import BatchPlan
from samplers.planning.tables.batch_table import Shape
from samplers.planning.tables.window_table import WindowCourse, WindowEpoch, WindowLayout, lay_out_windows
from samplers.progress.position import (
    Position,
    PositionDict,
    check_epoch,
    make_fingerprint,
    refuse_iterator_state,
    warn_of_drop,
)
from samplers.progress.shared_cursor import WORKERS, Run, SharedCursor
from samplers.shards.dataset import Decoder
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.skipping import Handler
from samplers.shards.storage.reading import Shards
from samplers.window_reader import ShardsInTurn, StepReader

# As large as the corpus has samples, and told again by the index.
_LEFT_BEHIND: Final = "_layout"


class ShardStream(IterableDataset[Any]):
    """Batches of a sharded corpus, planned from its index, and collated where they are read.

    A window is a run of shuffled shards. It is planned as `LengthBucketBatchSampler` plans a corpus, and read in the
    order of its files when its first batch is due; a remote shard is fetched whole, with one request. Which shards make
    a window is decided by the seed, all else by the epoch as well, so that every epoch has the same number of steps,
    the same on every replica, known before the first sample is read. Each replica reads windows of its own but for the
    few that lie across a border.

    Give it to a loader with `batch_size=None`; worker w of n takes every n-th step. The epoch advances by itself at its
    first batch, so that the pass after an early break is the next epoch; `set_epoch` overrides, also with persistent
    workers. A copy, and a pickle, stands where the original stood and then goes its own way. Its iterators have
    `state_dict` and `load_state_dict` for a `StatefulDataLoader` of as many workers and replicas; for any other loader,
    and other numbers of either, there are `position` and `seek`. In `torchdata.nodes` it goes into a `SamplerWrapper`:
    an `IterableWrapper` asks no iterator for its state, and resumes in the first epoch whatever epoch was saved.

    Args:
        shards: as in `ShardDataset`.
        index: of these shards, in their order, or its file; None for the files beside them.
        collate_fn: from a list of samples to a batch; it runs in the worker. A `PadCollator` must have the stream's
            `max_length` and `widths`, and no `widths` where the stream has none. Of a function that has no attribute
            `max_length`, a warning is logged where samples are planned as cut.
        fields: what samples hold beside their key; the others are not read. None for all.
        decode: functions from bytes for fields in other encodings, as in `ShardDataset`.
        handler: what becomes of a sample that cannot be read, as in `ShardDataset`: True of the error skips it, so that
            its batch has a row fewer. `len`, positions and the plan are the same with it and without.
        max_failed: the share of samples that may be skipped, 0 to 1; None is a tenth, but no fewer than 99.
        interleave: windows that a replica reads side by side, batch by batch in turn. Where shards are remote, give the
            number of workers, so that each fetches windows of its own; local shards need none of it.
        num_replicas: W; None takes the initialised process group's size, or 1.
        rank: of this process; None takes the process group's, or 0.
        options: those of `LengthBucketBatchSampler`. `window` is how many samples a run of shards has at least (None:
            10,000); a worker holds its part of a window in memory. With `drop_last`, every window drops the batch that
            `batch_size` leaves short.

    Attributes:
        data: the samples by place.

    Raises:
        FileNotFoundError: There is no index.
        TypeError: An option is unknown or has the wrong type.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no budget is given, no batch is left to plan, the last step has
            fewer rows than replicas, or `collate_fn` cuts or pads samples otherwise than they are planned.
        RuntimeError: A launcher started several processes, and their process group is not initialised.
    """

    def __init__(
        self,
        shards: Shards,
        index: LengthIndex | str | os.PathLike[str] | None = None,
        *,
        collate_fn: Callable[[list[Any]], Any],
        fields: Collection[str] | None = None,
        decode: Mapping[str, Decoder] | None = None,
        handler: Handler | None = None,
        max_failed: float | None = None,
        interleave: int = 1,
        num_replicas: int | None = None,
        rank: int | None = None,
        **options: Unpack[PlanOptions],
    ) -> None:
        super().__init__()
        if not callable(collate_fn):
            raise TypeError(f"collate_fn must be a function of a list of samples, got {collate_fn!r}")
        self.collate_fn = collate_fn
        self.options = Options(**options)
        self.interleave = check_count("interleave", interleave, least=1, hint="1 reads a window after the other")
        self.num_replicas, self.rank = find_replica(num_replicas, rank)
        self.data = ShardsInTurn(shards, index, fields, decode=decode, handler=handler, max_failed=max_failed)
        check_collator(collate_fn, self._layout.corpus, self.options, self.data.index.fields)
        self._cursor = SharedCursor(self.num_replicas)
        # Other epochs are cut elsewhere: what cannot be shared is refused now, and not in one of them.
        self._steps = min(self.plan(epoch).steps for epoch in self._layout.trials)
        if self._steps == 0:
            raise ValueError(
                f"an epoch must have a batch for each of {self.num_replicas} replicas, got {len(self._layout)} batches "
                "in all and drop_last=True: use fewer replicas or smaller batches"
            )

    def __len__(self) -> int:
        """Batches of this replica in a whole epoch: the same in each, and on every replica."""
        return self._steps

    def __iter__(self) -> "StreamIterator":
        """An iterator over this worker's part of an epoch; which epoch is decided when it takes its first batch."""
        return StreamIterator(self, self._cursor)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _LEFT_BEHIND}

    def __copy__(self) -> "ShardStream":
        new = self.__class__.__new__(self.__class__)
        # What a copy takes is none of the other's business.
        new.__dict__.update(self.__dict__, _cursor=copy(self._cursor))
        return new

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration begins or goes on with."""
        return self._cursor.coming.epoch

    @property
    def max_length(self) -> int | None:
        """The steps that longer samples are planned with, as given; the collator's must be the same."""
        return self.options.max_length

    @property
    def widths(self) -> Widths:
        """The padded widths that batches are planned with, as given; the collator's must be the same."""
        return self.options.widths

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Samples that were skipped so far, in all workers: `{shard: {reason: count}}`, as in `ShardDataset`."""
        return self.data.skipped

    @property
    def shapes(self) -> list[Shape]:
        """The closed list of (rows, width) that batches have at most, in any epoch; width is a tuple for K fields."""
        return self._layout.shapes

    @property
    def remaining(self) -> int:
        """Batches that the next iteration will give: `len`, or fewer after `seek`."""
        return self.course_from(self._cursor.coming).steps

    @property
    def next_position(self) -> PositionDict:
        """Where the next iteration will begin: a position, as `position` gives those of the present one."""
        return self._cursor.coming.as_dict(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Short digests of the lengths, the options and the seed, which a position carries."""
        return make_fingerprint(self.data.index, self._layout)

    def plan(self, epoch: int) -> BatchPlan:
        """All batches of an epoch, over all replicas.

        Raises:
            TypeError: The epoch is not an int.
            ValueError: The epoch is negative.
        """
        return WindowPlan(self._layout, check_epoch(epoch), self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin this epoch; a position that was sought in another epoch is forgotten.

        Raises:
            TypeError: The epoch is not an int.
            ValueError: The epoch is negative.
        """
        self._cursor.set_epoch(check_epoch(epoch))

    def position(self, steps: int) -> PositionDict:
        """Where the epoch stands after this replica's first `steps` batches of the present iteration.

        Args:
            steps: batches used since the present iteration began: the last that has taken a batch, or if none has
                since `seek` or `set_epoch` to another epoch, the one to come.

        Returns:
            Five primitive values, under 1 kB, the same on all replicas, for `seek` on any number of workers and
            replicas.

        Raises:
            TypeError: `steps` is not an int.
            ValueError: The iteration has fewer batches.
        """
        start, before = self._cursor.present
        course = self.course_from(start)
        steps = check_count("steps", steps, least=0, hint="count the batches used since the iteration began")
        if before + steps > course.steps:
            raise ValueError(f"steps must be at most {course.steps - before}, the iteration's batches, got {steps}")
        return Position(start.epoch, start.replicas, course.taken_after(before + steps)).as_dict(self.fingerprint)

    def seek(self, position: Mapping[str, Any]) -> None:
        """Let the next iteration go on from a position; the one after it begins the next epoch.

        Raises:
            TypeError: The position is not a mapping, or one of its values has the wrong type.
            ValueError: It is of other lengths, options, seed or version, or the rest of its epoch cannot be shared by
                this number of replicas.
        """
        refuse_iterator_state(position)
        sought = self.read(position)
        self._cursor.seek(sought)

    def read(self, state: Mapping[str, Any]) -> Position:
        """A saved position; the errors are those of `seek`."""
        position = Position.from_dict(state, self.fingerprint, len(self._layout))
        self.course_from(position)
        return position

    def course_from(self, start: Position) -> WindowCourse:
        """What is left of an epoch from a position on, as the replicas take it."""
        epoch = WindowEpoch(self._layout.of_epoch(start.epoch, start.replicas), start.epoch, start.replicas)
        return WindowCourse(epoch, start.batches, self.num_replicas)

    @cached_property
    def _layout(self) -> WindowLayout:
        index = self.data.index
        return lay_out_windows(index, index.starts, self.options, self.interleave)


class WindowPlan(BatchPlan):
    """All batches of an epoch of a stream, over all replicas: replica r takes batch `t * num_replicas + r` in step t.

    Args:
        layout: the batches by number, from `lay_out_windows`.
        epoch: which one.
        num_replicas: W, batches in a step.

    Raises:
        ValueError: The last step has fewer rows than replicas.
    """

    def __init__(self, layout: WindowLayout, epoch: int, num_replicas: int) -> None:
        self.layout = layout
        self.epoch = epoch
        self.num_replicas = num_replicas
        self.course = WindowCourse(
            WindowEpoch(layout.of_epoch(epoch, num_replicas), epoch, num_replicas), 0, num_replicas
        )


class StreamIterator(Iterator[Any]):
    """One worker's batches of an epoch, or of the rest of one: how far it has come is known here and nowhere else.

    Args:
        stream: whose batches.
        cursor: the stream's, shared with its other iterators.

    Raises:
        ValueError: The loader has more than 1024 workers.
    """

    def __init__(self, stream: ShardStream, cursor: SharedCursor) -> None:
        info = get_worker_info()
        self._stream, self._cursor = stream, cursor
        self._worker, self._workers = (info.id, info.num_workers) if info else (0, 1)
        if self._workers > WORKERS:
            raise ValueError(f"a loader must have at most {WORKERS} workers, got {self._workers}: use fewer")
        self._run: Run | None = None
        self._reader: StepReader | None = None

    def __next__(self) -> Any:
        if self._run is None or self._reader is None:
            self._run = self._cursor.begin(self._run)
            self._warn_of_drop(self._run)
            self._reader = self._open(self._run)
        if len(self._reader) == 0:
            raise StopIteration
        samples = self._reader.take()
        self._cursor.note(self._run, self._run.taken + 1)
        return self._stream.collate_fn(samples)

    def state_dict(self) -> dict[str, int | str]:
        """Where the epoch stands for this worker, in fresh primitive values, under 1 kB."""
        start, taken = (self._cursor.peek(), 0) if self._run is None else (self._run.record.start, self._run.taken)
        return start.as_dict(self._stream.fingerprint) | self._place | {"taken": taken}

    @property
    def _place(self) -> dict[str, int]:
        return {"worker": self._worker, "workers": self._workers, "num_replicas": self._stream.num_replicas}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same worker, of as many workers and replicas; the next epoch comes after it.

        Raises:
            TypeError: The state is not a mapping, or one of its values has the wrong type.
            ValueError: It is of other lengths, options, seed, version, workers or replicas.
        """
        start = self._stream.read(state)
        saved = {name: state.get(name) for name in self._place}
        if saved != self._place:
            raise ValueError(
                f"a state must be of the same worker, and of as many workers and replicas, got {saved}, this is "
                f"{self._place}: keep these numbers, or use position and seek, which need not"
            )
        taken = check_count("taken", state.get("taken"), least=0, hint="it is part of every state")
        self._run, self._reader = self._cursor.load(start, taken), None

    def _open(self, run: Run) -> StepReader:
        course = self._stream.course_from(run.record.start)
        steps = np.arange(self._worker + run.taken * self._workers, course.steps, self._workers)
        return StepReader(self._stream.data, course, self._stream.rank, steps)

    def _warn_of_drop(self, run: Run) -> None:
        dropped = self._cursor.dropped_before(run) if self._worker == 0 else None
        if dropped is not None:
            start, before, taken = dropped
            warn_of_drop(start.epoch, taken, self._stream.course_from(start).steps - before)
