"""JoinedDataset: the map-style datasets of a mixture's sources as one, without copies.

>>> joined = JoinedDataset(["ab", "xyz"])
>>> len(joined), joined[1], joined[2], joined.__getitems__([4, 0, 2])
(5, 'b', 'x', ['z', 'a', 'x'])
"""

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from samplers.planning.budget import Integers


class JoinedDataset:
    """Map-style datasets, one after the other; a sample is read from its own when it is asked for.

    `Mixture.concat` makes one. Pickles as its datasets do.

    Args:
        datasets: Each with `__getitem__` and `__len__`.

    Attributes:
        datasets: As given.
        sizes: Samples of each, int64 `[datasets]`.

    Raises:
        TypeError: One has no length.
    """

    def __init__(self, datasets: Sequence[Any]) -> None:
        for number, dataset in enumerate(datasets):
            if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise TypeError(
                    f"datasets must be map-style, with __len__ and __getitem__, got a {type(dataset).__name__} as "
                    f"dataset {number}"
                )
        self.datasets = list(datasets)
        self.sizes: Integers = np.array([len(dataset) for dataset in self.datasets], np.int64)
        self._ends: Integers = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def __getitem__(self, index: SupportsIndex) -> Any:
        """A sample, by its index among all.

        Raises:
            IndexError: It is out of range.
        """
        number, local = self._locate(operator.index(index))
        return self.datasets[number][local]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several samples, in their order: those of one dataset with one call, if it can read several.

        Raises:
            IndexError: An index is out of range.
        """
        samples: list[Any] = [None] * len(indices)
        places: dict[int, list[tuple[int, int]]] = {}
        for entry, index in enumerate(indices):
            number, local = self._locate(operator.index(index))
            places.setdefault(number, []).append((entry, local))
        for number, members in places.items():
            dataset = self.datasets[number]
            local_indices = [local for _, local in members]
            read = getattr(dataset, "__getitems__", None)
            values = [dataset[local] for local in local_indices] if read is None else read(local_indices)
            for (entry, _), value in zip(members, values, strict=True):
                samples[entry] = value
        return samples

    def _locate(self, index: int) -> tuple[int, int]:
        """The number of a sample's dataset, and its index there.

        Raises:
            IndexError: It is out of range.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in range({len(self)}), got {index}")
        index %= len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number] - self.sizes[number])
