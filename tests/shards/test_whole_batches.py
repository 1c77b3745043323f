"""Batches that are read straight into their memory: equal to those of samples, and refused with the same errors."""

import copy
import operator
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import LAYOUTS, corpora, tokens, write
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from collate import LengthTrackedBatch, PadCollator, VarlenBatch, VarlenCollator
from collate.errors import LengthError
from samplers import LengthBucketBatchSampler, PackingBatchSampler, ShardDataset, ShardStream
from samplers.shards.opening import open_shards
from samplers.shards.sample_reader import SampleReader
from samplers.shards.storage import reading
from samplers.shards.storage.ranges import Ranges, read_ranges
from samplers.shards.unread import UnreadSamples

PAD = PadCollator(padding_value=0)
WAYS = pytest.mark.parametrize(
    "way", [{}, pytest.param({"memory_map": True}, marks=pytest.mark.unix), {"in_memory": True}], ids=str
)


def assert_same_batch(batch: Any, expected: Any) -> None:
    """The same type, and the same bits in every part."""
    assert type(batch) is type(expected)
    if isinstance(batch, dict):
        assert list(batch) == list(expected)
        for name, part in batch.items():
            assert_same_batch(part, expected[name])
    elif isinstance(batch, (LengthTrackedBatch, VarlenBatch)):
        values = "padded" if isinstance(batch, LengthTrackedBatch) else "values"
        for name in (values, "lengths", "mask", "permutation"):
            assert_same_batch(getattr(batch, name), getattr(expected, name))
        assert batch.padding_value == expected.padding_value
    elif isinstance(batch, torch.Tensor):
        assert (batch.dtype, batch.shape, batch.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert batch.contiguous().view(torch.uint8).tolist() == expected.contiguous().view(torch.uint8).tolist()
    else:
        assert batch == expected


def one_by_one(data: ShardDataset, indices: list[int]) -> list[Any]:
    """The samples of a batch, each read by itself."""
    return [data[index] for index in indices]


@pytest.mark.parametrize("layout", LAYOUTS)
@WAYS
@given(corpus=corpora(), data=st.data())
def test_a_batch_is_bit_for_bit_that_of_its_samples(
    tmp_path_factory: pytest.TempPathFactory, layout: str, way: dict[str, bool], corpus: Any, data: st.DataObject
) -> None:
    samples, stack = corpus
    folder = write(tmp_path_factory.mktemp("c"), samples, layout=layout, block_size=2, max_samples=3, stack=stack)
    dataset = ShardDataset(folder, **way)
    indices = data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=9))
    collate: Any = data.draw(
        st.sampled_from(
            [
                PAD,
                PadCollator(padding_value=1, sort_by=False, widths=3, stack=stack),
                PadCollator(padding_value=1, max_length=2, stack=stack),
                VarlenCollator(1, stack=stack),
                VarlenCollator(0, capacity=2048, align=4, stack=stack),
            ]
        )
    )
    try:
        expected = collate(one_by_one(dataset, indices))
    except (ValueError, TypeError, LengthError) as error:
        with pytest.raises(type(error)):
            collate(dataset.__getitems__(indices))
    else:
        assert_same_batch(collate(dataset.__getitems__(indices)), expected)


@WAYS
@pytest.mark.parametrize("width", [3, 5000])
@pytest.mark.parametrize(
    "collate", [PAD, PadCollator(padding_value=-7), VarlenCollator(-7), VarlenCollator(3, capacity=40_000)]
)
def test_large_and_small_batches_have_their_padding(
    tmp_path: Path, way: dict[str, bool], width: int, collate: Callable[[Any], Any]
) -> None:
    lengths = np.random.default_rng(0).integers(0, width, 60).tolist()
    data = ShardDataset(write(tmp_path, tokens(lengths), max_samples=17), **way)
    for indices in ([5], [59, 3, 3, 20], list(range(40))):
        assert_same_batch(collate(data.__getitems__(indices)), collate(one_by_one(data, indices)))


def test_the_memory_of_a_sample_is_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ShardDataset(write(tmp_path, tokens([3, 4, 5])))
    expected = PAD(one_by_one(data, [2, 0]))
    monkeypatch.setattr(ShardDataset, "_read", None)
    assert_same_batch(PAD(data.__getitems__([2, 0])), expected)
    with pytest.raises(TypeError):
        data.__getitems__([2, 0])[0]


def test_pieces_and_cut_samples_are_read_whole_first(tmp_path: Path) -> None:
    data = ShardDataset(write(tmp_path, tokens([3, 9, 2, 7])))
    sampler = PackingBatchSampler(data.index, capacity=4, overlong="split")
    pieces = data.with_pieces(sampler.pieces)
    collate = VarlenCollator(capacity=4, arrange="given")
    for rows in sampler:
        assert_same_batch(collate(pieces.__getitems__(rows)), collate([pieces[row] for row in rows]))
    cut = PadCollator(max_length=4)
    assert_same_batch(cut(data.__getitems__([0, 1])), cut(one_by_one(data, [0, 1])))


# What is done with a list by name, with its arguments.
CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("__len__", ()),
    ("__getitem__", (1,)),
    ("__getitem__", (slice(0, 2),)),
    ("__contains__", (7,)),
    ("__add__", ([1],)),
    ("__mul__", (2,)),
    ("__rmul__", (2,)),
    ("__eq__", ([5, 6, 7],)),
    ("__ne__", ([5, 6, 7],)),
    ("__lt__", ([9],)),
    ("__iadd__", ([1],)),
    ("__imul__", (2,)),
    ("__setitem__", (0, 9)),
    ("__setitem__", (slice(1, 2), [4, 4])),
    ("__delitem__", (0,)),
    ("append", (1,)),
    ("extend", ([1, 2],)),
    ("insert", (1, 9)),
    ("pop", ()),
    ("remove", (6,)),
    ("clear", ()),
    ("index", (6,)),
    ("count", (6,)),
    ("reverse", ()),
    ("sort", ()),
    ("copy", ()),
    ("__repr__", ()),
]
# What takes a list and gives something else, in C for the most part.
USES: list[Callable[[Any], Any]] = [
    list,
    tuple,
    sorted,
    sum,
    max,
    bool,
    set,
    str,
    lambda x: [*x],
    lambda x: operator.add([1], x),
    lambda x: [1, *x],
    lambda x: list(reversed(x)),
    lambda x: list(enumerate(x)),
    lambda x: list(zip(x, x, strict=True)),
    lambda x: list(map(str, x)),
    lambda x: (lambda *a: a)(*x),
    lambda x: operator.eq([5, 6, 7], x),
    lambda x: operator.ne([5, 6], x),
    lambda x: operator.gt([9], x),
    lambda x: np.asarray(x).tolist(),
    lambda x: torch.tensor(list(x)).tolist(),
    lambda x: ",".join(map(str, x)),
    lambda x: copy.copy(x),
    lambda x: copy.deepcopy(x),
    lambda x: pickle.loads(pickle.dumps(x)),
    lambda x: (lambda a, b, c: (a, b, c))(*x),
    lambda x: (lambda y: y.extend(x) or y)([0]),
    lambda x: (lambda y: y.__setitem__(slice(0, 1), x) or y)([0]),
    lambda x: isinstance(x, list),
]


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_every_method_of_a_list_reads_the_samples_first(name: str, arguments: tuple[Any, ...]) -> None:
    unread, plain = UnreadSamples.of_rows(np.array([5, 6, 7]), np.ndarray.tolist), [5, 6, 7]
    result, expected = getattr(unread, name)(*arguments), getattr(plain, name)(*arguments)
    assert list(unread) == plain
    assert list(result) == expected if isinstance(expected, list) else result == expected


def test_no_method_of_a_list_is_forgotten() -> None:
    missing = {name for name, method in vars(list).items() if callable(method)} - vars(UnreadSamples).keys()
    assert missing <= {"__new__", "__getattribute__", "__hash__", "__class_getitem__"}


@pytest.mark.parametrize("use", USES)
def test_what_takes_a_list_takes_the_samples(use: Callable[[Any], Any]) -> None:
    unread = UnreadSamples.of_rows(np.array([5, 6, 7]), np.ndarray.tolist)
    assert use(unread) == use([5, 6, 7])


def test_samples_are_read_once_and_again_after_an_error() -> None:
    reads: list[int] = []

    def read(rows: Any) -> list[Any]:
        reads.append(len(rows))
        if len(reads) == 1:
            raise ValueError("damaged")
        return rows.tolist()

    unread = UnreadSamples.of_rows(np.array([5, 6]), read)
    assert len(unread) == 2
    assert reads == []
    with pytest.raises(ValueError, match="damaged"):
        list(unread)
    assert (list(unread), unread[1], len(unread), reads) == ([5, 6], 6, 2, [2, 2])


def test_its_class_makes_a_list_of_items_as_list_does() -> None:
    # Lightning and accelerate move a batch to a device as `type(batch)(items)`. It was a TypeError.
    kind = type(UnreadSamples.of_rows(np.array([5, 6]), np.ndarray.tolist))
    made = kind(number + 1 for number in [5, 6])
    assert (made, len(made), made.unread_fields(), kind(), len(kind([]))) == ([6, 7], 2, None, [], 0)
    assert pickle.loads(pickle.dumps(made)) == [6, 7]


@pytest.mark.parametrize("workers", [0, 2])
def test_other_collate_functions_get_an_ordinary_list_of_samples(tmp_path: Path, workers: int) -> None:
    data = ShardDataset(write(tmp_path, tokens([3, 1, 2, 5])))
    sampler = LengthBucketBatchSampler(data.index, batch_size=2, shuffle=False)
    for batch, indices in zip(
        DataLoader(data, batch_sampler=sampler, collate_fn=_identity, num_workers=workers), sampler, strict=True
    ):
        assert isinstance(batch, list)
        assert [sample["__key__"] for sample in batch] == [f"k{index}" for index in indices]


def _identity(samples: Any) -> Any:
    return samples


@pytest.mark.parametrize("memory_map", [False, pytest.param(True, marks=pytest.mark.unix)])
@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("left", [0, 1024, 7000, -4096, -700])
def test_a_shard_that_is_cut_under_its_reader_is_an_error(
    tmp_path: Path, memory_map: bool, checksums: bool, left: int
) -> None:
    data = ShardDataset(write(tmp_path, tokens([300] * 8)), checksums=checksums, memory_map=memory_map)
    PAD(data.__getitems__(range(8)))
    [shard] = tmp_path.glob("*.tar")
    size = shard.stat().st_size
    # The last sample, whose bytes are gone wherever the shard ends now. -700 cuts it in the middle of a page.
    last = int(data._tables.offsets_of(np.array([7]), 0)[0]) + 8 * 300
    os.truncate(shard, left if left >= 0 else last + left)
    assert shard.stat().st_size < size
    with pytest.raises(ValueError, match="truncated") as raised:
        PAD(data.__getitems__(range(8)))
    assert shard.name in str(raised.value)


def test_a_shard_may_be_cut_and_restored_while_threads_read(tmp_path: Path) -> None:
    """Each batch is right or an error, and the process lives."""
    folder = write(tmp_path / "corpus", tokens([2000] * 40))
    data = ShardDataset(folder)
    [shard] = folder.glob("*.tar")
    whole, expected = shard.read_bytes(), PAD(one_by_one(data, list(range(40))))
    stop, wrong, outcomes = threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            try:
                batch = PAD(data.__getitems__(range(40)))
            except ValueError:
                outcomes.append("refused")
            else:
                outcomes.append("read")
                if not torch.equal(batch["tokens"].padded, expected["tokens"].padded):
                    wrong.append(batch)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(60):
            os.truncate(shard, (turn * 7919) % len(whole))
            with shard.open("r+b") as file:
                file.write(whole)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert outcomes


@WAYS
def test_damage_is_named_when_the_batch_is_collated(tmp_path: Path, way: dict[str, bool]) -> None:
    data = ShardDataset(write(tmp_path, tokens([30, 40, 50])), **way)
    offset = int(data._tables.offsets_of(np.array([1]), 0)[0])
    [shard] = tmp_path.glob("*.tar")
    with shard.open("r+b") as file:
        file.seek(offset + 8)
        file.write(b"\xff")
    batch = data.__getitems__([2, 1, 0])
    with pytest.raises(ValueError, match=r"shard-000000\.tar: sample 'k1', field 'tokens'.*checksum"):
        PAD(batch)
    PAD(data.__getitems__([2, 0]))


def test_a_missing_shard_is_named_when_the_batch_is_collated(tmp_path: Path) -> None:
    data = ShardDataset(write(tmp_path, tokens([3, 4, 5, 6]), max_samples=2))
    (tmp_path / "shard-000001.tar").unlink()
    PAD(data.__getitems__([0, 1]))
    with pytest.raises(FileNotFoundError, match=r"no shard .*shard-000001\.tar, which the index lists"):
        PAD(data.__getitems__([0, 2]))


@WAYS
def test_a_batch_may_come_from_more_shards_than_may_be_open(
    tmp_path: Path, way: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_shards, "HANDLES", 3)
    data = ShardDataset(write(tmp_path, tokens(list(range(1, 41))), max_samples=2), **way)
    asked = np.random.default_rng(0).permutation(40).tolist()
    assert_same_batch(PAD(data.__getitems__(asked)), PAD(one_by_one(data, asked)))


@pytest.mark.unix
def test_without_mappings_samples_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no mappings here")

    monkeypatch.setattr(reading, "mmap", refuse)
    data = ShardDataset(write(tmp_path, tokens([3, 1, 2])), memory_map=True)
    assert_same_batch(PAD(data.__getitems__([0, 2])), PAD(one_by_one(data, [0, 2])))


def test_a_stream_reads_no_more_than_the_batch_that_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at its start nor after a resume, although a window has all samples."""
    write(tmp_path, tokens([5] * 400), max_samples=100)
    rows: list[int] = []
    read_into = SampleReader.read_into
    monkeypatch.setattr(
        SampleReader, "read_into", lambda self, *given: rows.append(len(given[0])) or read_into(self, *given)
    )
    stream = ShardStream(tmp_path, collate_fn=PAD, batch_size=8)
    for position in (None, stream.position(25)):
        if position is not None:
            stream.seek(position)
        rows.clear()
        batches = iter(stream)
        assert len(next(batches)["tokens"]) == 8
        assert rows == [8]


@pytest.mark.parametrize("memory_map", [False, pytest.param(True, marks=pytest.mark.unix)])
def test_a_stream_gives_the_batches_of_its_plan(tmp_path: Path, memory_map: bool) -> None:
    lengths = np.random.default_rng(0).integers(0, 90, 300).tolist()
    data = ShardDataset(write(tmp_path, tokens(lengths), max_samples=50))
    stream = ShardStream(tmp_path, collate_fn=PAD, max_tokens=400, window=120, memory_map=memory_map)
    for epoch in range(2):
        for batch, indices in zip(stream, stream.plan(epoch).batches, strict=True):
            assert_same_batch(batch, PAD(one_by_one(data, list(indices))))


@pytest.mark.unix
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("memory_map", [False, True])
def test_workers_of_every_start_method_read_the_same_batches(tmp_path: Path, method: str, memory_map: bool) -> None:
    data = ShardDataset(write(tmp_path, tokens([5, 3, 9, 1, 4, 4]), max_samples=4), memory_map=memory_map)
    sampler = LengthBucketBatchSampler(data.index, batch_size=2)
    sampler.set_epoch(0)
    here = list(DataLoader(data, batch_sampler=sampler, collate_fn=PAD))
    sampler.set_epoch(0)
    there = list(DataLoader(data, batch_sampler=sampler, collate_fn=PAD, num_workers=2, multiprocessing_context=method))
    for batch, expected in zip(there, here, strict=True):
        assert_same_batch(batch, expected)


@WAYS
def test_an_index_that_points_outside_its_shard_is_refused(tmp_path: Path, way: dict[str, bool]) -> None:
    data = ShardDataset(write(tmp_path, tokens([3, 4])), **way, checksums=False)
    PAD(data.__getitems__([0, 1]))
    # As if the file of the index had been written to since.
    reader = data._reader
    for wrong in (1 << 40, -(1 << 40)):
        reader._offsets, reader._all_are_checked = np.array(data._tables.offsets) + wrong, True
        with pytest.raises((ValueError, OSError)):
            PAD(data.__getitems__([0, 1]))


def test_ranges_outside_their_memory_are_refused() -> None:
    """No wrong number may write to other memory of the process."""
    for start, size in ((-1, 2), (9, 2), (0, 11), (3, -1)):
        ranges = Ranges(np.zeros(10, np.uint8), np.array([0, start]), np.array([0, 0]), np.array([1, size]))
        with pytest.raises(ValueError, match="ranges must lie in the memory of 10 bytes"):
            read_ranges([], [ranges])
