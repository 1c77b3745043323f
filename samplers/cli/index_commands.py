"""The bodies of `index`, `verify` and `report`, which read indexes and headers, and need no torch."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from samplers.cli.arguments import flatten, printable, split_pack_options
from samplers.cli.compare import compare_packs, compare_plans, pack_column, trace_windows
from samplers.cli.describing import describe_index
from samplers.cli.folder_index import expand_existing, index_of_folder, open_earlier, refresh_measure, unlisted_shards
from samplers.cli.opening import as_shards, load_measure, open_sources, parse_transport, parse_widths, require_budget
from samplers.cli.printing import describe_reading, judge, print_columns, print_report, show_progress, write_json
from samplers.cli.reported import LengthRequest, ReportedLengths, open_reported
from samplers.shards.indexing.find_index import find_index_files
from samplers.shards.indexing.index import LengthIndex, tables_of
from samplers.shards.indexing.index_file import read_index
from samplers.shards.indexing.measuring import LengthOf, Measure
from samplers.shards.indexing.verify import complete_measure, find_errors
from samplers.shards.storage.atomic import is_url
from samplers.sources.extras import load_extra

# Exit status if nothing differs, but not everything was measured. 2 is a usage error, by convention.
NOT_MEASURED: Final = 3
# With fewer, a worker takes longer to start than it saves.
SHARDS_PER_WORKER: Final = 8


def index(
    *,
    shards: tuple[str, ...],
    output: str | None,
    fields: list[str] | None,
    length: str | None,
    decode: tuple[str, ...],
    length_field: str | None,
    length_id: str | None,
    checksums: bool | None,
    workers: int | None,
    transport: str | None,
) -> None:
    """Build or refresh the index of shards."""
    paths = expand_existing(shards)
    patience = parse_transport(transport)
    target = (output if is_url(output) else Path(output)) if output else index_of_folder(shards)
    before = open_earlier(target, patience)
    # A second `lengthtrack index` refreshes: it must not drop fields or checksums that the first one was asked for.
    if before is not None:
        fields = list(before.fields) if fields is None else fields
        checksums = tables_of(before).crcs is not None if checksums is None else checksums
    measure = _length_of(load_measure(length, decode))
    if before is not None and measure is None and length_field is None:
        length_field = refresh_measure(before, target)
    built = LengthIndex.build(
        paths,
        fields,
        measure,
        workers=_count_workers(workers, len(paths)),
        checksums=bool(checksums),
        length_id=length_id,
        length_field=length_field,
        progress=sys.stderr.isatty(),
        transport=patience,
    )
    built.save(target)
    what = "built" if before is None else "unchanged" if _is_same(before, built) else "refreshed"
    click.echo(f"{target}: {what}, {describe_index(built)}{', with checksums' * bool(checksums)}")


def verify(
    *,
    sources: tuple[str, ...],
    quick: bool,
    length: str | None,
    decode: tuple[str, ...],
    errors: int,
    workers: int | None,
    transport: str | None,
) -> None:
    """Check an index against its shards, and lengths against payloads."""
    _refuse_quick(quick, length or decode)
    # `LengthIndex.open` does not check files over 256 MiB: verify checks all.
    patience = parse_transport(transport)
    for path in find_index_files(as_shards(sources), patience):
        read_index(path, checked_up_to=None, transport=patience)
    corpus = open_sources(sources, patience)
    tables, shards = tables_of(corpus), corpus.shards
    checksums = not quick and tables.crcs is not None
    measure = complete_measure(tables, load_measure(length, decode))
    missing = [name for name in tables.measured if not measure.measures(name)]
    count = _count_workers(workers, len(shards))
    results = find_errors(tables, checksums=checksums, measure=measure, workers=count, transport=patience)
    problems = [*filter(None, show_progress(results, len(shards), "shard")), *unlisted_shards(sources, shards)]
    for problem in problems[:errors]:
        click.echo(f"{click.style('FAILED', fg='red')} {printable(problem)}")
    if len(problems) > errors:
        click.echo(f"... and {len(problems) - errors:,} more: --errors {len(problems)} prints them all")
    reading = describe_reading(corpus, missing, quick=quick)
    click.echo(f"{describe_index(corpus)}: {reading}, {judge(problems, missing)}")
    click.get_current_context().exit(1 if problems else NOT_MEASURED if missing else 0)


def report(
    *,
    sources: tuple[str, ...],
    max_tokens: tuple[list[int], ...],
    window: tuple[list[int | None], ...],
    json_path: str | None,
    plot: str | None,
    **options: Any,
) -> None:
    """Report what an epoch would cost, by budget and window, or by the capacity of rows."""
    capacities, packed = split_pack_options(options)
    if capacities:
        packed |= options | {"max_tokens": max_tokens or None}
        _report_packs(sources, capacities, packed, json_path=json_path, plot=plot)
        return
    require_budget(max_tokens, options)
    opened = _open_lengths(sources, options)
    lengths = opened.lengths
    options["widths"] = parse_widths(options["widths"], lengths)
    # Before the plans, so that a missing matplotlib is an error at once.
    pictures = load_extra("samplers.cli.plots", "plots") if plot else None
    summaries = compare_plans(lengths, flatten(max_tokens) or [None], flatten(window), **options)
    # JSON on stdout must be the only output.
    if json_path != "-":
        print_report(sources, opened, summaries)
    write_json(sources, opened, [summary.as_json() for summary in summaries], json_path)
    if pictures is not None:
        pictures.draw_comparison(lengths, summaries, trace_windows(lengths, summaries), Path(str(plot)))


def _report_packs(
    sources: Sequence[str],
    capacities: Sequence[int],
    options: dict[str, Any],
    *,
    json_path: str | None,
    plot: str | None,
) -> None:
    """What `lengthtrack report --pack` does; the errors are those of `compare_packs`."""
    opened = _open_lengths(sources, options)
    # Before the plans, so that a missing matplotlib is an error at once.
    pictures = load_extra("samplers.cli.plots", "plots") if plot else None
    summaries = compare_packs(opened.lengths, capacities, options)
    # JSON on stdout must be the only output.
    if json_path != "-":
        print_columns(sources, opened, [pack_column(summary) for summary in summaries])
    write_json(sources, opened, [summary.as_json() for summary in summaries], json_path)
    if pictures is not None:
        pictures.draw_packs(summaries, Path(str(plot)))


def _open_lengths(sources: Sequence[str], options: dict[str, Any]) -> ReportedLengths:
    """The lengths of the sources; the options that say which are taken out of the others."""
    return open_reported(sources, LengthRequest(*(options.pop(name) for name in ("fields", "split", "text", "rate"))))


def _is_same(before: LengthIndex, built: LengthIndex) -> bool:
    """Whether a refreshed index has the same lengths, measured in the same way."""
    return (before.fingerprint, before.length_id, before.rates) == (built.fingerprint, built.length_id, built.rates)


def _refuse_quick(quick: object, measures: object) -> None:
    """Refuse options that exclude each other.

    Raises:
        UsageError: Both are given.
    """
    if quick and measures:
        raise click.UsageError("--quick leaves payloads unread, and --length and --decode read them: choose one")


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
