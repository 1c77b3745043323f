"""Samples of shards that are there, in their order: held against an index, or as their headers tell."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from samplers.shards.dataset import Decoder, ShardDataset
from samplers.shards.format.samples import KEYS, Sample, decode_groups, field_of
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.indexing.scan import read_groups
from samplers.shards.indexing.tables import Array, Tables
from samplers.shards.storage.paths import expand_shards
from samplers.shards.storage.reading import Shards

# (shard, key) -> key.
Rename: TypeAlias = Callable[[str, str], str]

# Read together, with what Python adds to a sample; a greater sample comes alone.
_BYTES_AT_ONCE: Final = 1 << 25
_SAMPLE_BYTES: Final = 1 << 12


class ShardSlice(NamedTuple):
    """A shard and the places of its samples in the index, from first up to last; both 0 without an index."""

    shard: str
    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class ShardSource:
    """The samples of a shard, decoded.

    Attributes:
        dataset: of all shards, which holds each sample against the index; None to read them as they are.
        fields: those to read; None for all.
        decode: functions from bytes for fields in other encodings.
        rename: gives keys; None to keep them.
    """

    dataset: ShardDataset | None
    fields: Collection[str] | None
    decode: Mapping[str, Decoder]
    rename: Rename | None

    def __call__(self, shard_slice: ShardSlice) -> Iterator[Sample]:
        """Read a shard.

        Yields:
            Its samples, in their order.

        Raises:
            TypeError: A value is no array after decoding; sample and field are named.
            ValueError: The shard is damaged, or a sample is not what the index says.
        """
        samples = self._decoded(shard_slice.shard) if self.dataset is None else self._checked(self.dataset, shard_slice)
        for sample in samples:
            for name, value in sample.items():
                if name != "__key__" and not isinstance(value, (np.ndarray, np.generic, int, float)):
                    raise TypeError(
                        f"{shard_slice.shard}: sample {sample['__key__']!r}, field {name!r}: is {type(value).__name__}: give "
                        f"decode={{{name!r}: a function from bytes to an array}}, or leave it out with fields="
                    )
            if self.rename is not None:
                sample["__key__"] = self.rename(shard_slice.shard, sample["__key__"])
            yield sample

    def _checked(self, dataset: ShardDataset, shard_slice: ShardSlice) -> Iterator[Sample]:
        for first, last in _sample_runs(dataset.index.tables, shard_slice):
            yield from dataset.__getitems__(range(first, last))

    def _decoded(self, shard: str) -> Iterator[Sample]:
        groups = read_groups(shard)
        first = next(groups, None)
        if first is None:
            raise ValueError(f"{shard}: holds no samples: members must be named KEY.SUFFIX")
        for group in chain([first], groups):
            if KEYS in group:
                yield from decode_groups([group], self.fields)
            else:
                yield self._decode_sample(group)

    def _decode_sample(self, group: dict[str, Any]) -> Sample:
        names = {suffix: field_of(suffix)[0] for suffix in group if not suffix.startswith("__")}
        own = {names[suffix]: suffix for suffix in names if names[suffix] in self.decode}
        missing = sorted(self.decode.keys() - own.keys())
        if missing:
            raise ValueError(
                f"{group['__url__']}: sample {group['__key__']!r}: no field {missing[0]!r} to decode, there are "
                f"{sorted(names.values())}"
            )
        fields = None if self.fields is None else [name for name in self.fields if name not in own]
        rest = {suffix: data for suffix, data in group.items() if suffix not in own.values()}
        [sample] = decode_groups([rest], fields)
        for name, suffix in own.items():
            if self.fields is None or name in self.fields:
                sample[name] = self.decode[name](group[suffix])
        return {"__key__": sample["__key__"]} | {name: sample[name] for name in names.values() if name in sample}


def read_shards(
    shards: Shards,
    index: LengthIndex | str | os.PathLike[str] | None,
    fields: Collection[str] | None,
    decode: Mapping[str, Decoder] | None,
    rename: Rename | None,
) -> tuple[ShardSource, list[ShardSlice]]:
    """A reader of shards, and its pieces.

    Args:
        shards: paths, brace patterns, wildcards, folders or URLs.
        index: of the shards, in their order; None for the files beside them, where there are any.
        fields: those to read; None for all.
        decode: functions from bytes for fields in other encodings.
        rename: `(shard, key) -> key`; None to keep keys.

    Raises:
        FileNotFoundError: There are no shards, or some have an index and others none.
        TypeError: `fields` is a single string.
        ValueError: The index is damaged or of other shards, or a field is not there.
    """
    decode = dict(decode or {})
    paths = [str(shards)] if str(shards).endswith(SUFFIX) else expand_shards(shards)
    try:
        dataset = ShardDataset(shards, index, fields, decode=decode)
    except FileNotFoundError:
        if index is not None or any(Path(f"{path}{SUFFIX}").exists() for path in paths):
            raise
        return ShardSource(None, fields, decode, rename), [ShardSlice(path) for path in paths]
    starts = dataset.index.starts.tolist()
    slices = [ShardSlice(shard, *edges) for shard, edges in zip(dataset.index.shards, pairwise(starts), strict=True)]
    return ShardSource(dataset, fields, decode, rename), slices


def _sample_runs(tables: Tables, shard_slice: ShardSlice) -> Iterator[tuple[int, int]]:
    rows = slice(shard_slice.first, shard_slice.last)
    total = _nbytes(tables, rows).cumsum() // _BYTES_AT_ONCE
    edges = np.flatnonzero(np.diff(total)) + 1 + shard_slice.first
    return pairwise([shard_slice.first, *edges.tolist(), shard_slice.last])


def _nbytes(tables: Tables, rows: slice) -> Array:
    # Of each sample, in memory.
    if tables.sizes is not None:
        values = tables.sizes[rows].sum(1)
    else:
        fixed = sum(field.row_bytes for field in tables.fields if not field.variable)
        steps = tables.lengths[rows].astype(np.int64)
        values = (steps * [field.row_bytes for field in tables.variable]).sum(1) + fixed
    return np.asarray(values + _SAMPLE_BYTES)
