"""The `lengthtrack` command: index, verify, report, convert and show."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from tqdm import tqdm

from samplers.cli.arguments import (
    OneLineErrors,
    WrittenPath,
    examples,
    find_corpora,
    find_index,
    flatten,
    load_measure,
    measuring_options,
    open_index,
    open_lengths,
    parse_dtypes,
    parse_names,
    parse_numbers,
    parse_pairs,
    parse_widths,
    parse_windows,
    plan_options,
)
from samplers.cli.comparison import compare_plans, describe_lengths, trace_windows
from samplers.cli.convert import Choice, SampleMaker, check_exists, read_rows, stacked_fields
from samplers.cli.extras import load_extra
from samplers.cli.printing import count, describe_index, describe_reading, judge, print_batch, print_report, print_rows
from samplers.planning.options import Options
from samplers.planning.plan import BatchPlan
from samplers.planning.tables.pool_table import choose_table
from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.index_file import SUFFIX, read_index
from samplers.shards.indexing.measuring import Measure
from samplers.shards.indexing.scan import LengthOf
from samplers.shards.indexing.verify import find_errors
from samplers.shards.storage.paths import expand_shards
from samplers.shards.writing.writer import ShardWriter

T = TypeVar("T")

# Exit status where nothing differs, but not everything was measured; 2 is the command line's.
NOT_MEASURED: Final = 3
CORPUS: Final = f"corpus{SUFFIX}"
# A worker pays off from about so many shards on.
SHARDS_PER_WORKER: Final = 8


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="lengthtrack")
@click.option("--traceback", is_flag=True, help="Show where in the program an error was raised.")
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
    help="Those whose lengths count; by default all arrays with an axis.",
)
@measuring_options
@click.option("--length-id", help="A name for what measures; by default one of its source. Kept in the index.")
@click.option("--checksums/--no-checksums", default=None, help="Read every payload too, and keep its checksum.")
@click.option("--workers", type=click.IntRange(0), help="Processes; by default up to one for each CPU.")
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

    Headers are read, and payloads only for --checksums. A refreshed index keeps the fields and checksums of the one
    before, unless options say otherwise.
    """
    target = Path(output) if output else _index_of_folder(shards)
    before = _open_earlier(target)
    if before is not None:
        fields = list(before.fields) if fields is None else fields
        checksums = before.tables.crcs is not None if checksums is None else checksums
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
@click.option("--quick", is_flag=True, help="Hold headers and lengths against the index, and leave payloads unread.")
@measuring_options
@click.option("--errors", type=click.IntRange(1), default=5, help="How many errors are named.")
@click.option("--workers", type=click.IntRange(0), help="Processes; by default up to one for each CPU.")
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
    """Hold an index against its shards, and lengths against payloads.

    Exit status 0: all agree. 1: something differs; the first errors are named. 3: what was read agrees, and the lengths
    of some fields were not measured, since no header tells them: --length or --decode does.
    """
    _refuse_quick(quick, length or decode)
    measure = load_measure(length, decode)
    for path in find_index(sources):
        read_index(path, checked_up_to=None)
    known = open_index(sources)
    payload = not quick and known.tables.crcs is not None
    shards = known.shards
    missing = [name for name in known.tables.measured if not measure.measures(name)]
    found = find_errors(known, payload=payload, measure=measure, workers=_count_workers(workers, len(shards)))
    wrong = [*filter(None, _progress(found, len(shards), "shard")), *_unknown_shards(sources, shards)]
    for error in wrong[:errors]:
        click.echo(f"{click.style('FAILED', fg='red')} {error}")
    if len(wrong) > errors:
        click.echo(f"... and {len(wrong) - errors:,} more: --errors {len(wrong)} names them all")
    click.echo(f"{describe_index(known)}: {describe_reading(known, missing, quick=quick)}, {judge(wrong, missing)}")
    ctx.exit(1 if wrong else NOT_MEASURED if missing else 0)


@main.command(
    epilog=examples(
        "lengthtrack report shards --max-tokens 4096,8192 --window auto,200",
        "lengthtrack report lengths.npy --max-tokens 8192 --replicas 8 --widths best:6",
        "lengthtrack report corpus.ltx --max-tokens 8192 --replicas 4 --plot padding.png --json report.json",
        "lengthtrack report corpus.ltx --batch-size 16 --json -",
    )
)
@click.argument("sources", nargs=-1, required=True, metavar="INDEX|SHARDS|lengths.npy")
@click.option(
    "--max-tokens",
    type=parse_numbers,
    metavar="N[,N...]",
    multiple=True,
    help="Tokens in a batch at most, one or several.",
)
@click.option(
    "--window", type=parse_windows, metavar="N[,N...]", multiple=True, default=["auto"], help="Samples sorted together."
)
@plan_options
@click.option(
    "--json", "json_path", type=WrittenPath(dir_okay=False, allow_dash=True), help="All figures; - is stdout."
)
@click.option(
    "--plot", type=WrittenPath(dir_okay=False), help="A figure, .png, .svg or .pdf; needs lengthtrack[plots]."
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
    """What an epoch would cost, by budget and window.

    A column for each, before anything is trained. Only the index is opened, and no shard.
    """
    _require_budget(max_tokens, options)
    lengths = open_lengths(sources)
    options["widths"] = parse_widths(options["widths"], lengths)
    pictures = load_extra("samplers.cli.plots", "plots") if plot else None
    candidates = compare_plans(lengths, flatten(max_tokens) or [None], flatten(window), **options)
    if json_path != "-":
        print_report(sources, lengths, candidates)
    if json_path is not None:
        figures = {"sources": list(sources), "lengths": describe_lengths(lengths)}
        text = json.dumps(figures | {"plans": [candidate.as_json() for candidate in candidates]}, indent=2)
        click.echo(text) if json_path == "-" else Path(json_path).write_text(text + "\n", encoding="utf-8")
    if pictures is not None:
        pictures.draw_comparison(lengths, candidates, trace_windows(lengths, candidates), Path(str(plot)))


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
    "--fields", type=parse_names, metavar="NAME[,NAME...]", help="What is kept, as NAME or NAME=COLUMN; by default all."
)
@click.option("--key", help="The column that names samples; by default __key__, or else the row's number.")
@click.option("--text", type=parse_names, metavar="NAME[,NAME...]", help="Fields of text to store as UTF-8 bytes.")
@click.option("--stack", type=parse_names, metavar="NAME[,NAME...]", help="Arrays of the same size in every sample.")
@click.option("--dtype", multiple=True, metavar="FIELD=DTYPE", help="Store a field as int32, float32 ...")
@click.option(
    "--round", "rounded", type=parse_names, metavar="NAME[,NAME...]", help="Fields whose numbers float32 may round."
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

    INPUT is shards, JSON lines (.jsonl, .jsonl.gz), Parquet files, or the folder of a Hugging Face dataset that
    save_to_disk has written; the last two need lengthtrack[convert]. Lists become sequences, numbers stay numbers.
    """
    named = None if fields is None else parse_pairs("--fields", fields)
    choice = Choice(fields=named, key=key, text=text or (), dtypes=parse_dtypes(dtype), rounded=rounded or ())
    stack = stack or stacked_fields(inputs, choice)
    maker, samples = SampleMaker(choice), 0
    with ShardWriter(folder, layout=layout, max_samples=max_samples, prefix=prefix, stack=stack) as writer:
        for where, row in _progress(read_rows(inputs, choice, split), None, "sample"):
            _write(writer, where, maker.make(where, row))
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
@click.option("--max-tokens", type=click.IntRange(1), help="Tokens in a batch at most.")
@click.option("--window", type=click.IntRange(1), help="Samples sorted together; by default from the batches.")
@plan_options
@click.option("--step", type=click.IntRange(0), default=0, help="Which batch of the epoch.")
@click.option("--rank", type=click.IntRange(0), default=0, help="Whose batch.")
@click.option("--rows", type=click.IntRange(0), default=20, help="Rows that are printed.")
def show(*, sources: tuple[str, ...], step: int, rank: int, rows: int, **options: Any) -> None:
    """Print a batch: fields, padding and rows."""
    _require_budget(options["max_tokens"], options)
    known = open_index(sources)
    options["widths"] = parse_widths(options["widths"], known)
    epoch, num_replicas = options.pop("epoch"), options.pop("num_replicas")
    table = choose_table(known, Options(**options))
    plan = BatchPlan(table, epoch, num_replicas)
    batch = plan.batches[_check_step(plan, step, rank)]
    samples = ShardDataset(known.shards, known).__getitems__(batch)
    click.secho(f"step {step:,} of {plan.steps:,}, rank {rank} of {plan.num_replicas}, epoch {plan.epoch}", bold=True)
    print_batch(known, table, batch, samples)
    print_rows(known, batch, samples, rows)


def _refuse_quick(quick: object, measures: object) -> None:
    if quick and measures:
        raise click.UsageError("--quick leaves payloads unread, and --length and --decode read them: choose one")


def _write(writer: ShardWriter, where: str, sample: dict[str, Any]) -> None:
    try:
        writer.write(sample)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _length_of(measure: Measure) -> LengthOf | None:
    # The function itself where there is no decoder, for the index records its name.
    return measure if measure.decode else measure.length


def _index_of_folder(shards: Sequence[str]) -> Path:
    check_exists(shards[0])
    folder = Path(shards[0])
    if len(shards) > 1 or not folder.is_dir():
        raise click.UsageError("say where the index goes with --output FILE.ltx, or give one folder as SHARDS")
    corpora = find_corpora(folder)
    if len(corpora) > 1:
        raise click.UsageError(f"{folder} holds several indexes: choose one with --output {corpora[0]}")
    return corpora[0] if corpora else folder / CORPUS


def _open_earlier(target: Path) -> LengthIndex | None:
    try:
        return LengthIndex.open(target)
    except FileNotFoundError:
        return None
    except ValueError as error:
        click.echo(f"built anew, with what the options say: {error}", err=True)
        return None


def _count_workers(given: int | None, shards: int) -> int:
    # One process alone needs no pool.
    fitting = min(os.cpu_count() or 1, shards // SHARDS_PER_WORKER)
    return given if given is not None else fitting if fitting > 1 else 0


def _progress(items: Iterable[T], total: int | None, unit: str) -> Iterable[T]:
    bar: Iterable[T] = tqdm(items, total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False)
    return bar


def _unknown_shards(sources: Sequence[str], known: Sequence[str]) -> list[str]:
    """The shards in a folder that its index does not list."""
    if len(sources) > 1 or not Path(sources[0]).is_dir():
        return []
    listed = {str(Path(shard).absolute()) for shard in known}
    found = [str(path) for path in sorted(Path(sources[0]).glob("*.tar")) if str(path.absolute()) not in listed]
    return [f"{path}: not in the index: lengthtrack index {sources[0]}" for path in found]


def _require_budget(max_tokens: object, options: dict[str, Any]) -> None:
    if not max_tokens and options["batch_size"] is None:
        raise click.UsageError("no budget: give --max-tokens or --batch-size")


def _check_step(plan: BatchPlan, step: int, rank: int) -> int:
    if step >= plan.steps or rank >= plan.num_replicas:
        raise click.UsageError(f"the epoch has steps 0 to {plan.steps - 1}, ranks 0 to {plan.num_replicas - 1}")
    return step * plan.num_replicas + rank


if __name__ == "__main__":
    main()
