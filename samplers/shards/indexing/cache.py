"""Each shard's own index, written as soon as the shard is scanned: where a killed build goes on."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from samplers.shards.indexing.index_file import SUFFIX, read_index, write_index
from samplers.shards.indexing.scan import LengthOf, scan_shard
from samplers.shards.indexing.tables import Tables
from samplers.shards.storage.atomic import TEMPORARY, remove_leftover
from samplers.shards.storage.reading import open_file


@dataclass(frozen=True)
class IndexCache:
    """How to index a shard.

    Attributes:
        fields: those whose lengths count; None for all arrays with an axis.
        length: `(field, bytes) -> steps` for fields that are not arrays.
        checksums: read the payload too.
        cache_dir: where each shard's index is kept: True for beside it, or a local folder; False for nowhere.
        length_id: which function `length` is; None where none is given, or none knows.
    """

    fields: Collection[str] | None
    length: LengthOf | None
    checksums: bool
    cache_dir: bool | Path = False
    length_id: str | None = None

    def __call__(self, shard: str) -> Tables:
        """The tables of a shard, from its kept index if that fits, else from its headers.

        Raises:
            FileExistsError: Another process writes the index.
            ValueError: The kept index is of other fields or of another function, nobody can tell which function
                measures lengths that are to be kept, or the shard cannot be scanned.
        """
        kept = self.load(shard)
        if kept is not None:
            self._check_fields(kept, shard)
            self._check_length_id(kept, shard)
            return kept if self.checksums else replace(kept, crcs=None)
        tables = scan_shard(shard, self.fields, self.length, checksums=self.checksums)
        if tables.measured:
            tables = replace(tables, length_id=self.length_id)
        if self.cache_dir is not False:
            self._check_named(tables, shard)
            path = self.path_of(shard)
            remove_leftover(path.with_name(path.name + TEMPORARY))
            write_index(path, [tables])
        return tables

    def path(self, shard: str) -> Path:
        """Where a shard's index is kept.

        Raises:
            ValueError: The shard is remote, and its index was to be kept beside it.
        """
        if isinstance(self.cache_dir, Path):
            name = shard if "://" in shard else str(Path(shard).absolute())
            # Shards of several folders may share a name.
            return (
                self.cache_dir
                / f"{blake2b(name.encode(), digest_size=4).hexdigest()}-{PurePosixPath(shard).name}{SUFFIX}"
            )
        if "://" in shard:
            raise ValueError(f"{shard}: no index can be kept beside a remote shard: give resume= a local folder")
        return Path(f"{shard}{SUFFIX}")

    def load(self, shard: str) -> Tables | None:
        """The kept index of a shard, if there is one that is whole, as new as the shard and has what is asked for."""
        if self.cache_dir is False or not (path := self.path_of(shard)).exists():
            return None
        try:
            tables, _ = read_index(str(path), checked_up_to=None, mapped=False)
        except ValueError:
            return None
        if len(tables.shards) != 1 or tables.shards[0].size != _size_since(shard, path):
            return None
        if self.checksums and tables.crcs is None:
            return None
        # An index from before functions were recorded, or by one of which nobody knows.
        if tables.measured and self._measures and tables.length_id is None:
            return None
        return replace(tables, shards=(replace(tables.shards[0], path=shard),))

    def inherit_fields(self, shards: Iterable[str]) -> "IndexCache":
        """The same where fields were named; else for the fields of the first index that is kept."""
        if self.fields is not None or self.cache_dir is False:
            return self
        kept = next((tables for shard in shards if (tables := self.load(shard))), None)
        return self if kept is None else replace(self, fields=_tracked_fields(kept))

    def _check_fields(self, kept: Tables, shard: str) -> None:
        if self.fields is not None and set(self.fields) != set(_tracked_fields(kept)):
            raise ValueError(
                f"{self.path_of(shard)} tells the lengths of {_tracked_fields(kept)}, asked for are {sorted(self.fields)}: ask "
                "for the same fields, delete it, or give resume= another folder"
            )

    @property
    def _measures(self) -> bool:
        return self.length is not None or self.length_id is not None

    def _check_length_id(self, kept: Tables, shard: str) -> None:
        if kept.measured and self._measures and kept.length_id != self.length_id:
            raise ValueError(
                f"{self.path_of(shard)}: its lengths of {', '.join(kept.measured)} were measured by {kept.length_id!r}, "
                f"length= is now {self.length_id!r}: delete it to measure anew, give resume= another folder, or "
                f"length_id={kept.length_id!r} if both give the same lengths"
            )

    def _check_named(self, tables: Tables, shard: str) -> None:
        if tables.measured and self.length_id is None:
            raise ValueError(
                f"{shard}: the lengths of {', '.join(tables.measured)} are to be kept, and nobody can tell later which "
                f"function has measured them, for {self.length!r} holds objects: give it a name with length_id="
            )


def _tracked_fields(tables: Tables) -> list[str]:
    return [field.name for field in tables.fields if field.tracked]


def _size_since(shard: str, index: Path) -> int | None:
    """Bytes of a shard, None if it was changed, moved here or replaced after its index was written."""
    if "://" in shard:
        return open_file(shard).size
    facts = Path(shard).stat()
    return facts.st_size if max(facts.st_mtime_ns, facts.st_ctime_ns) <= index.stat().st_mtime_ns else None
