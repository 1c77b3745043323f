"""What lives here: padded batches that carry their lengths, the collator that makes them, functions that run on them.

May import: torch and NumPy, and nothing of `samplers`; inside, from top to bottom: `training`, `collator`, `batch`,
`operations`, `lengths`, `packing` and `padding`, `widths`, `tensors`, `errors`.
Words: *length* is the number of real time steps of a row, *width* that of padded ones; axes are B rows, T time steps, F
features and M real time steps.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from collate.deprecated.modules import find_former_modules
from collate.errors import LengthError

if TYPE_CHECKING:
    from collate.batch import LengthTrackedBatch
    from collate.collator import PadCollator
    from collate.training.checking.check_step import check_step
    from collate.training.losses import last_step, masked_mean, sequence_loss, token_scale
    from collate.training.max_tokens import find_max_tokens
    from collate.training.prefetch import DevicePrefetcher
    from collate.training.rnn import apply_rnn
    from collate.varlen.batch import VarlenBatch
    from collate.varlen.collator import VarlenCollator

# Importing torch takes seconds, and `lengthtrack report` needs only `errors` and `widths`. So every name is loaded when
# it is first used (PEP 562).
_MODULES: Final = {
    "DevicePrefetcher": "collate.training.prefetch",
    "LengthTrackedBatch": "collate.batch",
    "PadCollator": "collate.collator",
    "VarlenBatch": "collate.varlen.batch",
    "VarlenCollator": "collate.varlen.collator",
    "apply_rnn": "collate.training.rnn",
    "check_step": "collate.training.checking.check_step",
    "find_max_tokens": "collate.training.max_tokens",
    "last_step": "collate.training.losses",
    "masked_mean": "collate.training.losses",
    "sequence_loss": "collate.training.losses",
    "token_scale": "collate.training.losses",
}

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

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            # Code that has one kind of batch may load the other from disk.
            import_module("collate.varlen.batch")
            value = getattr(import_module(_MODULES[name]), name)
        elif not name.startswith("_") and find_spec(f"collate.{name}") is not None:
            value = import_module(f"collate.{name}")
        else:
            raise AttributeError(f"module 'collate' has no attribute {name!r}: its names are in collate.__all__")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


find_former_modules()
# A program that has torch may load batches from disk without naming their class: `torch.load` and pytrees must know it.
if "torch" in sys.modules:
    import_module("collate.varlen.batch")
