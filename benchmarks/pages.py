"""Writes the tables of the documentation from `benchmarks/results`: run it after a benchmark.

A table stands on a page between `<!-- table NAME -->` and `<!-- end -->`; a test holds all pages against the results.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

ROOT: Final = Path(__file__).parents[1]
TABLE: Final = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Of the streams that are bucketed: as many samples, at most, and the buffer that is shown of all.
SAMPLES: Final = 20_000
SHOWN_BUFFER: Final = 10_000

Results: TypeAlias = Any
Cells: TypeAlias = Mapping[str, str]


def main() -> None:
    """Renew the tables of all pages."""
    for page in pages():
        page.write_text(renewed(page.read_text()))


def pages() -> list[Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str) -> str:
    """A page with its tables as the results have them now."""
    return TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", text)


def table(name: str) -> str:
    """A table in Markdown, with a line that says where it was measured."""
    file, rows = TABLES.get(name, (name, ratio_rows))
    facts = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    origin = f"`{facts['command']}`, {facts['date']}, {facts['machine']}, Python {facts['python']}, {versions}"
    return f"{as_markdown(rows(facts['results']))}\n\n{origin}"


def as_markdown(rows: Sequence[Cells]) -> str:
    """Rows with the same keys, which head the columns."""
    names = list(rows[0])
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio_rows(results: Results) -> list[Cells]:
    """Cases of `harness.compare`: our time, and how many times as fast as each peer, median and range."""
    peers = list(dict.fromkeys(peer for row in results for peer in row["times_as_fast"]))
    bars = any(row["bar"] for row in results)
    return [
        {
            "case": row["case"],
            row["ours"]: duration(row["microseconds"][row["ours"]]),
            **{peer: ratio(row["times_as_fast"].get(peer)) for peer in peers},
            **({"bar": row["bar"]} if bars else {}),
        }
        for row in results
    ]


def duration(microseconds: float) -> str:
    """A time that a reader can take in."""
    return f"{microseconds:,.0f} us" if microseconds < 10_000 else f"{microseconds / 1000:,.0f} ms"


def ratio(spread: Sequence[float] | None) -> str:
    """The lowest, median and highest ratio; ours is so many times as fast."""
    return "" if spread is None else f"{spread[1]:.2f}x [{spread[0]:.2f}-{spread[2]:.2f}]"


def plan_rows(results: Results) -> list[Cells]:
    """All samplers on the speech-like lengths."""
    return [
        {
            "sampler": plan["contender"],
            "batches": f"{plan['batches']:,}",
            "padding": f"{plan['padding']:.2%}",
            "pairs that meet again, lag 1 / 2 / 5": " / ".join(f"{share:.1%}" for share in plan["meeting"].values()),
            "batches over budget": f"{plan['over']:.1%}",
            "worst, in budgets": f"{plan['worst']:.2f}",
            "lag-1": "" if plan["lag_one"] is None else f"{plan['lag_one']:+.3f}",
            **{f"imbalance, W={w}": "" if not r else f"{r[0]:.3f}" for w, r in plan["imbalance"].items()},
        }
        for plan in results["plans"]
        if plan["corpus"] == "speech-like"
    ]


def corpus_rows(results: Results) -> list[Cells]:
    """Our sampler, and the nearest peers, on every corpus: padding, and pairs that meet again."""
    shown = ("ours", "lhotse bucketing", "sort in chunks, by hand", "random")
    found: dict[str, dict[str, str]] = {}
    for plan in results["plans"]:
        if plan["contender"] in shown:
            row = found.setdefault(plan["corpus"], {"corpus": plan["corpus"]})
            meeting = sum(plan["meeting"].values()) / len(plan["meeting"])
            row[plan["contender"]] = f"{plan['padding']:.2%} / {meeting:.1%}"
    return list(found.values())


def small_rows(results: Results) -> list[Cells]:
    """Small corpora: our default beside sorted chunks at an equal share of pairs that meet again."""
    return [
        {
            "corpus": f"{one['corpus']}, {one['samples']:,} samples",
            "batches": f"{one['batches']}",
            "padding": f"{one['padding']:.2%}",
            "pairs that meet again, lag 1 / 2 / 5": " / ".join(f"{share:.1%}" for share in one["meeting"].values()),
            "padding of chunks that mix as much": f"{one['chunks']:.2%}",
        }
        for one in results["small"]
    ]


def window_rows(results: Results) -> list[Cells]:
    """Padding and meeting again by how many samples are sorted together."""
    found: dict[str, dict[str, str]] = {}
    for name, points in results["windows"].items():
        for point in points:
            samples, padding, meeting = point["samples"], point["padding"], point["meeting"]
            row = found.setdefault(f"{samples:,}", {"samples sorted together": f"{samples:,}"})
            row[f"{name}: padding"] = f"{padding:.2%}"
            row[f"{name}: pairs that meet again"] = f"{meeting:.1%}"
    return list(found.values())


def bar_rows(results: Results) -> list[Cells]:
    """What was to be reached, and what was."""
    return [
        {"figure": figure, "bar": bar, "reached": reached, "met": "yes" if met else "no"}
        for figure, bar, reached, met in results["bars"]
    ]


def scale_rows(results: Results) -> list[Cells]:
    """Times and memory of the sampler on memory-mapped lengths."""
    return [
        {
            "lengths": f"{row['samples']:,}",
            "order": row["kind"],
            "construct": f"{row['construct']:,.0f} ms",
            "first batch": f"{row['first batch']:.2f} ms",
            "seek, then a batch": f"{row['seek, batch']:.2f} ms",
            "own memory": f"{row['own after'] - row['own before']:,.0f} MiB",
        }
        for row in results
    ]


def kind_rows(results: Results) -> list[Cells]:
    """The main job's step on bucketed and on random batches."""
    return [
        {"batches": kind, **{name: f"{value:,.3f}" if value < 1 else f"{value:,.0f}" for name, value in row.items()}}
        for kind, row in results.items()
    ]


def buffer_rows(results: Results) -> list[Cells]:
    """Bucketing of the speech-like stream: padding and the greatest wait at every buffer."""
    found: dict[str, dict[str, str]] = {}
    for one in results["streams"]:
        if (one["corpus"], one["order"]) == ("speech-like", "random"):
            row = found.setdefault(f"{one['buffer']:,}", {"buffer": f"{one['buffer']:,}"})
            row[one["contender"]] = f"{one['padding']:.2%} / {one['wait']:,}"
    return list(found.values())


def stream_rows(results: Results) -> list[Cells]:
    """Bucketing of every stream at one buffer: padding, and the worst batch where it is over the budget."""
    found: dict[str, dict[str, str]] = {}
    for one in results["streams"]:
        if one["buffer"] == SHOWN_BUFFER:
            name = f"{one['corpus']}, {one['order']}"
            over = f" ({one['worst']:.2f}x)" if one["over"] else ""
            found.setdefault(name, {"stream": name})[one["contender"]] = f"{one['padding']:.2%}{over}"
    return list(found.values())


def bucketing_time_rows(results: Results) -> list[Cells]:
    """Time a sample, by buffer."""
    found: dict[str, dict[str, str]] = {}
    for buffer, row in results["times"].items():
        for name, microseconds in row["microseconds"].items():
            cells = found.setdefault(name, {"": name})
            cells[f"buffer {int(buffer):,}"] = f"{microseconds / SAMPLES:.1f} us"
    return list(found.values())


def rate_rows(kind: str) -> Callable[[Results], list[Cells]]:
    """A function to the rates of one kind of work on shards, over both corpora."""

    def rows(results: Results) -> list[Cells]:
        cases = results[kind]
        names = list(dict.fromkeys(name for case in cases.values() for name in case["microseconds"]))
        return [
            {"": name} | {cell: text for case in cases.values() for cell, text in rate(case, name)} for name in names
        ]

    return rows


def rate(case: Results, name: str) -> list[tuple[str, str]]:
    """Cells of one contender in one case: samples and megabytes a second."""
    samples, nbytes = case["samples a second"][name], case["bytes a second"][name]
    return [(case["case"], f"{samples:,.0f} /s, {nbytes / 1e6:,.0f} MB/s")]


TABLES: Final[dict[str, tuple[str, Callable[[Results], list[Cells]]]]] = {
    "plans": ("planning", plan_rows),
    "corpora": ("planning", corpus_rows),
    "windows": ("planning", window_rows),
    "small": ("planning", small_rows),
    "planning-bars": ("planning", bar_rows),
    "scale": ("scale", scale_rows),
    "bucketing-buffers": ("bucketing", buffer_rows),
    "bucketing-streams": ("bucketing", stream_rows),
    "bucketing-times": ("bucketing", bucketing_time_rows),
    "bucketing-bars": ("bucketing", bar_rows),
    "shards-read": ("shards", rate_rows("read")),
    "shards-index": ("shards", rate_rows("index")),
    "shards-load": ("shards", rate_rows("disk to batches")),
    "shards-bars": ("shards", bar_rows),
    "language_model": ("language_model", kind_rows),
}

if __name__ == "__main__":
    main()
