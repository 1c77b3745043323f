"""`convert` resumes what was interrupted, to the same bytes; it makes tokens of text, and knows how much there is."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from samplers import LengthIndex, ShardDataset
from samplers.cli.commands import main
from samplers.cli.conversion.rows import count_input_rows

ROWS = [{"text": f"r{number} " + "é" * (number % 7), "y": number} for number in range(100)]
TOKENS = """
import os

def encode(text):
    if text.startswith(os.environ.get("STOP_AT", "none")):
        raise {"interrupt": KeyboardInterrupt, "error": RuntimeError}[os.environ["STOP_BY"]]
    return list(text.encode())

def other(text):
    return [1]

def as_mapping(text):
    return {"input_ids": [len(text)]}

def as_encoding(text):
    class Encoding:
        ids = [len(text)]
    return Encoding()

def wrong(text):
    return [1.5]
"""
OPTIONS = ("--text", "text", "--tokenizer", "tokens:encode", "--max-samples", "30")


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="lengthtrack")
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tokens.py").write_text(TOKENS)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def interrupt(monkeypatch: pytest.MonkeyPatch, *, by: str = "interrupt", at: str = "r70") -> str:
    """The error of a conversion that is stopped at a row."""
    with monkeypatch.context() as patch:
        patch.setenv("STOP_AT", at)
        patch.setenv("STOP_BY", by)
        arguments = ["convert", "a.jsonl", "out", *OPTIONS]
        return CliRunner().invoke(main, arguments, prog_name="lengthtrack").output


@pytest.mark.parametrize("by", ["interrupt", "error"])
def test_a_conversion_resumes_to_the_same_bytes(work: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    # Red: there was no way on, and "continue with append=True" was said to users of the command.
    printed = interrupt(monkeypatch, by=by)
    if by == "interrupt":
        assert printed == (
            "Error: interrupted: 2 shards in out are complete; the same command with --resume writes the remainder\n"
        )
    assert "give --resume and the same options" in run("convert", "a.jsonl", "out", *OPTIONS, status=1).stderr
    printed = run("convert", "a.jsonl", "out", *OPTIONS, "--resume").output
    assert printed == "out/shard.ltx: 100 samples in 4 shards, layout blocks\n"
    run("convert", "a.jsonl", "whole", *OPTIONS)
    names = sorted(path.name for path in Path("whole").iterdir())
    assert names == sorted(path.name for path in Path("out").iterdir())
    assert all(Path("out", name).read_bytes() == Path("whole", name).read_bytes() for name in names)
    assert "a finished corpus" in run("convert", "a.jsonl", "out", *OPTIONS, "--resume", status=1).stderr


def test_the_shards_of_an_unfinished_conversion_are_no_corpus(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red: `index` made a corpus of 60 of 100 samples, and nobody was told.
    interrupt(monkeypatch)
    for source in ("out", "out/*.tar"):
        message = run("index", source, "--output", "a.ltx", status=1).stderr
        assert "out holds an unfinished conversion, whose shards are a part of the samples" in message
    # Red: datasets, reports and checks took the part for the corpus.
    for command in (["report", "out", "--max-tokens", "99"], ["verify", "out"], ["show", "out", "--max-tokens", "99"]):
        assert "out holds an unfinished conversion" in run(*command, status=1).stderr
    for use in (ShardDataset, LengthIndex.build):
        for source in ("out", "out/*.tar"):
            with pytest.raises(ValueError, match="out holds an unfinished conversion.*convert --resume"):
                use(source)
    Path("out/shard.unfinished.json").unlink()
    assert "60 samples" in run("index", "out").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "tokens:other"], "has tokenizer 'encode:"),
        (["--layout", "plain"], "has layout 'blocks', now it is 'plain'"),
        (["--key", "y"], "has key None, now it is 'y'"),
        (["--dtype", "text=int64"], "has dtype"),
    ],
)
def test_only_the_same_conversion_resumes(
    work: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    interrupt(monkeypatch)
    assert message in run("convert", "a.jsonl", "out", *OPTIONS, "--resume", *arguments, status=1).stderr


def test_an_input_that_has_changed_does_not_resume(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch)
    with Path("a.jsonl").open("a") as file:
        file.write('{"text": "more", "y": 1}\n')
    assert "has a.jsonl" in run("convert", "a.jsonl", "out", *OPTIONS, "--resume", status=1).stderr
    # Of the same size, but with other keys.
    rows = [{"id": f"k{number:02}", "x": [number]} for number in range(40)]
    Path("b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "bad", "x": ["n"]}]))
    options = ("--key", "id", "--max-samples", "10")
    assert "line 41" in run("convert", "b.jsonl", "two", *options, status=1).stderr
    Path("b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[::-1], {"id": "bad", "x": ["n"]}]))
    message = run("convert", "b.jsonl", "two", *options, "--resume", status=1).stderr
    assert "line 1: has the key 'k39', the unfinished conversion 'k00' there" in message


def test_a_conversion_that_wrote_nothing_leaves_nothing_to_resume(work: Path) -> None:
    Path("bad.jsonl").write_text('{"x": ["a"]}\n')
    run("convert", "bad.jsonl", "out", status=1)
    assert not Path("out").exists()
    run("convert", "a.jsonl", "out", *OPTIONS, "--resume")


def test_dtypes_that_earlier_rows_decide_hold_after_a_resume(work: Path) -> None:
    rows: list[dict[str, Any]] = [{"x": [0.5]}, *({"x": [number]} for number in range(20)), {"x": ["bad"]}]
    Path("c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("convert", "c.jsonl", "out", "--max-samples", 5, status=1)
    text = Path("c.jsonl").read_text().replace('["bad"]', "[12345]")
    Path("c.jsonl").write_text(text)
    run("convert", "c.jsonl", "out", "--max-samples", 5, "--resume")
    data = ShardDataset("out")
    assert {data[row]["x"].dtype.name for row in range(len(data))} == {"float64"}


@pytest.mark.parametrize("name", ["encode", "as_mapping", "as_encoding"])
def test_a_function_makes_tokens_of_text(work: Path, name: str) -> None:
    run("convert", "a.jsonl", "out", "--text", "text", "--tokenizer", f"tokens:{name}")
    data = ShardDataset("out")
    expected = [list(row["text"].encode()) if name == "encode" else [len(row["text"])] for row in ROWS]
    assert [data[row]["text"].tolist() for row in range(100)] == expected
    assert data[0]["text"].dtype == np.int32


def test_a_file_of_hugging_face_makes_whole_tokens_of_text(work: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 5, "b": 6, "?": 7}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # Both are stored in the file, and would change the lengths.
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=4)
    Path("model").mkdir()
    tokenizer.save("model/tokenizer.json")
    Path("t.jsonl").write_text('{"text": "a b c"}\n{"text": ""}\n')
    for path in ("model", "model/tokenizer.json"):
        folder = f"out{len(path)}"
        run("convert", "t.jsonl", folder, "--text", "text", "--tokenizer", path, "--dtype", "text=int16")
        assert [ShardDataset(folder)[row]["text"].tolist() for row in range(2)] == [[5, 6, 7], []]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("--tokenizer tokens:encode", 2, "name them with --text"),
        ("--text text --tokenizer tokens:nothing", 2, "--tokenizer"),
        ("--text text --tokenizer nothing.json", 1, "no tokenizer nothing.json"),
        ("--text text --tokenizer bad.json", 1, "bad.json: no tokenizer of Hugging Face"),
        ("--text text --tokenizer tokens:wrong", 1, "line 1, field 'text': the tokenizer must give a list of integers"),
    ],
)
def test_a_tokenizer_that_is_none_is_refused(work: Path, arguments: str, status: int, message: str) -> None:
    Path("bad.json").write_text("{}")
    assert message in run("convert", "a.jsonl", "out", *arguments.split(), status=status).stderr


def test_the_number_of_rows_is_known_before_they_are_read(work: Path) -> None:
    datasets.disable_progress_bars()
    pq.write_table(pa.Table.from_pylist(ROWS), "a.parquet")
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk("dataset")
    Path("b.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    Path("parts").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[:7]), "parts/0.parquet")
    run("convert", "a.jsonl", "shards", *OPTIONS)
    counted = [count_input_rows([path], None) for path in ("a.jsonl", "a.parquet", "dataset", "parts", "shards")]
    assert counted == [100, 100, 100, 7, 100]
    assert count_input_rows(["a.jsonl", "a.parquet"]) == 200
    assert count_input_rows(["shards/shard.ltx"]) == 100
    assert count_input_rows(["a.jsonl", "b.jsonl.gz"]) is None


def test_a_conversion_that_fails_at_once_leaves_no_folder(work: Path) -> None:
    # Red before: an empty folder stayed, and `index` of it failed with another error.
    Path("bad.jsonl").write_text('{"x": [[1], [2, 3]]}\n')
    run("convert", "bad.jsonl", "new", status=1)
    assert not Path("new").exists()
    Path("old").mkdir()
    run("convert", "bad.jsonl", "old", status=1)
    assert list(Path("old").iterdir()) == []
