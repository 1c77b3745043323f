"""What an expert writes in thirty lines: a memory map of flat arrays, and pools that are sorted by length."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from loaders.contract import Blocks, Loader, blocks_of_pair, pad
from loaders.works import PADDING, ROWS, Array, Work

# Batches that are sorted together.
POOL: Final = 100


def write(work: Work, folder: Path) -> None:
    """Flat arrays, and the lengths."""
    work.save(folder / work.name)


class Pools(Sampler[Any]):
    """Shuffled samples in pools of 100 batches; each pool is sorted by length, cut, and its batches are shuffled."""

    def __init__(self, lengths: Array, *, as_arrays: bool) -> None:
        self.lengths, self.as_arrays = lengths, as_arrays
        self.rng = np.random.default_rng(0)

    def __iter__(self) -> Iterator[Any]:
        order = self.rng.permutation(len(self.lengths))
        for first in range(0, len(order), POOL * ROWS):
            pool = order[first : first + POOL * ROWS]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            for batch in self.rng.permutation(-(-len(pool) // ROWS)).tolist():
                rows = pool[batch * ROWS : (batch + 1) * ROWS]
                yield rows if self.as_arrays else rows.tolist()


class Mapped(Dataset[Any]):
    """Samples as views of the memory map."""

    def __init__(self, folder: Path) -> None:
        self.work = Work.open(folder)
        self.begins = self.work.starts.tolist()
        self.ends = np.cumsum(self.work.lengths).tolist()

    def __getitem__(self, index: int) -> dict[str, Array]:
        begin, end = self.begins[index], self.ends[index]
        return {name: values[begin:end] for name, values in self.work.fields.items()}


class Gathered(Dataset[Any]):
    """Whole batches: one gather for each field."""

    def __init__(self, folder: Path) -> None:
        self.work = Work.open(folder)
        self.starts = self.work.starts

    def __getitems__(self, rows: Array) -> tuple[Blocks, Tensor]:
        lengths = self.work.lengths[rows]
        steps = np.arange(int(lengths.max()))
        index = self.starts[rows][:, None] + steps
        outside = steps >= lengths[:, None]
        blocks = {}
        for name, values in self.work.fields.items():
            # The mode without checks is several times as fast; steps after the last sample become its last step.
            block = values.take(index, axis=0, mode="clip")
            block[outside] = PADDING[name]
            blocks[name] = torch.from_numpy(block)
        return blocks, torch.from_numpy(lengths)


class Copied(Gathered):
    """Whole batches: one copy for each field and row, the least that a loader must do."""

    def __getitems__(self, rows: Array) -> tuple[Blocks, Tensor]:
        lengths = self.work.lengths[rows]
        spans = list(zip(self.starts[rows].tolist(), lengths.tolist(), strict=True))
        blocks = {}
        for name, values in self.work.fields.items():
            block = np.full((len(rows), int(lengths.max()), *values.shape[1:]), PADDING[name], values.dtype)
            for row, (start, length) in enumerate(spans):
                block[row, :length] = values[start : start + length]
            blocks[name] = torch.from_numpy(block)
        return blocks, torch.from_numpy(lengths)


def as_it_is(batch: Any) -> Any:
    """The collate function where the dataset makes whole batches."""
    return batch


def padded(work: Work, folder: Path, workers: int) -> Iterable[Any]:
    """Samples one by one, then `pad_sequence`."""
    batches = Pools(work.lengths, as_arrays=False)
    return DataLoader(Mapped(folder / work.name), batch_sampler=batches, collate_fn=pad, num_workers=workers)


def gathered(work: Work, folder: Path, workers: int) -> Iterable[Any]:
    """One gather for each batch and field."""
    batches = Pools(work.lengths, as_arrays=True)
    return DataLoader(Gathered(folder / work.name), batch_sampler=batches, collate_fn=as_it_is, num_workers=workers)


def copied(work: Work, folder: Path, workers: int) -> Iterable[Any]:
    """One copy for each row and field."""
    batches = Pools(work.lengths, as_arrays=True)
    return DataLoader(Copied(folder / work.name), batch_sampler=batches, collate_fn=as_it_is, num_workers=workers)


LIBRARIES: Final = ("torch", "numpy")
LOADERS: Final = {
    "memory map, pad_sequence": Loader(write, padded, blocks_of_pair, "nothing", "memory map"),
    "memory map, one gather": Loader(write, gathered, blocks_of_pair, "nothing", "memory map"),
    "memory map, row by row": Loader(write, copied, blocks_of_pair, "nothing", "memory map"),
}
