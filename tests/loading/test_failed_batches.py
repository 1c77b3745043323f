"""Batches of a stream that fail, which a resumed stream reads again, and shards that threads fetch and free."""

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from collate import PadCollator
from samplers import ShardDataset, ShardStream, ShardWriter
from samplers.progress.window_reader import FetchedShards
from samplers.shards.indexing.index import tables_of


@pytest.mark.parametrize("layout", ["plain", "blocks"])
def test_a_batch_that_failed_is_not_counted_as_taken(tmp_path: Path, layout: Any) -> None:
    # Since local samples are read by the collator, the state counted the batch that could not be read: it was lost.
    with ShardWriter(tmp_path, layout=layout, version=1) as writer:
        for number in range(12):
            writer.write({"__key__": f"k{number}", "x": np.full(40, 7)})
    [shard] = tmp_path.glob("*.tar")
    whole = shard.read_bytes()
    damaged = len(whole) * 2 // 3
    shard.write_bytes(whole[:damaged] + b"\x11" * 8 + whole[damaged + 8 :])

    def stream() -> ShardStream:
        return ShardStream(tmp_path, batch_size=2, collate_fn=PadCollator(), shuffle=False)

    batches = iter(stream())
    used: list[list[str]] = []
    with pytest.raises(ValueError, match="checksum"):
        # What came before the error stays in the list.
        used.extend(batch["__key__"] for batch in batches)
    assert len(used) > 2
    state = batches.state_dict()
    shard.write_bytes(whole)
    again = iter(stream())
    again.load_state_dict(state)
    assert used + [batch["__key__"] for batch in again] == [batch["__key__"] for batch in stream()]


def test_an_iterator_continues_after_a_batch_that_failed(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for number in range(8):
            writer.write({"__key__": f"k{number}", "x": np.full(4, number)})
    calls = iter(range(9))

    def collate(samples: Any) -> Any:
        if next(calls) == 1:
            raise RuntimeError("mine")
        return [sample["__key__"] for sample in samples]

    stream = ShardStream(tmp_path, batch_size=2, collate_fn=collate, shuffle=False)
    batches = iter(stream)
    next(batches)
    with pytest.raises(RuntimeError, match="mine"):
        next(batches)
    assert batches.state_dict()["taken"] == 1
    third = next(batches)
    assert batches.state_dict()["taken"] == 3
    assert third != next(batches)


def test_a_fetched_shard_that_another_thread_frees_is_still_given(tmp_path: Path) -> None:
    # It was None, or another thread's shard.
    with ShardWriter(tmp_path) as writer:
        writer.write({"__key__": "a", "x": np.zeros(3)})
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe(f"/freed/{path.name}", path.read_bytes())

    class Freed(FetchedShards):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, None if name == "_fetched" else value)

    url = "memory://freed/shard-000000.tar"
    assert Freed(tables_of(ShardDataset([url]).index)).open(0).path == url
