"""To be said."""

from samplers.shards.format.samples import decode_groups

__all__ = ["decode_groups"]
