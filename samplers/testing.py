"""`check_node`: whether a node keeps the contract of `torchdata.nodes`, wherever it is saved and restored."""

from collections.abc import Callable, Iterator
from itertools import islice, zip_longest
from typing import Any, Final

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torchdata.nodes import BaseNode, Prefetcher

_NOTHING: Final = object()
# Items that are taken after a restart, before the next save.
_TAKEN_BETWEEN: Final = 2

Make = Callable[[], BaseNode[Any]]


def check_node(make: Make, *, every: int = 1) -> int:
    """Check a node against the contract of `torchdata.nodes`, over two of its epochs.

    Every new node gives the same epoch, which ends for good; `reset()` begins another. A state that was saved after any
    item leads another node to the items after it, and so does a state that this node saves; no state changes when the
    node that saved it, or one that loaded it, continues. The same is checked in the second epoch, after a whole epoch
    and after one that was broken off, and under a `Prefetcher`, which saves in its own thread, ahead of the items that
    were taken.

    It raises at the first difference, like `torch.testing.assert_close`, and makes no report as `check_step` does:
    after a wrong item, the later ones tell nothing.

    Args:
        make: Returns a new node each time, over a source that gives the same items each time. Tensors and arrays in
            items are compared by dtype, shape and value, everything else by `==`.
        every: Save after each `every` items; an epoch of n items costs about n * n / every.

    Returns:
        Number of items in an epoch.

    Raises:
        AssertionError: The contract is broken; the message says how, and after which item.
        ValueError: `every` is below one.

    Examples:
        >>> from torchdata.nodes import Batcher, IterableWrapper
        >>> check_node(lambda: Batcher(IterableWrapper(range(10)), batch_size=3, drop_last=False))
        4
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    items = list(_remaining(_start(make)))
    _check_epochs(make, items)
    for context, wrapped in (("", make), ("under a Prefetcher, ", lambda: Prefetcher(make(), prefetch_factor=2))):
        whole, broken = f"{context}in the epoch after a whole one, ", f"{context}in the epoch after a broken off one, "
        _check_states(wrapped, items, every, before=0, context=context)
        _check_states(wrapped, items, every, before=len(items), context=whole)
        _check_states(wrapped, items, every, before=len(items) // 2, context=broken)
    return len(items)


def _check_epochs(make: Make, items: list[Any]) -> None:
    """Check that new nodes and `reset()` give the same epoch, and that its end is final."""
    node = _start(make)
    _compare(_remaining(node), items, "a second new node does not give the same")
    _compare(_remaining(node), [], "the node continues after StopIteration")
    node.reset()
    _compare(_remaining(node), items, "the epoch after reset() is not the same")
    node.reset()
    list(islice(node, len(items) // 2))
    node.reset()
    _compare(_remaining(node), items, "the epoch after reset() in the middle of one is not the same")


def _check_states(make: Make, items: list[Any], every: int, *, before: int, context: str) -> None:
    """Save at each item of the epoch that begins after `before` items of another, and restore each state."""
    node, states = _start(make), []
    if before:
        list(islice(node, before))
        node.reset()
    for count in range(len(items) + 1):
        # The state after the last item is the one that a loader saves at an epoch's end.
        if count % every == 0 or count == len(items):
            states.append((count, node.state_dict()))
        next(node, None)
    # Restore only now: a state that shares objects with its node has changed by now.
    for count, state in states:
        where = f"{context}restored from the state after {count} items"
        second = _restore_node(make, state, where)
        taken = [item for _, item in zip(range(_TAKEN_BETWEEN), _remaining(second), strict=False)]
        again = second.state_dict()
        _compare([*taken, *_remaining(second)], items[count:], where)
        then = f"{where}, and from that of {_TAKEN_BETWEEN} items more"
        _compare(_remaining(_restore_node(make, again, then)), items[count + len(taken) :], then)
        _compare(_remaining(_restore_node(make, state, where)), items[count:], f"{where} a second time")
        second.reset()
        _compare(_remaining(second), items, f"{where}, ended and reset()")


def _start(make: Make, state: dict[str, Any] | None = None) -> BaseNode[Any]:
    """A new node at the start of its first epoch, or at a state."""
    node = make()
    node.reset(state)
    return node


def _restore_node(make: Make, state: dict[str, Any], where: str) -> BaseNode[Any]:
    """A new node at a state.

    Raises:
        AssertionError: It cannot load the state.
    """
    try:
        return _start(make, state)
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


def _remaining(node: BaseNode[Any]) -> Iterator[Any]:
    """All items until StopIteration.

    Yields:
        The items.
    """
    # Not `for item in node`: a node is its own iterator, and `iter(node)` would reset it.
    while (item := next(node, _NOTHING)) is not _NOTHING:
        yield item


def _compare(actual: Any, expected: list[Any], where: str) -> None:
    """Compare items one by one.

    Raises:
        AssertionError: Two differ, or one is missing.
    """
    for index, (ours, theirs) in enumerate(zip_longest(actual, expected, fillvalue=_NOTHING)):
        if not same_items(ours, theirs):
            raise AssertionError(f"{where}: item {index} is {_describe_item(ours)}, expected {_describe_item(theirs)}")


def same_items(one: Any, other: Any) -> bool:
    """Whether two items, or states, are equal in all their parts; tensors and arrays by dtype, shape and value."""
    leaves, shape = pytree.tree_flatten(one)
    others, another = pytree.tree_flatten(other)
    return shape == another and all(map(_same_leaf, leaves, others))


def _same_leaf(one: Any, other: Any) -> bool:
    """Whether two values that are no containers are equal."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def _describe_item(item: Any) -> str:
    """An item in an error message."""
    return "missing" if item is _NOTHING else f"{item!r:.200}"
