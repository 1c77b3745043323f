"""Output of the commands: an index as text, a comparison of plans, a batch row by row."""

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from tqdm import tqdm

from samplers.cli.arguments import printable
from samplers.cli.compare import PlanSummary, describe_lengths, plan_column, tabulate
from samplers.cli.describing import count, describe_seconds
from samplers.cli.reported import ReportedLengths
from samplers.planning.tables.batch_table import BatchTable
from samplers.shards.format.samples import Sample
from samplers.shards.indexing.index import LengthIndex, tables_of
from samplers.shards.indexing.tables import Field
from samplers.shards.storage.network.counts import PROCESS, TransferBar, describe_transfers
from samplers.shards.storage.process_pool import ItemT

# Lines in a pipe are not wrapped.
PIPE_WIDTH: Final = 1 << 16
# Characters of a bar, and samples that are named.
BAR: Final = 30
NAMED: Final = 3


def describe_reading(corpus: LengthIndex, missing: Sequence[str], *, quick: bool) -> str:
    """The parts that `verify` has read, as text."""
    payload = not quick and tables_of(corpus).crcs is not None
    measured = [name for name in corpus.fields if name not in missing]
    which = f" of {', '.join(measured)}" * bool(missing)
    parts = ["headers", *([f"lengths{which}"] if measured else []), *(["payloads"] if payload else [])]
    text = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    why = "" if quick or payload else " (no checksums to compare payloads with: lengthtrack index --checksums)"
    return f"{text} read{why}"


def judge(problems: Sequence[str], missing: Sequence[str]) -> str:
    """The result of `verify`, as text."""
    names = ", ".join(missing)
    remedy = f"give --length MODULE:FUNCTION or --decode {missing[0]}=MODULE:FUNCTION" if missing else ""
    unmeasured = f", lengths of {names} NOT measured ({remedy})" if missing else ""
    if problems:
        return click.style(count(len(problems), "error"), fg="red") + unmeasured
    return click.style(f"the rest agrees{unmeasured}", fg="yellow") if missing else click.style("all agree", fg="green")


def print_report(sources: Sequence[str], opened: ReportedLengths, summaries: Sequence[PlanSummary]) -> None:
    """Print a comparison of plans as a table."""
    print_columns(sources, opened, [plan_column(summary) for summary in summaries])
    # Plans of one budget have the same over-long samples: say it once.
    for text in dict.fromkeys(_overlong_line(opened, summary) for summary in summaries if summary.overlong):
        click.echo(f"\n{text}")


def print_columns(sources: Sequence[str], opened: ReportedLengths, columns: Sequence[dict[str, str]]) -> None:
    """Print a corpus, and columns of figures as a table."""
    figures = describe_lengths(opened.lengths)
    name = sources[0] if len(sources) == 1 else f"{len(sources):,} sources"
    click.secho(f"{name}: {opened.description}", bold=True)
    click.echo(
        f"{figures['steps']:,} steps; length {figures['least']:,.0f} to {figures['most']:,.0f}, median "
        f"{figures['median']:,.0f}, mean {figures['mean']:,.0f}, 95 % up to {figures['percentile_95']:,.0f}"
    )
    if opened.rate is not None:
        names = ("steps", "least", "most", "median", "mean", "percentile_95")
        total, least, most, *others = (describe_seconds(figures[each] / opened.rate) for each in names)
        middle = "median {}, mean {}, 95 % up to {}".format(*others)
        click.echo(f"{total} at {opened.rate:,} Hz; {least} to {most}, {middle}")
    click.echo("")
    # Only a terminal has a width.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    for line in tabulate(columns, width):
        click.echo(line)


def write_json(sources: Sequence[str], opened: ReportedLengths, plans: Sequence[Any], path: str | None) -> None:
    """Write the figures of a corpus and of plans as JSON; "-" is stdout, None is nowhere."""
    if path is not None:
        figures = {"sources": list(sources), "lengths": describe_lengths(opened.lengths), "rate": opened.rate}
        text = json.dumps(figures | {"plans": plans}, indent=2)
        click.echo(text) if path == "-" else Path(path).write_text(text + "\n", encoding="utf-8")


def _overlong_line(opened: ReportedLengths, summary: PlanSummary) -> str:
    """A line about samples over the budget."""
    corpus = summary.table.sorted_lengths
    worst = corpus.order[: min(NAMED, summary.report.overlong_alone)].tolist()
    keys = [opened.name_of(index) for index in worst]
    longest = ", ".join(f"{key} ({corpus.lengths[index]} steps)" for key, index in zip(keys, worst, strict=True))
    done = "are batches of one here" if worst else "are left out here"
    return (
        f"{summary.overlong:,} over-long at {summary.name}, they {done}{f': {longest}' if longest else ''}. A sampler "
        "refuses them unless max_length, overlong='alone' or overlong='drop' says what to do."
    )


def print_batch(corpus: LengthIndex, table: BatchTable, batch: list[int], samples: Sequence[Sample]) -> None:
    """Print the size of a batch, and its fields."""
    sizes = table.measure_batches(np.array(batch), np.array([len(batch)]))
    widths = dict(zip(corpus.fields, sizes.widths[0].tolist(), strict=True))
    padded, real = len(batch) * sum(widths.values()), int(sizes.tokens[0])
    click.echo(
        f"{len(batch):,} rows, {padded:,} padded tokens, {real:,} real ones: padding {1 - real / padded:.2%}, budget "
        f"use {float(table.budget_use(sizes)[0]):.1%}\n"
    )
    for field in tables_of(corpus).fields:
        if field.name in samples[0]:
            shape = _describe_field(field, samples[0][field.name], len(batch), widths.get(field.name))
            click.echo(f"{printable(field.name):<16}{shape}")
    click.echo("")


def _describe_field(field: Field, value: Any, rows: int, width: int | None) -> str:
    if not isinstance(value, (np.ndarray, np.generic)):
        longest = "" if width is None else f", {width:,} steps at most"
        return f"{rows:,} of {type(value).__name__}{longest}"
    steps = ["L" if width is None else str(width)] if field.variable else []
    shape = value.shape[1:] if field.variable else value.shape
    return f"{value.dtype} [{', '.join([str(rows), *steps, *map(str, shape)])}]"


def print_rows(corpus: LengthIndex, batch: Sequence[int], samples: Sequence[Sample], rows: int) -> None:
    """Print the rows of a batch, real steps and padding."""
    first = corpus.fields[0]
    # Of the index: the length of a field that is not an array is not that of its bytes.
    columns = corpus.lengths[np.asarray(batch)].reshape(len(batch), -1)
    lengths = {name: columns[:, column].tolist() for column, name in enumerate(corpus.fields)}
    width = max(1, *lengths[first])
    # `max` of 1 row, in case no row is printed.
    keys = [printable(sample["__key__"]) for sample in samples[: max(1, rows)]]
    key = max(map(len, keys))
    headings = "".join(f"{printable(name):>{max(8, len(name) + 2)}}" for name in corpus.fields)
    click.secho(f"{'index':>10}  {'key':<{key}}{headings}  {printable(first)}, real # and padding .", bold=True)
    for row, (index, name) in enumerate(zip(batch[:rows], keys, strict=False)):
        counts = "".join(f"{lengths[field][row]:>{max(8, len(field) + 2)},}" for field in corpus.fields)
        real = round(BAR * lengths[first][row] / width)
        click.echo(f"{index:>10}  {name:<{key}}{counts}  {'#' * real}{'.' * (BAR - real)}")
    if len(batch) > rows:
        click.echo(f"... and {len(batch) - rows:,} more rows: --rows {len(batch)} prints them all")


def show_progress(items: Iterable[ItemT], total: int | None, unit: str) -> Iterable[ItemT]:
    """The items, with a progress bar on a terminal, and behind it what was transferred over a network.

    Yields:
        The items.
    """
    with tqdm(items, total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False) as bar:
        transfers = TransferBar(bar)
        for item in bar:
            yield item
            transfers.show()
        transfers.show(is_end=True)


def count_transfers() -> Callable[[], None]:
    """What prints on stderr, when it is called, what this process and its workers have transferred since now."""
    before = PROCESS.as_dict()

    def print_transfers() -> None:
        counts = {name: number - before[name] for name, number in PROCESS.as_dict().items()}
        told = describe_transfers(counts) if counts["requests"] else "none: nothing was read or written over a network"
        click.echo(f"transfers: {told}", err=True)

    return print_transfers
