"""Losses, means and last steps that see real steps only."""

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from collate.batch import LengthTrackedBatch
from collate.errors import LengthError
from collate.lengths.tracking import check_tracked, check_unwritten, host_lengths
from collate.tensors.masks import expand_like
from collate.tensors.steps import flat_index, gather_steps, scatter_steps
from collate.widths import check_count

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Reduction: TypeAlias = Literal["token", "sequence", "sum"]


def sequence_loss(
    loss_fn: LossFunction,
    output: LengthTrackedBatch,
    target: LengthTrackedBatch,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "token",
) -> Tensor:
    """A loss over real steps; whatever the padding holds contributes nothing and gets no gradient, even NaN.

    Args:
        loss_fn: Gives one loss per step: called once with `[M, *G]` and `[M, ...]`, returns `[M]`. A torch loss must
            have `reduction="none"`.
        output: `[B, T, *G]`.
        target: `[B, T, ...]`, of the same rows in the same order.
        weights: `[B, T]` on the output's device, a factor for each step (0 for the steps of a prompt); None is all 1.
        reduction: `"token"`: the sum over real steps by their number, or by the sum of their weights; class weights
            and `ignore_index` inside `loss_fn` do not change that number. `"sequence"`: each row's mean, and the mean
            of these over the rows that are not empty (or not weighted to zero). `"sum"`: the sum over real steps.

    Returns:
        A scalar on the output's device, float32 or wider (losses of half precision are summed in float32); 0 where
        there is no real step.

    Raises:
        LengthError: Output and target differ in their lengths, in their rows' order or in the chunk that they are of
            (not looked at in compiled code); or lengths were written to.
        TypeError: Output or target is a tensor, or weights are none.
        ValueError: `loss_fn` does not give one loss per step, weights are not `[B, T]`, or the reduction is unknown.
    """
    check_tracked("sequence_loss", output, target)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be 'token', 'sequence' or 'sum', got {reduction!r}")
    if weights is not None and not isinstance(weights, Tensor):
        way_out = "pass its .padded" if isinstance(weights, LengthTrackedBatch) else "torch.as_tensor makes one"
        raise TypeError(f"weights must be a tensor [B, T], got {type(weights).__name__}: {way_out}")
    if weights is not None and weights.shape != output.mask.shape:
        raise ValueError(f"weights must be [B, T] = {list(output.mask.shape)}, got {list(weights.shape)}")
    if _has_fixed_shapes(output):
        losses, counts = _dense_losses(loss_fn, output, target, weights)
    else:
        losses, counts = _flat_losses(loss_fn, output, target, weights, in_rows=reduction == "sequence")
    if reduction == "sum":
        return losses.sum()
    if reduction == "token":
        return losses.sum() / (max(output.num_tokens, 1) if counts is None else _not_zero(counts.sum()))
    totals = (output.mask if counts is None else counts).sum(1)
    return (losses.sum(1) / _not_zero(totals)).sum() / _not_zero((totals != 0).sum())


def masked_mean(batch: LengthTrackedBatch) -> Tensor:
    """Each row's mean over its real steps: `[B, *F]`, in batch order; 0 for an empty row.

    Raises:
        LengthError: Lengths were written to, which the mask does not follow.
        TypeError: The values are not floating-point, or it is given a tensor.
    """
    check_tracked("masked_mean", batch)
    check_unwritten(batch)
    if not batch.padded.is_floating_point() and not batch.padded.is_complex():
        raise TypeError(f"masked_mean needs floating-point values, got {batch.padded.dtype}: convert with .to(dtype)")
    # In half precision a sum overflows beyond 65,504, and so does a count.
    wide = torch.promote_types(batch.padded.dtype, torch.float32)
    total = torch.where(expand_like(batch.mask, batch.padded), batch.padded, 0).sum(1, dtype=wide)
    counts = batch.mask.sum(1).clamp(min=1).to(wide)
    return (total / expand_like(counts, total)).to(batch.padded.dtype)


def last_step(batch: LengthTrackedBatch) -> Tensor:
    """Each row's value at its last real step: `[B, *F]`, in batch order; 0 for an empty row.

    Raises:
        LengthError: Lengths were written to, which the mask does not follow.
        TypeError: It is given a tensor.
    """
    check_tracked("last_step", batch)
    check_unwritten(batch)
    last = (batch.mask.sum(1) - 1).clamp(min=0)
    values = batch.padded[torch.arange(len(batch), device=batch.device), last]
    return torch.where(expand_like(batch.mask[:, 0], values), values, 0)


def token_scale(num_tokens: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The factor that makes DDP's averaged gradient of summed losses that of the mean over all ranks' tokens.

    Each rank multiplies its `sequence_loss(..., reduction="sum")` by it. DDP averages over W ranks, so the factor is
    W / (tokens of all ranks). All ranks must call it alike; under gradient accumulation call it once, with the tokens
    of all micro-batches.

    Args:
        num_tokens: real tokens of this rank, host integer.
        group: the process group; None is the default one, or a single process where none is initialised.

    Returns:
        float64 scalar, on the CPU or where the group's backend communicates; 0 if there is no token anywhere.

    Raises:
        TypeError: `num_tokens` is not an int.
        ValueError: It is negative.
    """
    num_tokens = check_count("num_tokens", num_tokens, least=0, hint="give the real tokens of this rank")
    if not dist.is_available() or not dist.is_initialized():
        return torch.tensor(1 / num_tokens if num_tokens else 0.0, dtype=torch.float64, device="cpu")
    on_host = "cpu" in dist.get_backend_config(group)
    device = "cpu" if on_host else torch.accelerator.current_accelerator(check_available=True)
    total = torch.tensor(num_tokens, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=group)
    return torch.where(total > 0, dist.get_world_size(group) / total.to(torch.float64).clamp(min=1), 0)


def _check_pair(output: LengthTrackedBatch, target: LengthTrackedBatch) -> None:
    """Check that output and target have the same rows, lengths and chunk.

    Raises:
        LengthError: They have not.
    """
    if output.first_step != target.first_step:
        raise LengthError(
            f"output begins at step {output.first_step} of its sequences, target at step {target.first_step}: give "
            "both the same chunk of split_steps"
        )
    if not np.array_equal(host_lengths(output), host_lengths(target)):
        raise LengthError(
            f"output has lengths {output.lengths.tolist()}, target has {target.lengths.tolist()}: they must be of the "
            "same steps of the same rows"
        )
    if torch.equal(output.permutation, target.permutation):
        return
    raise LengthError(
        f"output's rows are samples {output.permutation.tolist()}, target's are {target.permutation.tolist()}: "
        "collate both fields together, or unsort both"
    )


def _has_fixed_shapes(batch: LengthTrackedBatch) -> bool:
    """Whether a graph is being made, which serves other lengths as well: shapes and numbers must come from the mask."""
    return torch.compiler.is_compiling() or (batch.mask.is_cuda and torch.cuda.is_current_stream_capturing())


def _flat_losses(
    loss_fn: LossFunction,
    output: LengthTrackedBatch,
    target: LengthTrackedBatch,
    weights: Tensor | None,
    *,
    in_rows: bool,
) -> tuple[Tensor, Tensor | None]:
    """Each real step's loss and weight, `[M]`, or put back `[B, T]` with 0 in the padding: the loss sees no other."""
    _check_pair(output, target)
    shape = (output.padded.shape[0], output.padded.shape[1])
    index = flat_index(host_lengths(output), shape[1], output.device)
    # Fields of one width, as they come from a collator, lie alike.
    same_width = target.padded.shape[1] == shape[1] and target.device == output.device
    labels = gather_steps(target.padded, index) if same_width else target.flat()
    losses = _per_step(loss_fn, gather_steps(output.padded, index), labels)
    counts = None
    if weights is not None:
        counts = gather_steps(weights, index).to(losses.dtype)
        losses = losses * counts
    if in_rows:
        losses = scatter_steps(losses, index, shape)
        counts = None if counts is None else scatter_steps(counts, index, shape)
    return losses, counts


def _dense_losses(
    loss_fn: LossFunction, output: LengthTrackedBatch, target: LengthTrackedBatch, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Each step's loss and weight, `[B, T]`, 0 in the padding: a graph cannot hold shapes that depend on lengths."""
    mask = output.mask
    losses = _per_step(loss_fn, _all_real(output), _all_real(target)).reshape(mask.shape)
    counts = torch.where(mask, 1 if weights is None else weights, 0).to(losses.dtype)
    return torch.where(mask, losses * counts, 0), counts


def _all_real(batch: LengthTrackedBatch) -> Tensor:
    """All steps `[B * T, *F]`, with a real step's value wherever there is padding, so that any loss can take them."""
    real = batch.mask.flatten()
    steps = batch.padded.flatten(0, 1)
    stand_in = steps.detach().index_select(0, real.to(torch.uint8).argmax().reshape(1))
    # A batch without any real step has no such value; 0 is a class, and a number, wherever there is one.
    return torch.where(expand_like(real, steps), steps, torch.where(real.any(), stand_in, torch.zeros_like(stand_in)))


def _per_step(loss_fn: LossFunction, output: Tensor, target: Tensor) -> Tensor:
    """The losses of the time steps, one each, in float32 or wider.

    Raises:
        ValueError: The function gives another number of losses.
    """
    losses = loss_fn(output, target)
    if losses.shape != output.shape[:1]:
        raise ValueError(
            f"loss_fn must give one loss per real step, [{len(output)}], got {list(losses.shape)}: use "
            'reduction="none", and sum or average feature axes inside it'
        )
    return losses.to(torch.promote_types(losses.dtype, torch.float32))


def _not_zero(count: Tensor) -> Tensor:
    """The count, and 1 for 0: the sum to be divided is 0 then."""
    return torch.where(count == 0, 1, count)
