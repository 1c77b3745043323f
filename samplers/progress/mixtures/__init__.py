"""Streams of mixtures: the samples of corpora in shards, and what workers know of a mixture that changes.

Contents: `mixed_shards` (samples by the indices of a mixture), `shared_text` (a text that processes share), `staged`
(a loader whose copies follow a change). It imports `progress`, `planning` and `shards`.
"""
