"""The rows of the documentation's tables, as `pages.py` writes them: one function from results to cells for each."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

# The bucketing benchmark times a stream of this many samples; the table of all streams shows this buffer size.
SAMPLES: Final = 20_000
SHOWN_BUFFER: Final = 10_000

Results: TypeAlias = Any
Cells: TypeAlias = Mapping[str, str]


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


def remote_rows(results: Results) -> list[Cells]:
    """The targets of reads over a network, by latency. Rows without a target are left out of the judgement."""
    judged = {True: "yes", False: "no", None: ""}
    return [
        {"latency": latency, "figure": figure, "target": bar, "measured": reached, "met": judged[met]}
        for latency, figures in results.items()
        for facts in figures.values()
        for figure, bar, reached, met in facts["bars"]
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


def pivot(first: str, cases: Mapping[str, Mapping[str, Any]], cell: Callable[[Any], str]) -> list[Cells]:
    """A row for each name in any case, and a column for each case; an empty cell where a case lacks the name."""
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    return [
        {first: name} | {key: cell(case[name]) if case.get(name) else "" for key, case in cases.items()}
        for name in names
    ]


def first_rows(results: Results) -> list[Cells]:
    """Time from a new loader to its first batch, at the start and in the middle of an epoch."""
    return pivot("new loader, at", results["first"], lambda times: f"{1e3 * statistics.median(times):.1f} ms")


def memory_rows(results: Results) -> list[Cells]:
    """Memory of a process and its workers: private pages, and blocks that they share."""
    return pivot(
        "after 60 batches", results["memory"], lambda size: f"{(size['Pss_Anon'] + size['Pss_Shmem']) / 1e6:,.0f} MB"
    )


def formatted(part: str, columns: Mapping[str, str]) -> Callable[[Results], list[Cells]]:
    """A function from results to the rows of one part: by heading, the format of a cell from a row's figures.

    >>> formatted("times", {"time": "{seconds:.1f} s"})({"times": [{"seconds": 2}]})
    [{'time': '2.0 s'}]
    """
    return lambda results: [{head: text.format(**row) for head, text in columns.items()} for row in results[part]]


# Waste and mixing of packs, next to other packers.
pack_rows: Final = formatted(
    "cases",
    {
        "corpus, capacity": "{corpus}, {capacity:,}",
        "documents in a row": "{documents:.1f}",
        "rows": "{rows:,}",
        "next-fit": "{next_fit:.1f} %",
        "best-fit, TRL": "{best_fit:.2f} %",
        "axolotl": "{axolotl:.2f} %",
        "ours": "{waste:.2f} %",
        "pairs that meet again": "{meets[0]:.2f} %",
        "at random": "{random:.2f} %",
    },
)
# Rows over the bound under other limits.
pack_limit_rows: Final = formatted(
    "limits",
    {
        "corpus, capacity": "{corpus}, {capacity:,}",
        "limit": "{limit}",
        "rows over the bound": "{over:.2f} %",
        "best-fit": "{best_fit_over:.1f} %",
    },
)
# Times of construction, of an epoch and of rows.
pack_time_rows: Final = formatted(
    "times",
    {
        "corpus": "{corpus}, {samples:,}",
        "construction": "{construct_s:.2f} s",
        "first row of an epoch": "{first_row_ms:.0f} ms",
        "any other row": "{row_ms:.2f} ms",
        "a document in chunks": "{document_us:.2f} us",
    },
)
# Times of a shard stream's plan.
pack_window_rows: Final = formatted(
    "windows",
    {
        "shards of a corpus": "{corpus}, {samples:,}, {windows} windows",
        "limits": "{limits}",
        "waste": "{waste:.2f} %",
        "construction": "{construct_s:.2f} s",
        "first batch of an epoch": "{first_batch_s:.2f} s",
        "all rows of an epoch": "{epoch_s:.1f} s",
    },
)
# Packing of streams without an index.
pack_stream_rows: Final = formatted(
    "streams",
    {
        "stream, capacity": "{corpus}, {capacity:,}",
        "buffer": "{buffer:,}",
        "waste": "{waste:.2f} %",
        "longest wait": "{wait:.1f} buffers",
        "time of a sample": "{microseconds:.1f} us",
    },
)

# Inference in order, and what it adds to a bare loop.
inference_rows: Final = formatted(
    "corpora",
    {
        "corpus": "{corpus}",
        "padding in the order of arrival": "{arrival padding:.1%}",
        "padding of run_in_order": "{padding:.1%}",
        "times as fast": "{times as fast[1]:.2f} [{times as fast[0]:.2f}-{times as fast[2]:.2f}]",
    },
)

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
    "remote-targets": ("remote", remote_rows),
    "inference": ("inference", inference_rows),
    "inference-targets": ("inference", bar_rows),
}
