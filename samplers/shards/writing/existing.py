"""Shards that are there already: which they are, what is in them, and what a killed writer left beside them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from samplers.shards.indexing.index_file import REBUILD, SUFFIX, open_tables, read_index, write_index
from samplers.shards.indexing.scan import scan_shard
from samplers.shards.indexing.tables import Layout, Tables, TablesLike, check_alike
from samplers.shards.storage.atomic import TEMPORARY, remove_leftover
from samplers.shards.writing.schema import FieldSchema, read_schema

# PREFIX-000000.tar by a writer, PREFIX-000000-000000.tar by one that writes a part.
ShardNumber = tuple[int, ...]


def find_shards(folder: Path, prefix: str) -> dict[ShardNumber, Path]:
    """The shards of a prefix in a local folder, by number."""
    name = re.compile(rf"{re.escape(prefix)}-(\d{{6,}})(?:-(\d{{6,}}))?\.tar")
    found = [(name.fullmatch(path.name), path) for path in folder.iterdir()]
    numbered = [(tuple(int(n) for n in match.groups() if n), path) for match, path in found if match]
    return dict(sorted(numbered))


def refuse_shards(folder: Path, prefix: str) -> None:
    """Refuse a folder that holds shards of a prefix, or what a writer has left of them.

    Raises:
        FileExistsError: There are some.
    """
    found = sorted([*folder.glob(f"{prefix}-*.tar*"), *folder.glob(f"{prefix}{SUFFIX}*")])
    if found:
        raise FileExistsError(
            f"{folder} already holds {found[0].name}: write to another folder, give another prefix=, go on behind it "
            f"with append=True, or delete {prefix}-*.tar* and {prefix}{SUFFIX}*"
        )


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove what killed writers of a prefix have not finished.

    Raises:
        FileExistsError: A writer is alive.
    """
    name = re.compile(rf"{re.escape(prefix)}(-\d{{6,}}){{0,2}}(\.tar)?({re.escape(SUFFIX)})?{re.escape(TEMPORARY)}")
    for path in sorted(folder.iterdir()):
        if name.fullmatch(path.name):
            remove_leftover(path)


def read_corpus(folder: Path, prefix: str, shards: Sequence[Path]) -> frozenset[str]:
    """The names of the shards in the corpus file, all of which must be there; none if there is no such file.

    Raises:
        FileNotFoundError: The file lists a shard that is not there.
        ValueError: The file is damaged.
    """
    path = folder / f"{prefix}{SUFFIX}"
    if not path.exists():
        return frozenset()
    tables, _ = read_index(str(path))
    known = {shard.absolute() for shard in shards}
    for shard in tables.shards:
        if Path(shard.path).absolute() not in known:
            raise FileNotFoundError(
                f"{path} lists {shard.path}, which is not among {folder}/{prefix}-*.tar: put it back, or delete {path} "
                "to go on without it"
            )
    return frozenset(Path(shard.path).name for shard in tables.shards)


def adopt_shards(shards: Sequence[Path], layout: Layout, stack: frozenset[str]) -> list[TablesLike]:
    """What is known of shards that a writer has finished; one that was killed before it could index gets its index.

    Args:
        shards: in their order.
        layout: that they must have.
        stack: fields of fixed size.

    Raises:
        ValueError: A shard has another layout or other kinds of fields, or has changed since it was indexed.
    """
    parts: list[TablesLike | None] = [_read(shard) for shard in shards]
    known = next((part for part in parts if part is not None), None)
    whole = [_index(shard, known, stack) if part is None else part for shard, part in zip(shards, parts, strict=True)]
    for part in whole:
        if part.layout != layout:
            raise ValueError(f'{part.shards[0].path} is in layout="{part.layout}": go on in it, got "{layout}"')
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
    index = shard.with_name(shard.name + SUFFIX)
    if not index.exists():
        return None
    part = open_tables(str(index), str(shard))
    size = shard.stat().st_size
    if len(part.shards) != 1 or part.shards[0].size != size:
        sizes = [each.size for each in part.shards]
        raise ValueError(f"{shard}: changed since it was indexed: {size} bytes, {index} says {sizes}; {REBUILD}")
    return part


def _index(shard: Path, known: TablesLike | None, stack: frozenset[str]) -> TablesLike:
    # In the plain layout an array of fixed size looks like a sequence: other shards tell, or `stack`.
    fields = scan_shard(str(shard)).fields if known is None else known.fields
    names = [field.name for field in fields if field.variable and (known is not None or field.name not in stack)]
    index = shard.with_name(shard.name + SUFFIX)
    write_index(index, [scan_shard(str(shard), names, checksums=True)])
    return open_tables(str(index), str(shard))


def _check_stack(tables: Tables, schema: dict[str, FieldSchema], stack: frozenset[str]) -> None:
    for name in sorted(stack):
        field_schema = schema.get(name)
        if field_schema is None or field_schema.variable:
            raise ValueError(
                f"{tables.shards[0].path}: stack names {name!r}, which is {field_schema or 'no field'} there: leave it out, or "
                "write another corpus"
            )
