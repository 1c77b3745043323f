"""Pieces of long samples: read by a wrapper or by `ShardDataset` itself, and joined they are the samples."""

import pickle
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import LAYOUTS, tokens, write
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from collate import VarlenCollator
from collate.errors import LengthError
from samplers import PackingBatchSampler, ShardDataset, SplitDataset
from samplers.shards.split_dataset import check_range

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=40)
Pair = namedtuple("Pair", ["x", "name"])


def keep(samples: list[Any]) -> list[Any]:
    """Collate nothing."""
    return samples


def joined(sampler: PackingBatchSampler, read: dict[int, Any], samples: int) -> list[list[int]]:
    """The samples from all that an epoch has read, by index: pieces put together."""
    values = [list(map(int, read[index])) if index in read else None for index in range(samples)]
    if sampler.pieces is not None:
        for piece, sample in enumerate(sampler.pieces.samples.tolist()):
            values[sample] = (values[sample] or []) + list(map(int, read[samples + piece]))
    assert None not in values
    return values  # type: ignore[return-value]


@given(LENGTHS, st.integers(1, 15), st.sampled_from(["list", "array", "tensor"]))
def test_pieces_joined_are_the_samples(lengths: list[int], capacity: int, kind: str) -> None:
    whole = [list(range(100 * sample, 100 * sample + length)) for sample, length in enumerate(lengths)]
    make = {"list": list, "array": np.array, "tensor": torch.tensor}[kind]
    sampler = PackingBatchSampler(lengths, capacity=capacity, overlong="split")
    dataset = SplitDataset([make(sample) for sample in whole], sampler.pieces)
    read = {
        index: sample for batch in sampler for index, sample in zip(batch, dataset.__getitems__(batch), strict=True)
    }
    assert joined(sampler, read, len(lengths)) == whole
    assert len(dataset) == max(len(lengths), 1 + max(read))
    assert all(len(sample) <= capacity for sample in read.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_read_pieces_themselves_through_a_loader(tmp_path: Path, layout: str, workers: int) -> None:
    lengths = np.random.default_rng(0).integers(0, 60, 40).tolist()
    write(tmp_path, tokens(lengths), layout=layout, max_samples=15)
    plain = ShardDataset(tmp_path)
    sampler = PackingBatchSampler(plain.index, capacity=25, rows=2, overlong="split", seed=3)
    dataset = plain.with_pieces(sampler.pieces)
    assert len(plain) == 40
    loader: Any = DataLoader(dataset, batch_sampler=sampler, collate_fn=keep, num_workers=workers)
    planned = list(sampler.plan(0).batches)
    read: dict[int, Any] = {}
    for batch, indices in zip(loader, planned, strict=True):
        for sample, index in zip(batch, indices, strict=True):
            # The number and the key are those of the whole sample.
            source = index if index < 40 else int(sampler.pieces.samples[index - 40])  # type: ignore[union-attr]
            assert (sample["label"], sample["__key__"]) == (source, f"k{source}")
            read[index] = sample["tokens"]
    assert joined(sampler, read, 40) == [sample["tokens"].tolist() for sample in tokens(lengths)]  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(dataset))
    assert again[len(again) - 1]["tokens"].tolist() == read[len(again) - 1].tolist()
    assert again[-1]["tokens"].tolist() == read[len(again) - 1].tolist()


def test_pieces_fill_rows_and_keep_the_other_fields_whole() -> None:
    lengths = [3, 30, 12, 7]
    samples = [
        {"x": torch.arange(n), "y": -torch.arange(n), "style": torch.ones(2), "id": i} for i, n in enumerate(lengths)
    ]
    sampler = PackingBatchSampler(lengths, capacity=13, overlong="split")
    dataset = SplitDataset(samples, sampler.pieces, fields=["x", "y"])
    collate = VarlenCollator(arrange="given", capacity=13, stack=["style"])
    tallies = torch.zeros(30, dtype=torch.int64)
    for batch in sampler:
        packed = collate(dataset.__getitems__(batch))
        assert packed["x"].values.shape == (1, 13)
        assert torch.equal(packed["x"].values, -packed["y"].values)
        assert packed["style"].shape == (len(batch), 2)
        for sequence in packed["x"].sequences():
            tallies[sequence] += 1
    assert tallies.tolist() == [sum(step < n for n in lengths) for step in range(30)]


def test_fields_of_tuples_are_named_by_their_index() -> None:
    sampler = PackingBatchSampler([5], capacity=3, overlong="split")
    assert SplitDataset([([1, 2, 3, 4, 5], "a")], sampler.pieces, fields=[0])[2] == ([4, 5], "a")
    assert SplitDataset([Pair([1, 2, 3, 4, 5], "a")], sampler.pieces, fields=[0])[1] == Pair([1, 2, 3], "a")


def test_a_dataset_without_split_samples_is_left_as_it_is() -> None:
    sampler = PackingBatchSampler([2, 3], capacity=3, overlong="split")
    assert sampler.pieces is None
    dataset = SplitDataset([{"x": [1, 2]}, {"x": [3, 4, 5]}], sampler.pieces)
    assert (len(dataset), dataset[1], dataset[-1]) == (2, {"x": [3, 4, 5]}, {"x": [3, 4, 5]})


class Skipping(list[Any]):
    """A dataset that leaves out what it cannot read."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices][1:]


def test_what_cannot_be_cut_is_refused_with_the_way_out() -> None:
    pieces = PackingBatchSampler([5, 2], capacity=3, overlong="split").pieces
    with pytest.raises(LengthError, match="sample 0: 4 steps, planned with 5: give the sampler"):
        SplitDataset([[1, 2, 3, 4], [1, 2]], pieces)[2]
    with pytest.raises(LengthError, match="sample 0, field 'x': 1 steps, planned with 5"):
        SplitDataset([{"x": [1]}, {"x": [2]}], pieces, fields=["x"])[2]
    with pytest.raises(TypeError, match="fields must name the sequences that are cut, sample 0 is a dict"):
        SplitDataset([{"x": [1]}, {"x": [2]}], pieces)[2]
    with pytest.raises(TypeError, match="fields must be a list of names, got the string 'x'"):
        SplitDataset([[1], [2]], pieces, fields="x")
    with pytest.raises(ValueError, match="of the dataset's 0 samples, got one of sample 0"):
        SplitDataset([], pieces)
    with pytest.raises(IndexError, match="index 4 is not among the 4 samples"):
        SplitDataset([[1, 2, 3, 4, 5], [1, 2]], pieces)[4]
    with pytest.raises(RuntimeError, match="the dataset gave 1 of 2 samples"):
        SplitDataset(Skipping([[1, 2, 3, 4, 5], [1, 2]]), pieces).__getitems__([2, 1])


def test_a_damaged_sample_fails_with_its_pieces_and_is_skipped_with_them(tmp_path: Path) -> None:
    lengths = [4, 30, 5, 6]
    write(tmp_path, tokens(lengths), layout="plain", max_samples=10)
    plain = ShardDataset(tmp_path)
    sampler = PackingBatchSampler(plain.index, capacity=12, overlong="split")
    [tar] = tmp_path.glob("*.tar")
    data = bytearray(tar.read_bytes())
    at = data.index(np.arange(1020, 1030).astype(np.int64).tobytes())
    data[at] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        list(plain.with_pieces(sampler.pieces).__getitems__([0, 4]))
    skipping = ShardDataset(tmp_path, handler=lambda error: True).with_pieces(sampler.pieces)
    assert [sample["__key__"] for sample in skipping.__getitems__([4, 0, 5, 3])] == ["k0", "k3"]
    assert sum(skipping.skipped[str(tar)].values()) == 2


@pytest.mark.parametrize("make", [tuple, list])
def test_a_field_counted_from_the_end_is_cut(make: type) -> None:
    # Red before: each piece was the whole sample.
    sampler = PackingBatchSampler([3, 30], capacity=13, overlong="split")
    dataset = SplitDataset([make([length, np.arange(length)]) for length in [3, 30]], sampler.pieces, fields=[-1])
    assert [dataset[index][1].tolist() for index in (2, 4)] == [list(range(13)), [26, 27, 28, 29]]
    assert type(dataset[4]) is make
    assert dataset[4][0] == 30


def test_pieces_need_a_field_that_is_cut() -> None:
    # Red before: each piece was the whole sample.
    sampler = PackingBatchSampler([3, 30], capacity=13, overlong="split")
    with pytest.raises(ValueError, match="fields must name the sequences"):
        SplitDataset([{"x": np.arange(length)} for length in [3, 30]], sampler.pieces, fields=[])


@pytest.mark.parametrize("dtype", [*"bhilqBHILQ", ">i2", ">u8"])
def test_indices_of_every_integer_dtype_are_taken(dtype: str) -> None:
    # Red where NumPy could not hold the number of samples in the dtype.
    total, kind = 5_000_000_000, np.dtype(dtype)
    for rows in (np.array([3, 0, 99], kind), [kind.type(3), kind.type(0), kind.type(99)]):
        assert check_range(rows, total).tolist() == [3, 0, 99]
    if kind.kind == "i":
        assert check_range(np.array([-1, 4], kind), total).tolist() == [total - 1, 4]
        assert check_range(np.array([-100], kind), 100).tolist() == [0]
        with pytest.raises(IndexError, match="index -101 is not among the 100 samples"):
            check_range(np.array([5, -101], kind), 100)
    with pytest.raises(IndexError, match="index 100 is not among the 100 samples"):
        check_range(np.array([7, 100], kind), 100)
    assert check_range(np.array([99], kind), 100).dtype == np.int64


def test_an_index_of_64_bits_is_not_a_negative_one() -> None:
    for index in (2**64 - 1, 2**63):
        with pytest.raises(IndexError, match=f"index {index} is not among the 100 samples"):
            check_range(np.array([1, index], np.uint64), 100)
    assert check_range([], 100).tolist() == []
