"""torch's recurrent modules: whether a call runs torch's own kernels, and the checks that these kernels leave out."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.rnn import PackedSequence

RnnState: TypeAlias = Tensor | tuple[Tensor, ...]
"""State of a recurrent module: `[layers, B, H]`; of an LSTM two of them."""

# What a call of these modules runs, unless it was replaced.
_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in (nn.RNN, nn.GRU, nn.LSTM)}
_INTERCEPTED = ("forward", "_call_impl", "_slow_forward")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# torch's own tables of hooks on all modules; `_has_any_global_hook` reads the same, but came with torch 2.8.
_GLOBAL_HOOKS = [vars(torch_module)[f"_global{name}"] for name in _HOOKS]


def is_plain(rnn: nn.Module) -> bool:
    """Whether a call of the module leads to torch's own `forward` of an RNN, GRU or LSTM, and to nothing else.

    It does not for a custom class, nor where hooks, a compiled call or another `forward` were put on the instance, on
    the class or on all modules.
    """
    kind, own = type(rnn), vars(rnn)
    if kind not in _FORWARDS or kind.forward is not _FORWARDS[kind]:
        return False
    # An attribute of the instance comes before the method of the class.
    replaced = any(name in own for name in _INTERCEPTED) or own.get("_compiled_call_impl") is not None
    return not replaced and not any(own[name] for name in _HOOKS) and not any(_GLOBAL_HOOKS)


def check_rnn_inputs(rnn: nn.RNNBase, packed: PackedSequence, hx: RnnState | None) -> None:
    """Check sizes, dtypes and devices of input, states and weights against each other.

    oneDNN's kernel checks nothing and reads and writes beyond its memory. torch's own LSTM hands it packed sequences of
    one length unchecked.

    Args:
        rnn: A plain module.
        packed: Data `[M, input_size]`.
        hx: `[layers * directions, B, H]`, for an LSTM a pair; None starts from zeros.

    Raises:
        RuntimeError: A size or a device differs from what the module was made for.
        TypeError: An LSTM is given no pair, or another module is given a tuple.
        ValueError: A dtype differs.
    """
    rnn.check_input(packed.data, packed.batch_sizes)
    weights = [weight for layer in rnn.all_weights for weight in layer]
    shapes = [tuple(weight.shape) for weight in weights]
    if shapes != weight_shapes(rnn):
        raise RuntimeError(f"the module was made with weights of {weight_shapes(rnn)}, they now are {shapes}")
    states = _states(rnn, packed, hx)
    _check_devices(packed.data, [*states, *weights])
    # Autocast converts the parts itself.
    if not _is_autocast(packed.data.device.type):
        for name, parts in (("hx", states), ("a weight", weights)):
            for part in parts:
                if part.dtype != packed.data.dtype:
                    raise ValueError(f"{name} has dtype {part.dtype}, the input has {packed.data.dtype}: convert one")


def _is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    # torch refuses the question for some devices, such as meta.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _states(rnn: nn.RNNBase, packed: PackedSequence, hx: RnnState | None) -> Sequence[Tensor]:
    """The initial states as a sequence of tensors, after torch's own checks.

    Raises:
        TypeError: An LSTM has no pair, or another module a tuple.
    """
    if hx is None:
        return ()
    pair = rnn.mode == "LSTM"
    if isinstance(hx, tuple) != pair or (isinstance(hx, tuple) and len(hx) != 2):
        got = f"a tuple of {len(hx)}" if isinstance(hx, tuple) else "a tensor"
        raise TypeError(f"hx of {type(rnn).__name__} must be {'a pair (h, c)' if pair else 'a tensor'}, got {got}")
    # LSTM's takes a pair, which the annotation of the base class does not say.
    check: Any = rnn.check_forward_args
    check(packed.data, hx, packed.batch_sizes)
    return hx if isinstance(hx, tuple) else (hx,)


def _check_devices(data: Tensor, others: Sequence[Tensor]) -> None:
    """Check that all tensors are on the input's device.

    Raises:
        RuntimeError: One is not.
    """
    for other in others:
        if other.device != data.device:
            raise RuntimeError(
                f"input, hx and weights must be on one device, got {data.device} and {other.device}: move them with .to"
            )


def weight_shapes(rnn: nn.RNNBase) -> list[tuple[int, ...]]:
    """The shapes of all weights that the module was made with, layer by layer and direction by direction."""
    gates = {"LSTM": 4, "GRU": 3}.get(rnn.mode, 1) * rnn.hidden_size
    output, directions = rnn.proj_size or rnn.hidden_size, 2 if rnn.bidirectional else 1
    shapes: list[tuple[int, ...]] = []
    for layer in range(rnn.num_layers):
        inputs = output * directions if layer else rnn.input_size
        biases: list[tuple[int, ...]] = [(gates,), (gates,)] if rnn.bias else []
        projection = [(rnn.proj_size, rnn.hidden_size)] if rnn.proj_size else []
        shapes += [(gates, inputs), (gates, output), *biases, *projection] * directions
    return shapes
