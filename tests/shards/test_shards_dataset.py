"""ShardDataset: any indices in any order, through loaders of every kind, and every disagreement named."""

import io
import os
import pickle
import tarfile
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from corpora import LAYOUTS, assert_same, corpora, tokens, write
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from collate.errors import LengthError
from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.opening import open_shards
from samplers.shards.storage.reading import LocalFile


@pytest.mark.parametrize("layout", LAYOUTS)
@given(corpus=corpora(), seed=st.integers(0, 2**32), size=st.integers(0, 20))
def test_samples_come_in_the_order_and_with_the_fields_asked_for(
    tmp_path_factory: pytest.TempPathFactory, layout: str, corpus: Any, seed: int, size: Any
) -> None:
    samples, stack = corpus
    folder = tmp_path_factory.mktemp("corpus")
    write(folder, samples, layout=layout, block_size=2, max_samples=3, stack=stack)
    rng = np.random.default_rng(seed)
    names = [name for name in samples[0] if name != "__key__" and rng.random() < 0.5]
    dataset = ShardDataset(folder, fields=names)
    # Repeats and indices from the end are among them.
    indices = rng.integers(-len(samples), len(samples), size).tolist()
    for index, read in zip(indices, dataset.__getitems__(indices), strict=True):
        assert_same(read, {name: samples[index][name] for name in ["__key__", *names]})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_share_no_memory(tmp_path: Path, layout: str) -> None:
    dataset = ShardDataset(write(tmp_path, tokens([4, 4, 4]), layout=layout))
    first, second, again = dataset.__getitems__([0, 1, 0])
    first["tokens"][:] = -1
    assert (second["tokens"] >= 0).all()
    assert (again["tokens"] >= 0).all()
    assert (dataset[0]["tokens"] >= 0).all()
    assert first["tokens"].flags.owndata


@pytest.mark.unix
def test_files_are_read_in_their_order_whatever_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tokens(list(range(1, 40))), max_samples=10, block_size=4)
    dataset = ShardDataset(tmp_path, fields=["tokens"])
    asked = np.random.default_rng(0).permutation(39).tolist()
    list(dataset.__getitems__(asked))
    seen = []
    fill = LocalFile.fill
    monkeypatch.setattr(
        LocalFile, "fill", lambda file, arrays, at: seen.append((file.path, at)) or fill(file, arrays, at)
    )
    list(dataset.__getitems__(asked))
    assert [path for path, _ in seen] == sorted(path for path, _ in seen)
    assert len(seen) == 4
    assert all(offsets == sorted(offsets) for _, offsets in seen)


@pytest.mark.parametrize("step", [1, 3, 7, 40, 200])
def test_neighbours_that_are_read_together_are_told_apart(tmp_path: Path, step: int) -> None:
    lengths = np.random.default_rng(0).integers(0, 20, 3000).tolist()
    dataset = ShardDataset(write(tmp_path, tokens(lengths), block_size=step * 10 + 2000))
    indices = [*range(0, 3000, step), 5, 5, 4]
    for index, sample in zip(indices, dataset.__getitems__(indices), strict=True):
        assert sample["__key__"] == f"k{index}"
        assert sample["tokens"].tolist() == list(range(1000 * index, 1000 * index + lengths[index]))
        assert sample["label"] == index


@pytest.mark.unix
def test_fields_that_are_not_asked_for_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [{"__key__": "a", "x": np.zeros(1000), "y": np.zeros(3)}])
    dataset = ShardDataset(tmp_path, fields=["y"])
    read = []
    fill = LocalFile.fill
    monkeypatch.setattr(
        LocalFile, "fill", lambda file, arrays, at: read.extend(a.nbytes for a in arrays) or fill(file, arrays, at)
    )
    assert list(dataset[0]) == ["__key__", "y"]
    assert read == [24]


def identity(samples: Any) -> Any:
    return samples


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("start", [pytest.param("fork", marks=pytest.mark.unix), "spawn"])
def test_workers_read_what_the_main_process_reads(tmp_path: Path, layout: str, start: str) -> None:
    write(tmp_path, tokens(list(range(30))), layout=layout, max_samples=7, block_size=3)
    dataset = ShardDataset(tmp_path)
    # Open in the parent, so that a forked worker inherits what it must not share.
    expected = dataset.__getitems__(range(30))
    order = np.random.default_rng(0).permutation(30)
    loader = DataLoader(
        dataset,
        batch_sampler=[order[first : first + 4].tolist() for first in range(0, 30, 4)],
        num_workers=2,
        multiprocessing_context=start,
        collate_fn=identity,
    )
    read = [sample for batch in loader for sample in batch]
    for index, sample in zip(order, read, strict=True):
        assert_same(sample, expected[index])


def test_a_pickled_dataset_is_small_and_opens_its_own_files(tmp_path: Path) -> None:
    write(tmp_path, tokens([3] * 500), max_samples=100)
    dataset = ShardDataset(tmp_path)
    dataset[0]
    sent = pickle.dumps(dataset)
    # Places of five shards and 500 samples are found again in the index file.
    assert len(sent) < 2500
    assert_same(pickle.loads(sent)[499], dataset[499])


@pytest.mark.unix
def test_a_forked_process_opens_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ShardDataset(write(tmp_path, tokens([3])))
    opened = []
    monkeypatch.setattr(
        open_shards, "open_file", lambda path, memory_map: opened.append(path) or LocalFile(path, memory_map=memory_map)
    )
    for process in (1, 1, 2, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        assert len(dataset[0]["tokens"]) == 3
    assert len(opened) == 2


def open_files() -> Any:
    """How many this process holds, where the system tells."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_no_more_shards_are_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_shards, "HANDLES", 3)
    write(tmp_path, tokens([2] * 20), max_samples=1)
    before = open_files()
    dataset = ShardDataset(tmp_path)
    for index in range(20):
        assert dataset[index]["tokens"].tolist() == [1000 * index, 1000 * index + 1]
    list(dataset.__getitems__(range(20)))
    assert open_files() <= before + 3
    del dataset
    assert open_files() <= before


def test_threads_share_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_shards, "HANDLES", 2)
    write(tmp_path, tokens(list(range(1, 41))), max_samples=5)
    dataset = ShardDataset(tmp_path)
    wrong = []

    def read(seed: int) -> None:
        indices = np.random.default_rng(seed).integers(0, 40, 200).tolist()
        right = [dataset[index]["tokens"].tolist() == list(range(1000 * index, 1001 * index + 1)) for index in indices]
        wrong.extend(index for index, ok in zip(indices, right, strict=True) if not ok)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_can_be_named_in_every_way(tmp_path: Path, layout: str) -> None:
    write(tmp_path, tokens([1, 2, 3, 4]), layout=layout, max_samples=2)
    paths = [tmp_path / f"shard-00000{shard}.tar" for shard in range(2)]
    patterns = [f"{tmp_path}/shard-{{000000..000001}}.tar", f"{tmp_path}/shard-*.tar", f"file://{tmp_path}/shard-*.tar"]
    for shards in (tmp_path, str(tmp_path), tmp_path / "shard.ltx", paths, map(str, paths), *patterns, patterns[:1]):
        assert [len(sample["tokens"]) for sample in ShardDataset(shards)] == [1, 2, 3, 4]
    index = LengthIndex.concat([LengthIndex.build(paths[0]), LengthIndex.build(paths[1])])
    assert len(ShardDataset(paths, index)) == 4
    assert len(ShardDataset(paths, tmp_path / "shard.ltx")[3]["tokens"]) == 4
    (tmp_path / "shard.ltx").unlink()
    assert [len(sample["tokens"]) for sample in ShardDataset(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_can_be_behind_a_url(tmp_path: Path, layout: str) -> None:
    samples = tokens([3, 0, 5, 1])
    write(tmp_path, samples, layout=layout, max_samples=3)
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe(f"/{layout}/{path.name}", path.read_bytes())
    for shards in (f"memory://{layout}/shard-*.tar", f"memory://{layout}/shard.ltx"):
        dataset = ShardDataset(shards)
        for index, read in zip([3, 1, 0, 2], dataset.__getitems__([3, 1, 0, 2]), strict=True):
            assert_same(read, samples[index])
    built = LengthIndex.build(f"memory://{layout}/shard-{{000000..000001}}.tar", checksums=True)
    assert built.fingerprint == LengthIndex.open(tmp_path / "shard.ltx").fingerprint
    built.verify(checksums=True)
    memory.pipe(f"/{layout}/shard-000000.tar", b"")
    with pytest.raises(ValueError, match="shard-000000.tar: 0 bytes, the index says"):
        ShardDataset(f"memory://{layout}/shard.ltx")[0]
    memory.rm(f"/{layout}", recursive=True)


def wav(samples: Any) -> Any:
    return b"RIFF" + np.asarray(samples, "<i2").tobytes()


def read_wav(data: Any) -> Any:
    return np.frombuffer(data, "<i2", offset=4).astype(np.float32)


def test_other_encodings_stay_bytes_or_are_decoded_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    members = [("a.wav", wav([1, 2])), ("a.cls", b"7"), ("a.txt", "é".encode()), ("b.wav", wav([3])), ("b.cls", b"8"),
               ("b.txt", b""), ("b.json", b'{"x": [1]}')]  # fmt: skip
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    LengthIndex.build(path, ["wav"], lambda field, data: len(data) // 2 - 2, checksums=True).save(f"{path}.ltx")
    raw = ShardDataset(path)
    assert raw[0] == {"__key__": "a", "wav": wav([1, 2]), "cls": 7, "txt": "é"}
    assert raw[1] == {"__key__": "b", "wav": wav([3]), "cls": 8, "txt": "", "json": {"x": [1]}}
    decoded = ShardDataset(path, decode={"wav": read_wav}, fields=["wav"])
    assert decoded.index.lengths.tolist() == [2, 1]
    assert [sample["wav"].tolist() for sample in decoded] == [[1, 2], [3]]
    with pytest.raises(LengthError, match=r"a.tar: sample 'a', field 'wav': the index says 2 steps, the shard 1"):
        ShardDataset(path, decode={"wav": lambda data: read_wav(data)[1:]})[0]


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([3], IndexError, "index 3 is not among the 3 samples"),
        ([0, -4], IndexError, "index -4 is not"),
        ([0.0], TypeError, "indices must be a list of integers, got float64"),
        ([[0]], TypeError, "list of integers"),
        ([True], TypeError, "got bool"),
    ],
)
def test_indices_out_of_range_are_refused(
    tmp_path: Path, indices: list[bool | float | list[int]], error: type[Exception], message: str
) -> None:
    dataset = ShardDataset(write(tmp_path, tokens([1, 2, 3])))
    with pytest.raises(error, match=message):
        dataset.__getitems__(indices)
    assert dataset.__getitems__([]) == []
    assert len(dataset[np.int64(2)]["tokens"]) == len(dataset[torch.tensor(2)]["tokens"]) == 3
    with pytest.raises(TypeError):
        dataset[1.5]


def test_options_that_name_nothing_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", tokens([1, 2]))
    write(tmp_path / "b", tokens([1, 2]), prefix="other")
    with pytest.raises(ValueError, match=r"no field 'text' in the index, there are \['tokens', 'label'\]"):
        ShardDataset(tmp_path / "a", fields=["text"])
    with pytest.raises(ValueError, match="no field 'wav'"):
        ShardDataset(tmp_path / "a", decode={"wav": len})
    with pytest.raises(TypeError, match="fields must be a list"):
        ShardDataset(tmp_path / "a", fields="tokens")
    with pytest.raises(ValueError, match="the index is of 1 shards, .*other-000000.tar"):
        ShardDataset(tmp_path / "a", tmp_path / "b" / "other.ltx")
    for index in (tmp_path / "a").glob("*.ltx"):
        index.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"no index in the folder .*: build it with `lengthtrack index .*a`, or LengthIndex.build\(.*corpus.ltx",
    ):
        ShardDataset(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*absent\.tar"):
        ShardDataset(tmp_path / "absent.tar")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shard_that_changed_or_went_is_named_when_it_is_touched(tmp_path: Path, layout: str) -> None:
    write(tmp_path, tokens([1, 2, 3]), layout=layout, max_samples=1)
    path = tmp_path / "shard-000001.tar"
    content = path.read_bytes()
    path.write_bytes(content + bytes(512))
    dataset = ShardDataset(tmp_path)
    assert len(dataset[0]["tokens"]) == 1
    with pytest.raises(
        ValueError, match=r"shard-000001.tar: \d+ bytes, the index says \d+: changed since .* build the index"
    ):
        dataset[1]
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match="no shard .*shard-000001.tar, which the index lists: put it back, give shards="
    ):
        ShardDataset(tmp_path)[1]
    path.write_bytes(content)
    assert len(ShardDataset(tmp_path)[1]["tokens"]) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_flipped_byte_of_a_sample_is_noticed_when_it_is_read(tmp_path: Path, layout: str) -> None:
    write(tmp_path, tokens([5, 3]), layout=layout)
    path = tmp_path / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    tables = LengthIndex.open(tmp_path / "shard.ltx")._tables
    size = 24 if tables.sizes is None else int(tables.sizes[1, 0])
    start = int(tables.offsets[1, 0])
    for index in range(start, start + size, 3):
        content[index] ^= 4
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"shard-000000.tar: sample 'k1', field 'tokens', at offset {start}: the bytes"
        ):
            ShardDataset(tmp_path)[1]
        assert len(ShardDataset(tmp_path)[0]["tokens"]) == 5
        content[index] ^= 4
    content[start + size - 1] ^= 4
    path.write_bytes(content)
    assert ShardDataset(tmp_path, checksums=False)[1]["tokens"].tolist() != [1000, 1001, 1002]


def test_a_shard_cut_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, tokens([5, 3]))
    dataset = ShardDataset(tmp_path)
    dataset[0]
    os.truncate(tmp_path / "shard-000000.tar", 2000)
    with pytest.raises(ValueError, match=r"shard-000000.tar: ends at byte \d+, \d+ bytes wanted at offset"):
        dataset[1]
