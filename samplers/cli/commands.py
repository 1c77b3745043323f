"""The `lengthtrack` command: index, verify, report, convert and show."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import click
from tqdm import tqdm

from samplers.cli.arguments import (
    OneLineErrors,
    WrittenPath,
    as_shards,
    examples,
    flatten,
    load_measure,
    measuring_options,
    open_lengths,
    open_sources,
    pack_options,
    parse_dtypes,
    parse_names,
    parse_numbers,
    parse_pairs,
    parse_widths,
    parse_windows,
    plan_options,
    require_budget,
    split_pack_options,
)
from samplers.cli.compare import compare_plans, trace_windows
from samplers.cli.convert import ColumnSelection, SampleMaker, read_input_rows, stacked_fields
from samplers.cli.extras import load_extra
from samplers.cli.folder_index import index_of_folder, open_earlier, unlisted_shards
from samplers.cli.pack_compare import report_packs
from samplers.cli.printing import (
    count,
    describe_index,
    describe_reading,
    judge,
    print_batch,
    print_report,
    print_rows,
    write_json,
)
from samplers.planning.options import Options
from samplers.planning.plan import BatchPlan
from samplers.planning.tables.pool_table import choose_table
from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.find_index import find_index_files
from samplers.shards.indexing.index import LengthIndex, tables_of
from samplers.shards.indexing.index_file import SUFFIX, read_index
from samplers.shards.indexing.measuring import LengthOf, Measure
from samplers.shards.indexing.verify import find_errors
from samplers.shards.storage.paths import expand_shards
from samplers.shards.storage.process_pool import ItemT
from samplers.shards.writing.writer import ShardWriter

# Exit status if nothing differs, but not everything was measured. 2 is a usage error, by convention.
NOT_MEASURED: Final = 3
# With fewer shards a worker takes longer to start than it saves.
SHARDS_PER_WORKER: Final = 8


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="lengthtrack")
@click.option("--traceback", is_flag=True, help="Show the traceback of an error.")
def main(*, traceback: bool) -> None:
    """Corpora of variable-length sequences: their shards, their lengths, and batches under a budget.

    SHARDS are paths, folders, URLs or quoted patterns such as 'shards/train-{000..099}.tar'. An INDEX is a .ltx file,
    or the folder that holds one.
    """


@main.command(
    epilog=examples(
        "lengthtrack index shards",
        "lengthtrack index 'shards/*.tar' --output corpus.ltx --fields tokens --workers 2",
    )
)
@click.argument("shards", nargs=-1, required=True)
@click.option("--output", type=WrittenPath(dir_okay=False), help="Index file; by default the one in the folder SHARDS.")
@click.option(
    "--fields",
    type=parse_names,
    metavar="NAME[,NAME...]",
    help="Fields whose lengths count; by default all arrays with an axis.",
)
@measuring_options
@click.option(
    "--length-id", help="Name of the measuring function, stored in the index; by default made from its source."
)
@click.option("--checksums/--no-checksums", default=None, help="Read every payload too, and store its checksum.")
@click.option("--workers", type=click.IntRange(0), help="Number of processes; by default up to one for each CPU.")
def index(
    *,
    shards: tuple[str, ...],
    output: str | None,
    fields: list[str] | None,
    length: str | None,
    decode: tuple[str, ...],
    length_id: str | None,
    checksums: bool | None,
    workers: int | None,
) -> None:
    """Build or refresh the index of SHARDS.

    Reads headers, and payloads only for --checksums. A refreshed index has the fields and checksums of the former one,
    unless options change them.
    """
    target = Path(output) if output else index_of_folder(shards)
    before = open_earlier(target)
    # A second `lengthtrack index` refreshes: it must not drop fields or checksums that the first one was asked for.
    if before is not None:
        fields = list(before.fields) if fields is None else fields
        checksums = tables_of(before).crcs is not None if checksums is None else checksums
    paths = expand_shards(list(shards))
    built = LengthIndex.build(
        paths,
        fields,
        _length_of(load_measure(length, decode)),
        workers=_count_workers(workers, len(paths)),
        checksums=bool(checksums),
        length_id=length_id,
        progress=sys.stderr.isatty(),
    )
    built.save(target)
    what = "built" if before is None else "unchanged" if before.fingerprint == built.fingerprint else "refreshed"
    click.echo(f"{target}: {what}, {describe_index(built)}{', with checksums' * bool(checksums)}")


@main.command(
    epilog=examples(
        "lengthtrack verify shards",
        "lengthtrack verify shards/shard.ltx --quick --workers 2",
        "lengthtrack verify 'shards/*.tar'",
        "lengthtrack verify wavs --decode wav=sounds:read_wav",
    )
)
@click.argument("sources", nargs=-1, required=True, metavar="INDEX|SHARDS...")
@click.option("--quick", is_flag=True, help="Check headers and lengths only, without payloads.")
@measuring_options
@click.option("--errors", type=click.IntRange(1), default=5, help="Number of errors to print.")
@click.option("--workers", type=click.IntRange(0), help="Number of processes; by default up to one for each CPU.")
@click.pass_context
def verify(
    ctx: click.Context,
    *,
    sources: tuple[str, ...],
    quick: bool,
    length: str | None,
    decode: tuple[str, ...],
    errors: int,
    workers: int | None,
) -> None:
    """Check an index against its shards, and lengths against payloads.

    Exit status 0: all agree. 1: something differs; the first errors are printed. 3: nothing differs, but the lengths of
    some fields were not measured, because no header has them: give --length or --decode.
    """
    _refuse_quick(quick, length or decode)
    measure = load_measure(length, decode)
    # `LengthIndex.open` does not check files over 256 MiB: verify checks all.
    for path in find_index_files(as_shards(sources)):
        read_index(path, checked_up_to=None)
    corpus = open_sources(sources)
    tables, shards = tables_of(corpus), corpus.shards
    checksums = not quick and tables.crcs is not None
    missing = [name for name in tables.measured if not measure.measures(name)]
    results = find_errors(tables, checksums=checksums, measure=measure, workers=_count_workers(workers, len(shards)))
    problems = [*filter(None, _progress(results, len(shards), "shard")), *unlisted_shards(sources, shards)]
    for problem in problems[:errors]:
        click.echo(f"{click.style('FAILED', fg='red')} {problem}")
    if len(problems) > errors:
        click.echo(f"... and {len(problems) - errors:,} more: --errors {len(problems)} prints them all")
    reading = describe_reading(corpus, missing, quick=quick)
    click.echo(f"{describe_index(corpus)}: {reading}, {judge(problems, missing)}")
    ctx.exit(1 if problems else NOT_MEASURED if missing else 0)


@main.command(
    epilog=examples(
        "lengthtrack report shards --max-tokens 4096,8192 --window auto,200",
        "lengthtrack report lengths.npy --max-tokens 8192 --replicas 8 --widths best:6",
        "lengthtrack report corpus.ltx --max-tokens 8192 --replicas 4 --plot padding.png --json report.json",
        "lengthtrack report corpus.ltx --batch-size 16 --json -",
        "lengthtrack report lengths.npy --pack 2048,4096 --cost 1 --replicas 8 --plot packs.svg",
    )
)
@click.argument("sources", nargs=-1, required=True, metavar="INDEX|SHARDS|lengths.npy")
@click.option(
    "--max-tokens",
    type=parse_numbers,
    metavar="N[,N...]",
    multiple=True,
    help="Largest number of tokens in a batch, one or several.",
)
@click.option(
    "--window", type=parse_windows, metavar="N[,N...]", multiple=True, default=["auto"], help="Samples sorted together."
)
@plan_options
@pack_options
@click.option(
    "--json",
    "json_path",
    type=WrittenPath(dir_okay=False, allow_dash=True),
    help="Write all figures as JSON; - is stdout.",
)
@click.option(
    "--plot", type=WrittenPath(dir_okay=False), help="Draw a figure, .png, .svg or .pdf; needs lengthtrack[plots]."
)
def report(
    *,
    sources: tuple[str, ...],
    max_tokens: tuple[list[int], ...],
    window: tuple[list[int | None], ...],
    json_path: str | None,
    plot: str | None,
    **options: Any,
) -> None:
    """Report what an epoch would cost, by budget and window, or by the capacity of rows.

    One column for each plan, before any training. Opens only the index, no shards.
    """
    capacities, packed = split_pack_options(options)
    if capacities:
        packed |= options | {"max_tokens": max_tokens or None}
        report_packs(sources, capacities, packed, json_path=json_path, plot=plot)
        return
    require_budget(max_tokens, options)
    lengths = open_lengths(sources)
    options["widths"] = parse_widths(options["widths"], lengths)
    # Before the plans, so that a missing matplotlib is an error at once.
    pictures = load_extra("samplers.cli.plots", "plots") if plot else None
    summaries = compare_plans(lengths, flatten(max_tokens) or [None], flatten(window), **options)
    # JSON on stdout must be the only output.
    if json_path != "-":
        print_report(sources, lengths, summaries)
    write_json(sources, lengths, [summary.as_json() for summary in summaries], json_path)
    if pictures is not None:
        pictures.draw_comparison(lengths, summaries, trace_windows(lengths, summaries), Path(str(plot)))


@main.command(
    epilog=examples(
        "lengthtrack convert corpus.jsonl blocks --key id --fields tokens,label --dtype tokens=int32",
        "lengthtrack convert data.parquet from_parquet --fields tokens=input_ids --max-samples 50",
        "lengthtrack convert dataset from_datasets --split train",
        "lengthtrack convert 'shards/*.tar' plain --layout plain",
    )
)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.argument("folder", type=WrittenPath(file_okay=False))
@click.option(
    "--fields",
    type=parse_names,
    metavar="NAME[,NAME...]",
    help="Fields to store, as NAME or NAME=COLUMN; by default all.",
)
@click.option("--key", help="Column of the samples' keys; by default __key__, or else the row number.")
@click.option("--text", type=parse_names, metavar="NAME[,NAME...]", help="Text fields, stored as UTF-8 bytes.")
@click.option(
    "--stack", type=parse_names, metavar="NAME[,NAME...]", help="Arrays that have the same size in every sample."
)
@click.option("--dtype", multiple=True, metavar="FIELD=DTYPE", help="Store a field as int32, float32 ...")
@click.option(
    "--round",
    "rounded",
    type=parse_names,
    metavar="NAME[,NAME...]",
    help="Fields whose numbers may be rounded to their dtype.",
)
@click.option("--layout", type=click.Choice(["blocks", "plain"]), default="blocks", help="Of the shards.")
@click.option("--max-samples", type=click.IntRange(1), default=100_000, help="Most samples in a shard.")
@click.option("--prefix", default="shard", help="Of the shards' names.")
@click.option("--split", help="Of a Hugging Face dataset that has several.")
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
    """Write the samples of INPUT to shards in FOLDER, with their index.

    INPUT is shards, JSON lines (.jsonl, .jsonl.gz), Parquet files, or a folder that save_to_disk of a Hugging Face
    dataset has written; the last two need lengthtrack[convert]. Lists become sequences, numbers stay numbers.
    """
    columns = None if fields is None else parse_pairs("--fields", fields)
    selection = ColumnSelection(
        fields=columns, key=key, text=text or (), dtypes=parse_dtypes(dtype), rounded=rounded or ()
    )
    # Blocks say which fields have a fixed size. Rows of other inputs do not.
    stack = stack or stacked_fields(inputs, selection)
    maker, samples = SampleMaker(selection), 0
    with ShardWriter(folder, layout=layout, max_samples=max_samples, prefix=prefix, stack=stack) as writer:
        for context, row in _progress(read_input_rows(inputs, selection, split), None, "sample"):
            _write(writer, context, maker.make(context, row))
            samples += 1
    shards = len(writer.shards)
    click.echo(
        f"{Path(folder, prefix + SUFFIX)}: {count(samples, 'sample')} in {count(shards, 'shard')}, layout {layout}"
    )


@main.command(
    epilog=examples(
        "lengthtrack show shards --max-tokens 4096",
        "lengthtrack show corpus.ltx --max-tokens 8192 --step 3 --replicas 2 --rank 1 --rows 8",
    )
)
@click.argument("sources", nargs=-1, required=True, metavar="INDEX|SHARDS")
@click.option("--max-tokens", type=click.IntRange(1), help="Largest number of tokens in a batch.")
@click.option("--window", type=click.IntRange(1), help="Samples sorted together; by default chosen from the batches.")
@plan_options
@click.option("--step", type=click.IntRange(0), default=0, help="Step of the epoch.")
@click.option("--rank", type=click.IntRange(0), default=0, help="Rank whose batch is shown.")
@click.option("--rows", type=click.IntRange(0), default=20, help="Number of rows to print.")
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


def _refuse_quick(quick: object, measures: object) -> None:
    """Refuse options that exclude each other.

    Raises:
        UsageError: Both are given.
    """
    if quick and measures:
        raise click.UsageError("--quick leaves payloads unread, and --length and --decode read them: choose one")


def _write(writer: ShardWriter, context: str, sample: dict[str, Any]) -> None:
    """Write a sample, with its origin in errors.

    Raises:
        ValueError: The writer refuses it.
    """
    try:
        writer.write(sample)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{context}: {error}") from error


def _length_of(measure: Measure) -> LengthOf | None:
    """The length function for an index."""
    # Without decoders the function itself, because the index records its name.
    return measure if measure.decode else measure.length


def _count_workers(workers: int | None, shards: int) -> int:
    """The number of workers: the option, or one for each CPU and eight shards."""
    if workers is not None:
        return workers
    fitting = min(os.cpu_count() or 1, shards // SHARDS_PER_WORKER)
    # One worker alone is slower than this process.
    return fitting if fitting > 1 else 0


def _progress(items: Iterable[ItemT], total: int | None, unit: str) -> Iterable[ItemT]:
    bar: Iterable[ItemT] = tqdm(items, total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False)
    return bar


def _check_step(plan: BatchPlan, step: int, rank: int) -> int:
    if step >= plan.steps or rank >= plan.num_replicas:
        raise click.UsageError(f"the epoch has steps 0 to {plan.steps - 1}, ranks 0 to {plan.num_replicas - 1}")
    return step * plan.num_replicas + rank


if __name__ == "__main__":
    main()
