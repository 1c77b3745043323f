"""Mixtures at their edges: copies in late epochs, sources without tokens, weights at the ends of floats."""

import pickle

import numpy as np

from samplers import LengthBucketBatchSampler, Mixture


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
