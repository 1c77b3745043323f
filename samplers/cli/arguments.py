"""Arguments of commands: paths, numbers and names, and groups of options. And errors as one line with a remedy.

Completion reads all options at each TAB, so nothing that takes long to import is imported here, nor in `commands`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from samplers.shards.storage.atomic import is_url, local_path

Command = TypeVar("Command", bound=Callable[..., Any])

# Errors that mean wrong input. All others are bugs, and show a traceback.
_INPUT_ERRORS: Final = (ValueError, TypeError, IndexError, OSError, ImportError, EOFError, BrokenExecutor)


class WrittenPath(click.Path):
    """A path for output.

    Args:
        urls: Whether it may be the URL of a remote file or folder.
        **options: As for `click.Path`.
    """

    def __init__(self, *, urls: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._urls = urls

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, or a usage error if it is a URL and must be none."""
        if self._urls and is_url(value):
            return value
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


def transport_option(command: Command) -> Command:
    """Add the option that says how remote shards are read."""
    return click.option(
        "--transport",
        metavar="NAME=NUMBER[,...]",
        help="Reads over a network: connections=, timeout= (s), retries=, deadline= (s), backoff= (s).",
    )(command)


def transfers_option(command: Command) -> Command:
    """Add the option that prints at the end, also after an error, what was transferred over a network."""
    return click.option(
        "--transfers",
        is_flag=True,
        expose_value=False,
        callback=_print_transfers_at_end,
        help="Print requests, retries, bytes and waiting over a network on stderr.",
    )(command)


def _print_transfers_at_end(ctx: click.Context, _: click.Parameter, value: object) -> None:
    # Not for completion: the import takes long.
    if value and not ctx.resilient_parsing:
        ctx.call_on_close(import_module("samplers.cli.printing").count_transfers())


def source_options(command: Command) -> Command:
    """Add the options that say which lengths of the sources are meant."""
    options = [
        click.option(
            "--fields",
            type=parse_names,
            metavar="NAME[,NAME...]",
            help="Fields or columns whose lengths count; by default those of the index, or the only list.",
        ),
        click.option("--split", help="Of a Hugging Face dataset that has several."),
        click.option(
            "--text", type=click.Choice(["bytes", "characters"]), help="What counts in a column of text without tokens."
        ),
        click.option(
            "--rate", type=click.IntRange(1), help="Steps in a second, for durations; by default that of the index."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


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
            default="error",
            help="What to do with samples over the budget, as for a sampler; cut and split need --pack.",
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


def check_exists(path: str) -> None:
    """Refuse a path that does not exist. Patterns and URLs are not checked here.

    Raises:
        FileNotFoundError: There is no such file or folder.
    """
    if not any(character in path for character in "*?[{") and "://" not in path and not Path(path).exists():
        raise FileNotFoundError(f"no file or folder {path}")


def examples(*lines: str) -> str:
    """Examples for the end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def printable(text: str) -> str:
    r"""A text from a shard or an index, such as a key, without characters that a terminal would obey.

    >>> print(printable("\x1b[2Ja"))
    \x1b[2Ja
    """
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _one_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    # Some messages, as of NumPy, have line breaks.
    text = printable(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'a file'}: {error.strerror}"
    return text or type(error).__name__
