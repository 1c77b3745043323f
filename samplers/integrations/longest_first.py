"""A sampler of indices by length, and the way back to the order of the dataset.

>>> sampler = LongestFirst([2, 5, 3])
>>> list(sampler), sampler.restore(np.array([50, 30, 20]))
([1, 2, 0], array([20, 50, 30]))
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class LongestFirst(Sampler[int]):
    """Indices by length, longest first.

    Attributes:
        order: int64 `[N]`.
    """

    def __init__(self, lengths: Any) -> None:
        array = np.asarray(getattr(lengths, "lengths", lengths))
        self.order = np.argsort(-(array if array.ndim == 1 else array.sum(1)), kind="stable")

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        yield from self.order.tolist()

    def restore(self, outputs: Any) -> Any:
        """Outputs in the order of the dataset: an array with an entry for each sample, or a structure of these.

        Raises:
            ValueError: There are more or fewer entries than samples.
        """
        if isinstance(outputs, np.ndarray):
            if len(outputs) != len(self.order):
                raise ValueError(
                    f"{len(outputs)} rows of outputs for {len(self.order)} samples: a collator that packs cannot be "
                    "used to predict: give eval_collator, which pads"
                )
            ordered = np.empty_like(outputs)
            ordered[self.order] = outputs
            return ordered
        if isinstance(outputs, Mapping):
            return {name: self.restore(part) for name, part in outputs.items()}
        return type(outputs)(map(self.restore, outputs)) if isinstance(outputs, (list, tuple)) else outputs
