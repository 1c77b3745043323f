"""Padded batches that carry their lengths, and what runs on them."""

from collate.errors import LengthError

__all__ = ["LengthError"]
