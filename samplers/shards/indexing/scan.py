"""Scan a shard: the length, offset and checksum of each sample's fields, from headers alone."""

from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

from samplers.shards.format.block_keys import KEYS
from samplers.shards.format.header_lengths import SoundHeaders
from samplers.shards.format.samples import NO_SAMPLES
from samplers.shards.indexing.layouts.scan_blocks import scan_blocks
from samplers.shards.indexing.layouts.scan_plain import PlainScan
from samplers.shards.indexing.measuring import Measure
from samplers.shards.indexing.shard_groups import ShardGroups
from samplers.shards.indexing.tables import Tables
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.network.transport import DEFAULT, Transport
from samplers.shards.storage.reading import open_file


def scan_shard(
    path: str,
    fields: Collection[str] | None = None,
    measure: Measure | None = None,
    *,
    checksums: bool = False,
    transport: Transport = DEFAULT,
) -> Tables:
    """Read the headers of a shard.

    Args:
        path: Path or URL.
        fields: Fields whose lengths count. None for all arrays with an axis.
        measure: Measures fields that are not arrays. None for the headers of sound files.
        checksums: Read payloads too.
        transport: How a remote shard is read.

    Raises:
        FileNotFoundError: There is no such shard.
        LengthError: A block's lengths do not fit its steps, or what measures does not give a length.
        ValueError: The shard is damaged, empty, has pickles, or its samples differ in their fields. The message has
            shard, key and field.
    """
    groups = ShardGroups(open_file(path, transport=transport), checksums=checksums)
    pairs = iter(groups)
    first = next(pairs, None)
    if first is None:
        raise ValueError(f"{shown(path)}: {NO_SAMPLES}")
    if KEYS in first[1]:
        return scan_blocks(groups, chain([first], pairs), fields)
    scan = PlainScan(groups, fields, measure or Measure(header=SoundHeaders()))
    for key, members in chain([first], pairs):
        scan.add(key, members)
    return scan.tables()


def read_groups(path: str) -> Iterator[dict[str, Any]]:
    """The groups of a shard with their data, as webdataset gives them.

    Yields:
        `{"__key__": str, "__url__": path, suffix: bytes, ...}`.

    Raises:
        FileNotFoundError: There is no such shard.
        ValueError: The shard is damaged.
    """
    groups = ShardGroups(open_file(path), checksums=False)
    for key, members in groups:
        yield {"__key__": key, "__url__": path} | {suffix: groups.content(each) for suffix, each in members.items()}
