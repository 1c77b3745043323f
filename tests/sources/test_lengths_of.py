"""`lengths_of`: the lengths of rows are those of the values, whatever form the data has, and only offsets are read."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from samplers import LengthBucketBatchSampler, lengths_of
from samplers.cli.commands import main

LISTS = {
    "list": pa.list_(pa.int32()),
    "large_list": pa.large_list(pa.int16()),
    "list_view": pa.list_view(pa.int32()),
    "large_list_view": pa.large_list_view(pa.int8()),
}
ROWS = [{"tokens": list(range(n)), "count": n, "text": "é" * n, "label": n % 2} for n in (3, 0, 7, 2, 5)]
LENGTHS = [3, 0, 7, 2, 5]


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="lengthtrack")
    assert result.exit_code == status, result.output
    return result


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    kind=st.sampled_from(sorted(LISTS)),
    cut=st.integers(0, 30),
    start=st.integers(0, 30),
    stop=st.integers(0, 30),
)
def test_lists_of_any_kind_chunked_and_sliced(lengths: list[int], kind: str, cut: int, start: int, stop: int) -> None:
    values = [list(range(length)) for length in lengths]
    column = pa.chunked_array([pa.array(part, LISTS[kind]) for part in (values[:cut], values[cut:])])
    for table in (pa.table({"x": column}), pa.table({"x": column}).slice(start, stop)):
        expected = [len(row) for row in table.column("x").to_pylist()]
        assert lengths_of(table, "x").tolist() == lengths_of(table).tolist() == expected
        assert lengths_of(table.column("x")).tolist() == expected


@given(
    lengths=st.lists(st.integers(0, 5), min_size=2, max_size=20),
    steps=st.lists(st.sampled_from(["shuffle", "filter", "select", "concatenate", "flatten"]), max_size=4),
)
def test_a_dataset_keeps_its_order_after_whatever_was_done_to_it(lengths: list[int], steps: list[str]) -> None:
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list([{"x": list(range(n)), "n": n} for n in lengths])
    for step in steps:
        if step == "shuffle":
            dataset = dataset.shuffle(seed=len(dataset))
        elif step == "filter":
            kept = dataset.filter(lambda n: n != 1, input_columns="n", keep_in_memory=True)
            dataset = kept if len(kept) else dataset
        elif step == "select":
            dataset = dataset.select(range(len(dataset) // 2, len(dataset)))
        elif step == "concatenate":
            dataset = datasets.concatenate_datasets([dataset, dataset.select(range(1))])
        else:
            dataset = dataset.flatten_indices()
    expected = [len(row) for row in dataset["x"]]
    assert lengths_of(dataset, "x").tolist() == lengths_of(dataset["x"]).tolist() == expected
    assert lengths_of(dataset, "n").tolist() == expected


def test_lists_of_one_size_structs_and_extension_types() -> None:
    fixed = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64(), 2))
    assert lengths_of(fixed).tolist() == [2, 2, 2]
    assert lengths_of(fixed.slice(1)).tolist() == [2, 2]
    nested = pa.table({"audio": pa.array([{"frames": [[1.0, 2.0]] * n} for n in LENGTHS])})
    assert lengths_of(nested, "audio.frames").tolist() == LENGTHS
    features = datasets.Features({"x": datasets.Array2D((None, 3), "float32")})
    frames = datasets.Dataset.from_dict({"x": [np.zeros((n, 3), "f4") for n in (2, 4)]}, features=features)
    assert lengths_of(frames, "x").tolist() == [2, 4]
    assert lengths_of(pa.RecordBatch.from_pydict({"x": [[1], []]}), "x").tolist() == [1, 0]
    assert lengths_of(pa.table({"x": pa.chunked_array([], pa.list_(pa.int8()))})).tolist() == []


def test_only_offsets_are_read() -> None:
    rows = 100_000
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * 100)
    column = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(100 * rows, np.int64)))
    dataset = datasets.Dataset(pa.table({"x": column})).select([2, 1, 0])
    pool = pa.proxy_memory_pool(pa.system_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert lengths_of(dataset, "x").tolist() == [100] * 3
    finally:
        pa.set_memory_pool(before)
    # The values take 80 MB, the lengths 0.4 MB.
    assert 0 < pool.max_memory() < 8_000_000


def test_null_is_named_where_it_counts() -> None:
    rows = [[1], None, [2, 3], None]
    with pytest.raises(ValueError, match="column 'x': row 1 is null, as are 2 of 4: leave such rows out"):
        lengths_of(pa.table({"x": pa.array(rows, pa.list_(pa.int8()))}), "x")
    dataset = datasets.Dataset.from_dict({"x": rows})
    with pytest.raises(ValueError, match="row 2 is null, as are 1 of 3"):
        lengths_of(dataset.select([0, 2, 3]), "x")
    # Null in a row that was filtered out is no error.
    assert lengths_of(dataset.select([2, 0]), "x").tolist() == [2, 1]
    # Null within a row is a value.
    assert lengths_of(pa.array([[1, None], []])).tolist() == [2, 0]


@pytest.mark.parametrize("source", ["dataset", "rows", "parquet", "jsonl"])
def test_text_needs_a_unit(tmp_path: Path, source: str) -> None:
    data: Any = {"dataset": datasets.Dataset.from_list(ROWS), "rows": ROWS}.get(source, str(tmp_path / f"a.{source}"))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(ValueError, match=r"tokenise it first, or say what counts: text='bytes' .*got None"):
        lengths_of(data, "text")
    assert lengths_of(data, "text", text="characters").tolist() == LENGTHS
    assert lengths_of(data, "text", text="bytes").tolist() == [2 * length for length in LENGTHS]
    assert lengths_of(data, "tokens").tolist() == lengths_of(data, "count").tolist() == LENGTHS


def test_without_a_column_the_lists_must_agree() -> None:
    same = {"input_ids": [[1], [2, 3]], "attention_mask": [[1], [1, 1]], "label": [0, 1]}
    assert lengths_of(datasets.Dataset.from_dict(same)).tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"'input_ids' and 'tags' differ in length, first in row 1 \(2 and 3\): name"):
        lengths_of(datasets.Dataset.from_dict(same | {"tags": [[1], [1, 2, 3]]}))
    with pytest.raises(ValueError, match=r"no column holds lists, there are \['label', 'text'\]: name the column"):
        lengths_of(datasets.Dataset.from_dict({"label": [1], "text": ["a"]}))


@pytest.mark.parametrize(
    ("data", "column", "error", "message"),
    [
        (
            datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
            None,
            TypeError,
            r"choose a split, .*\['train'\]",
        ),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "tokens", TypeError, "is a stream.*bucket_by_length"),
        (datasets.Dataset.from_list(ROWS), "nothing", ValueError, "no column 'nothing', there are"),
        (datasets.Dataset.from_list(ROWS), "tokens.x", ValueError, "no column 'tokens.x'"),
        (pa.array([1.5]), None, ValueError, "double has no length"),
        (object(), None, TypeError, "has no columns of lengths: give a Hugging Face dataset"),
        (ROWS, None, ValueError, "row 0 is a mapping: name the column"),
        (ROWS, "nothing", ValueError, "row 0 has no column 'nothing'"),
        ([[1], None], None, ValueError, "row 1: is null"),
        ([[1], {"a": 1}], None, ValueError, "row 1 is a mapping"),
        ("nothing.parquet", None, FileNotFoundError, "no file nothing.parquet"),
    ],
)
def test_what_has_no_lengths_is_refused(data: Any, column: str | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lengths_of(data, column)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same lengths in every form that `report` takes."""
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)
    lengths = np.array(LENGTHS)
    np.save("a.npy", lengths)
    pq.write_table(pa.Table.from_pylist(ROWS), "a.parquet", row_group_size=2)
    Path("parts").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), "parts/0.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[2:]), "parts/1.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    Path("a.jsonl").write_text(lines)
    Path("a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    datasets.Dataset.from_list(ROWS[::-1]).select(range(4, -1, -1)).save_to_disk("plain")
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk("splits")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(lengths), len(lengths) + 1)
    offsets = np.cumsum([0, *lengths[:-1]]) * 4
    documents = np.arange(len(lengths) + 1)
    Path("a.idx").write_bytes(head + lengths.astype("<i4").tobytes() + offsets.tobytes() + documents.tobytes())
    return tmp_path


SOURCES = ["a.npy", "a.parquet", "parts", "parts/*.parquet", "a.jsonl", "a.jsonl.gz", "plain", "splits", "a.idx"]


@pytest.mark.parametrize("source", SOURCES)
def test_report_is_the_same_from_every_form(files: Path, source: str) -> None:
    # Red: only shards, indexes and .npy were taken.
    expected = run("report", "a.npy", "--max-tokens", 9, "--json", "-").output
    figures = [json.loads(text) for text in (expected, run("report", source, "--max-tokens", 9, "--json", "-").output)]
    assert [each.pop("sources") for each in figures] == [["a.npy"], [source]]
    assert figures[0] == figures[1]
    if "*" not in source and source != "parts":
        assert lengths_of(source).tolist() == LENGTHS


def test_report_takes_columns_units_and_splits(files: Path) -> None:
    assert (
        "5 samples, lengths of tokens\n17 steps"
        in run("report", "splits", "--split", "train", "--fields", "tokens", "--max-tokens", 9).output
    )
    assert "34 steps" in run("report", "plain", "--fields", "text", "--text", "bytes", "--max-tokens", 20).output
    both = run("report", "a.parquet", "--fields", "tokens,count", "--max-tokens", 20).output
    assert "5 samples, lengths of tokens, count\n34 steps" in both
    with_two = run("report", "a.parquet", "a.jsonl", "--max-tokens", 9).output
    assert with_two.startswith("2 sources: 10 samples, lengths of tokens\n")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("plain --fields text", 1, "tokenise it first"),
        ("plain --fields nothing", 1, "no column 'nothing'"),
        ("splits --split valid", 1, "choose one with --split"),
        ("plain --split train", 1, "has no splits"),
        ("nothere", 1, "no file or folder nothere"),
        ("nothere*.parquet", 1, "no file matches nothere*.parquet"),
        ("short.idx", 1, "truncated"),
        ("a.idx old.idx", 1, "no index of a Megatron corpus"),
        ("a.parquet broken.parquet", 1, "damaged, or no Parquet file"),
        ("broken.jsonl", 1, "broken.jsonl, line 1: not JSON"),
        ("a.npy empty", 1, "empty has an index and others are tables: give one kind"),
        ("empty", 1, "no file matches empty/*.tar\n"),
        ("above", 1, f"no file matches above/*.tar: there are shards in {Path('above', 'wavs')}, name that folder"),
    ],
)
def test_report_says_what_is_wrong_with_a_source(files: Path, arguments: str, status: int, message: str) -> None:
    Path("short.idx").write_bytes(Path("a.idx").read_bytes()[:60])
    Path("old.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(100))
    Path("broken.parquet").write_bytes(b"PAR1" + bytes(100))
    Path("broken.jsonl").write_text("{")
    Path("empty").mkdir()
    Path("above/wavs").mkdir(parents=True)
    Path("above/wavs/a.tar").touch()
    result = run("report", *arguments.split(), "--max-tokens", 9, status=status)
    assert message in result.stderr


@pytest.mark.parametrize("command", ["index", "verify", "show --max-tokens 9"])
@pytest.mark.parametrize("folder", ["plain", "splits"])
def test_commands_of_shards_say_that_a_folder_is_a_dataset(files: Path, command: str, folder: str) -> None:
    result = run(*command.split(), folder, status=1)
    assert "holds a dataset of Hugging Face, which `lengthtrack report` and lengths_of read" in result.stderr


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (
            [[1, 2], [3]],
            ValueError,
            r"every sample must have as many, got sequences of several; .*lengths_of\(sequences\)",
        ),
        (np.zeros((10, 512), int), ValueError, r"K at most 64 fields, got \[10, 512\]; if these are the sequences"),
        (["ab", "c"], TypeError, "lengths must be integers, got <U2: if these are the sequences"),
        (datasets.Dataset.from_list(ROWS), TypeError, r"got a Dataset: give lengths_of\(dataset, column\)"),
        (datasets.Dataset.from_list(ROWS)["tokens"], ValueError, r"lengths_of\(sequences\), or lengths_of\(dataset"),
        ({"x": [1]}, TypeError, "got a dict: give lengths_of"),
        ([1.5], TypeError, "count whole steps"),
    ],
)
def test_sequences_in_place_of_lengths_are_refused(lengths: Any, error: type[Exception], message: str) -> None:
    # Red: "inhomogeneous shape" and "got object"; 512 steps counted as 512 fields.
    with pytest.raises(error, match=message):
        LengthBucketBatchSampler(lengths, max_tokens=9999)
