"""Packers that others use, and what a list of rows is measured by.

Rows are `(samples, documents)`: the samples row after row, int64 `[N]`, and the documents of each row, int64 `[R]`.
TRL's packing comes from its package where that is installed. The others are their rule, written for the benchmark:
axolotl's and TRL's where it is not installed.
"""

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from samplers.planning.packs.one_list import pack

Lengths: TypeAlias = npt.NDArray[np.int64]
Rows: TypeAlias = tuple[Lengths, Lengths]
HAS_TRL: Final = find_spec("trl") is not None and find_spec("datasets") is not None
# axolotl packs groups of this many samples, with this many documents in a row at most.
AXOLOTL_GROUP, AXOLOTL_DOCUMENTS = 100_000, 200


def next_fit(lengths: Lengths, capacity: int, seed: int = 0) -> Rows:
    """Samples in random order, a new row where the next one does not fit."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    documents, room = [], 0
    for length in lengths[order].tolist():
        if length > room:
            documents.append(0)
            room = capacity
        documents[-1] += 1
        room -= length
    return order, np.array(documents)


def best_fit(lengths: Lengths, capacity: int) -> Rows:
    """Best-fit decreasing, which is also TRL's rule: `samplers.pack`."""
    return from_lists(pack(lengths, capacity))


def axolotl_first_fit(lengths: Lengths, capacity: int, seed: int = 0) -> Rows:
    """First-fit decreasing in groups of 100,000 samples, at most 200 documents in a row; a tree finds the first row."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    for first in range(0, len(order), AXOLOTL_GROUP):
        rows += _first_fit(lengths, order[first : first + AXOLOTL_GROUP], capacity)
    return from_lists(rows)


def _first_fit(lengths: Lengths, group: Lengths, capacity: int) -> list[list[int]]:
    size = 1 << (len(group) - 1).bit_length()
    # Of each node of the tree, the most room of a row below it; all rows are there, empty.
    room = [capacity] * (2 * size)
    rows: list[list[int]] = [[] for _ in range(size)]
    for sample in group[np.argsort(-lengths[group], kind="stable")].tolist():
        length, node = int(lengths[sample]), 1
        while node < size:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        row = rows[node - size]
        row.append(sample)
        room[node] = room[node] - length if len(row) < AXOLOTL_DOCUMENTS else 0
        node //= 2
        while node:
            room[node] = max(room[2 * node], room[2 * node + 1])
            node //= 2
    return [row for row in rows if row]


def from_lists(rows: list[list[int]]) -> Rows:
    """Lists of samples as arrays."""
    return np.concatenate([np.array(row) for row in rows]), np.array([len(row) for row in rows])


def run_trl(lengths: Lengths, capacity: int, strategy: str, batch_size: int) -> tuple[int, float]:
    """TRL's packing of documents of these lengths: its rows, and seconds of this process."""
    from datasets import Dataset, disable_progress_bars  # noqa: PLC0415
    from trl import pack_dataset  # noqa: PLC0415

    disable_progress_bars()
    import pyarrow as pa  # noqa: PLC0415

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = pa.array(np.zeros(int(offsets[-1]), np.int32))
    dataset = Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), tokens)}))
    start = time.process_time()
    options = {"batch_size": batch_size, "keep_in_memory": True, "load_from_cache_file": False}
    packed = pack_dataset(dataset, capacity, strategy, map_kwargs=options)
    return len(packed), time.process_time() - start


def waste(lengths: Lengths, rows: int, capacity: int) -> float:
    """The share of the rows' steps without a document, in per cent."""
    return 100 * (1 - int(lengths.sum()) / (rows * capacity))


def row_of_each(rows: Rows) -> Lengths:
    """The row of each sample, int64 `[N]`."""
    samples, documents = rows
    owners = np.empty(len(samples), np.int64)
    owners[samples] = np.repeat(np.arange(len(documents)), documents)
    return owners


def meet_again(one: Lengths, other: Lengths) -> float:
    """Of the pairs that share a row in one epoch, the share that does so in another, in per cent."""
    _, both = np.unique(one * (int(other.max()) + 1) + other, return_counts=True)
    sizes = np.bincount(one)
    return 100 * float((both * (both - 1)).sum() / max(1, (sizes * (sizes - 1)).sum()))


def meet_by_chance(one: Lengths) -> float:
    """The same for rows of equal sizes that are filled by lot, in per cent."""
    sizes = np.bincount(one)
    return 100 * float((sizes * (sizes - 1)).sum() / len(one) / max(1, len(one) - 1))


def mates(epochs: list[Lengths], samples: Lengths) -> tuple[float, float]:
    """Different partners of these samples in all epochs: as measured, and by chance; means."""
    counts, chance = [], []
    orders = [np.argsort(owners, kind="stable") for owners in epochs]
    bounds = [
        np.searchsorted(owners[order], np.arange(owners.max() + 2))
        for owners, order in zip(epochs, orders, strict=True)
    ]
    others = len(epochs[0]) - 1
    for sample in samples.tolist():
        met, missed = set(), 1.0
        for owners, order, bound in zip(epochs, orders, bounds, strict=True):
            row = order[bound[owners[sample]] : bound[owners[sample] + 1]]
            met.update(row.tolist())
            missed *= 1 - (len(row) - 1) / max(1, others)
        counts.append(len(met) - 1)
        chance.append(others * (1 - missed))
    return float(np.mean(counts)), float(np.mean(chance))


def chi_square(table: npt.NDArray[np.float64]) -> float:
    """Chi-square by degrees of freedom of a table of counts."""
    table = table[table.sum(1) > 0]
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return float(((table - expected) ** 2 / expected).sum() / max(1, (len(table) - 1) * (table.shape[1] - 1)))


def tenths(samples: Lengths, labels: Lengths) -> npt.NDArray[np.float64]:
    """How many samples of each label come in each tenth of an epoch."""
    counts = np.zeros((int(labels.max()) + 1, 10))
    np.add.at(counts, (labels[samples], np.arange(len(samples)) * 10 // len(samples)), 1)
    return counts


def imbalance(costs: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Of rows' costs by steps `[steps, W]`: the sum of the steps' maxima x W / the sum, and the worst step."""
    return float(costs.max(1).sum() * costs.shape[1] / costs.sum()), float((costs.max(1) / costs.mean(1)).max())


def step_spread(lengths: Lengths, rows: Rows, steps: Lengths) -> float:
    """The spread of the steps' mean document length, next to that of documents drawn at random.

    Args:
        lengths: Of the samples.
        rows: All rows.
        steps: The rows of each step, int64 `[steps, W]`.
    """
    samples, documents = rows
    firsts = np.cumsum(documents) - documents
    totals = np.add.reduceat(lengths[samples], firsts)
    means = totals[steps].sum(1) / documents[steps].sum(1)
    return float(means.std() / (lengths.std() / np.sqrt(documents[steps].sum(1).mean())))


def fastest(call: Callable[[], object], rounds: int) -> float:
    """The shortest of some calls, in seconds of this process: it has one thread, and shares the machine with others."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


if not HAS_TRL:
    print("trl is not installed: its rule, best-fit decreasing, stands for it", file=sys.stderr)
