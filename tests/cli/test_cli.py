"""The `lengthtrack` command: every command on real shards, its numbers held against the library's, its errors."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import run
from corpora import assert_same, tokens, write

from samplers.cli.commands import main
from samplers.planning.mixtures.epochs import plan_epoch
from samplers.planning.options import Options
from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.find_index import find_index_files
from samplers.shards.indexing.index import LengthIndex
from samplers.sources.extras import load_extra

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(main.commands)
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(0, 600, 400).tolist()
ROWS = [
    {"id": f"r{place}", "input_ids": list(range(length)), "tokens": list(range(length)), "label": place}
    for place, length in enumerate([3, 0, 7, 2])
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the examples in the help name."""
    folder = tmp_path_factory.mktemp("work")
    write(folder / "shards", tokens(LENGTHS), max_samples=100)
    LengthIndex.build(folder / "shards", checksums=True).save(folder / "corpus.ltx")
    np.save(folder / "lengths.npy", np.array(LENGTHS))
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "data.parquet")
    dataset = datasets.Dataset.from_list([{"__key__": row["id"], "tokens": row["tokens"]} for row in ROWS])
    datasets.DatasetDict({"train": dataset}).save_to_disk(folder / "dataset")
    (folder / "sounds.py").write_text("def read_wav(data):\n    return data\n")
    (folder / "bytes_of.py").write_text("def encode(text):\n    return list(text.encode())\n")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in ["one", "three"]))
    (folder / "wavs").mkdir()
    with tarfile.open(folder / "wavs" / "a.tar", "w") as tar:
        tar.add(folder / "sounds.py", "a.wav")
    index = LengthIndex.build(folder / "wavs", ["wav"], lambda field, data: len(data))
    index.save(folder / "wavs" / "corpus.ltx")
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder for one test, as the working directory."""
    folder = shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def start(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "samplers.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(command, **pipes | options, text=True, check=False)


def examples(command: str) -> list[str]:
    found = re.findall(r"^ +(lengthtrack .+)$", run(command, "--help").output, re.MULTILINE)
    assert found, f"{command} --help has no examples"
    return found


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def samples_of(folder: Path) -> list[dict[str, object]]:
    dataset = ShardDataset(folder)
    return dataset.__getitems__(range(len(dataset)))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_can_be_pasted(command: str, work: Path) -> None:
    for example in examples(command):
        run(*shlex.split(example)[1:])


def test_the_entry_point_is_the_command() -> None:
    module, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["lengthtrack"].split(":")
    assert getattr(import_module(module), name) is main


def test_importing_the_library_loads_nothing_of_the_command() -> None:
    code = "import collate, samplers, sys; print({'click', 'matplotlib', 'pyarrow', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_an_extra_that_is_missing_is_named_with_its_command() -> None:
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'lengthtrack[plots]'")):
        load_extra("a_module_that_is_not_there", "plots")


@pytest.mark.parametrize("workers", [0, 2])
def test_index_is_what_build_makes(work: Path, workers: int) -> None:
    output = run("index", "shards/*.tar", "--output", "new.ltx", "--workers", workers).output
    assert output == "new.ltx: built, 400 samples in 4 shards, lengths of tokens\n"
    new, built = LengthIndex.open("new.ltx"), LengthIndex.build("shards")
    assert (new.fingerprint, new._tables.crcs) == (built.fingerprint, None)


def test_index_of_a_folder_refreshes_the_index_that_is_there(work: Path) -> None:
    assert "unchanged" in run("index", "shards").output
    assert find_index_files("shards") == ["shards/shard.ltx"]
    write(work / "more", tokens([5, 6], first=1000), prefix="zzz")
    shutil.copy(work / "more/zzz-000000.tar", work / "shards")
    assert "shards/shard.ltx: refreshed, 402 samples in 5 shards" in run("index", "shards").output
    # The writer's index has checksums, and a refreshed one keeps them.
    assert LengthIndex.open("shards/shard.ltx")._tables.crcs is not None
    assert run("verify", "shards").output.rstrip().endswith("all agree")


def test_index_of_a_folder_without_one_is_its_corpus_file(work: Path) -> None:
    for file in (work / "shards").glob("*.ltx"):
        file.unlink()
    assert run("index", "shards").output.startswith("shards/corpus.ltx: built")
    run("verify", "shards", "--quick")


def test_a_damaged_index_is_built_anew_and_says_so(work: Path) -> None:
    (work / "corpus.ltx").write_bytes(b"no index")
    result = run("index", "shards", "--output", "corpus.ltx")
    assert "built from the options alone" in result.stderr
    assert ": built" in result.stdout


@pytest.mark.parametrize("workers", [0, 2])
def test_verify_names_every_bad_shard_and_goes_on(work: Path, workers: int) -> None:
    index = LengthIndex.open("shards/shard.ltx")
    flip(work / "shards/shard-000000.tar", int(index._tables.offsets[3, 0]) + 8)
    (work / "shards/shard-000002.tar").unlink()
    shutil.copy(work / "shards/shard-000001.tar", work / "shards/stranger.tar")
    output = run("verify", "shards", "--workers", workers, status=1).output
    assert re.search(r"FAILED .*shards/shard-000000.tar: sample 'k3', field 'tokens', .* checksum", output)
    assert "shards/shard-000002.tar: the index lists this shard, but there is no such file" in output
    assert "FAILED shards/stranger.tar: not in the index" in output
    assert "3 errors" in output
    assert "and 2 more: --errors 3" in run("verify", "shards", "--errors", 1, status=1).output


def test_verify_quick_leaves_payloads_unread(work: Path) -> None:
    index = LengthIndex.open("shards/shard.ltx")
    flip(work / "shards/shard-000000.tar", int(index._tables.offsets[3, 0]) + 8)
    assert "headers and lengths read, all agree" in run("verify", "shards", "--quick").output
    run("verify", "shards", status=1)


def test_verify_names_both_lengths_where_they_differ(work: Path) -> None:
    tables = LengthIndex.open("corpus.ltx")._tables
    lengths = tables.lengths.copy()
    lengths[150] += 1
    LengthIndex(replace(tables, lengths=lengths)).save("wrong.ltx")
    output = run("verify", "wrong.ltx", status=1).output
    assert f"sample 'k150', field 'tokens': the index says {LENGTHS[150] + 1} steps, the shard {LENGTHS[150]}" in output


def test_verify_says_when_there_are_no_checksums(work: Path) -> None:
    run("index", "shards", "--output", "bare.ltx")
    assert "no checksums to compare payloads with" in run("verify", "bare.ltx").output


@pytest.mark.parametrize("layout", ["blocks", "plain"])
def test_an_index_cut_to_a_shard_is_the_index_of_that_shard(tmp_path: Path, layout: str) -> None:
    folder = write(tmp_path / "shards", tokens([3, 1, 2, 5, 4]), layout=layout, max_samples=2, block_size=1)
    whole = LengthIndex.open(folder / "shard.ltx")
    for number, shard in enumerate(whole.shards):
        part, alone = whole._tables.of_shard(number), LengthIndex.open(f"{shard}.ltx")._tables
        assert (part.layout, part.fields, part.shards) == (alone.layout, alone.fields, alone.shards)
        assert part.arrays.keys() == alone.arrays.keys()
        for name, array in alone.arrays.items():
            assert np.array_equal(part.arrays[name], array), name


def test_report_gives_the_numbers_of_the_plan(work: Path) -> None:
    budgets, windows = [2000, 5000], [None, 80]
    arguments = ["--max-tokens", "2000,5000", "--window", "auto,80", "--replicas", 3, "--seed", 7, "--widths", "16"]
    figures = json.loads(run("report", "corpus.ltx", *arguments, "--json", "-").output)
    plans = [
        plan_epoch(LENGTHS, max_tokens=budget, window=window, num_replicas=3, seed=7, widths=16, overlong="alone")
        for budget in budgets
        for window in windows
    ]
    assert [entry["report"] for entry in figures["plans"]] == [asdict(plan.report()) for plan in plans]
    assert [entry["shapes"] for entry in figures["plans"]] == json.loads(
        json.dumps([plan.batch_shapes for plan in plans])
    )
    assert [(e["options"]["max_tokens"], e["options"]["window"]) for e in figures["plans"]] == [
        (budget, window) for budget in budgets for window in windows
    ]
    assert (figures["lengths"]["samples"], figures["lengths"]["steps"]) == (400, sum(LENGTHS))


def test_report_prints_a_column_for_each_budget_and_window(work: Path) -> None:
    output = run("report", "corpus.ltx", "--max-tokens", 2000, "--max-tokens", "5000,2000", "--window", 80).output
    report = plan_epoch(LENGTHS, max_tokens=5000, window=80).report()
    # Labels and values stand two blanks apart at least.
    cells = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    lines = {label: values for label, *values in cells}
    assert lines["max tokens"] == ["2,000", "5,000"]
    assert lines["padding"][1] == f"{report.padding:.2%}"
    assert lines["pairs that meet again"][1] == f"{report.repeated_pairs:.2%}"
    assert lines["autocorrelation"][1] == f"{report.autocorrelation:.3f}"


def test_report_is_the_same_from_an_index_from_shards_and_from_an_array(work: Path) -> None:
    reports = [
        json.loads(run("report", *source, "--max-tokens", 3000, "--json", "-").output)["plans"]
        for source in (["shards"], sorted(Path("shards").glob("*.tar")), ["corpus.ltx"], ["lengths.npy"])
    ]
    assert all(report == reports[0] for report in reports)


def test_report_and_its_options_need_no_shard(work: Path) -> None:
    for shard in (work / "shards").glob("*.tar"):
        shard.unlink()
    run("report", "corpus.ltx", "--batch-size", 8, "--widths", "best:4", "--count", "padded", "--drop-last")


def test_report_names_samples_over_the_budget(work: Path) -> None:
    worst = int(np.argmax(LENGTHS))
    output = run("report", "corpus.ltx", "--max-tokens", 590, "--overlong", "alone").output
    over = sum(length > 590 for length in LENGTHS)
    assert f"{over} over-long at 590 tokens, they are batches of one here: k{worst} ({LENGTHS[worst]} steps)" in output
    assert "are left out here" in run("report", "corpus.ltx", "--max-tokens", 590, "--overlong", "drop").output
    # The default is the sampler's: a report that succeeds is of a plan that can be made.
    refused = run("report", "corpus.ltx", "--max-tokens", 590, status=1)
    assert "choose overlong='drop'" in refused.stderr


def test_report_of_two_fields_counts_both(tmp_path: Path) -> None:
    np.save(tmp_path / "two.npy", RNG.integers(1, 40, (100, 2)))
    picture = tmp_path / "two.png"
    figures = json.loads(
        run("report", tmp_path / "two.npy", "--max-tokens", 400, "--json", "-", "--plot", picture).output
    )
    assert figures["lengths"]["steps"] == figures["plans"][0]["report"]["real_tokens"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_tells_lengths_padding_and_steps(work: Path) -> None:
    run("report", "corpus.ltx", "--max-tokens", "2000,4000", "--replicas", 2, "--plot", "figure.svg")
    drawn = Path("figure.svg").read_text()
    for text in ("length (steps)", "bucket edges", "Padding against window", "4,000 tokens", "fraction of the budget"):
        assert text in drawn
    refused = run("report", "corpus.ltx", "--max-tokens", 2000, "--plot", "figure.xyz", status=1)
    assert "xyz" in refused.stderr


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows"])
def test_rows_become_the_samples_they_were(work: Path, name: str) -> None:
    rows = [row | {"speed": place / 2} for place, row in enumerate(ROWS)]
    if name == "rows":
        datasets.Dataset.from_list(rows).save_to_disk(name)
    elif name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), name, row_group_size=3)
    else:
        opened = gzip.open if name.endswith("gz") else open
        with opened(name, "wt") as stream:
            stream.writelines(json.dumps(row) + "\n\n" for row in rows)
    output = run("convert", name, "out", "--key", "id", "--fields", "tokens=input_ids,label,speed").output
    assert output == "out/shard.ltx: 4 samples in 1 shard, layout blocks\n"
    # datasets stores a column of this name as int32.
    dtype = np.int32 if name == "rows" else np.int64
    for sample, row in zip(samples_of(work / "out"), rows, strict=True):
        expected = {"tokens": np.array(row["input_ids"], dtype), "label": np.int64(row["label"])}
        assert_same(sample, {"__key__": row["id"]} | expected | {"speed": np.float64(row["speed"])})


def test_a_folder_of_parquet_files_is_read_in_the_order_of_their_names(work: Path) -> None:
    Path("parts").mkdir()
    for number in (1, 0):
        pq.write_table(pa.table({"tokens": [[number], [number, number]]}), f"parts/{number}.parquet")
    run("convert", "parts", "out")
    assert [sample["tokens"].tolist() for sample in samples_of(work / "out")] == [[0], [0, 0], [1], [1, 1]]
    assert [sample["__key__"] for sample in samples_of(work / "out")] == [f"{n:09}" for n in range(4)]


def test_columns_of_features_keep_their_dtype_and_shape(work: Path) -> None:
    frames = [RNG.normal(size=(steps, 2)).astype(np.float32) for steps in (3, 0, 2)]
    flat = pa.array([frame.tolist() for frame in frames], pa.list_(pa.list_(pa.float32(), 2)))
    ragged = pa.array([frame.tolist() for frame in frames], pa.large_list(pa.list_(pa.float32())))
    speaker = pa.array([[1, 2, 3]] * 3, pa.list_(pa.int16(), 3))
    table = pa.table({"audio": flat, "again": ragged, "speaker": speaker, "loud": [True, False, True]})
    pq.write_table(table, "features.parquet")
    run("convert", "features.parquet", "out", "--stack", "speaker", "--max-samples", 2)
    index = LengthIndex.open("out/shard.ltx")
    assert set(index.fields) == {"audio", "again"}
    assert len(index.shards) == 2
    for sample, frame, loud in zip(samples_of(work / "out"), frames, (True, False, True), strict=True):
        expected = {"audio": frame, "again": frame, "speaker": np.array([1, 2, 3], np.int16), "loud": np.bool_(loud)}
        assert_same(sample, {"__key__": sample["__key__"]} | expected)


def test_a_dataset_with_chosen_rows_is_converted_as_it_stands(work: Path) -> None:
    dataset = datasets.Dataset.from_dict({"tokens": [[n] * n for n in range(2500)]}).select(range(2400, 1, -1))
    dataset.save_to_disk("chosen")
    run("convert", "chosen", "out")
    assert [len(sample["tokens"]) for sample in samples_of(work / "out")] == list(range(2400, 1, -1))


@pytest.mark.parametrize("layout", ["blocks", "plain"])
def test_shards_are_converted_there_and_back(work: Path, layout: str) -> None:
    rows = [sample | {"speaker": np.arange(3.0)} for sample in tokens([4, 0, 9])]
    write(work / "source", rows, stack=["speaker"], layout=layout)
    run("convert", "source", "middle", "--stack", "speaker", "--layout", "plain")
    run("convert", "middle/*.tar", "out", "--stack", "speaker")
    for source in ("source", "out"):
        for read, row in zip(samples_of(work / source), rows, strict=True):
            assert_same(read, row)


def test_arrays_of_fixed_size_in_blocks_stay_so(work: Path) -> None:
    write(work / "source", [sample | {"speaker": np.arange(3.0)} for sample in tokens([4, 2])], stack=["speaker"])
    run("convert", "source/shard.ltx", "out", "--fields", "tokens,speaker")
    assert LengthIndex.open("out/shard.ltx").fields == ("tokens",)


def test_text_is_stored_as_its_bytes_and_numbers_as_the_dtype_asked_for(work: Path) -> None:
    Path("rows.jsonl").write_text('{"text": "maße", "x": [1, 2.5]}\n{"text": "", "x": []}\n{"text": "b", "x": [3]}\n')
    run("convert", "rows.jsonl", "out", "--text", "text", "--dtype", "x=float32")
    read = samples_of(work / "out")
    assert [sample["text"].tobytes().decode() for sample in read] == ["maße", "", "b"]
    assert [(sample["x"].dtype, sample["x"].tolist()) for sample in read] == [
        (np.float32, values) for values in ([1, 2.5], [], [3])
    ]


@pytest.mark.parametrize("first", ['{"x": [1]}\n', "\n", ""])
def test_a_file_of_json_lines_may_begin_with_a_byte_order_mark(work: Path, first: str) -> None:
    # Red: "line 1: not JSON".
    for number in range(2):
        Path(f"part-{number}.jsonl").write_text(first + f'{{"x": [{number}]}}\n', encoding="utf-8-sig")
    run("convert", "part-*.jsonl", "out")
    ones = [[1]] * first.count("x")
    assert [sample["x"].tolist() for sample in samples_of(work / "out")] == [*ones, [0], *ones, [1]]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ('{"x": [1]}\n\ufeff{"x": [1]}', [], "rows.jsonl, line 2: not JSON: a byte order mark, which only a file"),
        ('\ufeff\ufeff{"x": [1]}', [], "rows.jsonl, line 1: not JSON: a byte order mark"),
        ('{"x": [1]}\n{"x": [1', [], "rows.jsonl, line 2: not JSON"),
        ('{"x": [1]}\n[1]', [], "line 2: must be an object"),
        ('{"x": [1]}\n{"y": [1]}', [], "field 'x' is missing"),
        ('{"x": "text"}', [], "--text x"),
        ('{"x": null}', [], "is NoneType"),
        ('{"x": [[1], [2, 3]]}', [], "steps must have one shape"),
        ('{"x": []}', [], "--dtype x=int64"),
        ('{"x": [1]}\n{"x": [0.5]}', [], "holds float64, and int64 before"),
        ('{"x": [0.5]}', ["--dtype", "x=int64"], "0.5 does not fit int64"),
        ('{"x": [300]}', ["--dtype", "x=uint8"], "300 does not fit uint8"),
        ('{"x": [1], "id": 1}\n{"x": [1], "id": 1}', ["--key", "id"], "'1' was written before"),
        ('{"x": [1]}', ["--key", "id"], "the key 'id' must be a text or an integer"),
        ('{"x": [1]}', ["--fields", "y"], "no field 'y', there are ['x']"),
        ('{"X": [1]}', [], "must be named in lower case"),
        ("", [], "a corpus needs a sample"),
    ],
)
def test_rows_that_are_no_samples_are_refused_with_their_place(
    work: Path, lines: str, options: list[str], message: str
) -> None:
    Path("rows.jsonl").write_text(lines)
    result = run("convert", "rows.jsonl", "out", *options, status=1)
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1], None]), "holds null"),
        (pa.array([[1, None]]), "holds null"),
        (pa.array([[[1], [1, 2]]]), "steps must have one shape"),
        (pa.array([{"a": 1}]), "is not a number"),
        (pa.array(["text"]), "--text x"),
    ],
)
def test_columns_that_are_no_numbers_are_refused_by_name(work: Path, column: Any, message: str) -> None:
    pq.write_table(pa.table({"x": column}), "bad.parquet")
    assert message in run("convert", "bad.parquet", "out", status=1).stderr


def test_show_prints_the_batch_of_the_plan(work: Path) -> None:
    plan = plan_epoch(LENGTHS, max_tokens=4000, num_replicas=2, overlong="alone")
    batch = plan.batches[3 * 2 + 1]
    output = run("show", "corpus.ltx", "--max-tokens", 4000, "--replicas", 2, "--step", 3, "--rank", 1).output
    real, padded = sum(LENGTHS[place] for place in batch), len(batch) * max(LENGTHS[place] for place in batch)
    assert f"step 3 of {plan.steps}, rank 1 of 2, epoch 0" in output
    assert f"{len(batch)} rows, {padded:,} padded tokens, {real:,} real ones: padding {1 - real / padded:.2%}" in output
    assert f"int64 [{len(batch)}, {max(LENGTHS[place] for place in batch)}]" in output
    rows = re.findall(r"^ +(\d+)  k(\d+) +(\d+)  ", output, re.MULTILINE)
    assert rows == [(str(place), str(place), str(LENGTHS[place])) for place in batch[:20]]


def test_show_reads_every_kind_of_field(tmp_path: Path) -> None:
    rows = [{"__key__": f"k{n}", "x": np.ones((n, 3), "f4"), "y": np.arange(n), "z": np.arange(2.0)} for n in (2, 0)]
    folder = write(tmp_path / "shards", rows, stack=["z"])
    output = run("show", folder, "--max-tokens", 50, "--rows", 1).output
    assert re.search(r"^x +float32 \[2, 2, 3\]$", output, re.MULTILINE)
    assert re.search(r"^z +float64 \[2, 2\]$", output, re.MULTILINE)
    assert "and 1 more rows: --rows 2" in output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("report nothing.ltx --max-tokens 9", 1, "no index"),
        ("report lengths.npy", 2, "give --max-tokens or --batch-size"),
        ("report lengths.npy --max-tokens 9,x", 2, "'x' is not a positive integer"),
        ("report lengths.npy --max-tokens 900 --window 0", 2, "'0' is not a positive integer"),
        ("report lengths.npy --max-tokens 900 --widths best:1,2", 2, "takes one number"),
        ("report lengths.npy --max-tokens 900 --widths 8,16", 1, "add a width"),
        ("report lengths.npy corpus.ltx --max-tokens 900", 1, "give one kind"),
        ("report bare --max-tokens 900", 1, "lengthtrack index"),
        ("report objects.npy --max-tokens 900", 1, "Python objects"),
        ("index bare/*.tar", 2, "--output"),
        ("index nowhere", 1, "nowhere"),
        ("verify nothing.ltx", 1, "lengthtrack index"),
        ("verify", 2, "Missing argument"),
        ("convert nothing.jsonl out", 1, "no file or folder nothing.jsonl"),
        ("convert corpus.csv out", 1, "give a folder or pattern of .tar shards"),
        ("convert dataset out --split valid", 1, "choose one with --split"),
        ("convert corpus.jsonl shards --key id", 1, "give another prefix"),
        ("convert data.parquet out --fields nothing", 1, "no column 'nothing'"),
        ("convert corpus.jsonl out --dtype tokens=word", 2, "is not a numeric dtype"),
        ("show corpus.ltx --max-tokens 4000 --step 9999", 2, "the epoch has steps 0 to"),
        ("show moved.ltx --max-tokens 4000", 1, "put it back, give"),
        ("lengths", 2, "No such command"),
    ],
)
def test_an_error_is_one_line_with_a_way_out(work: Path, arguments: str, status: int, message: str) -> None:
    shutil.copytree("shards", "bare", ignore=shutil.ignore_patterns("*.ltx"))
    LengthIndex.build("shards").save("moved.ltx")
    for shard in Path("shards").glob("*.tar"):
        shard.unlink()
    np.save("objects.npy", np.array([[1], None], object), allow_pickle=True)
    Path("corpus.csv").write_text("a,b\n")
    result = run(*arguments.split(), status=status)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert message in last
    assert result.stdout == ""


def test_a_traceback_is_shown_only_when_it_is_asked_for(tmp_path: Path) -> None:
    assert "Traceback" not in start("report", "nothing.ltx", "--max-tokens", 9, cwd=tmp_path).stderr
    asked = start("--traceback", "report", "nothing.ltx", "--max-tokens", 9, cwd=tmp_path)
    assert (asked.returncode, "Traceback" in asked.stderr) == (1, True)


def test_in_a_pipe_there_are_no_bars_and_no_colours(work: Path) -> None:
    for arguments in (["verify", "shards"], ["report", "shards", "--max-tokens", 4000]):
        done = start(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert not set(done.stdout) & set("\x1b\r")


def test_a_reader_who_leaves_early_gets_no_traceback(work: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m samplers.cli show corpus.ltx --max-tokens 60000 --rows 400 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("step 0 of")
    assert "Traceback" not in done.stderr


def test_on_a_terminal_there_is_a_bar(work: Path) -> None:
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    # A bar on a terminal without columns has no room, and a read of what was never written would wait.
    termios.tcsetwinsize(theirs, (24, 80))
    os.set_blocking(ours, False)
    with os.fdopen(ours, "rb", buffering=0) as screen:
        done = start("verify", "shards", stderr=theirs)
        assert b"shard/s" in (screen.read(4096) or b"")
        os.close(theirs)
    assert done.returncode == 0


@pytest.mark.parametrize("command", ["report", "show"])
def test_the_defaults_of_a_report_are_those_of_the_sampler(command: str) -> None:
    # Red: `--overlong alone` made a report of a plan that the sampler refuses.
    defaults = asdict(Options(max_tokens=1))
    parameters = main.commands[command].make_context(command, ["shards"]).params
    shared = sorted(defaults.keys() & parameters.keys() - {"max_tokens", "window"})
    assert len(shared) >= 8
    assert {name: parameters[name] for name in shared} == {name: defaults[name] for name in shared}


def test_a_dataset_of_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    # Red: it asked to build the index of a folder that does not exist.
    with pytest.raises(FileNotFoundError, match="no file or folder .*nope"):
        ShardDataset(tmp_path / "nope")
