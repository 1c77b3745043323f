"""Rows of other programs to samples of shards: what `lengthtrack convert` reads, tokenises, and resumes.

Imports `shards` and `sources`. `cli.commands` imports it.
Terms: a *row* is what an input holds, a *sample* what a shard holds; a *column* is a part of a row, a *field* of a
sample. A conversion is *unfinished* from its start until its last sample is written.
"""
