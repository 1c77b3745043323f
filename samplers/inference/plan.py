"""Which batches remain, longest first, and the loader that reads them.

Of six samples two are done; the others come longest first, in batches of at most eight padded tokens:

>>> lengths = np.array([2, 5, 4, 1, 3, 8])
>>> done = np.array([False, True, False, False, False, True])
>>> list(RemainingBatches(lengths, done, {"max_tokens": 8}))
[[2, 4], [0, 3]]
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final, TypedDict, cast

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader

from collate.widths import Widths
from samplers.planning.budget import Cost, Count, Integers
from samplers.planning.options import PlanOptions, make_options
from samplers.planning.plan import BatchPlan
from samplers.planning.sorting import IndexedLengths, Lengths, as_length_array, refuse_negative
from samplers.planning.tables.pool_table import choose_table
from samplers.sources.lengths_of import lengths_of

_FIXED: Final[PlanOptions] = {"shuffle": False, "overlong": "alone"}


class InferenceBudget(TypedDict, total=False):
    """The limits of a batch, for type checkers; `LengthBucketBatchSampler` documents them."""

    max_tokens: int | None
    batch_size: int | None
    cost: Cost | None
    count_tokens: Count
    widths: Widths
    max_length: int | None


def check_budget(budget: InferenceBudget) -> None:
    """Check a budget's options: those of training, such as `shuffle`, mean nothing here.

    Raises:
        TypeError: An option is unknown or has the wrong type.
        ValueError: There is no budget, or an option is out of its range.
    """
    unknown = sorted(budget.keys() - InferenceBudget.__annotations__.keys())
    if unknown:
        raise TypeError(f"options must be among {', '.join(InferenceBudget.__annotations__)}, got {', '.join(unknown)}")
    make_options(cast("PlanOptions", {**budget, **_FIXED}))


def find_lengths(dataset: Any, lengths: Lengths | str | None) -> tuple[Lengths, Integers]:
    """The lengths of a dataset as they were given, and as int64 `[N]` or `[N, K]`.

    Args:
        dataset: Map-style.
        lengths: Or the name of a column. None takes those of its index, or of its only column of lists.

    Raises:
        LengthError: One is negative.
        TypeError: They are not integers.
        ValueError: They cannot be found, are not as many as the samples, or have another shape.
    """
    if isinstance(lengths, str):
        lengths = lengths_of(dataset, lengths)
    elif lengths is None:
        index = getattr(dataset, "index", None)
        lengths = index if isinstance(index, IndexedLengths) else _measure(dataset)
    array = np.asarray(lengths.lengths if isinstance(lengths, IndexedLengths) else lengths)
    if len(array) != len(dataset):
        raise ValueError(f"lengths must be those of the dataset's {len(dataset)} samples, got {len(array)}")
    if len(array):
        # Now: what is wrong must not have begun a file, which belongs to these lengths from then on.
        refuse_negative(array := as_length_array(lengths), None)
    return lengths, array


def _measure(dataset: Any) -> Lengths:
    """The lengths of a list of sequences, or of a dataset with a column of lists.

    Raises:
        ValueError: It has none.
    """
    try:
        return lengths_of(dataset)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lengths must be given for this {type(dataset).__name__}: {error}") from error


class RemainingBatches:
    """Batches of the samples without an output, longest first; one process takes every W-th.

    Args:
        lengths: Of all samples, int64 `[N]` or `[N, K]`, or an index of them.
        done: Which samples have an output: bool `[N]`, the same in all processes.
        budget: Limits of a batch; a sample that exceeds them alone is a batch of its own.
        rank: Of this process.
        num_replicas: W.
    """

    def __init__(
        self,
        lengths: Lengths,
        done: npt.NDArray[np.bool_],
        budget: InferenceBudget,
        *,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        remaining = None if not done.any() else np.flatnonzero(~done)
        self._rank, self._num_replicas = rank, num_replicas
        options = make_options(cast("PlanOptions", {**budget, **_FIXED, "indices": remaining}))
        self._plan = None if done.all() else BatchPlan(choose_table(lengths, options), 0, 1)

    def __len__(self) -> int:
        batches = 0 if self._plan is None else len(self._plan.batches)
        return len(range(self._rank, batches, self._num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        if self._plan is not None:
            yield from islice(self._plan.batches, self._rank, None, self._num_replicas)


class CollatedSamples:
    """Collates samples, and says which they are; a worker gets it by pickle.

    Args:
        dataset: Map-style.
        collate_fn: Makes a batch from a list of samples.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any]) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn

    def __getitems__(self, indices: list[int]) -> tuple[list[int], Any]:
        return indices, self.collate(indices)

    def collate(self, indices: list[int]) -> Any:
        """The batch of these samples, in this order."""
        if getattr(self.dataset, "__getitems__", None):
            return self.collate_fn(self.dataset.__getitems__(indices))
        return self.collate_fn([self.dataset[index] for index in indices])


def as_it_is(value: Any) -> Any:
    """The value: a loader's collate function where the dataset has collated."""
    return value


def make_loader(samples: CollatedSamples, batches: RemainingBatches, *, num_workers: int, pin_memory: bool) -> Any:
    """A loader of `(sample indices, batch)`."""
    dataset: Any = samples
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=as_it_is, num_workers=num_workers, pin_memory=pin_memory
    )
