"""The contract of nodes: ours keep it under every wrapper, and nodes that break it are told how."""

from typing import Any

import numpy as np
import pytest
import torch
from torchdata import nodes

from samplers import LengthBucketNode
from samplers.testing import check_node

LENGTHS = np.random.default_rng(0).integers(1, 30, 60).tolist()


def source() -> nodes.BaseNode[Any]:
    samples = [{"x": torch.full((length,), index), "y": np.arange(length)} for index, length in enumerate(LENGTHS)]
    return nodes.IterableWrapper(samples)


def bucketed(**options: Any) -> LengthBucketNode[Any]:
    return LengthBucketNode(source(), "x", max_tokens=100, **{"buffer_size": 12} | options)


WRAPS = {
    "alone": bucketed,
    "bounded in bytes": lambda: bucketed(max_bytes=2_000),
    "mapped": lambda: nodes.Mapper(bucketed(), len),
    "mapped in threads": lambda: nodes.ParallelMapper(bucketed(), len, num_workers=2, method="thread"),
    "prefetched": lambda: nodes.Prefetcher(bucketed(), prefetch_factor=3, snapshot_frequency=4),
    "unbatched": lambda: nodes.Batcher(nodes.Unbatcher(bucketed()), batch_size=7, drop_last=False),
}


@pytest.mark.parametrize("name", WRAPS)
def test_the_node_of_buckets_keeps_the_contract(name: str) -> None:
    assert check_node(WRAPS[name], every=4) > 8


class Counter(nodes.BaseNode[int]):
    """Counts to 5, rightly."""

    last = 5

    def __init__(self) -> None:
        super().__init__()
        self.place = {"at": 0}

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.place = {"at": initial_state["at"] if initial_state else 0}

    def next(self) -> int:
        if self.place["at"] == self.last:
            raise StopIteration
        self.place["at"] += 1
        return self.place["at"]

    def get_state(self) -> dict[str, Any]:
        return dict(self.place)


class Alive(Counter):
    """Gives its state away as it is."""

    def get_state(self) -> dict[str, Any]:
        return self.place


class Forgetful(Counter):
    """Takes no state."""

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.place = {"at": 0}


class Greedy(Counter):
    """Writes to what it was given."""

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.place = initial_state or {"at": 0}


class Tired(Counter):
    """Has one epoch."""

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        before = self.place
        super().reset(initial_state)
        self.place = self.place if initial_state else before


class Endless(Counter):
    """Begins again after the end."""

    def next(self) -> int:
        try:
            return super().next()
        except StopIteration:
            self.place = {"at": 3}
            raise


class Aging(Counter):
    """Gives each of its copies another number."""

    born = 0

    def __init__(self) -> None:
        super().__init__()
        Aging.born += 1
        self.last = 4 + Aging.born


class Careless(Counter):
    """Forgets what it was restored from when it is saved again."""

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.first = self.place["at"]

    def get_state(self) -> dict[str, Any]:
        return {"at": self.place["at"] - self.first}


def test_a_node_that_counts_rightly_keeps_the_contract() -> None:
    assert check_node(Counter) == 5
    assert check_node(lambda: nodes.Mapper(Counter(), str), every=3) == 5


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Alive, r"restored from the state after 0 items: item 0 is missing, expected 1"),
        (Forgetful, r"after 0 items, and from that of 2 items more: item 0 is 1, expected 3"),
        (Greedy, r"restored from the state after 0 items.*: item 0 is .*, expected 1"),
        (Tired, r"the epoch after reset\(\) is not the same: item 0 is missing, expected 1"),
        (Endless, r"the node continues after StopIteration: item 0 is 4, expected missing"),
        (Aging, r"a second new node does not give the same: item 5 is 6, expected missing"),
        (Careless, r"after 1 items, and from that of 2 items more: item 0 is 3, expected 4"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_node_that_breaks_the_contract_is_told_how(kind: type[Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_node(kind)


def test_items_are_compared_by_value_dtype_and_type() -> None:
    drawn = iter(range(100))
    for item in (lambda: torch.tensor(next(drawn)), lambda: np.zeros(2, f"f{4 + 4 * (next(drawn) % 2)}")):
        with pytest.raises(AssertionError, match="a second new node"):
            check_node(lambda item=item: nodes.IterableWrapper([item()]))


def test_every_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        check_node(Counter, every=0)


class Late(Counter):
    """Tells where the epoch before stopped until it has begun: as a stateful iterable that is a generator does."""

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        before = self.place
        super().reset(initial_state)
        self.told = self.place if initial_state else before

    def next(self) -> int:
        item = super().next()
        self.told = self.place
        return item

    def get_state(self) -> dict[str, Any]:
        return dict(self.told)


class Once(Counter):
    """Cannot be restored behind its first epoch, and says so."""

    epoch = 0

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        if initial_state and initial_state["epoch"]:
            raise ValueError("only once")
        super().reset(initial_state)
        self.epoch += initial_state is None

    def get_state(self) -> dict[str, Any]:
        return {**self.place, "epoch": max(0, self.epoch - 1)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Late, r"in the epoch after a whole one, restored from the state after 0 items: item 0 is missing, expected 1"),
        (Once, r"in the epoch after a whole one, restored from the state after 0 items: ValueError: only once"),
    ],
)
def test_a_node_that_is_wrong_from_its_second_epoch_on_is_told_how(kind: type[Any], message: str) -> None:
    # Red: the states of a first epoch alone were tried.
    with pytest.raises(AssertionError, match=message):
        check_node(kind)
