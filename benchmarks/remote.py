"""Reads of shards behind a slow network, next to bars and to other libraries.

    python benchmarks/remote.py [--latency 0.02] [--rate 50e6] [--repeat 3] [--peers ENVIRONMENTS] [--only NAME ...]

A web server and an S3 server (moto) on loopback, each in a process of its own, wait 20 ms before each answer and send
50 MB/s in each. The corpus is 20 shards with 8,000 short sequences of 3.8 kB on average. With faults, 2 % of requests
are dropped, 2 % answered with 503, and 0.5 % never. `--peers` is a folder of environments, `mosaicml` and `libraries`,
as `make bench-peers` makes them.
"""

import argparse
import json
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
from typing import Any

import numpy as np
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
# 2 % dropped, 2 % 503 and 0.5 % without an answer, by the number of the request.
FAULTS = {"drop": (50, 7), "503": (50, 31), "stall": (200, 90)}
# A server that answers within 20 ms is given up after a second.
TRANSPORT = Transport(timeout=1.0)


class Bench:
    """The corpus, its servers, and how slow they are."""

    def __init__(self, folder: Path, server: Faulty, store: ObjectStore, options: argparse.Namespace) -> None:
        self.folder, self.server, self.store, self.options = folder, server, store, options
        self.slow = {"latency": options.latency, "rate": options.rate}
        self.caches = 0

    def median(self, run: Callable[[], float]) -> float:
        """Of some runs."""
        return median(run() for _ in range(self.options.repeat))

    def cache(self) -> Path:
        """An empty folder."""
        self.caches += 1
        return self.folder / f"cache-{self.caches}"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=50e6, help="bytes a second of each answer, 0 for no limit")
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the median counts")
    parser.add_argument("--peers", type=Path, help="folder of environments with other libraries")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="some of the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "corpus")
        write_corpus(folder)
        with faulty(folder) as server, object_store() as store:
            bench = Bench(Path(name), server, store, options)
            with ShardWriter(store.url("ours"), max_samples=EACH) as writer:
                for sample in make_samples():
                    writer.write(sample)
            server.behave(**bench.slow)
            store.behave(**bench.slow)
            print(f"{options.latency * 1000:g} ms latency, {options.rate / 1e6:g} MB/s for each connection")
            for figure in options.only:
                begin = time.perf_counter()
                for line in FIGURES[figure](bench):
                    print(f"{figure:14} {line}", flush=True)
                print(f"{figure:14} ({time.perf_counter() - begin:.0f} s)", flush=True)


def make_samples() -> list[dict[str, Any]]:
    """Sequences of 100 to 850 int64 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 850, SHARDS * EACH).tolist()
    return [{"__key__": str(n), "tokens": rng.integers(0, 1000, length)} for n, length in enumerate(lengths)]


def write_corpus(folder: Path) -> None:
    """The shards, on this machine."""
    with ShardWriter(folder, max_samples=EACH) as writer:
        for sample in make_samples():
            writer.write(sample)


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


def by_index(bench: Bench) -> Iterable[str]:
    """Warm batches by index, without workers: alone, and along the plan of a sampler."""

    def alone() -> float:
        for batch in draw_batches(10, seed=2):
            list(dataset.__getitems__(batch))
        batches = draw_batches(40)
        return (
            len(batches) * BATCH / timed(lambda: sum(len(list(dataset.__getitems__(each))) for each in batches), 1000)
        )

    def along() -> float:
        return SHARDS * EACH / timed(lambda: sum(map(len, loader)))

    for name, url in (("HTTP", bench.server.url("shard.ltx")), ("S3", bench.store.url("ours/shard.ltx"))):
        dataset = ShardDataset(url, transport=TRANSPORT)
        rate = bench.median(alone)
        sampler = LengthBucketBatchSampler(dataset.index, batch_size=BATCH)
        followed = ShardDataset(url, transport=TRANSPORT).follow(sampler)
        loader = DataLoader(followed, batch_sampler=sampler, collate_fn=list)
        along()
        ahead = bench.median(along)
        yield f"{name}: {rate:,.0f} samples/s by any order, {ahead:,.0f} along the plan (bar: 1,000)"


def read_all(samples: list[Any]) -> int:
    """How many samples a batch has; they are read."""
    return len(list(samples))


def open_stream(url: str, **options: Any) -> ShardStream:
    """A stream with a window of 2,000 samples."""
    given = {"collate_fn": read_all, "batch_size": BATCH, "window": 2000, "transport": TRANSPORT}
    return ShardStream(url, **given | options)


def stream(bench: Bench) -> Iterable[str]:
    """A whole epoch over HTTP, next to a plain loop of ranged GETs with as many connections."""
    transport = Transport(timeout=1.0, connections=CONNECTIONS)
    url = bench.server.url("shard.ltx")
    plain = bench.median(lambda: plain_loop(bench))
    epochs = open_stream(url, transport=transport)
    ours = bench.median(lambda: timed(lambda: sum(epochs)))
    before = epochs.transfers
    bench.server.log()
    sum(epochs)
    log, after = bench.server.log(), epochs.transfers
    size = sum(path.stat().st_size for path in (bench.folder / "corpus").glob("*.tar"))
    reference = f"a plain loop of GETs with {CONNECTIONS} connections ({plain:.2f} s)"
    yield f"{ours:.2f} s, {plain / ours:.0%} of the speed of {reference} (bar: 90 %)"
    more = (after["bytes"] - before["bytes"]) / size - 1
    yield f"{len(log) / SHARDS:.1f} requests for a shard (bar: 3), {more:.1%} bytes over those needed (bar: 5 %)"


def plain_loop(bench: Bench) -> float:
    """Seconds of threads that fetch ranges of 1 MiB, each with its connection."""
    host = bench.server.root.removeprefix("http://")
    sizes = {path.name: path.stat().st_size for path in (bench.folder / "corpus").glob("*.tar")}
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


def peers(bench: Bench) -> Iterable[str]:
    """Whole epochs from the S3 server, next to other libraries; the second ones from a cache."""
    found: dict[str, list[float]] = {}
    for workers in (0, 2):
        for name, environment in {"mosaicml": "mosaicml", "litdata": "libraries"}.items():
            if bench.options.peers is not None:
                found[f"{name}, {workers} workers"] = run_peer(bench, name, bench.options.peers / environment, workers)
        epochs = open_stream(bench.store.url("ours/shard.ltx"), cache=bench.cache(), interleave=max(1, workers))
        loader = DataLoader(epochs, batch_size=None, num_workers=workers)
        found[f"ours, {workers} workers"] = [timed(partial(sum, loader)) for _ in range(2)]
    for name, (first, second) in found.items():
        rates = [SHARDS * EACH / seconds for seconds in (first, second)]
        yield f"{name}: {rates[0]:,.0f} samples/s in the first epoch, {rates[1]:,.0f} in the second, from its cache"


def run_peer(bench: Bench, name: str, environment: Path, workers: int) -> list[float]:
    """Seconds of two epochs of another library."""
    samples = [sample["tokens"] for sample in make_samples()]
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


def cached(bench: Bench) -> Iterable[str]:
    """The second epoch from the cache, next to local shards."""
    epochs = open_stream(bench.server.url("shard.ltx"), cache=bench.cache())
    sum(epochs)
    local = open_stream(str(bench.folder / "corpus"))
    sum(local)
    bench.server.log()
    seconds = bench.median(lambda: timed(lambda: sum(epochs)))
    requests = len(bench.server.log())
    reference = bench.median(lambda: timed(lambda: sum(local)))
    yield f"{requests} requests, {reference / seconds:.2f} of the speed of local shards (bar: 0, 0.8)"


def stall(bench: Bench) -> Iterable[str]:
    """How long a loop waits for batches next to training steps of 50 ms."""
    for name, loader in (
        ("stream in a thread", ReadAheadLoader(open_stream(bench.server.url("shard.ltx")), batch_size=None)),
        ("stream, one worker", DataLoader(open_stream(bench.server.url("shard.ltx")), batch_size=None, num_workers=1)),
        ("by index in a thread", follow(bench)),
    ):
        iterator, waited, steps = iter(loader), 0.0, 0
        next(iterator)
        while steps < 200:
            time.sleep(0.05)
            begin = time.perf_counter()
            next(iterator)
            waited += time.perf_counter() - begin
            steps += 1
        yield f"{name}: {waited / (steps * 0.05):.2%} of the time of {steps} steps (bar: 2 %)"


def follow(bench: Bench) -> Iterable[Any]:
    """Batches by index along the plan, made in a thread."""
    dataset = ShardDataset(bench.server.url("shard.ltx"), transport=TRANSPORT)
    sampler = LengthBucketBatchSampler(dataset.index, batch_size=BATCH)
    return ReadAheadLoader(dataset.follow(sampler), batch_sampler=sampler, collate_fn=read_all)


def faults(bench: Bench) -> Iterable[str]:
    """Every job with and without faults."""
    url, shards = bench.server.url("shard.ltx"), bench.server.url("shard-{000000..000019}.tar")

    def stream_epoch(workers: int) -> int:
        epochs = open_stream(url, interleave=max(1, workers))
        return int(sum(DataLoader(epochs, batch_size=None, num_workers=workers)))

    def build_index(workers: int) -> int:
        return len(LengthIndex.build(shards, workers=workers, transport=TRANSPORT))

    def read_by_index(workers: int) -> int:
        dataset = ShardDataset(url, transport=TRANSPORT)
        sampler = LengthBucketBatchSampler(dataset.index, batch_size=BATCH)
        loader = DataLoader(dataset.follow(sampler), batch_sampler=sampler, collate_fn=read_all, num_workers=workers)
        return int(sum(loader))

    for name, job in {"stream": stream_epoch, "index": build_index, "by index": read_by_index}.items():
        for workers in (0, 2):
            times = []
            for manner in (bench.slow, bench.slow | {"every": FAULTS}):

                def run(manner: dict[str, Any] = manner, workers: int = workers, job: Any = job) -> float:
                    bench.server.behave(**manner)
                    return timed(lambda: job(workers))

                times.append(bench.median(run))
            bench.server.behave(**bench.slow)
            clean, bad = times
            yield f"{name}, {workers} workers: {clean:.2f} s, with faults {bad:.2f} s: {bad / clean:.2f} (bar: 1.3)"


def memory(bench: Bench) -> Iterable[str]:
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
    window = 5 * 1.5
    for ahead in (0, 3 << 20, 1 << 26):
        command = [sys.executable, "-c", script, bench.server.url("shard.ltx"), str(ahead)]
        before, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        yield f"{(after - before) / 1024:.0f} MiB with read_ahead_bytes of {ahead >> 20} MiB; a window is {window:g} MB"


def start(bench: Bench) -> Iterable[str]:
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
        yield f"{opened:.2f} s and {requests} requests, {first:.2f} s with the first sample (bar: 2 s, 5)"


FIGURES: dict[str, Callable[[Bench], Iterable[str]]] = {
    "by-index": by_index,
    "stream": stream,
    "peers": peers,
    "cached": cached,
    "stall": stall,
    "faults": faults,
    "memory": memory,
    "start": start,
}

if __name__ == "__main__":
    main()
