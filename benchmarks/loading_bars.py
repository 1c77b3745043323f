"""The targets of `loading.py` next to the figures, from its results. Figures that were not measured have no target."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from harness import Bar

BY_HAND: Final = ("memory map, pad_sequence", "memory map, one gather")
# Our ways that use two cores: workers, or a thread next to the loop.
TWO_CORES: Final = ("ShardDataset, 2 workers", "ShardStream, 2 workers", "ReadAheadLoader, 0 workers")
ONE_PROCESS: Final = "ShardDataset, 0 workers"
OF_PAD_SEQUENCE: Final = {"tokens": 1.2, "frames": 0.95, "sft": 0.95}
OF_GATHER: Final = {"tokens": 0.4, "frames": 1.0, "sft": 0.8}
OF_TWO_CORES: Final = {"tokens": 1.8, "frames": 3.0, "sft": 3.0}
OVERHEAD: Final = {"5 ms": 0.10, "20 ms": 0.03, "80 ms": 0.03}
# Two ways whose times differ by less than this fraction of the step are level.
LEVEL: Final = 0.01
# Memory of two equal runs differs by about this fraction.
EQUAL_MEMORY: Final = 0.02

Contenders = Mapping[str, Mapping[str, Any]]


def find_bars(results: Mapping[str, Any]) -> list[Bar]:
    """All targets for which there are figures."""
    bars: list[Bar] = []
    for work, measured in results["works"].items():
        bars += speed_bars(work, measured["contenders"])
    for work, times in results["first"].items():
        bars += first_bars(work, times)
    bars += training_bars(results["training"])
    for work, sizes in results["memory"].items():
        bars += memory_bars(work, sizes)
    return bars


def spread(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """The lowest, median and highest ratio of two figures of the same round."""
    ratios = sorted(mine / other if other else math.inf for mine, other in zip(ours, others, strict=True))
    return ratios[0], statistics.median(ratios), ratios[-1]


def best_of_two_cores(contenders: Contenders) -> str:
    """Our fastest way with two cores, by median."""
    return max((key for key in TWO_CORES if key in contenders), key=lambda key: median_rate(contenders[key]))


def median_rate(contender: Mapping[str, Any]) -> float:
    """Rows a second, the median of all rounds."""
    return statistics.median(contender["rates"])


def by_loader(contenders: Contenders) -> dict[str, dict[str, Any]]:
    """By loader: its figures in one process and on two cores, for tables and charts.

    How many times as fast ours is: in one process `ShardDataset`, on two cores the fastest of our ways.
    """
    best = {"one process": ONE_PROCESS, "two cores": best_of_two_cores(contenders)}
    found: dict[str, dict[str, Any]] = {}
    for key, one in contenders.items():
        cores = "two cores" if one["workers"] or key in TWO_CORES else "one process"
        name = f"before: {one['loader']}" if one["source"] == "before" else one["loader"]
        empty = {"one process": None, "two cores": None, "ours is": {}, "spread": {}}
        row = found.setdefault(name, {each: one[each] for each in ("source", "padding", "size", "checks")} | empty)
        row[cores] = round(median_rate(one))
        row["spread"][cores] = [min(one["rates"]), median_rate(one), max(one["rates"])]
        row["ours is"][cores] = [round(ratio, 3) for ratio in spread(contenders[best[cores]]["rates"], one["rates"])]
    return found


def libraries(contenders: Contenders, workers: int) -> list[str]:
    """The contenders that are neither ours nor by hand."""
    others = ("ours", "before", "by_hand")
    return [key for key, one in contenders.items() if one["source"] not in others and one["workers"] == workers]


def speed_bars(work: str, contenders: Contenders) -> Iterator[Bar]:
    """The targets of one work against hand-written loaders, libraries, and our code before; and its size on disk."""
    best = best_of_two_cores(contenders)

    def bar(figure: str, ours: str, other: str, least: float) -> Bar:
        low, middle, high = spread(contenders[ours]["rates"], contenders[other]["rates"])
        return f"{work}: {figure}", f">= {least:g}x", f"{middle:.2f}x [{low:.2f}-{high:.2f}]", middle >= least

    for name, targets in zip(BY_HAND, (OF_PAD_SEQUENCE, OF_GATHER), strict=True):
        yield bar(f"one process, {name}", ONE_PROCESS, f"{name}, 0 workers", targets[work])
    for name in BY_HAND:
        yield bar(f"two cores ({best}), {name}, 2 workers", best, f"{name}, 2 workers", 1.5)
    for workers, ours in ((0, ONE_PROCESS), (2, best)):
        # The library that comes closest.
        for other in sorted(libraries(contenders, workers), key=lambda key: -median_rate(contenders[key]))[:1]:
            yield bar(f"{ours}, the fastest library: {other}", ours, other, 2)
    if f"before: {ONE_PROCESS}" in contenders:
        yield bar("one process, now over before", ONE_PROCESS, f"before: {ONE_PROCESS}", 1.7)
        yield bar(f"two cores ({best}), now over before", best, "before: ShardDataset, 2 workers", OF_TWO_CORES[work])
    if work == "tokens":
        size = contenders[ONE_PROCESS]["size"]
        yield "tokens: size on disk, in payloads", "<= 1.15", f"{size:.2f}", size <= 1.15


def first_bars(work: str, times: Mapping[str, Sequence[float]]) -> Iterator[Bar]:
    """The targets of a stream's first batch."""
    for at, name in (("0%", "first batch"), ("50%", "resume at 50 %")):
        low, middle, high = spread(times[f"ours: ShardStream, {at}"], times[f"ours: ShardDataset, {at}"])
        figure = f"{work}: {name}, ShardStream over ShardDataset"
        yield figure, "<= 1.5x", f"{middle:.2f}x [{low:.2f}-{high:.2f}]", middle <= 1.5


def training_bars(cases: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[Bar]:
    """The targets next to a training step: our best way over the step alone, and the thread against all others."""
    for case, seconds in cases.items():
        ways = {
            name: spread(times, seconds["alone"])[1] - 1
            for name, times in seconds.items()
            if not name.startswith("alone")
        }
        best = min(ways, key=lambda name: ways[name])
        most = OVERHEAD[case.split(", ")[1]]
        yield (
            f"{case} step: time over the step alone ({best})",
            f"<= {most:.0%}",
            f"{ways[best]:+.1%}",
            ways[best] <= most,
        )
        thread = ways.pop("ReadAheadLoader", None)
        if thread is not None:
            least = min(ways.values())
            yield (
                f"{case} step: ReadAheadLoader, and the best of 0, 1 and 2 workers",
                "level or less",
                f"{thread:+.1%}, {least:+.1%}",
                thread <= least + LEVEL,
            )


def memory_bars(work: str, sizes: Mapping[str, Mapping[str, int]]) -> Iterator[Bar]:
    """The targets of memory: what is private, and blocks between processes, now and before."""
    for name, size in sizes.items():
        before = sizes.get(name.replace("ours: ", "before: "))
        if name.startswith("ours: ") and size and before:
            now, then = (each["Pss_Anon"] + each["Pss_Shmem"] for each in (size, before))
            yield (
                f"{work}: memory, {name.removeprefix('ours: ')}",
                f"<= {then / 1e6:,.0f} MB, as before",
                f"{now / 1e6:,.0f} MB",
                now <= then * (1 + EQUAL_MEMORY),
            )
