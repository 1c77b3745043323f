"""Losses, means and last steps that see real steps only."""

from collections.abc import Callable
from typing import Literal, TypeAlias, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from collate.errors import LengthError
from collate.lengths.tracking import check_tracked
from collate.tensors.graphs import is_making_graph
from collate.tensors.masks import expand_like
from collate.tensors.steps import gather_steps, scatter_steps
from collate.training.sequences import SequenceBatch, count_labelled_steps, labelled_steps
from collate.widths import check_count

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From outputs `[M, *G]` and targets `[M, ...]` to losses `[M]`: a loss with `reduction="none"`."""
Reduction: TypeAlias = Literal["token", "sequence", "sum"]
"""What a loss is the mean of: real steps, or sequences; or the sum over real steps."""


def sequence_loss(
    loss_fn: LossFunction,
    output: SequenceBatch,
    target: SequenceBatch,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "token",
) -> Tensor:
    """A loss over real steps; padding contributes nothing and gets no gradient, even if it holds NaN.

    Args:
        loss_fn: Gives one loss per step: called once with `[M, *G]` and `[M, ...]`, returns `[M]`. A torch loss must
            have `reduction="none"`.
        output: A `LengthTrackedBatch` or a `VarlenBatch` of values `[B, T, *G]`.
        target: `[B, T, ...]`, of the same kind, and of the same sequences in the same order. In labels that
            `next_step_labels` has made, only the steps that have a label count.
        weights: On the output's device: `[B, T]`, a factor for each step (0 for the steps of a prompt), or `[N]`, one
            for each document of a `VarlenBatch`; None is all 1.
        reduction: `"token"`: the sum over real steps divided by their number, or by the sum of their weights; class
            weights and `ignore_index` inside `loss_fn` do not change that number. `"sequence"`: each sequence's mean,
            and the mean of these over the sequences that are not empty (or not weighted to zero). `"sum"`: the sum over
            real steps.

    Returns:
        A scalar on the output's device, float32 or wider (losses of half precision are summed in float32); 0 where
        there is no real step.

    Raises:
        LengthError: Output and target differ in their lengths, their rows, the order of these or their chunk (not
            checked in compiled code); or lengths were written to.
        TypeError: Output or target is a tensor, they are of two kinds, or weights are no tensor.
        ValueError: `loss_fn` does not give one loss per step, weights have another shape, or the reduction is unknown.
    """
    check_tracked("sequence_loss", output, target)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be 'token', 'sequence' or 'sum', got {reduction!r}")
    # Helpers are called only where they are needed: if a compiler breaks the graph, a helper that only reads a shape
    # would become an empty graph of its own.
    if output.is_varlen != target.is_varlen:
        raise TypeError(
            f"output is a {type(output).__name__}, target is a {type(target).__name__}: give two of one kind, "
            "to_padded() and to_varlen() make one of the other"
        )
    if weights is not None:
        weights = _weights_of_steps(output, weights)
    labelled = labelled_steps(target)
    if labelled is not None:
        weights = _weights_of_labels(labelled, weights, output.step_values.dtype)
    if _has_fixed_shapes(output):
        losses, counts = _dense_losses(loss_fn, output, target, weights)
    else:
        losses, counts = _flat_losses(loss_fn, output, target, weights, in_rows=reduction == "sequence")
    if reduction == "sum":
        return losses.sum()
    if reduction == "token":
        # Without weights the number is known on the host, and nothing waits for the device.
        return losses.sum() / (max(output.num_tokens, 1) if counts is None else _not_zero(counts.sum()))
    totals = output.step_counts() if counts is None else output.sum_sequences(counts)
    return (output.sum_sequences(losses) / _not_zero(totals)).sum() / _not_zero((totals != 0).sum())


def masked_mean(batch: SequenceBatch) -> Tensor:
    """Each sequence's mean over its real steps: `[N, *F]`, in batch order; 0 for an empty one.

    A sequence is a row of a `LengthTrackedBatch` and a document of a `VarlenBatch`.

    Raises:
        LengthError: Lengths were written to, which the mask does not follow.
        TypeError: The values are not floating-point, or `batch` is a tensor.
    """
    check_tracked("masked_mean", batch)
    batch.check_unwritten()
    values = batch.step_values
    if not values.is_floating_point() and not values.is_complex():
        raise TypeError(f"masked_mean needs floating-point values, got {values.dtype}: convert with .to(dtype)")
    # In half precision a sum overflows beyond 65,504, and so does a count.
    wide = torch.promote_types(values.dtype, torch.float32)
    total = batch.sum_sequences(torch.where(expand_like(batch.mask, values), values, 0), wide)
    # An empty sequence has the sum 0, and 0 / 1 is its mean.
    counts = batch.step_counts().clamp(min=1).to(wide)
    return batch.pick_sequences(total / expand_like(counts, total)).to(values.dtype)


def last_step(batch: SequenceBatch) -> Tensor:
    """Each sequence's value at its last real step: `[N, *F]`, in batch order; 0 for an empty one.

    A sequence is a row of a `LengthTrackedBatch` and a document of a `VarlenBatch`.

    Raises:
        LengthError: Lengths were written to, which the mask does not follow.
        TypeError: `batch` is a tensor.
    """
    check_tracked("last_step", batch)
    batch.check_unwritten()
    values, has_steps = batch.last_values()
    return torch.where(expand_like(has_steps, values), values, 0)


def token_scale(num_tokens: int | SequenceBatch, group: dist.ProcessGroup | None = None) -> Tensor:
    """The factor that turns DDP's averaged gradient of summed losses into that of the mean over all ranks' tokens.

    Each rank multiplies its `sequence_loss(..., reduction="sum")` by it. DDP averages over W ranks, so the factor is
    W / (tokens of all ranks). Every rank must call it at the same point; under gradient accumulation call it once, with
    the tokens of all micro-batches.

    Args:
        num_tokens: Real tokens of this rank, host integer; or a batch, whose real steps are counted (of a batch of
            labels, those that have a label).
        group: The process group; None is the default one, or a single process where none is initialised.

    Returns:
        float64 scalar, on the CPU or where the group's backend communicates; 0 if there is no token anywhere.

    Raises:
        TypeError: `num_tokens` is neither an int nor a batch.
        ValueError: It is negative.
    """
    if hasattr(num_tokens, "is_varlen"):
        count = count_labelled_steps(cast("SequenceBatch", num_tokens))
    else:
        if isinstance(num_tokens, Tensor):
            raise TypeError(
                f"num_tokens must be an int or a batch, got a Tensor {list(num_tokens.shape)}: give batch.num_tokens, "
                "or wrap labels as LengthTrackedBatch(padded, lengths)"
            )
        count = check_count("num_tokens", num_tokens, least=0, hint="give the real tokens of this rank, or a batch")
    if not dist.is_available() or not dist.is_initialized():
        if isinstance(count, int):
            return torch.tensor(1 / count if count else 0.0, dtype=torch.float64, device="cpu")
        return torch.where(count > 0, 1 / count.to(torch.float64).clamp(min=1), 0)
    # NCCL communicates tensors on a GPU only, Gloo those on the host.
    on_host = "cpu" in dist.get_backend_config(group)
    device = "cpu" if on_host else torch.accelerator.current_accelerator(check_available=True)
    total = torch.as_tensor(count, dtype=torch.int64, device=device).clone()
    dist.all_reduce(total, group=group)
    return torch.where(total > 0, dist.get_world_size(group) / total.to(torch.float64).clamp(min=1), 0)


def _check_pair(output: SequenceBatch, target: SequenceBatch) -> None:
    """Check that output and target have the same rows, lengths and chunk.

    Raises:
        LengthError: They differ.
    """
    difference = output.difference(target)
    if difference is not None:
        raise LengthError(difference)


def _weights_of_steps(output: SequenceBatch, weights: Tensor) -> Tensor:
    """One weight for each step, `[B, T]`.

    Raises:
        TypeError: The weights are no tensor.
        ValueError: There is not one for each step, or for each document.
    """
    if not isinstance(weights, Tensor):
        way_out = "torch.as_tensor makes one"
        if hasattr(weights, "is_varlen"):
            way_out = "pass its .values" if weights.is_varlen else "pass its .padded"
        raise TypeError(f"weights must be a tensor [B, T], got {type(weights).__name__}: {way_out}")
    shape = output.step_values.shape[:2]
    steps = weights if weights.shape == shape else output.spread_weights(weights)
    if steps is None:
        raise ValueError(f"weights must be [B, T] = {list(shape)}, or of documents [N], got {list(weights.shape)}")
    return steps


def _weights_of_labels(labelled: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weights `[B, T]`, 0 where a step has no label."""
    if weights is None:
        return labelled.to(torch.promote_types(torch.float32, dtype))
    return torch.where(labelled, weights, 0)


def _has_fixed_shapes(batch: SequenceBatch) -> bool:
    """Whether a graph is being made, which will run on other lengths too: shapes and counts must come from the mask."""
    return is_making_graph(batch.step_values)


def _flat_losses(
    loss_fn: LossFunction,
    output: SequenceBatch,
    target: SequenceBatch,
    weights: Tensor | None,
    *,
    in_rows: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss and weight of each real step, `[M]`, or `[B, T]` with 0 in the padding; `loss_fn` sees real steps only."""
    _check_pair(output, target)
    shape = (output.step_values.shape[0], output.step_values.shape[1])
    index = output.real_step_index()
    # Fields of one width, as a collator makes them, share their flat index.
    same_width = target.step_values.shape[1] == shape[1] and target.device == output.device
    labels = gather_steps(target.step_values, index if same_width else target.real_step_index())
    losses = _per_step(loss_fn, gather_steps(output.step_values, index), labels)
    counts = None
    if weights is not None:
        counts = gather_steps(weights, index).to(losses.dtype)
        losses = losses * counts
    if in_rows:
        losses = scatter_steps(losses, index, shape)
        counts = None if counts is None else scatter_steps(counts, index, shape)
    return losses, counts


def _dense_losses(
    loss_fn: LossFunction, output: SequenceBatch, target: SequenceBatch, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Each step's loss and weight, `[B, T]`, 0 in the padding: a graph cannot hold shapes that depend on lengths."""
    mask = output.mask
    losses = _per_step(loss_fn, _all_real(output), _all_real(target)).reshape(mask.shape)
    counts = torch.where(mask, 1 if weights is None else weights, 0).to(losses.dtype)
    return torch.where(mask, losses * counts, 0), counts


def _all_real(batch: SequenceBatch) -> Tensor:
    """All steps `[B * T, *F]`, with a real step's value wherever there is padding, so that any loss can take them."""
    real = batch.mask.flatten()
    steps = batch.step_values.flatten(0, 1)
    stand_in = steps.detach().index_select(0, real.to(torch.uint8).argmax().reshape(1))
    # A batch without a real step has no such value; 0 is valid, as a number and as a class.
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
    """The count, or 1 instead of 0: the sum to be divided is 0 then."""
    return torch.where(count == 0, 1, count)
