"""mosaicml-streaming: MDS shards, its streaming dataset, the loader of torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import streaming
from torch.utils.data import DataLoader

from loaders.contract import Loader, blocks_of_pair, pad
from loaders.works import ROWS, Work


def write(work: Work, folder: Path) -> None:
    """Shards of its default size."""
    columns = {name: f"ndarray:{values.dtype}" for name, values in work.fields.items()}
    with streaming.MDSWriter(out=str(folder / "shards"), columns=columns) as writer:
        for sample in work.samples():
            writer.write(sample)


def epochs(work: Work, folder: Path, workers: int) -> Iterable[Any]:
    """Its shuffle, and `pad_sequence`."""
    del work
    dataset = streaming.StreamingDataset(local=str(folder / "shards"), shuffle=True, batch_size=ROWS)
    return DataLoader(dataset, batch_size=ROWS, collate_fn=pad, num_workers=workers)


LOADERS: Final = {"mosaicml-streaming": Loader(write, epochs, blocks_of_pair, "nothing", "shards", from_first=True)}
LIBRARIES: Final = ("mosaicml-streaming",)
