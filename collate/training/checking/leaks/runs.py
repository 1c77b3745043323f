"""A step run on a batch of documents: its results by document, and gradients at the steps of each document."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from collate.training.checking.autograd import gradients_of
from collate.training.checking.leaks.documents import DocumentCases
from collate.training.checking.leaks.layouts import DocumentLayout
from collate.training.checking.leaks.outcomes import Outcome, results_of
from collate.training.checking.rerun import RAISED, Runner


class Embedded(TorchFunctionMode):
    """Within it, embeddings that have an entry per step are kept, and take gradients where any can flow."""

    def __init__(self, layouts: Sequence[DocumentLayout]) -> None:
        super().__init__()
        self.layouts = layouts
        self.kept: list[tuple[Tensor, DocumentLayout]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.embedding or not torch.is_grad_enabled():
            return result
        for layout in self.layouts:
            if layout.as_steps(result) is not None:
                kept: Tensor = result if result.requires_grad else result.detach().requires_grad_()
                self.kept.append((kept, layout))
                return kept
        return result


class DocumentRuns:
    """Runs of a step on cases of one batch.

    Attributes:
        notes: what could not be looked at, and why.
    """

    def __init__(self, runner: Runner, cases: DocumentCases) -> None:
        self.runner, self.cases = runner, cases
        self.notes: list[str] = []
        self.takes_gradients = True

    def run(self, batch: Any, layouts: Sequence[DocumentLayout] | None = None) -> Outcome:
        """The step's results for a batch, and the gradients of their sum at the steps of documents.

        Args:
            batch: what the step takes.
            layouts: where its documents are; None is as in the batch that was given.

        Raises:
            LengthError: A result is neither per document, nor per step, nor one number.
            TypeError: The step returned something else.
        """
        where = self.cases.layouts if layouts is None else layouts
        if self.takes_gradients:
            try:
                return self._run_with_gradients(batch, where)
            except RAISED as error:
                self.takes_gradients = False
                outcome = self._run(batch, where)[0]
                self.notes.append(f"gradients at the steps of documents: {_first_line(error)}")
                return outcome
        return self._run(batch, where)[0]

    def _run_with_gradients(self, batch: Any, layouts: Sequence[DocumentLayout]) -> Outcome:
        leafed, leaves = self.cases.with_leaves(batch)
        with Embedded(layouts) as embedded:
            outcome, total = self._run(leafed, layouts)
            inputs = {f"the gradient of field {name!r}": leaf for name, leaf in leaves.items()}
            inputs |= {f"the gradient of embedding {index}": kept for index, kept in enumerate(embedded.kept)}
            if total is None or not total.requires_grad:
                return outcome
            tensors = [tensor for tensor, _ in inputs.values()]
            gradients = gradients_of(total, tensors, keep_graph=False)
        for (name, (_, layout)), gradient in zip(inputs.items(), gradients, strict=True):
            steps = layout.as_steps(gradient)
            if steps is not None:
                outcome.entries[name], outcome.owners[name] = steps, layout.ids
                outcome.gradients.append(name)
        return outcome

    def _run(self, batch: Any, layouts: Sequence[DocumentLayout]) -> tuple[Outcome, Tensor | None]:
        """The results of a run, and their sum over documents, from which gradients flow."""
        outcome, total = Outcome(), None
        for name, tensor, owners in results_of(self.runner.raw(batch), layouts, self.cases.count):
            if owners is None:
                outcome.scalars[name] = float(tensor.detach())
                part = tensor
            else:
                titled = f"term {name!r}" if name else "the result"
                outcome.entries[titled], outcome.owners[titled] = tensor.detach(), owners
                # What a gap gives is no document's.
                part = tensor[owners.to(tensor.device) >= 0].sum()
            outcome.loss += float(part.detach().real)
            if part.is_floating_point() and part.requires_grad:
                total = part if total is None else total + part
        outcome.has_graph = total is not None
        return outcome, total


def _first_line(error: Exception) -> str:
    """The error's kind, and the first line of what it says."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def in_evaluation(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let some modules alone run as in evaluation."""
    trained = [module for module in modules if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True
