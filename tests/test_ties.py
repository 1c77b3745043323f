"""Strata of one width: they trade places among themselves, and nothing else moves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers.options import Options
from samplers.plan import plan_epoch
from samplers.ties import Ties, turns
from samplers.windows import lay_out_windows


class Index:
    """Lengths with a fingerprint."""

    fingerprint = "1"

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(0, 2**64 - 1))
def test_a_turn_is_a_bijection_of_each_size(sizes: list[int], key: int) -> None:
    factors, shifts = turns(np.array(sizes), key)
    for size, factor, shift in zip(sizes, factors.tolist(), shifts.tolist(), strict=True):
        assert sorted((factor * rank + shift) % size for rank in range(size)) == list(range(size))


def test_any_two_ranks_come_to_stand_any_distance_apart_as_often() -> None:
    distances = np.array(
        [
            np.diff((factor * np.array([2, 5]) + shift) % 7)[0] % 7
            for key in range(3000)
            for factor, shift in zip(*turns(np.array([7]), key), strict=True)
        ]
    )
    counts = np.bincount(distances, minlength=7)
    assert counts[0] == 0
    assert counts[1:].min() > 400


STRATA = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=30)


@given(STRATA, st.integers(0, 2**64 - 1))
def test_strata_trade_places_with_their_like_only(strata: list[tuple[int, int, int]], key: int) -> None:
    first, apart, samples = np.array(strata).T
    places = samples.cumsum() - samples
    ties = Ties.find(places, samples, first, first - apart)
    if ties is None:
        assert not ((apart == 0) & (samples > 0)).any()
        return
    numbers = np.arange(len(places))
    moved = ties.move(numbers, places, key)
    for number, place in enumerate(moved.tolist()):
        if apart[number] or not samples[number]:
            assert place == places[number]
        else:
            there = [n for n in numbers if places[n] == place and samples[n]]
            assert [(first[n], apart[n], samples[n]) for n in there] == [strata[number]]
    kept = samples > 0
    assert sorted(moved[kept]) == sorted(places[kept])


@pytest.mark.parametrize("options", [{}, {"widths": [64]}, {"count": "real"}])
def test_many_samples_of_one_length_hardly_meet_again(options: dict[str, object]) -> None:
    lengths = np.full(20_000, 60)
    report = plan_epoch(lengths, max_tokens=6_400, window=5_000, **options).report()
    assert report.meeting_again < 0.02
    assert report.sequences == len(lengths)


def test_in_a_stream_strata_stay_in_the_window_that_is_read_at_once() -> None:
    lengths, starts = np.arange(5000) * 7 % 4 + 1, np.arange(0, 5001, 100)
    even = lay_out_windows(Index(lengths), starts, Options(max_tokens=60, window=500))
    assert even.odd is not None
    for layout in (even, even.odd):
        for number in range(len(layout)):
            samples, _ = layout.samples_of(np.array([number]), key=7)
            window = np.searchsorted(layout.sizes.cumsum(), number, side="right")
            assert set((samples // 100).tolist()) <= set(layout.windows[window])
