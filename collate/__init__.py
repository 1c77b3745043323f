"""Padded batches that carry their lengths, and what runs on them."""

from collate.batch import LengthTrackedBatch
from collate.check import check_step
from collate.collator import PadCollator
from collate.errors import LengthError
from collate.memory import find_max_tokens
from collate.prefetch import DevicePrefetcher
from collate.reduce import last_step, masked_mean, sequence_loss, token_scale
from collate.rnn import apply_rnn

__all__ = [
    "DevicePrefetcher",
    "LengthError",
    "LengthTrackedBatch",
    "PadCollator",
    "apply_rnn",
    "check_step",
    "find_max_tokens",
    "last_step",
    "masked_mean",
    "sequence_loss",
    "token_scale",
]
