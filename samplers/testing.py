"""What torchdata expects of a node, tried out on any node: state and order hold wherever it is saved and restored."""

from collections.abc import Callable, Iterator
from itertools import islice, zip_longest
from typing import Any, Final

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torchdata.nodes import BaseNode, Prefetcher

_NOTHING: Final = object()
# Items that are taken between a restart and the next save.
_BETWEEN: Final = 2

Make = Callable[[], BaseNode[Any]]


def check_node(make: Make, *, every: int = 1) -> int:
    """Hold a node to the contract of `torchdata.nodes`, two of its epochs long.

    An epoch is the same from every new node, and ends for good; `reset()` begins another. A state that was saved after
    any item leads another node to the items behind it, and so does a state that this one saves; no state changes when
    the node that gave it, or one that took it, goes on. The same is tried in the second epoch, after a whole one and
    after one that was broken off, and under a `Prefetcher`, which saves in a thread of its own, ahead of what was
    taken.

    Args:
        make: gives a new node each time, of a source that gives the same each time. Tensors and arrays in items are
            compared by dtype, shape and value, everything else by `==`.
        every: save after each so many items; an epoch of n items costs some n * n / every.

    Returns:
        How many items an epoch has.

    Raises:
        AssertionError: The contract is broken: how, and after which item.
        ValueError: `every` is below one.

    Example:
        >>> from torchdata.nodes import Batcher, IterableWrapper
        >>> check_node(lambda: Batcher(IterableWrapper(range(10)), batch_size=3, drop_last=False))
        4
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    items = list(_rest_of(_started(make)))
    _check_epochs(make, items)
    for under, kind in (("", make), ("under a Prefetcher, ", lambda: Prefetcher(make(), prefetch_factor=2))):
        _check_states(kind, items, every, 0, under)
        _check_states(kind, items, every, len(items), f"{under}in the epoch after a whole one, ")
        _check_states(kind, items, every, len(items) // 2, f"{under}in the epoch after one that was broken off, ")
    return len(items)


def _check_epochs(make: Make, items: list[Any]) -> None:
    node = _started(make)
    _compare(_rest_of(node), items, "a second new node does not give the same")
    _compare(_rest_of(node), [], "the node goes on after StopIteration")
    node.reset()
    _compare(_rest_of(node), items, "the epoch after reset() is not the same")
    node.reset()
    list(islice(node, len(items) // 2))
    node.reset()
    _compare(_rest_of(node), items, "the epoch after reset() in the midst of one is not the same")


def _check_states(make: Make, items: list[Any], every: int, before: int, under: str) -> None:
    """Save everywhere in an epoch, the first if no items were taken before, and restore from each state."""
    node, states = _started(make), []
    if before:
        list(islice(node, before))
        node.reset()
    for place in range(len(items) + 1):
        # The state after the last item is the one that an epoch's end saves.
        if place % every == 0 or place == len(items):
            states.append((place, node.state_dict()))
        next(node, None)
    # Only now is any restored: a state that is alive has gone on with the node.
    for place, state in states:
        where = f"{under}restored from the state after {place} items"
        second = _restored(make, state, where)
        taken = [item for _, item in zip(range(_BETWEEN), _rest_of(second), strict=False)]
        again = second.state_dict()
        _compare([*taken, *_rest_of(second)], items[place:], where)
        then = f"{where}, and from that of {_BETWEEN} items more"
        _compare(_rest_of(_restored(make, again, then)), items[place + len(taken) :], then)
        _compare(_rest_of(_restored(make, state, where)), items[place:], f"{where} a second time")
        second.reset()
        _compare(_rest_of(second), items, f"{where}, ended and reset()")


def _started(make: Make, state: dict[str, Any] | None = None) -> BaseNode[Any]:
    node = make()
    node.reset(state)
    return node


def _restored(make: Make, state: dict[str, Any], where: str) -> BaseNode[Any]:
    try:
        return _started(make, state)
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


def _rest_of(node: BaseNode[Any]) -> Iterator[Any]:
    # A node is its own iterator, and must not be started anew by asking for one.
    while (item := next(node, _NOTHING)) is not _NOTHING:
        yield item


def _compare(found: Any, expected: list[Any], where: str) -> None:
    for place, (ours, theirs) in enumerate(zip_longest(found, expected, fillvalue=_NOTHING)):
        if not same_items(ours, theirs):
            raise AssertionError(f"{where}: item {place} is {_text(ours)}, expected {_text(theirs)}")


def same_items(one: Any, other: Any) -> bool:
    """Whether two items, or states, are equal in all that they hold; tensors and arrays by dtype, shape and value."""
    leaves, shape = pytree.tree_flatten(one)
    others, another = pytree.tree_flatten(other)
    return shape == another and all(map(_same_leaf, leaves, others))


def _same_leaf(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def _text(item: Any) -> str:
    return "missing" if item is _NOTHING else f"{item!r:.200}"
