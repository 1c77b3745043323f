"""Write the samples of a conversion, and resume one that was interrupted."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from samplers.cli.conversion.rows import SampleMaker
from samplers.cli.conversion.unfinished import begin, mark_of
from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.storage.mirror import Mirror, open_target
from samplers.shards.writing.existing import refuse_shards
from samplers.shards.writing.writer import ShardWriter


@contextmanager
def resumable(folder: str, conversion: Mapping[str, Any], *, resume: bool, **options: Any) -> Iterator[ShardWriter]:
    """A writer of a folder that has a mark until all samples are written.

    Args:
        folder: Folder of the shards, or its URL in an object store.
        conversion: Description of the conversion.
        resume: Whether to complete an unfinished one.
        options: Of the writer.

    Yields:
        The writer. With `resume` its `keys` has the samples that exist.

    Raises:
        ClickException: The user has interrupted it. The message says how to resume.
        FileExistsError: The folder has shards, or an unfinished conversion that is not to be resumed.
        ValueError: The unfinished conversion has other inputs or options.
    """
    local, mirror = open_target(folder, options["prefix"])
    mark = mark_of(local, options["prefix"])
    is_new = not local.exists()
    if local.is_dir() and not mark.exists():
        if resume and (local / f"{options['prefix']}{SUFFIX}").exists():
            raise FileExistsError(f"{folder} holds a finished corpus, there is nothing to resume")
        # Before the mark is written: finished shards are no unfinished conversion.
        refuse_shards(local, options["prefix"], folder)
    append = begin(mark, conversion, resume=resume)
    if mirror is not None:
        mirror.push([mark])
    try:
        with ShardWriter(mirror or folder, append=append, **options) as writer:
            yield writer
    except KeyboardInterrupt:
        raise click.ClickException(
            f"interrupted: {len(writer.shards):,} shards in {folder} are complete; the same command with --resume "
            "writes the remainder"
        ) from None
    except BaseException:
        # Nothing was written, so there is nothing to resume.
        if not any(local.glob(f"{options['prefix']}-*.tar*")):
            _remove(mark, mirror)
            # An earlier folder, or one in which somebody else writes, is left as it is.
            if is_new:
                with suppress(OSError):
                    local.rmdir()
        raise
    _remove(mark, mirror)


def _remove(mark: Path, mirror: Mirror | None) -> None:
    """Remove a mark."""
    if mirror is None:
        mark.unlink(missing_ok=True)
    else:
        mirror.remove([mark])


def write_samples(writer: ShardWriter, maker: SampleMaker, rows: Iterable[tuple[str, dict[str, Any]]]) -> int:
    """Write the samples of rows, except those that exist.

    Returns:
        The number of all samples.

    Raises:
        ValueError: A row is no sample, or a sample that exists is not the one of its row. The message has the row.
    """
    existing = list(writer.keys)
    samples = 0
    for context, row in rows:
        if samples < len(existing):
            key = maker.skip(context, row)
            if key != existing[samples]:
                raise ValueError(
                    f"{context}: has the key {key!r}, the unfinished conversion {existing[samples]!r} there: the input "
                    "has changed: delete the folder to start again"
                )
        else:
            _write(writer, context, maker.make(context, row))
        samples += 1
    if samples < len(existing):
        raise ValueError(
            f"the inputs have {samples} rows, the unfinished conversion has written {len(existing)} samples: the input "
            "has changed: delete the folder to start again"
        )
    return samples


def _write(writer: ShardWriter, context: str, sample: dict[str, Any]) -> None:
    """Write a sample, with its origin in errors.

    Raises:
        ValueError: The writer refuses it.
    """
    try:
        writer.write(sample)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{context}: {error}") from error
