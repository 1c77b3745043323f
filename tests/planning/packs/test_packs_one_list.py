"""One list to rows: as few as best fit takes, within all limits, and even over ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_oracles import corpora, slow_best_fit

from samplers.planning.packs.one_list import pack


def squares(lengths: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return lengths.astype(np.float64) ** 2


@given(corpora())
def test_a_list_is_packed_in_as_many_rows_as_best_fit_takes(case: tuple[npt.NDArray[Any], int]) -> None:
    lengths, capacity = case
    rows = pack(lengths, capacity)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert max(np.maximum(lengths[row], 1).sum() for row in rows) <= capacity
    assert len(rows) == len(slow_best_fit(np.maximum(lengths, 1).tolist(), capacity))


@given(corpora(), st.integers(1, 9), st.floats(1, 3))
def test_a_list_is_packed_within_all_limits(case: tuple[npt.NDArray[Any], int], most: int, factor: float) -> None:
    lengths, capacity = case
    max_cost = factor * float(np.maximum(lengths, 1).max()) ** 2
    rows = pack(lengths, capacity, max_documents=most, cost=squares, max_cost=max_cost)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    for row in rows:
        assert 1 <= len(row) <= most
        assert np.maximum(lengths[row], 1).sum() <= capacity
        assert squares(np.maximum(lengths[row], 1)).sum() <= max_cost * (1 + 1e-12)


@given(corpora(), st.integers(1, 8), st.sampled_from([None, squares]), st.sampled_from([None, 3]))
def test_every_rank_gets_as_many_rows_within_the_limits(
    case: tuple[npt.NDArray[Any], int], ranks: int, cost: Callable[..., Any] | None, most: int | None
) -> None:
    lengths, capacity = case
    fitted = pack(lengths, capacity, max_documents=most)
    needed = -(-len(fitted) // ranks)
    if needed * ranks > len(lengths):
        with pytest.raises(ValueError, match="use fewer ranks"):
            pack(lengths, capacity, ranks=ranks, cost=cost, max_documents=most)
        return
    shares = pack(lengths, capacity, ranks=ranks, cost=cost, max_documents=most)
    assert [len(share) for share in shares] == [needed] * ranks
    rows = [row for share in shares for row in share]
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    for row in rows:
        assert row
        assert most is None or len(row) <= most
        assert np.maximum(lengths[row], 1).sum() <= capacity


def test_ranks_get_rows_of_even_cost() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.7, 900).clip(1, 1_000).astype(np.int64)
    shares = pack(lengths, 4_096, ranks=8, cost=squares)
    costs = np.array([[squares(lengths[row]).sum() for row in share] for share in shares])
    assert costs.shape == (8, 6)
    assert costs.max(0).sum() * 8 / costs.sum() < 1.02


def test_overlong_samples_are_refused_dropped_or_cut() -> None:
    with pytest.raises(ValueError, match="got 9 steps at sample 1"):
        pack([3, 9, 4], 8)
    assert pack([3, 9, 4], 8, overlong="drop") == [[2, 0]]
    assert pack([3, 9, 4], 8, overlong="cut") == [[2, 0], [1]]
    with pytest.raises(ValueError, match="overlong must be 'error', 'drop' or 'cut', got 'split'"):
        pack([3, 9, 4], 8, overlong="split")
    with pytest.raises(ValueError, match=r"lengths must be \[N\]"):
        pack([[3, 9]], 8)
