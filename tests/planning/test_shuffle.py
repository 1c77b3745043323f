"""Shuffles: bijections under any key, golden values, and no visible pattern in small domains."""

from itertools import permutations
from math import factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers.planning.keyed_shuffle import Domains, derive_key, draw, permute, permute_one, stream_keys

KEYS = st.integers(0, 2**64 - 1)

GOLDEN_KEYS = [6791897765849424158, 4798784977976973041]
GOLDEN_STREAM = [13168350753275463132, 7134611160154358618, 13877614986023876344]
GOLDEN_SHUFFLE = [1, 2, 4, 6, 8, 3, 5, 7, 9, 0]
GOLDEN_DRAW = [50, 68, 75, 26, 78, 26, 11, 64]


MASK, GAMMA, MIX_1, MIX_2 = 2**64 - 1, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def slow_permute(index: int, size: int, key: int) -> int:
    """The definition, one place at a time in Python's integers."""
    if size <= 7:
        word = (key * GAMMA) & MASK
        for shift, factor in ((30, MIX_1), (27, MIX_2)):
            word = ((word ^ (word >> shift)) * factor) & MASK
        word ^= word >> 31
        return list(permutations(range(size)))[(word >> 32) * factorial(size) >> 32][index]
    a = next(a for a in range(1, size + 1) if a * a >= size)
    a += a % 2
    b = -(-size // a)
    while True:
        halves, sizes = [index % a, index // a], [a, b]
        for turn in range(16 if size < 64 else 8):
            side = turn % 2
            word = ((((halves[1 - side] + key) & MASK) ^ (turn * GAMMA & MASK)) * MIX_1) & MASK
            word = ((word ^ (word >> 32)) * MIX_2) & MASK
            halves[side] = (halves[side] + ((word >> 32) * sizes[side] >> 32)) % sizes[side]
        index = halves[0] + a * halves[1]
        if index < size:
            return index


@given(st.integers(1, 3000), KEYS)
def test_a_shuffle_sends_distinct_indices_to_distinct_indices(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(st.integers(2, 10**6), KEYS, st.data())
def test_a_shuffle_equals_its_definition(size: int, key: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    assert permute_one(index, size, key) == slow_permute(index, size, key)


@given(st.lists(st.tuples(st.integers(1, 300), KEYS), min_size=1, max_size=20), st.data())
def test_domains_of_several_sizes_are_those_of_each_alone(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    sizes, keys = zip(*pairs, strict=True)
    indices = [data.draw(st.integers(0, size - 1)) for size in sizes]
    together = Domains(np.array(sizes)).permute(np.array(indices), np.arange(len(sizes)), np.array(keys, np.uint64))
    assert together.tolist() == [permute_one(*each) for each in zip(indices, sizes, keys, strict=True)]


def sign(order: list[int]) -> int:
    """1 for an order of an even number of swaps, -1 for an odd one."""
    return (-1) ** sum(order[later] < order[sooner] for later in range(len(order)) for sooner in range(later))


@pytest.mark.parametrize("size", [7, 8, 9, 25, 49, 65])
def test_odd_orders_come_as_often_as_even_ones(size: int) -> None:
    keys = stream_keys(3, np.arange(400)).tolist()
    odd = sum(sign(permute(np.arange(size), size, key).tolist()) < 0 for key in keys)
    assert 150 < odd < 250


@pytest.mark.parametrize("size", [8, 9, 15, 16, 17, 40, 64, 65, 129])
def test_every_pair_of_indices_comes_as_often_as_any_other(size: int) -> None:
    keys = stream_keys(77, np.arange(40 * size * (size - 1)))
    for pair in ((0, 1), (0, size // 2), (2, size - 1)):
        first, second = (permute(np.full(len(keys), index), size, keys) for index in pair)
        counts = np.bincount(first * size + second, minlength=size * size).reshape(size, size)
        assert not counts.diagonal().any()
        off = counts[~np.eye(size, dtype=bool)]
        freedom = len(off) - 1
        chi = float(((off - 40) ** 2 / 40).sum())
        assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5


@given(st.integers(1, 50), st.lists(KEYS, min_size=1, max_size=20))
def test_a_key_for_each_index_gives_what_each_key_gives_alone(size: int, keys: list[int]) -> None:
    indices = np.arange(len(keys)) % size
    together = permute(indices, size, np.array(keys, np.uint64))
    assert together.tolist() == [permute_one(int(p), size, k) for p, k in zip(indices, keys, strict=True)]


def test_golden_values_hold_on_every_machine_and_version() -> None:
    assert derive_key(0) == GOLDEN_KEYS[0]
    assert derive_key(7, 3, 1) == GOLDEN_KEYS[1]
    assert stream_keys(5, np.arange(3)).tolist() == GOLDEN_STREAM
    assert permute(np.arange(10), 10, derive_key(1)).tolist() == GOLDEN_SHUFFLE
    assert draw(np.arange(8), 100, 9).tolist() == GOLDEN_DRAW


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_order_of_a_few_indices_is_about_as_frequent(size: int) -> None:
    trials = 20_000
    keys = stream_keys(derive_key(11), np.arange(trials))
    orders = np.stack([permute(np.full(trials, index), size, keys) for index in range(size)], axis=1)
    codes = orders @ (size ** np.arange(size))
    counts = [int((codes == np.dot(order, size ** np.arange(size))).sum()) for order in permutations(range(size))]
    expected = trials / factorial(size)
    freedom = factorial(size) - 1
    chi_squared = sum((count - expected) ** 2 / expected for count in counts)
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5


def test_neighbours_in_index_and_in_key_go_to_unrelated_indices() -> None:
    size, trials = 97, 30_000
    keys = stream_keys(derive_key(3), np.arange(trials))
    here, beside = permute(np.full(trials, 40), size, keys), permute(np.full(trials, 41), size, keys)
    assert abs(np.corrcoef(here, beside)[0, 1] + 1 / (size - 1)) < 0.025
    assert abs(np.corrcoef(here[:-1], here[1:])[0, 1]) < 0.025


def test_keys_differ_by_order_and_number_of_their_words() -> None:
    keys = [derive_key(), derive_key(0), derive_key(0, 0), derive_key(1, 2), derive_key(2, 1), derive_key(1)]
    assert len(set(keys)) == len(keys)
