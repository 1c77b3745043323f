"""The `lengthtrack` command: index, verify, report, convert and show."""

from importlib import import_module
from typing import Any, Final

import click

from samplers.cli.arguments import (
    OneLineErrors,
    WrittenPath,
    examples,
    measuring_options,
    pack_options,
    parse_names,
    parse_numbers,
    parse_windows,
    plan_options,
    source_options,
    transfers_option,
    transport_option,
)

# The module of each command's function. It is loaded when the command runs.
_MODULES: Final = {
    **dict.fromkeys(("index", "verify", "report"), "samplers.cli.index_commands"),
    **dict.fromkeys(("convert", "show"), "samplers.cli.sample_commands"),
}


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
@click.option(
    "--output",
    type=WrittenPath(dir_okay=False, urls=True),
    help="Index file, or its URL in an object store; by default the one in the folder SHARDS.",
)
@click.option(
    "--fields",
    type=parse_names,
    metavar="NAME[,NAME...]",
    help="Fields whose lengths count; by default all arrays with an axis, or else all sound.",
)
@measuring_options
@click.option(
    "--length-field",
    metavar="FIELD.KEY",
    help="Number or list in another member that is the length of such fields, as json.num_samples.",
)
@click.option(
    "--length-id", help="Name of the measuring function, stored in the index; by default made from its source."
)
@click.option("--checksums/--no-checksums", default=None, help="Read every payload too, and store its checksum.")
@click.option("--workers", type=click.IntRange(0), help="Number of processes; by default up to one for each CPU.")
@transport_option
@transfers_option
def index(**options: Any) -> None:
    """Build or refresh the index of SHARDS.

    Reads headers, and payloads only for --checksums. Sound (wav, flac, ogg, opus, mp3) has its frames in its header,
    which needs lengthtrack[speech]. A refreshed index has the fields and checksums of the former one, and measures them
    in the same way, unless options change them.
    """
    _run("index", options)


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
@transport_option
@transfers_option
def verify(**options: Any) -> None:
    """Check an index against its shards, and lengths against payloads.

    Exit status 0: all agree. 1: something differs; the first errors are printed. 3: nothing differs, but the lengths of
    some fields were not measured, because no header has them: give --length or --decode.
    """
    _run("verify", options)


@main.command(
    epilog=examples(
        "lengthtrack report shards --max-tokens 4096,8192 --window auto,200",
        "lengthtrack report lengths.npy --max-tokens 8192 --replicas 8 --widths best:6",
        "lengthtrack report dataset --split train --fields tokens --max-tokens 8192",
        "lengthtrack report corpus.ltx --max-tokens 8192 --replicas 4 --plot padding.png --json report.json",
        "lengthtrack report corpus.ltx --batch-size 16 --json -",
        "lengthtrack report lengths.npy --pack 2048,4096 --cost 1 --replicas 8 --plot packs.svg",
    )
)
@click.argument("sources", nargs=-1, required=True, metavar="INDEX|SHARDS|DATASET|FILE...")
@source_options
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
@transfers_option
def report(**options: Any) -> None:
    """Report what an epoch would cost, by budget and window, or by the capacity of rows.

    One column for each plan, before any training. Of an index or shards, only the index is opened. Other sources are a
    folder that save_to_disk of a Hugging Face dataset has written (only offsets are read), Parquet and JSON lines, a
    Megatron .idx, and a .npy of lengths.
    """
    _run("report", options)


@main.command(
    epilog=examples(
        "lengthtrack convert corpus.jsonl blocks --key id --fields tokens,label --dtype tokens=int32",
        "lengthtrack convert data.parquet from_parquet --fields tokens=input_ids --max-samples 50",
        "lengthtrack convert dataset from_datasets --split train",
        "lengthtrack convert texts.jsonl tokens --text text --tokenizer bytes_of:encode",
        "lengthtrack convert 'shards/*.tar' plain --layout plain",
    )
)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.argument("folder", type=WrittenPath(file_okay=False, urls=True))
@click.option(
    "--fields",
    type=parse_names,
    metavar="NAME[,NAME...]",
    help="Fields to store, as NAME or NAME=COLUMN; by default all.",
)
@click.option("--key", help="Column of the samples' keys; by default __key__, or else the row number.")
@click.option(
    "--text", type=parse_names, metavar="NAME[,NAME...]", help="Text fields, stored as UTF-8 bytes or as tokens."
)
@click.option(
    "--tokenizer",
    metavar="MODULE:FUNCTION|tokenizer.json",
    help="Makes tokens of the text fields: text -> list of integers, or a file of Hugging Face tokenizers.",
)
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
@click.option("--resume", is_flag=True, help="Complete a conversion that was interrupted.")
@transfers_option
def convert(**options: Any) -> None:
    """Write the samples of INPUT to shards in FOLDER, with their index.

    INPUT is shards, JSON lines (.jsonl, .jsonl.gz), Parquet files, or a folder that save_to_disk of a Hugging Face
    dataset has written; the last two need lengthtrack[convert]. Lists become sequences, numbers stay numbers. After
    Ctrl-C or a kill, the same command with --resume writes the remainder.
    """
    _run("convert", options)


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
@transfers_option
def show(**options: Any) -> None:
    """Print a batch: fields, padding and rows."""
    _run("show", options)


def _run(command: str, options: dict[str, Any]) -> None:
    """Load the function of a command, and call it."""
    getattr(import_module(_MODULES[command]), command)(**options)


if __name__ == "__main__":
    main()
