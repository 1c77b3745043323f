"""Length-bucketed plans, samplers, shards and streams."""

from samplers.plan import BatchPlan, plan_epoch
from samplers.sampler import LengthBucketBatchSampler
from samplers.shards.dataset import ShardDataset
from samplers.shards.index import LengthIndex
from samplers.shards.writer import ShardWriter
from samplers.widths import optimal_widths

__all__ = [
    "BatchPlan",
    "LengthBucketBatchSampler",
    "LengthIndex",
    "ShardDataset",
    "ShardWriter",
    "optimal_widths",
    "plan_epoch",
]
