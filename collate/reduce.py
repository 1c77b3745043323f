"""Losses, means and last steps that see real steps only."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from collate.agreement import aligned
from collate.batch import LengthTrackedBatch
from collate.errors import LengthError

Reduction: TypeAlias = Literal["token", "sequence", "sum"]


def sequence_loss(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    output: LengthTrackedBatch,
    target: LengthTrackedBatch,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "token",
) -> Tensor:
    """A loss over real steps; whatever the padding holds gives no value and gets no gradient, even NaN.

    Args:
        loss_fn: gives one loss per step: called once with `[M, *G]` and `[M, ...]`, returns `[M]`. A torch loss must
            have `reduction="none"`.
        output: `[B, T, *G]`.
        target: `[B, T, ...]`, of the same rows in the same order.
        weights: `[B, T]` on the output's device, a factor for each step (0 for the steps of a prompt); None is all 1.
        reduction: `"token"`: the sum over real steps by their number, or by the sum of their weights; class weights
            and `ignore_index` inside `loss_fn` do not change that number. `"sequence"`: each row's mean, and the mean
            of these over the rows that are not empty (or not weighted to zero). `"sum"`: the sum over real steps.

    Returns:
        A scalar on the output's device; 0 where there is no real step.

    Raises:
        LengthError: Output and target differ in their lengths or in their rows' order.
        ValueError: `loss_fn` does not give one loss per step, weights are not `[B, T]`, or the reduction is unknown.
    """
    _check_pair(output, target)
    losses = loss_fn(output.flat(), target.flat())
    if losses.shape != (output.num_tokens,):
        raise ValueError(
            f"loss_fn must give one loss per real step, [{output.num_tokens}], got {list(losses.shape)}: use "
            'reduction="none", and sum or average feature axes inside it'
        )
    counts = None if weights is None else _flat_weights(weights, output)
    if counts is not None:
        losses = losses * counts
    if reduction == "sum":
        return losses.sum()
    if reduction == "token":
        return losses.sum() / (max(output.num_tokens, 1) if counts is None else _not_zero(counts.sum()))
    if reduction == "sequence":
        return _mean_of_rows(losses, counts, output)
    raise ValueError(f"reduction must be 'token', 'sequence' or 'sum', got {reduction!r}")


def masked_mean(batch: LengthTrackedBatch) -> Tensor:
    """Each row's mean over its real steps: `[B, *F]`, in batch order; 0 for an empty row.

    Raises:
        TypeError: The values are not floating-point.
    """
    if not batch.padded.is_floating_point() and not batch.padded.is_complex():
        raise TypeError(f"masked_mean needs floating-point values, got {batch.padded.dtype}: convert with .to(dtype)")
    total = torch.where(aligned(batch.mask, batch.padded), batch.padded, 0).sum(1)
    counts = batch.mask.sum(1).clamp(min=1).to(total.dtype)
    return total / aligned(counts, total)


def last_step(batch: LengthTrackedBatch) -> Tensor:
    """Each row's value at its last real step: `[B, *F]`, in batch order; 0 for an empty row."""
    last = (batch.mask.sum(1) - 1).clamp(min=0)
    values = batch.padded[torch.arange(len(batch), device=batch.device), last]
    return torch.where(aligned(batch.mask[:, 0], values), values, 0)


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
        ValueError: `num_tokens` is negative.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens must not be negative, got {num_tokens}")
    if not dist.is_available() or not dist.is_initialized():
        return torch.tensor(1 / num_tokens if num_tokens else 0.0, dtype=torch.float64)
    on_host = "cpu" in dist.get_backend_config(group)
    total = torch.tensor(
        num_tokens, dtype=torch.int64, device=None if on_host else torch.accelerator.current_accelerator()
    )
    dist.all_reduce(total, group=group)
    return torch.where(total > 0, dist.get_world_size(group) / total.to(torch.float64).clamp(min=1), 0)


def _check_pair(output: LengthTrackedBatch, target: LengthTrackedBatch) -> None:
    if torch.equal(output.lengths, target.lengths) and torch.equal(output.permutation, target.permutation):
        return
    if not torch.equal(output.lengths, target.lengths):
        raise LengthError(
            f"output has lengths {output.lengths.tolist()}, target has {target.lengths.tolist()}: they must be of the "
            "same steps of the same rows"
        )
    raise LengthError(
        f"output's rows are samples {output.permutation.tolist()}, target's are {target.permutation.tolist()}: "
        "collate both fields together, or unsort both"
    )


def _flat_weights(weights: Tensor, output: LengthTrackedBatch) -> Tensor:
    if weights.shape != output.mask.shape:
        raise ValueError(f"weights must be [B, T] = {list(output.mask.shape)}, got {list(weights.shape)}")
    return output.with_padded(weights).flat()


def _mean_of_rows(losses: Tensor, counts: Tensor | None, output: LengthTrackedBatch) -> Tensor:
    lengths = output.lengths.to(losses.device, non_blocking=True)
    rows = torch.repeat_interleave(torch.arange(len(output), device=losses.device), lengths, output_size=len(losses))
    sums = losses.new_zeros(len(output)).index_add(0, rows, losses)
    total = lengths.to(losses.dtype) if counts is None else counts.new_zeros(len(output)).index_add(0, rows, counts)
    return (sums / _not_zero(total)).sum() / _not_zero((total != 0).sum())


def _not_zero(count: Tensor) -> Tensor:
    return torch.where(count == 0, 1, count)
