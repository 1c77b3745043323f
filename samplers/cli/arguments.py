"""What commands are given: lists, widths, indexes and shards; and errors as one line with a way out."""

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
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.indexing.measuring import Decoder, Measure
from samplers.shards.storage.atomic import local_path
from samplers.shards.storage.paths import expand_shards
from samplers.shards.storage.process_pool import ProcessKilledError

Command = TypeVar("Command", bound=Callable[..., Any])

# What the library tells a program to do, and what a command line does instead.
_IN_PYTHON: Final = {
    "LengthIndex.build(shards).save(path)": "lengthtrack index",
    "give shards= where they are now": "put it back there",
    "give another prefix=": "give another --prefix",
    'choose layout="blocks"': "choose --layout blocks",
    "set max_length, or choose overlong='drop' or overlong='alone'": (
        "set --max-length, or choose --overlong drop or --overlong alone"
    ),
    "build it with checksums=True": "make it with lengthtrack index --checksums",
    "give length=, a function (field, bytes) -> steps": (
        "give --length MODULE:FUNCTION, a function (field, bytes) -> steps, or --decode FIELD=MODULE:FUNCTION"
    ),
    "name the fields whose lengths count, and give length= to measure other encodings": (
        "name the fields whose lengths count with --fields, and give --length MODULE:FUNCTION to measure others"
    ),
}
_USERS_ERRORS: Final = (
    *(ValueError, TypeError, IndexError, OSError, ImportError, EOFError, BrokenExecutor, ProcessKilledError),
)


class WrittenPath(click.Path):
    """A path that is to be written: on this machine."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, or an error of the command line where it is a URL."""
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
            ClickException: It failed: what was wrong, and the way out.
            BrokenPipeError: Who reads the output has left.
            Exception: What failed, as it was raised, where a traceback is asked for.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Not a failure: click ends quietly.
            raise
        except _USERS_ERRORS as error:
            if ctx.params["traceback"]:
                raise
            raise click.ClickException(_one_line(error)) from error


def parse_numbers(text: str) -> list[int]:
    """Whole numbers above zero, separated by commas.

    Raises:
        BadParameter: They are not.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) == 0:
            raise click.BadParameter(f"{part!r} is not a whole number above zero")
    return [int(part) for part in parts]


def parse_windows(text: str) -> list[int | None]:
    """Whole numbers above zero, or `auto`, which is None, separated by commas.

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
    """The entries of an option that may be given several times, without repetition."""
    return [*dict.fromkeys(entry for entries in lists for entry in entries)]


def parse_pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` or `NAME`, which is its own value.

    Raises:
        BadParameter: A name is empty or given twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or (equals and not value) or name in pairs:
            raise click.BadParameter(f"{text!r} must be a new NAME or NAME=VALUE", param_hint=option)
        pairs[name] = value or name
    return pairs


def parse_dtypes(texts: Sequence[str]) -> dict[str, np.dtype[Any]]:
    """`FIELD=DTYPE`, as NumPy spells number types.

    Raises:
        BadParameter: There is no such type of numbers.
    """
    dtypes = {}
    for name, spelled in parse_pairs("--dtype", texts).items():
        try:
            dtypes[name] = np.dtype(spelled)
        except TypeError:
            dtypes[name] = np.dtype(object)
        if dtypes[name].kind not in "biuf":
            raise click.BadParameter(f"{spelled!r} is no type of numbers, as int32 or float32 is", param_hint="--dtype")
    return dtypes


def load_function(text: str, option: str) -> Callable[..., Any]:
    """The function that `MODULE:NAME` is, of a module that can be imported from here or from the working directory.

    Raises:
        BadParameter: There is no such module or function.
    """
    module, colon, name = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = import_module(module) if module and colon and name else None
        for part in name.split("."):
            found = getattr(found, part, None)
    except ImportError as error:
        raise click.BadParameter(f"{text!r}: {error}", param_hint=option) from error
    if not callable(found):
        raise click.BadParameter(f"{text!r} must be MODULE:FUNCTION, and name a function", param_hint=option)
    function: Callable[..., Any] = found
    return function


def load_measure(length: str | None, decode: Sequence[str]) -> Measure:
    """How to measure lengths that no header tells.

    Raises:
        BadParameter: There is no such function, or a field is named twice.
    """
    decoders: dict[str, Decoder] = {
        name: load_function(text, "--decode") for name, text in parse_pairs("--decode", decode).items()
    }
    return Measure(load_function(length, "--length") if length else None, decoders)


def measuring_options(command: Command) -> Command:
    """Add the options that say how lengths are measured that no header tells."""
    options = [
        click.option(
            "--length", metavar="MODULE:FUNCTION", help="Measures fields that are no arrays: (field, bytes) -> steps."
        ),
        click.option(
            "--decode",
            metavar="FIELD=MODULE:FUNCTION",
            multiple=True,
            help="Decodes such a field, bytes to a sequence, whose length counts.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def parse_widths(text: str | None, lengths: Lengths) -> Widths:
    """`8` for multiples of eight, `128,256` for a list, `best:6` for the six widths that waste least.

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
        raise click.BadParameter(f"{text!r}: best: takes one number", param_hint="--widths")
    return optimal_widths(as_length_array(lengths), numbers[0])


def find_corpora(folder: Path) -> list[Path]:
    """The index files in a folder that are of more than one shard."""
    return sorted(file for file in folder.glob(f"*{SUFFIX}") if not file.name.endswith(f".tar{SUFFIX}"))


def find_index(sources: Sequence[str]) -> list[str]:
    """The index files of what was given: themselves, the one of a folder, or those beside shards.

    Raises:
        FileNotFoundError: A pattern matches no file.
        ValueError: A folder holds several corpora, or indexes and shards are mixed.
    """
    if len(sources) == 1 and Path(sources[0]).is_dir():
        corpora = find_corpora(Path(sources[0]))
        if len(corpora) > 1:
            raise ValueError(f"{sources[0]} holds several corpora: give one of {', '.join(map(str, corpora))}")
        if corpora:
            return [str(corpora[0])]
    indexes = [source for source in sources if source.endswith(SUFFIX)]
    if indexes and len(indexes) < len(sources):
        raise ValueError(f"{indexes[0]} is an index and {(set(sources) - set(indexes)).pop()} is not: give one kind")
    return indexes or [f"{shard}{SUFFIX}" for shard in expand_shards(list(sources))]


def open_index(sources: Sequence[str]) -> LengthIndex:
    """The index of what was given.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or there are several.
    """
    indexes = find_index(sources)
    return LengthIndex.open(indexes[0]) if len(indexes) == 1 else LengthIndex.open_all(indexes)


def open_lengths(sources: Sequence[str]) -> Lengths:
    """The lengths in a `.npy` file, mapped, or the index of what was given.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds Python objects.
    """
    if len(sources) == 1 and sources[0].endswith(".npy"):
        try:
            lengths: npt.NDArray[Any] = np.load(sources[0], mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{sources[0]}: {error} Save whole numbers, as np.save does of an integer array") from None
        return lengths
    return open_index(sources)


def plan_options(command: Command) -> Command:
    """Add the planner's options, except for `--max-tokens` and `--window`."""
    options = [
        click.option("--batch-size", type=click.IntRange(1), help="Rows in a batch at most."),
        click.option(
            "--count",
            "count_tokens",
            type=click.Choice(["padded", "real"]),
            default="padded",
            help="What tokens count.",
        ),
        click.option("--replicas", "num_replicas", type=click.IntRange(1), default=1, help="Ranks that train."),
        click.option("--widths", help="Padded widths: 8 (multiples), 128,256 (these), best:6 (the six best)."),
        click.option("--min-length", type=click.IntRange(0), default=0, help="Shorter samples are left out."),
        click.option("--max-length", type=click.IntRange(1), help="Longer samples are cut to it."),
        click.option(
            "--overlong",
            type=click.Choice(["alone", "drop", "error"]),
            default="alone",
            help="What is done with samples over the budget.",
        ),
        click.option("--drop-last", is_flag=True, help="Drop the last, partial step."),
        click.option("--seed", type=click.IntRange(0), default=0, help="Of the shuffles."),
        click.option("--epoch", type=click.IntRange(0), default=0, help="Which epoch is planned."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def examples(*lines: str) -> str:
    """The end of a command's help: lines that can be pasted."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'a file'}: {error.strerror}"
    for python, command in _IN_PYTHON.items():
        text = text.replace(python, command)
    return text or type(error).__name__
