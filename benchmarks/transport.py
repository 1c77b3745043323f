"""Sending a batch from a worker to the main process, against a bare padded tensor and a dict of four tensors."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice

import numpy as np
import torch
from harness import Row, compare, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from collate import LengthTrackedBatch, PadCollator

BATCHES = 100


class Endless(IterableDataset[object]):
    """Copies of one batch, each in new memory, like the batches of a collator."""

    def __init__(self, make: Callable[[], object]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[object]:
        while True:
            yield self.make()


def take_from(make: Callable[[], object]) -> Callable[[], None]:
    """A call that takes 100 batches from a worker."""
    batches = iter(DataLoader(Endless(make), batch_size=None, num_workers=1))

    def take() -> None:
        for _ in islice(batches, BATCHES):
            pass

    return take


def four_tensors(batch: LengthTrackedBatch) -> dict[str, Tensor]:
    """The output of a collate function by hand."""
    names = ("padded", "lengths", "mask", "permutation")
    return {name: getattr(batch, name).clone() for name in names}


def measure(rows: int, steps: int, dtype: torch.dtype) -> Row:
    """Time one shape: `[rows, steps]`, with lengths from half of the time steps to all."""
    lengths = np.random.default_rng(0).integers(steps // 2, steps + 1, rows)
    batch = LengthTrackedBatch.from_sequences([torch.ones(int(n), dtype=dtype) for n in lengths])
    calls = {
        "LengthTrackedBatch": take_from(lambda: batch.with_padded(batch.padded.clone())),
        "bare padded tensor": take_from(batch.padded.clone),
        "dict of four tensors": take_from(lambda: four_tensors(batch)),
    }
    bar = "not slower than four tensors, close to the bare one"
    case = f"{BATCHES} batches {rows} x {steps} {str(dtype).removeprefix('torch.')}"
    return compare(case, "LengthTrackedBatch", calls, rounds=31, bar=bar)


def measure_collated(rows: int, steps: int) -> Row:
    """Time batches that a worker collates and sends, float32 `[rows, steps]`: large ones, in memory that is used again.

    The others are padded by `pad_sequence`, and come in a new file of shared memory each.
    """
    lengths = np.random.default_rng(0).integers(steps // 2, steps + 1, rows)
    samples = [torch.ones(int(n)) for n in lengths]
    collate = PadCollator()
    whole = collate(samples)

    def by_hand() -> dict[str, Tensor]:
        others = {name: getattr(whole, name).clone() for name in ("lengths", "mask", "permutation")}
        return {"padded": pad_sequence(samples, batch_first=True), **others}

    calls = {
        "LengthTrackedBatch": take_from(lambda: collate(samples)),
        "bare padded tensor": take_from(lambda: pad_sequence(samples, batch_first=True)),
        "dict of four tensors": take_from(by_hand),
    }
    megabytes = rows * steps * 4 / 1e6
    case = f"{BATCHES} collated batches {rows} x {steps} float32, {megabytes:.1f} MB"
    return compare(case, "LengthTrackedBatch", calls, rounds=15, bar="not slower than either")


def main() -> None:
    """Print and save small batches as they are, and large ones with their collation."""
    torch.set_num_threads(1)
    small = [measure(64, 512, torch.float32), measure(256, 30, torch.int64)]
    large = [measure_collated(64, steps) for steps in (4_096, 16_384, 65_536)]
    save("transport", [asdict(row) for row in [*small, *large]])


if __name__ == "__main__":
    main()
