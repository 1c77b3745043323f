"""ShardStream: a sharded corpus streams as it is planned, on any number of replicas and workers, from any position."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import LengthError, PadCollator
from samplers import ShardStream, ShardWriter

COUNT = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, max_samples=40, block_size=16) as writer:
        for index in range(COUNT):
            writer.write({"__key__": f"{index:03}", "x": np.full(rng.integers(1, 40), index, np.int32)})
    return folder


def collate(samples: Any) -> Any:
    """The ids of a batch, which is all that most tests look at."""
    return [sample["__key__"] for sample in samples]


def stream(corpus: Path, **options: Any) -> Any:
    return ShardStream(corpus, **({"collate_fn": collate, "max_tokens": 200, "window": 80} | options))


def loader(data: Any, workers: int = 0, kind: Any = DataLoader, **options: Any) -> Any:
    return kind(data, batch_size=None, num_workers=workers, **options)


def ids(batches: Any) -> Any:
    return sorted(key for batch in batches for key in batch)


ALL = [f"{index:03}" for index in range(COUNT)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_sample_comes_once_in_every_epoch_whatever_the_workers(corpus: Path, workers: int) -> None:
    data = stream(corpus)
    expected = [list(stream(corpus))] + [list(_at(corpus, epoch)) for epoch in (1, 2)]
    for epoch in range(3):
        batches = list(loader(data, workers))
        assert batches == expected[epoch]
        assert ids(batches) == ALL
        assert len(batches) == len(data)
    assert expected[0] != expected[1] != expected[2]


def _at(corpus: Path, epoch: int) -> Any:
    data = stream(corpus)
    data.set_epoch(epoch)
    return data


@pytest.mark.parametrize("persistent", [False, True])
def test_set_epoch_reaches_workers_that_live_on(corpus: Path, persistent: bool) -> None:
    data = stream(corpus)
    running = loader(data, 2, persistent_workers=persistent)
    for epoch in (0, 5, 6, 5):
        data.set_epoch(epoch)
        assert list(running) == list(_at(corpus, epoch))


SHARING = st.fixed_dictionaries(
    {
        "num_replicas": st.integers(1, 7),
        "max_tokens": st.integers(150, 400),
        "window": st.integers(1, 400),
        "seed": st.integers(0, 9),
    }
)


@given(SHARING, st.integers(0, 3))
def test_replicas_share_an_epoch_evenly_within_the_budget(corpus: Path, options: Any, epoch: int) -> None:
    try:
        streams = [stream(corpus, rank=rank, **options) for rank in range(options["num_replicas"])]
    except ValueError as error:
        assume("the last step must have a row for each" not in str(error))
        raise
    for data in streams:
        data.set_epoch(epoch)
    batches = [list(data) for data in streams]
    assert {len(each) for each in batches} == {len(streams[0])}
    assert ids(batch for each in batches for batch in each) == ALL
    lengths = streams[0].data.index.lengths.reshape(-1)
    for batch in (batch for each in batches for batch in each):
        assert len(batch) * max(lengths[int(key)] for key in batch) <= options["max_tokens"]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 12)), min_size=1, max_size=4), st.integers(0, 3))
def test_a_position_goes_on_with_other_replicas_any_number_of_times(corpus: Path, chain: Any, seed: int) -> None:
    position, seen = None, []
    for replicas, steps in chain:
        streams = [stream(corpus, num_replicas=replicas, rank=rank, seed=seed) for rank in range(replicas)]
        for data in streams:
            if position is not None:
                data.seek(position)
        steps = min(steps, streams[0].remaining)
        seen += [batch for data in streams for _, batch in zip(range(steps), data, strict=False)]
        position = json.loads(json.dumps(streams[0].position(steps)))
        assert position == streams[-1].position(steps)
    last = stream(corpus, seed=seed)
    last.seek(position)
    assert ids([*seen, *last]) == ALL


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_at_every_batch_and_into_the_next_epoch(corpus: Path, workers: int) -> None:
    whole = list(stream(corpus))
    following = list(_at(corpus, 1))
    for cut in (0, 1, 2, len(whole) // 2, len(whole) - 1, len(whole)):
        first = loader(stream(corpus), workers, StatefulDataLoader)
        running = iter(first)
        taken = [next(running) for _ in range(cut)]
        state = first.state_dict()
        second = loader(stream(corpus), workers, StatefulDataLoader)
        second.load_state_dict(state)
        assert taken + list(second) == whole
        assert list(second) == following


@pytest.mark.parametrize("workers", [0, 2])
def test_after_an_early_break_the_next_epoch_is_whole(corpus: Path, workers: int) -> None:
    data = stream(corpus)
    for _ in loader(data, workers):
        break
    assert ids(loader(data, workers)) == ALL


def test_batches_are_collated_where_they_are_read(corpus: Path) -> None:
    data = stream(corpus, collate_fn=PadCollator(-1))
    for batch in loader(data, 2):
        batch["x"].verify()
        assert batch["x"].padded.shape[0] * batch["x"].padded.shape[1] <= 200
        assert all((row == int(key)).all() for row, key in zip(batch["x"].sequences(), batch["__key__"], strict=True))


def test_the_shapes_are_known_before_the_first_batch(corpus: Path) -> None:
    data = stream(corpus, collate_fn=PadCollator(widths=8), widths=8)
    shapes = data.shapes
    for batch in data:
        rows, width = batch["x"].padded.shape
        assert any(rows <= most and width <= limit for most, (limit,) in shapes)


def test_left_out_samples_are_those_that_an_option_names(corpus: Path) -> None:
    chosen = np.arange(0, COUNT, 3)
    assert ids(stream(corpus, indices=chosen)) == [ALL[index] for index in chosen]
    with pytest.raises(LengthError, match="max_tokens|budget"):
        stream(corpus, max_tokens=20)
    lengths = stream(corpus).data.index.lengths.reshape(-1)
    kept = ids(stream(corpus, max_tokens=20, overlong="drop"))
    assert kept == [key for key, length in zip(ALL, lengths, strict=True) if length <= 20]


def test_a_position_of_other_windows_is_refused(tmp_path: Path) -> None:
    """Red before: it was taken where one grouping had the same windows, though those of other epochs may differ."""
    with ShardWriter(tmp_path, max_samples=7) as writer:
        for number in range(60):
            writer.write({"__key__": f"s{number}", "tokens": np.arange(1 + number % 9)})

    def windows(window: int, **options: Any) -> Any:
        return stream(tmp_path, window=window, max_tokens=40, **options)

    saved = windows(14).position(2)
    # Shards of 7 samples: the windows are the same here, and need not be with shards of other sizes.
    with pytest.raises(ValueError, match="windows differ"):
        windows(12).seek(saved)
    # A development version of 0.2.0 saved no more than this.
    windows(12).seek(saved | {"fingerprint": saved["fingerprint"].rpartition("-")[0]})
    # A window of all samples is one window, however large.
    windows(60).seek(windows(10**6).position(2))
    # Without a shuffle there is one grouping, and its windows tell.
    windows(12, shuffle=False).seek(windows(14, shuffle=False).position(2))


def test_a_position_of_another_corpus_or_plan_is_refused(corpus: Path) -> None:
    position = stream(corpus).position(3)
    for options in ({"seed": 1}, {"max_tokens": 190}, {"indices": np.arange(9)}):
        with pytest.raises(ValueError, match="position"):
            stream(corpus, **options).seek(position)
    with pytest.raises(TypeError, match="a position must be a dict"):
        stream(corpus).seek(3)
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        stream(corpus).set_epoch(-1)


@pytest.mark.parametrize("other", [{"worker": 1}, {"workers": 2}, {"num_replicas": 3}, {"num_replicas": None}])
def test_a_state_of_other_workers_or_replicas_is_refused(corpus: Path, other: dict[str, Any]) -> None:
    running = iter(stream(corpus, num_replicas=2, rank=0))
    with pytest.raises(
        ValueError, match="of as many workers and replicas, got .*: keep these numbers, or use position"
    ):
        running.load_state_dict(running.state_dict() | other)


def test_more_replicas_than_rows_in_the_last_step_are_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match="set drop_last=True, use fewer"):
        stream(corpus, max_tokens=None, batch_size=2, num_replicas=64, rank=0)
