"""From disk to padded batches: ours, next to hand-written loaders and other libraries.

    python benchmarks/loading.py [--quick] [--before CHECKOUT] [--peers FOLDER]

Every round runs each contender once, in a random order: batches of 64 rows for half a second or more, by a loop that
does nothing. Each library runs in a separate process, those in FOLDER as `make bench-peers` has installed them;
missing ones are printed. CHECKOUT is a folder with older code of ours, which takes turns too. Before the rounds, an
epoch of every loader must give all rows and the right sums. `--quick` takes a tenth of the samples, and saves nothing.
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from harness import save, show, show_bars
from loaders.works import ROWS, SAMPLES, Work, make_work
from loading_bars import by_loader, find_bars, spread
from loading_process import MissingError, Process

ROOT: Final = Path(__file__).resolve().parents[1]
OURS: Final = "ours"
BEFORE: Final = "before"
# Modules of peers, and the environment in which each runs; None for the one that runs this script.
PEERS: Final = {
    "hf_datasets": None,
    "web_dataset": None,
    "lit_data": "libraries",
    "array_records": "libraries",
    "mosaicml": "mosaicml",
}
PARTS: Final = ("speed", "first", "training", "memory")
# Numbers of workers in the rounds of speed.
WORKERS: Final = (0, 2)
STEP_SECONDS: Final = (0.005, 0.020, 0.080)
# A training turn lasts about this long.
TRAINING_TURN: Final = 0.8
MEMORY_BATCHES: Final = 60


@dataclass
class Contender:
    """One loader of one process, with some workers.

    Attributes:
        source: Label of its process: `ours`, `before`, `by_hand`, or a module of peers.
        loader: Name of the loader.
        workers: Number of workers.
        facts: What the process says of it, and what the check has found.
        rates: Rows a second, for each round.
    """

    source: str
    loader: str
    workers: int
    facts: dict[str, Any]
    rates: list[float] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Its name in the results."""
        before = "before: " if self.source == BEFORE else ""
        return f"{before}{self.loader}, {self.workers} workers"

    def as_result(self) -> dict[str, Any]:
        """Its figures, for JSON."""
        return {
            "source": self.source,
            "loader": self.loader,
            "workers": self.workers,
            "rates": [round(rate) for rate in self.rates],
            **self.facts,
        }


def main() -> None:
    """Measure, print and save everything."""
    options = read_options()
    with workplace(options.folder) as folder:
        works = {name: make_work(name, options.scale) for name in options.works}
        for work in works.values():
            if not (folder / "works" / work.name).exists():
                work.save(folder / "works" / work.name)
        missing: dict[str, str] = {}
        results: dict[str, Any] = {"works": {}, "first": {}, "training": {}, "memory": {}, "missing": missing}
        with ExitStack() as stack:
            processes = start_all(options, folder, stack, missing)
            results["versions"] = {label: process.ask("list")["versions"] for label, process in processes.items()}
            for work in works.values():
                write_ours(work, processes)
                if "speed" in options.parts:
                    results["works"][work.name] = measure_speed(options, work, processes, missing)
                if "first" in options.parts:
                    with noted(f"first batch of {work.name}", missing):
                        results["first"][work.name] = measure_first(options, work, processes)
            if "training" in options.parts:
                with noted("training", missing):
                    results["training"] = measure_training(options, works, processes[OURS])
        for work in works.values() if "memory" in options.parts else ():
            with noted(f"memory with {work.name}", missing):
                results["memory"][work.name] = measure_memory(options, work, folder)
    results |= {"scale": options.scale, "rounds": options.rounds}
    results["bars"] = find_bars(results)
    show_bars(results["bars"])
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    if not options.quick:
        save("loading", results)


def read_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, 3 rounds; nothing is saved")
    parser.add_argument("--scale", type=float, help="fraction of the samples; only 1 is comparable")
    parser.add_argument("--before", type=Path, help="a checkout of older code that takes turns")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers", help="environments of the peers")
    parser.add_argument("--no-peers", action="store_true", help="ours, and loaders by hand, only")
    parser.add_argument("--works", nargs="+", choices=SAMPLES, default=list(SAMPLES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--rounds", type=int, help="rounds of speed")
    parser.add_argument("--training-rounds", type=int, help="rounds next to a training step")
    parser.add_argument("--seconds", type=float, default=1.0, help="longest epoch of a turn; longer ones are cut")
    parser.add_argument("--folder", type=Path, help="where the files are; a temporary folder by default")
    options = parser.parse_args()
    options.scale = options.scale or (0.1 if options.quick else 1.0)
    options.rounds = options.rounds or (3 if options.quick else 7)
    options.training_rounds = options.training_rounds or (3 if options.quick else 20)
    return options


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """A folder for works and files, which is removed at the end."""
    made = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made)


@contextmanager
def noted(part: str, missing: dict[str, str]) -> Iterator[None]:
    """Note that a part has failed, and continue: the other parts have taken long."""
    try:
        yield
    except MissingError as reason:
        missing[part] = str(reason)


def start_all(
    options: argparse.Namespace, folder: Path, stack: ExitStack, missing: dict[str, str]
) -> dict[str, Process]:
    """The processes of all contenders that can be imported, by label."""
    processes = {
        OURS: stack.enter_context(Process("ours", folder, checkout=ROOT)),
        "by_hand": stack.enter_context(Process("by_hand", folder)),
    }
    if options.before is not None:
        before = Process("ours", folder, label=BEFORE, checkout=options.before.resolve())
        processes[BEFORE] = stack.enter_context(before)
    for label in (OURS, BEFORE):
        if label in processes:
            checkout = Path(processes[label].ask("list")["code"]).parents[1]
            expected = ROOT if label == OURS else options.before.resolve()
            if checkout != expected:
                raise SystemExit(f"the process `{label}` must import from {expected}, it imports from {checkout}")
    for module, environment in {} if options.no_peers else PEERS.items():
        python = options.peers / environment / "bin" / "python" if environment else Path(sys.executable)
        try:
            if not python.exists():
                raise MissingError(f"no environment {options.peers.name}/{environment}: run `make bench-peers`")
            processes[module] = stack.enter_context(Process(module, folder, python=python))
        except MissingError as reason:
            missing[module] = str(reason)
    return processes


def write_ours(work: Work, processes: dict[str, Process]) -> None:
    """Our shards of a work, which all parts read."""
    for label in (OURS, BEFORE):
        if label in processes:
            processes[label].ask("write", work=work.name, loader="ShardDataset")


def measure_speed(
    options: argparse.Namespace, work: Work, processes: dict[str, Process], missing: dict[str, str]
) -> dict[str, Any]:
    """All contenders on one work: files and a whole epoch of each, then the rounds."""
    print(f"\n{work.name}: {len(work.lengths):,} samples, {work.nbytes / 1e6:,.1f} MB", flush=True)
    contenders = contenders_of(work, processes)
    for contender in list(contenders):
        print(f"{work.name}: an epoch of {contender.key}", file=sys.stderr)
        with left_out(contender, work, contenders, missing):
            check(work, contender, processes[contender.source])
    order = random.Random(0)
    load = [os.getloadavg()[0]]
    for turn in range(options.rounds):
        print(f"{work.name}: round {turn + 1} of {options.rounds}", file=sys.stderr)
        for contender in order.sample(contenders, len(contenders)):
            with left_out(contender, work, contenders, missing):
                contender.rates.append(rate_of(options, work, contender, processes[contender.source]))
        load.append(os.getloadavg()[0])
    show_speed(work, contenders)
    print(f"processes that wanted to run (load average), before and after each round: {load}")
    results = {contender.key: contender.as_result() for contender in contenders}
    return {
        "samples": len(work.lengths),
        "steps": int(work.lengths.sum()),
        "bytes": work.nbytes,
        "load average": load,
        "contenders": results,
        "loaders": by_loader(results),
    }


@contextmanager
def left_out(contender: Contender, work: Work, contenders: list[Contender], missing: dict[str, str]) -> Iterator[None]:
    """Leave out a library that fails. Ours, and those by hand, must not.

    Raises:
        SystemExit: One of these fails.
    """
    try:
        yield
    except MissingError as reason:
        if contender.source not in PEERS:
            raise SystemExit(str(reason)) from reason
        contenders.remove(contender)
        missing[f"{work.name}: {contender.key}"] = str(reason)


def rate_of(options: argparse.Namespace, work: Work, contender: Contender, process: Process) -> float:
    """Rows a second in one turn.

    Raises:
        MissingError: The loader fails.
    """
    found = process.ask(
        "turn", work=work.name, loader=contender.loader, workers=contender.workers, seconds=options.seconds
    )
    return float(found["rows"] / found["seconds"]) if found["rows"] else 0.0


def contenders_of(work: Work, processes: dict[str, Process]) -> list[Contender]:
    """What can load a work: each loader with each number of workers in the rounds."""
    return [
        Contender(label, name, workers, {"checks": facts["checks"]})
        for label, process in processes.items()
        for name, facts in process.ask("list")["loaders"].items()
        for workers in facts["workers"]
        if workers in WORKERS and (facts["works"] is None or work.name in facts["works"])
    ]


def check(work: Work, contender: Contender, process: Process) -> None:
    """Write the files, and compare a whole epoch with the work: all rows, and the sums of all fields.

    Raises:
        MissingError: The loader fails, loses or changes something.
    """
    written = process.ask("write", work=work.name, loader=contender.loader)
    found = process.ask("check", work=work.name, loader=contender.loader, workers=contender.workers)
    if found["rows"] != len(work.lengths) or found["sums"] != work.totals():
        raise MissingError(
            f"{contender.key} must give {len(work.lengths)} rows of {work.name} with sums {work.totals()}, "
            f"it gives {found['rows']} rows with {found['sums']}"
        )
    real = sum(values.size for values in work.fields.values())
    contender.facts |= {"padding": 1 - real / found["values"], "size": written["bytes"] / work.nbytes}


def show_speed(work: Work, contenders: Sequence[Contender]) -> None:
    """Print rates, and how many times as fast ours by index is with as many workers."""
    rows = []
    for contender in contenders:
        ours = next(one for one in contenders if one.source == OURS and one.workers == contender.workers)
        rate = statistics.median(contender.rates)
        low, middle, high = spread(ours.rates, contender.rates)
        rows.append(
            {
                work.name: contender.key,
                "rows a second": f"{rate:,.0f}",
                "MB a second": f"{rate * work.nbytes / len(work.lengths) / 1e6:,.0f}",
                "us a batch": f"{1e6 * ROWS / rate:,.0f}" if rate else "",
                "ours is": f"{middle:.2f}x [{low:.2f}-{high:.2f}]",
                "padding": f"{contender.facts['padding']:.3f}",
                "size": f"{contender.facts['size']:.2f}",
                "checks": contender.facts["checks"],
            }
        )
    show(f"{work.name}, 64 rows a batch", rows)


def measure_first(options: argparse.Namespace, work: Work, processes: dict[str, Process]) -> dict[str, Any]:
    """Seconds from a new loader to its first batch, for each round: at the start, and at half of an epoch."""
    labels = [label for label in (OURS, BEFORE) if label in processes]
    kinds = [(label, kind, at) for label in labels for kind in ("ShardDataset", "ShardStream") for at in (0.0, 0.5)]
    times: dict[str, list[float]] = {f"{label}: {kind}, {at:.0%}": [] for label, kind, at in kinds}
    order = random.Random(1)
    for _ in range(max(5, options.rounds)):
        for label, kind, at in order.sample(kinds, len(kinds)):
            found = processes[label].ask("first", work=work.name, loader=kind, half=at)
            times[f"{label}: {kind}, {at:.0%}"].append(found["seconds"])
    rows = [{"first batch": name, "ms": f"{1e3 * statistics.median(each):.1f}"} for name, each in times.items()]
    show(f"{work.name}: a new loader until its first batch", rows)
    return times


def measure_training(options: argparse.Namespace, works: dict[str, Work], process: Process) -> dict[str, Any]:
    """Loops of training steps with each way to load, over the same steps alone, for each round."""
    loaders = process.ask("list")["loaders"]
    # The steps alone twice, so that the noise is known.
    ways: list[tuple[str, str | None, int]] = [("alone", None, 0), ("alone again", None, 0)]
    ways += [(f"ShardDataset, {workers} workers", "ShardDataset", workers) for workers in (0, 1, 2)]
    ways += [("ReadAheadLoader", "ReadAheadLoader", 0)] if "ReadAheadLoader" in loaders else []
    order = random.Random(2)
    results: dict[str, Any] = {}
    for target in STEP_SECONDS:
        units = process.ask("calibrate", seconds=target)["units"]
        for work, made in works.items():
            # Within an epoch: the next one would start workers again.
            steps = max(2, min(round(TRAINING_TURN / target), len(made.lengths) // ROWS - 2))
            seconds: dict[str, list[float]] = {name: [] for name, _, _ in ways}
            for _ in range(options.training_rounds):
                for name, loader, workers in order.sample(ways, len(ways)):
                    found = process.ask("train", work=work, loader=loader, workers=workers, steps=steps, units=units)
                    seconds[name].append(found["seconds"] / steps)
            results[f"{work}, {1e3 * target:.0f} ms"] = seconds
    show("time over the training step alone", [overhead_row(case, seconds) for case, seconds in results.items()])
    return results


def overhead_row(case: str, seconds: dict[str, list[float]]) -> dict[str, str]:
    """The step alone, and the extra time with each way to load: median, and the lowest and highest round."""
    row = {"step": case, "alone": f"{1e3 * statistics.median(seconds['alone']):.1f} ms"}
    for name, times in seconds.items():
        if name != "alone":
            low, middle, high = spread(times, seconds["alone"])
            row[name] = f"{middle - 1:+.1%} [{low - 1:+.0%} {high - 1:+.0%}]"
    return row


def measure_memory(options: argparse.Namespace, work: Work, folder: Path) -> dict[str, Any]:
    """Memory of a new process and its workers after 60 batches, by way, in bytes."""
    results: dict[str, Any] = {}
    checkouts = {OURS: ROOT} | ({} if options.before is None else {BEFORE: options.before.resolve()})
    for loader, workers in (("ShardDataset", 0), ("ReadAheadLoader", 0), ("ShardDataset", 2)):
        for label, checkout in checkouts.items():
            with Process("ours", folder, label=label, checkout=checkout, keep=False) as process:
                if loader in process.ask("list")["loaders"]:
                    results[f"{label}: {loader}, {workers} workers"] = process.ask(
                        "memory", work=work.name, loader=loader, workers=workers, batches=MEMORY_BATCHES
                    )
    rows = [
        {"memory": name} | {kind: f"{size / 1e6:,.0f} MB" for kind, size in sizes.items()}
        for name, sizes in results.items()
        if sizes
    ]
    if rows:
        show(f"{work.name}: memory after {MEMORY_BATCHES} batches, shared pages divided", rows)
    return results


if __name__ == "__main__":
    sys.exit(main())
