"""The format on disk: tar members, `.npy` arrays, the two layouts `"plain"` and `"blocks"`, and columns of an index.

Imports `storage`, of `collate` the errors, and of `sources` the import of optional dependencies.
Terms: a *member* is a file in a tar; a *group* is neighbouring members of one key; a *field* is a named part of a
sample; a *block* is a group that holds many samples; a *record* is 512 bytes of a tar.
`context` says where an error happened (shard, key, field), for messages.
"""

from samplers.shards.format.samples import decode_groups

__all__ = ["decode_groups"]
