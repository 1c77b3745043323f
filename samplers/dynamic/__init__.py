"""Bucketing and packing of streams whose lengths are not known in advance: stages for webdataset, nodes for torchdata.

Imports `planning` (budget and options), `shards` (skipping), `testing`, and of `collate` the errors and `widths`.
Terms: a sample *waits* in the buffer and is *emitted* in a batch; an *arrival* counts the samples of the source, with
those that are left out; a batch is *due* when a limit of the buffer is reached; a *snapshot* is a state of the source,
and a *stale* one still describes the epoch before.
"""

from typing import TYPE_CHECKING

from samplers.lazy_names import lazy_names

if TYPE_CHECKING:
    from samplers.dynamic.node import LengthBucketNode, PackingNode
    from samplers.dynamic.pack_stage import PackStage, pack_by_length
    from samplers.dynamic.stage import BucketStage, bucket_by_length
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "BucketStage": "samplers.dynamic.stage",
            "LengthBucketNode": "samplers.dynamic.node",
            "PackStage": "samplers.dynamic.pack_stage",
            "PackingNode": "samplers.dynamic.node",
            "bucket_by_length": "samplers.dynamic.stage",
            "pack_by_length": "samplers.dynamic.pack_stage",
        },
    )

__all__ = ["BucketStage", "LengthBucketNode", "PackStage", "PackingNode", "bucket_by_length", "pack_by_length"]
