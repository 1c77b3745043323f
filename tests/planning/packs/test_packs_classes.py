"""Length classes and best fit on counts, each next to a slow version that looks at one document at a time."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from pack_oracles import corpora, least_slack, slow_best_fit

from samplers.planning.packs.best_fit import count_rows
from samplers.planning.packs.groups import Groups
from samplers.planning.packs.length_classes import MANY_LENGTHS, cut_least_slack, make_classes, sort_stably

HISTOGRAMS = st.dictionaries(st.integers(1, 60), st.integers(1, 20), min_size=1, max_size=9)


@given(corpora())
def test_best_fit_on_counts_takes_as_many_rows_as_one_by_one(case: tuple[npt.NDArray[Any], int]) -> None:
    lengths, capacity = np.maximum(case[0], 1), case[1]
    sizes = sorted(Counter(lengths.tolist()).items(), reverse=True)
    rows = count_rows([size for size, _ in sizes], [count for _, count in sizes], capacity)
    assert rows == len(slow_best_fit(lengths.tolist(), capacity))


@given(corpora(max_samples=120))
def test_best_fit_in_groups_fills_rows_as_one_by_one_does(case: tuple[npt.NDArray[Any], int]) -> None:
    lengths, capacity = np.maximum(case[0], 1), case[1]
    sizes = sorted(Counter(lengths.tolist()).items(), reverse=True)
    groups = Groups(np.array([[size] for size, _ in sizes]), np.array([capacity]), len(lengths))
    for number, (_, count) in enumerate(sizes):
        assert groups.place_best_fit(number, count) == 0
    tree = groups.tree()
    rows = Counter()
    for group, opened in enumerate(tree.open_rows().tolist()):
        held, up = [], group
        while up > 0:
            held.append(sizes[tree.classes[up]][0])
            up = int(tree.parents[up])
        rows[sum(held)] += opened
    del rows[0]
    # Rows with equal room are alike to best fit, so that only what is in them together can be compared.
    assert +rows == Counter(sum(row) for row in slow_best_fit(lengths.tolist(), capacity))


@given(HISTOGRAMS, st.integers(0, 600))
def test_classes_keep_within_the_slack_and_none_as_few_wastes_less(histogram: dict[int, int], slack: int) -> None:
    values = sorted(histogram)
    counts = [histogram[value] for value in values]
    ends = cut_least_slack(np.array(values), np.array(counts), slack)
    assert ends[-1] == len(values)
    slots = np.repeat(np.array(values)[ends - 1], np.diff(ends, prepend=0))
    spent = int(np.array(counts) @ (slots - values))
    assert spent <= slack
    assert spent == least_slack(values, counts, len(ends))


@given(corpora(), st.sampled_from([np.uint8, np.int16, np.int32, np.int64]))
def test_every_document_is_in_the_class_whose_slot_holds_it(
    case: tuple[npt.NDArray[Any], int], dtype: type[Any]
) -> None:
    capacity = min(case[1], np.iinfo(dtype).max)
    units = np.clip(case[0], 1, capacity).astype(dtype)[:, None]
    classes = make_classes(units, (capacity,))
    assert sorted(classes.order.tolist()) == list(range(len(units)))
    assert (np.diff(classes.units[:, 0]) < 0).all()
    shorter = np.append(classes.units[1:, 0], 0)
    for slot, less, first, count in zip(classes.units[:, 0], shorter, classes.starts, classes.counts, strict=True):
        held = units[classes.order[first : first + count], 0]
        assert held.max() == slot
        assert held.min() > less


@given(st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=60))
def test_documents_are_sorted_stably_whatever_their_size(sizes: list[int]) -> None:
    assert sort_stably(np.array(sizes)).tolist() == sorted(range(len(sizes)), key=lambda index: sizes[index])


def test_too_many_lengths_are_rounded_up_within_the_capacity() -> None:
    rng = np.random.default_rng(0)
    units = rng.integers(100_000, 400_000, 3 * MANY_LENGTHS)
    classes = make_classes(units[:, None], (400_000,))
    slots = np.repeat(classes.units[:, 0], classes.counts)
    held = np.concatenate(
        [units[classes.order[f : f + n]] for f, n in zip(classes.starts, classes.counts, strict=True)]
    )
    assert (slots >= held).all()
    assert classes.units.max() <= 400_000
    assert (slots - held).sum() < 0.003 * units.sum()
