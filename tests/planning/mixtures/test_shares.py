"""Turns of sources: within a turn of their shares at every prefix, for any number of sources and any sizes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers.planning.mixtures.shares import count_batches_of, take_turns

EXAMPLES = max(10, settings().max_examples // 3)


class Passes:
    """An endless stream of shuffled passes, counted batch by batch."""

    phase = 0.5

    def __init__(self, rng: np.random.Generator, largest: int) -> None:
        self.sizes = rng.integers(max(1, largest - 20), largest + 1, int(rng.integers(1, 40)))
        self.rng, self.units = rng, [0.0]

    def units_before(self, batches: int) -> float:
        while len(self.units) <= batches:
            self.units += (self.units[-1] + self.rng.permutation(self.sizes).cumsum()).tolist()
        return self.units[batches]

    def batches_within(self, units: float) -> int:
        count = 0
        while (self.units_before(count) + self.units_before(count + 1)) / 2 <= units:
            count += 1
        return count

    def turns(self, first: int, end: int) -> np.ndarray:
        self.units_before(end)
        return np.diff(self.units[first : end + 1]).astype(np.int64)


@settings(max_examples=EXAMPLES)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from([20, 100]), st.sampled_from([0.3, 1, 9]))
def test_every_prefix_of_several_epochs_is_within_a_batch_of_every_share(
    seed: int, count: int, largest: int, evenness: float
) -> None:
    # Red without the rule that a source waits for the others: a source of half the weight was off by several batches.
    rng = np.random.default_rng(seed)
    shares = np.maximum(rng.dirichlet(np.full(count, evenness)), 1e-2)
    # One source outweighs many small ones.
    shares[0] = shares.sum()
    shares /= shares.sum()
    streams = [Passes(rng, largest) for _ in range(count)]
    per_epoch = shares / np.array([stream.sizes.mean() for stream in streams])
    # Epochs in which every source has some batches.
    batches = int(8 * per_epoch.sum() / per_epoch.min() * rng.uniform(1, 2))
    per_epoch *= batches / per_epoch.sum()
    taken, first = np.zeros(count), np.zeros(count, np.int64)
    for epoch in range(1, 4):
        end = count_batches_of(streams, shares, epoch * batches, units_per_batch=largest, per_epoch=per_epoch)
        assert end.sum() == epoch * batches
        assert (end >= first).all()
        turns = [stream.turns(*pair) for stream, *pair in zip(streams, first.tolist(), end.tolist(), strict=True)]
        given_so_far = [0] * count
        for source in take_turns(shares, taken.copy(), turns).tolist():
            taken[source] += turns[source][given_so_far[source]]
            given_so_far[source] += 1
            assert np.abs(taken - shares * taken.sum()).max() <= largest + 1e-6
        assert given_so_far == (end - first).tolist()
        first = end
