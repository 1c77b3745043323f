"""Tables: which samples are in batch number i of an epoch, and the order of an epoch's batches.

Contents: `BatchTable` (cut into buckets), `PoolTable` (small corpora, sorted again in each epoch), `WindowTable`
(shards, read window by window), and the orders `EpochOrder` and `WindowOrder`. They import `planning` except
`schedule`, `plan` and `report`. Words: *window* (samples sorted together, or a run of shards planned together), *pool*
(a part of a small corpus), *lane* (a part of the reading order), *read group* (batches that are read together).
"""
