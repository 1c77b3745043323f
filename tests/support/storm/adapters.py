"""All kinds of objects with state, and what each is held to: a new one needs some lines here."""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from typing import Any

import numpy as np
from torchdata import nodes

from samplers import (
    LengthBucketBatchSampler,
    LengthBucketNode,
    PackingBatchSampler,
    PackingNode,
    ShardStream,
    ShardWriter,
    bucket_by_length,
    pack_by_length,
)
from storm import rigs
from storm.model import Batch, Book
from storm.rigs import Numbers, Rig, SourceError

LENGTHS = np.random.default_rng(3).integers(1, 40, 150)
SAMPLES = len(LENGTHS)
NO_WORKERS, TWO, LASTING = (0, False), (2, False), (2, True)
ANY = (NO_WORKERS, TWO, LASTING)
# Rules beside those that everything has.
MOVES = frozenset({"save", "seek", "copy", "remaining"})


@dataclass(frozen=True)
class Adapter:
    """A kind of object under a kind of loader.

    Attributes:
        name: for people.
        kind: the rig.
        make: `make(replicas, rank, broken)` gives an object.
        book: what must come.
        replicas: how many there may be.
        workers: how a loader may be made.
        rules: those that need something of the object.
        one_for_all: whether a loader gives the batches of all replicas.
        refuses: the text of the error that may refuse a state; None if there must be none.
    """

    name: str
    kind: type[Rig]
    make: Callable[[int, Any, int | None], Any]
    book: Callable[[], Book]
    replicas: tuple[int, ...] = (1, 2, 3)
    workers: tuple[tuple[int, bool], ...] = (NO_WORKERS,)
    rules: frozenset[str] = field(default=MOVES)
    one_for_all: bool = False
    refuses: str | None = None

    @property
    def is_slow(self) -> bool:
        """Whether processes are started."""
        return self.workers != (NO_WORKERS,)

    def rig(self, replicas: int, workers: tuple[int, bool]) -> Rig:
        """A new rig."""
        return self.kind(self.make, replicas, workers, samples=SAMPLES, one_for_all=self.one_for_all)


# --- objects


def make_sampler(replicas: int, rank: int | str, broken: int | None = None) -> LengthBucketBatchSampler:
    return LengthBucketBatchSampler(LENGTHS, max_tokens=300, seed=1, num_replicas=replicas, rank=rank)


def make_packer(replicas: int, rank: int | str, broken: int | None = None) -> PackingBatchSampler:
    return PackingBatchSampler(LENGTHS, capacity=90, seed=1, num_replicas=replicas, rank=rank)


@dataclass
class Keys:
    """The numbers of a batch's samples; one of them may be broken."""

    broken: int | None = None

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        batch = [int(sample["__key__"]) for sample in samples]
        if self.broken in batch:
            raise SourceError(f"sample {self.broken} is broken")
        return batch


@cache
def _shards() -> str:
    # From Python 3.13 on a forked worker drops what is registered: a TemporaryDirectory would be collected and removed.
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with ShardWriter(folder, max_samples=25, block_size=10) as writer:
        for number, length in enumerate(LENGTHS.tolist()):
            writer.write({"__key__": f"{number}", "x": np.zeros(length, np.uint8)})
    return folder


def make_stream(replicas: int, rank: int, broken: int | None = None) -> ShardStream:
    return ShardStream(
        _shards(), collate_fn=Keys(broken), max_tokens=300, seed=1, window=60, num_replicas=replicas, rank=rank
    )


def make_pack_stream(replicas: int, rank: int, broken: int | None = None) -> ShardStream:
    return ShardStream(
        _shards(), collate_fn=Keys(broken), capacity=90, seed=1, window=60, num_replicas=replicas, rank=rank
    )


class Counted:
    """A stateful iterable that is written as a generator: its state is old until the generator has begun."""

    def __init__(self, broken: int | None) -> None:
        self.numbers = Numbers(SAMPLES, broken)
        self.at = self.start = 0

    def __iter__(self) -> Any:
        self.at, self.start = self.start, 0
        while self.at < SAMPLES:
            self.at += 1
            yield self.numbers[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"]


class Shuffled:
    """A sampler that gives the samples in another order in each epoch."""

    def __init__(self, broken: int | None) -> None:
        self.numbers = Numbers(SAMPLES, broken)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return (self.numbers[sample] for sample in order_of(self.epoch))


def order_of(epoch: int) -> list[int]:
    return np.random.default_rng(epoch).permutation(SAMPLES).tolist()


def source_of(kind: str, broken: int | None) -> nodes.BaseNode[int]:
    if kind == "generator":
        return nodes.IterableWrapper(Counted(broken))
    if kind == "epochs":
        return nodes.SamplerWrapper(Shuffled(broken))
    return nodes.Mapper(nodes.IterableWrapper(range(SAMPLES)), Numbers(SAMPLES, broken).__getitem__)


def length_of(sample: int) -> int:
    return int(LENGTHS[sample])


BUCKETS = {"max_tokens": 150, "buffer_size": 20}


def make_node(kind: str, *, ahead: int = 0) -> Callable[..., Any]:
    def make(replicas: int, rank: int, broken: int | None = None) -> Any:
        node = LengthBucketNode(source_of(kind, broken), length_of, **BUCKETS)
        return nodes.Prefetcher(node, prefetch_factor=2, snapshot_frequency=ahead) if ahead else node

    return make


PACKS = {"capacity": 90, "rows": 2, "buffer_size": 20}


def make_packing_node(kind: str) -> Callable[..., Any]:
    return lambda replicas, rank, broken=None: PackingNode(source_of(kind, broken), length_of, **PACKS)


def make_stage(replicas: int, rank: int, broken: int | None = None) -> Any:
    return bucket_by_length(length_of, **BUCKETS)


# --- what must come


def _planned(make: Callable[..., Any]) -> Callable[[], Book]:
    def write(epoch: int, replicas: int) -> list[Batch]:
        # Each from a new object by itself, which the plan of another must agree with.
        ranks = [make(replicas, rank) for rank in range(replicas)]
        for one in ranks:
            one.set_epoch(epoch)
        return [batch for step in zip(*ranks, strict=True) for batch in step]

    return cache(lambda: Book(write))


sampler_book, stream_book, packer_book = _planned(make_sampler), _planned(make_stream), _planned(make_packer)
pack_stream_book = _planned(make_pack_stream)


@cache
def bucket_book() -> Book:
    return Book(lambda epoch, replicas: list(make_stage(1, 0)(range(SAMPLES))), alike=True)


@cache
def dealt_book() -> Book:
    """Two workers, each with its bucketer for every other sample; a loader takes their batches in turn."""

    def write(epoch: int, replicas: int) -> list[Batch]:
        parts = [list(make_stage(1, 0)(range(worker, SAMPLES, 2))) for worker in range(2)]
        return [batch for turn in zip_longest(*parts) for batch in turn if batch is not None]

    return Book(write, alike=True)


@cache
def pack_book() -> Book:
    return Book(lambda epoch, replicas: list(pack_by_length(length_of, **PACKS)(range(SAMPLES))), alike=True)


@cache
def epochs_book() -> Book:
    return Book(lambda epoch, replicas: list(make_stage(1, 0)(order_of(epoch))), even=False)


RAISING = MOVES | {"source raises"}
PREPARED = RAISING - {"copy", "remaining"}


def _bare() -> Iterator[Adapter]:
    yield Adapter("sampler", rigs.Bare, make_sampler, sampler_book)
    yield Adapter("sampler of all", rigs.Bare, make_sampler, sampler_book, one_for_all=True)
    yield Adapter("packs", rigs.Bare, make_packer, packer_book)
    yield Adapter("packs of all", rigs.Bare, make_packer, packer_book, one_for_all=True)
    yield Adapter("stream", rigs.Bare, make_stream, stream_book, rules=RAISING)
    yield Adapter("stream of packs", rigs.Bare, make_pack_stream, pack_stream_book, rules=RAISING)
    yield Adapter("stage", rigs.Stage, make_stage, bucket_book, (1,), rules=frozenset({"copy"}))


def _loaded() -> Iterator[Adapter]:
    """Under each kind of loader, first without workers, where an example takes no time."""
    loaders = {
        "DataLoader": rigs.Plain,
        "StatefulDataLoader": rigs.Stateful,
        "prefetcher": rigs.Prefetched,
        "prefetcher of StatefulDataLoader": rigs.PrefetchedStateful,
        "prefetcher ahead": rigs.PrefetchedAhead,
        "prefetcher ahead of StatefulDataLoader": rigs.PrefetchedStatefulAhead,
    }
    for loader, kind in loaders.items():
        for more, workers in (("", (NO_WORKERS,)), (", workers", ANY if kind.moves_workers else (TWO, LASTING))):
            where = f"{loader}{more}"
            yield Adapter(f"sampler, {where}", kind, make_sampler, sampler_book, workers=workers, rules=RAISING)
            yield Adapter(f"stream, {where}", kind, make_stream, stream_book, workers=workers, rules=RAISING)
            if not issubclass(kind, rigs.Prefetched):
                name = f"sampler of all, {where}"
                yield Adapter(name, kind, make_sampler, sampler_book, workers=workers, one_for_all=True)
                yield Adapter(f"packs, {where}", kind, make_packer, packer_book, workers=workers, rules=RAISING)
                name = f"stream of packs, {where}"
                yield Adapter(name, kind, make_pack_stream, pack_stream_book, workers=workers, rules=RAISING)


def _framed() -> Iterator[Adapter]:
    """Under the loaders of torchdata.nodes and accelerate, which count epochs themselves."""
    rules = RAISING - {"seek", "copy", "remaining"}
    yield Adapter("sampler, nodes.Loader", rigs.Noded, make_sampler, sampler_book, rules=rules)
    yield Adapter("packs, nodes.Loader", rigs.Noded, make_packer, packer_book, rules=rules)
    yield Adapter("stream, nodes.Loader", rigs.Noded, make_stream, stream_book, rules=rules)
    yield Adapter("sampler of all, nodes.Loader", rigs.Noded, make_sampler, sampler_book, rules=rules, one_for_all=True)
    kinds = {"": (rigs.Accelerated, rigs.Dealt), " stateful": (rigs.AcceleratedStateful, rigs.DealtStateful)}
    for stateful, (kind, dealt) in kinds.items():
        for more, workers in (("", (NO_WORKERS,)), (", workers", (TWO, LASTING))):
            name = f"accelerate{stateful}{more}"
            yield Adapter(f"packs, {name}", kind, make_packer, packer_book, (1,), workers, PREPARED)
            yield Adapter(f"sampler, {name}", kind, make_sampler, sampler_book, (1,), workers, PREPARED)
            yield Adapter(f"stream, {name}", kind, make_stream, stream_book, (1,), workers, PREPARED)
            # Their loader skips batches where ours would load a state, so that positions count from the epoch's start.
            rules = PREPARED - {"seek"} if stateful else PREPARED
            yield Adapter(f"sampler of all, 2 x {name}", dealt, make_sampler, sampler_book, (2,), workers, rules)


def _stages() -> Iterator[Adapter]:
    """A stage in a dataset, whose workers take turns with the samples."""
    rules = frozenset({"copy"})
    yield Adapter("stage, DataLoader", rigs.LoadedStage, make_stage, bucket_book, (1,), rules=rules)
    name = "stage, DataLoader, workers"
    yield Adapter(name, rigs.LoadedStage, make_stage, dealt_book, (1,), (TWO, LASTING), rules)


def _nodes() -> Iterator[Adapter]:
    rules = frozenset({"save", "source raises"})
    for where, kind in (("bare", rigs.Node), ("nodes.Loader", rigs.NodeInLoader)):
        yield Adapter(f"node of packs, {where}", kind, make_packing_node("list"), pack_book, (1,), rules=rules)
    for source in ("list", "generator", "epochs"):
        for where, kind, ahead in (
            ("bare", rigs.Node, 0),
            ("nodes.Loader", rigs.NodeInLoader, 0),
            ("Prefetcher(1)", rigs.NodeInLoader, 1),
            ("Prefetcher(3)", rigs.NodeInLoader, 3),
        ):
            yield Adapter(
                f"node of {source}, {where}",
                kind,
                make_node(source, ahead=ahead),
                epochs_book if source == "epochs" else bucket_book,
                replicas=(1,),
                rules=frozenset({"save", "source raises"}),
                refuses="had not begun" if source == "generator" else None,
            )


ADAPTERS = {adapter.name: adapter for adapter in (*_bare(), *_loaded(), *_framed(), *_stages(), *_nodes())}
