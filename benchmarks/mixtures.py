"""Mixtures next to other mixers: shares, prefixes, time, memory and padding, each figure next to its bar.

    python benchmarks/mixtures.py [--samples 100000] [--rounds 5]

Three corpora of different lengths are mixed 5 : 3 : 2 in tokens. The others draw a corpus for every sample: by these
weights, as users write them, and by weights that are divided by the corpus' mean length. They give samples, which are
counted in the order in which they come; ours give batches. Times are CPU seconds of this process, which has one thread.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
from harness import Bar, save, show, show_bars

from samplers import LengthBucketBatchSampler, Mixture, PackingBatchSampler, plan_epoch

WEIGHTS = {"long": 5, "middle": 3, "short": 2}
MEDIANS = {"long": 200, "middle": 100, "short": 50}
BUDGET = 8192
BATCHES = 1000


def speech(samples: int, median: float, seed: int) -> np.ndarray:
    """Log-normal lengths, as speech has."""
    rng = np.random.default_rng(seed)
    return np.clip(np.rint(rng.lognormal(np.log(median), 0.6, samples)), 1, 2000).astype(np.int64)


def corpora(samples: int) -> dict[str, np.ndarray]:
    """Lengths of the three corpora."""
    return {name: speech(samples, median, seed) for seed, (name, median) in enumerate(MEDIANS.items())}


def interleave(sources: dict[str, np.ndarray], weights: list[float]) -> Iterable[int]:
    """Sample indices from `datasets.interleave_datasets`."""
    from datasets import Dataset, interleave_datasets  # noqa: PLC0415

    starts = np.cumsum([0, *(len(each) for each in sources.values())])
    parts = [Dataset.from_dict({"i": np.arange(a, b)}) for a, b in pairwise(starts)]
    total = sum(weights)
    mixed = interleave_datasets(
        parts, [weight / total for weight in weights], seed=0, stopping_strategy="all_exhausted"
    )
    return (row["i"] for row in mixed)


def weighted_nodes(sources: dict[str, np.ndarray], weights: list[float]) -> Iterable[int]:
    """Sample indices from torchdata's `MultiNodeWeightedSampler`."""
    from torchdata.nodes import IterableWrapper, MultiNodeWeightedSampler  # noqa: PLC0415

    starts = np.cumsum([0, *(len(each) for each in sources.values())])
    nodes = {name: IterableWrapper(range(a, b)) for name, a, b in zip(sources, starts, starts[1:], strict=False)}
    sampler = MultiNodeWeightedSampler(
        nodes, dict(zip(sources, weights, strict=True)), stop_criteria="CYCLE_UNTIL_ALL_DATASETS_EXHAUSTED", seed=0
    )
    sampler.reset()
    return sampler


def lhotse_mux(sources: dict[str, np.ndarray], weights: list[float]) -> Iterable[int]:
    """Sample indices from lhotse's multiplexer, which `CutSet.mux` is."""
    from lhotse.lazy import LazyIteratorMultiplexer  # noqa: PLC0415

    starts = np.cumsum([0, *(len(each) for each in sources.values())])
    parts = [list(range(a, b)) for a, b in pairwise(starts)]
    return LazyIteratorMultiplexer(*parts, weights=weights, seed=0)


def ours(sources: dict[str, np.ndarray], kind: Any, **options: Any) -> Callable[[], Iterator[list[int]]]:
    """Batches of a mixture."""
    mixing = {name: options.pop(name) for name in ("within", "unit") if name in options}

    def batches() -> Iterator[list[int]]:
        mixture = Mixture(sources, weights=WEIGHTS, stop=BATCHES, **mixing)
        return iter(kind(mixture, **options))

    return batches


def as_batches(samples: Callable[[], Iterable[int]]) -> Callable[[], Iterator[list[int]]]:
    """Samples that come one by one, as batches of one."""
    return lambda: ([index] for index in samples())


def measure(
    sources: dict[str, np.ndarray], batches: Callable[[], Iterator[list[int]]], rounds: int
) -> dict[str, float]:
    """Share error, prefix error, repeats, time and memory over the tokens of a thousand batches."""
    lengths = np.concatenate(list(sources.values()))
    starts = np.cumsum([0, *(len(each) for each in sources.values())])[:-1]
    wanted = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
    tokens = BATCHES * BUDGET
    given = list(islice(batches(), tokens // int(lengths.min())))
    samples = np.array(list(chain.from_iterable(given)))
    count = int(np.searchsorted(lengths[samples].cumsum(), tokens * 0.95))
    ends = np.cumsum([len(batch) for batch in given])
    ends = ends[ends <= count]
    owners = np.searchsorted(starts, samples, side="right") - 1
    taken = np.zeros((count, len(starts)))
    taken[np.arange(count), owners[:count]] = lengths[samples[:count]]
    taken = taken.cumsum(0)[ends - 1]
    errors = taken - taken.sum(1, keepdims=True) * wanted
    # Batches of a fixed number of rows may have more tokens than the others.
    steps = np.diff(taken.sum(1), prepend=0)
    times = []
    for _ in range(rounds):
        begun = time.process_time()
        drawn = sum(len(batch) for batch in islice(batches(), len(ends)))
        times.append((time.process_time() - begun) / drawn * 1e6)
    tracemalloc.start()
    for _ in islice(batches(), len(ends)):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "share error, points": float(np.abs(taken[-1] / taken[-1].sum() - wanted).max() * 100),
        "largest prefix error, batches": float(np.abs(errors).max() / max(BUDGET, steps.max())),
        "us per sample": statistics.median(times),
        "MB": peak / 1e6,
    }


def compare_mixers(samples: int, rounds: int) -> list[dict[str, Any]]:
    """The first table."""
    sources = corpora(samples)
    by_sample = [float(weight) for weight in WEIGHTS.values()]
    corrected = [weight / sources[name].mean() for name, weight in WEIGHTS.items()]
    contenders: dict[str, Callable[[], Iterator[list[int]]]] = {
        "ours, within batch": ours(sources, LengthBucketBatchSampler, max_tokens=BUDGET),
        "ours, within sample": ours(sources, LengthBucketBatchSampler, max_tokens=BUDGET, within="sample"),
        "ours, 70 rows": ours(sources, LengthBucketBatchSampler, batch_size=70),
        "ours, packed": ours(sources, PackingBatchSampler, capacity=BUDGET),
        "ours, packed within sample": ours(sources, PackingBatchSampler, capacity=BUDGET, within="sample"),
    }
    for name, make in (
        ("interleave_datasets", interleave),
        ("MultiNodeWeightedSampler", weighted_nodes),
        ("lhotse mux", lhotse_mux),
    ):
        contenders[name] = as_batches(lambda make=make: make(sources, by_sample))
        contenders[f"{name}, corrected"] = as_batches(lambda make=make: make(sources, corrected))
    return [{"mixer": name, **measure(sources, batches, rounds)} for name, batches in contenders.items()]


def least_padding(lengths: np.ndarray, batches: int) -> int:
    """The fewest padded tokens of any batches of this budget, if there are at most so many, to about a thousandth.

    Of all batches, those of neighbours in length pad least. A price of each batch, found by halving, gives the number.
    """
    ordered = np.sort(lengths)[::-1]
    count = len(ordered)
    rows = np.maximum(1, BUDGET // ordered)
    low, high, least = 0.0, float(BUDGET), count * int(ordered[0])
    for _ in range(10):
        price = (low + high) / 2
        costs, numbers = np.zeros(count + 1), np.zeros(count + 1, np.int64)
        for first in range(count - 1, -1, -1):
            ends = np.arange(first + 1, min(count, first + rows[first]) + 1)
            candidates = costs[ends] + (ends - first) * ordered[first]
            best = int(candidates.argmin())
            costs[first], numbers[first] = candidates[best] + price, numbers[ends[best]] + 1
        if numbers[0] <= batches:
            high, least = price, int(costs[0] - price * numbers[0])
        else:
            low = price
    return least


def find_least_padding(sources: dict[str, np.ndarray]) -> float:
    """The share of padding if each batch is of one source, a pass has as many batches as ours, and none pads less."""
    # One corpus in five: they differ little from neighbour to neighbour.
    parts = list(sources.values())[::5]
    padded = [least_padding(each, len(plan_epoch(each, max_tokens=BUDGET).batches)) for each in parts]
    return 1 - sum(int(each.sum()) for each in parts) / sum(padded)


def compare_padding(samples: int) -> list[dict[str, Any]]:
    """Padding and mixing of both kinds, next to the same corpus unmixed."""
    cases = {
        "3 corpora": (corpora(samples), WEIGHTS),
        "20 corpora": ({f"c{i}": speech(samples // 10, 60 + 10 * i, i) for i in range(20)}, None),
        "100 corpora": ({f"c{i}": speech(samples // 10, 60 + 2 * i, i) for i in range(100)}, None),
    }
    rows = []
    for name, (sources, weights) in cases.items():
        least = find_least_padding(sources) if len(sources) > 3 else float("nan")
        unmixed = plan_epoch(np.concatenate(list(sources.values())), max_tokens=BUDGET).report()
        for within in ("batch", "sample"):
            mixture = Mixture(sources, weights=weights, within=within)  # type: ignore[arg-type]
            sampler = LengthBucketBatchSampler(mixture, max_tokens=BUDGET)
            plan = sampler.plan(0)
            report = plan.report()
            mixed = [len(np.unique(np.searchsorted(mixture.starts, batch, side="right"))) for batch in plan.batches]
            rows.append(
                {
                    "corpora": name,
                    "within": within,
                    "padding %": report.padding * 100,
                    "unmixed %": unmixed.padding * 100,
                    "least of one source %": least * 100,
                    "budget use %": report.budget_use * 100,
                    "unmixed use %": unmixed.budget_use * 100,
                    "corpora in a batch": float(np.mean(mixed)),
                    "repeated pairs %": report.repeated_pairs * 100,
                    "error at the end, batches": sampler.mixture_report(sampler.position(len(sampler))).error / BUDGET
                    if list(sampler)
                    else 0.0,
                }
            )
    return rows


def compare_costs(samples: int, rounds: int) -> list[dict[str, Any]]:
    """Time to plan and give an epoch of a hundred corpora, next to their concatenation."""
    rows = []
    for kind, options, size in (
        (LengthBucketBatchSampler, {"max_tokens": BUDGET}, samples // 10),
        (LengthBucketBatchSampler, {"max_tokens": BUDGET}, samples // 3),
        (PackingBatchSampler, {"capacity": BUDGET}, samples // 10),
    ):
        sources = {f"c{i}": speech(size, 60 + 2 * i, i) for i in range(100)}
        whole = np.concatenate(list(sources.values()))
        makes: dict[str, Callable[[], Any]] = {
            "concatenation": partial(kind, whole, **options),
            "within batch": lambda kind=kind, options=options, each=sources: kind(Mixture(each), **options),
            "within sample": lambda kind=kind, options=options, each=sources: kind(
                Mixture(each, within="sample"), **options
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in makes}
        for _ in range(rounds):
            for name, make in makes.items():
                begun = time.process_time()
                count = sum(len(batch) for batch in make())
                times[name].append((time.process_time() - begun) / count * 1e6)
        usual = times["concatenation"]
        for name, values in times.items():
            ratio = statistics.median(value / other for value, other in zip(values, usual, strict=True))
            rows.append(
                {
                    "sampler": kind.__name__,
                    "samples of each": size,
                    "plan": name,
                    "us per sample": statistics.median(values),
                    "ratio": ratio,
                }
            )
    return rows


def find_bars(mixers: list[dict[str, Any]], padding: list[dict[str, Any]], costs: list[dict[str, Any]]) -> list[Bar]:
    """The targets."""
    # A batch of 70 of the longest rows has six times the tokens of a mean one: no order of batches is that exact.
    own = [row for row in mixers if row["mixer"].startswith("ours") and not row["mixer"].endswith("rows")]
    share = max(row["share error, points"] for row in own)
    batch = max(row["largest prefix error, batches"] for row in own if "within sample" not in row["mixer"])
    sample = max(row["largest prefix error, batches"] for row in own if "within sample" in row["mixer"])
    bars: list[Bar] = [
        ("share error after 1,000 batches", "<= 0.1 points", f"{share:.3f}", share <= 0.1),
        ("prefix error, within batch", "<= 1 batch", f"{batch:.2f}", batch <= 1),
        ("prefix error, within sample", "<= 2 batches", f"{sample:.2f}", sample <= 2),
    ]
    for row in padding:
        more = row["padding %"] - row["unmixed %"]
        bars.append(
            (f"padding, {row['corpora']} within {row['within']}", "<= unmixed + 0.5", f"{more:+.2f}", more <= 0.5)
        )
    for row in costs:
        if row["plan"] != "concatenation":
            sampler, size = row["sampler"].removesuffix("BatchSampler"), row["samples of each"]
            figure = f"plan of 100 corpora of {size:,}, {sampler} {row['plan']}"
            bars.append((figure, "<= 1.1 x concatenation", f"{row['ratio']:.2f}", row["ratio"] <= 1.1))
    return bars


def as_text(row: dict[str, Any]) -> dict[str, str]:
    """A row of a table."""
    return {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in row.items()}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000, help="samples of each of the three corpora")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    mixers = compare_mixers(arguments.samples, arguments.rounds)
    show("mixers, 5 : 3 : 2 in tokens", [as_text(row) for row in mixers])
    padding = compare_padding(arguments.samples)
    show("padding and mixing", [as_text(row) for row in padding])
    costs = compare_costs(arguments.samples, arguments.rounds)
    show("planning a hundred corpora", [as_text(row) for row in costs])
    bars = find_bars(mixers, padding, costs)
    show_bars(bars)
    save("mixtures", {"mixers": mixers, "padding": padding, "costs": costs, "bars": bars})


if __name__ == "__main__":
    main()
