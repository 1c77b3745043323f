"""Reads of shards behind a slow network, next to bars and to other libraries.

    python benchmarks/remote.py [--latency 0.02 0.05] [--repeat 3] [--peers ENVIRONMENTS] [--only NAME ...] [--again]

A web server and an S3 server (moto) on loopback, each in a process of its own, wait 20 ms before each answer and send
50 MB/s in each. The corpus is 20 shards with 8,000 short sequences of 3.8 kB on average; streams read four times as
many shards. With faults, 2 % of requests are dropped, 2 % answered with 503, and 0.5 % never. What is compared is run
in turn, and a ratio is the median of those of each round. `--peers` is a folder of environments, `mosaicml` and
`libraries`, as `make bench-peers` makes them.

Each figure goes to `benchmarks/results/remote.json` as soon as it is there, with the load of the machine before it. A
run that was stopped is started again with the same command, and measures the others. `--again` forgets all.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias, TypeVar

import aiohttp
import numpy as np
from harness import RESULTS, save
from torch.utils.data import DataLoader

from samplers import (
    LengthBucketBatchSampler,
    LengthIndex,
    ReadAheadLoader,
    ShardDataset,
    ShardStream,
    ShardWriter,
    Transport,
)
from samplers.shards.indexing.index import tables_of
from samplers.shards.indexing.tables import join_tables

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from faulty import Faulty, faulty
from object_store import ObjectStore, object_store

SHARDS, EACH, BATCH, CONNECTIONS = 20, 400, 25, 8
# Of the corpus that streams read: an epoch of 20 shards is over before the first window is used.
LONG = 80
# Bytes of a window of 2,000 samples.
WINDOW = 7_600_000
# 2 % dropped, 2 % 503 and 0.5 % without an answer, by the number of the request.
FAULTS = {"drop": (50, 7), "503": (50, 31), "stall": (200, 90)}
# A server that answers within 20 ms is given up after a second.
TRANSPORT = Transport(timeout=1.0)
# Name, bar, what was measured, and whether it meets the bar; None where there is none.
Figures: TypeAlias = Iterable[tuple[str, str, str, bool | None]]
Measured = TypeVar("Measured")


class Bench:
    """The corpora, their servers, and how slow they are."""

    def __init__(self, folder: Path, server: Faulty, store: ObjectStore, options: argparse.Namespace) -> None:
        self.folder, self.server, self.store, self.options = folder, server, store, options
        self.slow: dict[str, Any] = {}
        self.caches = 0

    def slow_down(self, latency: float) -> None:
        """Wait that long before each answer from now on."""
        self.slow = {"latency": latency, "rate": self.options.rate}
        self.server.behave(**self.slow)
        self.store.behave(**self.slow, keep=True)

    def url(self, name: str, corpus: str = "corpus") -> str:
        """A file of a corpus on the web server."""
        return self.server.url(f"{corpus}-{name}")

    def median(self, run: Callable[[], float]) -> float:
        """Of some runs."""
        return median(run() for _ in range(self.options.repeat))

    def in_turn(self, *runs: Callable[[], Measured]) -> list[tuple[Measured, ...]]:
        """What each run gives, round by round; every second round has the other order."""
        rounds = []
        for turn in range(self.options.repeat):
            order = list(range(len(runs)))[:: -1 if turn % 2 else 1]
            found = {number: runs[number]() for number in order}
            rounds.append(tuple(found[number] for number in range(len(runs))))
        return rounds

    def cache(self) -> Path:
        """An empty folder."""
        self.caches += 1
        return self.folder / f"cache-{self.caches}"


def main() -> None:
    """Measure what is missing, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, nargs="+", default=[0.02, 0.05], help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=50e6, help="bytes a second of each answer, 0 for no limit")
    parser.add_argument("--repeat", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--peers", type=Path, help="folder of environments with other libraries")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="some of the figures")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before")
    options = parser.parse_args()
    results: dict[str, Any] = {} if options.again else former()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "corpora")
        for prefix, shards in (("corpus", SHARDS), ("long", LONG)):
            write_corpus(folder, prefix, shards)
        with faulty(folder) as server, object_store() as store:
            with ShardWriter(store.url("ours"), max_samples=EACH) as writer:
                for sample in make_samples(SHARDS):
                    writer.write(sample)
            bench = Bench(Path(name), server, store, options)
            for latency in options.latency:
                bench.slow_down(latency)
                for figure in options.only:
                    # Where the latency makes no difference, one is enough.
                    if figure not in ONCE or latency == options.latency[0]:
                        measure(bench, figure, results.setdefault(f"{latency * 1000:g} ms", {}), results)


def former() -> dict[str, Any]:
    """What was measured before."""
    path = RESULTS / "remote.json"
    return dict(json.loads(path.read_text())["results"]) if path.exists() else {}


def measure(bench: Bench, figure: str, measured: dict[str, Any], results: dict[str, Any]) -> None:
    """Measure a figure that is missing, print it and keep it."""
    if figure not in measured:
        begin, load = time.perf_counter(), round(os.getloadavg()[0], 1)
        bars = [list(line) for line in FIGURES[figure](bench)]
        measured[figure] = {"bars": bars, "load": load, "seconds": round(time.perf_counter() - begin)}
        save("remote", results)
    facts = measured[figure]
    for name, bar, value, meets in facts["bars"]:
        judged = {True: "yes", False: "NO", None: ""}[meets]
        print(f"{bench.slow['latency'] * 1000:g} ms  {name:<40} {value:<50} {bar:<16} {judged}", flush=True)
    print(f"        ({figure}: {facts['seconds']} s, load {facts['load']})", flush=True)


def make_samples(shards: int) -> list[dict[str, Any]]:
    """Sequences of 100 to 850 int64 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 850, shards * EACH).tolist()
    return [{"__key__": str(n), "tokens": rng.integers(0, 1000, length)} for n, length in enumerate(lengths)]


def write_corpus(folder: Path, prefix: str, shards: int) -> None:
    """The shards, on this machine: `PREFIX-000000.tar`, and `PREFIX-shard.ltx`."""
    with ShardWriter(folder, max_samples=EACH, prefix=prefix) as writer:
        for sample in make_samples(shards):
            writer.write(sample)
    (folder / f"{prefix}.ltx").rename(folder / f"{prefix}-shard.ltx")


def timed(run: Callable[[], int], expected: int = SHARDS * EACH) -> float:
    """Seconds of a job that reads `expected` samples."""
    begin = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - begin
    if found != expected:
        raise RuntimeError(f"{found} samples were read, {expected} are there")
    return seconds


def draw_batches(count: int, seed: int = 1) -> list[list[int]]:
    """Batches of random samples."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SHARDS * EACH, BATCH).tolist() for _ in range(count)]


def by_index(bench: Bench) -> Figures:
    """Batches by index, without workers: in any order next to a plain loop of GETs, and along a sampler's plan."""
    urls = {"HTTP": bench.url("shard.ltx"), "S3": bench.store.url("ours/shard.ltx")}
    for name, url in urls.items():
        dataset = ShardDataset(url, transport=TRANSPORT)
        for batch in draw_batches(10, seed=2):
            list(dataset.__getitems__(batch))

        def alone(dataset: ShardDataset = dataset) -> float:
            batches = draw_batches(40)
            return timed(lambda: sum(len(list(dataset.__getitems__(each))) for each in batches), 40 * BATCH)

        rounds = bench.in_turn(alone, lambda: asyncio.run(plain_batches(bench)))
        rate = 40 * BATCH / median(ours for ours, _ in rounds)
        yield f"{name}, any order, samples/s", "1,000", f"{rate:,.0f}", rate >= 1000
        if name == "HTTP":
            share = median(plain / ours for ours, plain in rounds)
            plain = 40 * BATCH / median(plain for _, plain in rounds)
            yield "as fast as a plain loop of aiohttp", "", f"{share:.0%} of {plain:,.0f}/s", None
        sampler = LengthBucketBatchSampler(dataset.index, batch_size=BATCH, indices=range(SHARDS * EACH // 2))
        followed = ShardDataset(url, transport=TRANSPORT).follow(sampler)
        loader = DataLoader(followed, batch_sampler=sampler, collate_fn=list)
        sum(map(len, loader))
        seconds = bench.median(lambda loader=loader: timed(lambda: sum(map(len, loader)), SHARDS * EACH // 2))
        rate = SHARDS * EACH / 2 / seconds
        yield f"{name}, along the plan, samples/s", "1,000", f"{rate:,.0f}", rate >= 1000


async def plain_batches(bench: Bench) -> float:
    """Seconds in which aiohttp alone gets 40 times as many ranges at once as a batch has samples."""
    rng = np.random.default_rng(3)
    async with aiohttp.ClientSession() as session:

        async def get() -> int:
            first = int(rng.integers(1_000_000))
            headers = {"Range": f"bytes={first}-{first + 3799}"}
            url = bench.url(f"{int(rng.integers(SHARDS)):06}.tar")
            async with session.get(url, headers=headers) as answer:
                return len(await answer.read())

        await asyncio.gather(*[get() for _ in range(BATCH)])
        begin = time.perf_counter()
        for _ in range(40):
            await asyncio.gather(*[get() for _ in range(BATCH)])
        return time.perf_counter() - begin


def read_all(samples: list[Any]) -> int:
    """How many samples a batch has; they are read."""
    return len(list(samples))


def open_stream(url: str, **options: Any) -> ShardStream:
    """A stream with a window of 2,000 samples."""
    given = {"collate_fn": read_all, "batch_size": BATCH, "window": 2000, "transport": TRANSPORT}
    return ShardStream(url, **given | options)


def stream(bench: Bench) -> Figures:
    """A whole epoch over HTTP, next to a plain loop of ranged GETs with as many connections."""
    epochs = open_stream(bench.url("shard.ltx", "long"), transport=Transport(timeout=1.0, connections=CONNECTIONS))
    sum(epochs)
    plain_loop(bench)
    rounds = bench.in_turn(lambda: timed(lambda: sum(epochs), LONG * EACH), lambda: plain_loop(bench))
    before = epochs.transfers
    bench.server.log()
    sum(epochs)
    log, after = bench.server.log(), epochs.transfers
    size = sum(path.stat().st_size for path in (bench.folder / "corpora").glob("long-*.tar"))
    share = median(plain / ours for ours, plain in rounds)
    ours, plain = (median(each) for each in zip(*rounds, strict=True))
    yield (
        f"as fast as plain GETs, {CONNECTIONS} connections",
        "90 %",
        f"{share:.0%} ({ours:.2f}, {plain:.2f} s)",
        share >= 0.9,
    )
    requests, more = len(log) / LONG, (after["bytes"] - before["bytes"]) / size - 1
    yield "requests for a shard", "3", f"{requests:.2f}", requests <= 3
    yield "bytes over those needed", "5 %", f"{more:.1%}", more <= 0.05


def plain_loop(bench: Bench) -> float:
    """Seconds of threads that fetch ranges of 2 MiB, each with its connection."""
    host = bench.server.root.removeprefix("http://")
    sizes = {path.name: path.stat().st_size for path in (bench.folder / "corpora").glob("long-*.tar")}
    ranges = [
        (name, first, min(first + (1 << 21), size)) for name, size in sizes.items() for first in range(0, size, 1 << 21)
    ]
    connections = [HTTPConnection(host) for _ in range(CONNECTIONS)]

    def fetch(number: int) -> int:
        size = 0
        for name, first, end in ranges[number::CONNECTIONS]:
            connections[number].request("GET", f"/files/{name}", headers={"Range": f"bytes={first}-{end - 1}"})
            size += len(connections[number].getresponse().read())
        return size

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return timed(lambda: sum(pool.map(fetch, range(CONNECTIONS))), sum(sizes.values()))


def peers(bench: Bench) -> Figures:
    """Whole epochs from the S3 server, next to other libraries; the second ones from a cache."""
    environments = {"mosaicml": "mosaicml", "litdata": "libraries"} if bench.options.peers is not None else {}
    for workers in (0, 2):
        jobs = [partial(stream_from_store, bench, workers)]
        jobs += [partial(run_peer, bench, name, folder, workers) for name, folder in environments.items()]
        rounds = bench.in_turn(*jobs)
        firsts, seconds = ([[times[epoch] for times in turn] for turn in rounds] for epoch in (0, 1))
        for number, name in enumerate(("ours", *environments)):
            # A library that fails has taken forever.
            rates = [SHARDS * EACH / median(turn[number] for turn in epoch) for epoch in (firsts, seconds)]
            told = " ".join(f"{rate:,.0f}" if rate else "failed" for rate in rates)
            bar, meets = "", None
            if number == 0 and environments:
                ratio = median(min(others) / ours for ours, *others in firsts)
                told += f", the first {ratio:.1f} x"
                # Ahead of a library that fails is nobody.
                ahead = [rival / ours for ours, rival, *_ in seconds if rival < float("inf")]
                bar = "2 x, ahead" if ahead else "2 x"
                meets = ratio >= 2 and (not ahead or median(ahead) > 1)
            yield f"{name}, {workers} workers, both epochs, samples/s", bar, told, meets


def stream_from_store(bench: Bench, workers: int) -> list[float]:
    """Seconds of two epochs of ours, with an empty cache before the first."""
    epochs = open_stream(bench.store.url("ours/shard.ltx"), cache=bench.cache(), interleave=max(1, workers))
    loader = DataLoader(epochs, batch_size=None, num_workers=workers)
    return [timed(partial(sum, loader)) for _ in range(2)]


def run_peer(bench: Bench, name: str, folder: str, workers: int) -> list[float]:
    """Seconds of two epochs of another library, in its environment."""
    environment = bench.options.peers / folder
    samples = [sample["tokens"] for sample in make_samples(SHARDS)]
    target = bench.cache()
    target.mkdir()
    np.savez(target / "tokens.npz", tokens=np.concatenate(samples), lengths=[len(sample) for sample in samples])
    command = [environment / "bin" / "python", Path(__file__).with_name("remote_peer.py")]
    done = subprocess.run(
        [*command, name, target / "tokens.npz", target, str(workers)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        print(f"{name} failed:", done.stderr.strip().splitlines()[-1:], flush=True)
        return [float("inf"), float("inf")]
    return list(json.loads(done.stdout.splitlines()[-1]))


def cached(bench: Bench) -> Figures:
    """The second epoch from the cache, next to local shards."""
    epochs = open_stream(bench.url("shard.ltx", "long"), cache=bench.cache())
    local = open_stream(str(bench.folder / "corpora" / "long-shard.ltx"))
    for each in (epochs, local):
        sum(each)
    bench.server.log()
    rounds = bench.in_turn(*(lambda each=each: timed(lambda: sum(each), LONG * EACH) for each in (epochs, local)))
    requests, share = len(bench.server.log()), median(reference / seconds for seconds, reference in rounds)
    yield "second epoch, requests", "0", str(requests), requests == 0
    yield "second epoch, of the speed of local shards", "0.8", f"{share:.2f}", share >= 0.8
    # By index, a cache keeps whole shards too: the first batch waits for those of its samples.
    for name, options in {"ranges": {}, "whole shards": {"cache": bench.cache()}}.items():
        dataset = ShardDataset(bench.url("shard.ltx"), transport=TRANSPORT, **options)
        begin = time.perf_counter()
        list(dataset.__getitems__(draw_batches(1)[0]))
        first = time.perf_counter() - begin
        for batch in draw_batches(79, seed=5):
            list(dataset.__getitems__(batch))
        seconds = time.perf_counter() - begin
        told = f"{first:.2f} s, {seconds:.2f} s, {dataset.transfers['bytes'] / 1e6:.0f} MB"
        yield f"by index from {name}: 1 batch, 80, bytes", "", told, None


def stall(bench: Bench) -> Figures:
    """How long a loop waits for batches next to training steps of 50 ms, after the first ten, and in all of them."""
    url = bench.url("shard.ltx", "long")
    for name, loader in (
        ("stream in a thread", ReadAheadLoader(open_stream(url), batch_size=None)),
        ("stream, one worker", DataLoader(open_stream(url), batch_size=None, num_workers=1)),
        ("by index in a thread", follow(bench)),
    ):
        iterator, waits = iter(loader), []
        next(iterator)
        for _ in range(110):
            time.sleep(0.05)
            begin = time.perf_counter()
            next(iterator)
            waits.append(time.perf_counter() - begin)
        share, whole = sum(waits[10:]) / (100 * 0.05), sum(waits) / (110 * 0.05)
        told = f"{share:.2%} ({whole:.2%} with the first ten)"
        yield f"waiting next to steps of 50 ms, {name}", "2 %", told, share <= 0.02


def follow(bench: Bench) -> Iterable[Any]:
    """Batches by index along the plan, made in a thread."""
    dataset = ShardDataset(bench.url("shard.ltx"), transport=TRANSPORT)
    sampler = LengthBucketBatchSampler(dataset.index, batch_size=BATCH)
    return ReadAheadLoader(dataset.follow(sampler), batch_sampler=sampler, collate_fn=read_all)


def faults(bench: Bench) -> Figures:
    """Every job with and without faults, in turn."""
    # Whole epochs: in a job of less than a second, one stall among the first requests would be all that counts.
    shards, part = bench.url("{000000..000079}.tar", "long"), SHARDS * EACH

    def stream_epoch(workers: int) -> float:
        epochs = open_stream(bench.url("shard.ltx", "long"), interleave=max(1, workers))
        loader = DataLoader(epochs, batch_size=None, num_workers=workers)
        return timed(lambda: int(sum(loader)), LONG * EACH)

    def build_index(workers: int) -> float:
        return timed(lambda: len(LengthIndex.build(shards, workers=workers, transport=TRANSPORT)), LONG * EACH)

    def read_by_index(workers: int) -> float:
        dataset = ShardDataset(bench.url("shard.ltx"), transport=TRANSPORT)
        sampler = LengthBucketBatchSampler(dataset.index, batch_size=BATCH, indices=range(part))
        loader = DataLoader(dataset.follow(sampler), batch_sampler=sampler, collate_fn=read_all, num_workers=workers)
        return timed(lambda: int(sum(loader)), part)

    def run(job: Callable[[int], float], workers: int, manner: dict[str, Any]) -> float:
        bench.server.behave(**manner)
        try:
            return job(workers)
        finally:
            bench.server.behave(**bench.slow)

    bad = bench.slow | {"every": FAULTS}
    for name, job in {"stream": stream_epoch, "index": build_index, "by index": read_by_index}.items():
        for workers in (0, 2):
            rounds = bench.in_turn(*(partial(run, job, workers, manner) for manner in (bench.slow, bad)))
            ratio = median(after / before for before, after in rounds)
            clean, late = (median(each) for each in zip(*rounds, strict=True))
            told = f"{ratio:.2f} x ({clean:.2f}, {late:.2f} s)"
            yield f"with faults, {name}, {workers} workers", "1.3 x", told, ratio <= 1.3


def memory(bench: Bench) -> Figures:
    """The peak of a process that streams, over that of one that opens the corpus alone."""
    script = (
        "import pathlib, sys; from samplers import ShardStream\n"
        "options = {'batch_size': 25, 'window': 2000, 'read_ahead_bytes': int(sys.argv[2])}\n"
        "stream = ShardStream(sys.argv[1], collate_fn=len, **options)\n"
        "now = lambda name: int(pathlib.Path('/proc/self/status').read_text().split(name)[1].split()[0])\n"
        "next(iter(ShardStream(sys.argv[1], collate_fn=len, **options | {'window': 1, 'read_ahead_bytes': 0})))\n"
        "pathlib.Path('/proc/self/clear_refs').write_text('5')\n"
        "print(now('VmRSS:')); sum(stream); print(now('VmHWM:'))"
    )
    for ahead in (0, 3 << 20, 1 << 26):
        command = [sys.executable, "-c", script, bench.url("shard.ltx", "long"), str(ahead)]
        before, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        peak, limit = (after - before) * 1024, ahead + 2 * WINDOW
        told, bar = f"{peak / 1e6:.0f} MB", f"{limit / 1e6:.0f} MB"
        yield f"memory, read_ahead_bytes of {ahead / 1e6:.0f} MB", f"{bar} (+ 2 windows)", told, peak <= limit


def start(bench: Bench) -> Figures:
    """Opening 10,000 remote shards by their corpus file, and the first batch."""
    folder = bench.folder / "many"
    with ShardWriter(folder) as writer:
        writer.write({"__key__": "k", "tokens": np.arange(9)})
    # An index of 10,000 shards, of which the first exists.
    tables = tables_of(LengthIndex.open(folder / "shard.ltx"))
    paths = [str(folder / f"shard-{number:06}.tar") for number in range(10_000)]
    shards = [replace(tables, shards=(replace(tables.shards[0], path=path),)) for path in paths]
    LengthIndex(join_tables(shards)).save(folder / "shard.ltx")
    with faulty(folder, **bench.slow) as server:
        begin = time.perf_counter()
        dataset = ShardDataset(server.url("shard.ltx"), transport=TRANSPORT)
        opened, requests = time.perf_counter() - begin, len(server.log())
        dataset[0]
        first = time.perf_counter() - begin
        told = f"{opened:.2f} s, {requests} requests, {first:.2f} s with a sample"
        yield "start of 10,000 shards", "2 s, 5 requests", told, opened <= 2 and requests <= 5


# Those in which the latency makes no difference, or a small one.
ONCE = frozenset(["peers", "cached", "memory", "start"])
FIGURES: dict[str, Callable[[Bench], Figures]] = {
    "by-index": by_index,
    "stream": stream,
    "stall": stall,
    "faults": faults,
    "cached": cached,
    "memory": memory,
    "start": start,
    "peers": peers,
}

if __name__ == "__main__":
    main()
