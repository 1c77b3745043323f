"""Law 10: the length on disk, in the index and in the sample are one number, or an error names all that differ."""

import io
import struct
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import LAYOUTS, VERSIONS, corpora, groups, read_with_webdataset, tokens, write
from hypothesis import given
from hypothesis import strategies as st

from collate.errors import LengthError
from samplers.shards.dataset import ShardDataset
from samplers.shards.format.samples import decode_groups
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.index_file import write_index


def lengths_on_disk(folder: Path, field: Any) -> Any:
    """By the standard library and NumPy alone."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            arrays = {m.name: np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar if m.name.endswith(".npy")}
        for name, array in arrays.items():
            if name.endswith(f".{field}.lengths.npy"):
                found += array.tolist()
            elif name.endswith(f".{field}.npy") and not any("block.keys" in other for other in arrays):
                found.append(len(array))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@given(corpus=corpora(), block_size=st.integers(1, 4), max_samples=st.integers(1, 5))
def test_a_length_is_the_same_number_from_disk_to_sample(
    tmp_path_factory: pytest.TempPathFactory, layout: str, corpus: Any, block_size: Any, max_samples: Any
) -> None:
    samples, stack = corpus
    folder = tmp_path_factory.mktemp("corpus")
    write(folder, samples, layout=layout, block_size=block_size, max_samples=max_samples, stack=stack)
    dataset = ShardDataset(folder)
    streamed = list(decode_groups(groups(folder)))
    columns = dataset.index.lengths.reshape(len(samples), -1).T.tolist()
    assert dataset.index.fields
    for name, indexed in zip(dataset.index.fields, columns, strict=True):
        given_ = [len(sample[name]) for sample in samples]
        assert lengths_on_disk(folder, name) == given_
        assert indexed == given_
        assert [len(sample[name]) for sample in dataset] == given_
        assert [len(sample[name]) for sample in streamed] == given_


def with_length(index: Any, place: Any, length: Any, path: Path) -> Any:
    """An index file that is sound but for one length."""
    lengths = index._tables.lengths.copy()
    lengths[place] = length
    write_index(path, [replace(index._tables, lengths=lengths)])
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [0, 2, 4, 2**31 - 1])
def test_an_inflated_or_deflated_index_is_caught_by_name_and_numbers(tmp_path: Path, layout: str, length: int) -> None:
    write(tmp_path, tokens([5, 3, 1]), layout=layout)
    index = LengthIndex.open(tmp_path / "shard.ltx")
    wrong = with_length(index, 1, length, tmp_path / "wrong.ltx")
    message = rf"shard-000000.tar: sample 'k1', field 'tokens': the index says {length} steps, the shard 3"
    with pytest.raises(LengthError, match=message):
        ShardDataset(wrong)[1]
    with pytest.raises(LengthError, match=message):
        LengthIndex.open(wrong).verify()


# How the lengths of a block of short samples are stored, by version.
STORED = {1: "<3i", 2: "<3B"}


def patched(path: Path, before: Any, after: Any) -> None:
    """Overwrite bytes in a shard, in place."""
    content = path.read_bytes()
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, after))


def lengths_member(version: int, *lengths: int) -> bytes:
    """The end of the header of the lengths of three samples, and the lengths."""
    return b" " * 20 + b"\n" + struct.pack(STORED[version], *lengths)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_changed_length_in_a_block_is_caught_by_name_and_numbers(tmp_path: Path, version: int) -> None:
    write(tmp_path, tokens([5, 3, 1]), version=version)
    # The sum stays, so that the block alone looks sound.
    patched(tmp_path / "shard-000000.tar", lengths_member(version, 5, 3, 1), lengths_member(version, 5, 1, 3))
    message = r"shard-000000.tar: sample 'k1', field 'tokens': the index says 3 steps, the shard 1"
    for index in range(3):
        with pytest.raises(LengthError, match=message):
            ShardDataset(tmp_path, checksums=False)[index]
    with pytest.raises(LengthError, match=message):
        LengthIndex.open(tmp_path / "shard.ltx").verify()
    assert LengthIndex.build(tmp_path).lengths.tolist() == [5, 1, 3]


@pytest.mark.parametrize(
    ("version", "lengths"), [(1, (5, 3, 2)), (1, (4, 3, 1)), (1, (-1, 9, 1)), (2, (5, 3, 2)), (2, (255, 9, 1))]
)
def test_lengths_that_do_not_add_up_are_refused_by_the_block_itself(
    tmp_path: Path, version: int, lengths: tuple[int, ...]
) -> None:
    write(tmp_path, tokens([5, 3, 1]), version=version)
    patched(tmp_path / "shard-000000.tar", lengths_member(version, 5, 3, 1), lengths_member(version, *lengths))
    message = "the lengths sum to|has length -1"
    with pytest.raises(LengthError, match=rf"group 'block-000000', field 'tokens': .*({message})"):
        LengthIndex.build(tmp_path)
    with pytest.raises(LengthError, match=message):
        list(decode_groups(groups(tmp_path)))
    with pytest.raises(LengthError, match="the index says"):
        ShardDataset(tmp_path, checksums=False)[0]


def test_a_changed_header_of_a_sample_is_caught(tmp_path: Path) -> None:
    write(tmp_path, tokens([5, 3, 1]), layout="plain")
    patched(tmp_path / "shard-000000.tar", b"(3,), }", b"(2,), }")
    with pytest.raises(
        ValueError, match=r"sample 'k1', field 'tokens': the header claims \[2\] int64, 16 bytes, the member"
    ):
        ShardDataset(tmp_path, checksums=False)[1]
    with pytest.raises(
        ValueError, match=r"sample 'k1', field 'tokens', at offset \d+: the bytes do not have the checksum"
    ):
        ShardDataset(tmp_path)[1]
    with pytest.raises(ValueError, match=r"group 'k1', field 'tokens': the header claims \[2\]"):
        LengthIndex.open(tmp_path / "shard.ltx").verify()


def test_a_changed_dtype_or_shape_of_a_block_is_caught(tmp_path: Path) -> None:
    write(tmp_path, tokens([5, 3, 1]))
    patched(
        tmp_path / "shard-000000.tar",
        b"'<i8', 'fortran_order': False, 'shape': (9,)",
        b"'<f8', 'fortran_order': False, 'shape': (9,)",
    )
    with pytest.raises(
        ValueError, match=r"block of sample 'k0', field 'tokens': holds <f8 \[9\] .* the index says <i8 \[9\]"
    ):
        ShardDataset(tmp_path)[2]
    assert ShardDataset(tmp_path, fields=["label"])[2]["label"] == 2


def test_a_place_that_is_moved_is_caught_before_anything_is_read_from_it(tmp_path: Path) -> None:
    write(tmp_path, tokens([5, 3, 1]))
    index = LengthIndex.open(tmp_path / "shard.ltx")
    offsets = index._tables.array("offsets").copy()
    offsets[1, 0] += 8
    write_index(tmp_path / "wrong.ltx", [replace(index._tables, offsets=offsets)])
    with pytest.raises(ValueError, match="block of sample 'k0', field 'tokens'.* at another"):
        ShardDataset(tmp_path / "wrong.ltx", checksums=False)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_and_sizes_outside_a_shard_allocate_nothing(tmp_path: Path, layout: str) -> None:
    write(tmp_path, tokens([5, 3, 1]), layout=layout)
    index = LengthIndex.open(tmp_path / "shard.ltx")
    name = "sizes" if layout == "plain" else "blocks"
    table = getattr(index._tables, name).copy()
    table[0, 1 if layout == "blocks" else 0 :] = 2**60
    write_index(tmp_path / "wrong.ltx", [replace(index._tables, **{name: table})])
    with pytest.raises(ValueError, match=r"shard-000000.tar: "):
        ShardDataset(tmp_path / "wrong.ltx")[0]


def test_webdataset_streams_the_same_samples_through_the_stage(tmp_path: Path) -> None:
    samples = tokens([5, 3, 0, 1])
    for layout in LAYOUTS:
        write(tmp_path / layout, samples, layout=layout, block_size=3)
        read = read_with_webdataset(tmp_path / layout, decode_groups)
        assert [sample["tokens"].tolist() for sample in read] == [sample["tokens"].tolist() for sample in samples]
