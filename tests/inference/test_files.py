"""Files of `run_in_order`: what memory would hold, checked, tied to a run, and not computed again."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ordered_runs import LENGTHS, run, running, sequences, texts, total_of, totals, unfinished
from torch import Tensor

from collate import LengthTrackedBatch, PadCollator
from samplers import run_in_order
from samplers.inference.parts import read_part, read_part_samples
from samplers.shards.storage import atomic


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


def test_an_interrupt_behind_a_write_leaves_no_sample_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when the part was written again under another name: its samples were in two parts, which is refused."""
    rows, out = sequences([5, 4, 3, 5, 2, 1]), tmp_path / "a.npy"
    sync, parts = atomic._sync_folder, []

    def interrupt(folder: Path) -> None:
        sync(folder)
        parts.append(folder)
        # The first is the record.
        if len(parts) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_sync_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(totals, rows, max_tokens=7, out=out, flush_seconds=0)
    computed: list[int] = []

    def step(batch: LengthTrackedBatch) -> Tensor:
        computed.append(len(batch))
        return totals(batch)

    found = run(step, rows, max_tokens=7, out=out, flush_seconds=0)
    assert found.tolist() == [total_of(row).tolist() for row in rows]
    assert 0 < sum(computed) < len(rows)


def test_wrong_lengths_begin_no_file_and_equal_ones_are_one_run(tmp_path: Path) -> None:
    """Red when a call with wrong lengths left a run behind, and lengths as int32 were another run than as a list."""
    rows, out = sequences([5, 4, 3, 5]), tmp_path / "a.npy"
    for wrong in ([5, 4, 3, -5], np.array([5.0, 4.0, 3.0, 5.0])):
        with pytest.raises((ValueError, TypeError), match="lengths must be"):
            run(totals, rows, lengths=wrong, max_tokens=7, out=out)
    with pytest.raises(ValueError, match="a budget must be given"):
        run(totals, rows, out=out)
    assert list(tmp_path.iterdir()) == []
    found = run(totals, rows, lengths=[5, 4, 3, 5], max_tokens=7, out=out)
    for same in (np.array([5, 4, 3, 5], np.int32), torch.tensor([5, 4, 3, 5])):
        assert run(lambda _: 1 / 0, rows, lengths=same, max_tokens=7, out=out).tolist() == found.tolist()


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


def test_parts_that_belong_to_no_run_are_not_taken_for_its_own(tmp_path: Path) -> None:
    """Red: a kill while a finished run removes its folder may leave parts without their record."""
    out = unfinished(tmp_path, name="first")
    (tmp_path / "a.npy.parts" / "run.json").unlink()
    found = run(lambda batch: -totals(batch), sequences([5, 4, 3, 5, 2, 1, 6, 7]), max_tokens=7, out=out, name="second")
    assert (found[:, 2] < 0).all()


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    out, rows = tmp_path / "a.npy", sequences([1, 2])

    def step(batch: LengthTrackedBatch) -> Tensor:
        with pytest.raises(FileExistsError, match="a.npy.parts is being written by another run"):
            run(totals, rows, max_tokens=7, out=out)
        return totals(batch)

    run(step, rows, max_tokens=7, out=out)


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
