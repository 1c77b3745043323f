"""`make storm`: the state machine over all adapters, round after round, with fresh seeds.

Usage: `python -m storm [NAME ...]` from the folder of the tests; the names are those of adapters, or parts of them.
`STORM_MINUTES` is how long (10), `STORM_SEED` the first seed (from the clock), `STORM_STEPS` the rules in an example
(20).
"""

import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stdout

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from storm.adapters import ADAPTERS, Adapter
from storm.machine import RUN, machine_for

WIDTH = 58


def run(adapter: Adapter, number: int) -> str:
    """Some examples of one adapter with a seed; the minimal failing example and its error, or nothing."""
    steps = int(os.environ.get("STORM_STEPS", "20"))
    chosen = settings(
        max_examples=3 if adapter.is_slow else 30,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            run_state_machine_as_test(seed(number)(machine_for(adapter)), settings=chosen)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        notes = "\n".join(getattr(error, "__notes__", []))
        where = "".join(traceback.format_exception(error, limit=-4))
        return f"{where}\n{notes}\n{out.getvalue()}"
    return ""


def table(failures: Counter[str]) -> str:
    """How often each rule ran for each adapter, and what failed."""
    lines = [f"{'adapter':{WIDTH}} {'rules run':>9} {'kinds':>5} {'failures':>8}"]
    for name in ADAPTERS:
        rules = {rule: count for (adapter, rule), count in RUN.items() if adapter == name}
        if rules:
            lines.append(f"{name:{WIDTH}} {sum(rules.values()):9} {len(rules):5} {failures[name]:8}")
    rules = Counter[str]()
    for (_, rule), count in RUN.items():
        rules[rule] += count
    lines.append("  ".join(f"{rule} {count}" for rule, count in sorted(rules.items())))
    return "\n".join(lines)


def main(*names: str) -> int:
    """Run until the time is over; the exit status."""
    warnings.filterwarnings("ignore", message=".*set_vital.*|.*fork.*")
    # Positions are dropped on purpose, again and again.
    logging.getLogger("samplers").setLevel(logging.ERROR)
    chosen = [
        adapter
        for adapter in ADAPTERS.values()
        if not names or adapter.name in names or any(name in adapter.name for name in names if name not in ADAPTERS)
    ]
    end = time.monotonic() + 60 * float(os.environ.get("STORM_MINUTES", "10"))
    first = int(os.environ.get("STORM_SEED", str(time.time_ns() // 1000 % 10**9)))
    failures: Counter[str] = Counter()
    rounds = 0
    while time.monotonic() < end:
        before = RUN.total()
        for adapter in chosen:
            if time.monotonic() < end:
                example = run(adapter, first + rounds)
                failures[adapter.name] += bool(example)
                if example:
                    sys.stdout.write(f"\n--- {adapter.name}, seed {first + rounds}\n{example}\n")
        sys.stdout.write(
            f"round {rounds}: seed {first + rounds}, {RUN.total() - before} rules, {failures.total()} failures\n"
        )
        sys.stdout.flush()
        rounds += 1
    sys.stdout.write(f"\n{table(failures)}\n")
    return int(failures.total() > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
