"""A user's step as torch sees it: leaves and gradients, dropout, and the buffers of modules."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
}
# The rate is the only float among their arguments, or is given by name.
_WITH_RATE = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
# The index of the rate among positional arguments.
_RATE_AT = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}


class WithoutDropout(TorchFunctionMode):
    """A mode in which torch drops nothing: in modules, functions, attention and recurrent layers."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else named["input"]
        if func in _WITH_RATE:
            args = tuple(0.0 if isinstance(arg, float) else arg for arg in args)
        elif func in _RATE_AT:
            position = _RATE_AT[func]
            args = tuple(0.0 if at == position else arg for at, arg in enumerate(args))
        named |= {name: 0.0 for name in ("dropout", "dropout_p") if name in named}
        return func(*args, **named)


class Buffers:
    """The weights and buffers of modules, and the values that they held when each module was first seen."""

    def __init__(self) -> None:
        self._seen: set[nn.Module] = set()
        self._saved: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def keep(self, module: nn.Module) -> None:
        """Save the weights and buffers of one module, not those of its submodules."""
        if module in self._seen:
            return
        self._seen.add(module)
        # A step may move a teacher's weights, or call an optimizer.
        weights = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in chain(weights, module.named_buffers(recurse=False, remove_duplicate=False)):
            # A lazy one has no values before the first forward pass.
            if not nn.parameter.is_lazy(tensor):
                self._saved.append((module, name, tensor, tensor.detach().clone()))

    @contextmanager
    def of_all_that_run(self) -> Iterator[None]:
        """A context in which every module's buffers are saved right before its first forward pass."""
        hook = register_module_forward_pre_hook(lambda module, _: self.keep(module))
        try:
            yield
        finally:
            hook.remove()

    @property
    def modules(self) -> set[nn.Module]:
        """All modules that were seen."""
        return self._seen

    @property
    def are_of_trained_modules(self) -> bool:
        """Whether any saved module has a parameter of its own that takes gradients."""
        return any(weight.requires_grad for module in self._seen for weight in module.parameters(recurse=False))

    def restore(self) -> None:
        """Give the modules the weights, buffers and values that were saved."""
        for module, name, tensor, value in self._saved:
            # A module may replace its buffer by a new tensor instead of writing to it.
            setattr(module, name, tensor)
            tensor.data.copy_(value)


def leaves_of(results: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that the results' graphs end in, each once, in the order of discovery."""
    leaves: dict[int, Tensor] = {}
    nodes, seen = [result.grad_fn for result in results], set()
    leaves |= {id(result): result for result in results if result.requires_grad and result.grad_fn is None}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # Only an AccumulateGrad node, which stands for a leaf, has this attribute.
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            leaves[id(leaf)] = leaf
        nodes += [parent for parent, _ in node.next_functions]
    return list(leaves.values())


def gradients_of(loss: Tensor, leaves: Sequence[Tensor], *, keep_graph: bool) -> list[Tensor]:
    """A scalar's gradient for each leaf, dense; zeros where the scalar does not depend on it.

    The engine is called directly: `autograd.grad` and `backward` suspend every `TorchFunctionMode`, so that dropout
    would be active in code that the backward pass runs again, as checkpointing does.
    """
    if not leaves or not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    create_graph, allow_unreachable = False, True
    seeds, inputs = (torch.ones_like(loss),), tuple(leaves)
    gradients = _engine_run_backward(
        (loss,), seeds, keep_graph, create_graph, inputs, allow_unreachable, accumulate_grad=False
    )
    return [_dense_gradient(leaf, gradient) for leaf, gradient in zip(leaves, gradients, strict=True)]


def _dense_gradient(leaf: Tensor, gradient: Tensor | None) -> Tensor:
    """A leaf's gradient as a dense tensor; zeros for None."""
    if gradient is None:
        return torch.zeros_like(leaf)
    # nn.Embedding(sparse=True) gives sparse gradients, which cannot be compared entry by entry.
    return gradient.detach() if gradient.layout == torch.strided else gradient.detach().to_dense()
