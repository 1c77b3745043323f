"""Arguments that stand for data: indexes, functions, dtypes and widths."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np

from collate.widths import Widths
from samplers.cli.arguments import parse_numbers, parse_pairs
from samplers.planning.fitting.optimal_widths import optimal_widths
from samplers.planning.sorting import Lengths, as_length_array
from samplers.shards.indexing.index import LengthIndex, open_index
from samplers.shards.indexing.measuring import Decoder, Measure
from samplers.shards.storage.network.transport import DEFAULT, Transport
from samplers.shards.storage.reading import Shards


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


def open_sources(sources: Sequence[str], transport: Transport = DEFAULT) -> LengthIndex:
    """The index of the sources: of index files, of one folder, or of the files next to shards.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or a folder has several.
    """
    return open_index(as_shards(sources), transport)


def parse_transport(text: str | None) -> Transport:
    """The options of reads over a network, such as `retries=8,timeout=10`.

    Raises:
        BadParameter: A name is unknown, or a number out of its range.
    """
    if text is None:
        return DEFAULT
    names = [field.name for field in fields(Transport)]
    hint = "--transport"
    numbers: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in names or name in numbers:
            raise click.BadParameter(
                f"{part!r} must be one of {', '.join(names)}, each once, with =NUMBER", param_hint=hint
            )
        try:
            numbers[name] = int(value) if name in {"connections", "retries"} else float(value)
        except ValueError:
            raise click.BadParameter(f"{part!r} must have a number behind =", param_hint=hint) from None
    try:
        return Transport(**numbers)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=hint) from None


def as_shards(sources: Sequence[str]) -> Shards:
    """The sources as the library takes them: a single one may be a folder with a corpus file."""
    return sources[0] if len(sources) == 1 else list(sources)


def require_budget(max_tokens: object, options: dict[str, Any]) -> None:
    """Refuse a plan without a budget.

    Raises:
        UsageError: There is none, or `--overlong` is for packs alone.
    """
    if not max_tokens and options["batch_size"] is None:
        raise click.UsageError("no budget: give --max-tokens or --batch-size")
    if options["overlong"] in {"cut", "split"}:
        raise click.UsageError(f"--overlong {options['overlong']} needs --pack: choose alone, drop or error")
