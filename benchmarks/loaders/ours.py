"""Ours: by index, with a reader thread, and as a stream. It also runs on older checkouts, whose code it imports."""

import inspect
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch.utils.data import DataLoader

import samplers
from collate import PadCollator
from loaders.contract import Blocks, Loader
from loaders.works import PADDING, ROWS, Work
from samplers import LengthBucketBatchSampler, ShardDataset, ShardStream, ShardWriter

# Two workers get equal work.
SHARDS: Final = 10
CHECKS: Final = "checksum, length, key"
AHEAD: Final = 2


def write(work: Work, folder: Path) -> None:
    """Shards in the default layout, each with its index."""
    with ShardWriter(folder, max_samples=-(-len(work.lengths) // SHARDS)) as writer:
        for number, sample in enumerate(work.samples()):
            writer.write({"__key__": work.key(number)} | sample)


def collator(work: Work) -> PadCollator:
    """The collator of a work."""
    return PadCollator({name: PADDING[name] for name in work.fields})


def parts(work: Work, folder: Path, **options: Any) -> dict[str, Any]:
    """What a loader by index takes: dataset, sampler and collator."""
    dataset = ShardDataset(folder, **options)
    batches = LengthBucketBatchSampler(dataset.index, batch_size=ROWS)
    return {"dataset": dataset, "batch_sampler": batches, "collate_fn": collator(work)}


def by_index(work: Work, folder: Path, workers: int, **options: Any) -> Iterable[Any]:
    """The loader of torch over a `ShardDataset`."""
    return DataLoader(**parts(work, folder, **options), num_workers=workers)


def read_ahead(work: Work, folder: Path, workers: int) -> Iterable[Any]:
    """The same, read by a thread ahead of the loop."""
    del workers
    loader: Iterable[Any] = samplers.ReadAheadLoader(**parts(work, folder), prefetch_batches=AHEAD)
    return loader


def stream(work: Work, folder: Path, workers: int) -> Iterable[Any]:
    """A `ShardStream`."""
    source = ShardStream(folder, collate_fn=collator(work), batch_size=ROWS)
    return DataLoader(source, batch_size=None, num_workers=workers)


def blocks(batch: Any) -> Blocks:
    """The padded tensors of a batch."""
    return {name: batch[name].padded for name in PADDING if name in batch}


def at_half(work: Work, folder: Path, kind: str, *, half: bool) -> Iterable[Any]:
    """A new loader, at the start or in the middle of an epoch.

    Args:
        work: The work.
        folder: Its shards.
        kind: `ShardDataset` or `ShardStream`.
        half: In the middle.
    """
    if kind == "ShardStream":
        source = ShardStream(folder, collate_fn=collator(work), batch_size=ROWS)
        loader, planned = DataLoader(source, batch_size=None), source
    else:
        made = parts(work, folder)
        loader, planned = DataLoader(**made), made["batch_sampler"]
    if half:
        planned.seek(planned.position(len(planned) // 2))
    return loader


LIBRARIES: Final = ("torch", "numpy")
LOADERS: Final = {
    "ShardDataset": Loader(write, by_index, blocks, CHECKS, "shards", workers=(0, 1, 2)),
    "ShardStream": Loader(write, stream, blocks, CHECKS, "shards", counts_start=True),
}
# Older checkouts do not have these.
if "ReadAheadLoader" in samplers.__all__:
    LOADERS["ReadAheadLoader"] = Loader(write, read_ahead, blocks, CHECKS, "shards", workers=(0,))
for option in ("memory_map", "in_memory"):
    if option in inspect.signature(ShardDataset.__init__).parameters:
        chosen = partial(by_index, **{option: True})
        LOADERS[f"ShardDataset, {option}=True"] = Loader(write, chosen, blocks, CHECKS, "shards", workers=(0, 1, 2))
