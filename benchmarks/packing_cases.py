"""What packs are measured by: corpora, and the figures of `packing_plans.py`."""

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from packers import (
    Lengths,
    Rows,
    axolotl_first_fit,
    best_fit,
    chi_square,
    fastest,
    imbalance,
    mates,
    meet_again,
    meet_by_chance,
    next_fit,
    row_of_each,
    run_trl,
    step_spread,
    tenths,
    waste,
)

from samplers.dynamic.packer import Packer
from samplers.planning.pack_batches.options import PackOptions
from samplers.planning.pack_batches.window_packs import WindowPacks, make_window_packs
from samplers.planning.packs.pack_table import PackTable
from samplers.planning.packs.row_order import RowOrder
from samplers.planning.schedules.schedule import make_schedule

SAMPLES: Final = 20_000
CAPACITIES: Final = (2_048, 4_096, 8_192, 16_384, 32_768)
FEWEST_ROWS: Final = 58
LAGS: Final = (1, 2, 5)
MATES_EPOCHS: Final = 20
STEPS_EPOCHS: Final = 5
MATES_SAMPLES: Final = 400


@dataclass
class Case:
    """A corpus and a capacity, and what packers make of it; shares in per cent."""

    corpus: str
    capacity: int
    documents: float
    rows: int
    best_fit_rows: int
    waste: float
    best_fit: float
    next_fit: float
    axolotl: float
    meets: list[float]
    random: float
    mates: float
    random_mates: float
    classes: float
    sources: float
    sd_documents: float
    broken: int
    rung: int
    spares: int
    construct_ms: float
    epoch_ms: float


def speech_like(samples: int) -> Lengths:
    """Log-normal, median 4.5 s in 10 ms, clipped to 0.5 and 30 s."""
    rng = np.random.default_rng(0)
    return np.exp(rng.normal(np.log(450), 0.6, samples)).clip(50, 3_000).astype(np.int64)


def text_like(samples: int) -> Lengths:
    """Log-normal, median 150 tokens, clipped to 8 and 4,096."""
    rng = np.random.default_rng(1)
    return np.exp(rng.normal(np.log(150), 0.9, samples)).clip(8, 4_096).astype(np.int64)


def audio_like(samples: int) -> Lengths:
    """Log-normal, median 3 s in samples of 16 kHz, clipped to 1 and 20 s: more distinct lengths than classes."""
    rng = np.random.default_rng(2)
    return np.exp(rng.normal(np.log(48_000), 0.5, samples)).clip(16_000, 320_000).astype(np.int64)


def corpora(folder: Path | None) -> dict[str, Lengths]:
    """The made corpora, and those of a folder."""
    made = {"speech-like": speech_like(SAMPLES), "text-like": text_like(SAMPLES)}
    files = [] if folder is None else sorted(folder.glob("*.npy"))
    return made | {path.stem: np.load(path).astype(np.int64) for path in files}


def all_rows(table: PackTable, epoch: int) -> Rows:
    """All rows of an epoch, by number."""
    return table.rows(epoch, np.arange(len(table)))


def measure_case(name: str, lengths: Lengths, capacity: int, epochs: int) -> Case:
    """Pack a corpus by all packers."""
    table = PackTable.build(lengths, capacity=capacity)
    owners, broken, spares, deviations = [], 0, 0, []
    for epoch in range(epochs):
        samples, documents = all_rows(table, epoch)
        full = np.add.reduceat(lengths[samples], np.cumsum(documents) - documents)
        lost = len(samples) != len(lengths) or np.bincount(samples, minlength=len(lengths)).max() > 1
        broken += int((full > capacity).sum()) + int(lost) + int(len(documents) != len(table))
        spares += table.recipes(epoch).tree is table.plan.spare
        deviations.append(documents.std() / documents.mean())
        if epoch < MATES_EPOCHS:
            owners.append(row_of_each((samples, documents)))
    meets = [statistics.mean(meet_again(owners[e], owners[e + lag]) for e in range(STEPS_EPOCHS)) for lag in LAGS]
    chosen = np.random.default_rng(0).permutation(len(lengths))[:MATES_SAMPLES]
    partners, chance = mates(owners, chosen)
    by_length = np.searchsorted(np.quantile(lengths, np.arange(1, 10) / 10), lengths)
    by_source = np.arange(len(lengths)) * 8 // len(lengths)
    orders = [RowOrder(table, epoch).samples(np.arange(len(table)))[0] for epoch in range(6)]
    fitted = best_fit(lengths, capacity)[1]
    return Case(
        corpus=name,
        capacity=capacity,
        documents=len(lengths) / len(table),
        rows=len(table),
        best_fit_rows=len(fitted),
        waste=waste(lengths, len(table), capacity),
        best_fit=waste(lengths, len(fitted), capacity),
        next_fit=waste(lengths, len(next_fit(lengths, capacity)[1]), capacity),
        axolotl=waste(lengths, len(axolotl_first_fit(lengths, capacity)[1]), capacity),
        meets=meets,
        random=meet_by_chance(owners[0]),
        mates=partners,
        random_mates=chance,
        classes=statistics.mean(chi_square(tenths(samples, by_length)) for samples in orders),
        sources=statistics.mean(chi_square(tenths(samples, by_source)) for samples in orders),
        sd_documents=statistics.mean(deviations),
        broken=broken,
        rung=_rung(table),
        spares=spares,
        construct_ms=1e3 * build_time(lengths, capacity),
        epoch_ms=1e3
        * min(fastest(lambda epoch=epoch: table.rows(epoch, np.array([0])), 1) for epoch in range(100, 108)),
    )


def _rung(table: PackTable) -> int:
    rung = table.plan.rungs[0]
    return rung.finish if rung.jitter == 0 else -rung.jitter


def cases(folder: Path | None, epochs: int) -> list[Case]:
    """All corpora at all capacities where the longest sample fits and there are rows enough."""
    measured = []
    for name, lengths in corpora(folder).items():
        for capacity in CAPACITIES:
            if lengths.max() > capacity or lengths.sum() < FEWEST_ROWS * capacity * 0.99:
                continue
            case = measure_case(name, lengths, capacity, epochs)
            measured.append(case)
            print(
                f"{name} {capacity}: {case.rows} rows (best-fit {case.best_fit_rows}), waste {case.waste:.2f} %, meets "
                f"{case.meets[0]:.3f} % (random {case.random:.3f}), {case.construct_ms:.0f} ms",
                flush=True,
            )
    return measured


def limits(folder: Path | None) -> list[dict[str, Any]]:
    """Rows over the bound under a limit on documents or squares, by spread and by best-fit."""
    measured = []
    for name, lengths in corpora(folder).items():
        capacity = 8_192 if lengths.max() <= 8_192 else 32_768
        if lengths.sum() < FEWEST_ROWS * capacity * 0.99:
            capacity = 2_048
        one = PackTable.build(lengths, capacity=capacity)
        alone = build_time(lengths, capacity)
        documents = len(lengths) / len(one)
        squares = lengths.astype(np.float64) ** 2
        options: dict[str, dict[str, Any]] = {
            f"documents <= {factor} x mean": {"max_documents": max(1, round(factor * documents))}
            for factor in (4, 2, 1.25, 1.05, 0.8)
        }
        for factor in (2, 1.5):
            most = max(factor * squares.sum() / len(one), squares.max())
            options[f"squares <= {factor} x mean"] = {"cost": _square, "max_cost": most}
        for limit, chosen in options.items():
            table = PackTable.build(lengths, capacity=capacity, **chosen)
            bound = max(-(-int(lengths.sum()) // capacity), -(-len(lengths) // chosen.get("max_documents", 1 << 60)))
            if "max_cost" in chosen:
                bound = max(bound, int(np.ceil(squares.sum() / chosen["max_cost"])))
            measured.append(
                {
                    "corpus": name,
                    "capacity": capacity,
                    "limit": limit,
                    "bound": bound,
                    "rows": len(table),
                    "over": 100 * (len(table) / bound - 1),
                    "best_fit_over": 100 * (_limited_best_fit(lengths, capacity, **chosen) / bound - 1),
                    "construct": build_time(lengths, capacity, **chosen) / alone,
                }
            )
            print(f"{name} {capacity} {limit}: {measured[-1]['over']:.2f} % over the bound", flush=True)
    return measured


def build_time(lengths: Lengths, capacity: int, **options: Any) -> float:
    """Seconds of a construction."""
    return fastest(lambda: PackTable.build(lengths, capacity=capacity, **options), 4)


def _square(lengths: Lengths) -> Any:
    return lengths.astype(np.float64) ** 2


def _limited_best_fit(
    lengths: Lengths, capacity: int, max_documents: int = 1 << 60, cost: Any = None, max_cost: float = 1
) -> int:
    """Rows of best-fit decreasing under a second limit, one document at a time."""
    values = np.sort(lengths)[::-1]
    costs = np.zeros(len(values)) if cost is None else cost(values)
    room, taken, spent = np.empty(len(values), np.int64), np.zeros(len(values), np.int64), np.zeros(len(values))
    rows = first = 0
    for value, price in zip(values.tolist(), costs.tolist(), strict=True):
        fits = (room[first:rows] >= value) & (taken[first:rows] < max_documents)
        fits &= spent[first:rows] + price <= max_cost
        chosen = np.flatnonzero(fits)
        row = first + int(chosen[room[first:rows][chosen].argmin()]) if len(chosen) else rows
        if row == rows:
            room[row] = capacity
            rows += 1
        room[row] -= value
        taken[row] += 1
        spent[row] += price
    return rows


def two_fields() -> list[dict[str, Any]]:
    """Text with patches in 30 % of the samples: use of the field that binds."""
    measured = []
    rng = np.random.default_rng(3)
    for name, text in (("speech-like", speech_like(SAMPLES)), ("text-like", text_like(SAMPLES))):
        patches = np.where(rng.random(SAMPLES) < 0.3, rng.integers(16, 1_025, SAMPLES), 0)
        pairs = np.stack([text, patches], 1)
        for second in (1_024, 4_096):
            table = PackTable.build(pairs, capacity=(8_192, second))
            epoch = min(fastest(lambda e=e: table.rows(e, np.array([0])), 1) for e in range(1, 4))  # noqa: B023
            measured.append(
                {
                    "corpus": f"{name}, patches",
                    "capacity": [8_192, second],
                    "classes": len(table.classes.counts),
                    "rows": len(table),
                    "use": 100 * (1 - table.waste),
                    "epoch_ms": 1e3 * epoch,
                }
            )
    return measured


def balance(name: str, lengths: Lengths, capacity: int, linear: float) -> list[dict[str, Any]]:
    """Balance over ranks by cost linear x L + L^2: rows of best-fit and ours, at random and grouped."""

    def cost(steps: Lengths) -> Any:
        return linear * steps + steps.astype(np.float64) ** 2

    costs = cost(lengths)
    table = PackTable.build(lengths, capacity=capacity, cost=cost)
    plain = PackTable.build(lengths, capacity=capacity)
    fitted = best_fit(lengths, capacity)
    measured = []
    for replicas in (8, 64):
        steps = len(table) // replicas
        if steps < 8:
            continue

        def of(rows: Rows, ids: Lengths, replicas: int = replicas) -> tuple[float, float, float]:
            price = np.add.reduceat(costs[rows[0]], np.cumsum(rows[1]) - rows[1])
            ids = ids[: len(ids) // replicas * replicas].reshape(-1, replicas)
            return *imbalance(price[ids]), step_spread(lengths, rows, ids)

        fitted_costs = np.add.reduceat(costs[fitted[0]], np.cumsum(fitted[1]) - fitted[1])
        grouped, at_random = [], []
        for epoch in range(STEPS_EPOCHS):
            for one, results in ((table, grouped), (plain, at_random)):
                ids = RowOrder(one, epoch, replicas).row_ids(np.arange(len(one) // replicas * replicas))
                results.append(of(all_rows(one, epoch), ids))
        measured.append(
            {
                "corpus": name,
                "capacity": capacity,
                "cost": f"{linear:g} L + L^2" if linear else "L^2",
                "replicas": replicas,
                "steps": steps,
                "best_fit_random": of(fitted, np.random.default_rng(0).permutation(len(fitted[1]))),
                "best_fit_grouped": of(fitted, np.argsort(fitted_costs, kind="stable")),
                "random": [statistics.mean(column) for column in zip(*at_random, strict=True)],
                "grouped": [statistics.mean(column) for column in zip(*grouped, strict=True)],
                "bound": float(costs.max() / (costs.sum() / len(table))),
            }
        )
    return measured


def times(name: str, lengths: Lengths, capacity: int, rounds: int) -> dict[str, Any]:
    """Seconds of construction, of an epoch's plan, of a row and of documents in chunks."""
    table = PackTable.build(lengths, capacity=capacity)
    epochs = [fastest(lambda e=e: table.rows(e, np.array([0])), 1) for e in range(10, 16)]
    ids = np.arange(min(len(table), 20_000))
    documents = int(table.row_documents(15, ids).sum())
    numbers = iter(range(1 << 30))
    return {
        "corpus": name,
        "samples": len(lengths),
        "capacity": capacity,
        "construct_s": fastest(lambda: PackTable.build(lengths, capacity=capacity), rounds),
        "first_row_ms": 1e3 * min(epochs),
        "row_ms": 1e3 * fastest(lambda: table.rows(15, np.array([next(numbers)])), 30),
        "document_us": 1e6 * fastest(lambda: table.rows(15, ids), 5) / documents,
    }


def windows(name: str, lengths: Lengths, capacity: int, **options: Any) -> dict[str, Any]:
    """Seconds of a shard stream's plan: construction, the first batch of an epoch, all batches of one."""

    class Index:
        fingerprint = name

        def __init__(self) -> None:
            self.lengths = lengths

    starts = np.arange(0, len(lengths) + 1, 1_000)

    def make() -> WindowPacks:
        return make_window_packs(Index(), starts, PackOptions(capacity=capacity, **options))

    table = make()
    epochs = iter(range(1, 1 << 30))

    def first_batch() -> None:
        make_schedule(table, next(epochs), 8).batch_samples(np.array([0]))

    def whole_epoch() -> None:
        schedule = make_schedule(table, next(epochs), 8)
        for slots in schedule.slot_ranges():
            schedule.batch_samples(slots)

    return {
        "corpus": name,
        "samples": len(lengths),
        "capacity": capacity,
        "limits": " and ".join(["capacity", *options]),
        "windows": len(table.windows),
        "rows": len(table),
        "waste": waste(lengths, len(table), capacity),
        "construct_s": fastest(make, 2),
        "first_batch_s": fastest(first_batch, 3),
        "epoch_s": fastest(whole_epoch, 1),
    }


def trl(lengths: Lengths, *, large: bool) -> list[dict[str, Any]]:
    """TRL's packing by its package: waste and time of each sample; documents keep a 50th of their length at 1M."""
    measured = []
    corpora_of = [(lengths, 4_096, True)]
    if large:
        corpora_of.append((np.maximum(1, speech_like(1_000_000) // 50), 4_096 // 50, False))
    for corpus, capacity, whole in corpora_of:
        for strategy in ("bfd", "wrapped"):
            for batch in (1_000, len(corpus)) if whole or strategy == "bfd" else (1_000,):
                rows, seconds = run_trl(corpus, capacity, strategy, batch)
                measured.append(
                    {
                        "packer": f"trl {strategy}, batches of {batch}",
                        "samples": len(corpus),
                        "capacity": capacity,
                        "waste": waste(corpus, rows, capacity),
                        "microseconds": 1e6 * seconds / len(corpus),
                    }
                )
        table = PackTable.build(corpus, capacity=capacity)

        def run(corpus: Lengths = corpus, capacity: int = capacity) -> None:
            all_rows(PackTable.build(corpus, capacity=capacity), 0)

        measured.append(
            {
                "packer": "ours, with all rows of an epoch",
                "samples": len(corpus),
                "capacity": capacity,
                "waste": waste(corpus, len(table), capacity),
                "microseconds": 1e6 * fastest(run, 3) / len(corpus),
            }
        )
    return measured


def streams() -> list[dict[str, Any]]:
    """Packing of streams without an index: waste, the longest wait in buffers, and time of a sample."""
    measured = []
    for name, lengths in (("speech-like", speech_like(SAMPLES)), ("text-like", text_like(SAMPLES))):
        values = lengths.tolist()
        for buffer in (500, 2_000, 5_000):
            used = rows = waited = 0
            for arrivals, row in run_stream(values, buffer):
                rows += 1
                used += sum(values[each] for each in row)
                waited = max(waited, arrivals - min(row))
            measured.append(
                {
                    "corpus": name,
                    "capacity": 4_096,
                    "buffer": buffer,
                    "waste": 100 * (1 - used / (rows * 4_096)),
                    "wait": waited / buffer,
                    "microseconds": 1e6 * fastest(partial(run_stream, values, buffer), 10) / SAMPLES,
                }
            )
    return measured


def run_stream(values: list[int], buffer: int) -> list[tuple[int, list[int]]]:
    """Push a stream through a packer: its rows, each with the arrivals before it."""
    packer: Packer[int] = Packer(4_096, buffer_size=buffer, max_wait=1 << 40)
    rows = []
    for sample, length in enumerate(values):
        packer.push(length, sample)
        while packer.is_due:
            rows.append((packer.arrivals, packer.pop()))
    return rows
