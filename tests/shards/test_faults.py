"""A campaign of faults: each gives the right data or an error that names the file and the place, and the way out."""

import bz2
import gzip
import io
import itertools
import lzma
import os
import pickle
import signal
import tarfile
import tempfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import LAYOUTS, assert_same, tokens, write
from faults import (
    BLOCK,
    END,
    claim,
    header_of,
    index_arrays,
    index_header,
    npy,
    npy_of,
    packed_keys,
    pax,
    put_together,
    resized,
    rewritten,
    sealed,
    take_apart,
    tar_of,
)
from killed_workers import kills_workers
from torch.utils.data import DataLoader
from webdataset import autodecode

from collate.errors import LengthError
from samplers import LengthBucketBatchSampler, LengthIndex, ShardDataset, ShardStream, ShardWriter
from samplers.shards.format.samples import decode_groups, split_block
from samplers.shards.storage.atomic import AtomicFile

SHARD = "shard-000000.tar"
SAMPLES = tokens([3, 20, 1, 7])


@pytest.fixture(params=LAYOUTS)
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of one shard of `SAMPLES`, in either layout."""
    return write(tmp_path, SAMPLES, layout=request.param, block_size=2)


@contextmanager
def refused(error: type[Exception], *texts: Any) -> Iterator[None]:
    """The block raises an error whose message has all these texts, in this order."""
    with pytest.raises(error) as caught:
        yield
    message, offsets = str(caught.value), [str(caught.value).find(str(text)) for text in texts]
    assert -1 not in offsets, (message, texts)
    assert offsets == sorted(offsets), message


def read_all(folder: Path) -> None:
    dataset = ShardDataset(folder)
    for index, expected in enumerate(SAMPLES):
        assert_same(dataset[index], expected)


def members(path: Path) -> Iterator[Any]:
    """Offset of the header, name and size of each member."""
    offset = 0
    for header, data in take_apart(path.read_bytes()):
        yield offset, header[:100].rstrip(b"\0").decode(), len(data)
        offset += BLOCK + -(-len(data) // BLOCK) * BLOCK
    yield offset, "", 0


def offset_of(path: Path, kind: str) -> int:
    """The offset of a byte of each kind in a shard, in its last group's tokens."""
    found = list(members(path))
    offset, _, size = [each for each in found if each[1].endswith("tokens.npy")][-1]
    lengths = [start for start, name, _ in found if name.endswith("tokens.lengths.npy")]
    keys = [start for start, name, _ in found if name.endswith("block.keys.npy")]
    return {
        "tar header": offset + 4,
        "npy header": offset + BLOCK + 20,
        "payload": offset + BLOCK + 128 + 8,
        "padding": offset + BLOCK + size + 3,
        "between members": offset,
        "end mark": found[-1][0],
        "within the end mark": found[-1][0] + BLOCK,
        "lengths": lengths[-1] + BLOCK + 128 if lengths else None,
        "keys": keys[-1] + BLOCK + 128 if keys else None,
    }[kind]


# --- what disks do


@pytest.mark.parametrize("kind", ["tar header", "npy header", "payload", "padding", "between members", "end mark"])
def test_a_shard_cut_anywhere_is_noticed_with_its_index_and_without(corpus: Path, kind: str) -> None:
    path = corpus / SHARD
    size, end = path.stat().st_size, offset_of(path, kind)
    os.truncate(path, end)
    with refused(ValueError, path, f"{end} bytes, the index says {size}: changed since it was indexed; build"):
        ShardDataset(corpus)[0]
    with refused(ValueError, path, "at offset", "truncated"):
        LengthIndex.build(path)
    with refused(ValueError, path, f"{end} bytes, the index says {size}"):
        LengthIndex.open(corpus / "shard.ltx").verify()
    with refused(ValueError, path, f"{end} bytes, the index says {size}"):
        list(ShardStream(corpus, collate_fn=list, max_tokens=99))


CRC = "do not have the checksum"
STEPS = "sample 'k2', field 'tokens': the index says 1 steps, the shard 5"
FOLLOWS = "something follows the end mark"
# What is said when the shard is read by place, indexed anew, and verified with its payload; None where all is served.
FLIPS = {
    ("tar header", "blocks"): (None, "not a tar header: damaged", "not a tar header: damaged"),
    ("tar header", "plain"): (None, "not a tar header: damaged", "not a tar header: damaged"),
    ("npy header", "blocks"): ("not an array of numbers", "not an array of numbers", "not an array of numbers"),
    ("npy header", "plain"): (CRC, "not an array of numbers", "not an array of numbers"),
    ("payload", "blocks"): (f"sample 'k3', field 'tokens', at offset 6792: the bytes {CRC}", None, CRC),
    ("payload", "plain"): (f"sample 'k3', field 'tokens', at offset 6656: the bytes {CRC}", None, CRC),
    ("lengths", "blocks"): (STEPS, "the lengths sum to 12, the field holds 8", "the lengths sum to 12"),
    ("keys", "blocks"): (None, "the compressed keys are damaged", "the compressed keys are damaged"),
    ("keys", "blocks of version 1"): (None, None, "its layout, fields or keys are others"),
    ("lengths", "blocks of version 1"): (STEPS, "the lengths sum to 12, the field holds 8", "the lengths sum to 12"),
    ("padding", "blocks"): (None, None, None),
    ("padding", "plain"): (None, None, None),
    ("end mark", "blocks"): (None, "not a tar header", "not a tar header"),
    ("end mark", "plain"): (None, "not a tar header", "not a tar header"),
    ("within the end mark", "blocks"): (None, FOLLOWS, FOLLOWS),
    ("within the end mark", "plain"): (None, FOLLOWS, FOLLOWS),
}


@pytest.mark.parametrize("door", range(3), ids=["read", "indexed", "verified"])
@pytest.mark.parametrize(("kind", "layout"), FLIPS)
def test_a_flipped_bit_is_noticed_where_it_matters(tmp_path: Path, kind: str, layout: str, door: int) -> None:
    version = 1 if "version 1" in layout else 2
    path = write(tmp_path, SAMPLES, layout=layout.split()[0], block_size=2, version=version) / SHARD
    content = bytearray(path.read_bytes())
    content[offset_of(path, kind)] ^= 4
    path.write_bytes(content)
    doors = [
        lambda: read_all(tmp_path),
        lambda: LengthIndex.build(path),
        lambda: LengthIndex.open(tmp_path / "shard.ltx").verify(checksums=True),
    ]
    message = FLIPS[kind, layout][door]
    with refused(ValueError, path, message) if message else nullcontext():
        doors[door]()


def test_a_hole_in_a_shard_does_not_end_it(corpus: Path) -> None:
    path = corpus / SHARD
    content = path.read_bytes()
    # A block of the file system that reads as zeros: a whole header is gone.
    offset = offset_of(path, "between members")
    path.write_bytes(content[:offset] + bytes(BLOCK) + content[offset + BLOCK :])
    with refused(ValueError, path, f"at offset {offset}", "something follows the end mark: a hole in the file"):
        LengthIndex.build(path)
    path.write_bytes(content * 2)
    with refused(ValueError, path, "something follows the end mark", "several archives in one"):
        LengthIndex.build(path)
    path.write_bytes(content + bytes(100_000))
    assert len(LengthIndex.build(path)) == len(SAMPLES)


def test_a_shard_that_went_grew_or_was_replaced_is_named(corpus: Path) -> None:
    path = corpus / SHARD
    content = path.read_bytes()
    path.unlink()
    for read in (lambda: ShardDataset(corpus)[0], lambda: list(ShardStream(corpus, collate_fn=list, max_tokens=99))):
        with refused(
            FileNotFoundError, "no shard", path, "put it back, give shards= their new paths, or build the index again"
        ):
            read()
    path.write_bytes(content + bytes(BLOCK))
    with refused(ValueError, path, f"{len(content) + BLOCK} bytes, the index says {len(content)}"):
        ShardDataset(corpus)[0]
    # Of the same size, with another sample's values.
    other = write(corpus / "other", [sample | {"tokens": sample["tokens"] + 1} for sample in SAMPLES],
                  layout=LengthIndex.open(corpus / "shard.ltx")._tables.layout, block_size=2)  # fmt: skip
    path.write_bytes((other / SHARD).read_bytes())
    with refused(ValueError, path, "sample 'k0', field 'tokens'", "do not have the checksum in the index"):
        ShardDataset(corpus)[0]
    with refused(ValueError, path, "sample 'k0'", "do not have the checksum in the index"):
        LengthIndex.open(corpus / "shard.ltx").verify(checksums=True)


@pytest.mark.parametrize("door", [LengthIndex.open, ShardDataset])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:8] + b"\3\0\0\0" + c[12:], "it has version 3, this program reads 1 and 2"),
        (lambda c: tar_of([("a.x.npy", npy(3))]), "it is no length index"),
        (lambda c: c[:-64], "its checksum is wrong"),
        (lambda c: c[: len(c) // 3], "its header is damaged or truncated"),
        (lambda c: c[:-5] + bytes([c[-5] ^ 16]) + c[-4:], "its checksum is wrong"),
        (lambda c: c[:40] + bytes([c[40] ^ 16]) + c[41:], "its header is damaged"),
        (lambda c: b"", "it is too short: truncated"),
    ],
)
def test_an_index_that_is_another_or_damaged_is_refused_with_the_way_out(
    corpus: Path, door: Callable[..., Any] | type[Any], damage: Callable[..., Any], message: str
) -> None:
    path = corpus / "shard.ltx"
    path.write_bytes(damage(path.read_bytes()))
    with refused(
        ValueError, path, message, "build the index again: `lengthtrack index`, or LengthIndex.build(shards).save(path)"
    ):
        door(path)


FORGERIES = [
    (lambda h: h["fields"][0].update(dtype=""), "no field is"),
    (lambda h: h["fields"][0].update(dtype="|O"), "no field is"),
    (lambda h: h["fields"][0].update(name="__key__", suffix="__key__.npy"), "no field is"),
    (lambda h: h["fields"][0].update(name="label", suffix="label.npy"), "they must differ"),
    (lambda h: h["fields"][0].update(suffix="wav"), "no field is"),
    (lambda h: h["fields"][0].update(shape=[-1]), "no field is"),
    (lambda h: h["fields"][0].update(shape=["x"]), "no field is"),
    # It was an OverflowError, when a sample was read.
    (lambda h: h["fields"][0].update(shape=[2**60]), "no field is"),
    (lambda h: h["fields"][0].update(tracked=False), "one be tracked"),
    (lambda h: h["fields"][0].update(tracked=1), "no field is"),
    (lambda h: h["shards"][0].update(size=-1), "no shard is"),
    (lambda h: h["shards"][0].update(size=1.5), "no shard is"),
    (lambda h: h["shards"][0].update(digest=None), "no shard is"),
    (lambda h: h["shards"][0].update(path="a\0b"), "no shard is"),
    (lambda h: h["shards"][0].update(path="\ud800"), "UnicodeEncodeError"),
    (lambda h: h["shards"][0].update(path=None), "header is not valid"),
    (lambda h: h["shards"][0].update(samples=-4), "no shard is"),
    (lambda h: h["arrays"]["lengths"].update(shape=[2**70, 1]), "lengths is"),
    (lambda h: h["arrays"]["lengths"].update(shape=[-4, 1]), "lengths is"),
    (lambda h: h["arrays"]["keys"].update(dtype="|S0"), "keys is"),
    (lambda h: h["arrays"]["keys"].update(dtype="((((i4"), "keys is"),
    (lambda h: h["arrays"]["order"].update(dtype="<i2"), "order is"),
]


PACKED = [
    (lambda h: h["arrays"]["lengths"].update(dtype="<u4"), "lengths is"),
    (lambda h: h["arrays"]["offsets"].update(dtype="<i4"), "offsets is"),
    (lambda h: h["arrays"]["offsets"].update(dtype="<i8", shape=[2, 2]), "offset_bases without"),
    (lambda h: h["arrays"]["offset_bases"].update(shape=[2, 2]), "offset_bases is [2, 2]"),
    (lambda h: h["arrays"]["offset_bases"].update(shape=[2**60, 2]), "offset_bases is"),
    (lambda h: h["arrays"]["keys"].update(shape=[4, 0]), "keys are [4, 0]"),
    (lambda h: h["arrays"]["keys"].update(shape=[4]), "keys are [4]"),
    (lambda h: h["keys"].update(alphabet=""), "keys are"),
    (lambda h: h["keys"].update(alphabet="0123456789abcdefg"), "keys are"),
    (lambda h: h["keys"].update(alphabet="aa"), "keys are"),
    (lambda h: h["keys"].update(width=9), "remainders of 9 bytes"),
    (lambda h: h["keys"].update(width=2**70), "keys are"),
    (lambda h: h["keys"].update(width=0), "keys are"),
    (lambda h: h["keys"].update(width=True), "keys are"),
    (lambda h: h["keys"].pop("width"), "KeyError"),
    (lambda h: h["keys"].update(alphabet="\u1234"), "UnicodeEncodeError"),
    (lambda h: h["keys"].update(alphabet=7), "header is not valid"),
    (lambda h: h["keys"].update(prefix="k" * 256), "common start of 256 bytes"),
    (lambda h: h["keys"].update(prefix="\0"), "keys are"),
    (lambda h: h.pop("keys"), "KeyError"),
    (lambda h: h["arrays"].update(places=h["arrays"]["offsets"]), "KeyError"),
    (lambda h: h["arrays"].pop("crcs") and h["arrays"].pop("offsets"), "KeyError"),
    (lambda h: h.update(layout="plain"), "which is for blocks"),
]


@pytest.mark.parametrize(("forge", "message"), PACKED)
def test_a_forged_index_of_version_2_is_refused(tmp_path: Path, forge: Callable[..., Any], message: str) -> None:
    path = write(tmp_path, SAMPLES) / "shard.ltx"
    header = index_header(path.read_bytes())
    forge(header)
    path.write_bytes(rewritten(path.read_bytes(), header))
    with bounded(tmp_path), refused(ValueError, path, message, "build the index again"):
        LengthIndex.open(path)


@pytest.mark.parametrize(("forge", "message"), FORGERIES)
def test_a_forged_index_of_sound_checksums_is_refused(tmp_path: Path, forge: Callable[..., Any], message: str) -> None:
    path = write(tmp_path, SAMPLES) / "shard.ltx"
    header = index_header(path.read_bytes())
    forge(header)
    path.write_bytes(rewritten(path.read_bytes(), header))
    with refused(ValueError, path, message, "build the index again"):
        LengthIndex.open(path)


@pytest.mark.parametrize(
    ("layout", "number", "message"),
    [
        ("plain", ("lengths", 1, -2), "lengths holds -2"),
        ("plain", ("order", 0, 4), "order holds 0 to 4"),
        ("plain", ("order", 0, -1), "order holds -1"),
        ("plain", ("places", 2, -5), "a member is not within the shard"),
        ("plain", ("places", 2, 2**62), "a member is not within the shard"),
        ("plain", ("sizes", 2, -1), "a member is not within the shard"),
        ("plain", ("sizes", 2, 2**40), "a member is not within the shard"),
        ("blocks", ("lengths", 1, 255), "field 'tokens': the index says 255 steps, the shard 20"),
        ("blocks", ("offsets", 2, 2**32 - 1), "at another"),
        ("blocks", ("offset_bases", 0, 0), "at another"),
        ("blocks", ("offset_bases", 0, -(2**63)), "at another"),
        ("blocks", ("keys", 1, 255), "keys hold characters beyond"),
        ("blocks of version 1", ("lengths", 1, 2**31 - 1), "the index says 2147483647 steps, the shard 20"),
        ("blocks of version 1", ("places", 2, -5), "at another"),
        ("blocks", ("blocks", 0, 1), "blocks do not follow each other"),
        ("blocks", ("blocks", 4, 0), "blocks do not follow each other"),
        ("blocks", ("blocks", 1, -1), "blocks do not follow each other"),
        ("blocks", ("blocks", 1, 2**63 - 1), "a member is not within the shard"),
    ],
)
def test_a_forged_number_in_an_index_is_refused_and_nothing_allocated(
    tmp_path: Path, layout: str, number: tuple[str, int, int], message: str
) -> None:
    array, index, value = number
    version = 1 if "version 1" in layout else 2
    path = write(tmp_path, SAMPLES, layout=layout.split()[0], block_size=2, version=version) / "shard.ltx"
    content = path.read_bytes()
    header = index_header(content)
    arrays = bytearray(index_arrays(content))
    width = int(header["arrays"][array]["dtype"][2:])
    offset = header["arrays"][array]["offset"] + index * width
    arrays[offset : offset + width] = (value % 256**width).to_bytes(width, "little")
    path.write_bytes(rewritten(content, header, bytes(arrays)))
    with bounded(tmp_path), refused(ValueError, tmp_path, message):
        list(ShardDataset(tmp_path).__getitems__(range(4)))


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """The block allocates no more than a small multiple of the files in a folder."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (1 << 19) + 8 * size


# --- shards that contradict themselves

ARRAY = npy(np.arange(3))
SOUND = [("a.x.npy", ARRAY), ("b.x.npy", ARRAY)]
BLOCKS = {
    "block.keys": npy(np.array(["a", "b"])),
    "x.lengths": npy(np.array([1, 2], np.int32)),
    "x": ARRAY,
}


def block(change: dict[str, bytes] | None = None) -> list[tuple[str, bytes]]:
    """A block of two samples, with other members."""
    return [(f"g.{name}.npy", data) for name, data in (BLOCKS | (change or {})).items()]


def lengths(*numbers: Any, dtype: type[Any] = np.int64) -> dict[str, bytes]:
    return {"x.lengths": npy(np.array(numbers, dtype))}


def keys(dtype: Any, count: int = 1, payload: bytes = b"") -> Any:
    return {"block.keys": claim(f"({count},)", dtype, payload)}


def texts(*names: Any) -> dict[str, bytes]:
    return {"block.keys": npy(np.array(names))}


def header(shape: Any, dtype: str = "<i8", payload: bytes = b"") -> Any:
    """A plain shard whose array claims a shape."""
    return [("a.x.npy", claim(shape, dtype, payload))]


def packed(text: bytes, level: int = 9) -> dict[str, bytes]:
    """A block's compressed keys."""
    return {"block.keys": packed_keys(zlib.compress(text, level))}


def broken(change: Callable[[bytes], bytes]) -> dict[str, bytes]:
    """A block's keys whose compressed stream is another."""
    return {"block.keys": packed_keys(change(zlib.compress(b"a\0b")))}


SPACED = "{" + " " * 70_000 + "'descr': '<i8', 'fortran_order': False, 'shape': (0,), }"
NO_ARRAY = "is not an array of numbers"
NO_TEXT = "block.keys.npy must hold text [n]"
ALONE = {
    "a duplicate member": ([SOUND[0], SOUND[0]], ValueError, "group 'a': two members 'x.npy'"),
    "a duplicate key": ([*SOUND, SOUND[0]], ValueError, "group 'a': the key comes twice"),
    "a duplicate key in blocks": (block(texts("a", "a")), ValueError, "the key 'a' comes 2 times"),
    "a missing field": ([*SOUND, ("c.y.npy", ARRAY)], ValueError, "group 'c': no field 'x', there are ['y']"),
    "single samples among blocks": ([*block(), *SOUND], ValueError, "a single sample among blocks"),
    "a field for the key": ([*SOUND, ("b.__key__.npy", ARRAY)], ValueError, "cannot be called '__key__'"),
    "a block's field for the key": ([*block(), ("g.__key__.npy", ARRAY)], ValueError, "a member must be FIELD.npy"),
    "a header of 70 kB": ([("a.x.npy", npy_of(SPACED))], ValueError, "not a .npy array"),
}
WITHIN = {
    "a key of 1 MiB in 1 kB": (block(packed(b"a" * (1 << 20))), ValueError, "bytes hold more than"),
    "2^20 keys in 2 kB": (block(packed(b"a\0" * (1 << 20) + b"a")), ValueError, "bytes hold more than"),
    "three keys of two samples": (
        block(packed(b"a\0b\0c")),
        ValueError,
        "3 keys, the other members of the block have 2",
    ),
    "60,000 keys of two samples": (block(packed(b"a\0" * 60_000 + b"a", 0)), ValueError, "60001 keys"),
    "an empty key": (block(packed(b"a\0")), ValueError, "key 1 of 2 is empty"),
    "compressed keys that are no text": (block(packed(b"a\0\xff")), ValueError, "the keys are not UTF-8"),
    "half a compressed stream": (block(broken(lambda data: data[:-4])), ValueError, "do not end with their member"),
    "more after the compressed stream": (block(broken(lambda data: data + b"a")), ValueError, "do not end with"),
    "no compressed stream": (block(broken(lambda data: b"text")), ValueError, "the compressed keys are damaged"),
    "an empty compressed stream": (block(broken(lambda data: b"")), ValueError, "do not end with their member"),
    "compressed keys of two axes": (
        block({"block.keys": claim("(2, 3)", "|u1", bytes(6))}),
        ValueError,
        "compressed keys have one axis",
    ),
    "more compressed keys than the member": (
        block({"block.keys": claim(f"({2**60},)", "|u1", bytes(6))}),
        ValueError,
        "the header claims",
    ),
    "too short a sum": (block(lengths(1, 1)), LengthError, "field 'x': the lengths sum to 2, the field holds 3 steps"),
    "too great a sum": (block(lengths(1, 3)), LengthError, "field 'x': the lengths sum to 4, the field holds 3 steps"),
    "a sum that comes around": (
        block(lengths(*[2**62] * 3, 2**62 + 3) | texts(*"abcd")),
        LengthError,
        f"field 'x': the lengths sum to {2**64 + 3}, the field holds 3 steps",
    ),
    "lengths beyond int64": (block(lengths(2**64 - 1, 4, dtype=np.uint64)), LengthError, f"sum to {2**64 + 3}"),
    "a negative length": (block(lengths(-1, 4)), LengthError, "field 'x': sample 'a' has length -1"),
    "a fractional length": (block(lengths(1, 2, dtype=float)), LengthError, "lengths must be integers [2]"),
    "too few lengths": (block(lengths(3)), LengthError, "lengths must be integers [2], one for each key"),
    "a negative shape": (header("(-1,)"), ValueError, NO_ARRAY),
    "2^60 elements": (header(f"({2**60},)"), ValueError, f"[{2**60}] int64, {2**63} bytes, the member holds 0"),
    "2^60 elements in blocks": (block({"x": claim(f"({2**60},)")}), ValueError, f"claims [{2**60}] int64"),
    "2^40 keys of no characters": (block(keys("<U0", 2**40)), ValueError, NO_TEXT),
    "a key of 10^11 characters": (block(keys("<U99999999999")), ValueError, NO_TEXT),
    "a key of 10^8 characters": (block(keys("<U99999999")), ValueError, "block.keys.npy: the header claims"),
    "a key beyond Unicode": (block(keys("<U1", 1, b"\0\0\x11\0")), ValueError, "numbers that are no characters"),
    "a key of half a pair": (block(keys("<U1", 1, b"\0\xd8\0\0")), ValueError, "numbers that are no characters"),
    "no steps of an absurd shape": (header(f"(0, {2**40}, {2**40})"), ValueError, "which no array can be"),
    "no steps of an absurd shape in blocks": (
        block(lengths(0, 0) | {"x": claim(f"(0, {2**40}, {2**40})")}),
        ValueError,
        "which no array can be",
    ),
    "an axis of 20 digits": (header(f"(0, {10**19})"), ValueError, NO_ARRAY),
    "an axis of 5000 digits": (header(f"({'9' * 5000},)"), ValueError, NO_ARRAY),
    "a size too long to print": (header(f"({('9' * 2000 + ',') * 3})"), ValueError, NO_ARRAY),
    "70 axes": (header(f"({'1, ' * 70})", "|u1", b"\0"), ValueError, NO_ARRAY),
    "a shape without a comma": (header("(1 2,)"), ValueError, NO_ARRAY),
    "objects": ([("a.x.npy", npy(np.array([None])))], ValueError, "objects would be pickles, which are never read"),
    "records": ([("a.x.npy", npy(np.zeros(2, [("f", "i4")])))], ValueError, NO_ARRAY),
    "a block's member without a field": ([*block(), ("g.npy", ARRAY)], ValueError, "a member must be FIELD.npy"),
}


@pytest.mark.parametrize("name", ALONE | WITHIN)
def test_a_shard_that_contradicts_itself_is_refused_and_nothing_allocated(tmp_path: Path, name: str) -> None:
    content, error, message = (ALONE | WITHIN)[name]
    path = tmp_path / "bad.tar"
    path.write_bytes(tar_of(content))
    with bounded(tmp_path), refused(error, path, message):
        LengthIndex.build(path)


@pytest.mark.parametrize("name", WITHIN)
def test_a_stream_refuses_a_group_that_contradicts_itself_too(tmp_path: Path, name: str) -> None:
    content, error, message = WITHIN[name]
    group = {member.split(".", 1)[1]: data for member, data in content}
    with bounded(tmp_path), refused(error, "bad.tar: group", message):
        list(decode_groups([{"__key__": "g", "__url__": "bad.tar"} | group]))


def test_long_headers_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    # 300 spaces hide all that differs from the bytes that an index reads with the tar header.
    text = "{" + " " * 300 + "'descr': '<i8', 'fortran_order': False, 'shape': (%s), }"
    arrays = [npy_of(text % "4, 1", bytes(32)), npy_of(text % "2, 2", bytes(32))]
    path.write_bytes(tar_of([("a.x.npy", arrays[0]), ("b.x.npy", arrays[1])]))
    with refused(ValueError, path, "group 'b', field 'x'", "a field has one dtype and feature shape"):
        LengthIndex.build(path)


def test_a_key_among_many_cannot_make_a_table_far_greater_than_the_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    members = [("k" * 4000 + ".x.npy", ARRAY), *((f"{place}.x.npy", ARRAY) for place in range(4000))]
    path.write_bytes(tar_of(members, tarfile.PAX_FORMAT))
    index = LengthIndex.build(path)
    assert len(index) == 4001
    nothing = {"x": npy(np.arange(0))}
    first = block(texts("k" * 100_000) | lengths(0) | nothing)
    other = block(texts(*map(str, range(5000))) | lengths(*[0] * 5000) | nothing)
    path.write_bytes(tar_of([*first, *((f"h{name[1:]}", data) for name, data in other)]))
    with refused(ValueError, path, "a key of 100000 bytes among 5001 samples: shorten the key"):
        LengthIndex.build(path)


# --- what attackers do


class Bomb:
    """What a pickle does when it is read: it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


def explosive(tmp_path: Path) -> Iterator[Any]:
    """Every extension under which webdataset runs a pickle, with the bytes that do it."""
    saved = io.BytesIO()
    torch.save(Bomb(tmp_path / "boom"), saved)
    for name, decode in autodecode.decoders.items():
        for data in (pickle.dumps(Bomb(tmp_path / "boom")), saved.getvalue()):
            with suppress(Exception):
                decode(data)
            if (tmp_path / "boom").exists():
                (tmp_path / "boom").rmdir()
                yield name, data


def test_no_pickle_is_read_under_any_extension_webdataset_decodes(tmp_path: Path) -> None:
    found = list(explosive(tmp_path))
    # Older versions of webdataset know fewer.
    assert {"pickle", "pyd"} <= {name for name, _ in found} <= {"pkl", "pickle", "pyd", "pth"}
    path = tmp_path / "bad.tar"
    for (name, data), form in itertools.product(found, ["{}", "y.{}", "{}.gz", "y.{}.gz", "y.{}.gz.gz"]):
        for suffix in (form.format(name), form.format(name).upper()):
            packed = data
            for _ in range(suffix.lower().count("gz")):
                packed = gzip.compress(packed)
            path.write_bytes(tar_of([("a.x.npy", ARRAY), (f"a.{suffix}", packed)]))
            with refused(ValueError, path, f"'{suffix.lower()}' is a pickle, which can run any program"):
                LengthIndex.build(path)
            with refused(ValueError, "bad.tar: group 'a'", "is a pickle"):
                list(decode_groups([{"__key__": "a", "__url__": "bad.tar", "x.npy": ARRAY, suffix: packed}]))
            with refused(ValueError, "here", "is a pickle"):
                split_block([suffix], "here")
    for payload in (npy(np.array([Bomb(tmp_path / "boom")], object)), claim("(1,)", "|O", found[0][1])):
        path.write_bytes(tar_of([("a.x.npy", payload)]))
        with refused(ValueError, path, "objects would be pickles, which are never read"):
            LengthIndex.build(path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../../../a", "a/../../b", "./a", "//a", "C:\\a", "\n", "~/a", "con"])
def test_names_that_lead_elsewhere_are_keys_and_nothing_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / "inner" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(tar_of([(f"{name}.x.npy", ARRAY)]))
    LengthIndex.build(path, checksums=True).save(f"{path}.ltx")
    assert_same(ShardDataset(path)[0], {"__key__": name, "x": np.arange(3)})
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.tar", "a.tar.ltx", "inner"]


@pytest.mark.parametrize("kind", [b"1", b"2"])
def test_links_are_never_followed(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret.x.npy"
    secret.write_bytes(ARRAY)
    path = tmp_path / "a.tar"
    link = (header_of("b.x.npy", 0, kind, link=str(secret)[-99:]), b"")
    first, other = take_apart(tar_of([("a.x.npy", ARRAY), ("b.y.npy", ARRAY)]))
    path.write_bytes(put_together([first, link, other]))
    with refused(ValueError, path, "group 'b': no field 'x', there are ['y']"):
        LengthIndex.build(path, ["x"])
    # A link claims no data, whatever its header says.
    path.write_bytes(put_together([first, (resized(link[0], 2**60), b"")]))
    assert list(LengthIndex.build(path).keys) == ["a"]


NEXT = take_apart(tar_of([("a.x.npy", ARRAY)]))
TARS = {
    "an old sparse member": ([(header_of("a.x.npy", 0, b"S"), b"")], "'a.x.npy' is stored sparse: write the tar again"),
    "a new sparse member": (pax({"GNU.sparse.major": "1", "GNU.sparse.size": "9"}) + NEXT, "stored sparse"),
    "a size of 5000 digits": (pax({"size": "9" * 5000}) + NEXT, "a size that is no number"),
    "a size in other digits": (pax({"size": "٣"}) + NEXT, "a size that is no number"),
    "a size of 2^70": ([(resized(NEXT[0][0], 2**70), ARRAY)], f"should end at byte {2**70 + 512}"),
    "a name with a NUL": (pax({"path": "a\0b.x.npy"}) + NEXT, "a name of 9 characters, or with a NUL"),
    "a name of 10 kB": (pax({"path": "a" * 10_000}) + NEXT, "a name of 10000 characters"),
    "a long name of 10 kB": ([(header_of("x", 10_000, b"L"), b"/" * 10_000), *NEXT], "a name of 10000 characters"),
    "an extended header of 2 MB": ([(header_of("x", 2**21, b"x"), b"9" * 2**21), *NEXT], "header of 2097152 bytes"),
    "a record that goes back": ([(header_of("x", 9, b"x"), b"-9 path=a"), *NEXT], "the extended header is damaged"),
    "a record of no bytes": ([(header_of("x", 8, b"x"), b"0 path=a"), *NEXT], "the extended header is damaged"),
    "two names": (pax({"path": "a.x.npy"}) + pax({"path": "b.x.npy"}) + NEXT, "a second extended header for the same"),
    "a name for nobody": (NEXT + pax({"path": "b.x.npy"}), "an extended header, and no member after it"),
}


@pytest.mark.parametrize("name", TARS)
def test_tar_headers_that_mislead_are_refused_with_the_offset(tmp_path: Path, name: str) -> None:
    parts, message = TARS[name]
    path = tmp_path / "bad.tar"
    path.write_bytes(put_together(parts))
    with bounded(tmp_path), refused(ValueError, path, "at offset", message):
        LengthIndex.build(path)


def test_extended_headers_and_names_take_time_in_proportion(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    # A megabyte of records, and names of thousands of slashes: with the square of these it would be minutes.
    records = (header_of("x", 10**6, b"x"), b"5 a=\n" * 200_000)
    slashes = [
        part for _ in range(500) for part in ((header_of("x", 4000, b"L"), b"/" * 4000), (header_of("x", 0), b""))
    ]
    path.write_bytes(put_together([records, *slashes, *NEXT]))
    assert list(LengthIndex.build(path).keys) == ["a"]


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (gzip.compress, "compressed with gzip, which cannot be read at any offset: decompress it"),
        (bz2.compress, "truncated"),
        (lzma.compress, "not a tar header: damaged, or not a tar file"),
        (zipped, "not a tar header: damaged, or not a tar file"),
    ],
)
def test_compressed_tars_are_refused_unopened(tmp_path: Path, pack: Callable[..., Any], message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(pack(tar_of([("a.x.npy", npy(np.zeros(2_000_000)))])))
    with bounded(tmp_path), refused(ValueError, path, "at offset 0", message):
        LengthIndex.build(path)


def test_compressed_members_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    bombs = [("a.z.npz", zipped(npy(np.zeros(2_000_000)))), ("a.y.json.gz", gzip.compress(b" " * 10**7))]
    path.write_bytes(tar_of([("a.x.npy", ARRAY), *bombs]))
    with bounded(tmp_path):
        LengthIndex.build(path, ["x"], checksums=True).save(f"{path}.ltx")
        sample = ShardDataset(path)[0]
    assert [("a.z.npz", sample["z"]), ("a.y.json.gz", sample["y.json"])] == bombs


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: Path(path).symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, make: Callable[..., Any]) -> None:
    path = tmp_path / "a.tar"
    make(path)
    for door in (lambda: LengthIndex.build([path / "." if path.is_dir() else path]), lambda: LengthIndex.open(path)):
        with refused((ValueError, FileNotFoundError), path):
            door()


# --- what systems refuse


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond this, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [0, 3000, 200_000])
def test_a_full_disk_is_named_and_leaves_only_whole_shards(tmp_path: Path, layout: str, size: int) -> None:
    samples = [{"__key__": f"k{index}", "x": np.full(500, index)} for index in range(100)]
    with largest_file(size), refused(OSError, tmp_path / "shard-0000", ".tar.tmp"):
        write(tmp_path, samples, layout=layout, block_size=3)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_keeps_the_finished_shards(tmp_path: Path) -> None:
    small = [{"__key__": f"k{index}", "x": np.full(50, index)} for index in range(40)]
    large = [{"__key__": "large", "x": np.zeros(10**6)}]
    with largest_file(100_000), refused(OSError, tmp_path / "shard-000002.tar.tmp"):
        write(tmp_path, [sample | {"x": sample["x"] * 1.0} for sample in small] + large, max_samples=20)
    assert sorted(path.name for path in tmp_path.glob("*.tar*")) == [
        f"shard-00000{n}.tar{s}" for n in (0, 1) for s in ("", ".ltx")
    ]
    LengthIndex.build(tmp_path).save(tmp_path / "shard.ltx")
    assert [sample["x"][0] for sample in ShardDataset(tmp_path)] == list(range(40))


def test_an_index_that_does_not_fit_leaves_the_old_one(corpus: Path) -> None:
    path = corpus / "shard.ltx"
    before = path.read_bytes()
    with largest_file(300), refused(OSError, corpus / "shard.ltx.tmp"):
        LengthIndex.build(corpus).save(path)
    assert path.read_bytes() == before
    assert not (corpus / "shard.ltx.tmp").exists()


def test_a_device_that_is_full_is_named(tmp_path: Path) -> None:
    file = AtomicFile(tmp_path / "a")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file.stream.fileno())
    os.close(full)
    with refused(OSError, "No space left on device", tmp_path / "a.tmp"):
        file.stream.write(bytes(10**6))
    file.discard()
    assert not list(tmp_path.iterdir())


@contextmanager
def as_somebody() -> Iterator[Path]:
    """A folder that all may enter, and no rights to pass over permissions."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may read everything; nobody may not."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_permission_that_is_denied_is_named() -> None:
    with as_somebody() as folder:
        write(folder, SAMPLES)
        dataset, shard, index = ShardDataset(folder), folder / SHARD, folder / "shard.ltx"
        for path in (shard, index):
            path.chmod(0)
        with without_rights(), refused(PermissionError, shard):
            dataset[0]
        with without_rights(), refused(PermissionError, shard):
            LengthIndex.build(folder)
        with without_rights(), refused(PermissionError, index):
            LengthIndex.open(index)
        folder.chmod(0o555)
        with without_rights(), refused(PermissionError, folder / "more"):
            ShardWriter(folder / "more")
        with without_rights(), refused(PermissionError, folder / "other-000000.tar.tmp"):
            write(folder, SAMPLES, prefix="other")
        folder.chmod(0o755)


def fail(data: bytes) -> None:
    raise KeyError("no such chunk")


def test_what_a_users_function_raises_tells_of_which_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of([("a.wav", b"1234")]))
    with pytest.raises(KeyError, match="no such chunk") as caught:
        LengthIndex.build(path, ["wav"], lambda field, data: fail(data))
    assert caught.value.__notes__ == [f"length= was called for {path}: group 'a', field 'wav'"]
    LengthIndex.build(path, ["wav"], lambda field, data: len(data)).save(f"{path}.ltx")
    with pytest.raises(KeyError, match="no such chunk") as caught:
        ShardDataset(path, decode={"wav": fail})[0]
    assert caught.value.__notes__ == [f"decode= was called with {path}: sample 'a', field 'wav'"]
    with refused(LengthError, path, "sample 'a', field 'wav': the index says 4 steps, the shard holds a single value"):
        ShardDataset(path, decode={"wav": lambda data: 4})[0]


# --- what happens in mid-epoch

LENGTHS = (np.arange(300) * 37 % 61 + 1).tolist()


def tell(samples: Any) -> Any:
    """A batch's keys, and who has read it."""
    return [sample["__key__"] for sample in samples], os.getpid()


def by_place(folder: Path) -> tuple[LengthBucketBatchSampler, DataLoader]:
    dataset = ShardDataset(folder)
    sampler = LengthBucketBatchSampler(dataset.index, max_tokens=200, seed=3)
    return sampler, DataLoader(dataset, batch_sampler=sampler, collate_fn=tell, num_workers=2)


def in_turn(folder: Path) -> tuple[ShardStream, DataLoader]:
    stream = ShardStream(folder, collate_fn=tell, max_tokens=200, seed=3, window=80)
    return stream, DataLoader(stream, batch_size=None, num_workers=2)


def take_and_kill(loader: DataLoader, taken: list[Any]) -> None:
    """Take batches, and after the seventh kill its worker, once the others have read ahead and wait."""
    for keys, pid in loader:
        taken.append(keys)
        if len(taken) == 7:
            time.sleep(0.3)
            os.kill(pid, signal.SIGKILL)


@kills_workers
@pytest.mark.parametrize("make", [by_place, in_turn])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_a_killed_worker_the_rest_of_the_epoch_comes_once(
    tmp_path: Path, make: Callable[..., Any], layout: str
) -> None:
    write(tmp_path, tokens(LENGTHS), layout=layout, max_samples=50, block_size=20)
    source, loader = make(tmp_path)
    taken = []
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)"):
        take_and_kill(loader, taken)
    position = source.position(len(taken))
    assert 7 <= len(taken) < len(source)
    source, loader = make(tmp_path)
    source.seek(position)
    rest = [keys for keys, _ in loader]
    assert sorted(itertools.chain(*taken, *rest)) == sorted(f"k{index}" for index in range(300))


@pytest.mark.parametrize("make", [by_place, in_turn])
def test_an_error_in_a_worker_reaches_the_user_with_the_shards_name(tmp_path: Path, make: Callable[..., Any]) -> None:
    write(tmp_path, tokens(LENGTHS), max_samples=50, block_size=20)
    path = tmp_path / "shard-000003.tar"
    content = bytearray(path.read_bytes())
    content[offset_of(path, "payload")] ^= 1
    path.write_bytes(content)
    with refused(ValueError, path, "do not have the checksum in the index"):
        for _ in make(tmp_path)[1]:
            pass


def test_a_header_of_every_type_is_read_or_refused(tmp_path: Path) -> None:
    header, data = NEXT[0]
    for kind in range(256):
        path = tmp_path / f"{kind}.tar"
        path.write_bytes(sealed(header[:156] + bytes([kind]) + header[157:]) + data.ljust(BLOCK, b"\0") + END)
        if kind in b"\x0007":
            assert list(LengthIndex.build(path).keys) == ["a"]
        else:
            with refused(ValueError, path):
                LengthIndex.build(path)
