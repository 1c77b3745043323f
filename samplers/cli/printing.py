"""What commands print: an index in words, a comparison of plans, a batch row by row."""

import shutil
import sys
from collections.abc import Sequence
from typing import Any, Final

import click
import numpy as np

from samplers.cli.comparison import Candidate, describe_lengths, tabulate
from samplers.planning.sorting import Lengths
from samplers.planning.tables.batch_table import BatchTable
from samplers.shards.format.samples import Sample
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.tables import Field

# A line in a pipe is as long as it needs to be.
PIPE_WIDTH: Final = 1 << 16
BAR: Final = 30
NAMED: Final = 3


def describe_reading(known: LengthIndex, missing: Sequence[str], *, quick: bool) -> str:
    """What `verify` has read, in words."""
    payload = not quick and known.tables.crcs is not None
    told = [name for name in known.fields if name not in missing]
    which = f" of {', '.join(told)}" * bool(missing)
    parts = ["headers", *([f"lengths{which}"] if told else []), *(["payloads"] if payload else [])]
    read = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    why = "" if quick or payload else " (no checksums to hold payloads against: lengthtrack index --checksums)"
    return f"{read} read{why}"


def judge(wrong: Sequence[str], missing: Sequence[str]) -> str:
    """What came of it, in words."""
    names = ", ".join(missing)
    way_out = f"give --length MODULE:FUNCTION or --decode {missing[0]}=MODULE:FUNCTION" if missing else ""
    unmeasured = f", lengths of {names} NOT measured ({way_out})" if missing else ""
    if wrong:
        return click.style(count(len(wrong), "error"), fg="red") + unmeasured
    return click.style(f"the rest agrees{unmeasured}", fg="yellow") if missing else click.style("all agree", fg="green")


def describe_index(known: LengthIndex) -> str:
    """An index in words."""
    return f"{count(len(known), 'sample')} in {count(len(known.shards), 'shard')}, lengths of {', '.join(known.fields)}"


def count(number: int, unit: str) -> str:
    """So many of something."""
    return f"{number:,} {unit}{'s' * (number != 1)}"


def print_report(sources: Sequence[str], lengths: Lengths, candidates: Sequence[Candidate]) -> None:
    """Print a comparison of plans as a table."""
    figures = describe_lengths(lengths)
    name = sources[0] if len(sources) == 1 else f"{len(sources):,} sources"
    what = describe_index(lengths) if isinstance(lengths, LengthIndex) else f"{figures['samples']:,} samples"
    click.secho(f"{name}: {what}", bold=True)
    click.echo(
        f"{figures['steps']:,} steps; length {figures['least']:,.0f} to {figures['most']:,.0f}, median "
        f"{figures['median']:,.0f}, mean {figures['mean']:,.0f}, 95 % up to {figures['percentile_95']:,.0f}\n"
    )
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    for line in tabulate(candidates, width):
        click.echo(line)
    for text in dict.fromkeys(_describe_overlong(lengths, candidate) for candidate in candidates if candidate.overlong):
        click.echo(f"\n{text}")


def _describe_overlong(lengths: Lengths, candidate: Candidate) -> str:
    corpus, found = candidate.table.sorted_lengths, candidate.overlong
    worst = corpus.order[: min(NAMED, candidate.report.overlong_alone)].tolist()
    keys = [lengths.keys[place] if isinstance(lengths, LengthIndex) else f"sample {place}" for place in worst]
    longest = ", ".join(f"{key} ({corpus.lengths[place]} steps)" for key, place in zip(keys, worst, strict=True))
    done = "are batches of one here" if worst else "are left out here"
    return (
        f"{found:,} over-long at {candidate.name}, they {done}{f': {longest}' if longest else ''}. A sampler refuses "
        "them unless max_length, overlong='alone' or overlong='drop' says what to do."
    )


def print_batch(known: LengthIndex, table: BatchTable, batch: list[int], samples: Sequence[Sample]) -> None:
    """Print the size of a batch, and its fields."""
    sizes = table.measure_batches(np.array(batch), np.array([len(batch)]))
    widths = dict(zip(known.fields, sizes.widths[0].tolist(), strict=True))
    padded, real = len(batch) * sum(widths.values()), int(sizes.tokens[0])
    click.echo(
        f"{len(batch):,} rows, {padded:,} padded tokens, {real:,} real ones: padding {1 - real / padded:.2%}, budget "
        f"use {float(table.budget_use(sizes)[0]):.1%}\n"
    )
    for field in known.tables.fields:
        if field.name in samples[0]:
            shape = _describe_field(field, samples[0][field.name], len(batch), widths.get(field.name))
            click.echo(f"{field.name:<16}{shape}")
    click.echo("")


def _describe_field(field: Field, value: Any, rows: int, width: int | None) -> str:
    if not isinstance(value, (np.ndarray, np.generic)):
        return f"{rows:,} of {type(value).__name__}"
    steps = ["L" if width is None else str(width)] if field.variable else []
    shape = value.shape[1:] if field.variable else value.shape
    return f"{value.dtype} [{', '.join([str(rows), *steps, *map(str, shape)])}]"


def print_rows(known: LengthIndex, batch: Sequence[int], samples: Sequence[Sample], rows: int) -> None:
    """Print the rows of a batch, real steps and padding."""
    first = known.fields[0]
    lengths = {name: [len(sample[name]) for sample in samples] for name in known.fields}
    width = max(1, *lengths[first])
    key = max(len(sample["__key__"]) for sample in samples[: max(1, rows)])
    heads = "".join(f"{name:>{max(8, len(name) + 2)}}" for name in known.fields)
    click.secho(f"{'place':>10}  {'key':<{key}}{heads}  {first}, real # and padding .", bold=True)
    for row, (place, sample) in enumerate(zip(batch[:rows], samples, strict=False)):
        counts = "".join(f"{lengths[name][row]:>{max(8, len(name) + 2)},}" for name in known.fields)
        real = round(BAR * lengths[first][row] / width)
        click.echo(f"{place:>10}  {sample['__key__']:<{key}}{counts}  {'#' * real}{'.' * (BAR - real)}")
    if len(batch) > rows:
        click.echo(f"... and {len(batch) - rows:,} more rows: --rows {len(batch)} prints them all")
