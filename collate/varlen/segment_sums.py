"""Sums over segments of steps: one launch for any number of them, in the order of the steps.

A sum by `index_add` would be made of atomic additions on an accelerator, whose order differs from run to run; running
sums would let one document's rounding into the next.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function


def sum_segments(steps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum steps over segments, in float32 where they are integers.

    Args:
        steps: `[T, *G]`.
        cu_seqlens: int32 `[S + 1]` on the same device, ascending from 0 to T.

    Returns:
        `[S, *G]`, 0 for a segment without steps; gradients flow.
    """
    if steps.is_complex():
        return torch.view_as_complex(sum_segments(torch.view_as_real(steps), cu_seqlens))
    if not steps.is_floating_point():
        return sum_segments(steps.to(torch.float32), cu_seqlens)
    bounds = cu_seqlens.to(torch.int64)
    # A graph cannot hold a function with a forward mode of its own; torch's has a derivative, but not a second one.
    return _reduce(steps, bounds) if torch.compiler.is_compiling() else _sum(steps, bounds)


def _reduce(steps: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(steps.contiguous(), "sum", offsets=offsets, axis=0, unsafe=True, initial=0)


def spread_segments(sums: Tensor, offsets: Tensor, steps: int) -> Tensor:
    """One entry per segment `[S, *G]` as one per step `[T, *G]`."""
    index = torch.arange(steps, device=offsets.device)
    return sums.index_select(0, torch.searchsorted(offsets[1:].contiguous(), index, right=True))


class _SumSegments(Function):
    @staticmethod
    def forward(steps: Tensor, offsets: Tensor) -> Tensor:
        return _reduce(steps, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        steps, offsets = inputs
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)
        ctx.steps = steps.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (offsets,) = ctx.saved_tensors
        return spread_segments(grad, offsets, ctx.steps), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], steps: Tensor, offsets: Tensor) -> tuple[Tensor, int]:
        """Sums of steps with one more axis, which becomes the last one.

        Raises:
            NotImplementedError: Offsets are mapped over.
        """
        if in_dims[0] is None or in_dims[1] is not None:
            raise NotImplementedError("offsets cannot be mapped over: they are the same for all")
        # A mapped axis is one more feature.
        return sum_segments(steps.movedim(in_dims[0], -1), offsets), -1

    @staticmethod
    def jvp(ctx: Any, change: Tensor, offsets: None) -> Tensor:
        (bounds,) = ctx.saved_tensors
        return sum_segments(change, bounds)


_sum = cast("Callable[..., Tensor]", _SumSegments.apply)
