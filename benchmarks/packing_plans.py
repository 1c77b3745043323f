"""Packs next to other packers: waste, mixing, limits, balance and speed, each figure next to its bar.

    python benchmarks/packing_plans.py [--lengths FOLDER] [--no-large] [--epochs 200]

FOLDER holds lengths as `.npy` files, integers `[N]`; without it only made corpora are packed. TRL's packing is measured
where `trl` can be imported; axolotl's first fit and next-fit are their rule, written for the benchmark. Times are CPU
seconds of this process, which has one thread: others may use the machine.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Bar, save, show, show_bars
from packers import HAS_TRL
from packing_cases import (
    SAMPLES,
    Case,
    audio_like,
    balance,
    cases,
    limits,
    speech_like,
    streams,
    text_like,
    times,
    trl,
    two_fields,
    windows,
)

LARGE = (1_000_000, 10_000_000)
STREAM_BUFFER = 2_000


def show_cases(measured: Sequence[Case]) -> None:
    """Waste, mixing and construction of each case."""
    rows = [
        {
            "corpus, capacity": f"{case.corpus} {case.capacity}",
            "documents": f"{case.documents:.1f}",
            "rows": str(case.rows),
            "best-fit": str(case.best_fit_rows),
            "waste %": f"{case.waste:.2f}",
            "best-fit %": f"{case.best_fit:.2f}",
            "next-fit %": f"{case.next_fit:.1f}",
            "axolotl %": f"{case.axolotl:.2f}",
            "meets %": f"{case.meets[0]:.3f}",
            "random": f"{case.random:.3f}",
            "mates": f"{case.mates:.0f}/{case.random_mates:.0f}",
            "classes": f"{case.classes:.2f}",
            "sources": f"{case.sources:.2f}",
            "sd": f"{case.sd_documents:.2f}",
            "rung": str(case.rung),
            "spare": str(case.spares),
            "construct ms": f"{case.construct_ms:.0f}",
            "epoch ms": f"{case.epoch_ms:.0f}",
        }
        for case in measured
    ]
    show(
        "rows, waste, pairs that meet in the next epoch, partners in 20 epochs, chi-square by degrees of freedom", rows
    )


def show_tables(results: dict[str, list[dict[str, Any]]]) -> None:
    """All other tables."""
    for title, rows in results.items():
        if rows:
            show(title, [{name: _in_words(value) for name, value in row.items()} for row in rows])


def _in_words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return " / ".join(map(_in_words, value))
    return str(value)


def case_bars(measured: Sequence[Case]) -> list[Bar]:
    """The bars of rows, waste and mixing."""
    exact = all(
        case.rows <= case.best_fit_rows * 1_003 // 1_000 + 1
        and (case.rows == case.best_fit_rows or case.best_fit_rows >= 100)
        for case in measured
    )
    broken = sum(case.broken for case in measured)
    made = [case for case in measured if case.corpus.endswith("-like") and case.capacity in {4_096, 8_192}]
    more = max(case.waste - case.best_fit for case in made)
    ratios = [case.meets[lag] / case.random for case in measured for lag in range(3)]
    others = [case for case in measured if case.corpus != "plaid"]
    worst = max(max(case.meets) - case.random for case in others)
    partners = min(case.mates / case.random_mates for case in others)
    classes = statistics.median(case.classes for case in measured)
    sources = [case.sources for case in measured]
    twenty = [case.construct_ms for case in measured if case.corpus.endswith("-like")]
    slowest = max(case.construct_ms for case in measured)
    return [
        ("rows", "<= floor(1.003 B) + 1, == B below 100", f"{len(measured)} cases", exact),
        ("caps, rows and samples broken", "0", str(broken), broken == 0),
        ("waste over best-fit's, made, 4096 and 8192", "<= 0.3 points", f"{more:.2f}", more <= 0.3),
        (
            "meets / random, lags 1, 2, 5",
            "median <= 1.15",
            f"{statistics.median(ratios):.3f}",
            statistics.median(ratios) <= 1.15,
        ),
        ("meets - random, all but plaid", "<= 0.6 points", f"{worst:.2f}", worst <= 0.6),
        ("partners / random in 20 epochs, all but plaid", ">= 0.95", f"{partners:.3f}", partners >= 0.95),
        ("length classes, chi-square / dof", "median <= 1.3", f"{classes:.2f}", classes <= 1.3),
        (
            "sources, chi-square / dof",
            "0.9-1.1 (means)",
            f"{statistics.mean(sources):.2f} ({min(sources):.2f}-{max(sources):.2f})",
            0.9 <= statistics.mean(sources) <= 1.1,
        ),
        ("construction, 20k made, the slowest", "<= 300 ms", f"{max(twenty):.0f} ms", max(twenty) <= 300),
        ("construction, all cases, the slowest", "<= 300 ms", f"{slowest:.0f} ms", slowest <= 300),
    ]


def limit_bars(limited: list[dict[str, Any]], fields: list[dict[str, Any]]) -> list[Bar]:
    """The bars of other limits."""
    over = statistics.median(row["over"] for row in limited if "1.25" in row["limit"])
    fitted = statistics.median(row["best_fit_over"] for row in limited if "1.25" in row["limit"])
    ratio = statistics.median(row["construct"] for row in limited)
    most = max(row["construct"] for row in limited)
    use = min(row["use"] for row in fields)
    return [
        (
            "documents <= 1.25 x mean, rows over the bound",
            "median <= 1 %",
            f"{over:.2f} % (best-fit {fitted:.1f})",
            over <= 1,
        ),
        ("two fields, use of the binding one", ">= 97.5 %", f"{use:.1f} %", use >= 97.5),
        ("construction, two limits / one", "<= 3", f"median {ratio:.1f}, most {most:.1f}", most <= 3),
    ]


def balance_bars(ranks: list[dict[str, Any]]) -> list[Bar]:
    """The bars of steps of even cost."""
    bars: list[Bar] = []
    for replicas, fewest, square, mixed in ((8, 60, 1.06, 1.01), (64, 80, 1.06, 1.02)):
        for cost, bar, least in (("L^2", square, fewest), ("24576 L + L^2", mixed, 8)):
            rows = [r for r in ranks if (r["replicas"], r["cost"]) == (replicas, cost) and r["steps"] >= least]
            if rows:
                worst = max(row["grouped"][0] for row in rows)
                name = f"grouped, {cost}, W={replicas}, {len(rows)} cases"
                bars.append((name, f"<= {bar}", f"{worst:.3f}", worst <= bar))
    spread = max(row["random"][2] for row in ranks)
    grouped = max(row["grouped"][2] for row in ranks if row["replicas"] == 8)
    bars.append(("spread of steps, random", "<= 1.0", f"{spread:.2f}", spread <= 1.0))
    bars.append(("spread of steps, grouped, W=8", "<= 4", f"{grouped:.2f}", grouped <= 4))
    return bars


def time_bars(measured: list[dict[str, Any]], packed: list[dict[str, Any]]) -> list[Bar]:
    """The bars of speed."""
    bars: list[Bar] = []
    for samples, most in ((1_000_000, 1.0), (10_000_000, 3.0)):
        rows = [row["construct_s"] for row in measured if row["samples"] == samples]
        if rows:
            bars.append((f"construction at {samples:,}", f"<= {most} s", f"{max(rows):.2f} s", max(rows) <= most))
    for name, most, unit in (("row_ms", 1.0, "ms"), ("document_us", 0.3, "us")):
        worst = max(row[name] for row in measured)
        bars.append((name.split("_")[0], f"<= {most} {unit}", f"{worst:.3f} {unit}", worst <= most))
    for audio, most in ((False, 150), (True, 400)):
        rows = [row["first_row_ms"] for row in measured if (row["corpus"] == "audio-like") == audio]
        if rows:
            name = "first row of an epoch" + (", audio" if audio else "")
            bars.append((name, f"<= {most} ms", f"{max(rows):.0f} ms", max(rows) <= most))
    others = [row["microseconds"] for row in packed if row["samples"] == LARGE[0] and "bfd" in row["packer"]]
    ours = [row["microseconds"] for row in packed if row["samples"] == LARGE[0] and "ours" in row["packer"]]
    if others:
        ratio = min(others) / ours[0]
        bars.append(("1M: TRL's time of a sample / ours", ">= 5", f"{ratio:.1f}", ratio >= 5))
    return bars


def stream_bars(measured: list[dict[str, Any]]) -> list[Bar]:
    """The bars of streams."""
    rows = [row for row in measured if row["buffer"] == STREAM_BUFFER]
    waste, wait = max(row["waste"] for row in rows), max(row["wait"] for row in rows)
    microseconds = max(row["microseconds"] for row in rows)
    return [
        ("stream, buffer 2,000: waste", "<= 0.2 %", f"{waste:.2f} %", waste <= 0.2),
        ("stream, buffer 2,000: longest wait", "<= 2.5 buffers", f"{wait:.1f}", wait <= 2.5),
        ("stream, buffer 2,000: a sample", "<= 4 us", f"{microseconds:.1f} us", microseconds <= 4),
    ]


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=Path, help="folder of .npy files with lengths")
    parser.add_argument("--epochs", type=int, default=20, help="epochs whose rows are counted and checked")
    parser.add_argument("--no-large", action="store_true", help="leave out a million samples and more")
    options = parser.parse_args()
    # Where somebody keeps a corpus is nobody else's business.
    sys.argv = ["FOLDER" if argument == str(options.lengths) else argument for argument in sys.argv]
    measured = cases(options.lengths, max(20, options.epochs))
    show_cases(measured)
    speech, text = speech_like(SAMPLES), text_like(SAMPLES)
    ranks = balance("text-like", text, 8_192, 0) + balance("text-like", text, 8_192, 24_576)
    ranks += balance("text-like 200k", text_like(200_000), 8_192, 0) + balance("speech-like", speech, 8_192, 0)
    limited, fields = limits(options.lengths), two_fields()
    timed = [times("speech-like", speech, 4_096, 5), times("text-like", text, 8_192, 5)]
    if not options.no_large:
        timed += [times("speech-like", speech_like(count), 4_096, 2) for count in LARGE]
        timed += [times("text-like", text_like(count), 8_192, 2) for count in LARGE]
        timed.append(times("audio-like", audio_like(LARGE[1]), 640_000, 2))
    windowed = []
    if not options.no_large:
        windowed += [windows("speech-like", speech_like(LARGE[0]), 4_096)]
        windowed += [windows("text-like", text_like(LARGE[0]), 8_192)]
        windowed += [windows("text-like", text_like(LARGE[0]), 8_192, max_documents=46)]
    packed = trl(speech, large=not options.no_large) if HAS_TRL else []
    streamed = streams()
    results = {
        "streams": streamed,
        "limits": limited,
        "two fields": fields,
        "ranks": ranks,
        "times": timed,
        "windows": windowed,
        "TRL's package": packed,
    }
    show_tables(results)
    bars = case_bars(measured) + limit_bars(limited, fields) + balance_bars(ranks) + time_bars(timed, packed)
    bars += stream_bars(streamed)
    show_bars(bars)
    save("packing_plans", {"cases": [asdict(case) for case in measured], **results, "bars": bars})


if __name__ == "__main__":
    main()
