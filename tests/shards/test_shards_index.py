"""LengthIndex: built from tars alone it equals the writer's, and what is stale, foreign or damaged is refused."""

import json
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from corpora import LAYOUTS, VERSIONS, corpora, is_mapped, tokens, write
from hypothesis import given
from hypothesis import strategies as st

from samplers.shards.indexing.index import LengthIndex


def sequences_of(samples: Any, stack: Any) -> Any:
    """The variable-length fields of these samples, in order."""
    return [name for name, value in samples[0].items() if name not in {"__key__", *stack} and np.ndim(value)]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(corpus=corpora(), block_size=st.integers(1, 4), max_samples=st.integers(1, 5))
def test_an_index_built_from_tars_alone_is_the_writers_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, layout: str, corpus: Any, block_size: Any, max_samples: Any
) -> None:
    samples, stack = corpus
    if not sequences_of(samples, stack):
        return
    folder = tmp_path_factory.mktemp("corpus")
    write(folder, samples, layout=layout, block_size=block_size, max_samples=max_samples, stack=stack)
    written = (folder / "shard.ltx").read_bytes()
    # In the plain layout an array of fixed size looks like a sequence.
    built = LengthIndex.build(folder, sequences_of(samples, stack), checksums=True)
    built.save(folder / "shard.ltx")
    assert (folder / "shard.ltx").read_bytes() == written
    for shard in folder.glob("*.tar"):
        beside = shard.with_name(shard.name + ".ltx")
        before = beside.read_bytes()
        LengthIndex.build(shard, sequences_of(samples, stack), checksums=True).save(beside)
        assert beside.read_bytes() == before


@pytest.mark.parametrize("layout", LAYOUTS)
@given(corpus=corpora())
def test_lengths_keys_order_and_checksums_are_those_of_the_samples(
    tmp_path_factory: pytest.TempPathFactory, layout: str, corpus: Any
) -> None:
    samples, stack = corpus
    folder = write(tmp_path_factory.mktemp("corpus"), samples, layout=layout, max_samples=3, stack=stack)
    index = LengthIndex.open(folder / "shard.ltx")
    names = sequences_of(samples, stack)
    expected = np.array([[len(sample[name]) for name in names] for sample in samples])
    assert index.fields == tuple(names)
    assert len(index) == len(samples)
    assert list(index.keys) == [sample["__key__"] for sample in samples]
    assert index.lengths.tolist() == (expected[:, 0] if len(names) == 1 else expected).tolist()
    totals = expected.sum(1)
    assert index.order.tolist() == sorted(range(len(samples)), key=lambda place: -totals[place])
    index.verify()
    index.verify(checksums=True)
    if layout == "blocks":
        crcs = [[crc32(np.asarray(s[f.name]).tobytes()) for f in index._tables.fields] for s in samples]
        assert index._tables.crcs.tolist() == crcs


@pytest.mark.parametrize(("version", "mapped"), [(1, True), (2, False)])
def test_an_opened_index_is_read_only_and_mapped_when_it_is_large(tmp_path: Path, version: int, mapped: bool) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, 60_000).tolist()
    write(tmp_path, [{"__key__": f"{i}", "x": np.zeros(n, np.uint8)} for i, n in enumerate(lengths)], version=version)
    index = LengthIndex.open(tmp_path / "shard.ltx")
    assert index.lengths.tolist() == lengths
    assert not index.lengths.flags.writeable
    # In version 2, the lengths of up to a million samples are stored narrow, and widened when they are opened.
    assert is_mapped(index.lengths) == mapped
    # A worker gets the file's name, not its content.
    sent = pickle.dumps(index)
    assert len(sent) < 1000
    assert pickle.loads(sent).lengths.tolist() == lengths


def test_concat_is_the_corpus_of_all_shards(tmp_path: Path) -> None:
    for part, layout in enumerate(["blocks", "blocks", "plain"]):
        write(tmp_path / f"{part}", tokens([part, 9, 0][: 3 - part], 10 * part), layout=layout, block_size=2)
    indexes = [LengthIndex.open(tmp_path / f"{part}" / "shard.ltx") for part in range(3)]
    both = LengthIndex.concat(indexes[:2])
    assert both.lengths.tolist() == [0, 9, 0, 1, 9]
    assert list(both.keys) == ["k0", "k1", "k2", "k10", "k11"]
    assert both.order.tolist() == [1, 4, 3, 0, 2]
    assert both._tables.blocks[:, 0].tolist() == [0, 2, 3]
    assert both.starts.tolist() == [0, 3, 5]
    assert list(both.keys[1:4]) == ["k1", "k2", "k10"]
    assert repr(both) == "LengthIndex(5 samples, 2 shards, fields=('tokens',))"
    both.verify(checksums=True)
    both.save(tmp_path / "both.ltx")
    again = LengthIndex.open(tmp_path / "both.ltx")
    assert (again.fingerprint, again.shards) == (both.fingerprint, both.shards)
    assert pickle.loads(pickle.dumps(both)).fingerprint == both.fingerprint
    with pytest.raises(ValueError, match=r"cannot be one corpus: plain of tokens.npy <i8 \[\] variable, label.cls"):
        LengthIndex.concat(indexes)
    with pytest.raises(ValueError, match="at least one"):
        LengthIndex.concat([])
    with pytest.raises(ValueError, match="indexed without checksums"):
        LengthIndex.concat([indexes[0], LengthIndex.build(tmp_path / "1")])


def test_a_fingerprint_is_of_keys_and_lengths_and_not_of_where_they_are(tmp_path: Path) -> None:
    samples = tokens([3, 1, 2])
    prints = {}
    for name, changed in {
        "same": samples,
        "again": samples,
        "length": tokens([3, 1, 3]),
        "order": [samples[1], samples[0], samples[2]],
        "key": [*samples[:2], samples[2] | {"__key__": "other"}],
        "values": [sample | {"label": 7} for sample in samples],
    }.items():
        prints[name] = LengthIndex.build(write(tmp_path / name, changed)).fingerprint
    assert prints["same"] == prints["again"] == prints["values"]
    assert len(set(prints.values())) == 4
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in prints.values())


def test_a_folder_can_be_moved_with_its_index(tmp_path: Path) -> None:
    write(tmp_path / "a", tokens([3, 1, 2]), max_samples=2)
    (tmp_path / "a").rename(tmp_path / "b")
    LengthIndex.open(tmp_path / "b" / "shard.ltx").verify(checksums=True)
    LengthIndex.open(tmp_path / "b" / "shard.ltx").save(tmp_path / "elsewhere.ltx")
    (tmp_path / "b").rename(tmp_path / "c")
    index = LengthIndex.open(tmp_path / "elsewhere.ltx")
    with pytest.raises(FileNotFoundError):
        index.verify()
    moved = index.moved_to(tmp_path / "c")
    moved.verify()
    assert pickle.loads(pickle.dumps(moved)).shards == moved.shards
    with pytest.raises(ValueError, match="the index is of 2 shards.* given are 1"):
        index.moved_to(tmp_path / "c" / "shard-000001.tar")


def test_one_field_of_several_can_be_tracked(tmp_path: Path) -> None:
    samples = [{"__key__": f"{n}", "x": np.zeros(n), "y": np.zeros(n + 1), "z": np.zeros(5)} for n in range(4)]
    for layout in LAYOUTS:
        folder = write(tmp_path / layout, samples, layout=layout)
        index = LengthIndex.build(folder, ["y"])
        index.save(folder / "y.ltx")
        for one in (index, LengthIndex.open(folder / "y.ltx")):
            assert (one.fields, one.lengths.tolist()) == (("y",), [1, 2, 3, 4])
            one.verify()
        pair = LengthIndex.build(folder, ["z", "y"])
        assert (pair.fields, pair.lengths.tolist()) == (("y", "z"), [[1, 5], [2, 5], [3, 5], [4, 5]])
        assert pair.fingerprint != index.fingerprint


def test_workers_and_a_bar_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, tokens(list(range(9))), max_samples=2)
    index = LengthIndex.build(tmp_path, workers=2, checksums=True, progress=True)
    assert "5/5" in capsys.readouterr().err
    index.save(tmp_path / "again.ltx")
    assert (tmp_path / "again.ltx").read_bytes() == (tmp_path / "shard.ltx").read_bytes()
    assert LengthIndex.build(tmp_path).lengths.tolist() == list(range(9))
    assert capsys.readouterr().err == ""


def test_verify_notices_an_index_file_damaged_after_it_was_opened(tmp_path: Path) -> None:
    path = write(tmp_path, tokens([3, 1])) / "shard.ltx"
    index = LengthIndex.open(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"shard.ltx: its checksum is wrong"):
        index.verify()


def test_a_replaced_index_is_noticed_by_those_who_use_it(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 1]))
    sent = pickle.dumps(LengthIndex.open(tmp_path / "shard.ltx"))
    write(tmp_path / "b", tokens([3, 2]))
    (tmp_path / "b" / "shard.ltx").replace(tmp_path / "shard.ltx")
    with pytest.raises(ValueError, match=r"shard.ltx: the index was replaced while it was in use"):
        pickle.loads(sent)


def test_other_keys_and_other_headers_are_a_changed_shard(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        folder = write(tmp_path / layout, tokens([3, 1]), layout=layout)
        path, index = folder / "shard-000000.tar", LengthIndex.open(folder / "shard.ltx")
        content = path.read_bytes()
        write(tmp_path / f"{layout}2", [s | {"__key__": f"x{s['__key__'][1:]}"} for s in tokens([3, 1])], layout=layout)
        path.write_bytes((tmp_path / f"{layout}2" / "shard-000000.tar").read_bytes())
        with pytest.raises(ValueError, match="changed since it was indexed: its layout, fields or keys are others"):
            index.verify()
        # Another owner, in a header that is sound.
        head = bytearray(content[:512])
        head[108:116] = b"0000007\0"
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        path.write_bytes(bytes(head) + content[512:])
        with pytest.raises(ValueError, match="changed since it was indexed: its headers are others"):
            index.verify(checksums=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_flipped_byte_of_a_shard_is_noticed(tmp_path: Path, layout: str) -> None:
    write(tmp_path, tokens([3, 20]), layout=layout)
    index = LengthIndex.open(tmp_path / "shard.ltx")
    path = tmp_path / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        # Between members lie zeros that nobody reads.
        used = [(m.offset, m.offset_data + m.size) for m in tar]
    for start, end in used:
        for place in range(start, end, 23):
            content[place] ^= 0x10
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"shard-000000.tar: "):
                index.verify(checksums=True)
            content[place] ^= 0x10
    path.write_bytes(content)
    index.verify(checksums=True)


def test_a_shard_that_grew_or_went_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 20]))
    index = LengthIndex.open(tmp_path / "shard.ltx")
    path = tmp_path / "shard-000000.tar"
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(
        ValueError, match=r"000.tar: changed since it was indexed: \d+ bytes, the index says \d+; build the"
    ):
        index.verify()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="shard-000000.tar"):
        index.verify()
    with pytest.raises(FileNotFoundError):
        LengthIndex.build(path)
    with pytest.raises(FileNotFoundError, match="no file matches .*nothing-"):
        LengthIndex.build(tmp_path / "nothing-*.tar")
    with pytest.raises(ValueError, match="at least one shard"):
        LengthIndex.build([])


def test_a_payload_can_only_be_verified_against_checksums(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 20]))
    index = LengthIndex.build(tmp_path)
    index.verify()
    with pytest.raises(ValueError, match="build it with checksums=True"):
        index.verify(checksums=True)


def test_a_damaged_payload_is_named_by_shard_key_and_field(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 200]))
    path = tmp_path / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    index = LengthIndex.open(tmp_path / "shard.ltx")
    content[index._tables.offsets[1, 0] + 1000] ^= 1
    path.write_bytes(content)
    index.verify()
    with pytest.raises(
        ValueError, match=r"shard-000000.tar: sample 'k1', field 'tokens', at offset \d+: the bytes do not"
    ):
        index.verify(checksums=True)


def rewritten(content: Any, change: Any) -> Any:
    """An index file whose header was changed, with checksums that fit."""
    size = int.from_bytes(content[12:16], "little")
    header = json.loads(content[24 : 24 + size])
    change(header)
    text = json.dumps(header).encode()
    fields = struct.pack("<II", len(text), crc32(text)) + content[20:24]
    return content[:12] + fields + text + bytes(-(24 + len(text)) % 64) + content[-(-(24 + size) // 64) * 64 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: b"", "too short: truncated"),
        (lambda c: c[:23], "too short: truncated"),
        (lambda c: c[:100], "its header is damaged or truncated"),
        (lambda c: c[:-1], "its checksum is wrong"),
        (lambda c: c + b"\0", "its checksum is wrong"),
        (lambda c: c.replace(b"\r\n", b"\n"), "no length index, or was sent as text"),
        (lambda c: b"PK" + c[2:], "no length index"),
        (lambda c: c[:8] + struct.pack("<I", 3) + c[12:], "has version 3, this program reads 1 and 2"),
        (lambda c: c[:12] + b"\xff\xff\xff\xff" + c[16:], "header is damaged"),
        (
            lambda c: rewritten(c, lambda h: h["arrays"].pop("order")),
            r"header is not valid \(KeyError\('order'",
        ),
        (lambda c: rewritten(c, lambda h: h["arrays"]["keys"].update(dtype="|O8")), "header is not valid"),
        (lambda c: rewritten(c, lambda h: h["arrays"]["lengths"].update(shape=[2**60])), "header is not valid"),
        (lambda c: rewritten(c, lambda h: h["arrays"]["lengths"].update(offset=2**40)), "header is not valid"),
        (lambda c: rewritten(c, lambda h: h["arrays"]["lengths"].update(offset=-(2**10))), "header is not valid"),
        (lambda c: rewritten(c, lambda h: h["shards"].append(h["shards"][0])), "header is not valid"),
        (lambda c: rewritten(c, lambda h: h["arrays"].pop("blocks")), "header is not valid"),
        (lambda c: rewritten(c, lambda h: h["fields"].pop()), "header is not valid"),
        (lambda c: rewritten(c, lambda h: h["fields"][0].update(other=1)), "header is not valid"),
        (lambda c: rewritten(c, lambda h: h["fields"][1].update(variable=True)), "header is not valid"),
        (lambda c: rewritten(c, lambda h: h.clear()), "header is not valid"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_an_index_file_that_is_not_whole_is_refused_by_name_and_reason(
    tmp_path: Path, damage: Callable[..., Any], message: str, version: int
) -> None:
    # In version 2 an index may do without the order.
    version = 1 if "order" in message else version
    path = write(tmp_path, tokens([3, 20]), version=version) / "shard.ltx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        LengthIndex.open(path)
    assert str(path) in str(caught.value)
    assert "build the index again" in str(caught.value)


@pytest.mark.parametrize("version", VERSIONS)
@given(data=st.data())
def test_every_flipped_bit_of_an_index_file_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: Any, version: int
) -> None:
    path = write(tmp_path_factory.mktemp("c"), tokens([3, 20]), version=version) / "shard.ltx"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[12:16], "little")
    gap = range(24 + size, -(-(24 + size) // 64) * 64)
    index = data.draw(st.integers(0, len(content) - 1).filter(lambda p: p not in gap))
    content[index] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="shard.ltx"):
        LengthIndex.open(path)


def test_another_program_can_read_the_file_by_its_description(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 0, 5], 7), max_samples=2, version=1)
    content = (tmp_path / "shard.ltx").read_bytes()
    magic, version, size, header_crc, content_crc = struct.unpack("<8sIIII", content[:24])
    start = -(-(24 + size) // 64) * 64
    assert (magic, version) == (b"\x89LTX\r\n\x1a\n", 1)
    assert (header_crc, content_crc) == (crc32(content[24 : 24 + size]), crc32(content[start:]))
    header = json.loads(content[24 : 24 + size])
    assert [shard["path"] for shard in header["shards"]] == ["shard-000000.tar", "shard-000001.tar"]
    arrays = {}
    for name, entry in header["arrays"].items():
        assert entry["offset"] % 64 == 0
        arrays[name] = np.frombuffer(content, entry["dtype"], int(np.prod(entry["shape"])), start + entry["offset"])
    assert arrays["lengths"].tolist() == [3, 0, 5]
    assert arrays["keys"].tolist() == [b"k7", b"k8", b"k9"]
    assert arrays["order"].tolist() == [2, 0, 1]
    shard = (tmp_path / "shard-000001.tar").read_bytes()
    index = arrays["places"].reshape(3, 2)[2, 0]
    assert np.frombuffer(shard, "<i8", 5, index).tolist() == [9000, 9001, 9002, 9003, 9004]
    assert crc32(shard[index : index + 40]) == arrays["crcs"].reshape(3, 2)[2, 0]


def test_saving_replaces_a_file_whole(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 1]))
    opened = LengthIndex.open(tmp_path / "shard.ltx")
    LengthIndex.build(tmp_path).save(tmp_path / "shard.ltx")
    assert opened.lengths.tolist() == [3, 1]
    with pytest.raises(ValueError, match="without checksums|checksums"):
        LengthIndex.open(tmp_path / "shard.ltx").verify(checksums=True)
    with pytest.raises(FileNotFoundError, match=r"no index .*absent.ltx: build it with"):
        LengthIndex.open(tmp_path / "absent.ltx")
    assert not list(tmp_path.glob("*.tmp"))
