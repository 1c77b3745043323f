"""What a loader is, for the process that takes turns with it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from loaders.works import PADDING, Work

# The padded tensors of a batch, by field.
Blocks: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Loader:
    """A way from files to padded batches of 64 rows.

    Attributes:
        write: Writes a work to an empty folder.
        epochs: Makes an iterable of batches, of which each iteration is an epoch: from a work (whose values a loader
            does not use), the folder, and the number of workers.
        blocks: The padded tensors of a batch.
        checks: What it compares while it reads, in words.
        files: Name of its files. Loaders of equal name share them.
        workers: Numbers of workers that it can have.
        from_first: Count from the first batch on, also in one process, because its epochs take long to start.
        counts_start: Count from the start also with workers, because it reads ahead before its first batch.
        works: Works that it can load; None for all.
    """

    write: Callable[[Work, Path], None]
    epochs: Callable[[Work, Path, int], Iterable[Any]]
    blocks: Callable[[Any], Blocks]
    checks: str
    files: str
    workers: tuple[int, ...] = (0, 2)
    from_first: bool = False
    counts_start: bool = False
    works: tuple[str, ...] | None = None


def pad(samples: Iterable[Mapping[str, Any]]) -> tuple[Blocks, Tensor]:
    """The usual collate function by hand: `pad_sequence` for each field, and the lengths.

    Args:
        samples: By field, tensors or arrays `[L, *F]`. Other entries are left out.
    """
    rows = list(samples)
    columns = {
        name: [torch.from_numpy(row[name]) if isinstance(row[name], np.ndarray) else row[name] for row in rows]
        for name in rows[0]
        if name in PADDING
    }
    blocks = {
        name: pad_sequence(column, batch_first=True, padding_value=PADDING[name]) for name, column in columns.items()
    }
    return blocks, torch.tensor([len(value) for value in next(iter(columns.values()))])


def blocks_of_pair(batch: tuple[Blocks, Tensor]) -> Blocks:
    """The padded tensors of what `pad` returns."""
    return batch[0]
