"""`run_in_order` against one sample at a time: each sample once, outputs in the dataset's order, errors that teach."""

import contextlib
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from collate import LengthTrackedBatch, PadCollator, VarlenCollator, masked_mean
from samplers import LengthIndex, ShardDataset, ShardWriter, run_in_order
from samplers.inference.halving import HalvingStep
from samplers.inference.parts import read_part, read_part_samples

Rows = list[Tensor]


def sequences(lengths: list[int], seed: int = 0) -> Rows:
    """Sequences `[L, 2]` whose values are exact in float64, so that sums do not depend on their order."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(-99, 99, (length, 2)).astype(np.float64)) for length in lengths]


def total_of(row: Tensor) -> Tensor:
    """The oracle for one sample: `[3]`, its sums and its number of steps."""
    return torch.cat([row.sum(0), torch.tensor([float(len(row))])])


def totals(batch: LengthTrackedBatch) -> Tensor:
    """The same for all rows of a batch: `[B, 3]`."""
    sums = (batch.padded * batch.mask[:, :, None]).sum(1)
    return torch.cat([sums, batch.lengths[:, None].double()], 1)


def running(batch: LengthTrackedBatch) -> LengthTrackedBatch:
    """An output for each real step: the sum up to it."""
    return batch.with_padded(batch.padded.cumsum(1))


def texts(batch: LengthTrackedBatch) -> list[str]:
    """A text for each row, with letters of several bytes."""
    return ["é" * len(row) + str(row.sum().item()) for row in batch.sequences()]


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=40)
run = partial(run_in_order, collate_fn=PadCollator(), progress=False)


@settings(max_examples=80)
@given(LENGTHS, st.integers(1, 30), st.sampled_from(["list", "numpy", "torch"]), st.data())
def test_outputs_are_those_of_one_sample_at_a_time(
    lengths: list[int], max_tokens: int, container: Any, data: st.DataObject
) -> None:
    rows = sequences(lengths)
    # Red when outputs were stored by batch order: the collator sorts rows by another field than the planner.
    keys = data.draw(st.permutations(range(len(rows))))
    dataset = [{"x": row, "other": torch.zeros(1 + key)} for row, key in zip(rows, keys, strict=True)]
    seen: list[int] = []

    def step(batch: dict[str, LengthTrackedBatch]) -> Tensor:
        seen.append(batch["x"].mask.numel())
        return totals(batch["x"])

    found = run_in_order(
        step,
        dataset,
        lengths=lengths,
        collate_fn=PadCollator(sort_by=data.draw(st.sampled_from(["x", "other", False]))),
        max_tokens=max_tokens,
        container=container,
        progress=False,
    )
    assert [np.asarray(each).tolist() for each in found] == [total_of(row).tolist() for row in rows]
    # Longest first, within the budget unless a row alone exceeds it.
    assert all(size <= max(max_tokens, max(lengths), 1) for size in seen)


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 30))
def test_padding_is_removed_from_outputs_of_steps(lengths: list[int], max_tokens: int) -> None:
    rows = sequences(lengths)
    found = run(running, rows, lengths=lengths, max_tokens=max_tokens)
    for output, row in zip(found, rows, strict=True):
        torch.testing.assert_close(output, row.cumsum(0), rtol=0, atol=0)
    varlen = run_in_order(
        lambda batch: batch.map(torch.neg),
        rows,
        lengths=lengths,
        collate_fn=VarlenCollator(),
        max_tokens=max_tokens,
        count_tokens="real",
        progress=False,
    )
    for output, row in zip(varlen, rows, strict=True):
        torch.testing.assert_close(output, -row, rtol=0, atol=0)


# Few examples: each failure collects garbage, which takes a tenth of a second.
@settings(max_examples=8)
@given(LENGTHS, st.integers(1, 8), st.sampled_from([MemoryError, torch.OutOfMemoryError]))
# Red without the limit: each of five batches fails three times.
@example([5] * 40, 5, MemoryError)
def test_a_batch_that_does_not_fit_is_halved(lengths: list[int], fits: int, error: type[Exception]) -> None:
    """Every sample is computed once however small the device is, and later batches are split before they fail."""
    rows, computed, failed = sequences(lengths), [], []

    def step(batch: LengthTrackedBatch) -> Tensor:
        if len(batch) > 1 and batch.mask.numel() > fits:
            failed.append(batch.mask.numel())
            raise error("out of memory")
        computed.append(len(batch))
        return totals(batch)

    found = run(step, rows, lengths=lengths, max_tokens=40)
    assert [each.tolist() for each in found] == [total_of(row).tolist() for row in rows]
    assert sum(computed) == len(rows)
    # Each failure lowers the limit by a third at least (three rows to two), from 40 to 1. Red: empty rows cost nothing.
    assert len(failed) <= 11


def test_a_sample_that_does_not_fit_alone_is_named() -> None:
    def step(batch: LengthTrackedBatch) -> Tensor:
        if batch.padded.shape[1] > 4:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return totals(batch)

    with pytest.raises(MemoryError, match=r"sample 1, of 7 steps, does not fit in memory alone.*ALLOC_FAILED"):
        run(step, sequences([2, 7, 3]), max_tokens=30)


def test_the_frames_of_a_failed_step_are_free_when_its_halves_run() -> None:
    """Red when the retry ran inside `except`: the traceback held the tensors of the step that had failed."""

    class Held:
        alive = 0

        def __init__(self) -> None:
            Held.alive += 1

        def __del__(self) -> None:
            Held.alive -= 1

    alive = []

    def step(batch: LengthTrackedBatch) -> Tensor:
        alive.append(Held.alive)
        _held = Held()
        if len(batch) > 1:
            raise MemoryError
        return totals(batch)

    run(step, sequences([3, 3]), max_tokens=30)
    assert alive == [0, 0, 0]


def test_what_does_not_fit_is_logged_with_its_size(caplog: pytest.LogCaptureFixture) -> None:
    def step(batch: np.ndarray) -> np.ndarray:
        if len(batch) > 2:
            raise MemoryError("5 GB asked for")
        return batch

    halving = HalvingStep(step, lambda samples: np.zeros(len(samples)), np.full(4, 3))
    with caplog.at_level(logging.WARNING):
        list(halving.run([0, 1, 2, 3], np.zeros(4)))
    assert "a batch of 4 rows x 3 steps did not fit in memory (MemoryError: 5 GB asked for)" in caplog.text
    assert "at most 6 padded tokens" in caplog.text


@settings(max_examples=15)
@given(LENGTHS, st.integers(1, 30), st.booleans())
def test_a_file_holds_what_memory_would(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], max_tokens: int, is_flushed: bool
) -> None:
    folder, rows = tmp_path_factory.mktemp("out"), sequences(lengths)
    options = {"lengths": lengths, "max_tokens": max_tokens, "flush_seconds": 0.0 if is_flushed else 60.0}
    fixed = run(totals, rows, out=folder / "fixed.npy", **options)
    assert isinstance(fixed, np.memmap)
    assert fixed.tolist() == [total_of(row).tolist() for row in rows]
    table = run(totals, rows, out=folder / "fixed.arrow", **options)
    assert table["output"].to_pylist() == fixed.tolist()
    assert str(table.schema.field("output").type) == "fixed_size_list<item: double>[3]"
    table = run(running, rows, out=folder / "steps.arrow", **options)
    assert table["output"].to_pylist() == [row.cumsum(0).tolist() for row in rows]
    table = run(texts, rows, out=folder / "texts.arrow", **options)
    assert table["output"].to_pylist() == ["é" * len(row) + str(row.sum().item()) for row in rows]
    table = run(lambda batch: batch.lengths > 4, rows, out=folder / "flags.arrow", **options)
    assert table["output"].to_pylist() == [length > 4 for length in lengths]
    table.validate(full=True)
    # Nothing is left but files and their records.
    assert {path.suffix for path in folder.iterdir()} == {".npy", ".arrow", ".json"}


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 12), st.integers(1, 30), st.integers(1, 30))
def test_what_was_written_is_not_computed_again(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], batches: int, first: int, second: int
) -> None:
    """A run that ends after some batches, resumed under another budget: every sample is computed once in all."""
    out, rows, computed = tmp_path_factory.mktemp("out") / "all.npy", sequences(lengths), []

    def step(batch: LengthTrackedBatch, left: list[int]) -> Tensor:
        if not left:
            raise ZeroDivisionError
        left.pop()
        computed.append(len(batch))
        return totals(batch)

    options = {"lengths": lengths, "out": out, "name": "a"}
    # At an error all outputs before it are written, whatever the seconds. Red when one waited to be copied.
    with contextlib.suppress(ZeroDivisionError):
        run(partial(step, left=[0] * batches), rows, max_tokens=first, **options)
    with pytest.raises(ZeroDivisionError) as caught:
        run(partial(step, left=[]), rows, max_tokens=first, lengths=lengths)
    assert "in run_in_order, on samples" in caught.value.__notes__[0]
    found = run(partial(step, left=[0] * 99), rows, max_tokens=second, **options)
    assert found.tolist() == [total_of(row).tolist() for row in rows]
    assert sum(computed) == len(rows)
    # A finished run is opened, not run.
    again = run(partial(step, left=[]), rows, max_tokens=second, **options)
    assert again.tolist() == found.tolist()


def unfinished(folder: Path, **options: Any) -> Path:
    """A run of eight samples that failed after some batches; its file."""
    left = [0] * 3

    def step(batch: LengthTrackedBatch) -> Tensor:
        left.pop()
        return totals(batch)

    with pytest.raises(IndexError):
        run(step, sequences([5, 4, 3, 5, 2, 1, 6, 7]), max_tokens=7, flush_seconds=0, out=folder / "a.npy", **options)
    return folder / "a.npy"


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"name": "other"}, r"a.npy.parts belongs to another run: name '' instead of 'other'.*resume=False"),
    ({"dataset": sequences([5, 4])}, "number of samples 8 instead of 2, fingerprint of the lengths"),
    ({"dataset": sequences([5, 4, 3, 5, 2, 1, 6, 8])}, "fingerprint of the lengths '.*' instead of"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_files_of_another_run_are_refused_by_what_differs(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    out = unfinished(tmp_path)
    options = {"dataset": sequences([5, 4, 3, 5, 2, 1, 6, 7]), "max_tokens": 7, "out": out, **options}
    with pytest.raises(ValueError, match=message):
        run(totals, **options)
    # Starting again is a way out, and the finished file knows its run too.
    found = run(totals, **options, resume=False)
    assert found[:, 2].tolist() == [len(row) for row in options["dataset"]]
    with pytest.raises(ValueError, match="a.npy belongs to another run: name .* instead of 'third'"):
        run(totals, **{**options, "name": "third"})


def damage(path: Path, offset: int) -> None:
    """Flip a bit; offsets below 0 count from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    out = unfinished(tmp_path)
    rows = sequences([5, 4, 3, 5, 2, 1, 6, 7])
    parts = sorted(Path(f"{out}.parts").glob("*.part"))
    assert len(parts) > 1
    whole = parts[0].read_bytes()
    first = whole.index(b"\n") + 1
    samples = read_part_samples(parts[0], 8)[1]
    assert read_part(parts[0], 8).values[:, 2].tolist() == [len(rows[sample]) for sample in samples]
    for offset, message in (
        (5, "header is damaged"),
        (first, "sample indices are damaged"),
        (-1, "outputs are damaged"),
    ):
        damage(parts[0], offset)
        with pytest.raises(ValueError, match=f"{parts[0].name}: .*{message}.*delete this file"):
            run(totals, rows, max_tokens=7, out=out)
        parts[0].write_bytes(whole)
    parts[0].write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"must have {len(whole)} bytes, got {len(whole) - 1}: delete this file"):
        run(totals, rows, max_tokens=7, out=out)
    # The way out: its samples are computed again.
    parts[0].unlink()
    assert run(totals, rows, max_tokens=7, out=out).tolist() == [total_of(row).tolist() for row in rows]
    damage(out, -1)
    with pytest.raises(ValueError, match="a.npy was changed since it was finished"):
        run(totals, rows, max_tokens=7, out=out)
    Path(f"{out}.run.json").write_text("[]")
    with pytest.raises(ValueError, match="a.npy.run.json: .*resume=False"):
        run(totals, rows, max_tokens=7, out=out)


def test_a_file_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "mine.npy"
    out.write_text("notes")
    for resume in (True, False):
        with pytest.raises(FileExistsError, match="mine.npy exists, and run_in_order has not finished it"):
            run(totals, sequences([1, 2]), max_tokens=7, out=out, resume=resume)
    assert out.read_text() == "notes"


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    out, rows = tmp_path / "a.npy", sequences([1, 2])

    def step(batch: LengthTrackedBatch) -> Tensor:
        with pytest.raises(FileExistsError, match="a.npy.parts is being written by another run"):
            run(totals, rows, max_tokens=7, out=out)
        return totals(batch)

    run(step, rows, max_tokens=7, out=out)


MISTAKES: list[tuple[Callable[[Any], Any], dict[str, Any], type[Exception], str]] = [
    (lambda batch: batch.padded.sum(), {}, TypeError, "an entry for each row, got a single number"),
    (lambda batch: {"logits": batch.padded}, {}, TypeError, "got a dict: its entries are logits: choose one"),
    (lambda batch: totals(batch)[1:], {}, ValueError, r"each of the batch's 2 rows, got 1 for samples 0, 1:"),
    (
        lambda batch: batch.padded,
        {},
        ValueError,
        r"got torch.float64 \[1, 2\] for sample 2, and torch.float64 \[4, 2\]",
    ),
    (lambda batch: batch.padded, {"out": "a.npy"}, ValueError, r"float64 \[1, 2\] for sample 2, and float64 \[4, 2\]"),
    (running, {"container": "numpy"}, ValueError, "own number of steps go into a list, or an .arrow"),
    (running, {"out": "a.npy"}, ValueError, r"\.arrow"),
    (texts, {"out": "a.npy"}, ValueError, r"\.arrow"),
    (lambda batch: totals(batch).bfloat16(), {"out": "a.npy"}, TypeError, r"bfloat16.*return output\.float\(\)"),
    (lambda batch: [{}] * len(batch), {"out": "a.arrow"}, TypeError, 'container="list"'),
    (totals, {"shuffle": True}, TypeError, "options must be among max_tokens, .*, got shuffle"),
    (lambda batch: totals(batch)[:, :0], {"out": "a.arrow"}, ValueError, r"no axis of size 0, got float64 \[0\]"),
    (lambda batch: totals(batch).to(torch.complex64), {"out": "a.arrow"}, ValueError, "no complex numbers"),
    (totals, {"out": "a.csv"}, ValueError, r"out must end with \.npy .* or \.arrow"),
    (totals, {"out": "s3://bucket/a.npy"}, ValueError, "out must be a path on this machine"),
    (totals, {"container": "tuple"}, ValueError, "container must be 'list', 'numpy' or 'torch'"),
    (totals, {"lengths": [1]}, ValueError, "lengths must be those of the dataset's 4 samples, got 1"),
    (totals, {"max_tokens": None}, ValueError, "max_tokens"),
    (totals, {"flush_seconds": -1.0}, ValueError, "flush_seconds must be at least 0"),
    (totals, {"resume": 1}, TypeError, "resume must be True or False"),
]


@pytest.mark.parametrize(("step", "options", "error", "message"), MISTAKES)
def test_a_mistake_is_an_error_that_says_what_to_do(
    step: Callable[[Any], Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(error, match=message):
        run(step, sequences([4, 4, 1, 1]), **{"max_tokens": 8, **options})


def test_lengths_come_from_the_dataset_or_are_asked_for(tmp_path: Path) -> None:
    rows = sequences([3, 1, 4, 1, 5])
    with ShardWriter(tmp_path / "shards", max_samples=2) as writer:
        for key, row in enumerate(rows):
            writer.write({"__key__": str(key), "x": row.numpy()})
    data = ShardDataset(tmp_path / "shards")
    assert isinstance(data.index, LengthIndex)
    # In workers and with an index: records of both are known.
    found = run(lambda batch: totals(batch["x"]), data, max_tokens=9, num_workers=1, out=tmp_path / "a.npy")
    assert found.tolist() == [total_of(row).tolist() for row in rows]
    assert json.loads((tmp_path / "a.npy.run.json").read_text())["lengths"] == data.index.fingerprint

    class Anything(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 5

    with pytest.raises(ValueError, match="lengths must be given for this Anything"):
        run(totals, Anything(), max_tokens=9)


def test_rows_that_fill_a_shape_are_no_samples() -> None:
    rows = sequences([3, 1, 4, 1, 5])
    collate = PadCollator(shapes=[(4, 5)])
    found = run_in_order(totals, rows, collate_fn=collate, batch_size=2, container="torch", progress=False)
    assert found.tolist() == [total_of(row).tolist() for row in rows]


def test_outputs_need_no_graph_and_can_be_used_in_another() -> None:
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    found = run(lambda batch: masked_mean(batch.map(lambda x: x * weight)), sequences([3, 1]), max_tokens=9)
    assert not found[0].requires_grad
    (found[0] @ weight).backward()
    assert weight.grad is not None


@pytest.mark.parametrize("container", ["list", "numpy"])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda rows: list(rows)])
def test_a_step_may_write_its_results_to_the_same_memory(kind: Callable[[Any], Any], container: Any) -> None:
    """Red when results were kept as they came: all samples had the outputs of the last batch."""
    buffer = np.empty((3, 1))

    def step(batch: LengthTrackedBatch) -> Any:
        buffer[: len(batch), 0] = batch.lengths
        return kind(buffer[: len(batch)])

    found = run(step, sequences([3, 1, 4, 1, 5, 9]), batch_size=3, container=container)
    assert [each.item() for each in found] == [3, 1, 4, 1, 5, 9]


def test_an_empty_dataset_has_no_outputs(tmp_path: Path) -> None:
    assert run(totals, [], lengths=np.empty(0, np.int64), max_tokens=9) == []
    with pytest.raises(ValueError, match="dataset must have a sample if out is a file"):
        run(totals, [], lengths=np.empty(0, np.int64), max_tokens=9, out=tmp_path / "a.npy")


def test_the_bar_counts_real_tokens_of_what_was_done_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = unfinished(tmp_path)
    capsys.readouterr()
    run_in_order(
        totals,
        sequences([5, 4, 3, 5, 2, 1, 6, 7]),
        collate_fn=PadCollator(),
        max_tokens=7,
        out=out,
        progress=True,
    )
    bar = capsys.readouterr().err
    assert "18.0/33.0" in bar
    assert "33.0/33.0" in bar


def test_a_resumed_run_has_the_outputs_of_the_first(tmp_path: Path) -> None:
    """Red when only the end of the run compared them."""
    out, computed = unfinished(tmp_path), []

    def step(batch: LengthTrackedBatch) -> Tensor:
        computed.append(len(batch))
        return totals(batch).float()

    with pytest.raises(ValueError, match=r"got float32 \[3\] for sample \d, and float64 \[3\] before"):
        run(step, sequences([5, 4, 3, 5, 2, 1, 6, 7]), max_tokens=7, out=out)
    assert len(computed) == 1


def test_arrays_of_texts_and_of_another_byte_order_are_taken(tmp_path: Path) -> None:
    rows = sequences([2, 1])
    table = run(lambda batch: np.array(texts(batch)), rows, max_tokens=9, out=tmp_path / "a.arrow")
    assert table["output"].to_pylist() == ["é" * len(row) + str(row.sum().item()) for row in rows]
    table = run(lambda batch: batch.lengths.numpy().astype(">f4"), rows, max_tokens=9, out=tmp_path / "b.arrow")
    assert table["output"].to_pylist() == [2, 1]


def test_an_arrow_file_is_read_by_others(tmp_path: Path) -> None:
    run(running, sequences([2, 0, 1]), max_tokens=9, out=tmp_path / "a.arrow")
    with pyarrow.OSFile(str(tmp_path / "a.arrow")) as file:
        assert pyarrow.ipc.open_file(file).read_all().num_rows == 3
