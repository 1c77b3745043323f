"""`run_in_order` against one sample at a time: each sample once, outputs in the dataset's order, errors that teach."""

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ordered_runs import LENGTHS, run, running, sequences, texts, total_of, totals
from torch import Tensor

from collate import LengthTrackedBatch, PadCollator, VarlenCollator, masked_mean
from samplers import LengthIndex, ShardDataset, ShardWriter, run_in_order
from samplers.inference.halving import HalvingStep


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


@pytest.mark.parametrize("fields", [False, True])
def test_a_collate_function_that_reorders_before_padding_is_refused(fields: bool) -> None:
    # Red before: outputs went to other samples, without a word.
    lengths = [3, 9, 4, 8, 3, 7, 2, 5]
    rows = sequences(lengths)
    data = [{"x": row, "other": torch.zeros(1)} for row in rows] if fields else rows

    def collate(samples: list[Any]) -> Any:
        return PadCollator()(samples[::-1])

    def step(batch: Any) -> Tensor:
        return totals(batch["x"] if fields else batch)

    with pytest.raises(ValueError, match="sample 1 has length 9 in the plan and 7 in the batch.*must not reorder"):
        run_in_order(step, data, lengths=lengths, collate_fn=collate, max_tokens=27, progress=False)
    # Lengths of another unit say nothing of the order.
    frames = [2 * length for length in lengths]
    found = run_in_order(step, data, lengths=frames, collate_fn=PadCollator(), max_tokens=54, progress=False)
    assert [each.tolist() for each in found] == [total_of(row).tolist() for row in rows]


def test_lengths_may_be_named_by_their_column() -> None:
    rows = [{"x": torch.arange(n), "y": torch.zeros(1)} for n in (3, 9, 4)]
    found = run(lambda batch: batch["x"].lengths, rows, lengths="x", max_tokens=9)
    assert list(map(int, found)) == [3, 9, 4]


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
        buffer[: len(batch), 0] = batch.lengths.numpy()
        return kind(buffer[: len(batch)])

    found = run(step, sequences([3, 1, 4, 1, 5, 9]), batch_size=3, container=container)
    assert [each.item() for each in found] == [3, 1, 4, 1, 5, 9]


def test_an_empty_dataset_has_no_outputs(tmp_path: Path) -> None:
    assert run(totals, [], lengths=np.empty(0, np.int64), max_tokens=9) == []
    with pytest.raises(ValueError, match="dataset must have a sample if out is a file"):
        run(totals, [], lengths=np.empty(0, np.int64), max_tokens=9, out=tmp_path / "a.npy")
