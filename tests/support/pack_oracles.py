"""Oracles of the tests of packs: slow packers that handle one document at a time, and drawn corpora."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

Integers = npt.NDArray[np.int64]


def slow_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing, one document at a time: the rows, as lists of lengths."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def least_slack(values: Sequence[int], counts: Sequence[int], classes: int) -> int:
    """The least slack of that many classes, by all partitions of a prefix in turn."""
    best = {0: 0}
    for _ in range(classes):
        longer: dict[int, int] = {}
        for end in range(1, len(values) + 1):
            costs = [
                best[first]
                + sum(n * (values[end - 1] - v) for v, n in zip(values[first:end], counts[first:end], strict=True))
                for first in best
                if first < end
            ]
            if costs:
                longer[end] = min(costs)
        best = longer
    return best[len(values)]


@st.composite
def corpora(draw: st.DrawFn, max_samples: int = 400) -> tuple[Integers, int]:
    """Lengths `[N]` of five shapes, and a capacity that holds the longest."""
    count = draw(st.integers(1, max_samples))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from(["even", "long tail", "few lengths", "two sizes", "halves"]))
    capacity = draw(st.one_of(st.integers(1, 20), st.integers(20, 3_000)))
    if shape == "even":
        lengths = rng.integers(0, capacity + 1, count)
    elif shape == "long tail":
        lengths = np.exp(rng.normal(np.log(1 + capacity / 20), 0.9, count)).astype(np.int64)
    elif shape == "few lengths":
        lengths = rng.choice(rng.integers(1, capacity + 1, 4), count)
    elif shape == "two sizes":
        lengths = np.where(rng.random(count) < 0.1, capacity, rng.integers(1, 2 + capacity // 30, count))
    else:
        lengths = capacity // 2 + rng.integers(-1, 2, count)
    return np.clip(lengths, 0, capacity).astype(np.int64), capacity


def cut_list(sizes: Sequence[int], capacity: int, most: int | None = None) -> list[int]:
    """How many documents each row has, if a list is cut in its order: one document at a time."""
    counts, room = [0], capacity
    for size in sizes:
        if size > room or counts[-1] == most:
            counts.append(0)
            room = capacity
        counts[-1] += 1
        room -= size
    return counts
