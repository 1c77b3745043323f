"""Existing shards of a folder: their numbers, their tables, and the leftovers of killed writers.

A writer that was killed while it wrote its third shard leaves

- `shard-000000.tar` and `shard-000000.tar.ltx`: a finished shard, adopted with its index;
- `shard-000001.tar` alone: a finished shard whose index is missing; it is scanned, and gets its index;
- `shard-000002.tar.tmp`: a leftover, which is removed.

With `append=True` a new writer adopts the first two and continues with `shard-000002.tar`. Its samples must be those
that are not in `writer.keys`. The corpus file `shard.ltx` is written last, when the writer ends.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from samplers.shards.indexing.index_file import REBUILD, SUFFIX, open_tables, read_index, write_index
from samplers.shards.indexing.scan import scan_shard
from samplers.shards.indexing.tables import Layout, Tables, TablesLike, check_alike
from samplers.shards.storage.atomic import TEMPORARY, remove_leftover
from samplers.shards.writing.schema import FieldSchema, read_schema

# (0,) of PREFIX-000000.tar, (3, 0) of PREFIX-000003-000000.tar, the first shard of part 3.
ShardNumber = tuple[int, ...]


def find_shards(folder: Path, prefix: str) -> dict[ShardNumber, Path]:
    """The shards of a prefix in a local folder, in the order of their numbers."""
    name = re.compile(rf"{re.escape(prefix)}-(\d{{6,}})(?:-(\d{{6,}}))?\.tar")
    matches = [(name.fullmatch(path.name), path) for path in folder.iterdir()]
    numbered = [(tuple(int(n) for n in match.groups() if n), path) for match, path in matches if match]
    return dict(sorted(numbered))


def refuse_shards(folder: Path, prefix: str, where: str = "") -> None:
    """Refuse a folder with shards of a prefix, or leftovers of them.

    Args:
        folder: The folder.
        prefix: The prefix.
        where: Its name for the message. The folder itself by default.

    Raises:
        FileExistsError: There are some.
    """
    # Temporary files too: another writer may be at work.
    files = sorted([*folder.glob(f"{prefix}-*.tar*"), *folder.glob(f"{prefix}{SUFFIX}*")])
    if files:
        raise FileExistsError(
            f"{where or folder} already holds {files[0].name}: write to another folder, give another prefix, continue "
            f"behind it with append=True, or delete {prefix}-*.tar* and {prefix}{SUFFIX}*"
        )


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove the temporary files of killed writers of a prefix.

    Raises:
        FileExistsError: A writer is alive.
    """
    name = re.compile(rf"{re.escape(prefix)}(-\d{{6,}}){{0,2}}(\.tar)?({re.escape(SUFFIX)})?{re.escape(TEMPORARY)}")
    for path in sorted(folder.iterdir()):
        if name.fullmatch(path.name):
            remove_leftover(path)


def read_corpus(folder: Path, prefix: str, shards: Sequence[Path]) -> frozenset[str]:
    """File names of the shards in the corpus file. Empty without such a file.

    Args:
        folder: Folder of the corpus.
        prefix: Prefix of its files.
        shards: The shards of that prefix that exist.

    Raises:
        FileNotFoundError: The file lists a shard that does not exist.
        ValueError: The file is damaged.
    """
    path = folder / f"{prefix}{SUFFIX}"
    if not path.exists():
        return frozenset()
    tables, _ = read_index(str(path))
    existing = {shard.absolute() for shard in shards}
    for shard in tables.shards:
        if Path(shard.path).absolute() not in existing:
            raise FileNotFoundError(
                f"{path} lists {shard.path}, which is not among {folder}/{prefix}-*.tar: put it back, or delete {path} "
                "to continue without it"
            )
    return frozenset(Path(shard.path).name for shard in tables.shards)


def adopt_shards(shards: Sequence[Path], layout: Layout, stack: frozenset[str], version: int) -> list[TablesLike]:
    """The tables of finished shards. A shard whose writer was killed before it wrote the index is indexed here.

    Args:
        shards: The shards, in their order.
        layout: The layout that they must have.
        stack: Fields of fixed size.
        version: Version of the indexes that are written.

    Raises:
        ValueError: A shard has another layout or schema, or has changed since it was indexed.
    """
    indexed: list[TablesLike | None] = [_read(shard) for shard in shards]
    example = next((part for part in indexed if part is not None), None)
    whole = [
        _index(shard, example, stack, version) if part is None else part
        for shard, part in zip(shards, indexed, strict=True)
    ]
    for part in whole:
        if part.layout != layout:
            raise ValueError(f'{part.shards[0].path} is in layout="{part.layout}": continue in it, got "{layout}"')
        # All indexes of a corpus have checksums, or none.
        if "crcs" not in part.shapes:
            raise ValueError(
                f"{part.shards[0].path} is indexed without checksums: delete {part.shards[0].path}{SUFFIX}, and it is "
                "made with them"
            )
    if whole:
        check_alike(whole)
        tables, _ = read_index(f"{shards[0]}{SUFFIX}")
        tables = replace(tables, shards=whole[0].shards)
        _check_stack(tables, read_schema(tables), stack)
    return whole


def _read(shard: Path) -> TablesLike | None:
    """The tables of a shard, from the index next to it. None without one.

    Raises:
        ValueError: The shard has changed since it was indexed.
    """
    index = shard.with_name(shard.name + SUFFIX)
    if not index.exists():
        return None
    part = open_tables(str(index), str(shard))
    size = shard.stat().st_size
    if len(part.shards) != 1 or part.shards[0].size != size:
        sizes = [each.size for each in part.shards]
        raise ValueError(f"{shard}: changed since it was indexed: {size} bytes, {index} says {sizes}; {REBUILD}")
    return part


def _index(shard: Path, example: TablesLike | None, stack: frozenset[str], version: int) -> TablesLike:
    """Index a shard. `example` is another shard of the corpus that has an index."""
    # In the plain layout an array of fixed size looks like a sequence. Another shard or `stack` tells which it is.
    fields = scan_shard(str(shard)).fields if example is None else example.fields
    names = [field.name for field in fields if field.variable and (example is not None or field.name not in stack)]
    index = shard.with_name(shard.name + SUFFIX)
    write_index(index, [scan_shard(str(shard), names, checksums=True)], version)
    return open_tables(str(index), str(shard))


def _check_stack(tables: Tables, schema: dict[str, FieldSchema], stack: frozenset[str]) -> None:
    """Refuse fields in `stack` that are of variable length in the shards.

    Raises:
        ValueError: There is one, or it is not a field.
    """
    for name in sorted(stack):
        field = schema.get(name)
        if field is None or field.variable:
            raise ValueError(
                f"{tables.shards[0].path}: stack names {name!r}, which is {field or 'no field'} there: leave it out, "
                "or write another corpus"
            )
