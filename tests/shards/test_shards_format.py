"""The two layouts on disk: tars as tarfile reads them, arrays as NumPy does, groups as webdataset hands them over."""

import gzip
import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import LAYOUTS, VERSIONS, assert_same, groups, keys_of_block, read_with_webdataset, tokens, write
from faults import npy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from webdataset import autodecode, filters
from webdataset.tariterators import base_plus_ext

from collate.errors import LengthError
from samplers.shards.format.npy import DTYPES, decode_npy, npy_header, read_npy_header
from samplers.shards.format.samples import decode_groups, field_of
from samplers.shards.format.tar import read_members, split_name, tar_header
from samplers.shards.storage.reading import LocalFile

PARTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=60)


@given(
    files=st.dictionaries(st.lists(PARTS, min_size=1, max_size=4).map("/".join), st.integers(0, 1500), max_size=5),
    kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    mtime=st.sampled_from([0, 1.5]),
)
def test_members_are_found_where_tarfile_finds_them(
    tmp_path_factory: pytest.TempPathFactory, files: Any, kind: Any, mtime: Any
) -> None:
    path = tmp_path_factory.mktemp("tars") / "a.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        for place, (name, size) in enumerate(files.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = size, mtime, "é" * 40
            tar.addfile(info, io.BytesIO(bytes([place]) * size))
            link = tarfile.TarInfo(f"link{place}")
            link.type, link.linkname, link.size = tarfile.SYMTYPE, "t" * 150, 77
            tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    file = LocalFile(str(path))
    found = list(read_members(file))
    assert [(m.name, m.data, m.size) for m in found] == expected
    assert [m.head for m in found] == [file.read(m.data, m.size)[:256] for m in found]
    assert all(file.read(m.data - len(m.header), len(m.header)) == m.header for m in found)


def test_sizes_and_names_that_need_extensions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "for all"}) as tar:
        info = tarfile.TarInfo("short")
        info.pax_headers = {"path": "very/long.x", "size": "5"}
        info.size = 5
        tar.addfile(info, io.BytesIO(b"12345"))
    assert [(m.name, m.size, m.head) for m in read_members(LocalFile(str(path)))] == [("very/long.x", 5, b"12345")]
    # Sizes from 8 GiB on are binary.
    big = tar_header("a.x", 3)
    big = big[:124] + b"\x80" + (3).to_bytes(11, "big") + big[136:148] + b" " * 8 + big[156:]
    big = big[:148] + b"%06o\0 " % sum(big) + big[156:]
    path.write_bytes(big + b"abc".ljust(512, b"\0") + bytes(1024))
    assert [(m.name, m.size, m.head) for m in read_members(LocalFile(str(path)))] == [("a.x", 3, b"abc")]


def changed_tar(change: Any) -> Any:
    """A tar of one member, with other bytes at a place and a checksum that fits."""
    start, new = change
    head = bytearray(tar_header("a.x", 600))
    head[start : start + len(new)] = new
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + bytes(1024) + bytes(1024)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at offset 0: the archive has no end mark: truncated"),
        (b"text" * 200, "at offset 0: not a tar header: damaged, or not a tar file"),
        (
            gzip.compress(tar_header("a.x", 0) + bytes(1024) + bytes(range(256)) * 9),
            "at offset 0: compressed with gzip",
        ),
        (
            tar_header("a.x", 600) + bytes(100),
            r"at offset 0: 'a.x' should end at byte 1112, the file has 612: truncated",
        ),
        (tar_header("a.x", 600) + bytes(1024), "at offset 1536: the archive has no end mark: truncated"),
        (tar_header("a.x", 600)[:-1] + b"\1" + bytes(2048), "at offset 0: not a tar header"),
        (changed_tar((124, b"999")), "at offset 0: not a tar header"),
        (changed_tar((124, b"\xff" * 12)), f"should end at byte {512 + 2**88 - 1}, the file has 2560: truncated"),
        (changed_tar((156, b"S")), "at offset 0: 'a.x' is stored sparse"),
        (changed_tar((156, b"x")), "at offset 0: the extended header is damaged"),
    ],
)
def test_what_is_no_whole_tar_is_refused_with_the_offset(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.tar: .*{message}"):
        list(read_members(LocalFile(str(path))))


@pytest.mark.parametrize("records", [b"9 size=-1\n", b"22 GNU.sparse.major=1\n\n", b"12 size=4_0\n\n"])
def test_extended_headers_that_mislead_are_refused(tmp_path: Path, records: bytes) -> None:
    path = tmp_path / "a.tar"
    head = bytearray(tar_header("a.x", len(records)))
    head[156:157] = b"x"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    path.write_bytes(bytes(head) + records.ljust(512, b"\0") + tar_header("b.x", 0) + bytes(1024))
    with pytest.raises(ValueError, match="at offset 0: (stored sparse|the extended header is damaged)"):
        list(read_members(LocalFile(str(path))))


@given(st.lists(st.sampled_from("abAB._/- é"), max_size=12).map("".join))
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    key, suffix = base_plus_ext(name)
    if not name.startswith("__"):
        assert split_name(name) == (None if key is None else (key, suffix.lower()))


@given(hnp.arrays(st.sampled_from(sorted(DTYPES)), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
def test_array_headers_are_what_numpy_writes_and_reads(array: Any) -> None:
    content = npy_header(array.dtype.str, array.shape) + array.tobytes()
    read = np.load(io.BytesIO(content), allow_pickle=False)
    assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert len(npy_header(array.dtype.str, array.shape)) % 64 == 0


@given(
    hnp.arrays(
        st.sampled_from([*sorted(DTYPES), ">i4", ">f8", ">c16"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    st.sampled_from("CF"),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_arrays_that_numpy_writes_are_read_as_it_reads_them(array: Any, order: Any, version: Any) -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array, order=order), version)
    read = decode_npy(file.getvalue(), "here")
    assert read.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(read, array, equal_nan=array.dtype.kind in "fc")
    if array.ndim:
        assert read.flags.owndata
        assert read.flags.writeable


def header(text: str, version: bytes = b"\x01\x00") -> Any:
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a .npy array"),
        (b"\x93NUMPY\x01\x00\xff\xff{}", "not a .npy array"),
        (header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (0,), }\n", b"\x00\x00"), "not a .npy array"),
        (header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (0,), }\n", b"\x01\x01"), "not a .npy array"),
        (header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"), "objects would be pickles"),
        (header(b"{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1,), }\n"), "not an array of numbers"),
        (header(b"{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1,), }\n"), "not an array of numbers"),
        (header(b"{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }\n"), "not an array of numbers"),
        (header(b"__import__('os').system('true')\n"), "not an array of numbers"),
        (
            header(b"{'descr': '<i4', 'fortran_order': False, 'shape': (1152921504606846976,), }\n"),
            "the member holds 0",
        ),
        (
            header(b"{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }\n") + bytes(7),
            "8 bytes, the member holds 7",
        ),
        (
            header(b"{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }\n") + bytes(9),
            "8 bytes, the member holds 9",
        ),
    ],
)
def test_arrays_that_claim_what_they_are_not_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        decode_npy(data, "here")


def test_a_header_is_read_from_the_first_bytes_alone() -> None:
    content = npy_header("<i8", (2**60, 3))
    found = read_npy_header(content, "here")
    assert (found.shape, found.nbytes, found.size) == ((2**60, 3), 2**60 * 24, 128)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fields_of_a_stream_can_be_chosen(tmp_path: Path, layout: str) -> None:
    samples = tokens([2, 0, 3])
    write(tmp_path, samples, layout=layout, block_size=2)
    for read, written in zip(decode_groups(groups(tmp_path), ["label"]), samples, strict=True):
        assert_same(read, {name: written[name] for name in ("__key__", "label")})
    with pytest.raises(
        ValueError, match=r"shard-000000.tar: group '.*': no field 'text', there are \['label', 'tokens'\]"
    ):
        list(decode_groups(groups(tmp_path), ["tokens", "label", "text"]))


def test_samples_of_a_stream_do_not_hold_their_block(tmp_path: Path) -> None:
    write(tmp_path, tokens([2, 3]))
    first, second = decode_groups(groups(tmp_path))
    assert first["tokens"].flags.owndata
    assert second["tokens"].flags.writeable


GROUP = {"__key__": "k", "__url__": "u.tar", "x.npy": npy(np.arange(3))}
BLOCK = {
    "__key__": "g",
    "__url__": "u.tar",
    "block.keys.npy": npy(np.array(["a", "b"])),
    "x.npy": npy(np.arange(3)),
    "x.lengths.npy": npy(np.array([1, 2], np.int32)),
}


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (GROUP | {"y.pkl": b""}, ValueError, "u.tar: group 'k': 'y.pkl' is a pickle, which can run any program"),
        (GROUP | {"y.pth.gz": b""}, ValueError, "'y.pth.gz' is a pickle"),
        (GROUP | {"y.PICKLE": b""}, ValueError, "'y.PICKLE' is a pickle"),
        (GROUP | {"pyd": b""}, ValueError, "'pyd' is a pickle"),
        (GROUP | {"y.npy": npy(np.arange(9))[:-1]}, ValueError, "group 'k', field 'y': the header claims"),
        (GROUP | {"y.npy": np.arange(3)}, TypeError, "'y.npy' must still be bytes, got ndarray: put this stage before"),
        (GROUP | {"x.json": b"{}"}, ValueError, "two members are called 'x'"),
        (GROUP | {"y.json": b"{"}, ValueError, "field 'y': not json"),
        (GROUP | {"y.json": b"[" * 100_000}, ValueError, "field 'y': not json"),
        (GROUP | {"y.cls": b"x"}, ValueError, "field 'y': not cls"),
        (GROUP | {"y.cls": b"9" * 30}, ValueError, "field 'y': not cls"),
        (GROUP | {"y.txt": b"\xff"}, ValueError, "field 'y': not txt"),
        (BLOCK | {"x.lengths.npy": npy(np.array([1, 1], np.int32))}, LengthError, "field 'x': the lengths sum to 2"),
        (BLOCK | {"x.lengths.npy": npy(np.array([3], np.int32))}, LengthError, "one for each key"),
        (BLOCK | {"x.lengths.npy": npy(np.int32(3))}, LengthError, "one for each key"),
        (BLOCK | {"x.npy": npy(np.int64(3))}, ValueError, "field 'x'"),
        (BLOCK | {"n.npy": npy(np.arange(3))}, ValueError, r"field 'n': 2 keys, but an array of shape \[3\]"),
        (BLOCK | {"n.npy": npy(np.int64(3))}, ValueError, r"field 'n': 2 keys, but an array of shape \[\]"),
        (BLOCK | {"n.json": b"{}"}, ValueError, "a block holds .npy members alone, got 'n.json'"),
        (BLOCK | {"n.pickle": b"{}"}, ValueError, "'n.pickle' is a pickle"),
        (BLOCK | {"block.keys.npy": npy(np.arange(2))}, ValueError, r"must hold text \[n\]"),
        (BLOCK | {"block.keys.npy": b"text"}, ValueError, r"must hold text \[n\]"),
        (BLOCK | {"block.keys.npy": BLOCK["block.keys.npy"][:-4]}, ValueError, "block.keys.npy: the header claims"),
    ],
)
def test_groups_that_contradict_themselves_are_refused_by_name(
    group: dict[str, Any], error: type[Exception], message: str
) -> None:
    assert [sample["x"].tolist() for sample in decode_groups([GROUP, BLOCK])] == [[0, 1, 2], [0], [1, 2]]
    with pytest.raises(error, match=message):
        list(decode_groups([group]))


def test_a_pickle_that_is_not_asked_for_is_left_alone() -> None:
    assert [list(sample) for sample in decode_groups([GROUP | {"y.pkl": b""}], ["x"])] == [["__key__", "x"]]
    with pytest.raises(ValueError, match="'y.pkl' is a pickle"):
        list(decode_groups([GROUP | {"y.pkl": b""}], ["y"]))


@pytest.mark.parametrize("version", VERSIONS)
def test_webdatasets_own_decoder_reads_blocks_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: int
) -> None:
    write(tmp_path, tokens([2, 1]), version=version)
    (block,) = read_with_webdataset(tmp_path, filters.map(autodecode.Decoder([])))
    assert keys_of_block(block["block.keys.npy"], version) == ["k0", "k1"]
    assert block["tokens.npy"].tolist() == [0, 1, 1000]
    assert block["tokens.lengths.npy"].tolist() == [2, 1]
    assert capsys.readouterr().out == ""


def test_suffixes_name_fields() -> None:
    assert field_of("left.audio.wav") == ("left.audio", "wav")
    assert field_of("cls") == ("cls", "cls")
