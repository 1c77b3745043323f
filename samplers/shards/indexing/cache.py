"""The index of each shard, written as soon as the shard is scanned: a killed build resumes from these files.

A build of shards a, b and c that was killed while it scanned c leaves `a.tar.ltx` and `b.tar.ltx`. The next build with
`resume=True` loads these two and scans c alone. It scans a again if a.tar is newer than a.tar.ltx, differs in size, or
if the new build wants checksums and a.tar.ltx has none.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from samplers.shards.format.header_lengths import DeclaredLength, HeaderLength, SoundHeaders
from samplers.shards.indexing.index_file import FORMAT_VERSION, SUFFIX, read_index, send_index, write_index
from samplers.shards.indexing.measuring import LengthOf, Measure
from samplers.shards.indexing.scan import scan_shard
from samplers.shards.indexing.tables import Tables
from samplers.shards.storage.atomic import TEMPORARY, is_url, remove_leftover
from samplers.shards.storage.mirror import check_writable
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.network.remote import find_infos
from samplers.shards.storage.network.transport import DEFAULT, Transport
from samplers.shards.storage.untrusted import file_name_of


@dataclass(frozen=True)
class IndexCache:
    """Indexes shards, with a cache of their indexes.

    Attributes:
        fields: Fields whose lengths count. None for all arrays with an axis, or else all sound.
        length: `(field, bytes) -> steps` for fields that are not arrays.
        checksums: Read payloads too.
        cache_dir: Where the index of each shard is written: True for next to the shard, or a folder, or its URL. False
            for no cache.
        length_id: Name of `length`. None without a function, or for one that has no name.
        header: Measures fields that are not arrays, without a function.
        transport: How remote shards are read.
    """

    fields: Collection[str] | None
    length: LengthOf | None
    checksums: bool
    cache_dir: bool | Path | str = False
    length_id: str | None = None
    header: HeaderLength = field(default_factory=SoundHeaders)
    transport: Transport = DEFAULT

    def __call__(self, shard: str) -> Tables:
        """The tables of a shard: from the cache if its index fits, else from a scan.

        Raises:
            FileExistsError: Another process is writing the index.
            ValueError: The cached index is of other fields or by another function, the function has no name although
                its lengths are to be cached, the index is missing and cannot be written, the shard cannot be scanned,
                or no field needs the length in another member.
        """
        cached = self.load(shard)
        if cached is not None:
            self._check_fields(cached, shard)
            self._check_length_id(cached, shard)
            return cached if self.checksums else replace(cached, crcs=None)
        self._check_store(shard)
        # Scans of a whole shard are lost at a kill, so each index is written at once.
        measure = Measure(header=self.header) if self.length is None else Measure(self.length)
        tables = scan_shard(shard, self.fields, measure, checksums=self.checksums, transport=self.transport)
        if tables.measured:
            tables = replace(tables, length_id=self._recorded_id)
        elif isinstance(self.header, DeclaredLength):
            raise ValueError(
                f"{shown(shard)}: {self.header.path} would be the length of no field, arrays have their own: name a "
                "field that is not an array (length_fields=, --fields)"
            )
        if self.cache_dir is not False:
            self._check_has_id(tables, shard)
            self._save(self.path_of(shard), tables)
        return tables

    def _save(self, path: str, tables: Tables) -> None:
        """Write the index of a shard."""
        if is_url(path):
            # In the same folder as its shard it has a relative path.
            send_index(path, tables, FORMAT_VERSION, self.transport)
            return
        remove_leftover(Path(path + TEMPORARY))
        write_index(Path(path), [tables])

    def path_of(self, shard: str) -> str:
        """The path or URL of a shard's cached index."""
        if isinstance(self.cache_dir, bool):
            return f"{shard}{SUFFIX}"
        name = shard if "://" in shard else str(Path(shard).absolute())
        # Shards in several folders may share a file name.
        digest = blake2b(name.encode(), digest_size=4).hexdigest()
        file = f"{digest}-{file_name_of(shard)}{SUFFIX}"
        return (
            str(self.cache_dir / file) if isinstance(self.cache_dir, Path) else f"{self.cache_dir.rstrip('/')}/{file}"
        )

    def load(self, shard: str) -> Tables | None:
        """The cached index of a shard, if it is valid, not older than the shard, and has what this build wants."""
        if self.cache_dir is False or not self._exists(path := self.path_of(shard)):
            return None
        # Read, not mapped: 100,000 cached indexes would be 100,000 open maps.
        try:
            tables, _ = read_index(path, checked_up_to=None, mapped=False, transport=self.transport)
        except (FileNotFoundError, ValueError):
            return None
        if len(tables.shards) != 1 or tables.shards[0].size != _size_since(shard, path, self.transport):
            return None
        if self.checksums and tables.crcs is None:
            return None
        # The function that measured these lengths is unknown.
        if tables.measured and self._measures and tables.length_id is None:
            return None
        return replace(tables, shards=(replace(tables.shards[0], path=shard),))

    @staticmethod
    def _exists(path: str) -> bool:
        """Whether there may be such a file; of a remote one, reading it tells."""
        return is_url(path) or Path(path).exists()

    def inherit_fields(self, shards: Iterable[str]) -> "IndexCache":
        """This cache if `fields` was given, else one with the fields of the first cached index."""
        if self.fields is not None or self.cache_dir is False:
            return self
        cached = next((tables for shard in shards if (tables := self.load(shard))), None)
        return self if cached is None else replace(self, fields=_tracked_fields(cached))

    def _check_fields(self, cached: Tables, shard: str) -> None:
        """Refuse a cached index of other fields.

        Raises:
            ValueError: It is one.
        """
        fields = _tracked_fields(cached)
        if self.fields is not None and set(self.fields) != set(fields):
            raise ValueError(
                f"{shown(self.path_of(shard))} has the lengths of {fields}, asked for are {sorted(self.fields)}: ask "
                "for the same fields, delete it, or give resume= another folder"
            )

    @property
    def _measures(self) -> bool:
        return self._wanted_id is not None or self.length is not None

    @property
    def _recorded_id(self) -> str | None:
        """Name of what measures."""
        return self.header.id if self.length is None else self.length_id

    @property
    def _wanted_id(self) -> str | None:
        """Name of what was asked for. None for the default."""
        return self.header.id if isinstance(self.header, DeclaredLength) else self.length_id

    def _check_length_id(self, cached: Tables, shard: str) -> None:
        """Refuse lengths that another function measured.

        Raises:
            ValueError: Another one did.
        """
        if cached.measured and self._measures and cached.length_id != self._wanted_id:
            raise ValueError(
                f"{shown(self.path_of(shard))}: its lengths of {', '.join(cached.measured)} were measured by "
                f"{cached.length_id!r}, length= is now {self._wanted_id!r}: delete it to measure again, give resume= "
                f"another folder, or length_id={cached.length_id!r} if both give the same lengths"
            )

    def _check_store(self, shard: str) -> None:
        """Refuse, before its scan, a shard whose index cannot be written.

        Raises:
            ValueError: Its index is missing or does not fit, and would be written over HTTP.
        """
        if self.cache_dir is False or not is_url(path := self.path_of(shard)):
            return
        try:
            check_writable(path)
        except ValueError:
            raise ValueError(
                f"{shown(path)}: this shard has no such index, or it does not fit, and over HTTP and through caches "
                "files are read, and not written: give resume= a local folder, or one in an object store"
            ) from None

    def _check_has_id(self, tables: Tables, shard: str) -> None:
        """Refuse to cache lengths by a function without a name.

        Raises:
            ValueError: It has none.
        """
        if tables.measured and self._recorded_id is None:
            raise ValueError(
                f"{shown(shard)}: a cached index must name the function that measured the lengths of "
                f"{', '.join(tables.measured)}, but no name can be made for {self.length!r}, which holds objects: give "
                "it a name with length_id="
            )


def _tracked_fields(tables: Tables) -> list[str]:
    return [each.name for each in tables.fields if each.tracked]


def _size_since(shard: str, index: str, transport: Transport) -> int | None:
    """Bytes of a shard. None if it was changed, moved here or replaced after its index was written."""
    if "://" in shard:
        [info] = find_infos([shard], transport)
        if is_url(index):
            since, [written] = _modified(info), map(_modified, find_infos([index], transport))
            if since is not None and written is not None and since > written:
                return None
        return None if info.get("size") is None else int(info["size"])
    # The change time too: `mv` and `cp -p` keep the modification time of a file.
    status = Path(shard).stat()
    written_ns = Path(index).stat().st_mtime_ns
    return status.st_size if max(status.st_mtime_ns, status.st_ctime_ns) <= written_ns else None


def _modified(info: Mapping[str, Any]) -> datetime | None:
    """When an object was written, in whole seconds. None if its store does not say."""
    times = [info.get(name) for name in ("LastModified", "last_modified", "mtime", "updated", "created")]
    return next((time.replace(microsecond=0) for time in times if isinstance(time, datetime)), None)
