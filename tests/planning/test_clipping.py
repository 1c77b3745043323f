"""Samples that are planned as cut are cut, or it is said: the sampler's `max_length` and the collator's, and `widths`.

The tests of warnings and refusals were red before: nothing was said.
"""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collate import PadCollator
from samplers import LengthBucketBatchSampler, LengthIndex, ShardStream, ShardWriter

LENGTHS = [10, 500, 20, 101, 100]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def make(lengths: list[int] | npt.NDArray[Any] = LENGTHS, **options: Any) -> LengthBucketBatchSampler:
    return LengthBucketBatchSampler(lengths, **({"max_tokens": 200, "max_length": 100} | options))


def test_the_first_iteration_warns_once_of_samples_planned_as_cut(caplog: pytest.LogCaptureFixture) -> None:
    sampler = make()
    iterator = iter(sampler)
    assert warnings_of(caplog) == []
    next(iterator)
    [message] = warnings_of(caplog)
    assert "2 of 5 samples are longer than the sampler's max_length=100" in message
    assert "PadCollator.for_sampler(sampler)" in message
    assert "np.minimum(lengths, 100)" in message
    list(sampler)
    list(sampler)
    assert len(warnings_of(caplog)) == 1


def test_a_state_that_is_loaded_begins_an_iteration_and_warns_too(caplog: pytest.LogCaptureFixture) -> None:
    state = iter(make()).state_dict()
    iter(make()).load_state_dict(state)
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(lambda: make(np.minimum(LENGTHS, 100)), id="cut-lengths"),
        pytest.param(lambda: make(max_length=None, max_tokens=500), id="no-max-length"),
        pytest.param(lambda: make(indices=[0, 2, 4]), id="long-ones-not-planned"),
    ],
)
def test_nothing_is_logged_where_no_planned_sample_is_longer(
    sampler: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    list(sampler())
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("way", [lambda s: s, copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_collator_made_for_the_sampler_keeps_it_quiet_and_in_budget(
    way: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    sampler = make(widths=8, max_tokens=208)
    collate = PadCollator.for_sampler(sampler)
    assert (sampler.max_length, sampler.widths) == (collate.max_length, collate.widths) == (100, 8)
    for batch in way(sampler):
        padded = collate([[1] * LENGTHS[index] for index in batch]).padded
        assert padded.numel() <= 208
    assert warnings_of(caplog) == []


def test_who_cuts_samples_in_another_way_can_say_so(caplog: pytest.LogCaptureFixture) -> None:
    sampler = make()
    sampler.acknowledge_max_length()
    list(sampler)
    assert warnings_of(caplog) == []


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=2), min_size=1, max_size=40),
    st.integers(1, 2),
    st.integers(1, 30),
    st.booleans(),
)
def test_the_warning_counts_every_planned_sample_that_is_longer(
    rows: list[list[int]], fields: int, most: int, alone: bool
) -> None:
    class Counted(logging.Handler):
        def emit(self, record: Any) -> None:
            counted.append(record.args[:2])

    counted, rows = [], np.array(rows)[:, :fields]
    logger, handler = logging.getLogger("samplers.planning.tables.clipping"), Counted()
    options = {"max_tokens": 20, "overlong": "alone"} if alone else {"max_tokens": 60}
    logger.addHandler(handler)
    try:
        list(LengthBucketBatchSampler(rows, max_length=most, **options))
    finally:
        logger.removeHandler(handler)
    longer = sum(any(length > most for length in row) for row in rows.tolist())
    assert counted == ([(longer, len(rows))] if longer else [])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of two fields; the longest have 39 steps and 20."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, max_samples=40) as writer:
        for index in range(120):
            fields = {"x": np.zeros(1 + index % 39, np.int32), "y": np.zeros(1 + index % 20, np.int32)}
            writer.write({"__key__": f"{index:03}", **fields})
    assert LengthIndex.open(folder / "shard.ltx").lengths.max(0).tolist() == [39, 20]
    return folder


def stream(corpus: Path, collate: Callable[..., Any] | PadCollator, **options: Any) -> ShardStream | None:
    return ShardStream(corpus, collate_fn=collate, max_tokens=400, **options)


@pytest.mark.parametrize(
    ("planned", "collated"),
    [
        (None, None),
        (30, 30),
        (30, {"x": 30, "y": 20}),
        # No sample is longer, whatever the numbers say.
        (39, None),
        (None, 50),
        (30, {"x": 30, "y": 25}),
        # The collator refuses such a mapping itself, with the names of all fields.
        (30, {"x": 30}),
    ],
)
def test_a_stream_takes_a_collator_that_cuts_as_it_plans(
    corpus: Path, planned: int | None, collated: dict[str, int] | int | None, caplog: pytest.LogCaptureFixture
) -> None:
    made = stream(corpus, PadCollator(max_length=collated), max_length=planned)
    assert (made.max_length, made.widths) == (planned, None)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("planned", "collated", "message"),
    [
        (30, None, "got None and 30: .* field 'x' has 39 steps, is planned with 30 and would be collated with 39"),
        (30, 38, "got 38 and 30: .* planned with 30 and would be collated with 38"),
        (30, 20, "got 20 and 30: .* planned with 30 and would be collated with 20"),
        (None, 20, "got 20 and None: .* planned with 39 and would be collated with 20"),
        (30, {"x": 30, "y": 10}, "got 10 and 30: .* field 'y' has 20 steps, is planned with 20 .* with 10"),
    ],
)
def test_a_stream_refuses_a_collator_that_cuts_otherwise(
    corpus: Path, planned: int | None, collated: dict[str, int] | int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stream(corpus, PadCollator(max_length=collated), max_length=planned)


def test_a_stream_warns_of_a_function_that_does_not_say_how_it_cuts(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def collate(samples: Any) -> Any:
        return samples

    stream(corpus, collate)
    stream(corpus, collate, max_length=39)
    assert warnings_of(caplog) == []
    stream(corpus, collate, max_length=30)
    [message] = warnings_of(caplog)
    # Lengths 31 to 39 come three times each.
    assert "27 of 120 samples are longer than the stream's max_length=30" in message
    collate.max_length = 30
    stream(corpus, collate, max_length=30)
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("collated", [8, (20, 40), {"x": (40,), "y": (20, 40)}])
def test_a_stream_refuses_a_collator_of_other_widths(
    corpus: Path, collated: dict[str, tuple[int, ...]] | int | tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"collate_fn's widths must be the stream's, got .* and \(40,\) for field"):
        stream(corpus, PadCollator(widths=collated), widths=[40])
    with pytest.raises(ValueError, match=r"got None and 16 for field 'x'"):
        stream(corpus, PadCollator(), widths=16)


@pytest.mark.parametrize("collated", [8, (20, 40), {"x": None, "y": 8}])
def test_a_stream_without_widths_refuses_a_collator_that_has_some(
    corpus: Path, collated: dict[str, int | None] | int | tuple[int, ...]
) -> None:
    # Red: it was taken, and 3 rows of 39 steps under max_tokens=120 were padded to 3 x 40 and more.
    with pytest.raises(ValueError, match=r"collate_fn's widths must be the stream's, got .* and None for field '[xy]'"):
        stream(corpus, PadCollator(widths=collated))
    stream(corpus, PadCollator(widths={"x": None, "y": None}))
    # A multiple of one rounds nothing up.
    stream(corpus, PadCollator(widths=1))
    stream(corpus, PadCollator(), widths=1)


def test_a_stream_takes_a_collator_of_its_widths_or_of_shapes(corpus: Path) -> None:
    made = stream(corpus, PadCollator(widths=(40, 20)), widths=[20, 40])
    assert made.widths == [20, 40]
    stream(corpus, PadCollator(shapes=made.shapes), widths=[20, 40])
    stream(corpus, PadCollator.for_sampler(made), widths=[40, 20])
