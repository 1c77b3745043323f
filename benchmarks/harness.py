"""Speed ratios, measured in one process: every round times each contender once, alternately."""

import ctypes
import datetime
import gc
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import torch

RESULTS = Path(__file__).parent / "results"
# A turn lasts at least this long: a call of some microseconds would otherwise be timed with a cold cache.
TURN_MICROSECONDS = 5_000

# A figure, its target, the measured value, and whether it meets the target.
Bar: TypeAlias = tuple[str, str, str, bool]


@dataclass
class Row:
    """One case.

    Attributes:
        case: Name of the measurement.
        ours: The contender that the others are compared with.
        microseconds: Median time of one call, for each contender.
        calls: Calls in one turn, for each contender.
        times_as_fast: Speed-up of ours over each other contender: the lowest, median and highest round.
        bar: The target, in words.
    """

    case: str
    ours: str
    microseconds: dict[str, float]
    calls: dict[str, int]
    times_as_fast: dict[str, tuple[float, float, float]]
    bar: str = ""


def keep_pages() -> None:
    """Make glibc keep freed memory, for all contenders. Other C libraries are not changed.

    Whether glibc returns some freed megabytes to the system depends on the rest of the heap. Getting the pages again
    takes several times as long as filling them, so the ratios would compare two heaps.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_max, trim_threshold = -4, -1
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def compare(
    case: str, ours: str, contenders: Mapping[str, Callable[[], object]], *, rounds: int = 21, bar: str = ""
) -> Row:
    """Time all contenders in turn, `rounds` times. A turn is as many calls as take 5 ms.

    Every second round has the reverse order, so that the caches and the heap are not always left by the same contender.

    Args:
        case: Name of the measurement.
        ours: The contender that the others are compared with.
        contenders: The calls to time, by name.
        rounds: Number of rounds.
        bar: The target, in words.

    Returns:
        Median times of one call in microseconds, and the ratios of each contender's time to ours in the same round.
    """
    gc.collect()
    calls = {name: calls_of_a_turn(call) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            times[name].append(time_turn(contenders[name], calls[name]) / calls[name])
    medians = {name: statistics.median(values) for name, values in times.items()}
    spread = {name: spread_of(values, times[ours]) for name, values in times.items() if name != ours}
    row = Row(case, ours, medians, calls, spread, bar)
    print(as_text(row), flush=True)
    return row


def time_turn(call: Callable[[], object], calls: int) -> float:
    """Microseconds of all calls together. If there are several, one call before them is not timed."""
    if calls > 1:
        # Otherwise this turn would pay for pages that the last contender has returned to the system.
        call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) * 1e6


def calls_of_a_turn(call: Callable[[], object]) -> int:
    """Number of calls in a turn, doubled until they take long enough, after one call to warm up."""
    call()
    calls = 1
    while time_turn(call, calls) < TURN_MICROSECONDS:
        calls *= 2
    return calls


def spread_of(others: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """The lowest, median and highest ratio of two times of the same round."""
    ratios = sorted(other / mine for other, mine in zip(others, own, strict=True))
    return ratios[0], statistics.median(ratios), ratios[-1]


def as_text(row: Row) -> str:
    """A case as lines of a table."""
    head = f"{row.case}: {row.ours} {row.microseconds[row.ours]:,.1f} us" + (
        f"   (target: {row.bar})" if row.bar else ""
    )
    lines = [
        f"    {name:<28}{row.microseconds[name]:>14,.1f} us   ours is {middle:.2f} times as fast [{low:.2f}-{high:.2f}]"
        for name, (low, middle, high) in row.times_as_fast.items()
    ]
    return "\n".join([head, *lines])


def run_through(source: Iterable[object]) -> int:
    """Consume an iterable, and return the number of its items."""
    return sum(1 for _ in source)


def show(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print a table whose columns are the keys of its rows."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    print(f"\n{title}")
    for row in [{name: name for name in widths}, *rows]:
        cells = [row[name].rjust(width) for name, width in widths.items()]
        print("  ".join([next(iter(row.values())).ljust(next(iter(widths.values()))), *cells[1:]]), flush=True)


def show_bars(bars: Sequence[Bar]) -> None:
    """Print the targets and the measured figures."""
    if bars:
        show("targets", [{"figure": a, "target": b, "measured": c, "met": "yes" if d else "NO"} for a, b, c, d in bars])


def save(name: str, results: object) -> None:
    """Write results, with command, date, machine and versions, to `benchmarks/results/NAME.json`."""
    facts = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
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
