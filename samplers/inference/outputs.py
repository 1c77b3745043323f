"""What a step returned, as one output for each sample, on the host.

A batch of samples 7, 3 and 9, collated longest first as rows 9, 7, 3: the rows' outputs find their samples again.

>>> import torch
>>> from types import SimpleNamespace
>>> batch = SimpleNamespace(permutation=torch.tensor([2, 0, 1]), lengths=torch.tensor([5, 4, 1]))
>>> outputs = read_outputs(torch.tensor([0.9, 0.7, 0.3]), {"x": batch}, [7, 3, 9])
>>> outputs.samples.tolist(), outputs.entries
([9, 7, 3], tensor([0.9000, 0.7000, 0.3000]))
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from samplers.planning.budget import Integers

_RETURNS = (
    "return a tensor or array with an entry for each row, a batch (batch.with_padded(output)) whose padding is to be "
    "removed, or a list"
)


@dataclass(frozen=True, eq=False)
class Outputs:
    """Outputs of some samples.

    Attributes:
        samples: Sample index of each output: int64 `[n]`.
        entries: A tensor or array `[n, *F]` on the host, or a list of n.
    """

    samples: Integers
    entries: Any


def read_outputs(result: object, batch: object, samples: Sequence[int]) -> Outputs:
    """The outputs of a batch by sample; waits for a device, if the result is on one.

    Args:
        result: What the step returned: an entry for each row of the batch, in the order of the rows.
        batch: The collated batch, whose `permutation` says which sample each row is, if it has one.
        samples: Sample indices in the order in which they were collated.

    Raises:
        TypeError: The result is of another kind.
        ValueError: It has not one entry for each row, or the parts of the batch have their rows in different orders.
    """
    permutation = find_permutation(result if _is_tracked(result) else batch)
    entries = _on_host(result)
    rows = len(samples) if permutation is None else len(permutation)
    if len(entries) != rows:
        raise ValueError(
            f"step must return an entry for each of the batch's {rows} rows, got {len(entries)} for samples "
            f"{_shown(samples)}: {_RETURNS}"
        )
    if permutation is None:
        return Outputs(np.array(samples, np.int64), entries)
    # A collator with `shapes` fills a batch with rows that are no samples.
    real = np.flatnonzero(permutation < len(samples))
    if not np.array_equal(np.sort(permutation[real]), np.arange(len(samples))):
        raise ValueError(
            f"a batch's permutation must name each of its {len(samples)} samples once, got {permutation.tolist()} for "
            f"samples {_shown(samples)}: return outputs of whole batches"
        )
    if len(real) < rows:
        entries = [entries[row] for row in real] if isinstance(entries, list) else entries[real]
    return Outputs(np.array(samples, np.int64)[permutation[real]], entries)


def find_permutation(batch: object) -> Integers | None:
    """The order of a batch's rows, int64 `[B]`: row i is the i-th of the collated samples; None where it tells none.

    Raises:
        ValueError: Parts of the batch have different orders.
    """
    orders = [np.asarray(part.permutation) for part in _tracked_parts(batch)]
    for order in orders[1:]:
        if not np.array_equal(order, orders[0]):
            raise ValueError(
                f"the batch's parts have their rows in different orders, {orders[0].tolist()} and {order.tolist()}: "
                "collate all fields together"
            )
    return orders[0] if orders else None


def check_order(batch: object, samples: Sequence[int], lengths: Integers) -> None:
    """Compare the lengths of a collated batch with the plan's, where both are of the same samples.

    A collate function that reorders the samples before it pads them makes a batch whose `permutation` knows nothing of
    it, and outputs would go to the wrong samples. Lengths in another unit than the plan's say nothing.

    Args:
        batch: The collated batch.
        samples: Sample indices in the order in which they should have been collated.
        lengths: Of all samples: int64 `[N]` or `[N, K]`.

    Raises:
        ValueError: The batch has the planned lengths in another order.
    """
    planned = lengths[np.asarray(samples)].reshape(len(samples), -1)
    reordered = None
    for part in _tracked_parts(batch):
        rows, order = np.asarray(part.lengths), np.asarray(part.permutation)
        if rows.shape != order.shape or len(order) != len(samples):
            continue
        collated = np.empty_like(rows)
        collated[order] = rows
        for column in planned.T:
            differ = column != collated
            if not differ.any():
                return
            if reordered is None and np.array_equal(np.sort(column), np.sort(rows)):
                first = int(differ.argmax())
                reordered = samples[first], int(column[first]), int(collated[first])
    if reordered is not None:
        raise ValueError(
            "sample {} has length {} in the plan and {} in the batch, which has the same lengths in another order: "
            "collate_fn must not reorder samples before it pads them (PadCollator sorts the rows, and knows their "
            "order)".format(*reordered)
        )


def _is_tracked(value: object) -> bool:
    """Whether this is a padded or varlen batch of lengthtrack, which this package does not import."""
    return hasattr(value, "permutation") and hasattr(value, "lengths")


def _tracked_parts(value: Any) -> Iterator[Any]:
    """The batches with lengths in a collated batch, wherever they are in it.

    Yields:
        Each of them.
    """
    if _is_tracked(value):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tracked_parts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            # A list of a million numbers or texts is a field without lengths.
            if isinstance(part, (int, float, str)):
                return
            yield from _tracked_parts(part)


def _on_host(result: Any) -> Any:
    """The entries of a result on the host: a tensor or array `[B, *F]`, or a list of B.

    Raises:
        TypeError: It is of another kind, or has no axis of rows.
    """
    if _is_tracked(result):
        return [_copy(row) for row in result.to("cpu").sequences()]
    if isinstance(result, list):
        return [_copy(entry) for entry in result]
    if isinstance(result, (Tensor, np.ndarray)) and result.ndim:
        return _copy(result)
    kind = "a single number" if isinstance(result, (Tensor, np.ndarray)) else f"a {type(result).__name__}"
    hint = f" its entries are {', '.join(map(str, result))}: choose one;" if isinstance(result, Mapping) else ""
    raise TypeError(f"step must return an entry for each row, got {kind}:{hint} {_RETURNS}")


def _copy(entry: Any) -> Any:
    """A copy on the host; what is no tensor or array is returned as it is."""
    # A step may write its next results to the same memory, as a captured graph does; and a view of a row would keep the
    # padding of the whole batch alive.
    if isinstance(entry, Tensor):
        return entry.detach().to("cpu", copy=True)
    return entry.copy() if isinstance(entry, np.ndarray) else entry


def _shown(samples: Sequence[int]) -> str:
    """The first samples, for a message."""
    return ", ".join(map(str, samples[:5])) + ", ..." * (len(samples) > 5)
