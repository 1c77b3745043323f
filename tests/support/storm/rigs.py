"""What comes: the objects with state, each under a loader, on all replicas at once."""

import copy
import gc
import json
import pickle
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchdata import nodes
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import DevicePrefetcher
from collate.training import prefetch as prefetch_module
from storm.model import Batch, Place, Save

COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}
_END: Any = object()


class SourceError(RuntimeError):
    """What a source raises when it is told to."""


class Numbers(Dataset[int]):
    """Samples that are their own numbers; one of them may be broken."""

    def __init__(self, count: int, broken: int | None = None) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, sample: int) -> int:
        if sample == self.broken:
            raise SourceError(f"sample {sample} is broken")
        return sample


def same(batch: Batch) -> Batch:
    """Collate nothing."""
    return batch


class Rig:
    """Objects with state under loaders, one for each replica, or one for all.

    Args:
        make: `make(replicas, rank, broken)` gives the object that plans, for one replica, or for "all".
        replicas: W.
        workers: of a loader, and whether they live on.
        broken: a sample whose reading raises.
        samples: in the corpus.
        targets: the objects themselves, where they are there already.
        position: where the first pass begins.
    """

    # Whether a state after an epoch's last batch leads at once to the next epoch: never, once its end was seen, always.
    skips_end: ClassVar[str] = "never"
    # Whose place is saved: the iterator's, that of the present pass, the same if this loader gave it, or that of the
    # last pass.
    saves: ClassVar[str] = "last"
    repeats: ClassVar[bool] = False
    sets_epochs: ClassVar[bool] = True
    moves_workers: ClassVar[bool] = False
    # Whether a state is true before a pass has begun, and whether asking for one makes the next pass begin.
    saves_early: ClassVar[bool] = True
    holds: ClassVar[bool] = False
    # Whether a state of an epoch's end leads to the next epoch.
    saves_ends: ClassVar[bool] = True
    # Whether making a loader begins its first pass, so that a position must be sought before.
    begins_at_once: ClassVar[bool] = False

    def __init__(
        self,
        make: Any,
        replicas: int,
        workers: tuple[int, bool] = (0, False),
        *,
        samples: int,
        broken: int | None = None,
        one_for_all: bool = False,
        targets: list[Any] | None = None,
        position: Any = None,
    ) -> None:
        self.make, self.replicas, self.workers, self.samples = make, replicas, workers, samples
        self.broken, self.one_for_all = broken, one_for_all
        ranks = ["all"] if one_for_all else range(replicas)
        self.targets = targets or [make(replicas, rank, broken) for rank in ranks]
        if position is not None and self.begins_at_once:
            self.seek(position)
        self.loaders = [self.wrap(target) for target in self.targets]
        if position is not None and not self.begins_at_once:
            self.seek(position)
        self.iterators: list[Iterator[Batch]] | None = None

    # --- what a kind of loader overrides

    def wrap(self, target: Any) -> Any:
        """The loader around an object."""
        return target

    def start(self, loader: Any) -> Iterator[Batch]:
        """Begin a pass."""
        return iter(loader)

    def states(self) -> list[Any]:
        """The states of all loaders."""
        return [loader.state_dict() for loader in self.loaders]

    def load_states(self, states: list[Any]) -> None:
        """Continue from states."""
        for loader, state in zip(self.loaders, states, strict=True):
            loader.load_state_dict(state)

    def told_of_epoch(self, epoch: int) -> None:
        """What a trainer must be told when its loader continues an epoch."""

    # --- what the machine calls

    def fresh(
        self,
        replicas: int | None = None,
        workers: tuple[int, bool] | None = None,
        *,
        broken: int | None = None,
        targets: list[Any] | None = None,
        position: Any = None,
    ) -> "Rig":
        """Another of the kind, which knows nothing."""
        return type(self)(
            self.make,
            replicas or self.replicas,
            workers or self.workers,
            samples=self.samples,
            broken=broken,
            one_for_all=self.one_for_all,
            targets=targets,
            position=position,
        )

    def open(self) -> None:
        """Begin a pass on all replicas."""
        self.iterators = None
        if self.workers[0]:
            # An iterator in a cycle would be collected in a worker, which is not its parent.
            gc.collect()
        self.iterators = [self.start(loader) for loader in self.loaders]

    def take(self) -> list[Batch]:
        """The next batch of each loader; none at the end, which must be the same for all."""
        batches = [next(iterator, _END) for iterator in self.iterators or ()]
        ended = {batch is _END for batch in batches}
        assert len(ended) == 1, "replicas take different numbers of steps"
        return [] if ended.pop() else [list(map(int, batch)) for batch in batches]

    def close(self) -> None:
        """Drop the iterators."""
        self.iterators = None

    def save(self) -> list[Any]:
        """States, as they are read again from a file: small, primitive and fresh."""
        first, second = self.states(), self.states()
        assert first == second
        assert all(one is not other for one, other in zip(first, second, strict=True))
        return first

    def load(self, states: Any) -> None:
        """Continue from states; they belong to the caller, who may load them again."""
        kept = copy.deepcopy(states)
        self.load_states(states)
        assert states == kept, "loading a state changed it"

    def set_epoch(self, epoch: int) -> None:
        """Let an epoch come next."""
        for target in self.targets:
            target.set_epoch(epoch)

    def position(self, steps: int) -> Any:
        """The place of the run, as JSON gives it back; all replicas must tell the same."""
        positions = [json.loads(json.dumps(target.position(steps))) for target in self.targets]
        assert all(position == positions[0] for position in positions)
        return positions[0]

    def seek(self, position: Any) -> None:
        """Continue from a position."""
        for target in self.targets:
            target.seek(position)

    def lengths(self) -> set[int]:
        """Steps of an epoch."""
        return {len(target) // (self.replicas if self.one_for_all else 1) for target in self.targets}

    def remaining(self) -> set[int]:
        """Steps of the pass that comes."""
        return {target.remaining // (self.replicas if self.one_for_all else 1) for target in self.targets}

    def copied(self, how: str) -> "Rig":
        """The same objects, copied, under new loaders."""
        return self.fresh(targets=[COPIES[how](target) for target in self.targets])


class Bare(Rig):
    """The objects as they are, whose iterators have state."""

    saves = "iterator"
    moves_workers = True

    def states(self) -> list[Any]:
        iterators = self.iterators or [iter(target) for target in self.targets]
        states = [iterator.state_dict() for iterator in iterators]
        for state in states:
            assert json.loads(json.dumps(state)) == state
            assert len(json.dumps(state)) < 1000
        return states

    def load_states(self, states: list[Any]) -> None:
        self.iterators = [iter(target) for target in self.targets]
        for iterator, state in zip(self.iterators, states, strict=True):
            iterator.load_state_dict(state)

    def open(self) -> None:
        """Begin a pass, or the one that a state was loaded into."""
        if not self.loaded:
            super().open()
        self.loaded = False

    loaded = False

    def load(self, states: Any) -> None:
        super().load(states)
        self.loaded = True


class Plain(Rig):
    """A `DataLoader`, and the position that a training loop saves."""

    saves = "present"
    moves_workers = True
    kind: ClassVar[Any] = DataLoader

    def wrap(self, target: Any) -> Any:
        count, lives_on = self.workers
        options = {"num_workers": count, "persistent_workers": lives_on}
        if hasattr(target, "collate_fn"):
            return self.kind(target, batch_size=None, **options)
        return self.kind(Numbers(self.samples, self.broken), batch_sampler=target, collate_fn=same, **options)

    def states(self) -> list[Any]:
        return [self.position(self.steps)]

    def load_states(self, states: list[Any]) -> None:
        self.seek(states[0])

    # The training loop counts its steps.
    steps = 0


class Stateful(Plain):
    """A `StatefulDataLoader`."""

    saves = "last"
    skips_end = "seen"
    moves_workers = False
    holds = True
    kind = StatefulDataLoader
    states = Rig.states
    load_states = Rig.load_states


class Noded(Rig):
    """A `torchdata.nodes.Loader` around a `SamplerWrapper`, which counts epochs itself."""

    skips_end = "always"
    sets_epochs = False
    holds = True

    def wrap(self, target: Any) -> Any:
        return nodes.Loader(self.node(target))

    def node(self, target: Any) -> nodes.BaseNode[Any]:
        """The root of the nodes."""
        wrapped = nodes.SamplerWrapper(target)
        if hasattr(target, "collate_fn"):
            return wrapped
        numbers = Numbers(self.samples, self.broken)
        return nodes.Mapper(wrapped, partial(fetch, numbers))

    def start(self, loader: Any) -> Iterator[Batch]:
        iterator = iter(loader)
        if loader._it._cached_item is None:
            # A loader that was restored at an epoch's end keeps giving out that state, in torchdata 0.11.
            loader._it._cached_state_dict = None
        return iterator

    def save(self) -> list[Any]:
        # A loader may give out the same state twice.
        return copy.deepcopy(self.states())


def fetch(numbers: Numbers, batch: Batch) -> Batch:
    """The samples of a batch."""
    return [numbers[sample] for sample in batch]


class Accelerated(Plain):
    """A loader that went through accelerate's `prepare`, which sets the epoch by counting whole passes."""

    skips_end = "always"
    repeats = True
    stateful = False

    def wrap(self, target: Any) -> Any:
        return self.prepare(super().wrap(target), 1, 0)

    def prepare(self, loader: Any, processes: int, rank: int) -> Any:
        """What `Accelerator.prepare` makes of a loader in one of several processes."""
        return prepare_data_loader(
            loader,
            device=torch.device("cpu"),
            num_processes=processes,
            process_index=rank,
            put_on_device=False,
            rng_types=None,
            even_batches=False,
            dispatch_batches=False,
            use_stateful_dataloader=self.stateful,
        )

    def set_epoch(self, epoch: int) -> None:
        for loader in self.loaders:
            loader.set_epoch(epoch)

    told_of_epoch = set_epoch


class AcceleratedStateful(Accelerated):
    """The same with `use_stateful_dataloader`."""

    saves = "last"
    moves_workers = False
    holds = True
    # Its states are its own, made when a batch is taken, and once when the loader is made.
    saves_early = False
    begins_at_once = True
    stateful = True
    kind = StatefulDataLoader
    states = Rig.states
    load_states = Rig.load_states

    def save(self) -> list[Any]:
        # accelerate gives out the state that it has, not a copy.
        return copy.deepcopy(self.states())


class Dealt(Accelerated):
    """Two processes of accelerate, each of which has all batches and takes its own."""

    def __init__(self, make: Any, replicas: int, *args: Any, **options: Any) -> None:
        self.ranks = iter(range(replicas))
        super().__init__(lambda count, rank, broken: make(count, "all", broken), replicas, *args, **options)

    def wrap(self, target: Any) -> Any:
        return self.prepare(Plain.wrap(self, target), self.replicas, next(self.ranks))

    def lengths(self) -> set[int]:
        return {len(target) // self.replicas for target in self.targets}

    def remaining(self) -> set[int]:
        return {target.remaining // self.replicas for target in self.targets}


class DealtStateful(Dealt, AcceleratedStateful):
    """The same with `use_stateful_dataloader`."""

    # The loader skips batches of a pass that has ended, and with workers begins another epoch by that.
    saves_ends = False
    states = Rig.states
    load_states = Rig.load_states
    kind = StatefulDataLoader
    save = AcceleratedStateful.save


class Prefetched(Plain):
    """A `DevicePrefetcher` around a `DataLoader`."""

    saves = "handed"
    device: ClassVar[str] = "cpu"
    states = Rig.states
    load_states = Rig.load_states

    def wrap(self, target: Any) -> Any:
        return DevicePrefetcher(super().wrap(target), self.device)

    def take(self) -> list[Batch]:
        return super().take()


class PrefetchedStateful(Prefetched):
    """The same around a `StatefulDataLoader`."""

    saves = "last"
    skips_end = "seen"
    moves_workers = False
    holds = True
    kind = StatefulDataLoader


class AtOnce:
    """Stands in for a device: copies at once, so that the look-ahead runs without an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def send(self, batch: Any) -> tuple[Any, None]:
        return batch, None

    def receive(self, batch: Any, arrived: Any) -> None:
        pass


def _ahead(kind: type[Prefetched]) -> type[Prefetched]:
    class Ahead(kind):  # type: ignore[valid-type, misc]
        device = "meta"

        def open(self) -> None:
            with _stand_in():
                super().open()

    Ahead.__name__ = f"{kind.__name__}Ahead"
    return Ahead


class _stand_in:  # noqa: N801
    def __enter__(self) -> None:
        self.transfer = prefetch_module.CopyStream
        prefetch_module.CopyStream = AtOnce

    def __exit__(self, *error: object) -> None:
        prefetch_module.CopyStream = self.transfer


PrefetchedAhead, PrefetchedStatefulAhead = _ahead(Prefetched), _ahead(PrefetchedStateful)


class Node(Rig):
    """A node by itself; its replicas are one."""

    sets_epochs = False

    def states(self) -> list[Any]:
        return [node.state_dict() for node in self.targets]

    def open(self) -> None:
        if not self.loaded:
            for node in self.targets:
                node.reset(None)
        self.loaded = False
        self.iterators = list(self.targets)

    loaded = False

    def load_states(self, states: list[Any]) -> None:
        for node, state in zip(self.targets, states, strict=True):
            node.reset(state)
        self.loaded = True


class NodeInLoader(Noded):
    """A node as the root of a `torchdata.nodes.Loader`."""

    def load_states(self, states: list[Any]) -> None:
        super().load_states(states)
        for loader in self.loaders:
            # A loader reads a state when it is iterated, or asked for one.
            loader.state_dict()

    def node(self, target: Any) -> nodes.BaseNode[Any]:
        return target


class Stage(Rig):
    """A stage of webdataset: no state, and nothing kept between runs."""

    sets_epochs = False

    def start(self, loader: Any) -> Iterator[Batch]:
        return loader(self._source())

    def _source(self) -> Iterable[int]:
        return (Numbers(self.samples, self.broken)[sample] for sample in range(self.samples))


class Bucketed(IterableDataset[Batch]):
    """The batches of a stage, in a worker those of its share of the samples."""

    def __init__(self, stage: Any, numbers: Numbers) -> None:
        self.stage, self.numbers = stage, numbers

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return self.stage(self.numbers[sample] for sample in range(first, len(self.numbers), workers))


class LoadedStage(Rig):
    """A stage in the dataset of a `DataLoader`."""

    sets_epochs = False

    def wrap(self, target: Any) -> Any:
        count, lives_on = self.workers
        dataset = Bucketed(target, Numbers(self.samples, self.broken))
        return DataLoader(dataset, batch_size=None, num_workers=count, persistent_workers=lives_on)


__all__ = ["Place", "Rig", "Save", "SourceError"]
