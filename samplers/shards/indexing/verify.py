"""An index held against its shards, one after the other, that goes on after a bad one."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.measuring import Measure
from samplers.shards.indexing.tables import Tables


def find_errors(
    index: LengthIndex, *, payload: bool, measure: Measure | None = None, workers: int = 0
) -> Iterator[str | None]:
    """Hold every shard against the index.

    Args:
        index: of the shards.
        payload: read every sample too, and hold it against its crc32.
        measure: how lengths are measured that no header tells; picklable, where there are workers.
        workers: processes; 0 stays in this one.

    Yields:
        For each shard, in order: None, or what is wrong with it first.

    Raises:
        ValueError: There are no checksums to hold a payload against.
    """
    if payload and index.tables.crcs is None:
        raise ValueError("the index holds no checksums of payloads: build it with checksums=True")
    check = partial(_find_error, payload=payload, measure=measure or Measure(None, {}))
    parts = (cut_shard(index, number) for number in range(len(index.shards)))
    if not workers:
        yield from map(check, parts)
        return
    with ProcessPoolExecutor(workers) as pool:
        # `map` would cut the tables of all shards before the first is checked.
        for numbers in _batches(len(index.shards), 16 * workers):
            yield from pool.map(check, [cut_shard(index, number) for number in numbers])


def cut_shard(index: LengthIndex, number: int) -> Tables:
    """What the index holds of one shard, as an index of that shard alone would."""
    tables = index.tables
    first, last = index.starts[number : number + 2].tolist()
    arrays: dict[str, Any] = {name: array[first:last] for name, array in tables.arrays.items() if name != "blocks"}
    if tables.blocks is not None:
        start, end = np.searchsorted(tables.blocks[:, 0], [first, last])
        arrays["blocks"] = tables.blocks[start:end].copy()
        arrays["blocks"][:, 0] -= first
    return Tables(tables.layout, tables.fields, (tables.shards[number],), **arrays, length_id=tables.length_id)


def _find_error(tables: Tables, *, payload: bool, measure: Measure) -> str | None:
    try:
        LengthIndex(tables).verify(payload=payload, length=measure.length, decode=measure.decode)
    except FileNotFoundError:
        return f"{tables.shards[0].path}: the index lists this shard, but there is no such file"
    except (ValueError, OSError, RuntimeError) as error:
        # A decoder does not know what it was given: a note does.
        return ": ".join([*getattr(error, "__notes__", ()), str(error)])
    return None


def _batches(total: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, total)) for first in range(0, total, size))
