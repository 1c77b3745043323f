"""Rows are mixed: sources and length classes spread evenly over epochs and rows, and pairs seldom meet again."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from samplers.planning.packs.pack_table import SPARE_EPOCH, PackTable
from samplers.planning.packs.row_order import RowOrder

EPOCHS = 6


def corpus(count: int = 12_000) -> npt.NDArray[Any]:
    rng = np.random.default_rng(0)
    return np.exp(rng.normal(np.log(150), 0.9, count)).clip(8, 1_000).astype(np.int64)


def chi_square(table: np.ndarray) -> float:
    """Chi-square by degrees of freedom of a table of counts."""
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return float(((table - expected) ** 2 / expected).sum() / ((table.shape[0] - 1) * (table.shape[1] - 1)))


def counts_by_tenth(table: PackTable, labels: np.ndarray, epoch: int) -> np.ndarray:
    """How many samples of each label come in each tenth of an epoch."""
    samples, _ = RowOrder(table, epoch).samples(np.arange(len(table)))
    tenths = np.arange(len(samples)) * 10 // len(samples)
    counts = np.zeros((int(labels.max()) + 1, 10))
    np.add.at(counts, (labels[samples], tenths), 1)
    return counts


@pytest.mark.parametrize("capacity", [1_000, 4_096])
def test_sources_come_evenly_over_an_epoch(capacity: int) -> None:
    table = PackTable.build(corpus(), capacity=capacity)
    sources = np.arange(12_000) * 8 // 12_000
    values = [chi_square(counts_by_tenth(table, sources, epoch)) for epoch in range(EPOCHS)]
    # The mean of 6 values of 63 degrees of freedom varies by 0.07.
    assert 0.75 < np.mean(values) < 1.25


def test_sources_of_equal_lengths_come_evenly_too() -> None:
    table = PackTable.build(np.full(6_000, 100), capacity=1_000)
    sources = np.arange(6_000) * 8 // 6_000
    assert 0.75 < np.mean([chi_square(counts_by_tenth(table, sources, epoch)) for epoch in range(EPOCHS)]) < 1.25


def test_length_classes_come_evenly_over_an_epoch() -> None:
    lengths = corpus()
    table = PackTable.build(lengths, capacity=4_096)
    labels = np.searchsorted(np.quantile(lengths, np.arange(1, 10) / 10), lengths)
    assert np.mean([chi_square(counts_by_tenth(table, labels, epoch)) for epoch in range(EPOCHS)]) < 1.3


def test_a_row_holds_sources_as_a_random_draw_does() -> None:
    table = PackTable.build(corpus(), capacity=4_096)
    sources = np.arange(12_000) * 8 // 12_000
    alike = total = 0.0
    for epoch in range(EPOCHS):
        samples, documents = table.rows(epoch, np.arange(len(table)))
        counts = np.zeros((len(table), 8))
        np.add.at(counts, (np.repeat(np.arange(len(table)), documents), sources[samples]), 1)
        alike += (counts * (counts - 1)).sum()
        total += (documents * (documents - 1)).sum()
    # Of all pairs of different samples, 1,499 in 11,999 are of one source.
    assert 0.95 < alike / total / (1_499 / 11_999) < 1.05


def test_pairs_meet_again_about_as_seldom_as_by_chance() -> None:
    lengths = corpus()
    table = PackTable.build(lengths, capacity=4_096)
    rows = np.empty((2, len(lengths)), np.int64)
    for epoch in range(2):
        samples, documents = table.rows(epoch, np.arange(len(table)))
        rows[epoch, samples] = np.repeat(np.arange(len(table)), documents)
    _, both = np.unique(rows[0] * len(table) + rows[1], return_counts=True)
    pairs = (documents * (documents - 1)).sum()
    chance = pairs / len(lengths) / (len(lengths) - 1)
    assert (both * (both - 1)).sum() / pairs < 1.25 * chance


def test_rows_of_many_documents_share_the_shortest_ones() -> None:
    # Red before: the shortest tenth varied from row to row 10.2 times as much as at random, as the noise of the spread
    # left much room in some rows, and little in others.
    lengths = np.exp(np.random.default_rng(1).normal(np.log(150), 0.9, 20_000)).clip(8, 4_096).astype(np.int64)
    table = PackTable.build(lengths, capacity=16_384)
    shortest = lengths <= np.quantile(lengths, 0.1)
    varied = []
    for epoch in range(EPOCHS):
        samples, documents = table.rows(epoch, np.arange(len(table)))
        counts = np.add.reduceat(shortest[samples].astype(int), np.cumsum(documents) - documents)
        expected = documents * shortest.mean()
        varied.append(((counts - expected) ** 2 / expected).mean())
    assert np.mean(varied) < 6


def test_epochs_differ_under_two_limits() -> None:
    # Red before: two thirds of the epochs had the spare recipes. Rows are full by their number of documents, and only a
    # spread with little noise gives them such equal numbers.
    lengths = np.exp(np.random.default_rng(0).normal(np.log(1_300), 0.2, 8_000)).clip(20, 4_096).astype(np.int64)
    table = PackTable.build(lengths, capacity=4_096, max_documents=3)
    assert len(table) <= 1.06 * len(lengths) / 3
    spare = table.recipes(SPARE_EPOCH)
    assert not any(table.recipes(epoch) is spare for epoch in range(12))
