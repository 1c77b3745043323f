"""A shard while it is scanned: its groups of members, their headers and contents, and the digest of what was read."""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Final, TypeAlias

import numpy as np

from collate.errors import LengthError
from samplers.shards.format.npy import LONGEST_HEADER, AnyArray, NpyHeader, check_npy_size, read_npy_header
from samplers.shards.format.tar import Member, read_members, split_name
from samplers.shards.indexing.tables import Shard
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.reading import RandomAccess

# Members of one group, by suffix.
Members: TypeAlias = dict[str, Member]

# Lengths are stored as int32.
MAX_STEPS: Final = np.iinfo(np.int32).max
# The table of keys may be 8 times as large as the shard, and 1 MiB in any case.
_MAX_KEYS_RATIO: Final = 8
_FREE_BYTES: Final = 1 << 20


class ShardGroups:
    """The groups of a shard, and the digest of the headers that were read.

    Args:
        file: The shard.
        checksums: Whether payloads are read too.
    """

    def __init__(self, file: RandomAccess, *, checksums: bool) -> None:
        self.file, self.checksums = file, checksums
        self._digest = blake2b(digest_size=8)

    def __iter__(self) -> Iterator[tuple[str, Members]]:
        """Neighbouring members of one key.

        Yields:
            The key, and the members by suffix.

        Raises:
            ValueError: The shard is damaged, or a group has two members of one suffix.
        """
        members: Members = {}
        last = None
        for member in read_members(self.file):
            self._digest.update(member.header + member.head)
            key, suffix = split_name(member.name) or (None, "")
            if key is None:
                continue
            if key != last and last is not None:
                yield last, members
                members = {}
            if suffix in members:
                raise ValueError(f"{self.context(key)}: two members {suffix!r}")
            members[suffix], last = member, key
        if last is not None:
            yield last, members

    def context(self, key: str) -> str:
        """Shard and group, for messages."""
        return f"{shown(self.file.path)}: group {key!r}"

    def npy_header(self, member: Member, context: str) -> NpyHeader:
        """The header of an array, checked against the size of the member.

        Raises:
            ValueError: It is not an array of plain numbers, or header and size disagree.
        """
        head = member.head
        try:
            header = read_npy_header(head, context)
        except ValueError:
            if member.size <= len(head):
                raise
            # The header is longer than the 256 bytes that were read with the tar header.
            header = read_npy_header(self.file.read(member.data, min(member.size, LONGEST_HEADER)), context)
        check_npy_size(header, member.size, context)
        return header

    def content(self, member: Member) -> bytes:
        """The data of a member."""
        return self.file.read(member.data, member.size)

    def digested_content(self, member: Member) -> bytes:
        """The data of a member, which becomes part of the digest."""
        data = self.content(member)
        self._digest.update(data[len(member.head) :])
        return data

    def check_key_width(self, sizes: Iterable[int], count: int) -> None:
        """Reject very long keys: the key table is fixed-width, so one key can make it larger than the shard.

        Args:
            sizes: Bytes of the keys, or of the longest ones.
            count: Number of keys.

        Raises:
            ValueError: The table would be too large.
        """
        width = max(sizes)
        if not keys_fit(width, count, self.file.size):
            raise ValueError(f"{shown(self.file.path)}: a key of {width} bytes among {count} samples: shorten the key")

    def shard(self, lengths: AnyArray, keys: AnyArray) -> Shard:
        """The entry of this shard in the tables, once all of its groups were read."""
        fingerprint = blake2b(lengths.astype("<i8").tobytes(), digest_size=8)
        fingerprint.update(b"\0".join(keys.tolist()))
        file = self.file
        return Shard(file.path, file.size, len(keys), self._digest.hexdigest(), fingerprint.hexdigest())


def keys_fit(width: int, count: int, size: int) -> bool:
    """Whether the key table is at most 8 times as large as its shard, or 1 MiB.

    Args:
        width: Bytes of the longest key.
        count: Number of samples.
        size: Bytes of the shard.
    """
    return width * count <= size * _MAX_KEYS_RATIO + _FREE_BYTES


def check_stored_length(steps: int, context: str) -> int:
    """Return a length that fits the tables' 32 bits.

    Raises:
        LengthError: It does not fit.
    """
    if steps > MAX_STEPS:
        raise LengthError(f"{context}: {steps} steps, at most {MAX_STEPS} are possible: cut the sequence")
    return steps
