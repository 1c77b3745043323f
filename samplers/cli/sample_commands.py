"""The bodies of `convert` and `show`, which read and write samples, and so need torch."""

from pathlib import Path
from typing import Any

import click

from samplers.cli.arguments import parse_pairs
from samplers.cli.convert import ColumnSelection, SampleMaker, read_input_rows, stacked_fields
from samplers.cli.printing import count, print_batch, print_rows, show_progress
from samplers.cli.sources import open_sources, parse_dtypes, parse_widths, require_budget
from samplers.planning.options import Options
from samplers.planning.plan import BatchPlan
from samplers.planning.tables.pool_table import choose_table
from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.writing.writer import ShardWriter


def convert(
    *,
    inputs: tuple[str, ...],
    folder: str,
    fields: list[str] | None,
    key: str | None,
    text: list[str] | None,
    stack: list[str] | None,
    dtype: tuple[str, ...],
    rounded: list[str] | None,
    layout: Any,
    max_samples: int,
    prefix: str,
    split: str | None,
) -> None:
    """Write the samples of the inputs to shards in a folder, with their index."""
    columns = None if fields is None else parse_pairs("--fields", fields)
    selection = ColumnSelection(
        fields=columns, key=key, text=text or (), dtypes=parse_dtypes(dtype), rounded=rounded or ()
    )
    # Blocks say which fields have a fixed size. Rows of other inputs do not.
    stack = stack or stacked_fields(inputs, selection)
    maker, samples = SampleMaker(selection), 0
    with ShardWriter(folder, layout=layout, max_samples=max_samples, prefix=prefix, stack=stack) as writer:
        for context, row in show_progress(read_input_rows(inputs, selection, split), None, "sample"):
            _write(writer, context, maker.make(context, row))
            samples += 1
    shards = len(writer.shards)
    click.echo(
        f"{Path(folder, prefix + SUFFIX)}: {count(samples, 'sample')} in {count(shards, 'shard')}, layout {layout}"
    )


def show(*, sources: tuple[str, ...], step: int, rank: int, rows: int, **options: Any) -> None:
    """Print a batch: fields, padding and rows."""
    require_budget(options["max_tokens"], options)
    corpus = open_sources(sources)
    options["widths"] = parse_widths(options["widths"], corpus)
    epoch, num_replicas = options.pop("epoch"), options.pop("num_replicas")
    table = choose_table(corpus, Options(**options))
    plan = BatchPlan(table, epoch, num_replicas)
    batch = plan.batches[_check_step(plan, step, rank)]
    samples = ShardDataset(corpus.shards, corpus).__getitems__(batch)
    click.secho(f"step {step:,} of {plan.steps:,}, rank {rank} of {plan.num_replicas}, epoch {plan.epoch}", bold=True)
    print_batch(corpus, table, batch, samples)
    print_rows(corpus, batch, samples, rows)


def _write(writer: ShardWriter, context: str, sample: dict[str, Any]) -> None:
    """Write a sample, with its origin in errors.

    Raises:
        ValueError: The writer refuses it.
    """
    try:
        writer.write(sample)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{context}: {error}") from error


def _check_step(plan: BatchPlan, step: int, rank: int) -> int:
    if step >= plan.steps or rank >= plan.num_replicas:
        raise click.UsageError(f"the epoch has steps 0 to {plan.steps - 1}, ranks 0 to {plan.num_replicas - 1}")
    return step * plan.num_replicas + rank
