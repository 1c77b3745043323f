"""The index file of a folder of shards: its path, its former content, and the shards that it does not list."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from samplers.cli.arguments import check_exists
from samplers.shards.format.header_lengths import DeclaredLength, header_length_of
from samplers.shards.indexing.find_index import find_corpus
from samplers.shards.indexing.index import LengthIndex, tables_of
from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.storage.network.transport import DEFAULT, Transport
from samplers.shards.storage.paths import expand_shards

CORPUS: Final = f"corpus{SUFFIX}"


def index_of_folder(shards: Sequence[str]) -> Path:
    """The index file in a folder of shards, also if it does not exist yet.

    Raises:
        UsageError: The shards are not one folder, or the folder has several indexes.
    """
    check_exists(shards[0])
    folder = Path(shards[0])
    if len(shards) > 1 or not folder.is_dir():
        raise click.UsageError("--output FILE.ltx is required, unless SHARDS is one folder")
    try:
        return find_corpus(folder) or folder / CORPUS
    except ValueError as error:
        raise click.UsageError(f"{error} as --output") from error


def expand_existing(shards: Sequence[str]) -> list[str]:
    """The shards of paths and patterns, each of which exists.

    Raises:
        FileNotFoundError: One does not.
    """
    for pattern in shards:
        check_exists(pattern)
    return expand_shards(list(shards))


def refresh_measure(before: LengthIndex, target: Path | str) -> str | None:
    """The member that declares the lengths of an index, for its refresh. None if arrays or sound have them.

    Raises:
        UsageError: A function measured them, which only the user knows.
    """
    header = header_length_of(before.length_id)
    if isinstance(header, DeclaredLength):
        return header.path
    measured = tables_of(before).measured
    if measured and header is None and before.length_id is not None:
        raise click.UsageError(
            f"{target}: the lengths of {', '.join(measured)} were measured by {before.length_id}: give the function "
            "again, with --length or --decode, or delete the index to measure in another way"
        )
    return None


def open_earlier(target: Path | str, transport: Transport = DEFAULT) -> LengthIndex | None:
    """The index that a new one replaces. None if there is none, or it is damaged."""
    try:
        return LengthIndex.open(target, transport=transport)
    except FileNotFoundError:
        return None
    except ValueError as error:
        click.echo(f"built from the options alone: {error}", err=True)
        return None


def unlisted_shards(sources: Sequence[str], shards: Sequence[str]) -> list[str]:
    """Errors for the shards in a folder that its index does not list."""
    if len(sources) > 1 or not Path(sources[0]).is_dir():
        return []
    listed = {str(Path(shard).absolute()) for shard in shards}
    unlisted = [str(path) for path in sorted(Path(sources[0]).glob("*.tar")) if str(path.absolute()) not in listed]
    return [f"{path}: not in the index: lengthtrack index {sources[0]}" for path in unlisted]
