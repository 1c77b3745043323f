"""Scanning the groups of a shard, by layout: blocks, and plain groups of one sample.

Imports `measuring`, `shard_groups` and `tables` of `indexing`, and `format`; of `collate` the errors.
Terms: those of `indexing`.
"""
