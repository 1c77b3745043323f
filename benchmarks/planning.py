"""The planner against other samplers: padding, mixing, balance, speed and scale, each figure with its target.

Needs transformers and lhotse. Every contender gives all batches of all ranks for an epoch: rank r takes batch
`t * W + r` in step t.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
import torch
from contenders import (
    BUDGET,
    CONTENDERS,
    SAMPLES,
    SEEDS,
    Batches,
    Contender,
    Corpus,
    Lengths,
    at_random,
    bucketed,
    in_chunks,
    make_corpora,
    ours,
    rebalanced,
    speech_like,
)
from harness import Bar, Row, compare, run_through, save, show, show_bars
from lhotse.cut import CutSet
from lhotse.dataset.sampling.dynamic_bucketing import DynamicBucketingSampler
from matplotlib.ticker import FuncFormatter
from torch.utils.data import BatchSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from samplers import LengthBucketBatchSampler

PICTURE: Final = Path(__file__).parents[1] / "docs" / "pictures" / "planning.svg"
WINDOWS: Final = (500, 1_000, 2_000, 4_000, 7_000, 10_000)
# Pairs of a batch are looked for this many epochs later; the fractions are averaged over the first STARTS epochs.
LAGS: Final = (1, 2, 5)
STARTS: Final = 4
# Small corpora: number of samples, and mean rows of a batch.
SMALL: Final = ((60, 8), (240, 60), (240, 16), (700, 32), (2_000, 100), (2_000, 32), (6_000, 32))
SMALL_EPOCHS: Final = 24
# With fewer batches, the lag-1 autocorrelation of a random order is itself a few hundredths.
ENOUGH_BATCHES: Final = 500
LARGE: Final = (1_000_000, 10_000_000)


@dataclass(frozen=True)
class Figures:
    """The figures of one contender on one corpus.

    Attributes:
        batches: Number of batches at W = 1.
        padding: Fraction of padding in the padded tokens.
        over: Fraction of batches over the budget, among those with two rows or more.
        worst: Padded tokens of the largest of them, in budgets.
        meeting: By lag in epochs: fraction of the pairs in a batch that share a batch again, mean over epochs.
        lag_one: Lag-1 autocorrelation of the mean length of batches, mean over seeds; None with too few batches.
        imbalance: For each W, the sum over steps of W x the largest padded tokens / all padded tokens, and the
            largest such ratio of a single step; None without a step. A last step with fewer batches than ranks
            is left out; ours is split and counts.
    """

    corpus: str
    contender: str
    batches: int
    padding: float
    over: float
    worst: float
    meeting: dict[int, float]
    lag_one: float | None
    imbalance: dict[int, tuple[float, float] | None]


def measure(corpus: Corpus, name: str, contender: Contender) -> Figures:
    """Measure one contender on one corpus."""
    epochs = [contender(corpus, epoch, 0, 1) for epoch in range(STARTS + max(LAGS))]
    first = epochs[0]
    padded = padded_tokens(corpus, first)
    several = padded[[len(batch) > 1 for batch in first]] / corpus.budget
    steady = len(first) >= ENOUGH_BATCHES
    return Figures(
        corpus=corpus.name,
        contender=name,
        batches=len(first),
        padding=1 - int(corpus.lengths[np.concatenate(first)].sum()) / int(padded.sum()),
        over=float(np.mean(several > 1)),
        worst=float(several.max()),
        meeting=mean_meeting(corpus, epochs),
        lag_one=mean_lag_one(corpus, contender) if steady else None,
        imbalance={replicas: imbalance(corpus, contender, replicas) for replicas in (8, 64)},
    )


def padded_tokens(corpus: Corpus, batches: Batches) -> Lengths:
    """Rows x longest row of each batch: int64 `[n]`."""
    return np.array([len(batch) * corpus.lengths[batch].max() for batch in batches])


def share_meeting(samples: int, first: Batches, second: Batches) -> float:
    """Fraction of the pairs that share a batch in the first epoch and again in the second."""
    later = np.full(samples, -1)
    for number, batch in enumerate(second):
        later[batch] = number
    met, pairs = 0, 0
    for batch in first:
        together = np.unique(later[batch], return_counts=True)[1]
        met += int((together * (together - 1) // 2).sum())
        pairs += len(batch) * (len(batch) - 1) // 2
    return met / pairs


def mean_meeting(corpus: Corpus, epochs: Sequence[Batches]) -> dict[int, float]:
    """Fraction of pairs that meet again at each lag, mean over all epochs but the last ones."""
    return {
        lag: float(
            np.mean(
                [
                    share_meeting(len(corpus.lengths), epochs[epoch], epochs[epoch + lag])
                    for epoch in range(len(epochs) - max(LAGS))
                ]
            )
        )
        for lag in LAGS
    }


def mean_lag_one(corpus: Corpus, contender: Contender) -> float:
    """Lag-1 autocorrelation of the mean length of batches, mean over seeds."""
    found = []
    for seed in range(SEEDS):
        means = np.array([corpus.lengths[batch].mean() for batch in contender(corpus, 0, seed, 1)])
        means -= means.mean()
        found.append(means[:-1] @ means[1:] / (means @ means))
    return float(np.mean(found))


def imbalance(corpus: Corpus, contender: Contender, replicas: int) -> tuple[float, float] | None:
    """Time lost to the largest batch of each step, as a ratio to no waiting: over all steps, and in the worst step."""
    padded = padded_tokens(corpus, contender(corpus, 0, 0, replicas))
    steps = len(padded) // replicas
    if steps == 0:
        return None
    costs = padded[: steps * replicas].reshape(steps, replicas)
    waits = replicas * costs.max(1)
    return float(waits.sum() / costs.sum()), float((waits / costs.sum(1)).max())


def as_row(figures: Figures) -> dict[str, str]:
    """The line of a contender in the table of its corpus."""
    row = {
        "sampler": figures.contender,
        "batches": f"{figures.batches:,}",
        "padding": f"{figures.padding:.2%}",
        **{f"meet again, lag {lag}": f"{share:.1%}" for lag, share in figures.meeting.items()},
        "over": f"{figures.over:.1%}",
        "worst": f"{figures.worst:.2f}x",
        "lag-1": "-" if figures.lag_one is None else f"{figures.lag_one:+.3f}",
    }
    for replicas, ratios in figures.imbalance.items():
        name = f"W={replicas}: imbalance (worst step)"
        row[name] = "-" if ratios is None else f"{ratios[0]:.3f} ({ratios[1]:.2f})"
    return row


BARS: Final = {
    "sampler": "(target for ours)",
    "batches": "",
    "padding": "<= 1.60%",
    "meet again, lag 1": "<= 21%",
    "meet again, lag 2": "",
    "meet again, lag 5": "",
    "over": "0",
    "worst": "<= 1.00x",
    "lag-1": "< 0.050",
    "W=8: imbalance (worst step)": "<= 1.030",
    "W=64: imbalance (worst step)": "<= 1.030",
}
# Padding and pairs have a target on speech-like lengths only; lag-1 only with enough batches.
ANYWHERE: Final = BARS | {"padding": "", "meet again, lag 1": ""}


def compare_plans(corpora: Sequence[Corpus]) -> list[Figures]:
    """Print a table for each corpus."""
    found = []
    for corpus in corpora:
        figures = [measure(corpus, name, contender) for name, contender in CONTENDERS.items()]
        bars = BARS if corpus is corpora[0] else ANYWHERE
        size = f"{len(corpus.lengths):,} samples, budget {corpus.budget:,}, fixed batches of {corpus.rows}"
        show(f"{corpus.name}: {size}", [*map(as_row, figures), bars])
        found += figures
    return found


def compare_windows(corpus: Corpus) -> dict[str, list[dict[str, float]]]:
    """Padding and pairs that meet again, for our windows and for chunks sorted by hand."""
    curves: dict[str, list[dict[str, float]]] = {}
    kinds: dict[str, Callable[..., Batches]] = {"ours": ours, "sort in chunks, by hand": in_chunks}
    for (name, contender), option in zip(kinds.items(), ("window", "chunk"), strict=True):
        curves[name] = []
        for size in WINDOWS:
            epochs = [contender(corpus, epoch, 0, 1, **{option: size}) for epoch in range(STARTS + max(LAGS))]
            shares = mean_meeting(corpus, epochs)
            curves[name].append(
                {
                    "samples": size,
                    "padding": mean_padding(corpus, epochs),
                    "meeting": float(np.mean(list(shares.values()))),
                    **{f"meeting at lag {lag}": share for lag, share in shares.items()},
                }
            )
    rows = []
    for index, size in enumerate(WINDOWS):
        row = {"samples sorted together": f"{size:,}"}
        for name, curve in curves.items():
            row |= {f"{name}: {figure}": f"{curve[index][figure]:.2%}" for figure in ("padding", "meeting")}
        rows.append(row)
    show(f"{corpus.name}: effect of the number of samples sorted together", rows)
    return curves


def mean_padding(corpus: Corpus, epochs: Sequence[Batches]) -> float:
    """Fraction of padding, mean over epochs."""
    real = int(corpus.lengths.sum())
    return float(np.mean([1 - real / int(padded_tokens(corpus, batches).sum()) for batches in epochs]))


def compare_small(corpora: Sequence[Corpus]) -> list[dict[str, Any]]:
    """Small corpora: our default next to chunks by hand that let as many pairs meet again."""
    found = []
    for whole in corpora:
        for samples, rows in SMALL:
            lengths = whole.lengths[:samples]
            corpus = Corpus(whole.name, lengths, int(rows * lengths.mean()))
            epochs = [ours(corpus, epoch, 0, 1) for epoch in range(SMALL_EPOCHS + max(LAGS))]
            shares = mean_meeting(corpus, epochs)
            curve = []
            for chunks in range(1, min(9, 1 + len(epochs[0]))):
                drawn = [in_chunks(corpus, epoch, 0, 1, chunk=-(-samples // chunks)) for epoch in range(len(epochs))]
                curve.append((float(np.mean(list(mean_meeting(corpus, drawn).values()))), mean_padding(corpus, drawn)))
            curve.sort()
            found.append(
                {
                    "corpus": corpus.name,
                    "samples": samples,
                    "batches": len(epochs[0]),
                    "padding": mean_padding(corpus, epochs),
                    "meeting": shares,
                    "chunks": float(np.interp(np.mean(list(shares.values())), *map(list, zip(*curve, strict=True)))),
                }
            )
    rows = [
        {
            "corpus": f"{one['corpus']}, {one['samples']:,}",
            "batches": f"{one['batches']}",
            "padding": f"{one['padding']:.2%}",
            **{f"meet again, lag {lag}": f"{share:.1%}" for lag, share in one["meeting"].items()},
            "chunks that mix as much": f"{one['chunks']:.2%}",
            "points more": f"{100 * (one['padding'] - one['chunks']):+.2f}",
        }
        for one in found
    ]
    show("small corpora: padding next to sorted chunks that let as many pairs meet again", rows)
    return found


def draw_plans(figures: Sequence[Figures], curves: dict[str, list[dict[str, float]]]) -> None:
    """Draw padding against pairs that meet again, for all contenders on speech-like lengths."""
    # Text stays text and ids do not change: equal figures give equal files.
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "planning", "font.size": 9}
    picture, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for index, one in enumerate(figures):
        colour, curve = f"C{index}", curves.get(one.contender, [])
        axes.plot([p["meeting"] for p in curve], [p["padding"] for p in curve], marker=".", linewidth=1, color=colour)
        axes.scatter(
            [np.mean(list(one.meeting.values()))],
            [one.padding],
            s=45 if one.contender == "ours" else 22,
            color=colour,
            zorder=3,
        )
        # Offsets keep the labels away from the curves and from each other.
        above = one.contender not in ("sort in chunks, by hand", "ours", "lhotse bucketing")
        offset = (5, 4) if above else (-4, -12)
        align = "left" if above else "right"
        axes.annotate(
            one.contender,
            (float(np.mean(list(one.meeting.values()))), one.padding),
            offset,
            textcoords="offset points",
            ha=align,
            color=colour,
        )
    for point in curves["ours"]:
        label = f"{point['samples']:,}"
        axes.annotate(label, (point["meeting"], point["padding"]), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="pairs of a batch that meet again, mean of 1, 2 and 5 epochs later",
        ylabel="padding",
    )
    axes.set_title(f"{SAMPLES:,} speech-like lengths; curves over samples sorted together", fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.grid(which="both", linewidth=0.3)
    picture.savefig(PICTURE, metadata={"Date": None})


def plan_batches(corpus: Corpus, replicas: int = 1) -> LengthBucketBatchSampler:
    """A new sampler of ours, which sorts the lengths."""
    return LengthBucketBatchSampler(corpus.lengths, max_tokens=corpus.budget, num_replicas=replicas, rank=0)


def group_lengths(corpus: Corpus) -> BatchSampler:
    """Transformers' length grouping, from a list of lengths, which it reads faster than an array."""
    grouped = LengthGroupedSampler(corpus.rows, lengths=corpus.lengths.tolist())
    return BatchSampler(grouped, corpus.rows, drop_last=False)


def bucket_cuts(corpus: Corpus, replicas: int = 1) -> DynamicBucketingSampler:
    """A new sampler of lhotse, which estimates the bounds of its buckets."""
    return bucketed(corpus, range(len(corpus.lengths)), 0, replicas, DynamicBucketingSampler)


def time_epochs(corpus: Corpus, rounds: int, peers: Sequence[str]) -> Row:
    """Plan an epoch and take its batches: ours against transformers' grouping and some of `PEERS`."""
    planner, grouped = plan_batches(corpus), group_lengths(corpus)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: run_through(planner),
        "ours, with the sort": lambda: run_through(plan_batches(corpus)),
        "transformers LengthGrouped": lambda: run_through(grouped),
        **{name: partial(PEERS[name], corpus) for name in peers},
    }
    print()
    row = compare(f"{corpus.name}, {len(corpus.lengths):,} samples: an epoch", "ours", calls, rounds=rounds)
    lines = [
        {"sampler": name, "us": f"{microseconds / len(corpus.lengths):.3f}"}
        for name, microseconds in row.microseconds.items()
    ]
    show("us per sample", lines)
    return row


PEERS: Final[dict[str, Callable[[Corpus], object]]] = {
    "transformers rebalance, 8": lambda corpus: rebalanced(corpus, 0, 0, 1, groups=8),
    "transformers rebalance, 64": lambda corpus: rebalanced(corpus, 0, 0, 1, groups=64),
    "lhotse bucketing": lambda corpus: run_through(bucket_cuts(corpus)),
    "sort in chunks, by hand": lambda corpus: in_chunks(corpus, 0, 0, 1),
    "random": lambda corpus: at_random(corpus, 0, 0, 1),
}


def time_steps(corpus: Corpus) -> dict[str, dict[int, float]]:
    """Microseconds per step of one rank, over a whole epoch, at several W; ours also on a million lengths."""
    million = Corpus("ours, 1,000,000 samples", speech_like(1_000_000), BUDGET)
    makers: dict[str, Callable[[int], Any]] = {
        "ours": partial(plan_batches, corpus),
        million.name: partial(plan_batches, million),
        "lhotse bucketing": partial(bucket_cuts, corpus),
    }
    pairs = [(name, replicas) for name in makers for replicas in (1, 8, 64)]
    made = {pair: makers[pair[0]](pair[1]) for pair in pairs}
    calls = {f"{name}, W={replicas}": partial(run_through, made[name, replicas]) for name, replicas in pairs}
    print()
    row = compare(f"{corpus.name}, an epoch of one rank", "ours, W=1", calls, rounds=9)
    found: dict[str, dict[int, float]] = {name: {} for name in makers}
    for name, replicas in pairs:
        found[name][replicas] = row.microseconds[f"{name}, W={replicas}"] / run_through(made[name, replicas])
    show(
        "us per step of one rank   (target: ours does not grow with W; in short epochs the fixed cost dominates)",
        [{"sampler": name} | {f"W={w}": f"{us:,.1f}" for w, us in each.items()} for name, each in found.items()],
    )
    return found


def time_resume(corpus: Corpus) -> list[Row]:
    """The first batch at 90 % of an epoch against one at the start, for the same sampler, a new one, and lhotse."""
    planner, (state, _) = plan_batches(corpus), states(corpus)
    start, late = planner.position(0), planner.position(len(planner) * 9 // 10)
    again: dict[str, Callable[[], object]] = {
        "at 90 %": lambda: resume(planner, late),
        "at the start": lambda: resume(planner, start),
    }
    new_sampler: dict[str, Callable[[], object]] = {
        "at 90 %": lambda: resume(plan_batches(corpus), late),
        "at the start": lambda: resume(plan_batches(corpus), start),
        "at the start, no seek": lambda: next(iter(plan_batches(corpus))),
    }
    peer = {
        "lhotse at 90 %": lambda: resume_cuts(bucket_cuts(corpus), state),
        "lhotse at the start": lambda: next(iter(bucket_cuts(corpus))),
    }
    bar = "as fast as at the start"
    print()
    return [
        compare("ours, first batch, same sampler", "at 90 %", again, rounds=201, bar=bar),
        compare("ours, first batch, new sampler", "at 90 %", new_sampler, rounds=51, bar=bar),
        compare("first batch, new sampler, with lhotse", "at 90 %", new_sampler | peer, rounds=7),
    ]


def states(corpus: Corpus) -> tuple[str, str]:
    """The saved state at 90 % of an epoch, as JSON: lhotse's and ours."""
    cuts, planner = bucket_cuts(corpus), plan_batches(corpus)
    for _ in islice(cuts, run_through(cuts) * 9 // 10):
        pass
    return json.dumps(cuts.state_dict()), json.dumps(planner.position(len(planner) * 9 // 10))


def resume(planner: LengthBucketBatchSampler, position: dict[str, int | str]) -> list[int]:
    """The first batch after a position."""
    planner.seek(position)
    return next(iter(planner))


def resume_cuts(cuts: DynamicBucketingSampler, state: str) -> CutSet:
    """The first batch after a state; lhotse takes all batches before it."""
    held = json.loads(state)
    # JSON turns the epoch numbers into strings.
    epochs = held["diagnostics"]["stats_per_epoch"]
    held["diagnostics"]["stats_per_epoch"] = {int(epoch): figures for epoch, figures in epochs.items()}
    cuts.load_state_dict(held)
    return next(iter(cuts))


def bars_of_plans(figures: Sequence[Figures]) -> list[Bar]:
    """The targets for batches, the measured figures, and whether they meet the targets."""
    own = [one for one in figures if one.contender == "ours"]
    speech = own[0]
    over = max(one.over for one in own)
    lag = max(abs(one.lag_one) for one in own if one.lag_one is not None)
    bars = [
        ("padding, speech-like", "<= 1.6 %", f"{speech.padding:.2%}", speech.padding <= 0.016),
        *(
            (f"pairs that meet again at lag {lag}, speech-like", "<= 21 %", f"{share:.1%}", share <= 0.21)
            for lag, share in speech.meeting.items()
        ),
        ("batches over budget, every corpus", "0", f"{over:.1%}", over == 0),
        ("lag-1, the worst corpus", "< 0.05", f"{lag:.3f}", lag < 0.05),
    ]
    for replicas in speech.imbalance:
        reached = {one.corpus: ratios[0] for one in own if (ratios := one.imbalance[replicas])}
        for name in ("speech-like", max(reached, key=lambda corpus: reached[corpus])):
            ratio = reached[name]
            bars.append((f"imbalance at W={replicas}, {name}", "<= 1.03", f"{ratio:.3f}", ratio <= 1.03))
    return bars


def bars_of_epochs(rows: dict[int, Row]) -> list[Bar]:
    """The targets for the time to plan an epoch and take its batches."""
    lhotse = rows[SAMPLES].microseconds["lhotse bucketing"] / SAMPLES
    bars = []
    for samples, row in rows.items():
        grouped = row.times_as_fast["transformers LengthGrouped"][1]
        ratios = [
            ("against LengthGrouped", 4, grouped),
            ("with the sort, against LengthGrouped", 4, grouped / row.times_as_fast["ours, with the sort"][1]),
            ("against lhotse at 20,000", 150, lhotse * samples / row.microseconds["ours"]),
        ]
        for name, least, ratio in ratios:
            bars.append((f"us per sample, {samples:,}, {name}", f"{least}x", f"{ratio:.1f}x", ratio >= least))
    return bars


def bars_of_resume(rows: Sequence[Row], state: str) -> list[Bar]:
    """The targets for resuming at 90 % of an epoch."""
    bars = [("state in bytes", "< 1,000", f"{len(state)}", len(state) < 1_000)]
    for row in rows[:2]:
        ratio = 1 / row.times_as_fast["at the start"][1]
        bars.append((f"{row.case}: at 90 % by at the start", "1x", f"{ratio:.2f}x", ratio < 1.05))
    return bars


def main() -> None:
    """Print and save all tables, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=Path, metavar="FOLDER", help="folder of .npy files, lengths [N] each")
    parser.add_argument("--large", action="store_true", help="also epochs of one and of ten million lengths")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="lhotse")
    torch.set_num_threads(1)
    corpora = make_corpora(options.lengths)
    figures = compare_plans(corpora)
    curves, small = compare_windows(corpora[0]), compare_small(corpora[:3])
    draw_plans(figures[: len(CONTENDERS)], curves)
    epochs = {SAMPLES: time_epochs(corpora[0], 15, list(PEERS))}
    steps, resumed, saved = time_steps(corpora[0]), time_resume(corpora[0]), states(corpora[0])
    print(f"\nstate in bytes: lhotse {len(saved[0])}, ours {len(saved[1])}")
    for samples in LARGE if options.large else ():
        epochs[samples] = time_epochs(Corpus("speech-like", speech_like(samples), BUDGET), 5, [])
    most = max(small, key=lambda one: one["padding"] - one["chunks"])
    points = 100 * (most["padding"] - most["chunks"])
    bars = [
        ("small corpora, points of padding above chunks that mix as much", "<= 0.5", f"{points:+.2f}", points <= 0.5)
    ]
    bars += bars_of_plans(figures) + bars_of_epochs(epochs) + bars_of_resume(resumed, saved[1])
    show_bars(bars)
    results = {
        "plans": [asdict(one) for one in figures],
        "windows": curves,
        "small": small,
        "epochs": [asdict(row) for row in epochs.values()],
        "us a step": steps,
        "resume": [asdict(row) for row in resumed],
        "state in bytes": {"lhotse": len(saved[0]), "ours": len(saved[1])},
        "bars": bars,
    }
    save("planning", results)


if __name__ == "__main__":
    main()
