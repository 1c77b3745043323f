"""Ratios measured side by side in one process: every contender takes its turn in every round."""

import datetime
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One case: each contender's median time, and how many times as fast as it ours is, round by round."""

    case: str
    ours: str
    microseconds: dict[str, float]
    times_as_fast: dict[str, tuple[float, float, float]]
    bar: str = ""


def compare(
    case: str, ours: str, contenders: Mapping[str, Callable[[], object]], *, rounds: int = 21, bar: str = ""
) -> Row:
    """Time all contenders in turn, `rounds` times after one round that does not count.

    Args:
        case: what is measured.
        ours: the contender that the others are held against.
        contenders: what to call, by name.
        rounds: how often.
        bar: what was to be reached, in words.

    Returns:
        Median times in microseconds, and the lowest, median and highest ratio of each contender's time to ours.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
            if turn:
                times[name].append(taken * 1e6)
    ratios = {
        name: sorted(other / own for other, own in zip(times[name], times[ours], strict=True))
        for name in contenders
        if name != ours
    }
    medians = {name: statistics.median(values) for name, values in times.items()}
    spread = {name: (values[0], statistics.median(values), values[-1]) for name, values in ratios.items()}
    row = Row(case, ours, medians, spread, bar)
    print(as_text(row), flush=True)
    return row


def as_text(row: Row) -> str:
    """A case as lines of a table."""
    head = f"{row.case}: {row.ours} {row.microseconds[row.ours]:,.0f} us" + (f"   (bar: {row.bar})" if row.bar else "")
    lines = [
        f"    {name:<28}{row.microseconds[name]:>12,.0f} us   ours is {middle:.2f} times as fast [{low:.2f}-{high:.2f}]"
        for name, (low, middle, high) in row.times_as_fast.items()
    ]
    return "\n".join([head, *lines])


def save(name: str, results: object) -> None:
    """Write results with what they were measured on to `benchmarks/results/NAME.json`."""
    facts = {
        "command": f"python benchmarks/{Path(sys.argv[0]).name}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "numpy", "lengthtrack")},
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"saved to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
