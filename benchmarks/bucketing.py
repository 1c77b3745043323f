"""Bucketing of streams with unknown lengths: oldest first, against queues, sorted windows and lhotse.

Needs lhotse, and transformers for code shared with `planning.py`. Every contender turns a stream of lengths into
batches with the same `buffer`. The harness counts how many samples it buffers, and for how long.
"""

import argparse
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from contenders import BUCKETS, SAMPLES, Corpus, Lengths, make_corpora
from harness import Bar, Row, compare, run_through, save, show, show_bars
from lhotse.cut import MonoCut
from lhotse.dataset.sampling.dynamic_bucketing import DynamicBucketingSampler

from samplers import bucket_by_length
from samplers.dynamic.bucketer import Bucketer
from samplers.planning.budget import Budget

BUFFERS: Final = (500, 1_000, 2_000, 5_000, 10_000, 20_000)
# Buffer for all corpora and orders except the first.
FEW_BUFFERS: Final = (1_000, 10_000)
TIMED_BUFFERS: Final = (1_000, 5_000, 20_000)
SOURCES: Final = 8

ArrivalLists: TypeAlias = Iterator[list[int]]


class Stream:
    """A corpus in one order, which counts the samples that were taken.

    Args:
        corpus: Corpus of the lengths.
        name: Name of the order.
        order: Sample indices in this order, int64 `[N]`.

    Attributes:
        lengths: Lengths by arrival, int64 `[N]`.
        budget: Largest number of padded tokens in a batch.
        taken: Samples taken in the present pass.
    """

    def __init__(self, corpus: Corpus, name: str, order: Lengths) -> None:
        self.corpus, self.name = corpus.name, name
        self.lengths, self.budget = corpus.lengths[order], corpus.budget
        self.cuts = [
            MonoCut(id=str(arrival), start=0, duration=float(length), channel=0, supervisions=[])
            for arrival, length in enumerate(self.lengths.tolist())
        ]
        self.samples = [{"x": np.zeros(length, np.uint8)} for length in self.lengths.tolist()]
        self.taken = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Length and arrival of each sample."""
        return self.counted(zip(self.lengths.tolist(), range(len(self.lengths)), strict=True))

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """One pass over the stream, or over items made from it."""
        self.taken = 0
        for value in values:
            self.taken += 1
            yield value


Contender: TypeAlias = Callable[[Stream, int], ArrivalLists]


def ours(stream: Stream, buffer: int) -> ArrivalLists:
    """Oldest first. A sample over the budget is a batch of one, as with all contenders."""
    bucketer: Bucketer[int] = Bucketer(Budget(max_tokens=stream.budget), buffer_size=buffer, overlong="alone")
    return bucketer.batches_of(stream)


def queues(stream: Stream, buffer: int) -> ArrivalLists:
    """A queue for each range of lengths. It gives a batch when it holds as many rows as fit at its bound.

    This is the rule of tf.data's `bucket_by_sequence_length`. The bounds are quantiles of all lengths, given in
    advance, as many as the buffer allows if every queue is one sample short of full.
    """
    bounds = find_bounds(stream.lengths, stream.budget, buffer)
    rows = rows_at(bounds, stream.budget).tolist()
    waiting: list[list[int]] = [[] for _ in rows]
    for (_, arrival), queue in zip(stream, np.searchsorted(bounds, stream.lengths).tolist(), strict=True):
        waiting[queue].append(arrival)
        if len(waiting[queue]) == rows[queue]:
            yield waiting[queue]
            waiting[queue] = []
    yield from filter(None, waiting)


def find_bounds(lengths: Lengths, budget: int, buffer: int) -> Lengths:
    """As many quantiles of the lengths, including the largest, as have queues of at most `buffer` samples in total."""
    few, many = 1, len(lengths)
    while many - few > 1:
        count = (few + many) // 2
        held = int((rows_at(quantiles(lengths, count), budget) - 1).sum()) + 1
        few, many = (count, many) if held <= buffer else (few, count)
    return quantiles(lengths, few)


def quantiles(lengths: Lengths, count: int) -> Lengths:
    """Upper bounds of `count` ranges with equal numbers of samples, fewer if lengths repeat: int64 `[n]`, ascending."""
    return np.unique(np.quantile(lengths, np.arange(1, count + 1) / count, method="higher"))


def rows_at(bounds: Lengths, budget: int) -> Lengths:
    """Number of rows of these widths that the budget allows, at least one."""
    return np.maximum(1, budget // bounds)


def sorted_windows(stream: Stream, buffer: int) -> ArrivalLists:
    """Fill the buffer, sort it, cut it into batches by the budget, and start again."""
    window: list[tuple[int, int]] = []
    for item in stream:
        window.append(item)
        if len(window) == buffer:
            yield from cut(sorted(window, reverse=True), stream.budget)
            window = []
    yield from cut(sorted(window, reverse=True), stream.budget)


def cut(items: list[tuple[int, int]], budget: int) -> ArrivalLists:
    """Batches under the budget, longest first, of lengths and arrivals."""
    first = 0
    while first < len(items):
        last = first + max(1, budget // items[first][0])
        yield [arrival for _, arrival in items[first:last]]
        first = last


class Cuts:
    """A stream in lhotse's form: one pass for the bounds, and one for each epoch."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[MonoCut]:
        return self._stream.counted(self._stream.cuts)


def bucket_cuts(stream: Stream, buffer: int) -> DynamicBucketingSampler:
    """Lhotse's sampler, which estimates bounds from the first 10,000 cuts."""
    budget = float(stream.budget)
    return DynamicBucketingSampler(
        Cuts(stream), max_duration=budget, num_buckets=BUCKETS, buffer_size=buffer, shuffle=True, world_size=1, rank=0
    )


def lhotse(stream: Stream, buffer: int) -> ArrivalLists:
    """Dynamic bucketing of lhotse: random samples of a random bucket."""
    for batch in bucket_cuts(stream, buffer):
        yield [int(cut.id) for cut in batch]


CONTENDERS: Final[dict[str, Contender]] = {
    "ours": ours,
    "queues as in tf.data": queues,
    "sort a window": sorted_windows,
    "lhotse bucketing": lhotse,
}


@dataclass(frozen=True)
class Figures:
    """The figures of one contender on one stream.

    Attributes:
        padding: Fraction of padding in the padded tokens.
        over: Fraction of batches over the budget, among those with two rows or more.
        worst: Padded tokens of the largest of them, in budgets.
        wait: Largest number of arrivals between a sample and its batch.
        held: Largest number of samples in the buffer.
    """

    corpus: str
    order: str
    contender: str
    buffer: int
    batches: int
    padding: float
    over: float
    worst: float
    wait: int
    held: int


def measure(stream: Stream, name: str, buffer: int) -> Figures:
    """Measure one contender on one stream."""
    padded, several = [], []
    wait = held = given = 0
    for batch in CONTENDERS[name](stream, buffer):
        padded.append(len(batch) * int(stream.lengths[batch].max()))
        several.append(len(batch) > 1)
        wait = max(wait, stream.taken - 1 - min(batch))
        held = max(held, stream.taken - given)
        given += len(batch)
    if given != len(stream.lengths):
        raise RuntimeError(f"{name} gave {given} of {len(stream.lengths)} samples")
    uses = np.array(padded)[several] / stream.budget
    return Figures(
        corpus=stream.corpus,
        order=stream.name,
        contender=name,
        buffer=buffer,
        batches=len(padded),
        padding=1 - int(stream.lengths.sum()) / sum(padded),
        over=float(np.mean(uses > 1)),
        worst=float(uses.max()),
        wait=wait,
        held=held,
    )


def orders_of(corpus: Corpus) -> dict[str, Lengths]:
    """The orders of a stream: int64 `[N]` each.

    Grouped: one source after the other, each with its range of lengths; the ranges overlap. Drifting: all lengths at
    any time, but more and more long ones.
    """
    rng = np.random.default_rng(0)
    count = len(corpus.lengths)
    by_length = np.argsort(corpus.lengths, kind="stable")
    rank = np.empty(count)
    rank[by_length] = np.arange(count) / count
    sources = np.array_split(np.argsort(rank + rng.normal(0, 0.15, count)), SOURCES)
    return {
        "random": rng.permutation(count),
        "sorted": by_length,
        "reversed": by_length[::-1],
        "grouped by source": np.concatenate([rng.permutation(sources[source]) for source in rng.permutation(SOURCES)]),
        "drifting": np.argsort(rank + rng.normal(0, 0.5, count)),
    }


def read_streams(folder: Path) -> list[Stream]:
    """The files of a folder, at most 20,000 lengths of each, in stored order."""
    streams = []
    for path in sorted(folder.glob("*.npy")):
        lengths = np.load(path).reshape(-1)[:SAMPLES].astype(np.int64)
        corpus = Corpus(path.stem, lengths, int(32 * lengths.mean()))
        streams.append(Stream(corpus, "as stored", np.arange(len(lengths))))
    return streams


def compare_buffers(stream: Stream, buffers: Sequence[int]) -> list[Figures]:
    """A table of one stream with a line for each buffer and contender."""
    found = [measure(stream, name, buffer) for buffer in buffers for name in CONTENDERS]
    title = f"{stream.corpus}, {stream.name}: {len(stream.lengths):,} samples, budget {stream.budget:,}"
    show(title, [as_row(figures) for figures in found])
    return found


def as_row(figures: Figures) -> dict[str, str]:
    """A line of a table."""
    return {
        "": figures.contender,
        "buffer": f"{figures.buffer:,}",
        "batches": f"{figures.batches:,}",
        "padding": f"{figures.padding:.2%}",
        "over": f"{figures.over:.1%}",
        "worst": f"{figures.worst:.2f}x",
        "longest wait": f"{figures.wait:,}",
        "largest buffer": f"{figures.held:,}",
    }


def time_streams(stream: Stream, buffer: int) -> Row:
    """Time an epoch of every contender, and of our stage on samples with arrays, as in a pipeline."""
    options: dict[str, Any] = {"max_tokens": stream.budget, "buffer_size": buffer, "overlong": "alone"}
    stage = bucket_by_length("x", **options)
    bounded = bucket_by_length("x", max_bytes=1 << 40, **options)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: run_through(ours(stream, buffer)),
        "ours, stage": lambda: run_through(stage(stream.samples)),
        "ours, stage, max_bytes": lambda: run_through(bounded(stream.samples)),
        "queues as in tf.data": lambda: run_through(queues(stream, buffer)),
        "sort a window": lambda: run_through(sorted_windows(stream, buffer)),
        "lhotse bucketing": lambda: run_through(bucket_cuts(stream, buffer)),
    }
    return compare(f"{stream.corpus}, {len(stream.lengths):,} samples, buffer {buffer:,}", "ours", calls, rounds=7)


def time_buffers(stream: Stream) -> dict[int, Row]:
    """Time several buffers, and print a table of microseconds per sample."""
    # Otherwise the garbage collector would visit all cuts repeatedly during the timing.
    gc.collect()
    gc.freeze()
    rows = {buffer: time_streams(stream, buffer) for buffer in TIMED_BUFFERS}
    each = {
        name: {
            f"buffer {buffer:,}": f"{row.microseconds[name] / len(stream.lengths):.2f}" for buffer, row in rows.items()
        }
        for name in rows[TIMED_BUFFERS[0]].microseconds
    }
    show("us per sample", [{"": name} | figures for name, figures in each.items()])
    return rows


def find_bars(figures: Sequence[Figures], rows: dict[int, Row]) -> list[Bar]:
    """The targets, the measured figures, and whether they meet the targets."""
    own = [one for one in figures if one.contender == "ours"]
    padding = {one.buffer: one.padding for one in own[: len(BUFFERS)]}
    over, wait, held = (
        max(one.over for one in own),
        max(one.wait / one.buffer for one in own),
        max(one.held / one.buffer for one in own),
    )
    times = {name: rows[5_000].microseconds[name] / SAMPLES for name in ("ours", "ours, stage", "lhotse bucketing")}
    return [
        ("padding, speech-like, buffer 10,000", "<= 1 %", f"{padding[10_000]:.2%}", padding[10_000] <= 0.01),
        ("padding, speech-like, buffer 1,000", "<= 4 %", f"{padding[1_000]:.2%}", padding[1_000] <= 0.04),
        ("batches over budget, every stream", "0", f"{over:.1%}", over == 0),
        ("longest wait, every stream, in buffers", "<= 3", f"{wait:.2f}", wait <= 3),
        ("largest buffer, every stream, in buffers", "<= 1", f"{held:.2f}", held <= 1),
        ("us per sample, buffer 5,000", "<= 8", f"{times['ours']:.2f}", times["ours"] <= 8),
        ("us per sample, buffer 5,000, stage", "<= 8", f"{times['ours, stage']:.2f}", times["ours, stage"] <= 8),
    ]


def main() -> None:
    """Print and save all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--lengths", type=Path, metavar="FOLDER", help="folder of .npy files, lengths [N] each, in order"
    )
    folder = parser.parse_args().lengths
    warnings.filterwarnings("ignore", category=UserWarning, module="lhotse")
    torch.set_num_threads(1)
    speech, *others = make_corpora(None)
    orders = orders_of(speech)
    rows = time_buffers(Stream(speech, "random", orders["random"]))
    figures = compare_buffers(Stream(speech, "random", orders.pop("random")), BUFFERS)
    streams = [Stream(speech, name, order) for name, order in orders.items()]
    streams += [Stream(corpus, "random", np.arange(len(corpus.lengths))) for corpus in others]
    for stream in streams + (read_streams(folder) if folder else []):
        figures += compare_buffers(stream, FEW_BUFFERS)
    bars = find_bars(figures, rows)
    show_bars(bars)
    results = {
        "streams": [asdict(one) for one in figures],
        "times": {buffer: asdict(row) for buffer, row in rows.items()},
        "bars": bars,
    }
    save("bucketing", results)


if __name__ == "__main__":
    main()
