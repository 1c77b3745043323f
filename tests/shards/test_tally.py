"""Counts that processes share: none is lost, none is counted twice, and no name is forgotten in silence."""

import copy
import os
import pickle
import signal
import threading
from collections import Counter
from typing import Any

import pytest
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from samplers.shards import skip_counts as module
from samplers.shards.skip_counts import FURTHER, MAX_PROCESSES, Tally

REASONS = ("length", "damaged")


def count(tally: Any, name: str, times: Any) -> None:
    for number in range(times):
        tally.take(2)
        tally.skip(f"{name}-{number % 3}.tar", REASONS[number % 2])


def count_and_die(tally: Any) -> None:
    count(tally, "killed", 50)
    os.kill(os.getpid(), signal.SIGKILL)


def total(tally: Any) -> Any:
    return sum(each for reasons in tally.by_shard().values() for each in reasons.values())


@given(
    st.lists(st.tuples(st.sampled_from(["a.tar", "ä\udc80.tar", "", "x\ny"]), st.sampled_from(REASONS)), max_size=60)
)
def test_counts_are_those_of_a_counter_and_a_copy_begins_at_zero(events: Any) -> None:
    tally = Tally(REASONS)
    for shard, reason in events:
        tally.take(1)
        tally.skip(shard, reason)
    expected = Counter((shard.replace("\n", " "), reason) for shard, reason in events)
    counts = tally.by_shard()
    assert {(shard, reason): n for shard in counts for reason, n in counts[shard].items()} == expected
    assert tally.totals() == (len(events), len(events))
    for other in (copy.copy(tally), copy.deepcopy(tally), pickle.loads(pickle.dumps(tally))):
        assert other.by_shard() == {}
        assert other.totals() == (0, 0)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_count_at_once_lose_nothing(method: str) -> None:
    # All are no worker of a loader, so they begin at the same row.
    tally, context, seen = Tally(REASONS), mp.get_context(method), 0
    processes = [context.Process(target=count, args=(tally, name, 300)) for name in ("a", "b")]
    for process in processes:
        process.start()
    count(tally, "main", 300)
    while any(process.is_alive() for process in processes):
        now = total(tally)
        assert seen <= now <= 900
        seen = now
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert tally.by_shard() == {
        f"{name}-{number}.tar": {"damaged": 50, "length": 50} for name in ("a", "b", "main") for number in range(3)
    }
    assert tally.totals() == (1800, 900)


def test_a_killed_process_leaves_its_counts_and_its_row_to_the_next() -> None:
    tally, context = Tally(REASONS), mp.get_context("fork")
    for _ in range(MAX_PROCESSES + 5):
        process = context.Process(target=count, args=(tally, "a", 2))
        process.start()
        process.join()
    process = context.Process(target=count_and_die, args=(tally,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert total(tally) == 2 * (MAX_PROCESSES + 5) + 50
    # One after the other they have used one row.
    assert (tally._table[:, 0] != 0).sum() == 1


def test_threads_of_a_process_lose_nothing() -> None:
    tally = Tally(REASONS)
    threads = [threading.Thread(target=count, args=(tally, "a", 2000)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total(tally) == 16_000
    assert tally.totals() == (32_000, 16_000)


@pytest.mark.parametrize(("entries", "name_bytes"), [(7, 1 << 15), (1023, 64)])
def test_shards_that_find_no_room_are_counted_together(
    monkeypatch: pytest.MonkeyPatch, entries: int, name_bytes: int
) -> None:
    monkeypatch.setattr(module, "ENTRIES", entries)
    monkeypatch.setattr(module, "NAME_BYTES", name_bytes)
    tally = Tally(REASONS)
    for _ in range(2):
        for number in range(50):
            tally.skip(f"{number:02}.tar", REASONS[number % 2])
    counts = tally.by_shard()
    assert total(tally) == 100
    assert counts["00.tar"] == {"length": 2}
    assert 2 < len(counts) < 12
    assert sum(counts[FURTHER].values()) == 100 - 2 * (len(counts) - 1)


def test_more_processes_than_rows_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PROCESSES", 1)
    tally, context = Tally(REASONS), mp.get_context("fork")
    tally.skip("a.tar", "length")
    process = context.Process(target=count, args=(tally, "b", 3))
    process.start()
    process.join()
    assert process.exitcode == 0
    tally.skip("a.tar", "length")
    assert total(tally) == 5
