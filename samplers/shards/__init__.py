"""Corpora on disk: samples in tar shards, their lengths in an index, writers and a dataset.

Rooms from bottom to top: `storage`, `format`, `indexing`, `opening`, then `dataset`, then `writing`. They import
nothing of `planning`, of `collate` only `errors` and `widths`, and of `sources` only `extras`.
Terms: a *shard* is a tar of samples; its *layout* is `"plain"` or `"blocks"`; an *index* holds the lengths; a *corpus*
is the shards of one index; a *sample index* counts the samples of a corpus, an *offset* the bytes of a file.
"""

from typing import TYPE_CHECKING

from samplers.lazy_names import lazy_names

if TYPE_CHECKING:
    from samplers.shards.dataset import ShardDataset
    from samplers.shards.format.samples import decode_groups
    from samplers.shards.indexing.index import LengthIndex
    from samplers.shards.writing.writer import ShardWriter
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "LengthIndex": "samplers.shards.indexing.index",
            "ShardDataset": "samplers.shards.dataset",
            "ShardWriter": "samplers.shards.writing.writer",
            "decode_groups": "samplers.shards.format.samples",
        },
    )

__all__ = ["LengthIndex", "ShardDataset", "ShardWriter", "decode_groups"]
