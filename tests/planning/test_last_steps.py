"""The last step is shared in every epoch, or refused before the first: never in the middle of a run."""

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexed import Index

from samplers import LengthBucketBatchSampler
from samplers.planning.options import Options
from samplers.planning.schedules.schedule import make_schedule
from samplers.planning.tables.window_table import WindowTable, make_window_table

EPOCHS = 30
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 60, samples)


def refused_epochs(table: WindowTable, replicas: int, epochs: Iterable[int]) -> list[int]:
    refused = []
    for epoch in epochs:
        try:
            make_schedule(table, epoch, replicas)
        except ValueError:
            refused.append(epoch)
    return refused


# Each was red: it was accepted, and refused in the last of these epochs.
@pytest.mark.parametrize(
    ("seed", "samples", "max_tokens", "replicas", "epoch"),
    [(1, 97, 100, 13, 6), (4, 172, 100, 19, 4), (13, 60, 300, 9, 2), (22, 172, 100, 9, 4)],
)
def test_a_small_corpus_that_is_accepted_is_shared_in_every_epoch(
    seed: int, samples: int, max_tokens: int, replicas: int, epoch: int
) -> None:
    sampler = LengthBucketBatchSampler(draw(seed, samples), max_tokens=max_tokens, num_replicas=replicas, rank=0)
    sampler.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler)
    assert {sampler.plan(number).steps for number in range(EPOCHS)} == {len(sampler)}
    assert all(sampler.plan(number).batches[0] for number in range(EPOCHS))


@given(SEEDS, st.integers(40, 300), st.integers(2, 24), st.sampled_from([None, 4, 8]), st.sampled_from([20, 60, 200]))
def test_a_stream_is_shared_in_every_epoch_or_refused_at_once(
    seed: int, samples: int, replicas: int, rows: int | None, window: int
) -> None:
    starts = np.unique(np.append(np.arange(0, samples, 30), samples))
    options = Options(max_tokens=100, batch_size=rows, window=window, overlong="alone")
    table = make_window_table(Index(draw(seed, samples)), starts, options)
    # Red before: in epochs 8, 9, 10, 13 and 17 of one, for example.
    if not refused_epochs(table, replicas, table.trial_epochs):
        assert not refused_epochs(table, replicas, range(EPOCHS))
