"""webdataset: a stream of plain tars with `.npy` members, bucketed by length in two workers.

python examples/frameworks/webdataset_pipeline.py
"""

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from parity import COLLATE, MAX_TOKENS, Parity, Tagger, take_step
from tally import Tally, show

from samplers import bucket_by_length

DATA = Parity()


def write_shards(folder: str) -> list[str]:
    """Write the toy data as tars; `mtime=0` makes them smaller and reproducible."""
    with wds.ShardWriter(f"{folder}/%03d.tar", maxcount=300, mtime=0, verbose=0) as shards:
        for sample in map(DATA.__getitem__, range(len(DATA))):
            arrays = {f"{name}.npy": sample[name].numpy() for name in ("bits", "odd")}
            shards.write({"__key__": f"{sample['id']:06d}", **arrays})
    return sorted(map(str, Path(folder).glob("*.tar")))


def decode(sample: dict[str, Any]) -> dict[str, Any]:
    """Read only arrays: `.decode()` would unpickle the content of a shard."""
    arrays = {name: np.load(io.BytesIO(sample[f"{name}.npy"]), allow_pickle=False) for name in ("bits", "odd")}
    return {"id": int(sample["__key__"]), **arrays}


def make_loader(shards: list[str], stage: Callable[[Any], Iterator[Any]]) -> wds.WebLoader:
    """Decode, shuffle, batch with the stage, and pad, in workers that share the shards."""
    stream = wds.WebDataset(shards, shardshuffle=False).map(decode).shuffle(100, seed=0).compose(stage).map(COLLATE)
    return wds.WebLoader(stream, batch_size=None, num_workers=2)


def main() -> None:
    """Train an epoch on bucketed batches, and for comparison one on batches in the order of arrival."""
    bucketed = bucket_by_length("bits", max_tokens=MAX_TOKENS, buffer_size=300)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(folder)
        for name, stage in {"bucketed": bucketed, "19 as they come": wds.batched(19, collation_fn=None)}.items():
            model, tally = Tagger(), Tally(len(DATA))
            optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
            for batch in make_loader(shards, stage):
                take_step(model, optimizer, batch, tally)
            show(name, tally)


if __name__ == "__main__":
    main()
