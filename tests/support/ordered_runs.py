"""Steps and sequences for tests of `run_in_order`, and what one sample at a time gives."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from collate import LengthTrackedBatch, PadCollator
from samplers import run_in_order

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


def unfinished(folder: Path, **options: Any) -> Path:
    """A run of eight samples that failed after some batches; its file."""
    left = [0] * 3

    def step(batch: LengthTrackedBatch) -> Tensor:
        left.pop()
        return totals(batch)

    with pytest.raises(IndexError):
        run(step, sequences([5, 4, 3, 5, 2, 1, 6, 7]), max_tokens=7, flush_seconds=0, out=folder / "a.npy", **options)
    return folder / "a.npy"
