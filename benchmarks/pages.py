"""Write the tables of the documentation from the JSON files in `benchmarks/results`. Run it after a benchmark.

A table is between `<!-- table NAME -->` and `<!-- end -->` on a page. A test compares every page with the results.
"""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

ROOT: Final = Path(__file__).parents[1]
TABLE: Final = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# The bucketing benchmark times a stream of this many samples; the table of all streams shows this buffer size.
SAMPLES: Final = 20_000
SHOWN_BUFFER: Final = 10_000

Results: TypeAlias = Any
Cells: TypeAlias = Mapping[str, str]


def main() -> None:
    """Rewrite the tables of all pages."""
    for page in pages():
        page.write_text(renewed(page.read_text()))


def pages() -> list[Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "results" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str) -> str:
    """The text of a page with its tables made from the present results."""
    return TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", text)


def table(name: str) -> str:
    """A table in Markdown, with a line that names the command, the machine and the versions."""
    if name == "highlights":
        return highlights()
    file, rows = TABLES.get(name, (name, ratio_rows))
    facts = facts_of(file)
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    origin = f"`{facts['command']}`, {facts['date']}, {facts['machine']}, Python {facts['python']}, {versions}"
    return f"{as_markdown(rows(facts['results']))}\n\n{origin}"


def facts_of(file: str) -> dict[str, Any]:
    """The results of one benchmark with its command, date, machine and versions."""
    facts: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
    return facts


def highlights() -> str:
    """Four lines for the README, each with a measured figure."""
    return "\n".join(f"- {line}" for line in (training_line(), plan_line(), rnn_line(), disk_line()))


def training_line() -> str:
    """Throughput and padding of the main job."""
    steps = facts_of("language_model")["results"]
    bucketed, random = steps["bucketed"], steps["random"]
    times = bucketed["real tokens a second"] / random["real tokens a second"]
    return (
        f"**Less padding.** The training step of `make demo` processes {times:.1f} times as many real tokens per "
        f"second as with random batches of the same budget: {bucketed['padding']:.1%} padding instead of "
        f"{random['padding']:.1%}."
    )


def plan_line() -> str:
    """Batches over the budget, and the time to resume in the largest corpus."""
    plans = facts_of("planning")["results"]["plans"]
    ours = max(plan["worst"] for plan in plans if plan["contender"] == "ours" and plan["corpus"] == "speech-like")
    largest = max(facts_of("scale")["results"], key=lambda row: row["samples"])
    return (
        f"**A hard budget, exact resume.** The largest batch uses {ours:.0%} of the budget, never more. In a corpus of "
        f"{largest['samples']:,} sequences, `seek` into an epoch and the first batch take "
        f"{largest['seek, batch']:.1f} ms."
    )


def rnn_line() -> str:
    """Training of recurrent modules against torch's packed run."""
    low, high = zip(*(rnn_range(module) for module in ("LSTM", "GRU")), strict=True)
    return (
        f"**Fast recurrent training.** On a CPU, `apply_rnn` trains an LSTM {low[0]:.1f} to {high[0]:.1f} times as "
        f"fast as torch's packed run, a GRU {low[1]:.1f} to {high[1]:.1f} times."
    )


def rnn_range(module: str) -> tuple[float, float]:
    """The lowest and the highest median speed-up over torch's packed run, in training."""
    medians = [
        row["times_as_fast"]["torch packed"][1]
        for row in facts_of("rnn")["results"]
        if row["case"].startswith(module) and "training" in row["case"]
    ]
    return min(medians), max(medians)


def disk_line() -> str:
    """From disk to padded batches, against the faster of the two webdataset pipelines."""
    case = facts_of("shards")["results"]["disk to batches"]["tokens"]
    rates = case["samples a second"]
    ours = rates["ShardDataset, blocks"]
    peer = max(rate for name, rate in rates.items() if name.startswith("webdataset"))
    return (
        f"**Fast shards.** Two workers read {ours:,.0f} token sequences per second from disk into padded batches, "
        f"{ours / peer:.0f} times as many as with webdataset."
    )


def as_markdown(rows: Sequence[Cells]) -> str:
    """A Markdown table of rows; their common keys are the headings. Without rows, a line that says so."""
    if not rows:
        return "Not measured."
    names = list(rows[0])
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio_rows(results: Results) -> list[Cells]:
    """Cases of `harness.compare`: our time, and the speed-up over each peer (median and range)."""
    peers = list(dict.fromkeys(peer for row in results for peer in row["times_as_fast"]))
    return [
        {
            "case": row["case"],
            row["ours"]: duration(row["microseconds"][row["ours"]]),
            **{peer: ratio(row["times_as_fast"].get(peer)) for peer in peers},
        }
        for row in results
    ]


def target_rows(results: Results) -> list[Cells]:
    """The cases of `harness.compare` that have a target: the target, and the speed-up over each peer."""
    peers = list(dict.fromkeys(peer for row in results for peer in row["times_as_fast"]))
    return [
        {"case": row["case"], "target": row["bar"]} | {peer: ratio(row["times_as_fast"].get(peer)) for peer in peers}
        for row in results
        if row["bar"]
    ]


def duration(microseconds: float) -> str:
    """Microseconds below 10,000 us, milliseconds above."""
    return f"{microseconds:,.0f} us" if microseconds < 10_000 else f"{microseconds / 1000:,.0f} ms"


def ratio(spread: Sequence[float] | None) -> str:
    """Our speed-up over a peer: median, and in brackets the lowest and highest round."""
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
    """Our sampler and the closest peers on every corpus: padding, and pairs that meet again."""
    shown = ("ours", "lhotse bucketing", "sort in chunks, by hand", "random")
    found: dict[str, dict[str, str]] = {}
    for plan in results["plans"]:
        if plan["contender"] in shown:
            row = found.setdefault(plan["corpus"], {"corpus": plan["corpus"]})
            meeting = sum(plan["meeting"].values()) / len(plan["meeting"])
            row[plan["contender"]] = f"{plan['padding']:.2%} / {meeting:.1%}"
    return list(found.values())


def small_rows(results: Results) -> list[Cells]:
    """Small corpora: our default next to sorted chunks that let as many pairs meet again."""
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
    """Padding and pairs that meet again, for each number of samples that are sorted together."""
    found: dict[str, dict[str, str]] = {}
    for name, points in results["windows"].items():
        for point in points:
            samples, padding, meeting = point["samples"], point["padding"], point["meeting"]
            row = found.setdefault(f"{samples:,}", {"samples sorted together": f"{samples:,}"})
            row[f"{name}: padding"] = f"{padding:.2%}"
            row[f"{name}: pairs that meet again"] = f"{meeting:.1%}"
    return list(found.values())


def epoch_rows(results: Results) -> list[Cells]:
    """Time to plan one epoch and take all its batches, for each sampler."""
    [case] = results["epochs"]
    return [{"sampler": name, case["case"]: f"{us / 1000:,.0f} ms"} for name, us in case["microseconds"].items()]


def bar_rows(results: Results) -> list[Cells]:
    """The targets of a benchmark, the measured figures, and whether they meet the targets."""
    return [
        {"figure": figure, "target": bar, "measured": reached, "met": "yes" if met else "no"}
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
            "memory added": f"{row['own after'] - row['own before']:,.0f} MiB",
        }
        for row in results
    ]


def kind_rows(results: Results) -> list[Cells]:
    """The training step of the main job on bucketed and on random batches."""
    return [
        {"batches": kind, **{name: f"{value:,.3f}" if value < 1 else f"{value:,.0f}" for name, value in row.items()}}
        for kind, row in results.items()
    ]


def buffer_rows(results: Results) -> list[Cells]:
    """Bucketing of the speech-like stream: padding and the longest wait for each buffer size."""
    found: dict[str, dict[str, str]] = {}
    for one in results["streams"]:
        if (one["corpus"], one["order"]) == ("speech-like", "random"):
            row = found.setdefault(f"{one['buffer']:,}", {"buffer": f"{one['buffer']:,}"})
            row[one["contender"]] = f"{one['padding']:.2%} / {one['wait']:,}"
    return list(found.values())


def stream_rows(results: Results) -> list[Cells]:
    """Bucketing of every stream with one buffer size: padding, and the largest batch if it exceeds the budget."""
    found: dict[str, dict[str, str]] = {}
    for one in results["streams"]:
        if one["buffer"] == SHOWN_BUFFER:
            name = f"{one['corpus']}, {one['order']}"
            over = f" ({one['worst']:.2f}x)" if one["over"] else ""
            found.setdefault(name, {"stream": name})[one["contender"]] = f"{one['padding']:.2%}{over}"
    return list(found.values())


def bucketing_time_rows(results: Results) -> list[Cells]:
    """Time per sample for each buffer size."""
    found: dict[str, dict[str, str]] = {}
    for buffer, row in results["times"].items():
        for name, microseconds in row["microseconds"].items():
            cells = found.setdefault(name, {"": name})
            cells[f"buffer {int(buffer):,}"] = f"{microseconds / SAMPLES:.1f} us"
    return list(found.values())


def rate_rows(kind: str) -> Callable[[Results], list[Cells]]:
    """A function from results to the rates of one task on shards, for both corpora."""

    def rows(results: Results) -> list[Cells]:
        cases = results[kind]
        names = list(dict.fromkeys(name for case in cases.values() for name in case["microseconds"]))
        return [
            {"": name} | {cell: text for case in cases.values() for cell, text in rate(case, name)} for name in names
        ]

    return rows


def rate(case: Results, name: str) -> list[tuple[str, str]]:
    """Cells of one contender in one case: samples and megabytes per second."""
    samples, nbytes = case["samples a second"][name], case["bytes a second"][name]
    return [(case["case"], f"{samples:,.0f} /s, {nbytes / 1e6:,.0f} MB/s")]


def pack_rows(results: Results) -> list[Cells]:
    """Waste and mixing of packs, next to other packers."""
    return [
        {
            "corpus, capacity": f"{row['corpus']}, {row['capacity']:,}",
            "documents in a row": f"{row['documents']:.1f}",
            "rows": f"{row['rows']:,}",
            "next-fit": f"{row['next_fit']:.1f} %",
            "best-fit, TRL": f"{row['best_fit']:.2f} %",
            "axolotl": f"{row['axolotl']:.2f} %",
            "ours": f"{row['waste']:.2f} %",
            "pairs that meet again": f"{row['meets'][0]:.2f} %",
            "at random": f"{row['random']:.2f} %",
        }
        for row in results["cases"]
    ]


def pack_rank_rows(results: Results) -> list[Cells]:
    """Time lost to the slowest rank, and the spread of steps, for rows of best-fit and ours."""

    def cell(figures: Sequence[float]) -> str:
        return f"{figures[0]:.3f} ({figures[1]:.1f}), {figures[2]:.1f}x"

    return [
        {
            "corpus, cost, ranks (steps)": f"{row['corpus']}, {row['cost']}, {row['replicas']} ({row['steps']:,})",
            "best-fit, random": cell(row["best_fit_random"]),
            "best-fit, grouped": cell(row["best_fit_grouped"]),
            "ours, random": cell(row["random"]),
            "ours, grouped": cell(row["grouped"]),
            "costliest document": f"{row['bound']:.1f}",
        }
        for row in results["ranks"]
    ]


def pack_limit_rows(results: Results) -> list[Cells]:
    """Rows over the bound under other limits."""
    return [
        {
            "corpus, capacity": f"{row['corpus']}, {row['capacity']:,}",
            "limit": row["limit"],
            "rows over the bound": f"{row['over']:.2f} %",
            "best-fit": f"{row['best_fit_over']:.1f} %",
        }
        for row in results["limits"]
    ]


def pack_time_rows(results: Results) -> list[Cells]:
    """Times of construction, of an epoch and of rows."""
    return [
        {
            "corpus": f"{row['corpus']}, {row['samples']:,}",
            "construction": f"{row['construct_s']:.2f} s",
            "first row of an epoch": f"{row['first_row_ms']:.0f} ms",
            "any other row": f"{row['row_ms']:.2f} ms",
            "a document in chunks": f"{row['document_us']:.2f} us",
        }
        for row in results["times"]
    ]


def loading_rows(work: str) -> Callable[[Results], list[Cells]]:
    """A function from results to the loaders of one work."""

    def rows(results: Results) -> list[Cells]:
        loaders = results["works"][work]["loaders"]
        return [
            {
                work: name,
                "one process": loading_cell(loader, "one process"),
                "two cores": loading_cell(loader, "two cores"),
                "padding": f"{loader['padding']:.1%}",
                "files / payload": f"{loader['size']:.2f}",
                "checks": loader["checks"],
            }
            for name, loader in loaders.items()
        ]

    return rows


def loading_cell(loader: Results, cores: str) -> str:
    """Rows a second, and our speed-up; nothing for a loader that does not have this way."""
    rate = loader[cores]
    return "" if rate is None else f"{rate:,.0f} /s, {ratio(loader['ours is'][cores])}"


def load_rows(results: Results) -> list[Cells]:
    """How busy the machine was: with more processes than cores, absolute figures are low, and ratios are noisy."""
    return [
        {"work": name, "load average of the machine": " / ".join(f"{load:.1f}" for load in work["load average"])}
        for name, work in results["works"].items()
    ]


def overhead_rows(results: Results) -> list[Cells]:
    """Time of a training loop over its steps alone, for each way to load: the median of all rounds."""
    return [
        {"step": case, "alone": f"{1e3 * statistics.median(seconds['alone']):.1f} ms"}
        | {name: overhead(times, seconds["alone"]) for name, times in seconds.items() if name != "alone"}
        for case, seconds in results["training"].items()
    ]


def overhead(times: Sequence[float], alone: Sequence[float]) -> str:
    """The median extra time in per cent of the steps of the same round."""
    return f"{statistics.median(loop / steps for loop, steps in zip(times, alone, strict=True)) - 1:+.1%}"


def first_rows(results: Results) -> list[Cells]:
    """Time from a new loader to its first batch, at the start and in the middle of an epoch."""
    names = list(dict.fromkeys(name for times in results["first"].values() for name in times))
    return [
        {"new loader, at": name}
        | {work: f"{1e3 * statistics.median(times[name]):.1f} ms" for work, times in results["first"].items()}
        for name in names
    ]


def memory_rows(results: Results) -> list[Cells]:
    """Memory of a process and its workers: private pages, and blocks that they share."""
    names = list(dict.fromkeys(name for sizes in results["memory"].values() for name in sizes))
    return [
        {"after 60 batches": name}
        | {
            work: f"{(sizes[name]['Pss_Anon'] + sizes[name]['Pss_Shmem']) / 1e6:,.0f} MB" if sizes.get(name) else ""
            for work, sizes in results["memory"].items()
        }
        for name in names
    ]


def pack_window_rows(results: Results) -> list[Cells]:
    """Times of a shard stream's plan."""
    return [
        {
            "shards of a corpus": f"{row['corpus']}, {row['samples']:,}, {row['windows']} windows",
            "limits": row["limits"],
            "waste": f"{row['waste']:.2f} %",
            "construction": f"{row['construct_s']:.2f} s",
            "first batch of an epoch": f"{row['first_batch_s']:.2f} s",
            "all rows of an epoch": f"{row['epoch_s']:.1f} s",
        }
        for row in results["windows"]
    ]


def pack_stream_rows(results: Results) -> list[Cells]:
    """Packing of streams without an index."""
    return [
        {
            "stream, capacity": f"{row['corpus']}, {row['capacity']:,}",
            "buffer": f"{row['buffer']:,}",
            "waste": f"{row['waste']:.2f} %",
            "longest wait": f"{row['wait']:.1f} buffers",
            "time of a sample": f"{row['microseconds']:.1f} us",
        }
        for row in results["streams"]
    ]


TABLES: Final[dict[str, tuple[str, Callable[[Results], list[Cells]]]]] = {
    "block_masks": ("block_masks", lambda results: ratio_rows(results["cases"])),
    "block_masks-targets": ("block_masks", bar_rows),
    "plans": ("planning", plan_rows),
    "corpora": ("planning", corpus_rows),
    "windows": ("planning", window_rows),
    "small": ("planning", small_rows),
    "scale": ("scale", scale_rows),
    "bucketing-buffers": ("bucketing", buffer_rows),
    "bucketing-streams": ("bucketing", stream_rows),
    "bucketing-times": ("bucketing", bucketing_time_rows),
    "shards-read": ("shards", rate_rows("read")),
    "shards-index": ("shards", rate_rows("index")),
    "shards-load": ("shards", rate_rows("disk to batches")),
    "language_model": ("language_model", kind_rows),
    "packed_training": ("packed_training", lambda results: kind_rows(results["kinds"])),
    "collation-targets": ("collation", target_rows),
    "packing-targets": ("packing", target_rows),
    "rnn-targets": ("rnn", target_rows),
    "transport-targets": ("transport", target_rows),
    "epochs": ("planning", epoch_rows),
    "planning-targets": ("planning", bar_rows),
    "bucketing-targets": ("bucketing", bar_rows),
    "shards-targets": ("shards", bar_rows),
    "packs": ("packing_plans", pack_rows),
    "packs-ranks": ("packing_plans", pack_rank_rows),
    "packs-limits": ("packing_plans", pack_limit_rows),
    "packs-times": ("packing_plans", pack_time_rows),
    "packs-streams": ("packing_plans", pack_stream_rows),
    "packs-windows": ("packing_plans", pack_window_rows),
    "packs-targets": ("packing_plans", bar_rows),
    "loading-tokens": ("loading", loading_rows("tokens")),
    "loading-frames": ("loading", loading_rows("frames")),
    "loading-sft": ("loading", loading_rows("sft")),
    "loading-load": ("loading", load_rows),
    "loading-training": ("loading", overhead_rows),
    "loading-first": ("loading", first_rows),
    "loading-memory": ("loading", memory_rows),
    "loading-targets": ("loading", bar_rows),
}

if __name__ == "__main__":
    main()
