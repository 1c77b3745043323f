"""ShardWriter.rewrite: shards that users have, in blocks: the same keys and lengths, and nothing damaged passed on."""

import io
import os
import signal
import tarfile
import wave
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from corpora import LAYOUTS, assert_same, corpora, files, tokens, write
from faults import npy
from hypothesis import given
from hypothesis import strategies as st

from collate.errors import LengthError
from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.writing import source as rereading
from samplers.shards.writing.writer import ShardWriter


def wav(samples: Any) -> Any:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, "<i2").tobytes())
    return stream.getvalue()


def from_wav(data: Any) -> Any:
    with wave.open(io.BytesIO(data)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def steps_of_wav(field: Any, data: Any) -> Any:
    return len(from_wav(data))


def write_tar(path: Path, members: Any) -> Any:
    """A tar as users make it, with tarfile's own headers."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            tar.addfile(info, io.BytesIO(data))
    return path


def users_shards(folder: Path, shards: int = 3) -> Any:
    """Plain shards of arrays in odd memory orders, a class and a text."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        members = {}
        for place in range(4):
            key = f"s{shard}/u{place}"
            frames = np.arange(6 * (shard + place), dtype=">f4").reshape(-1, 2)
            members |= {f"{key}.frames.NPY": npy(np.asfortranarray(frames)), f"{key}.cls": b"%d" % place}
            members |= {f"{key}.txt": f"maße {place}".encode(), f"{key}.pkl": b"never read"}
        write_tar(folder / f"u-{shard}.tar", members)
    return folder


def as_utf8(data: Any) -> Any:
    return np.frombuffer(data, np.uint8)


def without_indexes(folder: Path) -> Any:
    for path in folder.glob("*.ltx"):
        path.unlink()
    return folder


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@given(corpus=corpora(), to=st.sampled_from(LAYOUTS))
def test_whatever_was_written_is_the_same_after_rewriting(
    tmp_path_factory: pytest.TempPathFactory, indexed: bool, layout: str, corpus: Any, to: Any
) -> None:
    samples, stack = corpus
    folder = tmp_path_factory.mktemp("corpus")
    write(folder / "a", samples, layout=layout, max_samples=3, stack=stack)
    if not indexed:
        without_indexes(folder / "a")
    index = ShardWriter.rewrite(folder / "b", folder / "a", layout=to, stack=stack)
    index.verify(checksums=True)
    for read, written in zip(ShardDataset(folder / "b"), samples, strict=True):
        assert_same(read, written)


@pytest.mark.parametrize("indexed", [True, False])
def test_users_shards_become_blocks_with_or_without_an_index(tmp_path: Path, indexed: bool) -> None:
    users_shards(tmp_path / "u")
    options = {"fields": ["frames", "cls", "txt"], "decode": {"txt": as_utf8}}
    if indexed:
        options["index"] = tmp_path / "u.ltx"
        for shard in (tmp_path / "u").iterdir():
            strip_pickles(shard)
        LengthIndex.build(tmp_path / "u", ["frames"], checksums=True).save(tmp_path / "u.ltx")
    for workers in (0, 2):
        index = ShardWriter.rewrite(tmp_path / f"b{workers}", tmp_path / "u", workers=workers, **options)
    assert files(tmp_path / "b0") == files(tmp_path / "b2")
    assert list(index.keys) == [f"s{shard}/u{place}" for shard in range(3) for place in range(4)]
    assert index.fields == ("frames", "txt")
    for row, sample in enumerate(ShardDataset(tmp_path / "b0")):
        shard, place = divmod(row, 4)
        assert list(sample) == ["__key__", "frames", "cls", "txt"]
        assert sample["frames"].tolist() == np.arange(6 * (shard + place)).reshape(-1, 2).tolist()
        assert (sample["frames"].dtype, sample["cls"].dtype, sample["cls"]) == (np.float32, np.int64, place)
        assert bytes(sample["txt"]).decode() == f"maße {place}"


def strip_pickles(shard: Any) -> None:
    with tarfile.open(shard) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar if not m.name.endswith("pkl")}
    write_tar(shard, members)


def test_other_encodings_are_decoded_by_the_user_and_checked(tmp_path: Path) -> None:
    sounds = {f"s{n}": np.arange(n) - 3 for n in (5, 0, 9)}
    write_tar(tmp_path / "u.tar", {f"{key}.wav": wav(sound) for key, sound in sounds.items()})
    LengthIndex.build(tmp_path / "u.tar", ["wav"], steps_of_wav).save(tmp_path / "u.tar.ltx")
    index = ShardWriter.rewrite(tmp_path / "b", tmp_path / "u.tar", decode={"wav": from_wav})
    assert index.lengths.tolist() == [5, 0, 9]
    for sample, (key, sound) in zip(ShardDataset(tmp_path / "b"), sounds.items(), strict=True):
        assert_same(sample, {"__key__": key, "wav": sound.astype("<i2")})
    LengthIndex.build(tmp_path / "u.tar", ["wav"], lambda field, data: 5).save(tmp_path / "u.tar.ltx")
    with pytest.raises(RuntimeError, match=r"sample 's0', field 'wav': the index says 5 steps, the shard 0"):
        ShardWriter.rewrite(tmp_path / "c", tmp_path / "u.tar", decode={"wav": from_wav})


def test_what_is_not_as_the_index_says_is_not_passed_on(tmp_path: Path) -> None:
    write(tmp_path / "a", tokens([3, 200, 5]), layout="plain", max_samples=2)
    shard = tmp_path / "a" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    place = LengthIndex.open(tmp_path / "a" / "shard.ltx")._tables.offsets[1, 0]
    content[place + 1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        RuntimeError, match=r"000000.tar.*sample 'k1', field 'tokens', at offset \d+: the bytes do not h"
    ):
        ShardWriter.rewrite(tmp_path / "b", tmp_path / "a")
    lengths = LengthIndex.build(tmp_path / "a")
    shorter = lengths._tables.lengths.copy()
    shorter[1] -= 1
    object.__setattr__(lengths._tables, "lengths", shorter)
    with pytest.raises(
        RuntimeError, match="sample 'k1', field 'tokens': the index says 199 steps, the shard 200"
    ) as told:
        ShardWriter.rewrite(tmp_path / "c", tmp_path / "a", lengths)
    assert isinstance(told.value.__cause__, LengthError)
    assert [name for name in files(tmp_path / "c") if not name.startswith("shard-000001")] == []
    shard.unlink()
    with pytest.raises(RuntimeError, match=r"no shard .*shard-000000.tar, which the index lists"):
        ShardWriter.rewrite(tmp_path / "d", tmp_path / "a" / "shard.ltx")


def test_an_index_of_some_shards_only_is_no_index(tmp_path: Path) -> None:
    write(tmp_path / "a", tokens([3, 2]), max_samples=1)
    (tmp_path / "a" / "shard.ltx").unlink()
    (tmp_path / "a" / "shard-000001.tar.ltx").unlink()
    with pytest.raises(FileNotFoundError, match=r"no index .*shard-000001.tar.ltx: build it with"):
        ShardWriter.rewrite(tmp_path / "b", tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"no index .*gone.ltx"):
        ShardWriter.rewrite(tmp_path / "b", tmp_path / "a", tmp_path / "gone.ltx")


def by_shard(shard: Any, key: str) -> Any:
    return f"{Path(shard).name}/{key}"


def test_keys_that_are_unique_in_their_shard_alone_can_be_renamed(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {f"{place}.x.npy": npy(np.arange(place)) for place in range(3)})
    with pytest.raises(ValueError, match=r"'0' is in .*-000000-000000.tar and .*-000001-000000.tar"):
        ShardWriter.rewrite(tmp_path / "c", tmp_path)
    index = ShardWriter.rewrite(tmp_path / "d", tmp_path / "{a,b}.tar", rename=by_shard, workers=2)
    assert list(index.keys) == [f"{name}.tar/{place}" for name in "ab" for place in range(3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "u-0.tar.*'pkl' is a pickle, which can run any program"),
        ({"fields": ["frames", "txt"]}, r"u-0.tar.*'s0/u0', field 'txt': is str: give decode=\{'txt': a function from"),
        ({"fields": ["frames", "other"]}, r"u-0.tar.*no field 'other', there are \['frames'\]"),
        (
            {"fields": ["frames"], "decode": {"wav": from_wav}},
            r"u-0.tar: sample 's0/u0': no field 'wav' to decode, the",
        ),
        ({"fields": ["cls"]}, r"u-0.tar.*at least one field must be a sequence \[L, \*F\], got \['cls'\]"),
    ],
)
def test_what_cannot_be_rewritten_is_named_by_shard_and_field(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    users_shards(tmp_path / "u")
    with pytest.raises(RuntimeError, match=message):
        ShardWriter.rewrite(tmp_path / "b", tmp_path / "u", **options)
    assert files(tmp_path / "b") == {}


def test_damaged_and_empty_shards_and_bad_requests_are_refused(tmp_path: Path) -> None:
    users_shards(tmp_path / "u", 1)
    shard = tmp_path / "u" / "u-0.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(RuntimeError, match=r"u-0.tar: at offset \d+: .*truncated"):
        ShardWriter.rewrite(tmp_path / "b", shard, fields=["frames"])
    write_tar(shard, {})
    with pytest.raises(RuntimeError, match="u-0.tar: holds no samples: members must be named KEY.SUFFIX"):
        ShardWriter.rewrite(tmp_path / "b", shard)
    with pytest.raises(TypeError, match="fields must be a list of names, got the string 'frames'"):
        ShardWriter.rewrite(tmp_path / "b", shard, fields="frames")
    with pytest.raises(ValueError, match="at least one shard"):
        ShardWriter.rewrite(tmp_path / "b", [])
    write(tmp_path / "c", tokens([1]))
    with pytest.raises(
        ValueError, match=r"shard-000000.tar would be read, and others of its prefix written: give anoth"
    ):
        ShardWriter.rewrite(tmp_path / "c", tmp_path / "c", append=True)
    ShardWriter.rewrite(tmp_path / "c", tmp_path / "c" / "shard.ltx", prefix="new", max_samples=1)
    assert LengthIndex.open(tmp_path / "c" / "new.ltx").lengths.tolist() == [1]


class KillOnce:
    """Decodes text; the process in which it first sees the third shard is killed."""

    def __init__(self, flag: Any) -> None:
        self.flag = flag

    def __call__(self, data: Any) -> Any:
        if data.endswith(b"3") and self.flag.with_suffix(".armed").exists() and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return as_utf8(data)


def test_a_killed_rewriting_goes_on(tmp_path: Path) -> None:
    users_shards(tmp_path / "u")
    decode = {"txt": KillOnce(tmp_path / "flag")}
    options = {"fields": ["frames", "txt"], "decode": decode, "max_samples": 2}
    whole = ShardWriter.rewrite(tmp_path / "a", tmp_path / "u", **options)
    (tmp_path / "flag.armed").touch()
    with pytest.raises(
        RuntimeError, match=r"part \d, ShardSlice\(shard='.*u-\d.tar.*its process was killed by SIGKILL"
    ):
        ShardWriter.rewrite(tmp_path / "b", tmp_path / "u", workers=2, **options)
    assert not list((tmp_path / "b").glob("*.tmp"))
    index = ShardWriter.rewrite(tmp_path / "b", tmp_path / "u", workers=2, append=True, **options)
    assert index.fingerprint == whole.fingerprint
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_remote_shards_are_rewritten_too(tmp_path: Path) -> None:
    users_shards(tmp_path / "u", 1)
    url = "memory://users/u-0.tar"
    fsspec.filesystem("memory").pipe(url, (tmp_path / "u" / "u-0.tar").read_bytes())
    index = ShardWriter.rewrite(tmp_path / "b", url, fields=["frames"])
    assert index.lengths.tolist() == [0, 3, 6, 9]


@given(data=st.data())
def test_no_more_is_read_together_than_a_bound_and_a_sample(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    lengths = data.draw(st.lists(st.integers(0, 3000), min_size=1, max_size=30))
    layout = data.draw(st.sampled_from(LAYOUTS))
    folder = write(tmp_path_factory.mktemp("c"), tokens(lengths), layout=layout)
    tables = LengthIndex.open(folder / "shard.ltx")._tables
    bound = data.draw(st.integers(1, 40_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rereading, "_BYTES_AT_ONCE", bound)
        runs = list(rereading._sample_runs(tables, rereading.ShardSlice("x", 0, len(lengths))))
        ShardWriter.rewrite(folder / "b", folder)
    assert [row for first, last in runs for row in range(first, last)] == list(range(len(lengths)))
    for first, last in runs:
        sizes = [8 * length for length in lengths[first:last]]
        assert sum(sizes) - max(sizes) <= bound
    assert (folder / "b" / "shard-000000-000000.tar").exists()
