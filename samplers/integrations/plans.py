"""A batch sampler from a dataset and the options of a plan."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Literal, TypeAlias

from samplers.batch_sampler import LengthBucketBatchSampler, PackingBatchSampler
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.sorting import IndexedLengths
from samplers.sources.lengths_of import lengths_of

LengthsOf: TypeAlias = str | Callable[[Any], Any] | Any
"""The column whose lengths count, the lengths themselves, or a function from a dataset to them."""


def resolve_lengths(dataset: Any, lengths: LengthsOf) -> Any:
    """The lengths of a dataset's samples.

    Args:
        dataset: Map-style.
        lengths: A column of it, a function from it to its lengths, or the lengths; None takes its index.

    Raises:
        TypeError: The dataset is of a kind whose lengths cannot be read, or the lengths are a mixture.
        ValueError: It has no such column, or not as many samples as lengths.
    """
    if lengths is None:
        index = getattr(dataset, "index", None)
        found = index if isinstance(index, IndexedLengths) else lengths_of(dataset)
    elif isinstance(lengths, str):
        found = lengths_of(dataset, lengths)
    else:
        found = lengths(dataset) if callable(lengths) else lengths
    if isinstance(found, Mixture):
        raise TypeError("a Mixture is for training only: give it in the plan, {'lengths': mixture, ...}")
    _check_count(len(found.lengths if isinstance(found, IndexedLengths) else found), dataset)
    return found


def _check_count(count: int, dataset: Any) -> None:
    """Compare the number of lengths with that of samples.

    Raises:
        ValueError: They differ.
    """
    if count != len(dataset):
        raise ValueError(f"lengths must be those of the dataset's {len(dataset)} samples, got {count}")


def make_sampler(
    dataset: Any, plan: Mapping[str, Any], lengths: LengthsOf, *, rank: int | Literal["all"] | None = None
) -> LengthBucketBatchSampler | PackingBatchSampler:
    """The batch sampler of a plan, whose own `"lengths"` (of the training alone, or a `Mixture`) go first.

    Raises:
        TypeError: An option of the plan is unknown or has the wrong type, or the lengths cannot be read.
        ValueError: An option is out of its range, or lengths are not those of the dataset.
    """
    kind = PackingBatchSampler if "capacity" in plan else LengthBucketBatchSampler
    options = dict(plan)
    planned = options.pop("lengths", lengths)
    if isinstance(planned, Mixture):
        _check_count(planned.size, dataset)
    else:
        planned = resolve_lengths(dataset, planned)
    return kind(planned, rank=rank, **options)


def mean_samples(sampler: LengthBucketBatchSampler | PackingBatchSampler) -> float:
    """Samples of a batch in the mean: of the first thousand batches, so that a large corpus costs no time."""
    batches = list(islice(sampler.plan(0).batches, 1000))
    return sum(map(len, batches)) / len(batches)
