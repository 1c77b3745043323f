"""What shards are called: braces as webdataset reads them, folders of any name, each shard once; no URL written."""

from pathlib import Path
from typing import Any

import pytest
from braceexpand import braceexpand
from corpora import tokens, write
from hypothesis import given
from hypothesis import strategies as st

from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.storage.paths import expand_braces, expand_shards
from samplers.shards.writing.writer import ShardWriter

RANGES = st.sampled_from(
    [
        *(
            "{1..3}",
            "{3..1}",
            "{0..6..2}",
            "{6..0..-4}",
            "{007..10}",
            "{-01..2}",
            "{2..-10..5}",
            "{0..0}",
            "{-0..1..0}",
        ),
        *("{a..e}", "{e..a..2}", "{Y..b}", "{b..A..7}", "{1..c}", "{1..2..}", "{..}", "{}", "{x}", "{{1..2}}"),
    ]
)
# An escaped backslash is a backslash; braceexpand takes the escapes of `{\\0}` away twice.
PLAIN = st.text("ab01.,-/\\", max_size=4).filter(lambda text: not text.endswith("\\") and "\\\\" not in text)


def nested(inner: Any) -> Any:
    parts = st.lists(inner, min_size=1, max_size=3).map(",".join)
    return st.one_of(st.lists(inner, min_size=1, max_size=3).map("".join), parts.map(lambda text: f"{{{text}}}"))


PATTERNS = st.recursive(st.one_of(PLAIN, RANGES, st.just("\\{"), st.just("\\}")), nested, max_leaves=8)


@given(PATTERNS)
def test_braces_mean_what_they_mean_to_webdataset(pattern: str) -> None:
    assert expand_braces(pattern) == list(braceexpand(pattern))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x-{a{1..2},b}.tar", ["x-a1.tar", "x-a2.tar", "x-b.tar"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..6..2}", ["0", "2", "4", "6"]),
        ("run{1}/x.tar", ["run{1}/x.tar"]),
        ("s3://b/{a,b}-{9..10}.tar", ["s3://b/a-9.tar", "s3://b/a-10.tar", "s3://b/b-9.tar", "s3://b/b-10.tar"]),
    ],
)
def test_braces_may_go_down_in_steps_and_one_in_another(pattern: str, names: list[str]) -> None:
    # All but the last came out otherwise before.
    assert expand_shards(pattern) == names


@pytest.mark.parametrize("pattern", ["{a", "a}", "{a,{b}", "{1..2}}"])
def test_braces_that_do_not_match_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="braces do not match"):
        expand_shards(pattern)


def test_patterns_are_spelt_out_in_order(tmp_path: Path) -> None:
    assert expand_shards("s3://b/{a,b}-{9..11}.tar") == [f"s3://b/{c}-{n}.tar" for c in "ab" for n in (9, 10, 11)]
    assert expand_shards(["x.tar", "y-{00..01}.tar"]) == ["x.tar", "y-00.tar", "y-01.tar"]
    for name in ("b.tar", "a.tar", "odd[1].tar", "a.tar.ltx"):
        (tmp_path / name).touch()
    assert expand_shards(tmp_path / "[ab].tar") == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert expand_shards(tmp_path / "odd[1].tar") == [str(tmp_path / "odd[1].tar")]
    assert expand_shards(tmp_path) == [str(tmp_path / name) for name in ("a.tar", "b.tar", "odd[1].tar")]


def test_a_shard_that_is_named_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tokens([3, 1]), max_samples=1)
    first = tmp_path / "shard-000000.tar"
    monkeypatch.chdir(tmp_path)
    doubled = [
        [first, tmp_path / "*.tar"],
        [tmp_path, first],
        ["shard-000000.tar", first],
        ["./shard-000000.tar", "../" + tmp_path.name + "/shard-000000.tar"],
        "{shard-000000,shard-000000}.tar",
        ["http://host/a.tar", "http://host/{a,b}.tar"],
    ]
    for shards in doubled:
        for read in (expand_shards, LengthIndex.build, ShardDataset):
            with pytest.raises(ValueError, match=r"named twice, by .*: name each shard once"):
                read(shards)
    index = LengthIndex.build(tmp_path)
    with pytest.raises(ValueError, match=r"shard-000000.tar is named twice"):
        LengthIndex.concat([index, LengthIndex.build(first)])
    assert LengthIndex.build([first, "shard-000001.tar"]).lengths.tolist() == [3, 1]


@pytest.mark.parametrize("name", ["run[1]", "run{1}", "run{1,2}", "run{1", "run*"])
def test_a_folder_may_have_brackets_and_braces_in_its_name(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / name, tokens([3, 1, 2]), max_samples=1)
    paths = sorted(map(str, folder.glob("*.tar")))
    for shards in (folder, str(folder), paths, map(Path, paths)):
        index = LengthIndex.build(shards)
        assert index.shards == paths
        assert len(ShardDataset(index.shards, index)) == 3
    if name in {"run[1]", "run{1}"}:
        assert expand_shards(folder / "shard-{000000..000001}.tar") == paths[:2]
        assert expand_shards(folder / "*-00000[12].tar") == paths[1:]


@pytest.mark.parametrize("url", ["http://host/x", "simplecache::s3://b/x"])
def test_a_url_is_not_taken_for_a_folder_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    source = write(tmp_path / "source", tokens([3]))
    monkeypatch.chdir(tmp_path)
    index = LengthIndex.build(source)
    writes = [
        lambda: ShardWriter(url),
        lambda: ShardWriter(url, append=True),
        lambda: ShardWriter.write_parts(url, lambda part: tokens([part]), [1]),
        lambda: ShardWriter.rewrite(url, source),
        lambda: index.save(url),
        lambda: LengthIndex.build(source, resume=url),
    ]
    for attempt in writes:
        with pytest.raises(ValueError, match="files are read, and not written"):
            attempt()
    for shortened in ("s3://bucket/x", "memory://x", "http://host/x"):
        # `Path` makes one slash of two.
        with pytest.raises(ValueError, match="must be a path on this machine"):
            ShardWriter(Path(shortened))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_url_is_a_path_to_writers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(f"file://{tmp_path}/a", tokens([3, 1]))
    LengthIndex.build(tmp_path / "a").save(f"file://{tmp_path}/a.ltx")
    assert LengthIndex.open("a.ltx").lengths.tolist() == [3, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.ltx"]
