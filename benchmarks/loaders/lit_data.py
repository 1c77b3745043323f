"""litdata: optimized chunks, its streaming dataset and its loader."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

import litdata
import torch

from loaders.contract import Loader, blocks_of_pair, pad
from loaders.works import ROWS, Work


def write(work: Work, folder: Path) -> None:
    """Chunks of 64 MB, written by one process."""
    samples = work.samples()
    options = {"output_dir": str(folder), "chunk_bytes": "64MB", "num_workers": 1, "verbose": False}
    litdata.optimize(partial(tensors_of, samples), inputs=list(range(len(samples))), **options)


def tensors_of(samples: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """One sample as tensors."""
    return {name: torch.from_numpy(values.copy()) for name, values in samples[index].items()}


def epochs(work: Work, folder: Path, workers: int) -> Iterable[Any]:
    """Its shuffle, and `pad_sequence`."""
    del work
    dataset = litdata.StreamingDataset(str(folder), shuffle=True)
    loader: Iterable[Any] = litdata.StreamingDataLoader(dataset, batch_size=ROWS, collate_fn=pad, num_workers=workers)
    return loader


LOADERS: Final = {"litdata": Loader(write, epochs, blocks_of_pair, "nothing", "chunks")}
LIBRARIES: Final = ("litdata",)
