"""Samples of one length trade places among all of their kind, as a random permutation would place them."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexed import Index

from samplers.planning.mixtures.epochs import plan_epoch
from samplers.planning.options import Options
from samplers.planning.tables.equal_lengths import RunFinder
from samplers.planning.tables.window_table import make_window_table
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.writing.writer import ShardWriter

Array = npt.NDArray[Any]
CLASSES = 10
EPOCHS = 40


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=30), min_size=1, max_size=4))
def test_runs_are_those_of_a_walk_over_the_order(regions: list[list[int]]) -> None:
    regions = [sorted(region, reverse=True) for region in regions]
    widths = np.array([width for region in regions for width in region])
    owner = np.repeat(np.arange(len(regions)), list(map(len, regions)))
    finder = RunFinder(lambda indices: widths[indices], np.cumsum([0, *map(len, regions)]))
    indices = np.arange(len(widths))
    alike = [[int(o) == int(p) for p in owner] for o in owner]
    runs = [[q for q in indices if alike[p][q] and widths[p] == widths[q]] for p in indices]
    starts, ends = finder.find_bounds(indices)
    assert starts.tolist() == [run[0] for run in runs]
    assert ends.tolist() == [run[-1] + 1 for run in runs]
    bounds = np.arange(len(widths) + 1)
    expected = [0 < bound < len(widths) and bound - 1 in runs[bound] for bound in bounds]
    assert finder.crosses(bounds).tolist() == expected


def spread_of_classes(batches: list[list[int]], samples: int) -> float:
    """Chi-square per degree of freedom of the classes in batches, of samples that stand class after class."""
    rows = np.array([len(batch) for batch in batches])
    classes = np.concatenate(batches) * CLASSES // samples
    cells = np.repeat(np.arange(len(rows)), rows) * CLASSES + classes
    counts = np.bincount(cells, minlength=len(rows) * CLASSES).reshape(-1, CLASSES)
    expected = rows[:, None] / CLASSES
    return float(((counts - expected) ** 2 / expected).sum() / ((len(rows) - 1) * (CLASSES - 1)))


def token_lengths(samples: int) -> Array:
    """Lengths as short texts have them, many of each."""
    return np.clip(np.random.default_rng(0).lognormal(3.4, 0.5, samples), 4, 128).astype(np.int64)


def equal_lengths(samples: int) -> Array:
    return np.full(samples, 60)


@pytest.mark.parametrize("samples", [2_000, 20_000, 200_000])
@pytest.mark.parametrize("fields", ["one", "two", "an index's"])
@pytest.mark.parametrize("lengths_of", [equal_lengths, token_lengths])
def test_classes_in_corpus_order_mix_as_at_random_in_every_epoch(lengths_of: Any, fields: str, samples: int) -> None:
    one = lengths_of(samples)
    two = np.stack([one, one], 1)
    lengths = {"one": one, "two": two, "an index's": Index(two)}[fields]
    rows = 16 if samples == 2_000 else 32
    options = {"batch_size": rows} if lengths_of is equal_lengths else {"max_tokens": rows * int(one.mean())}
    spreads = [
        spread_of_classes(list(plan_epoch(lengths, epoch=epoch, **options).batches), samples)  # type: ignore[arg-type]
        for epoch in range(EPOCHS)
    ]
    assert min(spreads) >= 0.8
    assert max(spreads) <= 1.25


def test_the_fields_of_an_index_on_disk_mix_as_at_random(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for number in range(2_000):
            tokens = np.zeros(7 + number % 2, np.int32)
            writer.write({"__key__": f"s{number:04}", "tokens": tokens, "labels": tokens})
    index = LengthIndex.open(tmp_path / "shard.ltx")
    assert index.lengths.shape == (2_000, 2)
    for epoch in range(EPOCHS):
        plan = plan_epoch(index, batch_size=16, epoch=epoch)
        assert 0.8 <= spread_of_classes(list(plan.batches), 2_000) <= 1.25


@pytest.mark.parametrize(("samples", "rows", "epochs"), [(240, 8, 100), (2_000, 16, 400)])
@pytest.mark.parametrize("fields", [1, 2])
def test_few_more_pairs_never_meet_than_at_random(samples: int, rows: int, epochs: int, fields: int) -> None:
    lengths = np.full((samples, fields), 60)
    met = np.zeros((samples, samples), np.bool_)
    for epoch in range(epochs):
        for batch in plan_epoch(lengths, batch_size=rows, epoch=epoch).batches:
            met[np.ix_(batch, batch)] = True
    never = 1 - (met.sum() - samples) / (samples * (samples - 1))
    assert never <= 1.2 * (1 - (rows - 1) / (samples - 1)) ** epochs


@pytest.mark.parametrize("options", [{}, {"widths": [64]}, {"count_tokens": "real"}])
def test_many_samples_of_one_length_hardly_meet_again(options: dict[str, Any]) -> None:
    report = plan_epoch(np.full(20_000, 60), max_tokens=6_400, window=5_000, **options).report()
    assert max(report.repeated_pairs, report.repeated_pairs_in_2, report.repeated_pairs_in_5) < 0.01
    assert report.sequences == 20_000


def test_there_is_no_number_of_strata_above_which_mixing_stops() -> None:
    report = plan_epoch(np.full(600_000, 3), batch_size=1_000, window=300_000).report()
    assert max(report.repeated_pairs, report.repeated_pairs_in_2) < 0.003


@given(st.integers(0, 3), st.sampled_from([{}, {"widths": 7}, {"widths": [20, 60]}, {"min_length": 9}]))
def test_a_batch_of_one_field_is_longest_first(epoch: int, options: dict[str, Any]) -> None:
    lengths = np.arange(9_000) * 37 % 61
    for batch in plan_epoch(lengths, max_tokens=300, epoch=epoch, **options).batches:
        assert lengths[batch].tolist() == sorted(lengths[batch].tolist(), reverse=True)


@pytest.mark.parametrize("options", [{"max_tokens": 60}, {"batch_size": 7}, {"max_tokens": 90, "count_tokens": "real"}])
def test_in_a_stream_samples_stay_in_the_window_that_is_read_at_once(options: dict[str, Any]) -> None:
    lengths, starts = np.arange(5_000) * 7 % 4 + 1, np.arange(0, 5_001, 100)
    first = make_window_table(Index(lengths), starts, Options(window=500, **options))
    for epoch in range(4):
        table = first.for_epoch(epoch, 1)
        for number in range(0, len(table), 3):
            samples, _ = table.batch_samples(np.array([number]), key=7)
            window = np.searchsorted(table.window_sizes.cumsum(), number, side="right")
            assert set((samples // 100).tolist()) <= set(table.windows[window])
