"""Batches of similar lengths: plans, batch samplers, streams and shards.

Contents: the files here are the loaders; the rooms are `planning` (lengths to batches), `progress` (positions),
`dynamic` (streams without known lengths), `shards` (lengths and samples on disk), `sources` (lengths of data of other
programs), `inference` (a step over every sample, in order), `integrations` (trainers) and `cli` (the command).
It imports `errors`, `widths` and `deprecated` from `collate`, nothing else. CONTRIBUTING defines the words.
"""

import sys
from typing import TYPE_CHECKING

try:
    from collate.errors import LengthError
except ImportError as error:
    # Python says only that `collate` is not a package, or has no such name.
    hidden = f"{getattr(sys.modules.get('collate'), '__file__', None)} has the name of lengthtrack's package 'collate'"
    raise ImportError(f"{hidden}, which `samplers` needs: rename that file, or `import lengthtrack` first") from error

from samplers.lazy_names import lazy_names

if TYPE_CHECKING:
    from samplers.batch_sampler import LengthBucketBatchSampler, PackingBatchSampler
    from samplers.dynamic.node import LengthBucketNode, PackingNode
    from samplers.dynamic.pack_stage import pack_by_length
    from samplers.dynamic.stage import bucket_by_length
    from samplers.inference.run_in_order import run_in_order
    from samplers.planning.fitting.cost_fit import fit_cost
    from samplers.planning.fitting.optimal_widths import optimal_widths
    from samplers.planning.mixtures.epochs import plan_epoch
    from samplers.planning.mixtures.mixture import Mixture
    from samplers.planning.packs.one_list import pack
    from samplers.planning.plan import BatchPlan
    from samplers.progress.read_ahead import ReadAheadLoader
    from samplers.shard_stream import ShardStream
    from samplers.shards.dataset import ShardDataset
    from samplers.shards.indexing.index import LengthIndex
    from samplers.shards.split_dataset import SplitDataset
    from samplers.shards.storage.network.transport import Transport
    from samplers.shards.writing.writer import ShardWriter
    from samplers.sources.lengths_of import lengths_of
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "BatchPlan": "samplers.planning.plan",
            "LengthBucketBatchSampler": "samplers.batch_sampler",
            "LengthBucketNode": "samplers.dynamic.node",
            "LengthIndex": "samplers.shards.indexing.index",
            "Mixture": "samplers.planning.mixtures.mixture",
            "PackingBatchSampler": "samplers.batch_sampler",
            "PackingNode": "samplers.dynamic.node",
            "ReadAheadLoader": "samplers.progress.read_ahead",
            "ShardDataset": "samplers.shards.dataset",
            "ShardStream": "samplers.shard_stream",
            "ShardWriter": "samplers.shards.writing.writer",
            "SplitDataset": "samplers.shards.split_dataset",
            "Transport": "samplers.shards.storage.network.transport",
            "bucket_by_length": "samplers.dynamic.stage",
            "fit_cost": "samplers.planning.fitting.cost_fit",
            "lengths_of": "samplers.sources.lengths_of",
            "optimal_widths": "samplers.planning.fitting.optimal_widths",
            "pack": "samplers.planning.packs.one_list",
            "pack_by_length": "samplers.dynamic.pack_stage",
            "plan_epoch": "samplers.planning.mixtures.epochs",
            "run_in_order": "samplers.inference.run_in_order",
        },
    )

__all__ = [
    "BatchPlan",
    "LengthBucketBatchSampler",
    "LengthBucketNode",
    "LengthError",
    "LengthIndex",
    "Mixture",
    "PackingBatchSampler",
    "PackingNode",
    "ReadAheadLoader",
    "ShardDataset",
    "ShardStream",
    "ShardWriter",
    "SplitDataset",
    "Transport",
    "bucket_by_length",
    "fit_cost",
    "lengths_of",
    "optimal_widths",
    "pack",
    "pack_by_length",
    "plan_epoch",
    "run_in_order",
]
