"""Scan shards of the layout `"plain"`: one sample in each group."""

from array import array
from collections.abc import Collection
from dataclasses import replace
from typing import Final

import numpy as np

from collate.errors import LengthError
from samplers.shards.format.block_keys import KEYS
from samplers.shards.format.header_lengths import DeclaredLength
from samplers.shards.format.keys import encode_key
from samplers.shards.format.npy import find_npy_header
from samplers.shards.format.samples import field_of, refuse_pickle
from samplers.shards.format.tar import Member
from samplers.shards.indexing.measuring import Measure
from samplers.shards.indexing.shard_groups import Members, ShardGroups, check_stored_length
from samplers.shards.indexing.tables import Field, Tables
from samplers.shards.storage.checksum import crc32

# Headers whose lengths are cached.
_CACHED_HEADERS: Final = 10_000


class PlainScan:
    """Collects the tables of a plain shard, group by group.

    Args:
        groups: The shard.
        fields: Fields whose lengths count. None for the arrays with an axis in the first sample, or else its sound.
        measure: Measures fields that are not arrays.
    """

    def __init__(self, groups: ShardGroups, fields: Collection[str] | None, measure: Measure) -> None:
        self._groups, self._measure = groups, measure
        self._tracked = None if fields is None else list(fields)
        self._keys: dict[str, None] = {}
        self._columns: dict[str, _PlainColumn] = {}
        # Lengths by suffix, size and header of the array. Parsing is most of the work, and headers recur.
        self._cached_lengths: dict[tuple[str, int, bytes], int] = {}
        # Rates by field, each once.
        self._rates: dict[str, set[int]] = {}

    def add(self, key: str, members: Members) -> None:
        """Add a sample.

        Raises:
            LengthError: `length` does not return a length.
            ValueError: The key comes twice, a member is damaged or a pickle, or a field whose lengths count is missing
                or differs from earlier samples.
        """
        context = self._groups.context(key)
        if KEYS in members or key in self._keys:
            problem = "a block among single samples" if KEYS in members else "the key comes twice"
            raise ValueError(f"{context}: {problem}")
        if self._tracked is None:
            self._tracked = self._default_fields(members, context)
        sample, tracked = len(self._keys), 0
        self._keys[key] = None
        for suffix, member in members.items():
            column = self._columns.get(suffix) or self._new_column(suffix, context)
            crc = crc32(self._groups.content(member)) if self._groups.checksums else 0
            column.append(sample, (member.data, member.size, crc, self._length(column, members, key)))
            tracked += column.field.tracked
        if tracked < len(self._tracked):
            names = [field_of(suffix)[0] for suffix in members]
            missing = [name for name in self._tracked if name not in names]
            raise ValueError(f"{context}: no field {missing[0]!r}, there are {names}")

    def tables(self) -> Tables:
        """The tables of all samples that were added."""
        columns = list(self._columns.values())
        for column in columns:
            column.pad(len(self._keys))
        lengths = np.stack([column.lengths for column in columns if column.field.tracked], 1).astype("<i4")
        encoded = list(map(encode_key, self._keys))
        self._groups.check_key_width(map(len, encoded), len(encoded))
        keys = np.array(encoded)
        return Tables(
            "plain",
            tuple(column.field for column in columns),
            (self._groups.shard(lengths, keys),),
            lengths,
            keys,
            np.stack([column.offsets for column in columns], 1).astype("<i8"),
            np.stack([column.sizes for column in columns], 1).astype("<i8"),
            np.stack([column.crcs for column in columns], 1).astype("<u4") if self._groups.checksums else None,
            rates=tuple((name, tuple(sorted(rates))) for name, rates in sorted(self._rates.items())),
        )

    def _default_fields(self, members: Members, context: str) -> list[str]:
        """The fields of a sample that are arrays with an axis; if there are none, those that a header measures.

        Raises:
            ValueError: There are none.
        """
        names = [
            field_of(suffix)[0]
            for suffix, member in members.items()
            if field_of(suffix)[1] == "npy" and self._groups.npy_header(member, context).shape
        ]
        if self._measure.header is not None and (not names or isinstance(self._measure.header, DeclaredLength)):
            names = self._measure.header.default_fields(members, context)
        if not names:
            raise ValueError(
                f"{context}: none of {sorted(members)} is a .npy array with an axis, or sound: name the fields whose "
                "lengths count (length_fields=, --fields), and what measures other encodings: a function (length=, "
                "--length MODULE:FUNCTION), or a member that declares it (length_field=, --length-field FIELD.KEY)"
            )
        return names

    def _new_column(self, suffix: str, context: str) -> "_PlainColumn":
        """Start a field.

        Raises:
            ValueError: It cannot have this name, or is a pickle.
        """
        refuse_pickle(suffix, context)
        name = field_of(suffix)[0]
        if name == "__key__":
            raise ValueError(f"{context}: a field cannot be called {name!r}: rename {suffix!r}")
        if any(column.field.name == name for column in self._columns.values()):
            raise ValueError(f"{context}: field {name!r} comes in two encodings: rename one")
        tracked = name in (self._tracked or ())
        self._columns[suffix] = _PlainColumn(Field(name, suffix, variable=tracked, tracked=tracked))
        return self._columns[suffix]

    def _length(self, column: "_PlainColumn", members: Members, key: str) -> int:
        """Steps of a member, 0 for a field whose lengths do not count."""
        if not column.field.is_array:
            return self._measure_member(column.field, members, key) if column.field.tracked else 0
        member = members[column.field.suffix]
        # The header without the payload, because almost every payload is different.
        header = member.head[: find_npy_header(member.head)[1]]
        cache_key = (column.field.suffix, member.size, header)
        steps = self._cached_lengths.get(cache_key)
        if steps is None:
            if len(self._cached_lengths) == _CACHED_HEADERS:
                self._cached_lengths.clear()
            steps = self._read_length(column, member, key)
            # A header that is longer than the head is not complete here, so it cannot be a cache key.
            if len(header) < len(member.head) or member.size == len(member.head):
                self._cached_lengths[cache_key] = steps
        return steps

    def _read_length(self, column: "_PlainColumn", member: Member, key: str) -> int:
        """Steps of an array, from its header. Its size is checked even if its length does not count.

        Raises:
            ValueError: It has no axis, or differs from earlier samples in dtype or feature shape.
        """
        field = column.field
        context = f"{self._groups.context(key)}, field {field.name!r}"
        header = self._groups.npy_header(member, context)
        if not field.tracked:
            return 0
        if not header.shape:
            raise ValueError(f"{context}: a number has no length: leave the field out of those whose lengths count")
        if not field.dtype:
            field = column.field = replace(field, dtype=header.dtype.str, shape=header.shape[1:])
        if (header.dtype.str, header.shape[1:]) != (field.dtype, field.shape):
            raise ValueError(
                f"{context}: {header.dtype} with features {list(header.shape[1:])}, earlier samples have "
                f"{field.dtype} with features {list(field.shape)}: a field has one dtype and feature shape"
            )
        return check_stored_length(header.shape[0], context)

    def _measure_member(self, field: Field, members: Members, key: str) -> int:
        """Steps of a member that is not an array; 0 if nothing measures it.

        Raises:
            LengthError: What measures it does not give a length.
            ValueError: Its header does not have it.
        """
        context = f"{self._groups.context(key)}, field {field.name!r}"
        if not self._measure.calls(field.name):
            return self._read_header(field, members, context)
        try:
            steps = self._measure(field.name, self._groups.content(members[field.suffix]))
        except Exception as error:
            error.add_note(f"length= was called for {context}")
            raise
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
            raise LengthError(f"{context}: length= must give a non-negative int, got {steps!r}")
        return check_stored_length(int(steps), context)

    def _read_header(self, field: Field, members: Members, context: str) -> int:
        """Steps of a member from a header, whose rate is noted; 0 without one."""
        if self._measure.header is None:
            return 0
        steps, rate = self._measure.header.measure(self._groups.file, members, field.suffix, context)
        if rate:
            self._rates.setdefault(field.name, set()).add(rate)
        return check_stored_length(steps, context)


class _PlainColumn:
    """A field of a plain shard: offset, size, crc32 and length for every sample, 0 if a sample lacks the field."""

    def __init__(self, field: Field) -> None:
        self.field = field
        # Flat arrays: the garbage collector would walk a million small tuples again and again.
        self.offsets, self.sizes, self.crcs, self.lengths = (array("q") for _ in range(4))

    def append(self, sample: int, values: tuple[int, int, int, int]) -> None:
        """Add offset, size, crc32 and length of a sample."""
        if sample > len(self.offsets):
            self.pad(sample)
        offset, size, crc, length = values
        self.offsets.append(offset)
        self.sizes.append(size)
        self.crcs.append(crc)
        self.lengths.append(length)

    def pad(self, samples: int) -> None:
        """Fill up with zeros, for samples that lack the field."""
        for column in (self.offsets, self.sizes, self.crcs, self.lengths):
            column.extend([0] * (samples - len(column)))
