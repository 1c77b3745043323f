"""What lives here: padded batches that carry their lengths, the collator that makes them, functions that run on them.

May import: torch and NumPy, and nothing of `samplers`; inside, from top to bottom: `training`, `collator`, `batch`,
`operations`, `lengths`, `packing` and `padding`, `widths`, `tensors`, `errors`.
Words: *length* is the number of real time steps of a row, *width* that of padded ones; axes are B rows, T time steps, F
features and M real time steps.
"""

from collate.batch import LengthTrackedBatch
from collate.collator import PadCollator
from collate.deprecated.modules import find_former_modules
from collate.errors import LengthError
from collate.training.checking.check_step import check_step
from collate.training.losses import last_step, masked_mean, sequence_loss, token_scale
from collate.training.max_tokens import find_max_tokens
from collate.training.prefetch import DevicePrefetcher
from collate.training.rnn import apply_rnn
from collate.varlen.batch import VarlenBatch
from collate.varlen.collator import VarlenCollator

find_former_modules()
del find_former_modules

__all__ = [
    "DevicePrefetcher",
    "LengthError",
    "LengthTrackedBatch",
    "PadCollator",
    "VarlenBatch",
    "VarlenCollator",
    "apply_rnn",
    "check_step",
    "find_max_tokens",
    "last_step",
    "masked_mean",
    "sequence_loss",
    "token_scale",
]
