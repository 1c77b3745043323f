"""Ray: several nodes index a corpus in an object store, and train on it. They share no disk.

It starts an S3 server (moto[server], and s3fs) and three nodes here: python examples/frameworks/ray_data.py
"""

import logging
import os
import tempfile
from typing import Any

import fsspec
import numpy as np
import ray
import torch
from moto.server import ThreadedMotoServer
from parity import COLLATE, MAX_TOKENS, Tagger, loss_of
from ray.cluster_utils import Cluster
from ray.data.collate_fn import NumpyBatchCollateFn
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from tally import Tally
from torch.utils.data import DataLoader
from webdataset_pipeline import write_shards

from collate import token_scale
from samplers import LengthBucketBatchSampler, LengthIndex, ShardDataset


def index_shard(row: dict[str, str]) -> dict[str, str]:
    """A Ray task on any node: read the headers of one shard, and keep its index next to it in the store."""
    LengthIndex.build([row["item"]], length_fields=["bits"], resume=True)
    return {"path": f"{row['item']}.ltx", "node": ray.get_runtime_context().get_node_id()}


class Collate(NumpyBatchCollateFn):
    """Ray passes a dict of columns, but a PadCollator takes a list of samples."""

    def __call__(self, columns: dict[str, np.ndarray]) -> dict[str, Any]:
        """Turn the columns into samples, and the samples into a batch."""
        return COLLATE([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def train(config: dict[str, str]) -> dict[str, str]:
    """The function of each worker: an epoch that Ray streams, then two that the sampler plans."""
    data, facts, model = ShardDataset(config["corpus"]), {}, prepare_model(Tagger())
    streamed = ray.train.get_dataset_shard("train").iter_torch_batches(batch_size=19, collate_fn=Collate())
    sampler = LengthBucketBatchSampler(data.index, max_tokens=MAX_TOKENS)
    planned = DataLoader(data.follow(sampler), batch_sampler=sampler, collate_fn=COLLATE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for name, batches in {"streamed, 19 rows": streamed, "planned": planned, "planned again": planned}.items():
        tally = Tally(len(data))
        for batch in batches:
            loss = loss_of(model, batch, "sum") * token_scale(batch["bits"].num_tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tally.add(torch.tensor([int(key) for key in batch["__key__"]]), batch["bits"].mask, loss.item())
        facts[name] = str(tally.gathered())
    return facts


def main(shards: ray.data.Dataset, folder: str) -> None:
    """Index the shards, join the indexes, and train with one worker on each node."""
    indexed = shards.map(index_shard, num_cpus=1, scheduling_strategy="SPREAD").take_all()
    LengthIndex.open_all(sorted(row["path"] for row in indexed)).save(f"{folder}/corpus.ltx")
    print(f"{LengthIndex.open(f'{folder}/corpus.ltx')}, indexed by {len({row['node'] for row in indexed})} nodes")
    options = {"scaling_config": ScalingConfig(num_workers=2, placement_strategy="STRICT_SPREAD")}
    options["run_config"] = RunConfig(storage_path=f"{folder}/runs")
    datasets = {"train": shards.flat_map(lambda row: ShardDataset([row["item"]]))}
    trainer = TorchTrainer(train, train_loop_config={"corpus": f"{folder}/corpus.ltx"}, datasets=datasets, **options)
    print(*(f"{name}: {tally}" for name, tally in trainer.fit().return_value.items()), sep="\n")


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    (server := ThreadedMotoServer("127.0.0.1", port=0, verbose=False)).start()
    # The processes of all nodes inherit these, as on machines that are set up for a store.
    os.environ |= {"AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port())}
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    (store := fsspec.filesystem("s3")).mkdir("s3://ray")
    with tempfile.TemporaryDirectory() as disk:
        write_shards(disk)
        store.put(f"{disk}/*.tar", "s3://ray/parity/")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(cluster.address, log_to_driver=False)
    paths = [f"s3://{path}" for path in store.glob("s3://ray/parity/*.tar")]
    main(ray.data.from_items(paths, override_num_blocks=2 * len(nodes)), "s3://ray/parity")
    ray.shutdown()
