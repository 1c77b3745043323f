"""What one run of a step gives, document by document, and how far two runs are apart, bit for bit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from collate.errors import LengthError
from collate.training.checking.leaks.layouts import DocumentLayout
from collate.varlen.batch import VarlenBatch


@dataclass
class Outcome:
    """What a step gave for a batch.

    Attributes:
        entries: results and gradients, `[K, ...]` each, detached.
        owners: the document of each entry, int64 `[K]`, -1 for nobody.
        scalars: results that are one number.
        loss: the sum of all results.
        gradients: names of the entries that are gradients.
        has_graph: whether a gradient flows from the results.
    """

    entries: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    loss: float = 0.0
    gradients: list[str] = field(default_factory=list)
    has_graph: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether no entry of a document is nan or infinite."""
        numbers = (entry[self.owners[name].to(entry.device) >= 0] for name, entry in self.entries.items())
        return all(bool(entry.isfinite().all()) for entry in numbers) and all(
            number - number == 0 for number in self.scalars.values()
        )


def results_of(
    result: object, layouts: Sequence[DocumentLayout], count: int
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """A step's results by name, each as `[K, ...]` with the document of each entry; a scalar has None.

    Raises:
        LengthError: A result is neither per document, nor per step, nor one number.
        TypeError: The step returned something else.

    Yields:
        Name, tensor and owners.
    """
    terms = result if isinstance(result, Mapping) else {"": result}
    if not terms:
        raise TypeError("the step must return losses, got an empty mapping")
    for name, term in terms.items():
        tensor = term.values if isinstance(term, VarlenBatch) else term
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{_titled(str(name))} must be a tensor of losses, per document [{count}], per step, or a scalar, got "
                f"{type(term).__name__}: return the losses alone, without item()"
            )
        yield (str(name), *_owned(tensor, str(name), layouts, count))


def _owned(tensor: Tensor, name: str, layouts: Sequence[DocumentLayout], count: int) -> tuple[Tensor, Tensor | None]:
    """A result as `[K, ...]`, and whose each entry is.

    Raises:
        LengthError: It has no entry per document or step, and is not one number.
    """
    # A row of one document of one step has both shapes, and they mean the same.
    if tensor.dim() and tensor.shape[0] == count and all(layout.steps != count for layout in layouts):
        in_rows = any(tuple(tensor.shape[:2]) in layout.shapes for layout in layouts)
        if not in_rows:
            return tensor, torch.arange(count)
    for layout in layouts:
        steps = layout.as_steps(tensor)
        if steps is not None:
            return steps, layout.ids
    if tensor.numel() == 1:
        return tensor.reshape(()), None
    shapes = " or ".join(str([*shape]) for layout in layouts for shape in layout.shapes)
    raise LengthError(
        f"{_titled(name)} must be per document [{count}], per step {shapes}, or one number, got {list(tensor.shape)}: "
        "give a step without a label a loss of 0 rather than leave it out, and return documents in the batch's order"
    )


def _titled(name: str) -> str:
    """What a result is called in a message."""
    return f"term {name!r} of the step" if name else "the step's result"


def distances(one: Outcome, other: Outcome, count: int) -> dict[str, Tensor]:
    """How far each document's entries are apart: float64 `[N]` for each result and gradient, 0 where no bit differs."""
    found = {}
    for name, entry in one.entries.items():
        apart = _difference(entry, other.entries[name])
        owners = one.owners[name]
        sizes = torch.zeros(count, dtype=torch.float64)
        found[name] = sizes.scatter_reduce(0, owners.clamp(min=0), torch.where(owners < 0, 0.0, apart), "amax")
    return found


def sizes_of(outcome: Outcome, count: int) -> dict[str, Tensor]:
    """The largest entry of each document: float64 `[N]` for each result and gradient."""
    found = {}
    for name, entry in outcome.entries.items():
        size = _largest(entry.detach().abs().double())
        owners = outcome.owners[name]
        zeros = torch.zeros(count, dtype=torch.float64)
        found[name] = zeros.scatter_reduce(0, owners.clamp(min=0), torch.where(owners < 0, 0.0, size), "amax")
    return found


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """The largest difference in each entry: float64 `[K]` on the host; infinite where only one is a number."""
    same = (one == other) | ((one != one) & (other != other))
    apart = (one.to(torch.complex128 if one.is_complex() else torch.float64) - other).abs()
    apart = torch.where(same, 0.0, torch.where(apart.isfinite(), apart, torch.inf))
    return _largest(apart)


def _largest(entries: Tensor) -> Tensor:
    """The largest number in each entry `[K, ...]`: `[K]` on the host."""
    flat: Any = entries.reshape(len(entries), -1)
    if not flat.shape[1]:
        return torch.zeros(len(entries), dtype=torch.float64)
    largest: Tensor = flat.amax(1).cpu()
    return largest
