"""Ray: many processes index a corpus of tars, and two train on it, on a cluster of one machine.

python examples/frameworks/ray_data.py
"""

import tempfile
from typing import Any

import numpy as np
import ray
import torch
from parity import COLLATE, MAX_TOKENS, Tagger, loss_of
from ray.data.collate_fn import NumpyBatchCollateFn
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from tally import Tally
from torch.utils.data import DataLoader
from webdataset_pipeline import write_shards

from collate import token_scale
from samplers import LengthBucketBatchSampler, LengthIndex, ShardDataset


def index_shard(row: dict[str, str]) -> dict[str, str]:
    """A Ray task: read the headers of one shard, and write its index next to it."""
    path = f"{row['item']}.ltx"
    LengthIndex.build([row["item"]], length_fields=["bits"]).save(path)
    return {"path": path}


class Collate(NumpyBatchCollateFn):
    """Ray passes a dict of columns, but a PadCollator takes a list of samples."""

    def __call__(self, columns: dict[str, np.ndarray]) -> dict[str, Any]:
        """Turn the columns into samples, and the samples into a batch."""
        return COLLATE([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def train(config: dict[str, str]) -> dict[str, str]:
    """The function of each worker: two epochs that Ray streams, then, with new weights, two that the sampler plans."""
    data, facts = ShardDataset(config["corpus"]), {}
    streamed = ray.train.get_dataset_shard("train").iter_torch_batches(batch_size=19, collate_fn=Collate())
    sampler = LengthBucketBatchSampler(data.index, max_tokens=MAX_TOKENS)
    planned = DataLoader(data, batch_sampler=sampler, collate_fn=COLLATE)
    for name, batches in {"streamed, 19 rows": streamed, "planned": planned}.items():
        model = prepare_model(Tagger())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for epoch in range(2):
            facts[f"{name}, epoch {epoch}"] = str(train_epoch(model, optimizer, batches, Tally(len(data))))
    return facts


def train_epoch(model: Any, optimizer: Any, batches: Any, tally: Tally) -> Tally:
    """Train as with DDP, and return the tally of the epoch."""
    for batch in batches:
        loss = loss_of(model, batch, "sum") * token_scale(batch["bits"].num_tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tally.add(torch.tensor([int(key) for key in batch["__key__"]]), batch["bits"].mask, loss.item())
    return tally.gathered()


def main(folder: str) -> None:
    """Write tars, index them, join the indexes, and train."""
    shards, corpus = ray.data.from_items(write_shards(folder)), f"{folder}/corpus.ltx"
    indexes = sorted(row["path"] for row in shards.map(index_shard).take_all())
    LengthIndex.concat([LengthIndex.open(path) for path in indexes]).save(corpus)
    print(LengthIndex.open(corpus))
    options = {"scaling_config": ScalingConfig(num_workers=2), "run_config": RunConfig(storage_path=folder)}
    datasets = {"train": shards.flat_map(lambda row: ShardDataset([row["item"]]))}
    trainer = TorchTrainer(train, train_loop_config={"corpus": corpus}, datasets=datasets, **options)
    print(*(f"{name}: {tally}" for name, tally in trainer.fit().return_value.items()), sep="\n")


if __name__ == "__main__":
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
