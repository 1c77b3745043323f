"""Shards against webdataset: reading them, finding their lengths, and making batches of them.

Everything is read from the page cache, in one process unless stated otherwise. Each round times all contenders in turn.
Rates count the bytes of the samples, not of the files.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import webdataset as wds
from harness import Bar, Row, compare, keep_pages, run_through, save, show_bars
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from collate import PadCollator
from samplers import LengthBucketBatchSampler, LengthIndex, ShardDataset, ShardStream, ShardWriter

ROUNDS: Final = 5
WORKERS: Final = 2
# Samples that are sorted together in the pipeline by hand.
BUFFER: Final = 5_000
# Number of shards; it gives two workers equal work.
SHARDS: Final = 10


@dataclass(frozen=True)
class Corpus:
    """One corpus in both layouts, each with its index.

    Attributes:
        field: Name of the sequence.
        budget: Largest number of padded steps in a batch.
        folder: Folder that contains `blocks` and `plain`.
        samples: Number of samples.
        nbytes: Bytes of all samples.
        files: Bytes of the shards, for each layout.
    """

    name: str
    field: str
    budget: int
    folder: Path
    samples: int
    nbytes: int
    files: dict[str, int]

    def shards(self, layout: str) -> list[str]:
        """Paths of the shards of a layout."""
        return [str(path) for path in sorted((self.folder / layout).glob("*.tar"))]


def tokens(count: int) -> Iterator[dict[str, Any]]:
    """Short sequences: int64 of about 30 steps."""
    rng = np.random.default_rng(0)
    for index, length in enumerate(np.clip(rng.normal(30, 10, count), 1, None).astype(int).tolist()):
        yield {"__key__": f"{index:08}", "tokens": rng.integers(0, 30_000, length)}


def frames(count: int) -> Iterator[dict[str, Any]]:
    """Long sequences: float32 of about 200 steps of 16 features."""
    rng = np.random.default_rng(0)
    for index, length in enumerate(np.clip(rng.normal(200, 50, count), 1, None).astype(int).tolist()):
        yield {"__key__": f"{index:08}", "frames": rng.random((length, 16), np.float32)}


def write(name: str, samples: list[dict[str, Any]], budget: int, folder: Path) -> Corpus:
    """Write samples to shards of both layouts."""
    files = {}
    for layout in ("blocks", "plain"):
        with ShardWriter(folder / layout, layout=layout, max_samples=-(-len(samples) // SHARDS)) as writer:
            for sample in samples:
                writer.write(sample)
        files[layout] = sum(shard.stat().st_size for shard in writer.shards)
    field = next(name for name in samples[0] if name != "__key__")
    nbytes = sum(sample[field].nbytes for sample in samples)
    return Corpus(name, field, budget, folder, len(samples), nbytes, files)


def read_files(paths: list[str]) -> None:
    """The limit: read each whole file into memory."""
    for path in paths:
        Path(path).read_bytes()


def read_planned(data: ShardDataset, sampler: LengthBucketBatchSampler) -> None:
    """Read samples by index, one planned batch at a time."""
    for batch in sampler:
        data.__getitems__(batch)


def decode(corpus: Corpus) -> wds.WebDataset:
    """Read plain shards as in webdataset's README: one decoded sample after the other."""
    return wds.WebDataset(corpus.shards("plain"), shardshuffle=False).decode()


def sequences(corpus: Corpus) -> wds.WebDataset:
    """The same, as tuples of one array."""
    return decode(corpus).to_tuple(f"{corpus.field}.npy")


def plan(corpus: Corpus, data: ShardDataset) -> LengthBucketBatchSampler:
    """Batches of similar length."""
    return LengthBucketBatchSampler(data.index, max_tokens=corpus.budget)


def compare_reading(corpus: Corpus) -> Row:
    """Time every way to read all samples in one process."""
    calls: dict[str, Callable[[], object]] = {}
    for layout in ("blocks", "plain"):
        data = ShardDataset(corpus.folder / layout)
        sampler = plan(corpus, data)
        stream = ShardStream(corpus.folder / layout, collate_fn=list, max_tokens=corpus.budget)
        calls |= {
            f"ShardDataset, {layout}": lambda data=data, sampler=sampler: read_planned(data, sampler),
            f"ShardStream, {layout}": lambda stream=stream: run_through(stream),
            f"limit, {layout} files": lambda layout=layout: read_files(corpus.shards(layout)),
        }
    calls["webdataset"] = lambda: run_through(decode(corpus))
    row = compare(f"read {corpus.name}", "ShardDataset, blocks", calls, rounds=ROUNDS)
    show_rates(corpus, row)
    return row


def compare_indexing(corpus: Corpus) -> Row:
    """Time to find all lengths: from headers only, with checksums, or by decoding all samples."""
    plain, blocks = corpus.shards("plain"), corpus.shards("blocks")
    calls: dict[str, Callable[[], object]] = {
        "index, plain": lambda: LengthIndex.build(plain),
        "index, blocks": lambda: LengthIndex.build(blocks),
        "index, plain, checksums": lambda: LengthIndex.build(plain, checksums=True),
        "index, blocks, checksums": lambda: LengthIndex.build(blocks, checksums=True),
        "webdataset decodes": lambda: [len(sequence) for (sequence,) in sequences(corpus)],
    }
    return compare(f"lengths of {corpus.name}", "index, plain", calls, rounds=ROUNDS)


def pad(rows: list[tuple[Any]]) -> tuple[Tensor, Tensor]:
    """The usual collate function by hand: padded rows and their lengths."""
    sequences = [torch.from_numpy(row[0]) for row in rows]
    return pad_sequence(sequences, batch_first=True), torch.tensor([len(sequence) for sequence in sequences])


class SortByHand:
    """The usual bucketing stage by hand: sort a buffer, cut it by the budget, pad.

    Args:
        budget: Largest number of padded steps in a batch.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def __call__(self, source: Iterable[tuple[Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a stream of samples."""
        window: list[tuple[Any]] = []
        for sample in source:
            window.append(sample)
            if len(window) == BUFFER:
                yield from self.batches(window)
                window = []
        yield from self.batches(window)

    def batches(self, window: list[tuple[Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a window, longest first."""
        window.sort(key=lambda sample: len(sample[0]), reverse=True)
        first = 0
        while first < len(window):
            last = first + self.budget // len(window[first][0])
            yield pad(window[first:last])
            first = last


def compare_loaders(corpus: Corpus) -> Row:
    """From disk to padded batches, with two workers."""
    blocks, plain = (ShardDataset(corpus.folder / layout) for layout in ("blocks", "plain"))
    options: dict[str, Any] = {"collate_fn": PadCollator(), "num_workers": WORKERS}
    stream = ShardStream(corpus.folder / "blocks", collate_fn=PadCollator(), max_tokens=corpus.budget)
    rows = corpus.budget * corpus.samples // int(blocks.index.lengths.sum())
    by_hand = sequences(corpus).compose(SortByHand(corpus.budget))
    batched = sequences(corpus).batched(rows, collation_fn=pad)
    calls: dict[str, Callable[[], object]] = {
        "ShardDataset, blocks": lambda: run_through(DataLoader(blocks, batch_sampler=plan(corpus, blocks), **options)),
        "ShardDataset, plain": lambda: run_through(DataLoader(plain, batch_sampler=plan(corpus, plain), **options)),
        "ShardStream, blocks": lambda: run_through(DataLoader(stream, batch_size=None, num_workers=WORKERS)),
        "webdataset, sorted by hand": lambda: run_through(wds.WebLoader(by_hand, batch_size=None, num_workers=WORKERS)),
        "webdataset, batched": lambda: run_through(wds.WebLoader(batched, batch_size=None, num_workers=WORKERS)),
    }
    row = compare(f"disk to batches, {corpus.name}", "ShardDataset, blocks", calls, rounds=ROUNDS)
    show_rates(corpus, row)
    return row


def show_rates(corpus: Corpus, row: Row) -> None:
    """Print samples and megabytes per second."""
    print(f"\n{row.case}: {corpus.samples:,} samples, {corpus.nbytes / 1e6:,.0f} MB, files {corpus.files}")
    for name, microseconds in row.microseconds.items():
        seconds = microseconds / 1e6
        each = f"{microseconds / corpus.samples:>9.2f} us"
        print(f"    {name:<28}{each}{corpus.samples / seconds:>14,.0f} /s{corpus.nbytes / seconds / 1e6:>10,.0f} MB/s")
    print(flush=True)


def as_result(corpus: Corpus, row: Row) -> dict[str, Any]:
    """A case with its rates."""
    seconds = {name: microseconds / 1e6 for name, microseconds in row.microseconds.items()}
    return asdict(row) | {
        "samples": corpus.samples,
        "bytes": corpus.nbytes,
        "file bytes": corpus.files,
        "samples a second": {name: corpus.samples / each for name, each in seconds.items()},
        "bytes a second": {name: corpus.nbytes / each for name, each in seconds.items()},
    }


def find_bars(reading: Row, loading: Row, indexing: list[Row]) -> list[Bar]:
    """The targets against the faster way of webdataset, the measured figures, and whether they meet the targets."""
    found = [
        *bars_of(reading, ("ShardDataset, blocks", "ShardStream, blocks"), 30),
        *bars_of(loading, ("ShardDataset, blocks", "ShardStream, blocks"), 10),
    ]
    for row in indexing:
        found += bars_of(row, ("index, plain", "index, blocks"), 10)
    return found


def bars_of(row: Row, names: tuple[str, ...], least: float) -> list[Bar]:
    """The targets of our contenders in one case."""
    own = {name: 1.0 if name == row.ours else row.times_as_fast[name][1] for name in names}
    peer = min(times[1] for name, times in row.times_as_fast.items() if name.startswith("webdataset"))
    ratios = {name: peer / other for name, other in own.items()}
    return [(f"{row.case}: {name}", f"{least:.0f}x", f"{ratio:.1f}x", ratio >= least) for name, ratio in ratios.items()]


def main() -> None:
    """Print and save all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--samples", type=int, default=100_000, help="number of short sequences; there are a tenth as many long ones"
    )
    count = parser.parse_args().samples
    torch.set_num_threads(1)
    keep_pages()
    with tempfile.TemporaryDirectory() as folder:
        short = write("tokens, 30 x int64", list(tokens(count)), 8_192, Path(folder) / "tokens")
        long = write("frames, 200 x 16 float32", list(frames(count // 10)), 16_384, Path(folder) / "frames")
        corpora = {"tokens": short, "frames": long}
        reading = {name: compare_reading(corpus) for name, corpus in corpora.items()}
        indexing = {name: compare_indexing(corpus) for name, corpus in corpora.items()}
        loading = {name: compare_loaders(corpus) for name, corpus in corpora.items()}
    bars = find_bars(reading["tokens"], loading["tokens"], list(indexing.values()))
    show_bars(bars)
    cases = {"read": reading, "index": indexing, "disk to batches": loading}
    results = {
        kind: {name: as_result(corpora[name], row) for name, row in rows.items()} for kind, rows in cases.items()
    }
    save("shards", results | {"bars": bars})


if __name__ == "__main__":
    main()
