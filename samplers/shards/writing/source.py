"""Read the samples of existing shards in order: checked against an index, or as their headers describe them."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from samplers.shards.dataset import ShardDataset
from samplers.shards.format.block_keys import KEYS
from samplers.shards.format.npy import AnyArray
from samplers.shards.format.samples import NO_SAMPLES, Sample, decode_groups, field_of
from samplers.shards.indexing.index import LengthIndex, tables_of
from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.indexing.measuring import Decoder
from samplers.shards.indexing.scan import read_groups
from samplers.shards.indexing.tables import Tables
from samplers.shards.storage.paths import expand_shards
from samplers.shards.storage.reading import Shards

Rename: TypeAlias = Callable[[str, str], str]
"""From a shard and a key to a new key."""

# Samples of up to 32 MiB are read together, each with 4 KiB for its Python objects. A larger sample is read alone.
_BYTES_AT_ONCE: Final = 1 << 25
_SAMPLE_BYTES: Final = 1 << 12


class ShardSlice(NamedTuple):
    """A shard, and the indices `first` up to `last` of its samples. Both are 0 without an index."""

    shard: str
    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class ShardSource:
    """Gives the samples of a shard, decoded.

    Attributes:
        dataset: Dataset of all shards, which checks each sample against the index. None without an index.
        fields: Fields to read. None for all.
        decode: Functions from bytes, for fields in other encodings.
        rename: `(shard, key) -> key`. None keeps the keys.
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
            TypeError: A value is not an array after decoding. The message has sample and field.
            ValueError: The shard is damaged, or a sample differs from the index.
        """
        samples = self._decoded(shard_slice.shard) if self.dataset is None else self._checked(self.dataset, shard_slice)
        for sample in samples:
            for name, value in sample.items():
                if name != "__key__" and not isinstance(value, (np.ndarray, np.generic, int, float)):
                    raise TypeError(
                        f"{shard_slice.shard}: sample {sample['__key__']!r}, field {name!r}: is "
                        f"{type(value).__name__}: give decode={{{name!r}: a function from bytes to an array}}, or "
                        "leave it out with fields="
                    )
            if self.rename is not None:
                sample["__key__"] = self.rename(shard_slice.shard, sample["__key__"])
            yield sample

    def _checked(self, dataset: ShardDataset, shard_slice: ShardSlice) -> Iterator[Sample]:
        """Samples with an index, which the dataset compares with it.

        Yields:
            Samples.
        """
        for first, last in _sample_runs(tables_of(dataset.index), shard_slice):
            yield from dataset.__getitems__(range(first, last))

    def _decoded(self, shard: str) -> Iterator[Sample]:
        """Samples without an index.

        Yields:
            Samples.

        Raises:
            ValueError: The shard has none, or is damaged.
        """
        groups = read_groups(shard)
        first = next(groups, None)
        if first is None:
            raise ValueError(f"{shard}: {NO_SAMPLES}")
        for group in chain([first], groups):
            if KEYS in group:
                yield from decode_groups([group], self.fields)
            else:
                yield self._decode_sample(group)

    def _decode_sample(self, group: dict[str, Any]) -> Sample:
        """The sample of a plain group, some of its fields by the user's functions.

        Raises:
            ValueError: A field to decode is missing.
        """
        names = {suffix: field_of(suffix)[0] for suffix in group if not suffix.startswith("__")}
        custom = {names[suffix]: suffix for suffix in names if names[suffix] in self.decode}
        missing = sorted(self.decode.keys() - custom.keys())
        if missing:
            raise ValueError(
                f"{group['__url__']}: sample {group['__key__']!r}: no field {missing[0]!r} to decode, there are "
                f"{sorted(names.values())}"
            )
        fields = None if self.fields is None else [name for name in self.fields if name not in custom]
        standard = {suffix: data for suffix, data in group.items() if suffix not in custom.values()}
        # The standard fields first: `decode_groups` refuses pickles among them.
        [sample] = decode_groups([standard], fields)
        for name, suffix in custom.items():
            if self.fields is None or name in self.fields:
                sample[name] = self.decode[name](group[suffix])
        return {"__key__": sample["__key__"]} | {name: sample[name] for name in names.values() if name in sample}


def read_shards(
    shards: Shards,
    index: LengthIndex | str | os.PathLike[str] | None,
    fields: Collection[str] | None,
    *,
    decode: Mapping[str, Decoder] | None,
    rename: Rename | None,
) -> tuple[ShardSource, list[ShardSlice]]:
    """A source of samples, and the slices that it takes, one for each shard.

    Args:
        shards: Paths, brace patterns, wildcards, folders or URLs.
        index: Index of the shards, in their order. None for the files next to them, if there are any.
        fields: Fields to read. None for all.
        decode: Functions from bytes, for fields in other encodings.
        rename: `(shard, key) -> key`. None keeps the keys.

    Raises:
        FileNotFoundError: There are no shards, or some have an index and others none.
        TypeError: `fields` is a single string.
        ValueError: The index is damaged or of other shards, or a field does not exist.
    """
    decode = dict(decode or {})
    paths = [str(shards)] if str(shards).endswith(SUFFIX) else expand_shards(shards)
    # An index is optional here, but not some shards with and some without.
    try:
        dataset = ShardDataset(shards, index, fields, decode=decode)
    except FileNotFoundError:
        if index is not None or any(Path(f"{path}{SUFFIX}").exists() for path in paths):
            raise
        return ShardSource(None, fields, decode, rename), [ShardSlice(path) for path in paths]
    starts = dataset.index.starts.tolist()
    slices = [ShardSlice(shard, *bounds) for shard, bounds in zip(dataset.index.shards, pairwise(starts), strict=True)]
    return ShardSource(dataset, fields, decode, rename), slices


def _sample_runs(tables: Tables, shard_slice: ShardSlice) -> Iterator[tuple[int, int]]:
    """Runs of samples that are read together: (first, last) indices. Each run begins in another 32 MiB of the shard."""
    rows = slice(shard_slice.first, shard_slice.last)
    total = _nbytes(tables, rows).cumsum() // _BYTES_AT_ONCE
    starts = np.flatnonzero(np.diff(total)) + 1 + shard_slice.first
    return pairwise([shard_slice.first, *starts.tolist(), shard_slice.last])


def _nbytes(tables: Tables, rows: slice) -> AnyArray:
    """Bytes of each sample in memory."""
    if tables.sizes is not None:
        values = tables.sizes[rows].sum(1)
    else:
        fixed = sum(field.row_bytes for field in tables.fields if not field.variable)
        steps = tables.lengths[rows].astype(np.int64)
        values = (steps * [field.row_bytes for field in tables.variable]).sum(1) + fixed
    return np.asarray(values + _SAMPLE_BYTES)
