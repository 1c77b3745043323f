"""webdataset: plain tars, shuffled in a buffer, decoded and batched in the order in which they come."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import webdataset as wds

from loaders.contract import Loader, blocks_of_pair, pad
from loaders.works import PADDING, ROWS, Work

SHARDS: Final = 10
BUFFER: Final = 5_000


def write(work: Work, folder: Path) -> None:
    """Ten tars of the same number of samples, each field an `.npy` file."""
    each = -(-len(work.lengths) // SHARDS)
    with wds.ShardWriter(f"{folder}/%02d.tar", maxcount=each, verbose=0) as writer:
        for number, sample in enumerate(work.samples()):
            files = {f"{name}.npy": as_npy(values) for name, values in sample.items()}
            writer.write({"__key__": work.key(number)} | files)


def as_npy(values: Any) -> bytes:
    """The bytes of an `.npy` file."""
    file = BytesIO()
    np.save(file, values)
    return file.getvalue()


def read_npy(data: bytes) -> Any:
    """The array of an `.npy` file."""
    return np.load(BytesIO(data))


def collate(samples: list[dict[str, Any]]) -> Any:
    """Padded fields of the samples."""
    return pad([{name: sample[f"{name}.npy"] for name in PADDING if f"{name}.npy" in sample} for sample in samples])


def epochs(work: Work, folder: Path, workers: int) -> Iterable[Any]:
    """Shuffled shards, a shuffle buffer, batches of 64."""
    del work
    shards = sorted(map(str, folder.glob("*.tar")))
    source = wds.WebDataset(shards, shardshuffle=SHARDS).shuffle(BUFFER).decode(wds.handle_extension("npy", read_npy))
    batches = source.batched(ROWS, collation_fn=collate)
    loader: Iterable[Any] = wds.WebLoader(batches, batch_size=None, num_workers=workers)
    return loader


LOADERS: Final = {"webdataset": Loader(write, epochs, blocks_of_pair, "tar headers", "tars")}
LIBRARIES: Final = ("webdataset",)
