"""The batch sampler on memory-mapped lengths, from a million to a billion: times and memory."""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from harness import save

from samplers import LengthBucketBatchSampler

BUDGET: Final = 20_000
SIZES: Final = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
# Sorting needs about 20 bytes per sample in addition to the order.
MOST_SORTED: Final = 100_000_000
CHUNK: Final = 1 << 24
# Odd and not a multiple of 5: multiplication by it permutes the numbers below any power of ten.
STRIDE: Final = 618_033_989


@dataclass(frozen=True, eq=False)
class Ranked:
    """Lengths on disk with their order, as in a `LengthIndex`."""

    lengths: npt.NDArray[Any]
    order: npt.NDArray[Any]
    fingerprint: str


def write_corpus(folder: Path, samples: int) -> None:
    """Write speech-like `lengths` uint16 and their `order` int32, longest first, without sorting."""
    rng = np.random.default_rng(0)
    quantiles = np.sort(np.clip(np.round(rng.lognormal(np.log(450), 0.6, 1 << 20)), 50, 3_000))[::-1]
    back = pow(STRIDE, -1, samples)
    with (folder / "lengths").open("wb") as lengths, (folder / "order").open("wb") as order:
        for first in range(0, samples, CHUNK):
            numbers = np.arange(first, min(first + CHUNK, samples))
            # The sorted index of a sample, and the sample at a sorted index.
            ranks, standing = (multiply(numbers, factor % samples, samples) for factor in (STRIDE, back))
            quantiles[ranks * len(quantiles) // samples].astype(np.uint16).tofile(lengths)
            standing.astype(np.int32).tofile(order)


def multiply(numbers: npt.NDArray[np.int64], factor: int, modulus: int) -> npt.NDArray[np.int64]:
    """`numbers * factor % modulus`, for numbers and factors below a billion."""
    return numbers * factor % modulus


def probe(folder: Path, *, sorts: bool) -> dict[str, float]:
    """Milliseconds of a sampler's calls on mapped lengths, and memory in MiB, in a separate process.

    Args:
        folder: Folder of `lengths` and `order`.
        sorts: Whether the sampler must sort the lengths.
    """
    lengths: Any = np.memmap(folder / "lengths", np.uint16, "r")
    if not sorts:
        lengths = Ranked(lengths, np.memmap(folder / "order", np.int32, "r"), "1")
    # Otherwise a garbage collection of all imported objects may run during the timing.
    gc.freeze()
    found = {"own before": memory("RssAnon")}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        answer = call()
        found[name] = 1000 * (time.perf_counter() - start)
        return answer

    planner = timed("construct", lambda: LengthBucketBatchSampler(lengths, max_tokens=BUDGET))
    steps = timed("len", lambda: len(planner))
    timed("first batch", lambda: next(iter(planner)))
    position = timed("position, digest", lambda: planner.position(steps * 9 // 10))
    timed("seek, batch", lambda: resume(planner, position))
    return found | {"own after": memory("RssAnon"), "peak with mapped pages": memory("VmHWM")}


def resume(planner: LengthBucketBatchSampler, position: dict[str, int | str]) -> list[int]:
    """The first batch after a position."""
    planner.seek(position)
    return next(iter(planner))


def memory(kind: str) -> float:
    """Memory of this process in MiB: `"RssAnon"` is private, `"VmHWM"` is the peak, including pages of mapped files."""
    # `getrusage` would give the peak of the parent, which a process inherits when it starts another program.
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) / 1024


def run_probe(folder: str, kind: str) -> dict[str, float]:
    """The result of a probe."""
    command = [sys.executable, __file__, folder, kind]
    answer = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return dict(json.loads(answer))


def main() -> None:
    """Print and save times in ms and memory in MiB for each size."""
    if len(sys.argv) == 3:
        print(json.dumps(probe(Path(sys.argv[1]), sorts=sys.argv[2] == "sorts")))
        return
    results: list[dict[str, Any]] = []
    for samples in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder), samples)
            for kind in ("sorts", "order on disk"):
                if kind == "sorts" and samples > MOST_SORTED:
                    continue
                # The first turn loads the files: the figures are for a warm map.
                run_probe(folder, kind)
                results.append({"samples": samples, "kind": kind} | run_probe(folder, kind))
                row = results[-1]
                cells = "".join(f"  {name} {row[name]:,.2f}" for name in row if name not in ("samples", "kind"))
                print(f"{samples:>13,} {kind:<14}{cells}", flush=True)
    save("scale", results)


if __name__ == "__main__":
    main()
