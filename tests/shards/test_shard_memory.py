"""Shards in memory: read whole at their first use, compared once, and shared by forked processes."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import tokens, write
from torch.utils.data import DataLoader

from collate import PadCollator
from samplers import LengthBucketBatchSampler, ShardDataset
from samplers.shards.storage import memory

PAD = PadCollator(padding_value=0)
LENGTHS = [30, 40, 50, 20]


def values(batch: Any) -> torch.Tensor:
    padded: torch.Tensor = batch["tokens"].padded
    return padded


def test_a_shard_is_read_when_one_of_its_samples_is_first_needed(tmp_path: Path) -> None:
    """Then it is not read again, whatever becomes of its file; a pickled copy reads the files."""
    folder = write(tmp_path, tokens(LENGTHS), max_samples=2)
    data, expected = ShardDataset(folder, in_memory=True), PAD(list(ShardDataset(folder)))
    assert torch.equal(values(PAD(data.__getitems__(range(2)))), values(PAD([data[0], data[1]])))
    first, second = sorted(tmp_path.glob("*.tar"))
    first.unlink()
    for _ in range(2):
        assert torch.equal(values(PAD(data.__getitems__(range(4)))), values(expected))
        os.truncate(second, 3000)
    copied = pickle.loads(pickle.dumps(data))
    with pytest.raises(ValueError, match=r"shard-000001\.tar: 3000 bytes, the index says"):
        PAD(copied.__getitems__([2, 3]))
    with pytest.raises(FileNotFoundError, match=r"no shard .*shard-000000\.tar"):
        PAD(copied.__getitems__([0, 1]))


def test_a_damaged_sample_in_memory_is_an_error_each_time(tmp_path: Path) -> None:
    data = ShardDataset(write(tmp_path, tokens(LENGTHS)), in_memory=True)
    [shard] = tmp_path.glob("*.tar")
    with shard.open("r+b") as file:
        file.seek(int(data._tables.offsets_of(np.array([1]), 0)[0]) + 8)
        file.write(b"\xff")
    for _ in range(2):
        PAD(data.__getitems__([0, 2]))
        with pytest.raises(ValueError, match=r"shard-000000\.tar: sample 'k1', field 'tokens'.*checksum"):
            PAD(data.__getitems__([2, 1]))


def test_a_dataset_with_pieces_has_the_same_shards_in_memory(tmp_path: Path) -> None:
    """Red when it had memory of its own, and read them again."""
    data = ShardDataset(write(tmp_path, tokens(LENGTHS)), in_memory=True)
    expected = values(PAD(data.__getitems__(range(4))))
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    assert torch.equal(values(PAD(data.with_pieces(None).__getitems__(range(4)))), expected)


@pytest.mark.unix
def test_forked_workers_share_the_shards_in_memory(tmp_path: Path) -> None:
    """What a worker has read is there for this process, and the other way round."""
    data = ShardDataset(write(tmp_path, tokens(LENGTHS), max_samples=2), in_memory=True)
    sampler = LengthBucketBatchSampler(data.index, batch_size=2, shuffle=False)
    expected = list(DataLoader(ShardDataset(tmp_path), batch_sampler=sampler, collate_fn=PAD))
    for round_ in range(2):
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=PAD, num_workers=2, multiprocessing_context="fork")
        for batch, same in zip(loader, expected, strict=True):
            assert torch.equal(values(batch), values(same))
        for shard in tmp_path.glob("*.tar") if round_ == 0 else ():
            shard.unlink()
    assert torch.equal(values(PAD(data.__getitems__(range(4)))), values(PAD([*expected_samples(expected)])))


def expected_samples(batches: list[Any]) -> list[dict[str, Any]]:
    """The samples of batches, in the order of their keys."""
    found = {
        key: row for batch in batches for key, row in zip(batch["__key__"], batch["tokens"].sequences(), strict=True)
    }
    return [{"__key__": key, "tokens": found[key]} for key in sorted(found)]


def test_shards_that_cannot_be_in_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tokens(LENGTHS))
    with pytest.raises(ValueError, match="in_memory must be False with memory_map=True"):
        ShardDataset(tmp_path, in_memory=True, memory_map=True)
    # Sizes of a forged index. Red as an OverflowError, and as memory of no byte for those whose sum wraps around.
    for sizes in ([1 << 62, 1 << 62], [1 << 62] * 4, [(1 << 63) - 1], [1 << 64]):
        with pytest.raises(OSError, match=f"in_memory=True needs {sum(sizes)} bytes for the shards"):
            memory.ShardMemory(sizes)
    index = ShardDataset(tmp_path).index
    with pytest.raises(ValueError, match="in_memory must be False .* for remote shards: give cache=FOLDER"):
        ShardDataset(["http://nowhere.invalid/shard-000000.tar"], index, in_memory=True)

    def refuse(*_: object) -> None:
        raise OSError("no more memory")

    monkeypatch.setattr(memory, "mmap", refuse)
    with pytest.raises(OSError, match=r"in_memory=True needs \d+ bytes for the shards.*no more memory"):
        ShardDataset(tmp_path, in_memory=True)
