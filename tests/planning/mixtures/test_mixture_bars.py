"""The figures that mixtures promise, on corpora of some thousand batches, and what a new mixture reports."""

from typing import Any

import numpy as np
import pytest

from samplers import LengthBucketBatchSampler, Mixture, PackingBatchSampler, plan_epoch

RNG = np.random.default_rng(3)


def speech(samples: int, median: float) -> np.ndarray:
    """Log-normal lengths, as speech has."""
    return np.clip(np.rint(RNG.lognormal(np.log(median), 0.6, samples)), 1, 1000).astype(np.int64)


# Three sources of different lengths: one batch of them differs from another in what it holds of each.
SOURCES = {"long": speech(30_000, 200), "middle": speech(40_000, 100), "short": speech(30_000, 50)}
WEIGHTS = {"long": 5, "middle": 3, "short": 2}


def errors_of(batches: list[list[int]], mixture: Mixture) -> tuple[np.ndarray, np.ndarray, float]:
    """Shares at the end, errors after each batch in tokens `[batches, sources]`, and the largest batch."""
    lengths = np.concatenate([np.asarray(each) for each in mixture.sources.values()])
    samples = np.concatenate(batches)
    owners = np.searchsorted(mixture.starts, samples, side="right") - 1
    numbers = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    taken = np.zeros((len(batches), len(mixture.names)))
    np.add.at(taken, (numbers, owners), lengths[samples])
    taken = taken.cumsum(0)
    wanted = np.array([WEIGHTS[name] for name in mixture.names]) / sum(WEIGHTS.values())
    totals = taken.sum(1, keepdims=True)
    return taken[-1] / totals[-1], taken - totals * wanted, float(np.diff(totals[:, 0], prepend=0).max())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LengthBucketBatchSampler, {"max_tokens": 4096}),
        (LengthBucketBatchSampler, {"batch_size": 20}),
        (LengthBucketBatchSampler, {"max_tokens": 4096, "widths": 32}),
        (PackingBatchSampler, {"capacity": 4096}),
    ],
)
@pytest.mark.parametrize("num_replicas", [1, 4])
def test_shares_are_exact_over_a_thousand_steps(kind: Any, options: dict[str, Any], num_replicas: int) -> None:
    # Red where fixed rows were counted as equal tokens: 0.6 points.
    mixture = Mixture(SOURCES, weights=WEIGHTS, stop=1000)
    sampler = kind(mixture, num_replicas=num_replicas, rank="all", **options)
    sampler.set_epoch(1)
    shares, errors, largest = errors_of(list(sampler), mixture)
    wanted = np.array([0.5, 0.3, 0.2])
    assert len(sampler) == 1000 * num_replicas
    assert np.abs(shares - wanted).max() <= 0.001
    # Within the second epoch, which begins where the first one ended: each end may be off by a batch.
    assert np.abs(errors).max() <= (num_replicas + 1) * largest


def test_padding_stays_within_half_a_point_of_the_corpus_unmixed() -> None:
    mixed = {}
    for within in ("batch", "sample"):
        sampler = LengthBucketBatchSampler(Mixture(SOURCES, weights=WEIGHTS, within=within), max_tokens=4096)
        mixed[within] = sampler.plan(0).report()
    unmixed = plan_epoch(np.concatenate(list(SOURCES.values())), max_tokens=4096).report()
    for report in mixed.values():
        assert report.padding <= unmixed.padding + 0.005
        assert report.max_budget_use <= 1
        assert report.last_dropped == 0


@pytest.mark.parametrize("within", ["batch", "sample"])
def test_the_report_counts_what_was_given(within: Any) -> None:
    mixture = Mixture(SOURCES, weights=WEIGHTS, within=within, passes={"long": 2, "middle": 2, "short": 2})
    sampler = LengthBucketBatchSampler(mixture, max_tokens=4096, num_replicas=2, rank="all")
    batches = [*sampler, *sampler]
    position = sampler.position(301)
    given = batches[: len(sampler) + 2 * 301]
    report = sampler.mixture_report(position)
    samples = np.concatenate(given)
    owners = np.searchsorted(mixture.starts, samples, side="right") - 1
    for number, (source, lengths) in enumerate(zip(report.sources, SOURCES.values(), strict=True)):
        own = samples[owners == number] - mixture.starts[number]
        assert source.name == mixture.names[number]
        assert source.samples == len(own)
        assert source.tokens == source.units == lengths[own].sum()
        assert source.passes == pytest.approx(len(own) / len(lengths))
        assert source.share == pytest.approx(source.wanted_share, abs=0.002)
    assert report.error <= 3 * 4096
    assert "long" in str(report)


def test_a_report_of_packs_begins_with_nothing_and_counts_pieces() -> None:
    # Red: the report failed where an epoch had given no batch.
    lengths = {"long": [30, 70, 55, 12], "short": [5, 9, 7, 8]}
    sampler = PackingBatchSampler(Mixture(lengths, stop="longest"), capacity=40, overlong="split")
    assert [source.tokens for source in sampler.mixture_report().sources] == [0, 0]
    assert {index for batch in sampler for index in batch} >= {0, 3, 4, 5, 6, 7}
    report = sampler.mixture_report()
    assert [source.tokens for source in report.sources] == [167, 29]
    assert [source.passes for source in report.sources] == [1, 1]


def test_a_source_that_joins_and_one_that_leaves() -> None:
    options: dict[str, Any] = {"max_tokens": 4096, "num_replicas": 2, "rank": "all"}
    first = Mixture({name: SOURCES[name] for name in ("long", "short")}, weights={"long": 1, "short": 1})
    then = Mixture({name: SOURCES[name] for name in ("middle", "short")}, weights={"middle": 1, "short": 3})
    sampler = LengthBucketBatchSampler(first, **options)
    before = list(sampler)[: 2 * 100]
    sampler.seek(sampler.position(100), mixture=then)
    after = list(sampler)
    short = [index - first.starts[1] for batch in before for index in batch if index >= first.starts[1]]
    later = [index - then.starts[1] for batch in after for index in batch if index >= then.starts[1]]
    count = len(SOURCES["short"])
    assert len(short) + len(later) > 0
    # One pass over both parts, as far as it goes.
    joined = [*short, *later][:count]
    assert len(set(joined)) == len(joined)
    # The source that left stands where it stood when it comes back.
    back = Mixture(SOURCES, weights=WEIGHTS)
    sampler.seek(sampler.position(10), mixture=back)
    again = [index for batch in list(sampler)[:200] for index in batch if index < len(SOURCES["long"])]
    assert not set(again) & {index for batch in before for index in batch if index < first.starts[1]}
    with pytest.raises(ValueError, match="source 'short' must have the lengths that it had"):
        sampler.seek(sampler.next_position, mixture=Mixture({"short": SOURCES["long"]}))


def test_a_window_of_several_sources_must_end_before_a_change() -> None:
    mixture = Mixture(SOURCES, weights=WEIGHTS, within="sample")
    sampler = LengthBucketBatchSampler(mixture, max_tokens=4096)
    list(sampler)
    with pytest.raises(ValueError, match="change it after"):
        sampler.seek(sampler.position(3), mixture=mixture)
    sampler.seek(sampler.position(0), mixture=Mixture(SOURCES, weights=WEIGHTS))
    assert sampler.epoch == 0
