"""The bodies of `convert` and `show`, which read and write samples, and so need torch."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from samplers.cli.arguments import check_exists, parse_pairs
from samplers.cli.conversion.rows import ColumnSelection, SampleMaker, count_input_rows, read_input_rows, stacked_fields
from samplers.cli.conversion.tokenizer import load_tokenizer
from samplers.cli.conversion.unfinished import describe_conversion
from samplers.cli.conversion.writing import resumable, write_samples
from samplers.cli.describing import count, describe_index
from samplers.cli.opening import load_function, open_sources, parse_dtypes, parse_widths, require_budget
from samplers.cli.printing import print_batch, print_rows, show_progress
from samplers.planning.options import Options
from samplers.planning.plan import BatchPlan
from samplers.planning.tables.pool_table import choose_table
from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.index import tables_of
from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.storage.atomic import is_url


def convert(
    *,
    inputs: tuple[str, ...],
    folder: str,
    fields: list[str] | None,
    key: str | None,
    text: list[str] | None,
    tokenizer: str | None,
    stack: list[str] | None,
    dtype: tuple[str, ...],
    rounded: list[str] | None,
    layout: Any,
    max_samples: int,
    prefix: str,
    split: str | None,
    resume: bool,
) -> None:
    """Write the samples of the inputs to shards in a folder, with their index.

    Raises:
        UsageError: A tokenizer is given, and no text.
    """
    columns = None if fields is None else parse_pairs("--fields", fields)
    if tokenizer and not text:
        raise click.UsageError("--tokenizer makes tokens of text fields: name them with --text")
    tokenize = load_tokenizer(tokenizer, partial(load_function, option="--tokenizer"))
    selection = ColumnSelection(
        fields=columns,
        key=key,
        text=text or (),
        tokenizer=tokenize,
        dtypes=parse_dtypes(dtype),
        rounded=rounded or (),
    )
    options: dict[str, Any] = {
        "fields": fields,
        "key": key,
        "text": text,
        "stack": stack,
        "dtype": sorted(dtype),
        "round": rounded,
    }
    options |= {"layout": layout, "split": split, "tokenizer": None if tokenize is None else tokenize.id}
    for path in inputs:
        check_exists(path)
    # Blocks say which fields have a fixed size. Rows of other inputs do not.
    stack = stack or stacked_fields(inputs, selection)
    total = count_input_rows(inputs, split) if sys.stderr.isatty() else None
    rows = show_progress(read_input_rows(inputs, selection, split), total, "sample")
    writing: dict[str, Any] = {"layout": layout, "max_samples": max_samples, "prefix": prefix, "stack": stack}
    with resumable(folder, describe_conversion(inputs, options), resume=resume, **writing) as writer:
        samples = write_samples(writer, SampleMaker(selection), rows)
    shards = len(writer.shards)
    corpus = f"{folder.rstrip('/')}/{prefix}{SUFFIX}" if is_url(folder) else Path(folder, prefix + SUFFIX)
    click.echo(f"{corpus}: {count(samples, 'sample')} in {count(shards, 'shard')}, layout {layout}")


def show(*, sources: tuple[str, ...], step: int, rank: int, rows: int, **options: Any) -> None:
    """Print a batch: fields, padding and rows."""
    require_budget(options["max_tokens"], options)
    corpus = open_sources(sources)
    options["widths"] = parse_widths(options["widths"], corpus)
    epoch, num_replicas = options.pop("epoch"), options.pop("num_replicas")
    table = choose_table(corpus, Options(**options))
    plan = BatchPlan(table, epoch, num_replicas)
    batch = plan.batches[_check_step(plan, step, rank)]
    # Read before anything is printed.
    samples = list(ShardDataset(corpus.shards, corpus).__getitems__(batch))
    click.secho(f"step {step:,} of {plan.steps:,}, rank {rank} of {plan.num_replicas}, epoch {plan.epoch}", bold=True)
    if tables_of(corpus).measured:
        click.echo(describe_index(corpus))
    print_batch(corpus, table, batch, samples)
    print_rows(corpus, batch, samples, rows)


def _check_step(plan: BatchPlan, step: int, rank: int) -> int:
    if step >= plan.steps or rank >= plan.num_replicas:
        raise click.UsageError(f"the epoch has steps 0 to {plan.steps - 1}, ranks 0 to {plan.num_replicas - 1}")
    return step * plan.num_replicas + rank
