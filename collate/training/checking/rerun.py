"""Run a step repeatedly under equal conditions, and measure how far two runs are apart.

A step gives one loss or several terms; each term is compared with itself.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from collate.batch import LengthTrackedBatch
from collate.errors import LengthError
from collate.operations.construct import changed_batch
from collate.tensors.nested import map_parts
from collate.training.checking.autograd import Buffers, WithoutDropout, gradients_of, leaves_of
from collate.training.restore import restored_random_state
from collate.varlen.batch import VarlenBatch

LossStep: TypeAlias = Callable[[Any], Tensor | Mapping[str, Tensor]]
"""From a batch to a loss, or to several losses by name."""

# What a step or a module may raise on a batch that it was not written for.
RAISED = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError)
# Terms and gradients below this fraction of the largest one are compared with that fraction: they may be rounding.
SMALL = 1e-3

# Words in an error of the backward pass -> what to do about it.
_NO_GRADIENTS = {
    "incompatible with": "Pass use_reentrant=False to checkpoint: the check needs the gradients of single tensors",
    "a second time": "The step must not call backward itself: return the loss before that",
    "modified by an inplace operation": "The step must not move an optimizer: return the loss before that",
}


@dataclass(frozen=True)
class Term:
    """One loss of a step on a batch, and its gradient for each leaf."""

    loss: float
    gradients: list[Tensor]

    @property
    def is_finite(self) -> bool:
        """Whether the loss and all gradients are finite."""
        return math.isfinite(self.loss) and all(bool(gradient.isfinite().all()) for gradient in self.gradients)

    @property
    def size(self) -> float:
        """The norm of the gradients."""
        return math.sqrt(sum(float(gradient.abs().double().square().sum()) for gradient in self.gradients))

    def distance(self, other: "Term") -> float:
        """The norm of the difference of the gradients."""
        pairs = zip(self.gradients, other.gradients, strict=True)
        return math.sqrt(sum(float((a - b).abs().double().square().sum()) for a, b in pairs))


# Name -> term; a step that returns a single loss has the one term "".
Terms: TypeAlias = dict[str, Term]


@dataclass(frozen=True)
class Drift:
    """How far a run is from the one it should equal.

    Attributes:
        size: The largest relative change of a loss or of gradients, infinite where one is not a number.
        term: The name of that term.
    """

    size: float
    term: str

    def __str__(self) -> str:
        what = f"the {f'term {self.term!r}' if self.term else 'loss'} or its gradients"
        return f"{what} by {self.size:.2%}" if math.isfinite(self.size) else f"{what} to nan or infinity"


class Runner:
    """A step, the seed of its random numbers, and its result on the unchanged batch.

    Attributes:
        base: The result on the unchanged batch.
        is_random: Whether the loss depends on the seed.
        without_graph: Terms that no gradient flows from, although the step runs modules with weights to train.
    """

    base: Terms
    is_random: bool
    without_graph: list[str]

    def __init__(self, step: LossStep, seed: int, buffers: Buffers) -> None:
        self.step, self.seed, self.buffers = step, seed, buffers
        self.leaves: list[Tensor] = []
        self.names: list[str] = []

    def begin(self, batch: Any, inputs: Sequence[Tensor] = ()) -> None:
        """Run the step; record its result, and the leaves that it depends on other than its inputs.

        Raises:
            LengthError: A loss is not a scalar, or gradients cannot be taken.
            RuntimeError: The backward pass fails.
            TypeError: The step returns no tensor and no mapping of tensors.
        """
        with self.buffers.of_all_that_run():
            losses = self.losses(batch)
        trained = self.buffers.are_of_trained_modules
        self.without_graph = [name for name, loss in losses.items() if trained and not loss.requires_grad]
        input_ids = {id(tensor) for tensor in inputs}
        self.leaves = [leaf for leaf in leaves_of(list(losses.values())) if id(leaf) not in input_ids]
        self.base = self.run(batch)
        # Another seed gives another loss: the step draws random numbers.
        self.is_random = self.values(batch, self.seed + 1) != {name: term.loss for name, term in self.base.items()}

    def raw(self, batch: Any, seed: int | None = None) -> object:
        """What the step returns for a batch, with weights, buffers and random numbers as at the beginning."""
        self.buffers.restore()
        _seed(self.seed if seed is None else seed)
        return self.step(copied(batch))

    def losses(self, batch: Any, seed: int | None = None) -> dict[str, Tensor]:
        """The step's losses on a batch, by name, with original weights and buffers and freshly seeded random numbers.

        Raises:
            LengthError: The step returns other terms than on the unchanged batch.
        """
        terms = _terms(self.raw(batch, seed))
        self.names = self.names or list(terms)
        if list(terms) != self.names:
            raise LengthError(f"a step must always give the same terms, got {list(terms)} instead of {self.names}")
        return terms

    def run(self, batch: Any) -> Terms:
        """The step's losses and gradients on a batch.

        Raises:
            LengthError: Gradients cannot be taken.
            RuntimeError: The backward pass fails.
        """
        losses = self.losses(batch)
        last = len(losses) - 1
        try:
            return {
                name: Term(float(loss.detach()), gradients_of(loss, self.leaves, keep_graph=index < last))
                for index, (name, loss) in enumerate(losses.items())
            }
        except RuntimeError as error:
            ways_out = [way_out for words, way_out in _NO_GRADIENTS.items() if words in str(error)]
            if not ways_out:
                raise
            raise LengthError(f"gradients cannot be taken: {error}\n{ways_out[0]}") from error

    def values(self, batch: Any, seed: int | None = None) -> dict[str, float]:
        """The step's losses on a batch, without gradients."""
        return {name: float(loss.detach()) for name, loss in self.losses(batch, seed).items()}

    def drift(self, outcome: Terms, other: Terms | None = None) -> Drift:
        """Relative distance of a run from another, or from the run on the unchanged batch."""
        base = self.base if other is None else other
        losses = max(abs(term.loss) for term in base.values())
        sizes = max(term.size for term in base.values())
        drifts = []
        for name, term in base.items():
            loss = abs(outcome[name].loss - term.loss) / max(abs(term.loss), SMALL * losses, 1e-12)
            gradients = outcome[name].distance(term) / max(term.size, SMALL * sizes, 1e-12)
            # A nan is larger than any tolerance; every comparison with a nan is False.
            parts = [part if part == part else math.inf for part in (loss, gradients)]
            drifts.append(Drift(max(parts), name))
        return max(drifts, key=lambda drift: drift.size)


def combined(outcomes: Sequence[Term], shares: Sequence[float], *, gradients: bool = True) -> Term:
    """The weighted sum of runs, or of their losses only; a run of weight 0 is left out, since it may be nan."""
    used = [(share, outcome) for share, outcome in zip(shares, outcomes, strict=True) if share]
    loss = sum(share * outcome.loss for share, outcome in used)
    if not gradients:
        return Term(loss, [])
    columns = zip(*(outcome.gradients for _, outcome in used), strict=True)
    scales = [share for share, _ in used]
    return Term(loss, [sum((s * g for s, g in zip(scales, c, strict=True)), torch.zeros_like(c[0])) for c in columns])


def copied(batch: Any) -> Any:
    """The batch in new containers with copied values: steps pop their labels, and write to their inputs.

    Gradients pass through the copies to the values.
    """
    if isinstance(batch, LengthTrackedBatch):
        return changed_batch(batch, padded=batch.padded.clone())
    if isinstance(batch, VarlenBatch):
        return with_other_values(batch, batch.values.clone())
    if isinstance(batch, Tensor):
        return batch.clone()
    return batch.copy() if isinstance(batch, np.ndarray) else map_parts(batch, copied)


def with_other_values(part: VarlenBatch, values: Tensor) -> VarlenBatch:
    """The same documents with other values, and the same marks of gaps and of steps without a label."""
    other = copy(part)
    object.__setattr__(other, "values", values)
    return other


@contextmanager
def undisturbed(module: nn.Module | None) -> Iterator[Buffers]:
    """Switch dropout off, and restore random states, weights and buffers however the check ends.

    Yields:
        The weights and buffers of `module`; those of other modules can be added.
    """
    buffers = Buffers()
    for part in module.modules() if module is not None else ():
        buffers.keep(part)
    with restored_random_state(), WithoutDropout():
        try:
            yield buffers
        finally:
            buffers.restore()


def _seed(seed: int) -> None:
    """Seed torch, Python and NumPy."""
    # Without an accelerator `torch.manual_seed` keeps a traceback of every call, for a device that may appear later.
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - steps of others draw from it


def _terms(result: object) -> dict[str, Tensor]:
    """The losses that a step returned, by name.

    Raises:
        TypeError: It returned something else.
    """
    if isinstance(result, Tensor):
        return {"": _scalar(result, "the step")}
    if not isinstance(result, Mapping):
        kind = type(result).__name__
        raise TypeError(
            f"the step must return its loss as a tensor, or a mapping of losses, got {kind}: {_return_hint(result)}"
        )
    if not result:
        raise TypeError("the step must return its loss as a tensor, or a mapping of losses, got an empty mapping")
    return {str(name): _scalar(loss, f"term {name!r} of the step") for name, loss in result.items()}


def _scalar(loss: object, name: str) -> Tensor:
    """A loss, if it is a real scalar tensor.

    Raises:
        LengthError: It has more than one number.
        TypeError: It is no tensor, or complex.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must return a scalar tensor, got {type(loss).__name__}: {_return_hint(loss)}")
    if loss.numel() != 1:
        raise LengthError(
            f"{name} must return a scalar loss, got shape {list(loss.shape)}: reduce it as in training; of a model's "
            "output return the loss alone (output.loss)"
        )
    if loss.is_complex():
        raise TypeError(f"{name} must return a real loss, got {loss.dtype}")
    return loss


def _return_hint(result: object) -> str:
    """A hint what to return instead, for the message."""
    if result is None:
        return "add a return statement"
    if isinstance(result, (int, float)):
        return "return the tensor, without item()"
    if isinstance(result, (tuple, list)):
        return 'return the loss alone, or name the terms as in {"tags": loss, "label": other}'
    return "return the loss alone"
