"""Budgets: the most rows that fit, one budget or several, and what is refused."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers.planning.budget import Budget

Array = npt.NDArray[np.int64]
LIMITS = st.fixed_dictionaries(
    {}, optional={"max_tokens": st.integers(1, 300), "batch_size": st.integers(1, 40), "cost": st.just(None)}
)


def squared(rows: Array, width: Array) -> Any:
    return rows * width**2 / 500


def slow_fits(limits: dict[str, Any], rows: int, width: int) -> bool:
    if rows * width > limits.get("max_tokens", 10**9) or rows > limits.get("batch_size", 10**9):
        return False
    return "cost" not in limits or rows * width**2 <= 500


@given(LIMITS.filter(bool), st.integers(1, 40))
def test_the_most_rows_are_the_last_that_fit(limits: dict[str, Any], width: int) -> None:
    if "cost" in limits:
        limits["cost"] = squared
    fitting = [rows for rows in range(1, 700) if slow_fits(limits, rows, width)]
    assert Budget(**limits).max_rows(width) == (fitting[-1] if fitting else 0)


@given(LIMITS.filter(bool), st.integers(1, 40), st.integers(1, 60))
def test_a_batch_fits_if_it_uses_no_more_than_the_whole_budget(limits: dict[str, Any], width: int, rows: int) -> None:
    if "cost" in limits:
        limits["cost"] = squared
    budget = Budget(**limits)
    use = budget.use(np.array([rows]), np.array([width]), np.array([rows * width]))
    assert (use[0] <= 1) == budget.fits(rows, [width], rows * width) == slow_fits(limits, rows, width)


def test_fields_are_padded_each_and_paid_together() -> None:
    assert Budget(max_tokens=100).max_rows((6, 4)) == 10
    assert Budget(max_tokens=100).use(np.array([5]), np.array([[6, 4]]), np.array([9])).tolist() == [0.5]


def test_real_tokens_are_the_lengths_whatever_the_width() -> None:
    budget = Budget(max_tokens=100, count_tokens="real")
    assert budget.use(np.array([3]), np.array([90]), np.array([100])).tolist() == [1.0]
    assert budget.fits(3, [90], 100)


def test_a_cost_that_overflows_far_from_any_batch_is_not_asked_there() -> None:
    asked = []

    def cost(rows: Array, width: Array) -> Any:
        asked.append(int(rows.max()))
        return rows * width / 64

    assert Budget(cost=cost).max_rows(2) == 32
    assert max(asked) <= 64


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, ValueError, "set max_tokens, batch_size or cost"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"batch_size": -3}, ValueError, "batch_size must be at least 1, got -3"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True"),
        ({"max_tokens": 100.0}, TypeError, "max_tokens must be an int, got 100.0"),
        ({"cost": 3}, TypeError, "cost must be a function"),
        (
            {"max_tokens": 9, "count_tokens": "tokens"},
            ValueError,
            "count_tokens must be 'padded' or 'real', got 'tokens'",
        ),
        ({"batch_size": 9, "count_tokens": "real"}, ValueError, "got no max_tokens"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Budget(**options)


def test_a_cost_must_be_one_number_for_each_batch() -> None:
    with pytest.raises(ValueError, match="one number per batch"):
        Budget(cost=lambda rows, width: 1.0).max_rows(3)
    with pytest.raises(ValueError, match="got nan for 1 rows of width 3"):
        Budget(cost=lambda rows, width: rows * np.nan).max_rows(3)
    # A cost below zero was under every budget, so that the corpus became one batch.
    with pytest.raises(ValueError, match=r"from 0 on, got -3\.0 for 1 rows of width 3"):
        Budget(cost=lambda rows, width: -rows * width).max_rows(3)
