"""The endless batches of a source, pass after pass, whatever its batches are.

Contents: `source_stream` (what all have), `buckets` and `packs` (batches of similar lengths, and of full rows),
`windows` (the same of corpora in shards, read some shards at a time). It imports `planning`, of `mixtures` the options.
Words: *segment* (a run of a stream that lies in one pass), *cut* (a part of a pass that another mixture began).
"""
