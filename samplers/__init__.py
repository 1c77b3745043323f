"""Length-bucketed plans, samplers, shards and streams."""

from samplers.plan import BatchPlan, plan_epoch
from samplers.sampler import LengthBucketBatchSampler
from samplers.shard_stream import ShardStream
from samplers.shards.dataset import ShardDataset
from samplers.shards.index import LengthIndex
from samplers.shards.writer import ShardWriter
from samplers.stream import LengthBucketNode, bucket_by_length
from samplers.widths import optimal_widths

__all__ = [
    "BatchPlan",
    "LengthBucketBatchSampler",
    "LengthBucketNode",
    "LengthIndex",
    "ShardDataset",
    "ShardStream",
    "ShardWriter",
    "bucket_by_length",
    "optimal_widths",
    "plan_epoch",
]
