"""Reads of shards behind a slow network: batches by index, and three jobs with and without faults.

    python benchmarks/remote.py [--latency 0.02] [--rate 50e6] [--repeat 3]

A server on loopback, in a process of its own, waits 20 ms before each answer and sends 50 MB/s in each. The corpus is
20 shards with 8,000 short sequences of 3.8 kB on average. With faults, 2 % of requests are dropped, 2 % answered with
503, and 0.5 % never. It runs on a former version too, which has no `Transport`, and then leaves out the faults.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import samplers
from samplers import LengthIndex, ShardDataset, ShardStream, ShardWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from faulty import Faulty, faulty

SHARDS, EACH, BATCH = 20, 400, 25
# 2 % dropped, 2 % 503 and 0.5 % without an answer, by the number of the request.
FAULTS = {"drop": (50, 7), "503": (50, 31), "stall": (200, 90)}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=50e6, help="bytes a second of each answer, 0 for no limit")
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the median counts")
    options = parser.parse_args()
    slow = {"latency": options.latency, "rate": options.rate}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        with faulty(folder, **slow) as server:
            print(f"{options.latency * 1000:g} ms latency, {options.rate / 1e6:g} MB/s for each connection")
            rates = [samples_per_second(server) for _ in range(options.repeat)]
            print(f"by index, batches of {BATCH} over {SHARDS} shards, no workers: {median(rates):,.0f} samples/s")
            for job, run in JOBS.items():
                clean = median(seconds(server, run, slow) for _ in range(options.repeat))
                line = f"{job:24} without faults {clean:6.2f} s"
                if hasattr(samplers, "Transport"):
                    bad = median(seconds(server, run, slow | {"every": FAULTS}) for _ in range(options.repeat))
                    line += f", with faults {bad:6.2f} s, ratio {bad / clean:.2f}"
                print(line, flush=True)


def write_corpus(folder: Path) -> None:
    """Sequences of 100 to 850 int64 tokens."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, max_samples=EACH) as writer:
        for number in range(SHARDS * EACH):
            tokens = rng.integers(0, 1000, int(rng.integers(100, 850)))
            writer.write({"__key__": str(number), "tokens": tokens})


def patience() -> dict[str, Any]:
    """A server that answers within 20 ms is given up after half a second."""
    return {"transport": samplers.Transport(timeout=0.5)} if hasattr(samplers, "Transport") else {}


def draw_batches(count: int, seed: int = 1) -> list[list[int]]:
    """Batches of random samples."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SHARDS * EACH, BATCH).tolist() for _ in range(count)]


def samples_per_second(server: Faulty) -> float:
    """Of warm batches by index, without workers."""
    dataset = ShardDataset(server.url("shard.ltx"), **patience())
    for batch in draw_batches(10, seed=2):
        list(dataset.__getitems__(batch))
    batches = draw_batches(40)
    begin = time.perf_counter()
    for batch in batches:
        list(dataset.__getitems__(batch))
    return len(batches) * BATCH / (time.perf_counter() - begin)


def seconds(server: Faulty, run: Callable[[Faulty], None], manner: dict[str, Any]) -> float:
    """How long a job takes with a server of this manner."""
    server.behave(**manner)
    begin = time.perf_counter()
    run(server)
    return time.perf_counter() - begin


def stream_epoch(server: Faulty) -> None:
    """An epoch of a stream."""
    stream = ShardStream(server.url("shard.ltx"), collate_fn=len, max_tokens=20_000, **patience())
    check(sum(stream), SHARDS * EACH)


def build_index(server: Faulty) -> None:
    """An index of all shards."""
    check(len(LengthIndex.build(server.url("shard-{000000..000019}.tar"), **patience())), SHARDS * EACH)


def read_batches(server: Faulty) -> None:
    """40 batches by index, the first ones too."""
    dataset = ShardDataset(server.url("shard.ltx"), **patience())
    check(sum(len(list(dataset.__getitems__(batch))) for batch in draw_batches(40)), 40 * BATCH)


def check(found: int, expected: int) -> None:
    """Stop if samples are missing."""
    if found != expected:
        raise RuntimeError(f"{found} samples were read, {expected} are there")


JOBS: dict[str, Callable[[Faulty], None]] = {
    "epoch of a stream": stream_epoch,
    "index build": build_index,
    "40 batches by index": read_batches,
}

if __name__ == "__main__":
    main()
