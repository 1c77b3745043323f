"""The benchmark for GPUs: honest without one, and its counters count."""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collate import LengthTrackedBatch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    yield runpy.run_path(str(FOLDER / "gpu.py"))
    sys.path.remove(str(FOLDER))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which it would measure")
def test_without_a_gpu_it_says_so_in_one_line_and_ends_with_two() -> None:
    done = subprocess.run([sys.executable, FOLDER / "gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("no GPU: ")


def test_the_bytes_that_leave_the_host_are_counted(benchmark: Any) -> None:
    batch = LengthTrackedBatch(torch.zeros(4, 5), [5, 3, 2, 1])
    with benchmark["Sent"]() as sent:
        batch.padded.clone()
        batch.to("cpu")
        assert sent.bytes == 0
        there = torch.empty(3, dtype=torch.float32, device="meta")
        there.copy_(torch.zeros(3))
        assert sent.bytes == 3 * 4
        batch.to("meta")
    # The block, and the lengths that its mask is made from; never the mask.
    assert sent.bytes == 3 * 4 + 4 * 5 * 4 + 4 * 8


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_random_batches_hold_every_sample_once_within_the_budget(benchmark: Any, lengths: Any) -> None:
    batches = benchmark["random_batches"](lengths, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 100 for batch in batches)


def test_both_ways_of_writing_the_step_give_the_same_loss(benchmark: Any) -> None:
    torch.manual_seed(0)
    model = benchmark["Tagger"](8)
    samples = benchmark["corpus_of"](benchmark["SMALL"])[:6]
    ours = model(*benchmark["PadCollator"]()(samples))
    torch.testing.assert_close(ours, model.textbook(*benchmark["by_hand"](samples)))
