"""Ratios measured side by side in one process: every contender takes its turn in every round."""

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
# A turn lasts at least so long: what takes microseconds would else be measured cold, after the others' turns.
TURN_MICROSECONDS = 5_000

# A figure, what was to be reached, what was, and whether that is enough.
Bar: TypeAlias = tuple[str, str, str, bool]


@dataclass
class Row:
    """One case.

    Attributes:
        case: what is measured.
        ours: the contender that the others are held against.
        microseconds: each contender's median time of one call.
        calls: how often each is called in one turn.
        times_as_fast: how many times as fast as each other contender ours is: the lowest, median and highest round.
        bar: what was to be reached, in words.
    """

    case: str
    ours: str
    microseconds: dict[str, float]
    calls: dict[str, int]
    times_as_fast: dict[str, tuple[float, float, float]]
    bar: str = ""


def keep_pages() -> None:
    """Make glibc keep the memory that is freed, for all contenders alike; other C libraries are left as they are.

    Whether a freed block of some megabytes goes back to the system depends on what else lies on the heap, and taking
    its pages anew costs several times what filling them does: the ratios would be those of two heaps.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_max, trim_threshold = -4, -1
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def compare(
    case: str, ours: str, contenders: Mapping[str, Callable[[], object]], *, rounds: int = 21, bar: str = ""
) -> Row:
    """Time all contenders in turn, `rounds` times; a turn is as many calls as last 5 ms.

    Every second round goes backwards: what one leaves behind, in caches and on the heap, is not always the same one's.

    Args:
        case: what is measured.
        ours: the contender that the others are held against.
        contenders: what to call, by name.
        rounds: how often.
        bar: what was to be reached, in words.

    Returns:
        Median times of one call in microseconds, and the ratios of each contender's time to ours, round by round.
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
    """Microseconds that so many calls take together; where they are several, after one that does not count."""
    if calls > 1:
        # Pages that the one before has given back to the system would be counted here.
        call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) * 1e6


def calls_of_a_turn(call: Callable[[], object]) -> int:
    """How many calls make a turn: twice as many, until they last as long; one before them warms up."""
    call()
    calls = 1
    while time_turn(call, calls) < TURN_MICROSECONDS:
        calls *= 2
    return calls


def spread_of(others: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """The lowest, median and highest ratio of times taken in the same round."""
    ratios = sorted(other / mine for other, mine in zip(others, own, strict=True))
    return ratios[0], statistics.median(ratios), ratios[-1]


def as_text(row: Row) -> str:
    """A case as lines of a table."""
    head = f"{row.case}: {row.ours} {row.microseconds[row.ours]:,.1f} us" + (f"   (bar: {row.bar})" if row.bar else "")
    lines = [
        f"    {name:<28}{row.microseconds[name]:>14,.1f} us   ours is {middle:.2f} times as fast [{low:.2f}-{high:.2f}]"
        for name, (low, middle, high) in row.times_as_fast.items()
    ]
    return "\n".join([head, *lines])


def run_through(source: Iterable[object]) -> int:
    """Take everything that comes, and keep nothing: how many there were."""
    return sum(1 for _ in source)


def show(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print a table whose columns are the keys of its rows."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    print(f"\n{title}")
    for row in [{name: name for name in widths}, *rows]:
        cells = [row[name].rjust(width) for name, width in widths.items()]
        print("  ".join([next(iter(row.values())).ljust(next(iter(widths.values()))), *cells[1:]]), flush=True)


def show_bars(bars: Sequence[Bar]) -> None:
    """Print what was to be reached, and what was."""
    show("bars", [{"figure": a, "bar": b, "reached": c, "met": "yes" if d else "NO"} for a, b, c, d in bars])


def save(name: str, results: object) -> None:
    """Write results with what they were measured on to `benchmarks/results/NAME.json`."""
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
