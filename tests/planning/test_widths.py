"""Widths: rounding up, and the exact partition against every other."""

from itertools import combinations
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collate.errors import LengthError
from collate.widths import check_widths, padded_widths
from samplers.planning.fitting.optimal_widths import optimal_widths
from samplers.planning.mixtures.epochs import plan_epoch


def padding(lengths: list[int], widths: list[int]) -> int:
    return sum(min(width for width in widths if width >= length) - length for length in lengths)


def least_padding(lengths: list[int], k: int) -> int:
    *others, longest = sorted(set(lengths))
    choices = (list(choice) for n in range(min(k - 1, len(others)) + 1) for choice in combinations(others, n))
    return min(padding(lengths, [*choice, longest]) for choice in choices)


@given(st.lists(st.integers(1, 25), min_size=1, max_size=40), st.integers(1, 5))
def test_no_other_choice_of_widths_wastes_less(lengths: list[int], k: int) -> None:
    widths = optimal_widths(lengths, k)
    assert len(widths) <= k
    assert widths == sorted(set(widths))
    assert widths[-1] == max(lengths)
    assert padding(lengths, widths) == least_padding(lengths, k)


def table_of_costs(lengths: list[int], k: int) -> int:
    """The fewest padded tokens with at most k widths, by a table of all shorter lists, in Python integers."""
    values = sorted(set(lengths))
    ends = [sum(length <= value for length in lengths) for value in values]
    costs = [value * end for value, end in zip(values, ends, strict=True)]
    for _ in range(k - 1):
        costs = [
            min([costs[j], *(costs[i] + values[j] * (ends[j] - ends[i]) for i in range(j))]) for j in range(len(values))
        ]
    return costs[-1]


# The longest are those for which 64 bits are too few.
LARGEST = st.sampled_from([100, 10**4, 10**9, 2**31, 2**61, 2**62, 2**63 - 1])


@pytest.mark.parametrize("passes", [0, 1, 40], ids=["point by point", "both", "all at once"])
@given(LARGEST.flatmap(lambda last: st.lists(st.integers(1, last), min_size=1, max_size=60)), st.integers(1, 9))
def test_partitions_of_many_lengths_are_those_of_a_table(passes: int, lengths: list[int], k: int) -> None:
    with patch("samplers.planning.fitting.optimal_widths._PASSES", passes):
        widths = optimal_widths(lengths, k)
    assert len(widths) <= k
    assert padding(lengths, widths) == table_of_costs(lengths, k) - sum(lengths)


@pytest.mark.parametrize("power", [0.5, 1, 2, 3])
def test_partitions_of_a_hundred_thousand_lengths_are_local_optima(power: float) -> None:
    # 29 s for ten times as many lengths before, one by one.
    lengths = np.unique((np.arange(1, 100_001) ** power * 7).astype(np.int64))
    widths = np.array(optimal_widths(lengths, 6))
    assert len(widths) == 6

    def cost(chosen: np.ndarray) -> int:
        return int(np.sort(chosen)[np.searchsorted(np.sort(chosen), lengths)].sum())

    at = np.searchsorted(lengths, widths)
    for number in range(5):
        for step in (-1, 1):
            moved = at.copy()
            moved[number] += step
            assert cost(lengths[moved]) >= cost(widths)


def test_enough_widths_are_the_distinct_lengths() -> None:
    assert optimal_widths(np.array([3, 9, 3, 5]), 10) == [3, 5, 9]
    assert optimal_widths([0, 0], 1) == [1]


def test_large_token_counts_stay_exact() -> None:
    lengths = np.repeat([10**6, 2 * 10**6, 10**9], [10**5, 10**5, 3])
    assert optimal_widths(lengths, 2) == [2 * 10**6, 10**9]


@given(st.lists(st.integers(0, 60), min_size=1), st.integers(1, 9))
def test_a_multiple_rounds_up_to_itself_and_never_to_zero(lengths: list[int], multiple: int) -> None:
    rounded = padded_widths(np.array(lengths), multiple)
    slow = [next(width for width in range(multiple, 100, multiple) if width >= length) for length in lengths]
    assert rounded.tolist() == slow


def test_allowed_widths_round_up_to_the_next_and_must_reach_the_longest() -> None:
    widths = check_widths([16, 4, 8])
    assert widths == (4, 8, 16)
    assert padded_widths(np.array([[0, 4], [5, 16]]), widths).tolist() == [[4, 4], [8, 16]]
    with pytest.raises(LengthError, match=r"longest sequence, 17 steps, got at most 16: add a width"):
        padded_widths(np.array([3, 17]), widths)


@pytest.mark.parametrize(
    ("widths", "error", "says"),
    [
        (0, ValueError, "at least 1, got 0"),
        (True, TypeError, "got True"),
        (2.5, TypeError, "got 2.5"),
        ("16", TypeError, "got '16'"),
        ([], ValueError, "at least one width"),
        ([4, -1], ValueError, "at least 1, got -1"),
    ],
)
def test_widths_that_make_no_sense_are_refused(widths: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        check_widths(widths)


@pytest.mark.parametrize(
    ("lengths", "k", "error", "says"),
    [
        ([3, 4], 0, ValueError, "k must be at least 1"),
        ([], 2, ValueError, "N >= 1"),
        ([[3, 4]], 2, ValueError, "one field at a time"),
        ([3.0], 2, TypeError, "must be integers, got float64"),
        ([3, -4], 2, LengthError, "got -4 at sample 1"),
    ],
)
def test_lengths_that_make_no_sense_have_no_widths(lengths: Any, k: int, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        optimal_widths(lengths, k)


def test_lengths_below_zero_in_unsigned_integers_have_no_widths() -> None:
    # Red: -3, carried to 2**64 - 3, became a width of 1.
    with pytest.raises(LengthError, match=r"2\*\*63 - 1, got 18446744073709551613 at sample 1"):
        optimal_widths(np.array([5, 5], np.uint64) - np.array([1, 8], np.uint64), 2)


def test_masked_lengths_have_no_widths() -> None:
    # Red: the values beneath the mask were widths.
    with pytest.raises(TypeError, match=r"lengths must be known, .* masks 1 of 2 \(at 1\)"):
        optimal_widths(np.ma.array([5, 99], mask=[False, True]), 2)


@pytest.mark.parametrize("widths", [2**63, [8, 2**70]])
def test_a_width_that_no_length_has_is_refused_by_name(widths: Any) -> None:
    # Red: an OverflowError that named nothing.
    with pytest.raises(ValueError, match="widths must be at most"):
        plan_epoch([3, 9], max_tokens=20, overlong="alone", widths=widths)


@pytest.mark.parametrize("max_length", [2**63, 2**70])
def test_a_limit_that_no_length_reaches_is_no_limit(max_length: int) -> None:
    # Red: an OverflowError that named nothing.
    assert list(plan_epoch([3, 9], max_tokens=20, max_length=max_length).batches) == [[1, 0]]
