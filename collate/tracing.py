"""What a step of somebody else's does in torch: the leaves it is differentiated by, and its dropout, switched off."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
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
# Where the rate stands if it is not given by name.
_RATE_AT = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}


class WithoutDropout(TorchFunctionMode):
    """Within it torch drops nothing, whoever calls: modules, functions, attention and recurrent layers."""

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
            place = _RATE_AT[func]
            args = tuple(0.0 if at == place else arg for at, arg in enumerate(args))
        named |= {name: 0.0 for name in ("dropout", "dropout_p") if name in named}
        return func(*args, **named)


def leaves_of(result: Tensor) -> list[Tensor]:
    """The leaves that a result's graph ends in, each once, in the order in which they are found."""
    leaves: dict[int, Tensor] = {}
    nodes, seen = [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            leaves[id(leaf)] = leaf
        nodes += [parent for parent, _ in node.next_functions]
    return list(leaves.values())
