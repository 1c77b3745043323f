"""A stream starts soon: its first batch, also of a resumed epoch, waits for no plan that it does not need."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samplers import ShardStream, ShardWriter
from samplers.planning.schedule import Schedule
from samplers.planning.tables import window_table

SAMPLES = 330


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, max_samples=40) as writer:
        for index in range(SAMPLES):
            lengths = rng.integers(1, 40, 2)
            writer.write({"__key__": f"{index:03}", "x": np.zeros(lengths[0], np.int32), "y": np.zeros(lengths[1])})
    return folder


def stream(corpus: Path, **options: Any) -> Any:
    return ShardStream(corpus, **({"collate_fn": list, "batch_size": 8, "window": 80, "fields": ["x"]} | options))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The windows that are planned from now on: their samples, and where their buckets begin."""
    calls: list[Any] = []
    cut = window_table.cut_buckets

    def note(members: Any, options: Any, windows: int, **others: Any) -> Any:
        calls.append((members.order.tobytes(), others["shift"]))
        return cut(members, options, windows, **others)

    monkeypatch.setattr(window_table, "cut_buckets", note)
    return calls


OPTIONS: list[dict[str, Any]] = [
    {},
    {"drop_last": True},
    {"window": 1},
    {"window": 10_000},
    {"interleave": 2},
    {"batch_size": 4, "num_replicas": 2, "rank": 1},
]


# Was red: the constructor planned each window four to six times, and resumed streams did too.
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("epoch", [0, 7])
def test_until_its_first_batch_a_stream_plans_the_windows_of_one_epoch(
    corpus: Path, planned: list[Any], options: dict[str, Any], epoch: int
) -> None:
    data = stream(corpus, **options)
    most = len(data.data.index.shards) if options.get("window") == 1 else 5
    usual = len(planned)
    data.set_epoch(epoch)
    next(iter(data))
    # Those that decide the number of batches and the digest, and those of the epoch, where replicas share no last step.
    trials = 1 if len(data._table) % data.num_replicas == 0 or data.options.drop_last else 3
    assert usual <= most * trials
    assert len(planned) <= most * (trials + 1)
    if trials == 1:
        assert max(Counter(planned).values()) == 1


@pytest.mark.parametrize("options", OPTIONS)
def test_a_resume_plans_no_window_of_a_whole_epoch_twice(
    corpus: Path, planned: list[Any], options: dict[str, Any]
) -> None:
    data = stream(corpus, **options)
    data.set_epoch(3)
    position = data.position(len(data) // 2)
    rest = list(data)[len(data) // 2 :]
    planned.clear()
    resumed = stream(corpus, **options)
    resumed.seek(position)
    iterator = iter(resumed)
    batches = [next(iterator)]
    before = len(planned)
    iterator.state_dict()
    resumed.position(1)
    batches += list(iterator)
    assert len(planned) == before
    keys = [[sample["__key__"] for sample in batch] for batch in batches]
    assert keys == [[sample["__key__"] for sample in batch] for batch in rest]
    if len(data._table) % data.num_replicas == 0 or data.options.drop_last:
        assert max(Counter(planned).values()) == 1


# Was red: all batches of the window were found first.
@pytest.mark.parametrize("start", [0, 17])
def test_the_first_batch_is_found_without_the_others_of_its_window(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    data = stream(corpus, window=1_000)
    data.seek(data.position(start))
    asked: list[int] = []
    find = Schedule.batch_samples

    def note(schedule: Any, slots: Any) -> Any:
        asked.append(len(slots))
        return find(schedule, slots)

    monkeypatch.setattr(Schedule, "batch_samples", note)
    iterator = iter(data)
    next(iterator)
    assert asked == [1]
    assert 1 + len(list(iterator)) == sum(asked) == len(data) - start
    assert len(asked) == 3
