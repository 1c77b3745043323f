"""Samplers, streams, nodes and loaders made from plain values, and what they give from a saved state on."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from torchdata.nodes import IterableWrapper
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import DevicePrefetcher, PadCollator
from compatibility.plain import tell_keys
from compatibility.surface import resolve
from samplers import LengthBucketBatchSampler, LengthBucketNode, Mixture, PackingBatchSampler, ShardStream

BUFFER = {"buffer_size": 8}
BUDGET = {"max_tokens": 120}


def lengths_of(count: int, fields: int = 1) -> list[Any]:
    """Lengths from 1 to 97 that a formula gives, so that nobody has to keep them."""
    lengths = [(7 * place * place + 3 * place) % 97 + 1 for place in range(count)]
    return lengths if fields == 1 else list(map(list, zip(lengths, reversed(lengths), strict=True)))


def make(recipe: dict[str, Any], corpora: Path) -> Any:
    """A loader of one epoch after the other, from its recipe: the values that a file of states holds."""
    return _MAKERS[recipe["kind"]](recipe, corpora)


def resume(recipe: dict[str, Any], state: Any, corpora: Path) -> dict[str, Any]:
    """All that comes after a state, and the first batches of the epoch behind it."""
    return _RESUMED[recipe["load"]](make(recipe, corpora), state)


def first_batches(loader: Any) -> list[Any]:
    """The first two batches of the next epoch."""
    return [tell_keys(batch) for batch in islice(iter(loader), 2)]


def new_bucketer() -> Any:
    """A small buffer."""
    # Imported as the first fixtures' release names it, and only where it is wanted.
    return resolve("samplers.bucketer.Bucketer")(resolve("samplers.budget.Budget")(**BUDGET), **BUFFER)


def push_from(bucketer: Any, first: int) -> Iterator[list[int]]:
    """The batches of a stream of lengths whose samples are their numbers, from one of them on."""
    lengths = lengths_of(60)
    yield from bucketer.batches_of((lengths[number], number) for number in range(first, len(lengths)))


def _make_sampler(recipe: dict[str, Any], corpora: Path) -> LengthBucketBatchSampler:
    del corpora
    return LengthBucketBatchSampler(
        lengths_of(**recipe["lengths"]), num_replicas=recipe["replicas"], rank=recipe["rank"], **recipe["options"]
    )


def _make_stream(recipe: dict[str, Any], corpora: Path) -> ShardStream:
    return ShardStream(
        corpora / recipe["corpus"],
        collate_fn=PadCollator(sort_by="tokens"),
        num_replicas=recipe["replicas"],
        rank=recipe["rank"],
        **recipe["options"],
    )


def _make_packing(recipe: dict[str, Any], corpora: Path) -> PackingBatchSampler:
    del corpora
    return PackingBatchSampler(
        lengths_of(**recipe["lengths"]), num_replicas=recipe["replicas"], rank=recipe["rank"], **recipe["options"]
    )


def _make_mixture(recipe: dict[str, Any], corpora: Path) -> LengthBucketBatchSampler:
    del corpora
    sources = {name: lengths_of(count) for name, count in recipe["sources"].items()}
    mixture = Mixture(sources, weights=recipe["weights"], passes=recipe["passes"])
    return LengthBucketBatchSampler(mixture, num_replicas=recipe["replicas"], rank=recipe["rank"], **recipe["options"])


def _make_packed_stream(recipe: dict[str, Any], corpora: Path) -> ShardStream:
    return ShardStream(
        corpora / recipe["corpus"],
        collate_fn=_keys_of,
        fields=["tokens"],
        num_replicas=recipe["replicas"],
        rank=recipe["rank"],
        **recipe["options"],
    )


def _keys_of(samples: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {"__key__": [sample["__key__"] for sample in samples]}


def _make_node(recipe: dict[str, Any], corpora: Path) -> LengthBucketNode[list[int]]:
    del recipe, corpora
    samples = [[number, length] for number, length in enumerate(lengths_of(60))]
    return LengthBucketNode(IterableWrapper(samples), 1, **BUDGET, **BUFFER)


def _make_loader(recipe: dict[str, Any], corpora: Path) -> Any:
    source, workers = make(recipe["source"], corpora), recipe["workers"]
    kind = StatefulDataLoader if recipe["stateful"] else DataLoader
    if isinstance(source, ShardStream):
        return kind(source, batch_size=None, num_workers=workers)
    numbers = list(range(recipe["source"]["lengths"]["count"]))
    return kind(numbers, batch_sampler=source, collate_fn=list, num_workers=workers)


_MAKERS = {
    "sampler": _make_sampler,
    "stream": _make_stream,
    "packing": _make_packing,
    "mixture": _make_mixture,
    "packed stream": _make_packed_stream,
    "node": _make_node,
    "buffer": lambda recipe, corpora: new_bucketer(),
    "loader": _make_loader,
    "prefetcher": lambda recipe, corpora: DevicePrefetcher(make(recipe["source"], corpora), "cpu"),
}


def _seek(loader: Any, state: Any) -> dict[str, Any]:
    loader.seek(state)
    return _rest(loader)


def _load(loader: Any, state: Any) -> dict[str, Any]:
    loader.load_state_dict(state)
    return _rest(loader)


def _load_iterator(loader: Any, state: Any) -> dict[str, Any]:
    iterator = iter(loader)
    iterator.load_state_dict(state)
    return {"rest": [tell_keys(batch) for batch in iterator], "next": first_batches(loader)}


def _rest(loader: Any) -> dict[str, Any]:
    return {"rest": [tell_keys(batch) for batch in loader], "next": first_batches(loader)}


def _reset(node: Any, state: Any) -> dict[str, Any]:
    node.reset(state)
    rest = list(node)
    node.reset()
    return {"rest": rest, "next": list(islice(node, 2))}


def _push(bucketer: Any, state: Any) -> dict[str, Any]:
    bucketer.load_state_dict(state)
    return {"rest": list(push_from(bucketer, state["oldest"])), "next": []}


_RESUMED = {"seek": _seek, "state": _load, "iterator": _load_iterator, "reset": _reset, "push": _push}
