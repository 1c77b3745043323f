"""The page of the format: a reader written from it, which knows nothing of the library, reads what the writer wrote."""

import json
import math
import re
import struct
import tarfile
import tempfile
import zlib
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from corpora import VERSIONS, corpora, tokens, write
from hypothesis import given

from samplers.shards.indexing.index import LengthIndex

Sample = dict[str, Any]
KINDS = [("plain", 1), ("blocks", 1), ("blocks", 2)]

NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


class Index:
    """What an index file says, by section "Indexes" of the page."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        magic, version, size, header_crc, arrays_crc = struct.unpack("<8sIIII", content[:24])
        assert magic == b"\x89LTX\r\n\x1a\n"
        start = -(-(24 + size) // 64) * 64
        assert crc32(content[24 : 24 + size]) == header_crc
        assert crc32(content[start:]) == arrays_crc
        header = json.loads(content[24 : 24 + size])
        assert set(header) - {"length_id"} == {"layout", "fields", "shards", "arrays"} | (
            {"keys"} if version == 2 else set()
        )
        self.length_id = header.get("length_id")
        self.layout, self.fields, self.shards = header["layout"], header["fields"], header["shards"]
        self.arrays = {name: _view(content, start, entry) for name, entry in header["arrays"].items()}
        self.paths = [path.parent / shard["path"] for shard in self.shards]
        self.version = version
        if version == 2:
            self._unpack(header["keys"])

    def _unpack(self, keys: dict[str, str]) -> None:
        """Make of the arrays of version 2 those of version 1."""
        prefix, alphabet = keys["prefix"].encode("latin-1"), keys["alphabet"].encode("latin-1")
        stored = self.arrays["keys"]
        if alphabet:
            pairs = [[alphabet[code] for byte in row for code in divmod(byte, 16)] for row in stored.tolist()]
            remainders = [bytes(row).rstrip(b"\0") for row in pairs]
        else:
            remainders = stored.tolist()
        self.arrays["keys"] = np.array([prefix + remainder for remainder in remainders])
        if "order" not in self.arrays:
            tracked = [field["tracked"] for field in self.fields if field["variable"]]
            totals = self.arrays["lengths"][:, tracked].sum(1).tolist()
            self.arrays["order"] = np.array(sorted(range(len(totals)), key=lambda number: -totals[number]))
        self.arrays["places"] = self._places()

    def _places(self) -> np.ndarray:
        if "offset_bases" in self.arrays:
            bases = self.arrays["offset_bases"]
            return bases[np.arange(len(self.arrays["keys"])) // 64] + self.arrays["offsets"]
        if "offsets" in self.arrays:
            return self.arrays["offsets"]
        places = np.empty((len(self.arrays["keys"]), len(self.fields)), np.int64)
        starts = [*self.arrays["blocks"][:, 0].tolist(), len(places)]
        variable = [field["name"] for field in self.fields if field["variable"]]
        for row, last in zip(self.arrays["blocks"].tolist(), starts[1:], strict=True):
            for column, field in enumerate(self.fields):
                place = row[1 + column] + 128
                for number in range(row[0], last):
                    places[number, column] = place
                    shape = list(field["shape"])
                    if field["variable"]:
                        shape.append(int(self.arrays["lengths"][number, variable.index(field["name"])]))
                    place += math.prod(shape) * np.dtype(field["dtype"]).itemsize
        return places

    def shard_of(self, number: int) -> int:
        ends = np.cumsum([shard["samples"] for shard in self.shards])
        return int(np.searchsorted(ends, number, side="right"))

    def bytes_of(self, number: int) -> list[bytes]:
        """What is stored of each field of a sample."""
        data = self.paths[self.shard_of(number)].read_bytes()
        lengths = iter(self.arrays["lengths"][number].tolist())
        stored = []
        for column, field in enumerate(self.fields):
            first = int(self.arrays["places"][number, column])
            if self.layout == "plain":
                size = int(self.arrays["sizes"][number, column])
            else:
                shape = [next(lengths), *field["shape"]] if field["variable"] else field["shape"]
                size = int(np.prod(shape)) * np.dtype(field["dtype"]).itemsize
            stored.append(data[first : first + size])
        return stored


def _view(content: bytes, start: int, entry: dict[str, Any]) -> np.ndarray:
    assert entry["offset"] % 64 == 0
    return np.ndarray(entry["shape"], entry["dtype"], content, start + entry["offset"])


def read_array(data: bytes) -> np.ndarray:
    """An array by section "Arrays"."""
    assert data[:6] == b"\x93NUMPY"
    width = 2 if data[6] == 1 else 4
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    text = data[8 + width : start].decode().strip().replace("'", '"').replace("(", "[").replace(")", "]")
    text = text.replace("False", "false").replace("True", "true").replace(",]", "]").replace(", }", "}")
    header = json.loads(text)
    array = np.ndarray(header["shape"], header["descr"], data, start)
    assert start + array.nbytes == len(data)
    return array


def read_groups(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """The groups of a shard, by section "Shards"."""
    groups: list[tuple[str, dict[str, bytes]]] = []
    with tarfile.open(path, "r:") as shard:
        for member in shard:
            key, suffix = NAME.match(member.name).groups()
            if not groups or groups[-1][0] != key:
                groups.append((key, {}))
            groups[-1][1][suffix.lower()] = shard.extractfile(member).read()
    return groups


def read_shard(path: Path) -> list[Sample]:
    """The samples of a shard of either layout."""
    groups = read_groups(path)
    if "block.keys.npy" in groups[0][1]:
        return [sample for _, members in groups for sample in read_block(members)]
    return [read_plain(key, members) for key, members in groups]


def read_plain(key: str, members: dict[str, bytes]) -> Sample:
    sample: Sample = {"__key__": key}
    for suffix, data in members.items():
        field, _, encoding = suffix.rpartition(".")
        sample[field] = read_array(data) if encoding == "npy" else np.array(int(data), np.int64)
    return sample


def read_block(members: dict[str, bytes]) -> list[Sample]:
    arrays = {suffix.removesuffix(".npy"): read_array(data) for suffix, data in members.items()}
    keys = arrays.pop("block.keys")
    names = zlib.decompress(keys.tobytes()).decode().split("\0") if keys.dtype == np.uint8 else keys.tolist()
    samples: list[Sample] = [{"__key__": key} for key in names]
    for field in [name for name in arrays if not name.endswith(".lengths")]:
        lengths = arrays.get(f"{field}.lengths")
        ends = np.arange(1, len(samples) + 1) if lengths is None else np.cumsum(lengths)
        for sample, first, last in zip(samples, [0, *ends], ends, strict=False):
            sample[field] = arrays[field][first] if lengths is None else arrays[field][first:last]
    return samples


def digest(path: Path) -> str:
    """A shard's digest, by section "Digests"."""
    summed, data, rest, group = blake2b(digest_size=8), path.read_bytes(), b"", None
    with tarfile.open(path, "r:") as shard:
        for member in shard:
            key, suffix = NAME.match(member.name).groups()
            content = data[member.offset_data : member.offset_data + member.size]
            summed.update(data[member.offset : member.offset_data] + content[:256])
            if key != group:
                summed.update(rest)
                rest, group = b"", key
            if suffix == "block.keys.npy" or suffix.endswith(".lengths.npy"):
                rest += content[256:]
    summed.update(rest)
    return summed.hexdigest()


def assert_equal(read: Sample, written: Sample) -> None:
    assert list(read) == list(written)
    assert read["__key__"] == written["__key__"]
    for name in read.keys() - {"__key__"}:
        value, expected = np.asarray(read[name]), np.asarray(written[name])
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape), name
        assert value.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize(("layout", "version"), KINDS)
@given(corpora())
def test_a_reader_written_from_the_page_reads_the_samples_and_their_index(
    layout: str, version: int, drawn: tuple[Any, ...]
) -> None:
    samples, stack = drawn
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), samples, layout=layout, stack=stack, max_samples=3, block_size=2, version=version)
        index = Index(Path(folder, "shard.ltx"))
        assert index.version == version
        read = [sample for path in index.paths for sample in read_shard(path)]
        assert len(read) == len(samples)
        for sample, written in zip(read, samples, strict=True):
            assert_equal(sample, written)
        assert_index_tells(index, samples, layout)
        for number, path in enumerate(index.paths):
            assert_index_tells(Index(Path(f"{path}.ltx")), samples[3 * number : 3 * number + 3], layout)


def assert_index_tells(index: Index, samples: list[Sample], layout: str) -> None:
    """The index has the samples' keys and lengths, and leads to their bytes, which have its checksums."""
    assert index.layout == layout
    assert [key.decode() for key in index.arrays["keys"].tolist()] == [sample["__key__"] for sample in samples]
    variable = [field["name"] for field in index.fields if field["variable"]]
    assert index.arrays["lengths"].tolist() == [[len(sample[name]) for name in variable] for sample in samples]
    for number, sample in enumerate(samples):
        stored = index.bytes_of(number)
        assert list(map(crc32, stored)) == index.arrays["crcs"][number].tolist()
        for field, data in zip(index.fields, stored, strict=True):
            expected = np.asarray(sample[field["name"]])
            if layout == "blocks":
                assert data == expected.tobytes()
            elif field["suffix"].endswith(".npy"):
                assert read_array(data).tobytes() == expected.tobytes()
            else:
                assert int(data) == expected


@pytest.mark.parametrize(("layout", "version"), KINDS)
@pytest.mark.parametrize("lengths", [[3, 0, 7, 2, 7], [300, 1] * 120], ids=["short", "long"])
def test_digests_fingerprints_order_and_blocks_are_what_the_page_says(
    tmp_path: Path, layout: str, version: int, lengths: list[int]
) -> None:
    write(tmp_path, tokens(lengths), layout=layout, max_samples=170, block_size=80, version=version)
    index = Index(tmp_path / "shard.ltx")
    table, keys, first = index.arrays["lengths"], index.arrays["keys"], 0
    for path, shard in zip(index.paths, index.shards, strict=True):
        last = first + shard["samples"]
        text = table[first:last].astype("<i8").tobytes() + b"\0".join(keys[first:last].tolist())
        assert shard["fingerprint"] == blake2b(text, digest_size=8).hexdigest()
        assert (shard["size"], shard["digest"]) == (path.stat().st_size, digest(path))
        first = last
    assert index.arrays["order"].tolist() == sorted(range(len(lengths)), key=lambda number: -lengths[number])
    text = "\n".join(["tokens", *(shard["fingerprint"] for shard in index.shards)])
    corpus = blake2b(text.encode(), digest_size=8).hexdigest()
    assert corpus == LengthIndex.open(tmp_path / "shard.ltx").fingerprint
    assert ("sizes" in index.arrays, "blocks" in index.arrays) == (layout == "plain", layout == "blocks")


def test_an_index_says_which_function_measured_its_lengths_if_one_did(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 0]), layout="plain")
    assert Index(tmp_path / "shard.ltx").length_id is None
    # A number as text, which has no axis.
    shard = tmp_path / "shard-000000.tar"
    for options, expected in (({}, r"<lambda>:[0-9a-f]{16}"), ({"length_id": "digits"}, "digits")):
        LengthIndex.build(shard, ["label"], lambda field, data: len(data), **options).save(tmp_path / "digits.ltx")
        index = Index(tmp_path / "digits.ltx")
        assert re.fullmatch(expected, index.length_id)
        assert index.arrays["lengths"].tolist() == [[1], [1]]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_rows_of_blocks_lead_to_the_arrays_of_each_block(tmp_path: Path, version: int) -> None:
    lengths = [3, 0, 7, 2, 7]
    write(tmp_path, tokens(lengths), max_samples=3, block_size=2, version=version)
    index = Index(tmp_path / "shard.ltx")
    assert [field["name"] for field in index.fields] == ["tokens", "label"]
    starts = [*index.arrays["blocks"][:, 0].tolist(), len(lengths)]
    assert starts == [0, 2, 3, 5]
    for row, last in zip(index.arrays["blocks"].tolist(), starts[1:], strict=True):
        first, tokens_at, label_at, lengths_at = row
        data, steps = index.paths[index.shard_of(first)].read_bytes(), lengths[first:last]
        # The writer's headers of arrays have 128 bytes.
        stored = {1: 4, 2: 1}[version] * len(steps)
        assert read_array(data[lengths_at : lengths_at + 128 + stored]).tolist() == steps
        assert read_array(data[label_at : label_at + 128 + 8 * len(steps)]).tolist() == [*range(first, last)]
        assert len(read_array(data[tokens_at : tokens_at + 128 + 8 * sum(steps)])) == sum(steps)
