"""ShardStream: collated batches of a sharded corpus, window after window, planned from its index."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from typing import Any, Final, Unpack

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from samplers.budget import Integers, check_count
from samplers.corpus import Places
from samplers.course import Epoch, split_each
from samplers.cursor import Position, PositionDict
from samplers.layout import Layout, Shape, lay_out
from samplers.options import Options, PlanOptions
from samplers.sampler import find_replica
from samplers.shards.dataset import ShardDataset
from samplers.shards.files import Shards
from samplers.shards.index import LengthIndex
from samplers.shuffle import derive_key, permute

# Samples in a window where none is named: some tens of batches of a usual size, a few shards.
WINDOW: Final = 20_000
# Seconds that a worker waits for the first one to begin.
PATIENCE: Final = 60.0
_SHARDS, _WINDOWS = 100, 101


class ShardStream(IterableDataset[Any]):
    """Batches of a sharded corpus, planned from its index and collated where they are read.

    A window is a run of shuffled shards; it is planned as a `LengthBucketBatchSampler` plans a corpus, and read to its
    end before the next. Which shards make a window is decided by the seed, the order of windows and what is in a batch
    by the epoch as well, so that every epoch has the same number of steps, the same on every replica, known before the
    first sample is read. The last, partial step is split by rows among its replicas. Each worker takes every n-th step.

    Give it to a loader with `batch_size=None`. An epoch advances by itself; `set_epoch` overrides, also with persistent
    workers. Its iterators have `state_dict` and `load_state_dict` for a `StatefulDataLoader`; for any other loader, and
    for another number of workers or replicas, there are `position` and `seek`.

    Args:
        shards: as in `ShardDataset`.
        index: the corpus's lengths; None takes the files beside the shards.
        collate_fn: from a list of samples to a batch; it runs in the worker.
        fields: what is read of each sample; None is all.
        num_replicas: W; None takes the initialised process group's size, or 1.
        rank: of this process; None takes the process group's, or 0.
        options: those of `LengthBucketBatchSampler`; `window` is how many samples a run of shards has at least.

    Attributes:
        data: the samples by place.
        windows: the runs of shards, each laid out.

    Raises:
        FileNotFoundError: There is no index.
        TypeError: An option has the wrong type.
        LengthError: A length is over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no batch is left to plan, or the last step may have fewer rows than
            replicas.
        RuntimeError: A launcher started several processes, and their process group is not initialised.
    """

    def __init__(
        self,
        shards: Shards,
        index: LengthIndex | None = None,
        *,
        collate_fn: Callable[[list[Any]], Any],
        fields: Sequence[str] | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        **options: Unpack[PlanOptions],
    ) -> None:
        super().__init__()
        self.data = ShardDataset(shards, index, fields)
        self.collate_fn = collate_fn
        self.num_replicas, self.rank = find_replica(num_replicas, rank)
        self.windows = plan_windows(self.data.index, Options(**options))
        self._check_last_step()
        # Shared with workers, also those that live on from epoch to epoch: the position to begin at; how many
        # iterations have begun since it was set, and the key of the last of them.
        self._begin = torch.tensor([0, self.num_replicas, 0]).share_memory_()
        self._begun = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._iterators = 0

    def __len__(self) -> int:
        """Batches of this replica in an epoch: the same in each, and on every replica."""
        return self._course(Position(0, self.num_replicas)).steps

    def __iter__(self) -> "StreamIterator":
        """One epoch's batches of this worker; which epoch is decided when the first is taken."""
        self._iterators += 1
        return StreamIterator(self, self._iterators)

    @property
    def shapes(self) -> list[Shape]:
        """The closed list of (rows, width) that batches have at most, in any epoch."""
        return list({shape: None for layout in self.windows.layouts for shape in layout.shapes})

    @property
    def remaining(self) -> int:
        """Batches that the next iteration will give: `len`, or fewer after `seek`."""
        return self._course(self._beginning(int(self._begun[0]))).steps

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin this epoch.

        Raises:
            TypeError: The epoch is not an int.
            ValueError: It is negative.
        """
        self._set(Position(check_count("epoch", epoch, least=0, hint="count epochs from 0"), self.num_replicas))

    def position(self, steps: int) -> PositionDict:
        """Where the epoch stands after this replica's first `steps` batches.

        Args:
            steps: batches used since `set_epoch` or `seek`, or since the stream was made; whole epochs count.

        Returns:
            Five primitive values, the same on all replicas, for `seek` on any number of workers and replicas.

        Raises:
            TypeError: `steps` is not an int.
            ValueError: `steps` is negative.
        """
        steps = check_count("steps", steps, least=0, hint="count the batches used since the iteration began")
        start = Position(*self._begin.tolist())
        while steps > (course := self._course(start)).steps:
            steps -= course.steps
            start = Position(start.epoch + 1, self.num_replicas)
        return replace(start, batches=course.taken_after(steps)).as_dict(self.windows.fingerprint)

    def seek(self, position: Mapping[str, Any]) -> None:
        """Let the next iteration go on from a position; the one after it begins the next epoch.

        Raises:
            TypeError: It is not a mapping, or a value has the wrong type.
            ValueError: It is of another corpus, options, seed or version, or its rest cannot be shared by the replicas.
        """
        found = Position.from_dict(position, self.windows.fingerprint)
        self._course(found)
        self._set(found)

    def read(self, samples: Places) -> Any:
        """Read and collate a batch."""
        return self.collate_fn(self.data.__getitems__(samples.tolist()))

    def begin(self, worker: int, key: int) -> Position:
        """Where the iteration of this key begins; the next one begins an epoch later.

        All workers of an iteration have its key. The first counts it, the others wait for that: were each to count for
        itself, one that is stopped by an early `break` before it has begun would fall behind for good.

        Raises:
            RuntimeError: The first worker does not begin.
        """
        if worker == 0:
            self._begun[0] += 1
            self._begun[1] = key
        deadline = time.monotonic() + PATIENCE
        while int(self._begun[1]) != key:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"worker {worker} waited {PATIENCE:.0f} s for worker 0 to begin its epoch: it is gone"
                )
            time.sleep(0.001)
        return self._beginning(int(self._begun[0]) - 1)

    def beginning(self, key: int) -> Position:
        """Where the iteration of this key begins, or will if it has not begun."""
        return self._beginning(int(self._begun[0]) - (int(self._begun[1]) == key))

    def begin_after(self, position: Position) -> None:
        """Let the next iteration begin the epoch after a position."""
        self._begun[0] = position.epoch - int(self._begin[0]) + 1

    def _beginning(self, begun: int) -> Position:
        epoch, replicas, batches = self._begin.tolist()
        return Position(epoch + begun, self.num_replicas) if begun else Position(epoch, replicas, batches)

    def _set(self, position: Position) -> None:
        self._begin.copy_(torch.tensor([position.epoch, position.replicas, position.batches]))
        self._begun.zero_()

    def _course(self, position: Position) -> "StreamCourse":
        return StreamCourse(self.windows, position, self.num_replicas)

    def _check_last_step(self) -> None:
        course = self._course(Position(0, self.num_replicas))
        fewest = min(int(layout.rows_of(np.array([len(layout) - 1]))[0]) for layout in self.windows.layouts)
        if course.partial and not self.windows.options.drop_last and course.partial - 1 + fewest < self.num_replicas:
            raise ValueError(
                f"the last step must have a row for each of {self.num_replicas} replicas, but a window may end with "
                f"{course.partial} batches of {course.partial - 1 + fewest} rows: set drop_last=True, use fewer "
                "replicas, or allow batches of more rows"
            )
        if course.steps == 0:
            raise ValueError(f"an epoch must have a batch for each of {self.num_replicas} replicas, got {len(course)}")


class StreamIterator(Iterator[Any]):
    """One worker's batches of one epoch: every n-th step of its replica.

    Args:
        stream: whose.
        number: of the iterator in its process.
    """

    def __init__(self, stream: ShardStream, number: int) -> None:
        info = get_worker_info()
        self._stream = stream
        self._worker, self._workers = (info.id, info.num_workers) if info else (0, 1)
        # The loader draws one seed for all workers of an iteration; workers that live on keep it, and count instead.
        base = info.seed - info.id if info else 0
        self._key = 1 + derive_key(base % 2**63, number) % 2**62
        self._start: Position | None = None
        self._taken = 0

    def __next__(self) -> Any:
        if self._start is None:
            self._start = self._stream.begin(self._worker, self._key)
        course = StreamCourse(self._stream.windows, self._start, self._stream.num_replicas)
        step = self._worker + self._taken * self._workers
        if step >= course.steps:
            raise StopIteration
        self._taken += 1
        return self._stream.read(course.samples_of(step, self._stream.rank))

    def state_dict(self) -> dict[str, Any]:
        """How far this worker has come, in fresh primitive values."""
        start = self._start or self._stream.beginning(self._key)
        fingerprint = self._stream.windows.fingerprint
        return {**start.as_dict(fingerprint), "taken": self._taken, "workers": self._workers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same worker.

        Raises:
            ValueError: It is of another corpus, options, seed, version or number of workers.
        """
        if state["workers"] != self._workers:
            raise ValueError(
                f"the state is of {state['workers']} workers, there are {self._workers}: use position and seek instead"
            )
        self._start = Position.from_dict(
            {name: value for name, value in state.items() if name not in ("taken", "workers")},
            self._stream.windows.fingerprint,
        )
        self._taken = state["taken"]
        self._stream.begin_after(self._start)


@dataclass(frozen=True, eq=False)
class Windows:
    """The corpus as runs of shards, each laid out by itself.

    Attributes:
        layouts: of each window; samples are numbered in the whole corpus.
        options: what they were laid out by.
        corpus: the index's fingerprint.
    """

    layouts: tuple[Layout, ...]
    options: Options
    corpus: str

    def __len__(self) -> int:
        """Batches in an epoch, before any is split among replicas."""
        return sum(map(len, self.layouts))

    @cached_property
    def fingerprint(self) -> str:
        """A short text that changes with the corpus, the seed and what the options make of it."""
        parts = [self.corpus, repr(self.options.seed), *(layout.digest for layout in self.layouts)]
        return blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()

    def in_epoch(self, epoch: int) -> Integers:
        """The windows in the order in which an epoch reads them: int64 `[windows]`."""
        places = np.arange(len(self.layouts))
        if not self.options.shuffle:
            return places
        return permute(places, len(places), derive_key(self.options.seed, epoch, _WINDOWS))


@dataclass(frozen=True, eq=False)
class StreamCourse:
    """What is left of an epoch from a position, as `replicas` take it: in step t, replica r takes one batch."""

    windows: Windows
    start: Position
    replicas: int

    def __post_init__(self) -> None:
        if self.start.batches > len(self.windows):
            raise ValueError(
                f"a position must lie in an epoch of {len(self.windows)} batches, got {self.start.batches}"
            )

    def __len__(self) -> int:
        """Batches of the sequence that are left."""
        return len(self.windows) - self.start.batches

    @property
    def partial(self) -> int:
        """Batches left for the last step, fewer than replicas."""
        return len(self) % self.replicas

    @property
    def steps(self) -> int:
        """Steps of every replica."""
        return len(self) // self.replicas + (self.partial > 0 and not self.windows.options.drop_last)

    def taken_after(self, steps: int) -> int:
        """Batches of the sequence that are taken when so many steps are done."""
        return min(self.start.batches + steps * self.replicas, len(self.windows))

    def samples_of(self, step: int, rank: int) -> Places:
        """The samples of one replica's batch, longest first.

        Raises:
            ValueError: The last step has fewer rows than replicas.
        """
        first = self.start.batches + step * self.replicas
        if first + self.replicas <= len(self.windows):
            return self._batch(first + rank)
        batches = [self._batch(place) for place in range(first, len(self.windows))]
        rows = sum(map(len, batches))
        if rows < self.replicas:
            raise ValueError(
                f"the last step must have a row for each of {self.replicas} replicas, got {rows} rows in "
                f"{len(batches)} batches: set drop_last=True, or use fewer replicas"
            )
        return split_each(batches, self.replicas)[rank]

    def _batch(self, place: int) -> Places:
        order = self.windows.in_epoch(self.start.epoch).tolist()
        ends = list(accumulate(len(self.windows.layouts[window]) for window in order))
        turn = int(np.searchsorted(ends, place, side="right"))
        layout = self.windows.layouts[order[turn]]
        inside = place - ends[turn] + len(layout)
        return Epoch(layout, self.start.epoch, self.start.replicas).samples_at(np.array([inside]))[0]


def plan_windows(index: LengthIndex, options: Options) -> Windows:
    """Cut a corpus into runs of shuffled shards, and lay each out.

    Raises:
        LengthError: A length is over the budget with `overlong="error"`.
        ValueError: No batch is left to plan.
    """
    shards = np.arange(len(index.starts) - 1)
    if options.shuffle:
        shards = permute(shards, len(shards), derive_key(options.seed, 0, _SHARDS))
    wanted = np.zeros(len(index), np.bool_)
    wanted[slice(None) if options.indices is None else np.asarray(options.indices)] = True
    runs: list[list[Any]] = [[]]
    for shard in shards.tolist():
        places = np.arange(index.starts[shard], index.starts[shard + 1])
        runs[-1].append(places[wanted[places]])
        if sum(map(len, runs[-1])) >= (options.window or WINDOW):
            runs.append([])
    whole = [np.concatenate(run) for run in runs if sum(map(len, run))]
    layouts = [
        lay_out(index.lengths, replace(options, window=None, indices=places)) for places in _joined(whole, options)
    ]
    return Windows(tuple(layouts), options, index.fingerprint)


def _joined(runs: list[Any], options: Options) -> list[Any]:
    """Let a last run that is less than half a window belong to the one before it: it would pad much."""
    if len(runs) > 1 and len(runs[-1]) * 2 < (options.window or WINDOW):
        return [*runs[:-2], np.concatenate(runs[-2:])]
    return runs
