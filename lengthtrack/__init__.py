"""lengthtrack: every public name of its packages `collate` and `samplers` under one name, and its version.

>>> import lengthtrack as lt
>>> batch = lt.PadCollator()([{"x": [1, 2, 3]}, {"x": [4]}])
>>> batch["x"].lengths
tensor([3, 1])

A package is loaded when the first of its names is used, so that `import lengthtrack` takes milliseconds. It is found by
its location: a `collate.py` or `samplers.py` of the user's does not hide it, and a warning names that file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lengthtrack.packages import PACKAGES, ShadowWarning, claim_packages

if TYPE_CHECKING:
    from collate import (
        DevicePrefetcher,
        LengthError,
        LengthTrackedBatch,
        PadCollator,
        VarlenBatch,
        VarlenCollator,
        apply_rnn,
        check_step,
        find_max_tokens,
        last_step,
        masked_mean,
        sequence_loss,
        token_scale,
    )
    from samplers import (
        BatchPlan,
        LengthBucketBatchSampler,
        LengthBucketNode,
        LengthIndex,
        Mixture,
        PackingBatchSampler,
        PackingNode,
        ReadAheadLoader,
        ShardDataset,
        ShardStream,
        ShardWriter,
        SplitDataset,
        Transport,
        bucket_by_length,
        fit_cost,
        lengths_of,
        optimal_widths,
        pack,
        pack_by_length,
        plan_epoch,
        run_in_order,
    )

__all__ = [
    "BatchPlan",
    "DevicePrefetcher",
    "LengthBucketBatchSampler",
    "LengthBucketNode",
    "LengthError",
    "LengthIndex",
    "LengthTrackedBatch",
    "Mixture",
    "PackingBatchSampler",
    "PackingNode",
    "PadCollator",
    "ReadAheadLoader",
    "ShadowWarning",
    "ShardDataset",
    "ShardStream",
    "ShardWriter",
    "SplitDataset",
    "Transport",
    "VarlenBatch",
    "VarlenCollator",
    "__version__",
    "apply_rnn",
    "bucket_by_length",
    "check_step",
    "find_max_tokens",
    "fit_cost",
    "last_step",
    "lengths_of",
    "masked_mean",
    "optimal_widths",
    "pack",
    "pack_by_length",
    "plan_epoch",
    "run_in_order",
    "sequence_loss",
    "token_scale",
]

__version__: str

claim_packages()


def _load(name: str) -> Any:
    """A name of the first package that has it."""
    return next(getattr(package, name) for package in map(import_module, PACKAGES) if name in package.__all__)


# For type checkers a misspelt name stays an error: they see only the imports above.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Load a public name from its package, or the version from the installation's metadata (PEP 562).

        Raises:
            AttributeError: There is no such name.
        """
        if name == "__version__":
            value: Any = import_module("importlib.metadata").version("lengthtrack")
        elif name in __all__:
            value = _load(name)
        else:
            raise AttributeError(
                f"module 'lengthtrack' has no attribute {name!r}: its names are in lengthtrack.__all__"
            )
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
