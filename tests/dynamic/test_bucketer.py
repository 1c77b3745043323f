"""The bucketer: nothing lost, nothing over budget, nobody waits too long, and a small state that resumes exactly."""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collate.errors import LengthError
from samplers.dynamic.bucketer import Bucketer
from samplers.dynamic.buffer import bytes_of
from samplers.planning.budget import Budget

Item = tuple[int, int]

LENGTHS = st.lists(st.integers(0, 40), max_size=80)
OPTIONS = st.fixed_dictionaries(
    {"buffer_size": st.integers(1, 20)},
    optional={"max_wait": st.integers(1, 60), "max_bytes": st.integers(1, 2000)},
)


def cubic(rows: Any, width: Any) -> Any:
    return rows * width**3 / 80_000


BUDGETS = st.fixed_dictionaries(
    {"max_tokens": st.integers(40, 200)},
    optional={"batch_size": st.integers(1, 9), "cost": st.just(cubic)},
)


def items(lengths: list[int]) -> list[tuple[int, Item]]:
    """A stream of samples that know their length and their place."""
    return [(length, (length, index)) for index, length in enumerate(lengths)]


def within(batch: list[Item], budget: dict[str, Any]) -> bool:
    """Whether a batch holds the budget, from first principles."""
    rows, width = len(batch), max(1, *(length for length, _ in batch))
    return (
        rows * width <= budget["max_tokens"]
        and rows <= budget.get("batch_size", rows)
        and ("cost" not in budget or cubic(rows, width) <= 1)
    )


def oldest_first(stream: list[Item], budget: dict[str, Any], rule: Bucketer[Item]) -> Iterator[list[Item]]:
    """The rule in words, with nothing but sorting: what the bucketer must do, slowly."""
    waiting: list[Item] = []
    for arrival, item in enumerate(stream):
        waiting.append(item)
        while waiting and (
            len(waiting) >= rule.buffer_size
            or arrival + 1 - waiting[0][1] >= rule.max_wait
            or (rule.max_bytes is not None and sum(map(bytes_of, waiting)) > rule.max_bytes)
        ):
            yield take(waiting, budget)
    yield from rest(waiting, budget)


def rest(waiting: list[Item], budget: dict[str, Any]) -> list[list[Item]]:
    """What waits when the stream has ended: longest first, a batch as long as its budget holds, then by the oldest."""
    batches: list[list[Item]] = []
    for item in sorted(waiting, reverse=True):
        if batches and within([*batches[-1], item], budget):
            batches[-1].append(item)
        else:
            batches.append([item])
    return sorted((sorted(batch) for batch in batches), key=lambda batch: min(index for _, index in batch))


def take(waiting: list[Item], budget: dict[str, Any]) -> list[Item]:
    batch = [waiting.pop(0)]
    while True:
        shorter = max((item for item in waiting if item < batch[0]), default=None)
        longer = min((item for item in waiting if item > batch[-1]), default=None)
        grown = [grow for grow in ([shorter, *batch], [*batch, longer]) if None not in grow and within(grow, budget)]
        if not grown:
            return batch
        # The least padding; a longer neighbour where both add as much.
        batch = min(grown, key=lambda grow: (padding(grow), grow[0] is shorter))
        waiting[:] = [item for item in waiting if item not in batch]


def padding(batch: list[Item]) -> int:
    return len(batch) * batch[-1][0] - sum(length for length, _ in batch)


@given(LENGTHS, OPTIONS, BUDGETS)
def test_batches_are_those_of_the_rule_in_words(
    lengths: list[int], options: dict[str, int], budget: dict[str, Any]
) -> None:
    bucketer: Bucketer[Item] = Bucketer(Budget(**budget), overlong="alone", **options)
    stream = [item for _, item in items(lengths)]
    expected = list(oldest_first(stream, budget, bucketer))
    assert list(bucketer.batches_of(items(lengths))) == expected


@given(LENGTHS, OPTIONS, BUDGETS)
def test_every_sample_comes_once_within_the_budget_and_shortest_first(
    lengths: list[int], options: dict[str, int], budget: dict[str, Any]
) -> None:
    bucketer: Bucketer[Item] = Bucketer(Budget(**budget), overlong="alone", **options)
    batches = list(bucketer.batches_of(items(lengths)))
    assert sorted(sample for batch in batches for sample in batch) == sorted(sample for _, sample in items(lengths))
    assert all(len(batch) == 1 or within(batch, budget) for batch in batches)
    assert all(batch == sorted(batch) for batch in batches)


@given(LENGTHS, OPTIONS)
def test_nobody_waits_longer_than_max_wait_and_the_buffer_stays_bounded(
    lengths: list[int], options: dict[str, int]
) -> None:
    bucketer: Bucketer[Item] = Bucketer(Budget(max_tokens=100), **options)
    waiting: set[int] = set()
    for arrival, (length, sample) in enumerate(items(lengths)):
        bucketer.push(length, sample)
        waiting.add(arrival)
        while bucketer.is_due:
            waiting -= {index for _, index in bucketer.pop()}
        assert all(arrival - index < bucketer.max_wait for index in waiting)
        assert len(bucketer) == len(waiting) < options["buffer_size"]
        assert bucketer.oldest == min(waiting, default=arrival + 1)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 400)), max_size=80), OPTIONS, st.integers(1, 3000))
def test_no_more_bytes_wait_than_max_bytes_and_nothing_is_lost(
    stream: list[tuple[int, int]], options: dict[str, int], max_bytes: int
) -> None:
    bucketer: Bucketer[tuple[int, bytes]] = Bucketer(Budget(max_tokens=100), **options | {"max_bytes": max_bytes})
    samples = [(length, (index, bytes(size))) for index, (length, size) in enumerate(stream)]
    waiting: dict[int, int] = {}
    for length, sample in samples:
        bucketer.push(length, sample)
        waiting[sample[0]] = bytes_of(sample)
        assert bucketer.held_bytes == sum(waiting.values()) <= max_bytes + bytes_of(sample)
        while bucketer.is_due:
            for index, _ in bucketer.pop():
                del waiting[index]
        assert bucketer.held_bytes == sum(waiting.values()) <= max_bytes
    while len(bucketer):
        for index, _ in bucketer.pop():
            del waiting[index]
    assert not waiting
    assert bucketer.held_bytes == 0


def test_a_batch_comes_early_only_when_bytes_run_out_and_is_the_oldests() -> None:
    sample = bytes(1000)
    bucketer: Bucketer[bytes] = Bucketer(Budget(max_tokens=20), buffer_size=99, max_bytes=3 * bytes_of(sample))
    for length in (5, 9, 1):
        bucketer.push(length, sample)
        assert not bucketer.is_due
    bucketer.push(6, sample)
    assert bucketer.is_due
    assert len(bucketer.pop()) == 3
    assert not bucketer.is_due
    assert bucketer.held_bytes == bytes_of(sample)


def test_a_sample_larger_than_max_bytes_empties_the_buffer() -> None:
    bucketer: Bucketer[bytes] = Bucketer(Budget(batch_size=2), buffer_size=99, max_bytes=500)
    stream = [(1, b"a"), (9, bytes(1000)), (2, b"b"), (3, b"c")]
    assert list(bucketer.batches_of(stream)) == [[b"a", bytes(1000)], [b"b", b"c"]]


def test_without_max_bytes_no_sample_is_measured() -> None:
    class Secret:
        def __sizeof__(self) -> int:
            raise AssertionError

    bucketer: Bucketer[Secret] = Bucketer(Budget(batch_size=2), buffer_size=2)
    assert [len(batch) for batch in bucketer.batches_of((3, Secret()) for _ in range(3))] == [2, 1]
    assert bucketer.held_bytes == 0


@dataclass
class Pair:
    x: Any
    y: Any


SLOTS = make_dataclass("SLOTS", ["x"], slots=True)
BIG = np.zeros((100, 10), np.float32)


@pytest.mark.parametrize(
    ("sample", "least"),
    [
        (BIG, 4000),
        (BIG.T[3:], 2800),
        (torch.zeros(100, 10), 4000),
        (torch.zeros(100, 10)[:50], 2000),
        (torch.zeros(100, 10, dtype=torch.bfloat16), 2000),
        (bytes(4000), 4000),
        (bytearray(4000), 4000),
        (memoryview(bytes(4000)), 4000),
        ("x" * 4000, 4000),
        ("🐍" * 1000, 4000),
        ({"a": BIG, "b": {"c": [bytes(900), (BIG.copy(),)]}}, 8900),
        ([1000 + index for index in range(100)], 100 * (28 + 8)),
        ({bytes(1000)}, 1000),
        (deque([bytes(1000)]), 1000),
        (Pair(BIG, [bytes(1000)]), 5000),
        (SLOTS(BIG), 4000),
        (MappingProxyType({"a": BIG}), 4000),
        (np.array([BIG, bytes(1000), None], object), 5000),
        (iter([]), 0),
        (Pair, 0),
        (None, 0),
    ],
)
def test_bytes_are_those_of_the_data_and_little_more(sample: Any, least: int) -> None:
    overhead = 2000 if isinstance(sample, type) else 1000
    assert least <= bytes_of(sample) < least + overhead


def test_an_object_counts_once_however_often_it_is_held_and_cycles_end() -> None:
    once = bytes_of([BIG])
    assert bytes_of([BIG, BIG, (BIG, {"again": BIG})]) < once + 500
    ring: list[Any] = [BIG]
    ring.append(ring)
    assert bytes_of(ring) < once + 100
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert bytes_of(deep) > 100_000 * 56


def test_a_size_that_torch_does_not_tell_is_an_error_and_no_arrival() -> None:
    bucketer: Bucketer[Any] = Bucketer(Budget(max_tokens=2), buffer_size=2, max_bytes=100, overlong="alone")
    before = bucketer.state_dict()
    for length in (2, 3):
        with pytest.raises(RuntimeError, match="not defined for sparse tensors"):
            bucketer.push(length, {"x": torch.eye(3).to_sparse()})
    assert (bucketer.state_dict(), len(bucketer), bucketer.held_bytes) == (before, 0, 0)


@given(st.integers(1, 30), OPTIONS)
def test_empty_samples_count_as_one_step_wide_as_they_are_padded(tokens: int, options: dict[str, int]) -> None:
    bucketer: Bucketer[Item] = Bucketer(Budget(max_tokens=tokens), **options)
    assert all(len(batch) <= tokens for batch in bucketer.batches_of(items([0] * 70)))


@given(LENGTHS, OPTIONS, st.sampled_from(["drop", "alone"]))
def test_overlong_samples_are_counted_and_nothing_else_is_lost(
    lengths: list[int], options: dict[str, int], overlong: Any
) -> None:
    bucketer: Bucketer[Item] = Bucketer(Budget(max_tokens=20), overlong=overlong, **options)
    batches = list(bucketer.batches_of(items(lengths)))
    long = [sample for length, sample in items(lengths) if length > 20]
    expected = [sample for _, sample in items(lengths) if overlong == "alone" or sample not in long]
    assert sorted(sample for batch in batches for sample in batch) == sorted(expected)
    assert (bucketer.dropped, bucketer.alone) == ((len(long), 0) if overlong == "drop" else (0, len(long)))
    assert all(len(batch) == 1 for batch in batches if any(sample in long for sample in batch))
    assert bucketer.arrivals == bucketer.oldest == len(lengths)


def test_an_overlong_sample_is_named_and_changes_nothing_else() -> None:
    bucketer: Bucketer[Any] = Bucketer(Budget(max_tokens=20), buffer_size=9)
    bucketer.push(3, "short")
    before = bucketer.state_dict()
    with pytest.raises(LengthError, match=r"at arrival 1 \(key 'a'\) has 30 steps, which alone exceeds the budget"):
        bucketer.push(30, {"__key__": "a"})
    with pytest.raises(LengthError, match="at arrival 1 has 30 steps"):
        bucketer.push(30, "long")
    for bad, kind in ((-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(kind, match="length must be"):
            bucketer.push(bad, "bad")
    assert bucketer.state_dict() == before
    assert bucketer.pop() == ["short"]


@given(LENGTHS, OPTIONS, BUDGETS)
def test_the_rest_is_cut_alike_whatever_is_out_of_it(
    lengths: list[int], options: dict[str, int], budget: dict[str, Any]
) -> None:
    bucketer: Bucketer[Item] = Bucketer(Budget(**budget), **options | {"buffer_size": 99})
    for length, sample in items(lengths):
        bucketer.push(length, sample)
        while bucketer.is_due:
            bucketer.pop()
    bucketer.end()
    ahead = []
    while len(bucketer):
        state, oldest = bucketer.state_dict(), bucketer.oldest
        ahead.append(bucketer.pop())
        again: Bucketer[Item] = Bucketer(Budget(**budget), **options | {"buffer_size": 99})
        again.load_state_dict(state)
        for length, sample in items(lengths)[oldest:]:
            again.push(length, sample)
        again.end()
        assert again.pop() == ahead[-1]


def test_the_rest_is_cut_fast_also_in_many_small_batches() -> None:
    bucketer: Bucketer[int] = Bucketer(Budget(batch_size=1), buffer_size=30_000)
    batches = list(bucketer.batches_of((index % 7, index) for index in range(20_000)))
    assert batches == [[index] for index in range(20_000)]


def test_no_sample_is_pushed_after_the_end() -> None:
    bucketer: Bucketer[str] = Bucketer(Budget(batch_size=1), buffer_size=1)
    bucketer.end()
    with pytest.raises(ValueError, match=r"got one after end\(\)"):
        bucketer.push(1, "late")
    bucketer.load_state_dict(bucketer.state_dict())
    bucketer.push(1, "again")
    assert bucketer.pop() == ["again"]


def test_popping_an_empty_buffer_is_refused() -> None:
    with pytest.raises(IndexError, match="push one before you pop"):
        Bucketer(Budget(batch_size=1), buffer_size=1).pop()


CUTS = st.lists(st.integers(0, 30), min_size=1, max_size=3)


@given(LENGTHS, OPTIONS, st.sampled_from(["drop", "alone"]), CUTS)
def test_a_state_goes_on_exactly_after_any_number_of_saves(
    lengths: list[int], options: dict[str, int], overlong: Any, cuts: list[int]
) -> None:
    def restored(state: dict[str, Any] | None) -> tuple[Bucketer[Item], Iterator[list[Item]]]:
        bucketer: Bucketer[Item] = Bucketer(Budget(max_tokens=35), overlong=overlong, **options)
        if state is not None:
            bucketer.load_state_dict(state)
        return bucketer, bucketer.batches_of(items(lengths)[bucketer.oldest :])

    once, whole = restored(None)
    expected, done, state = list(whole), [], None
    for cut in cuts:
        bucketer, batches = restored(state)
        assert state is None or bucketer.state_dict() == state
        done += [batch for _, batch in zip(range(cut), batches, strict=False)]
        state = json.loads(json.dumps(bucketer.state_dict()))
        assert len(json.dumps(state)) < 100 + bucketer.max_wait / 2
    bucketer, batches = restored(state)
    assert done + list(batches) == expected
    assert (bucketer.dropped, bucketer.alone) == (once.dropped, once.alone)


@given(LENGTHS, OPTIONS, OPTIONS, st.integers(0, 60), st.integers(0, 20))
def test_a_state_saved_during_refill_resumes_with_other_options(
    lengths: list[int], options: dict[str, int], others: dict[str, int], cut: int, refilled: int
) -> None:
    first: Bucketer[Item] = Bucketer(Budget(max_tokens=50), **options)
    done = [batch for _, batch in zip(range(cut), first.batches_of(items(lengths)), strict=False)]
    state = first.state_dict()
    second: Bucketer[Item] = Bucketer(Budget(max_tokens=60), **others)
    second.load_state_dict(state)
    for length, sample in items(lengths)[second.oldest : state["arrivals"]][:refilled]:
        second.push(length, sample)
        assert second.arrivals >= state["arrivals"] or not second.is_due
    assert second.state_dict() == state
    second.load_state_dict(second.state_dict())
    rest = list(second.batches_of(items(lengths)[second.oldest :]))
    assert sorted(sample for batch in done + rest for sample in batch) == sorted(sample for _, sample in items(lengths))


def test_a_state_at_a_buffer_of_a_thousand_is_under_a_kilobyte() -> None:
    bucketer: Bucketer[int] = Bucketer(Budget(max_tokens=20_000), buffer_size=1000)
    lengths = [(index * 7919) % 2900 + 100 for index in range(5000)]
    for number, _ in enumerate(bucketer.batches_of((length, index) for index, length in enumerate(lengths))):
        assert number < 20 or len(json.dumps(bucketer.state_dict())) < 1000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 9}, "must be of version 1, got version 9"),
        ({"emitted": "xyz"}, "is not what state_dict gave"),
        ({"emitted": None}, "is not what state_dict gave"),
        ({"oldest": "many"}, "is not what state_dict gave"),
        ({"arrivals": 40}, "must have a bit for each arrival 0 to 40, got 1 bytes"),
        ({"oldest": 9}, "must have a bit for each arrival 9 to 5"),
        ({"oldest": -1}, "must have a bit for each arrival -1 to 5"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any], says: str) -> None:
    bucketer: Bucketer[int] = Bucketer(Budget(batch_size=2), buffer_size=9)
    for index in range(5):
        bucketer.push(3, index)
    with pytest.raises(ValueError, match=says):
        bucketer.load_state_dict(bucketer.state_dict() | change)
    with pytest.raises(ValueError, match="is not what state_dict gave"):
        bucketer.load_state_dict({"version": 1})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"buffer_size": 0}, ValueError, "buffer_size must be at least 1, got 0"),
        ({"buffer_size": True}, TypeError, "buffer_size must be an int"),
        ({"buffer_size": 2.5}, TypeError, "buffer_size must be an int, got 2.5"),
        ({"buffer_size": 1, "max_wait": 0}, ValueError, "max_wait must be at least 1, got 0"),
        ({"buffer_size": 1, "max_wait": -1}, ValueError, "max_wait must be at least 1, got -1"),
        ({"buffer_size": 1, "max_bytes": 0}, ValueError, "max_bytes must be at least 1, got 0"),
        ({"buffer_size": 1, "max_bytes": 1e9}, TypeError, "max_bytes must be an int, got 1000000000.0"),
        ({"buffer_size": 1, "overlong": "cut"}, ValueError, "overlong must be 'error', 'drop' or 'alone', got 'cut'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Bucketer(Budget(max_tokens=1), **options)
