"""Scanning: lengths of any shard from headers alone, and shards that contradict themselves refused by name."""

import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import LAYOUTS, tokens, write
from faults import npy

from collate.errors import LengthError
from samplers.shards.format.tar import split_name
from samplers.shards.indexing.index import LengthIndex


def add(tar: Any, name: str, data: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tar_of(path: Path, members: Any) -> Any:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            add(tar, name, data if isinstance(data, bytes) else npy(data))
    return path


def halves(field: Any, data: Any) -> Any:
    """A length function: 16-bit samples behind a header of 4 bytes."""
    assert field == "raw"
    return (len(data) - 4) // 2


def test_other_encodings_are_measured_by_the_users_function(tmp_path: Path) -> None:
    path = tar_of(
        tmp_path / "a.tar",
        [(f"{n}.{suffix}", data) for n in range(4) for suffix, data in (("raw", bytes(4 + 2 * n)), ("json", b"{}"))],
    )
    for workers in (0, 1):
        index = LengthIndex.build(path, ["raw"], halves, workers=workers, checksums=True)
        assert (index.fields, index.lengths.tolist()) == (("raw",), [0, 1, 2, 3])
    index.verify(checksums=True)
    with pytest.raises(
        ValueError, match=r"group '0', field 'raw': neither a .npy array nor sound: give a length function"
    ):
        LengthIndex.build(path, ["raw"])
    with pytest.raises(
        ValueError, match=r"none of \['json', 'raw'\] is a .npy array with an axis, or sound: name the fields"
    ):
        LengthIndex.build(path)
    with pytest.raises(TypeError, match="fields must be a list of names, got the string 'raw'"):
        LengthIndex.build(path, "raw")
    for wrong in (-1, 2.0, None, True):
        with pytest.raises(LengthError, match=f"'0', field 'raw': length= must give a non-negative int, got {wrong!r}"):
            LengthIndex.build(path, ["raw"], lambda field, data, wrong=wrong: wrong)


def test_foreign_shards_index_as_webdataset_groups_them(tmp_path: Path) -> None:
    path = tar_of(
        tmp_path / "a.tar",
        [
            ("__meta__", b"skipped"),
            ("dir/a.x.NPY", np.zeros((3, 2), ">f4", order="F")),
            ("dir/a.json", b"{}"),
            ("README", b"no suffix"),
            ("dir/b.x.npy", np.zeros((5, 2), ">f4")),
        ],
    )
    index = LengthIndex.build(path)
    assert (list(index.keys), index.lengths.tolist()) == (["dir/a", "dir/b"], [3, 5])
    assert split_name("README") is None


BLOCK = {
    "block.keys": np.array(["a", "b", "c"]),
    "x": np.arange(6),
    "x.lengths": np.array([1, 2, 3], np.int32),
    "n": np.arange(3),
}


def block_tar(path: Path, change: Any) -> Any:
    members = {name: value for name, value in (BLOCK | change).items() if value is not None}
    return tar_of(path, [(f"g.{name}" if "pkl" in name else f"g.{name}.npy", value) for name, value in members.items()])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x.lengths": np.array([1, 2, 4], np.int32)},
            LengthError,
            "group 'g', field 'x': the lengths sum to 7, .* 6 steps",
        ),
        ({"x.lengths": np.array([1, -1, 6], np.int32)}, LengthError, "field 'x': sample 'b' has length -1"),
        ({"x.lengths": np.array([1, 5], np.int32)}, LengthError, r"lengths must be integers \[3\].* int32 \[2\]"),
        ({"x.lengths": np.array([1.0, 2, 3])}, LengthError, "got float64"),
        ({"x.lengths": None}, ValueError, "each field that counts a member FIELD.lengths.npy"),
        ({"n": np.arange(4)}, ValueError, r"field 'n': 3 keys, but an array of shape \[4\]"),
        ({"n": np.int64(1)}, ValueError, "field 'n': a block's arrays"),
        ({"x": np.arange(6).astype(">i8")}, ValueError, "field 'x': a block's arrays are little-endian"),
        ({"y.lengths": np.array([1])}, ValueError, r"y.lengths.npy has no y.npy next to it"),
        ({"block.keys": np.array(["a", "b", "b"])}, ValueError, "the key 'b' comes 2 times"),
        ({"block.keys": np.arange(3)}, ValueError, r"block.keys.npy must hold text \[n\]"),
        ({"block.keys": np.array([], "<U1")}, ValueError, "group 'g': 0 samples"),
        ({"x": np.array([None] * 6)}, ValueError, "objects would be pickles, which are never read"),
        ({"n.pkl": b"cos"}, ValueError, "'n.pkl' is a pickle"),
        ({"x": npy(np.arange(6))[:-8]}, ValueError, r"the header claims \[6\] int64, 48 bytes, the member holds 40"),
        ({"x": b"\x93NUMPY"}, ValueError, "not a .npy array"),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    assert LengthIndex.build(block_tar(tmp_path / "good.tar", {})).lengths.tolist() == [1, 2, 3]
    with pytest.raises(error, match=message) as caught:
        LengthIndex.build(block_tar(tmp_path / "bad.tar", change))
    assert str(tmp_path / "bad.tar") in str(caught.value)


def test_blocks_that_differ_in_kind_are_refused(tmp_path: Path) -> None:
    members = {name: value for name, value in BLOCK.items() if name != "n"}
    path = tar_of(
        tmp_path / "a.tar",
        [
            (f"{group}.{name}.npy", value)
            for group, block in {"g": BLOCK, "h": members}.items()
            for name, value in block.items()
        ],
    )
    with pytest.raises(
        ValueError, match=r"a.tar: group 'h': fields \{'x'.*\}, in the first block \{.*'n': \('<i8', \[\], False"
    ):
        LengthIndex.build(path)


def test_lengths_beyond_32_bits_are_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [("a.wav", b"")])
    with pytest.raises(LengthError, match="'a', field 'wav': 2147483648 steps, at most 2147483647"):
        LengthIndex.build(path, ["wav"], lambda field, data: 2**31)


def huge(shape: Any) -> Any:
    return (
        b"\x93NUMPY\x01\x00"
        + struct.pack("<H", 118)
        + f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode()
        + b"\n"
    )


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.x.npy", np.arange(3)), ("a.x.npy", np.arange(3))], "group 'a': two members 'x.npy'"),
        ([("a.x.npy", np.arange(3)), ("b.x.npy", np.arange(3)), ("a.x.npy", np.arange(3))], "'a': the key comes twice"),
        ([("a.x.npy", np.arange(3)), ("b.y.npy", np.arange(3))], r"group 'b': no field 'x', there are \['y'\]"),
        (
            [("a.x.npy", np.arange(3)), ("b.x.npy", np.arange(3.0))],
            "'b', field 'x': float64 .* earlier samples have <i8",
        ),
        ([("a.x.npy", np.arange(3)), ("b.x.npy", np.ones((3, 1), int))], r"'b', field 'x': int64 with features \[1\]"),
        ([("a.x.npy", np.arange(3)), ("b.x.npy", np.int64(3))], "'b', field 'x': a number has no length"),
        ([("a.x.npy", np.arange(3)), ("a.x.json", b"{}")], "field 'x' comes in two encodings"),
        ([("a.x.npy", np.arange(3)), ("b.block.keys.npy", np.array(["k"]))], "a block among single samples"),
        (
            [
                ("a.block.keys.npy", np.array(["k"])),
                ("a.x.npy", np.arange(1)),
                ("a.x.lengths.npy", np.array([1])),
                ("b.x.npy", np.arange(3)),
            ],
            "group 'b': a single sample among blocks",
        ),
        (
            [("a.x.npy", huge((2**60,)))],
            rf"group 'a'.*header claims \[{2**60}\] int64, {2**63} bytes, the member holds 0",
        ),
        ([("a.x.npy", huge((2**40, 2**40)) + bytes(64))], "the member holds 64"),
        ([("a.x.npy", np.arange(3)), ("a.z.npy", huge((2**60,)))], "header claims"),
        ([("a.x.npy", np.array([None]))], "objects would be pickles, which are never read"),
        ([("a.x.npy", np.zeros(2, [("f", "i4")]))], "is not an array of numbers"),
        ([("a.x.npy", b"")], "not a .npy array"),
        ([("README", b"text")], "holds no samples: members must be named KEY.SUFFIX"),
        *[
            (
                [("a.x.npy", np.arange(3)), (f"a.y.{suffix}", b"")],
                rf"'y.{suffix.lower()}' is a pickle, which can run any",
            )
            for suffix in ("pkl", "PKL", "pickle", "Pickle", "pyd", "pth", "PTH", "pkl.gz", "PTH.GZ")
        ],
    ],
)
def test_a_plain_shard_that_contradicts_itself_is_refused(
    tmp_path: Path, members: list[tuple[Any, ...]], message: str
) -> None:
    path = tar_of(tmp_path / "bad.tar", members)
    with pytest.raises(ValueError, match=message) as caught:
        LengthIndex.build(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_truncation_of_a_shard_is_noticed(tmp_path: Path, layout: str) -> None:
    write(tmp_path, tokens([3, 20, 1]), layout=layout, block_size=2)
    content = (tmp_path / "shard-000000.tar").read_bytes()
    cut = tmp_path / "cut.tar"
    # Cut in the end mark, nothing is lost, but for its last block.
    for size in [*range(0, len(content) - 1024, 100), *range(0, len(content) - 1023, 512)]:
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut.tar: .*(truncated|damaged)"):
            LengthIndex.build(cut)
