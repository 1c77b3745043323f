"""Restore random states, buffers, weights and optimizer after a user's training step was run."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextmanager
def restored_random_state(devices: Iterable[torch.device] | None = None) -> Iterator[None]:
    """Restore the random states of torch, Python and NumPy.

    Args:
        devices: Accelerators whose state is restored; None restores all, which starts each of them.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's own state is restored
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def restored_training(
    module: nn.Module | None, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> Iterator[None]:
    """Restore weights, gradients, buffers, optimizer and random states; the copies are kept on the host."""
    with ExitStack() as stack:
        # Only the step's own device: others would be started for nothing.
        stack.enter_context(restored_random_state([device] if device.type == "cuda" else []))
        if optimizer is not None:
            # Callbacks run in reverse: weights first, then the optimizer that refers to them.
            stack.callback(optimizer.load_state_dict, _copy_state(optimizer))
        if module is not None:
            for tensor in (*module.parameters(), *module.buffers()):
                stack.callback(_restorer(tensor))
            for weight in module.parameters():
                weight.grad = None
        yield


def _restorer(tensor: Tensor) -> Callable[[], None]:
    """A function that gives a tensor the values and the gradient that it has now."""
    values, gradient = _on_host(tensor), tensor.grad

    def restore() -> None:
        tensor.data.copy_(values)
        tensor.grad = gradient

    return restore


def _on_host(tensor: Tensor) -> Tensor:
    """A copy on the host."""
    return tensor.detach().to("cpu", copy=True)


def _copy_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of an optimizer's state, its tensors on the host."""
    whole = optimizer.state_dict()
    # Options stay on their device: loading moves an optimizer's state to its weights, but no tensor among the options.
    return {
        "state": pytree.tree_map_only(Tensor, _on_host, whole["state"]),
        "param_groups": deepcopy(whole["param_groups"]),
    }
