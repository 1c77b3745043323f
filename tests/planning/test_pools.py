"""Small corpora: every epoch deals its pools again, and has as many batches as any other."""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers.planning.mixtures.epochs import plan_epoch
from samplers.planning.options import Options
from samplers.planning.tables.pool_table import PoolTable, choose_table

Array = npt.NDArray[np.int64]
Batches = list[list[int]]


def corpus(name: str, samples: int) -> Array:
    rng = np.random.default_rng(0)
    drawn = {
        "speech": np.clip(rng.lognormal(np.log(450), 0.6, samples), 50, 3_000),
        "text": np.clip(rng.lognormal(np.log(148), 1, samples), 8, 4_096),
        "uniform": rng.integers(1, 1_001, samples),
    }
    return drawn[name].astype(np.int64)


def cut(lengths: Array, order: Array, options: dict[str, int]) -> Batches:
    """Fill batches in this order, each up to the budget."""
    batches: Batches = [[]]
    for sample in order.tolist():
        grown = [*batches[-1], sample]
        cost = len(grown) * int(lengths[grown].max())
        if batches[-1] and (cost > options.get("max_tokens", cost) or len(grown) > options.get("batch_size", cost)):
            batches.append([])
        batches[-1].append(sample)
    return batches


def sort_in_chunks(lengths: Array, chunks: int, rng: np.random.Generator, options: dict[str, int]) -> Batches:
    """What one writes by hand: shuffle, sort each chunk, fill batches."""
    parts = np.array_split(rng.permutation(len(lengths)), chunks)
    sorted_parts = [part[np.argsort(-lengths[part], kind="stable")] for part in parts]
    return [batch for part in sorted_parts for batch in cut(lengths, part, options)]


def padding(lengths: Array, batches: Batches) -> float:
    return 1 - float(lengths.sum()) / sum(len(batch) * int(lengths[batch].max()) for batch in batches)


def meeting(first: Batches, second: Batches) -> float:
    """The share of the first's pairs that share a batch of the second."""
    later = {sample: number for number, batch in enumerate(second) for sample in batch}
    met = pairs = 0
    for batch in first:
        counts = np.bincount([later[sample] for sample in batch])
        met += int((counts * (counts - 1) // 2).sum())
        pairs += len(batch) * (len(batch) - 1) // 2
    return met / pairs


@pytest.mark.parametrize("name", ["speech", "text", "uniform"])
@pytest.mark.parametrize(("samples", "rows"), [(60, 8), (240, 60), (240, 16), (700, 32), (2_000, 32), (6_000, 32)])
@pytest.mark.parametrize("kind", ["max_tokens", "batch_size"])
def test_default_pads_hardly_more_than_chunks_that_mix_as_much(name: str, samples: int, rows: int, kind: str) -> None:
    lengths = corpus(name, samples)
    hold_to_chunks(lengths, {kind: rows if kind == "batch_size" else int(rows * lengths.mean())})


@pytest.mark.parametrize("name", ["speech", "text", "uniform"])
@pytest.mark.parametrize(("samples", "rows"), [(12, 6), (20, 8), (20, 14), (48, 16), (60, 20), (100, 40), (100, 70)])
def test_the_same_holds_for_three_to_seven_batches(name: str, samples: int, rows: int) -> None:
    """With two to three budgets of tokens buckets padded up to nine points more."""
    lengths = corpus(name, samples)
    hold_to_chunks(lengths, {"max_tokens": max(int(rows * lengths.mean()), int(lengths.max()))})


@pytest.mark.parametrize(("lengths", "batches"), [([900, 300], 1), ([60] * 8, 1), ([60] * 24, 3)])
def test_what_fits_in_few_full_batches_gets_no_more(lengths: list[int], batches: int) -> None:
    budget = max(lengths) * min(8, len(lengths))
    assert [len(plan_epoch(lengths, max_tokens=budget, epoch=epoch).batches) for epoch in range(3)] == [batches] * 3


def hold_to_chunks(lengths: Array, options: dict[str, int]) -> None:
    """Compare the default with sorted chunks at an equal share of pairs that meet again."""
    samples = len(lengths)
    epochs = 120 if samples < 1_000 else 12
    plans = [list(plan_epoch(lengths, epoch=epoch, **options).batches) for epoch in range(epochs + 5)]  # type: ignore[arg-type]
    ours = np.mean([padding(lengths, batches) for batches in plans])
    shares = [np.mean([meeting(plans[e], plans[e + lag]) for e in range(epochs)]) for lag in (1, 2, 5)]
    curve = []
    for chunks in (1, 2, 3, 4):
        rng = np.random.default_rng(1)
        drawn = [sort_in_chunks(lengths, chunks, rng, options) for _ in range(epochs)]
        met = np.mean([meeting(*pair) for pair in pairwise(drawn)])
        curve.append((met, np.mean([padding(lengths, batches) for batches in drawn])))
    curve.sort()
    by_hand = np.interp(np.mean(shares), *map(list, zip(*curve, strict=True)))
    assert ours <= by_hand + 0.005
    assert max(shares) <= 1.25 * min(shares)


SMALL = st.lists(st.integers(0, 40), min_size=1, max_size=120)
OPTIONS = st.fixed_dictionaries(
    {"overlong": st.just("alone")},
    optional={
        "max_tokens": st.integers(20, 300),
        "batch_size": st.integers(1, 20),
        "widths": st.sampled_from([4, (10, 40)]),
        "window": st.integers(2, 80),
        "drop_last": st.booleans(),
    },
).filter(lambda options: "max_tokens" in options or "batch_size" in options)


@given(SMALL, OPTIONS, st.integers(0, 2**64 - 1))
def test_every_epoch_has_as_many_batches_within_the_closed_list(
    lengths: list[int], options: dict[str, Any], seed: int
) -> None:
    try:
        table = choose_table(lengths, Options(seed=seed, **options))
    except ValueError as error:
        assert "no batch is left" in str(error)  # noqa: PT017
        return
    shapes = table.shapes
    for epoch in range(6):
        present = table.for_epoch(epoch, 1)
        samples, rows = present.batch_samples(np.arange(len(table)), key=epoch)
        assert len(rows) == len(table) == len(present)
        assert (rows > 0).all()
        assert present.batch_rows(np.arange(len(table))).tolist() == rows.tolist()
        assert len(set(samples.tolist())) == len(samples) == len(lengths) - table.last_dropped
        sizes = present.measure_batches(samples, rows)
        for row, width in zip(rows.tolist(), sizes.widths[:, 0].tolist(), strict=True):
            assert any(row <= most and width <= widest for most, (widest,) in shapes)


def test_a_draw_does_not_depend_on_what_was_drawn_before() -> None:
    lengths, options = corpus("speech", 700), Options(max_tokens=20_000)
    first, second = choose_table(lengths, options), choose_table(lengths, options)
    assert isinstance(first, PoolTable)
    for epoch in (5, 0, 5, 3, 2, 1):
        first.for_epoch(epoch, 1)
    numbers = np.arange(len(first))
    assert (
        first.for_epoch(1, 1).batch_samples(numbers, 0)[0].tolist()
        == second.for_epoch(1, 1).batch_samples(numbers, 9)[0].tolist()
    )


def test_the_number_of_batches_does_not_depend_on_the_seed() -> None:
    lengths = corpus("text", 700)
    assert len({len(choose_table(lengths, Options(max_tokens=5_000, seed=seed))) for seed in range(30)}) == 1
