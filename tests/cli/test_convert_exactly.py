"""`lengthtrack convert` changes no number: each survives its cast, or the error names file, line, field and value."""

import gzip
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import run
from corpora import tokens, write
from hypothesis import given
from hypothesis import strategies as st

from samplers.cli.conversion.exact_numbers import cast_exactly
from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.storage.process_pool import ProcessKilledError

DTYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"]
EDGES = st.sampled_from([2**power + step for power in (11, 24, 53, 63) for step in (-1, 0, 1)])


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exactly(value: Any) -> Any:
    """A number with all its digits; infinities and NaN as they are called."""
    value = value.item()
    return Fraction(value) if np.isfinite(value) else str(value)


@given(st.data(), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_a_cast_gives_the_same_numbers_or_names_one_that_it_would_change(data: Any, before: Any, after: Any) -> None:
    before, after = np.dtype(before), np.dtype(after)
    if before.kind == "f":
        numbers = st.floats(width=8 * before.itemsize) | st.integers(-1000, 1000).map(float)
    elif before.kind == "b":
        numbers = st.booleans()
    else:
        least, most = np.iinfo(before).min, np.iinfo(before).max
        numbers = st.integers(least, most)
        numbers = numbers | EDGES.filter(lambda edge: edge <= most) if most >= 2**12 else numbers
    array = np.array(data.draw(st.lists(numbers, max_size=4)), before)
    with np.errstate(all="ignore"):
        cast = array.astype(after)
    # In Python's own numbers, which have no limits.
    changed = [number for number, other in zip(array, cast, strict=True) if exactly(number) != exactly(other)]
    if not changed:
        assert cast_exactly(array, after, "here").tobytes() == cast.tobytes()
        return
    with pytest.raises(ValueError, match="here: .* does not fit") as error:
        cast_exactly(array, after, "here")
    assert any(str(number.item()) in str(error.value) for number in changed)


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (
            '{"t": [1]}\n{"t": [16777217]}',
            ["--dtype", "t=float32"],
            "line 2, field 't': 16777217 does not fit float32",
        ),
        ('{"t": [0.5]}\n{"t": [9007199254740993]}', [], "line 2, field 't': 9007199254740993 does not fit float64"),
        ('{"t": [0.5, 9007199254740993]}', [], "line 1, field 't': 9007199254740993 does not fit float64"),
        ('{"t": [[0.5], [9007199254740993]]}', [], "line 1, field 't': 9007199254740993 does not fit float64"),
        ('{"t": [9223372036854775809, -1]}', [], "9223372036854775809 does not fit float64"),
        ('{"t": [18446744073709551616]}', [], "18446744073709551616, of more than 64 bits"),
        ('{"t": [0.1]}', ["--dtype", "t=float32"], "0.1 does not fit float32, in which it would be 0.1"),
        ('{"t": [1e39]}', ["--dtype", "t=float32", "--round", "t"], "1e+39 does not fit float32"),
        ('{"t": [true, 2]}', [], "line 1, field 't': mixes true or false with numbers"),
        ('{"t": [[true], [2]]}', [], "line 1, field 't': mixes true or false with numbers"),
        ('{"t": [2]}', ["--dtype", "t=bool"], "2 does not fit bool"),
        ('{"t": [1], "t": [2]}', [], "line 1: not JSON: 't' comes twice in one object"),
        ('{"t": [1e400]}', [], "line 1: not JSON: 1e400 is larger than any float64"),
        ('{"t": [9223372036854775808]}', ["--dtype", "t=int64"], "9223372036854775808 does not fit int64"),
        ('{"t": [1e30]}', ["--dtype", "t=int64"], "1e+30 does not fit int64"),
        ('{"t": [NaN]}', ["--dtype", "t=int64"], "nan does not fit int64"),
        ('{"t": "\\\\ud800"}', ["--text", "t"], "line 1, field 't': half a character"),
        ('{"t": [1], "id": 1}\n{"t": [1], "id": 1}', ["--key", "id"], "line 2: __key__ must be unique"),
    ],
)
def test_a_number_that_would_change_is_named_with_its_place(
    work: Path, lines: str, options: list[str], message: str
) -> None:
    Path("rows.jsonl").write_text(lines.replace("\\\\", "\\"))
    error = run("convert", "rows.jsonl", "out", *options, status=1).stderr
    assert message in error
    assert error.startswith("Error: rows.jsonl, line ")


def test_rounding_is_done_where_it_is_asked_for(work: Path) -> None:
    Path("rows.jsonl").write_text('{"t": [0.1, 16777217], "n": [1]}\n{"t": [], "n": [2]}\n')
    run("convert", "rows.jsonl", "out", "--dtype", "t=float32", "--round", "t")
    assert ShardDataset("out")[0]["t"].tolist() == np.array([0.1, 16777216], np.float32).tolist()
    assert ShardDataset("out")[0]["n"].dtype == np.int64


def test_lists_of_true_and_false_and_numbers_that_fit_are_converted(work: Path) -> None:
    rows = [
        {"b": [True, False], "f": [1, 0.5], "u": [2**64 - 1], "s": 16777216.0},
        {"b": [], "f": [2], "u": [], "s": 1.5},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("convert", "rows.jsonl", "out", "--dtype", "s=float32")
    first, second = ShardDataset("out").__getitems__([0, 1])
    assert [first[name].dtype.str for name in "bfus"] == ["|b1", "<f8", "<u8", "<f4"]
    assert (first["u"].tolist(), second["f"].tolist(), second["s"]) == ([2**64 - 1], [2.0], 1.5)


def test_a_damaged_file_is_named_with_the_line(work: Path) -> None:
    content = gzip.compress(b'{"t": [1]}\n' * 20_000 + bytes(range(256)) * 50)
    Path("cut.jsonl.gz").write_bytes(content[: len(content) // 2])
    assert (
        "Error: cut.jsonl.gz: damaged or cut short behind line " in run("convert", "cut.jsonl.gz", "a", status=1).stderr
    )
    Path("no.jsonl.gz").write_bytes(b"no gzip")
    assert "no.jsonl.gz: damaged or cut short behind line 0" in run("convert", "no.jsonl.gz", "b", status=1).stderr
    Path("latin.jsonl").write_bytes(b'{"t": [1]}\n{"t": [1], "n": "\xe9"}\n')
    assert "latin.jsonl, line 2: not UTF-8" in run("convert", "latin.jsonl", "c", status=1).stderr
    pq.write_table(pa.table({"t": [[n] * 50 for n in range(5000)]}), "bad.parquet")
    content = bytearray(Path("bad.parquet").read_bytes())
    content[100:2000] = bytes(1900)
    Path("bad.parquet").write_bytes(content)
    assert "bad.parquet: damaged, or no Parquet file" in run("convert", "bad.parquet", "d", status=1).stderr
    Path("short.parquet").write_bytes(content[:500])
    assert "short.parquet: damaged, or no Parquet file" in run("convert", "short.parquet", "e", status=1).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "convert rows.jsonl http://host/x",
        "report shards --max-tokens 99 --json s3://bucket/x.json",
        "report shards --max-tokens 99 --plot s3://bucket/x.png",
    ],
)
def test_a_url_is_refused_where_the_command_writes(work: Path, arguments: str) -> None:
    write(work / "shards", tokens([3]))
    Path("rows.jsonl").write_text('{"t": [1]}\n')
    status = 1 if "http" in arguments else 2
    message = "files are read, and not written" if "http" in arguments else "it must be a path on this machine"
    assert message in run(*arguments.split(), status=status).stderr
    assert sorted(path.name for path in work.iterdir()) == ["rows.jsonl", "shards"]


def test_an_index_goes_on_where_a_killed_one_left_its_file(work: Path) -> None:
    write(work / "shards", tokens([3]))
    Path("shards/shard.ltx.tmp").write_bytes(b"left behind")
    assert "unchanged" in run("index", "shards").output
    assert not Path("shards/shard.ltx.tmp").exists()


def test_a_killed_worker_is_one_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(work / "shards", tokens([3]))

    def build(*arguments: Any, **options: Any) -> None:
        raise ProcessKilledError("shard-000000.tar: its process was killed by SIGKILL; memory may have run out")

    monkeypatch.setattr(LengthIndex, "build", build)
    assert run("index", "shards", status=1).stderr.startswith("Error: shard-000000.tar: its process was killed")


def test_a_plot_leaves_out_windows_of_which_no_plan_is_made(work: Path) -> None:
    np.save("lengths.npy", np.random.default_rng(0).integers(1, 300, 150))
    # Of two windows the last step had too few rows for all replicas, and there was no figure.
    options = ["--max-tokens", 1024, "--replicas", 8, "--plot", "padding.png"]
    assert "budget use" in run("report", "lengths.npy", *options).output
    assert Path("padding.png").read_bytes().startswith(b"\x89PNG")
