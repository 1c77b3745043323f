"""Mixtures at their edges: copies in late epochs, sources without tokens, weights at the ends of floats."""

import pickle
from typing import Any

import numpy as np
import pytest

from samplers import LengthBucketBatchSampler, Mixture, plan_epoch


def test_a_late_epoch_is_the_same_in_every_process() -> None:
    """It was red: a window of samples was rounded by counts that depended on the epochs that were asked for before."""
    rng = np.random.default_rng(1)
    sources = {"a": rng.integers(1, 40, 600), "b": rng.integers(5, 60, 700), "c": rng.integers(1, 30, 90)}
    mixture = Mixture(sources, weights={"a": 3, "b": 5, "c": 1}, within="sample", passes={"c": 3})
    first = LengthBucketBatchSampler(mixture, max_tokens=120, window=62)
    others = [pickle.loads(pickle.dumps(first)), LengthBucketBatchSampler(mixture, max_tokens=120, window=62)]
    for _ in range(7):
        list(first)
    for other in others:
        other.seek(first.next_position)
    expected = list(first)
    assert [list(other) for other in others] == [expected, expected]


def test_within_may_not_change_the_batches_of_a_begun_source() -> None:
    """It was red: small sources have other batches within samples, and lost and repeated samples after the change."""
    sources = {"a": list(range(1, 31)), "b": list(range(1, 21))}
    sampler = LengthBucketBatchSampler(Mixture(sources, within="sample"), max_tokens=40)
    list(sampler)
    position = sampler.next_position
    with pytest.raises(ValueError, match="within must stay 'sample' when a mixture changes, got 'batch': source 'a'"):
        sampler.seek(position, mixture=Mixture(sources))
    # A source that left may come back later, with the batches in which it was begun.
    sampler.seek(position, mixture=Mixture({"b": sources["b"]}, within="sample"))
    with pytest.raises(ValueError, match="within must stay 'sample'"):
        sampler.seek(sampler.next_position, mixture=Mixture({"c": [3] * 20}))


@pytest.mark.parametrize(
    ("mixture", "options", "says"),
    [
        (
            {"sources": {"a": [0] * 10, "b": [5] * 99}, "weights": {"a": 1, "b": 1}},
            {"drop_last": True},
            "source 'a' must",
        ),
        ({"sources": {"a": [0] * 10, "b": [5] * 99}, "stop": "longest"}, {}, "source 'a' must have tokens"),
        (
            {"sources": {"a": [3] * 10, "b": [5] * 99}, "weights": {"a": 1e-12, "b": 1}, "stop": "longest"},
            {},
            "an epoch must have at most 2147483647 batches",
        ),
        (
            {"sources": {"a": [3] * 10}, "passes": {"a": 1e12}, "unit": "padded"},
            {},
            "an epoch must have at most 2147483647 batches",
        ),
        ({"sources": {"a": [3] * 10}, "stop": 10**12}, {}, "an epoch must have at most 2147483647 batches"),
    ],
)
def test_an_epoch_that_would_not_end_is_refused(mixture: Any, options: Any, says: str) -> None:
    """All were red: they counted passes without end, or made an epoch as large as memory."""
    with pytest.raises(ValueError, match=says):
        LengthBucketBatchSampler(Mixture(**mixture), batch_size=3, **options)


@pytest.mark.parametrize(
    ("weights", "temperature", "expected"),
    [
        ({"a": 1e308, "b": 1e308}, None, [0.5, 0.5]),
        ({"a": 1, "b": 2}, 1e-5, [0.0, 1.0]),
        ({"a": 1, "b": 2}, 10**400, [0.5, 0.5]),
    ],
)
def test_weights_at_the_ends_of_floats_have_a_share(weights: Any, temperature: Any, expected: list[float]) -> None:
    """All were red: the sum or the number overflowed, or the power was rounded to a share of none."""
    mixture = Mixture({"a": [3] * 50, "b": [5] * 100}, weights=weights, temperature=temperature)
    shares = mixture.shares_of([1, 1])
    assert shares.tolist() == pytest.approx(expected)
    assert (shares > 0).all()
    sampler = LengthBucketBatchSampler(mixture, max_tokens=50)
    assert len(list(sampler)) == len(sampler)


def test_numbers_that_are_no_indices_or_floats_are_named() -> None:
    """It was red: a fraction was cut to an index, and a large int was an error of Python's."""
    with pytest.raises(TypeError, match=r"sample indices must be a list of ints, got \[1.7\]"):
        Mixture({"a": [1, 2]}).locate([1.7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"weights\['a'\] must be a finite number"):
        Mixture({"a": [1, 2]}, weights={"a": 10**400})
    sampler = LengthBucketBatchSampler(Mixture({"a": [1, 2]}), max_tokens=9)
    with pytest.raises(ValueError, match="a position's mixture must be the text that position"):
        sampler.seek(sampler.next_position | {"mixture": "[0,Infinity,{}]"})


def test_a_source_that_drop_last_empties_is_named_within_samples() -> None:
    """It was red: an error of NumPy's, without the name."""
    mixture = Mixture({"a": [5] * 20, "b": [3, 4]}, within="sample")
    with pytest.raises(ValueError, match="source 'b': no batch is left to plan: drop_last drops all 2 samples"):
        LengthBucketBatchSampler(mixture, batch_size=3, drop_last=True)


@pytest.mark.parametrize(("size", "others", "share"), [(2, 4, 0.5), (3, 4, 0.6), (4, 7, 0.5), (5, 2, 0.3)])
def test_many_epochs_have_no_more_passes_than_allowed(size: int, others: int, share: float) -> None:
    """Three were red: only the first epoch was bounded, and twelve had up to eighteen passes."""
    sources = {"a": [5] * size} | {f"b{number}": [5] * 200 for number in range(others)}
    weights = {name: share if name == "a" else (1 - share) / others for name in sources}
    sampler = LengthBucketBatchSampler(Mixture(sources, weights=weights), batch_size=1)
    times = 0
    for epoch in range(1, 13):
        times += sum(sample < size for [sample] in sampler)
        assert times <= size * epoch + 1


def test_a_bound_of_passes_holds_in_the_mean_of_epochs() -> None:
    """It was red: the first epoch had five of 5.4 batches in the mean."""
    sources = {"a": [5] * 5, "b": [5] * 5}
    mixture = Mixture(sources, weights={"a": 54, "b": 46}, passes={"a": 1}, stop=10)
    with pytest.raises(ValueError, match=r"passes\['a'\] must be at least 1.08, got 1"):
        LengthBucketBatchSampler(mixture, batch_size=1)


@pytest.mark.parametrize(("others", "share", "steps"), [(7, 0.5, 8), (30, 0.5, 40), (100, 0.5, 50)])
def test_many_equal_sources_keep_shares_over_short_epochs(others: int, share: float, steps: int) -> None:
    """It was red: sources of one share had their batches all at once, and another was off by up to 25 batches."""
    sources = {"a": [5] * 400} | {f"b{number}": [5] * 200 for number in range(others)}
    shares = np.array([share] + [(1 - share) / others] * others)
    mixture = Mixture(sources, weights=dict(zip(sources, shares.tolist(), strict=True)), stop=steps)
    sampler = LengthBucketBatchSampler(mixture, batch_size=1)
    taken = np.zeros(len(shares))
    for _ in range(12):
        for [sample] in sampler:
            taken[np.searchsorted(mixture.starts, sample, side="right") - 1] += 1
            assert np.abs(taken - taken.sum() * shares).max() <= 1.01


@pytest.mark.parametrize("within", ["batch", "sample"])
def test_a_plan_of_an_epoch_takes_a_mixture_as_a_sampler_does(within: Any) -> None:
    """It was red: an error about lengths of several axes."""
    mixture = Mixture({"a": list(range(1, 90)), "b": [7, 3, 9] * 20}, weights={"a": 2, "b": 1}, within=within)
    sampler = LengthBucketBatchSampler(mixture, max_tokens=200, num_replicas=2, rank="all")
    for epoch in (0, 3):
        plan = plan_epoch(mixture, max_tokens=200, num_replicas=2, epoch=epoch)
        sampler.set_epoch(epoch)
        assert list(plan.batches) == list(sampler)
        assert plan.updates(accumulate=2).batches.sum() == plan.steps
        assert plan.report() == sampler.plan(epoch).report()


def test_a_plan_of_a_mixture_refuses_epochs_that_a_sampler_does() -> None:
    """It was red: such an epoch was looked for without an end, because positions above 2**53 have no float."""
    sources = {"a": [1, 2, 3] * 20, "b": [5] * 30}
    with pytest.raises(ValueError, match=f"epoch must be at most {2**31 - 1}, got {2**53}"):
        plan_epoch(Mixture(sources), max_tokens=8, epoch=2**53)
    assert (
        plan_epoch(Mixture(sources), max_tokens=8, epoch=2**31 - 1).steps
        == plan_epoch(Mixture(sources), max_tokens=8).steps
    )
