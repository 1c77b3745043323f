"""The `lengthtrack` command: index, verify, report, convert and show."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import numpy as np
from tqdm import tqdm

from samplers.arguments import (
    OneLineErrors,
    examples,
    find_corpora,
    find_index,
    flatten,
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
from samplers.comparison import Candidate, compare_plans, describe_lengths, tabulate, trace_windows
from samplers.convert import Choice, SampleMaker, check_exists, read_rows, stacked_fields
from samplers.corpus import Lengths
from samplers.extras import load_extra
from samplers.plan import BatchPlan, plan_epoch
from samplers.shards.dataset import ShardDataset
from samplers.shards.format import Sample
from samplers.shards.index import LengthIndex
from samplers.shards.indexfile import SUFFIX, read_index
from samplers.shards.names import expand_shards
from samplers.shards.tables import Field
from samplers.shards.verify import find_errors
from samplers.shards.writer import ShardWriter

T = TypeVar("T")

CORPUS: Final = f"corpus{SUFFIX}"
# A worker pays off from about so many shards on.
SHARDS_PER_WORKER: Final = 8
# A line in a pipe is as long as it needs to be.
PIPE_WIDTH: Final = 1 << 16
BAR: Final = 30
NAMED: Final = 3


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
@click.option("--output", type=click.Path(dir_okay=False), help="Index file; by default the one in the folder SHARDS.")
@click.option(
    "--fields",
    type=parse_names,
    metavar="NAME[,NAME...]",
    help="Those whose lengths count; by default all arrays with an axis.",
)
@click.option("--checksums/--no-checksums", default=None, help="Read every payload too, and keep its checksum.")
@click.option("--workers", type=click.IntRange(0), help="Processes; by default up to one for each CPU.")
def index(
    *,
    shards: tuple[str, ...],
    output: str | None,
    fields: list[str] | None,
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
    built = _build(shards, fields, workers, checksums=bool(checksums))
    built.save(target)
    what = "built" if before is None else "unchanged" if before.fingerprint == built.fingerprint else "refreshed"
    click.echo(f"{target}: {what}, {_describe_index(built)}{', with checksums' * bool(checksums)}")


@main.command(
    epilog=examples(
        "lengthtrack verify shards",
        "lengthtrack verify shards/shard.ltx --quick --workers 2",
        "lengthtrack verify 'shards/*.tar'",
    )
)
@click.argument("sources", nargs=-1, required=True, metavar="INDEX|SHARDS...")
@click.option("--quick", is_flag=True, help="Hold headers and lengths against the index, and leave payloads unread.")
@click.option("--errors", type=click.IntRange(1), default=5, help="How many errors are named.")
@click.option("--workers", type=click.IntRange(0), help="Processes; by default up to one for each CPU.")
@click.pass_context
def verify(ctx: click.Context, *, sources: tuple[str, ...], quick: bool, errors: int, workers: int | None) -> None:
    """Hold an index against its shards, and lengths against payloads.

    Exit status 0: all agree. 1: something differs; the first errors are named.
    """
    for path in find_index(sources):
        read_index(path, checked_up_to=None)
    known = open_index(sources)
    payload = not quick and known.tables.crcs is not None
    shards = known.shards
    found = find_errors(known, payload=payload, workers=_count_workers(workers, len(shards)))
    wrong = [*filter(None, _progress(found, len(shards), "shard")), *_unknown_shards(sources, shards)]
    for error in wrong[:errors]:
        click.echo(f"{click.style('FAILED', fg='red')} {error}")
    if len(wrong) > errors:
        click.echo(f"... and {len(wrong) - errors:,} more: --errors {len(wrong)} names them all")
    read = "headers, lengths and payloads" if payload else "headers and lengths"
    why = "" if quick or payload else " (no checksums to hold payloads against: lengthtrack index --checksums)"
    verdict = click.style(_count(len(wrong), "error"), fg="red") if wrong else click.style("all agree", fg="green")
    click.echo(f"{_describe_index(known)}: {read} read{why}, {verdict}")
    ctx.exit(1 if wrong else 0)


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
@click.option("--json", "json_path", type=click.Path(dir_okay=False, allow_dash=True), help="All figures; - is stdout.")
@click.option("--plot", type=click.Path(dir_okay=False), help="A figure, .png, .svg or .pdf; needs lengthtrack[plots].")
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
    pictures = load_extra("samplers.pictures", "plots") if plot else None
    candidates = compare_plans(lengths, flatten(max_tokens) or [None], flatten(window), **options)
    if json_path != "-":
        _print_report(sources, lengths, candidates)
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
@click.argument("folder", type=click.Path(file_okay=False))
@click.option(
    "--fields", type=parse_names, metavar="NAME[,NAME...]", help="What is kept, as NAME or NAME=COLUMN; by default all."
)
@click.option("--key", help="The column that names samples; by default __key__, or else the row's number.")
@click.option("--text", type=parse_names, metavar="NAME[,NAME...]", help="Fields of text to store as UTF-8 bytes.")
@click.option("--stack", type=parse_names, metavar="NAME[,NAME...]", help="Arrays of the same size in every sample.")
@click.option("--dtype", multiple=True, metavar="FIELD=DTYPE", help="Store a field as int32, float32 ...")
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
    choice = Choice(fields=named, key=key, text=text or (), dtypes=parse_dtypes(dtype))
    stack = stack or stacked_fields(inputs, choice)
    maker, samples = SampleMaker(choice), 0
    with ShardWriter(folder, layout=layout, max_samples=max_samples, prefix=prefix, stack=stack) as writer:
        for where, row in _progress(read_rows(inputs, choice, split), None, "sample"):
            writer.write(maker.make(where, row))
            samples += 1
    shards = len(writer.shards)
    click.echo(
        f"{Path(folder, prefix + SUFFIX)}: {_count(samples, 'sample')} in {_count(shards, 'shard')}, layout {layout}"
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
    plan = plan_epoch(known, **options)
    batch = plan.batches[_check_step(plan, step, rank)]
    samples = ShardDataset(known.shards, known).__getitems__(batch)
    click.secho(f"step {step:,} of {plan.steps:,}, rank {rank} of {plan.num_replicas}, epoch {plan.epoch}", bold=True)
    _print_batch(known, plan, batch, samples)
    _print_rows(known, batch, samples, rows)


def _build(shards: Sequence[str], fields: list[str] | None, workers: int | None, *, checksums: bool) -> LengthIndex:
    paths = expand_shards(list(shards))
    return LengthIndex.build(
        paths,
        fields,
        workers=_count_workers(workers, len(paths)),
        checksums=checksums,
        progress=sys.stderr.isatty(),
    )


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


def _describe_index(known: LengthIndex) -> str:
    return (
        f"{_count(len(known), 'sample')} in {_count(len(known.shards), 'shard')}, lengths of {', '.join(known.fields)}"
    )


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'s' * (number != 1)}"


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


def _print_report(sources: Sequence[str], lengths: Lengths, candidates: Sequence[Candidate]) -> None:
    figures = describe_lengths(lengths)
    name = sources[0] if len(sources) == 1 else f"{len(sources):,} sources"
    what = _describe_index(lengths) if isinstance(lengths, LengthIndex) else f"{figures['samples']:,} samples"
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
    corpus, found = candidate.plan.layout.corpus, candidate.overlong
    worst = corpus.order[: min(NAMED, candidate.report.alone)].tolist()
    keys = [lengths.keys[place] if isinstance(lengths, LengthIndex) else f"sample {place}" for place in worst]
    longest = ", ".join(f"{key} ({corpus.lengths[place]} steps)" for key, place in zip(keys, worst, strict=True))
    done = "are batches of one here" if worst else "are left out here"
    return (
        f"{found:,} over-long at {candidate.name}, they {done}{f': {longest}' if longest else ''}. A sampler refuses "
        "them unless max_length, overlong='alone' or overlong='drop' says what to do."
    )


def _print_batch(known: LengthIndex, plan: BatchPlan, batch: list[int], samples: Sequence[Sample]) -> None:
    layout = plan.layout
    sizes = layout.sizes_of(np.array(batch), np.array([len(batch)]))
    widths = dict(zip(known.fields, sizes.widths[0].tolist(), strict=True))
    padded, real = len(batch) * sum(widths.values()), int(sizes.tokens[0])
    click.echo(
        f"{len(batch):,} rows, {padded:,} padded tokens, {real:,} real ones: padding {1 - real / padded:.2%}, budget "
        f"use {float(layout.use_of(sizes)[0]):.1%}\n"
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


def _print_rows(known: LengthIndex, batch: Sequence[int], samples: Sequence[Sample], rows: int) -> None:
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


if __name__ == "__main__":
    main()
