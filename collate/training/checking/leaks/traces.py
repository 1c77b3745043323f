"""In which module two runs of a step begin to differ at the steps of documents that stay.

Every module shows what it takes and what it gives. The first difference in what a module *gives* was made by that
module. The first difference in what a module *takes* was made by the code around it: by the module that called it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from collate.tensors.numpy_view import CARRIERS
from collate.training.checking.leaks.layouts import DocumentLayout


@dataclass(frozen=True)
class Event:
    """A module that was entered or left.

    Attributes:
        module: which.
        parent: the module that called it; None where the step did.
        root: the outermost module that runs.
        leaves: whether it was left, so that this is what it gave.
        marks: a number for each tensor, made of all bits at the steps of documents that stay.
    """

    module: nn.Module
    parent: nn.Module | None
    root: nn.Module
    leaves: bool
    marks: tuple[int, ...]


@dataclass
class Trace:
    """All modules of a run, in order.

    Args:
        layouts: where documents are.
        staying: which documents stay, bool `[N]`.
    """

    layouts: Sequence[DocumentLayout]
    staying: Tensor
    events: list[Event] = field(default_factory=list)
    stack: list[nn.Module] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator["Trace"]:
        """Within it, modules that run are recorded.

        Yields:
            The trace.
        """
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._add(module, inputs, leaves=False)
        self.stack.append(module)

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        while self.stack and self.stack.pop() is not module:
            pass
        self._add(module, output, leaves=True)

    def _add(self, module: nn.Module, shown: Any, *, leaves: bool) -> None:
        parent = self.stack[-1] if self.stack else None
        root = self.stack[0] if self.stack else module
        marks = tuple(self._mark(part) for part in pytree.tree_leaves(shown) if isinstance(part, Tensor))
        self.events.append(Event(module, parent, root, leaves, marks))

    def _mark(self, tensor: Tensor) -> int:
        """A number for the bits of all entries that belong to documents that stay."""
        if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
            return 0
        for layout in self.layouts:
            steps = layout.as_steps(tensor.detach(), steps_last=True)
            if steps is not None:
                ids = layout.ids
                return _bits(steps[((ids >= 0) & self.staying[ids]).to(steps.device)])
        if tensor.dim() and len(tensor) == len(self.staying):
            return _bits(tensor.detach()[self.staying.to(tensor.device)])
        return 0


def _bits(entries: Tensor) -> int:
    """A number that is another one where any bit is, whatever the order of summation."""
    plain = torch.view_as_real(entries) if entries.is_complex() else entries
    whole = plain.contiguous().flatten().view(CARRIERS[plain.dtype.itemsize]).to(torch.int64)
    weights = torch.arange(whole.numel(), device=whole.device) * 2_654_435_761 + 1
    return int((whole * (weights | 1)).sum())


@dataclass(frozen=True)
class Difference:
    """Where the first difference appears.

    Attributes:
        module: the module that made it; None where the step's own code did.
        name: of that module among the parts of the outermost module, with its class.
        taken_by: the module that took what differs, where the difference was made around it; empty otherwise.
    """

    module: nn.Module | None
    name: str
    taken_by: str = ""

    def __str__(self) -> str:
        where = f"in {self.name}" if self.module is not None else "in the step's own code"
        return f"{where}, before {self.taken_by}" if self.taken_by else where


def first_difference(one: Trace, other: Trace) -> Difference | None:
    """The first module at which two runs differ; None where no module shows a difference.

    Args:
        one: a run.
        other: another one, of the same modules.
    """
    for event, changed in zip(one.events, other.events, strict=False):
        if event.module is not changed.module or event.leaves != changed.leaves:
            return None
        if event.marks == changed.marks:
            continue
        if event.leaves:
            return Difference(event.module, _named(event.module, event.root))
        taken_by = _named(event.module, event.root)
        if event.parent is None:
            return Difference(None, "", taken_by)
        return Difference(event.parent, _named(event.parent, event.root), taken_by)
    return None


def _named(module: nn.Module, root: nn.Module) -> str:
    """The path of a module with its class."""
    names = {id(part): name for name, part in root.named_modules()}
    name = names.get(id(module), "")
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


# All batch norms of torch have this class above them, which has no public name.
BATCH_NORMS: Final = nn.BatchNorm1d.__mro__[1]
_EXPERTS: Final = ("expert", "sparsemoe", "moeblock", "moelayer", "router", "capacity", "sparsemlp", "topk")


def meeting_of(module: nn.Module | None, name: str) -> str | None:
    """What documents do on purpose in a module: share a statistic, or experts; None where nothing is known."""
    if isinstance(module, BATCH_NORMS):
        return "batch norm"
    words = f"{type(module).__name__} {name.split(' ')[0].rsplit('.', 1)[-1]}".lower().replace("_", "")
    return "experts" if module is not None and any(word in words for word in _EXPERTS) else None
