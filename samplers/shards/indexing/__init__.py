"""Indexes of shards: scanning shards, tables in memory and in `.ltx` files, and checks of an index against its shards.

Imports `format` and `storage`, and of `collate` the errors.
Terms: *tables* hold a row for each sample; an *index* is the file of the tables; a *cache* is a shard's own index, from
which a killed build resumes; a *corpus* is the shards of one index. To *scan* reads headers, to *measure* calls a
user's function, to *verify* compares an index with its shards.
"""
