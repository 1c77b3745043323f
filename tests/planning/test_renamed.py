"""Former names work for one release with a warning, and public corners are alike in samplers and streams."""

import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import collate
import samplers
from collate import PadCollator
from samplers import LengthBucketBatchSampler, ShardStream, ShardWriter, plan_epoch
from samplers.planning.options import Options
from samplers.planning.plan import random_padding
from samplers.planning.report import FORMER_NAMES, PlanReport
from samplers.planning.tables.pool_table import choose_table

LENGTHS = (np.arange(600) * 37 % 61 + 1).tolist()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, max_samples=100) as writer:
        for number, length in enumerate(LENGTHS):
            writer.write({"__key__": f"{number}", "x": np.zeros(length, np.uint8)})
    return folder


def loaders(shards: Path, **options: Any) -> list[LengthBucketBatchSampler | ShardStream]:
    options = {"max_tokens": 400, "num_replicas": 1, "rank": 0} | options
    return [LengthBucketBatchSampler(LENGTHS, **options), ShardStream(shards, collate_fn=len, **options)]


def test_a_report_of_release_0_1_is_printed_without_later_figures() -> None:
    # It loaded, and to print or read it was an AttributeError.
    state = vars(plan_epoch(LENGTHS, max_tokens=400, num_replicas=1).report())
    later = {
        "repeated_pairs_in_2",
        "repeated_pairs_in_5",
        "shapes",
        "shapes_in_4_epochs",
        "step_milliseconds",
        "waiting",
    }
    names = {present: former for former, present in FORMER_NAMES.items()}
    report = PlanReport.__new__(PlanReport)
    report.__setstate__({names.get(name, name): value for name, value in state.items() if name not in later})
    assert {name for name, value in vars(report).items() if value is None} == later
    assert "repeated pairs  " in str(report)
    assert "in 2" not in str(report)
    assert "PlanReport" in repr(report)


@pytest.mark.parametrize(("former", "present"), FORMER_NAMES.items())
def test_a_figure_of_a_report_has_its_former_name_too(former: str, present: str) -> None:
    report = plan_epoch(LENGTHS, max_tokens=400).report()
    with pytest.warns(DeprecationWarning, match=f"PlanReport.{former} is now called {present}") as caught:
        assert getattr(report, former) == getattr(report, present)
    assert caught[0].filename == __file__


def test_position_takes_steps_as_batches(shards: Path) -> None:
    for loader in loaders(shards):
        next(iter(loader))
        with pytest.warns(DeprecationWarning, match="steps= of position is now called batches=") as caught:
            old = loader.position(steps=1)  # type: ignore[call-arg]
        assert caught[0].filename == __file__
        assert old == loader.position(1) == loader.position(batches=1)
        with pytest.raises(TypeError, match="leave steps= out"):
            loader.position(1, steps=1, batches=1)  # type: ignore[call-arg]


def test_count_is_taken_as_count_tokens(shards: Path) -> None:
    made: list[Any] = [
        lambda **options: list(plan_epoch(LENGTHS, max_tokens=400, **options).batches),
        lambda **options: list(LengthBucketBatchSampler(LENGTHS, max_tokens=400, **options)),
        lambda **options: list(ShardStream(shards, collate_fn=len, max_tokens=400, **options)),
    ]
    for make in made:
        with pytest.warns(DeprecationWarning, match="count= of a plan is now called count_tokens=") as caught:
            old = make(count="real")
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert old == make(count_tokens="real") != make()
        with pytest.raises(TypeError, match="leave count= out"):
            make(count="real", count_tokens="real")
        with pytest.raises(TypeError, match="options must be among max_tokens, .*, got max_token"):
            make(max_token=3)


def test_both_packages_have_the_one_length_error() -> None:
    assert samplers.LengthError is collate.LengthError


def test_random_padding_is_a_property_of_the_plan() -> None:
    plan = plan_epoch(LENGTHS, max_tokens=400)
    assert plan.report().padding < plan.random_padding == random_padding(plan) < 1


def test_an_epoch_advances_alike_in_samplers_and_streams(shards: Path) -> None:
    both = loaders(shards)
    for epoch in (1, 2):
        for loader in both:
            # Left after its first batch: the next loop is the next epoch.
            next(iter(loader))
            assert loader.epoch == epoch
    for loader in both:
        position = loader.position(1)
        assert (position["epoch"], loader.next_position["epoch"]) == (1, 2)
        loader.seek(position)
        assert (loader.epoch, loader.remaining) == (1, len(loader) - 1)
        list(loader)
        assert loader.epoch == 2
        loader.set_epoch(7)
        assert loader.epoch == 7


@pytest.mark.parametrize("fields", [1, 2])
def test_a_shape_has_a_width_for_each_field_also_of_one(fields: int) -> None:
    lengths = np.tile(np.array(LENGTHS)[:, None], fields)
    sampler = LengthBucketBatchSampler(lengths, max_tokens=600, widths=16)
    for shapes in (sampler.shapes, sampler.plan(0).shapes, sampler.plan(0).batch_shapes):
        assert {(type(rows), type(width), len(width)) for rows, width in shapes} == {(int, tuple, fields)}


def test_a_collator_takes_the_shapes_of_one_field_for_all() -> None:
    sampler = LengthBucketBatchSampler(LENGTHS, max_tokens=600, widths=16)
    collator = PadCollator(shapes=sampler.shapes)
    for indices in sampler:
        batch = collator([{"x": [1] * LENGTHS[index], "y": [2] * LENGTHS[index]} for index in indices])
        assert (len(batch["x"].padded), (batch["x"].padded.shape[1],)) in sampler.shapes
        assert batch["x"].padded.shape == batch["y"].padded.shape


Edge = namedtuple("Edge", "first batches rows full rest skipped width")


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=80),
    st.sampled_from([{"shuffle": False}, {"count_tokens": "real"}, {"count_tokens": "real", "window": 9}]),
    st.booleans(),
)
def test_what_a_plan_digests_is_the_text_of_its_first_release(
    lengths: list[int], options: dict[str, Any], drop_last: bool
) -> None:
    """Positions of running jobs carry its digest: the text was the repr of a tuple of this class."""
    table = choose_table(lengths, Options(max_tokens=120, drop_last=drop_last, **options))
    buckets, *others = [tuple(Edge(*bucket) for bucket in each.buckets) for each in (table, *table.variants)]
    expected = repr((buckets, tuple(others), table.options.shuffle, drop_last))
    assert table._digested_text() == expected
