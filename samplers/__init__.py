"""Batches of similar lengths: plans, batch samplers, streams and shards.

Contents: the files here are the loaders; the rooms are `planning` (lengths to batches), `progress` (positions),
`dynamic` (streams without known lengths), `shards` (lengths and samples on disk) and `cli` (the command).
It imports `errors`, `widths` and `deprecated` from `collate`, nothing else. CONTRIBUTING defines the words.
"""

import sys

try:
    from collate.errors import LengthError
except ModuleNotFoundError as error:
    # Python says only that `collate` is not a package.
    hidden = f"{getattr(sys.modules.get('collate'), '__file__', None)} has the name of lengthtrack's package 'collate'"
    raise ImportError(f"{hidden}, which `samplers` needs: rename that file, or `import lengthtrack` first") from error

from samplers.batch_sampler import LengthBucketBatchSampler
from samplers.dynamic.node import LengthBucketNode, PackingNode
from samplers.dynamic.pack_stage import pack_by_length
from samplers.dynamic.stage import bucket_by_length
from samplers.packing_sampler import PackingBatchSampler
from samplers.planning.optimal_widths import optimal_widths
from samplers.planning.packs.one_list import pack
from samplers.planning.plan import BatchPlan, plan_epoch
from samplers.shard_stream import ShardStream
from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.split_dataset import SplitDataset
from samplers.shards.writing.writer import ShardWriter

__all__ = [
    "BatchPlan",
    "LengthBucketBatchSampler",
    "LengthBucketNode",
    "LengthError",
    "LengthIndex",
    "PackingBatchSampler",
    "PackingNode",
    "ShardDataset",
    "ShardStream",
    "ShardWriter",
    "SplitDataset",
    "bucket_by_length",
    "optimal_widths",
    "pack",
    "pack_by_length",
    "plan_epoch",
]
