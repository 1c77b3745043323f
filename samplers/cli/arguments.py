"""Arguments of commands: lists, widths, indexes and shards. And errors as one line with a remedy."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import numpy as np
import numpy.typing as npt

from collate.widths import Widths
from samplers.planning.optimal_widths import optimal_widths
from samplers.planning.sorting import Lengths, as_length_array
from samplers.shards.indexing.index import LengthIndex, open_index
from samplers.shards.indexing.measuring import Decoder, Measure
from samplers.shards.storage.atomic import local_path
from samplers.shards.storage.process_pool import ProcessKilledError
from samplers.shards.storage.reading import Shards

Command = TypeVar("Command", bound=Callable[..., Any])

# Errors that mean wrong input. All others are bugs, and show a traceback.
_INPUT_ERRORS: Final = (
    *(ValueError, TypeError, IndexError, OSError, ImportError, EOFError, BrokenExecutor, ProcessKilledError),
)


class WrittenPath(click.Path):
    """A local path for output."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, or a usage error if it is a URL."""
        # "-" is stdout.
        if value != "-":
            try:
                value = str(local_path(value, "it"))
            except ValueError as error:
                self.fail(str(error), param, ctx)
        return super().convert(value, param, ctx)


class OneLineErrors(click.Group):
    """A group of commands whose errors are one line on stderr, with exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for.

        Raises:
            ClickException: The command failed. The message has the error and its remedy.
            BrokenPipeError: The reader of the output has ended.
            Exception: The original error, with `--traceback`.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Not a failure, for example with `| head`. click ends without a message.
            raise
        except _INPUT_ERRORS as error:
            if ctx.params["traceback"]:
                raise
            raise click.ClickException(_one_line(error)) from error


def parse_numbers(text: str) -> list[int]:
    """Positive integers, separated by commas.

    Raises:
        BadParameter: They are not.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) == 0:
            raise click.BadParameter(f"{part!r} is not a positive integer")
    return [int(part) for part in parts]


def parse_windows(text: str) -> list[int | None]:
    """Positive integers or `auto`, which is None, separated by commas.

    Raises:
        BadParameter: They are not.
    """
    return [None if part.strip() == "auto" else parse_numbers(part)[0] for part in text.split(",")]


def parse_names(text: str) -> list[str]:
    """Names, separated by commas.

    Raises:
        BadParameter: One is empty.
    """
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise click.BadParameter(f"{text!r} must be names separated by commas")
    return names


def flatten(lists: Sequence[list[Any]]) -> list[Any]:
    """The entries of an option that may come several times, each once."""
    return [*dict.fromkeys(entry for entries in lists for entry in entries)]


def parse_pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Parse `NAME=VALUE` or `NAME`, where the value is the name.

    Raises:
        BadParameter: A name is empty or comes twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or (equals and not value) or name in pairs:
            raise click.BadParameter(f"{text!r} must be a new NAME or NAME=VALUE", param_hint=option)
        pairs[name] = value or name
    return pairs


def parse_dtypes(texts: Sequence[str]) -> dict[str, np.dtype[Any]]:
    """Parse `FIELD=DTYPE`, with NumPy's names of numeric dtypes.

    Raises:
        BadParameter: There is no such numeric dtype.
    """
    dtypes = {}
    for name, spelled in parse_pairs("--dtype", texts).items():
        try:
            dtypes[name] = np.dtype(spelled)
        except TypeError:
            # Refused below, with the dtypes that are not numeric.
            dtypes[name] = np.dtype(object)
        if dtypes[name].kind not in "biuf":
            raise click.BadParameter(
                f"{spelled!r} is not a numeric dtype such as int32 or float32", param_hint="--dtype"
            )
    return dtypes


def load_function(text: str, option: str) -> Callable[..., Any]:
    """Import the function `MODULE:NAME`. The module may also be in the working directory.

    Raises:
        BadParameter: There is no such module or function.
    """
    module, colon, name = text.partition(":")
    here = str(Path.cwd())
    # An installed script does not have the working directory on its path.
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        value: Any = import_module(module) if module and colon and name else None
        for part in name.split("."):
            value = getattr(value, part, None)
    except ImportError as error:
        raise click.BadParameter(f"{text!r}: {error}", param_hint=option) from error
    if not callable(value):
        raise click.BadParameter(f"{text!r} must be MODULE:FUNCTION, and name a function", param_hint=option)
    function: Callable[..., Any] = value
    return function


def load_measure(length: str | None, decode: Sequence[str]) -> Measure:
    """The functions that measure lengths that no header has.

    Raises:
        BadParameter: There is no such function, or a field comes twice.
    """
    decoders: dict[str, Decoder] = {
        name: load_function(text, "--decode") for name, text in parse_pairs("--decode", decode).items()
    }
    return Measure(load_function(length, "--length") if length else None, decoders)


def measuring_options(command: Command) -> Command:
    """Add the options for functions that measure lengths."""
    options = [
        click.option(
            "--length",
            metavar="MODULE:FUNCTION",
            help="Function that measures fields that are not arrays: (field, bytes) -> steps.",
        ),
        click.option(
            "--decode",
            metavar="FIELD=MODULE:FUNCTION",
            multiple=True,
            help="Function that decodes such a field, bytes to a sequence; its length counts.",
        ),
    ]
    # click lists options in reverse order of decoration.
    for option in reversed(options):
        command = option(command)
    return command


def parse_widths(text: str | None, lengths: Lengths) -> Widths:
    """Parse `8` (multiples of 8), `128,256` (these widths), or `best:6` (the six widths that waste least).

    Raises:
        BadParameter: It is none of these.
    """
    if text is None:
        return None
    best = text.removeprefix("best:")
    numbers = parse_numbers(best)
    if best == text:
        return numbers[0] if len(numbers) == 1 else numbers
    if len(numbers) > 1:
        # The best widths depend on their number, so there is no list of them.
        raise click.BadParameter(f"{text!r}: best: takes one number", param_hint="--widths")
    return optimal_widths(as_length_array(lengths), numbers[0])


def open_sources(sources: Sequence[str]) -> LengthIndex:
    """The index of the sources: of index files, of one folder, or of the files next to shards.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or a folder has several.
    """
    return open_index(as_shards(sources))


def as_shards(sources: Sequence[str]) -> Shards:
    """The sources as the library takes them: a single one may be a folder with a corpus file."""
    return sources[0] if len(sources) == 1 else list(sources)


def open_lengths(sources: Sequence[str]) -> Lengths:
    """The lengths in a `.npy` file, mapped, or the index of the sources.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or has Python objects.
    """
    if len(sources) == 1 and sources[0].endswith(".npy"):
        try:
            lengths: npt.NDArray[Any] = np.load(sources[0], mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{sources[0]}: {error} Save an integer array with np.save") from None
        return lengths
    return open_sources(sources)


def plan_options(command: Command) -> Command:
    """Add the planner's options, except for `--max-tokens` and `--window`."""
    options = [
        click.option("--batch-size", type=click.IntRange(1), help="Largest number of rows in a batch."),
        click.option(
            "--count",
            "count_tokens",
            type=click.Choice(["padded", "real"]),
            default="padded",
            help="Tokens that count against the budget.",
        ),
        click.option(
            "--replicas", "num_replicas", type=click.IntRange(1), default=1, help="Number of ranks that train."
        ),
        click.option("--widths", help="Padded widths: 8 (multiples), 128,256 (these), best:6 (the six best)."),
        click.option("--min-length", type=click.IntRange(0), default=0, help="Leave out shorter samples."),
        click.option("--max-length", type=click.IntRange(1), help="Cut longer samples to this length."),
        click.option(
            "--overlong",
            type=click.Choice(["alone", "cut", "drop", "error", "split"]),
            help="What to do with samples over the budget: alone, or, with --pack, split, if not given.",
        ),
        click.option("--drop-last", is_flag=True, help="Drop the last, partial step."),
        click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the shuffles."),
        click.option("--epoch", type=click.IntRange(0), default=0, help="Epoch to plan."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def pack_options(command: Command) -> Command:
    """Add the options of packs."""
    options = [
        click.option(
            "--pack",
            "capacities",
            type=parse_numbers,
            metavar="N[,N...]",
            multiple=True,
            help="Pack documents into rows of this capacity, one or several, instead of batches of a budget.",
        ),
        click.option("--rows", type=click.IntRange(1), default=1, help="Rows of a batch, with --pack."),
        click.option("--multiple", type=click.IntRange(1), default=1, help="Round documents up, with --pack."),
        click.option("--max-documents", type=click.IntRange(1), help="Most documents in a row, with --pack."),
        click.option(
            "--cost",
            metavar="[LINEAR,]SQUARE",
            help="Balance ranks by LINEAR x length + SQUARE x length^2, with --pack.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def split_pack_options(options: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """Take the options of packs out of all: the capacities, and the others.

    Raises:
        UsageError: One is given without `--pack`.
    """
    capacities = flatten(options.pop("capacities"))
    packed = {name: options.pop(name) for name in ("rows", "multiple", "max_documents", "cost")}
    given = [name for name, value in packed.items() if value not in {None, 1}]
    if given and not capacities:
        raise click.UsageError(f"--{given[0].replace('_', '-')} needs --pack, the capacity of a row")
    return capacities, packed


def require_budget(max_tokens: object, options: dict[str, Any]) -> None:
    """Check that there is a budget, and set what happens to samples over it.

    Raises:
        UsageError: There is none, or `--overlong` is for packs alone.
    """
    if not max_tokens and options["batch_size"] is None:
        raise click.UsageError("no budget: give --max-tokens or --batch-size")
    if options["overlong"] in {"cut", "split"}:
        raise click.UsageError(f"--overlong {options['overlong']} needs --pack: choose alone, drop or error")
    options["overlong"] = options["overlong"] or "alone"


def examples(*lines: str) -> str:
    """Examples for the end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _one_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    # Some messages, as of NumPy, have line breaks.
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'a file'}: {error.strerror}"
    return text or type(error).__name__
