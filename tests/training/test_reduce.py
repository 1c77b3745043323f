"""Losses and means over real steps, against one sequence at a time."""

import itertools
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from strategies import lengths
from torch import nn

from collate import LengthError, LengthTrackedBatch, last_step, masked_mean, sequence_loss, token_scale

CLASSES = 5
FLOATS = {"dtype": torch.float64}


def pair(counts: Any, seed: int = 0, padding: Any = float("nan")) -> Any:
    """Logits with poison in their padding, and targets with their own padding value."""
    rng = torch.Generator().manual_seed(seed)
    logits = [torch.randn(count, CLASSES, generator=rng, **FLOATS).requires_grad_() for count in counts]
    labels = [torch.randint(CLASSES, (count,), generator=rng) for count in counts]
    output = LengthTrackedBatch.from_sequences(logits, padding_value=padding)
    return logits, labels, output, LengthTrackedBatch.from_sequences(labels, padding_value=-100)


def alone(loss_fn: Any, logits: Any, labels: Any, reduction: Any, weights: Any = None) -> Any:
    """The oracle: each sequence's loss by itself, then the mean asked for."""
    weights = weights or [torch.ones(len(row), **FLOATS) for row in labels]
    losses = [loss_fn(x, y) * w for x, y, w in zip(logits, labels, weights, strict=True)]
    totals = [float(w.sum()) for w in weights]
    if reduction == "sum":
        return sum(loss.sum() for loss in losses)
    if reduction == "token":
        return sum(loss.sum() for loss in losses) / (sum(totals) or 1)
    means = [loss.sum() / total for loss, total in zip(losses, totals, strict=True) if total]
    return sum(means, torch.tensor(0.0, **FLOATS)) / max(len(means), 1)


@given(lengths(), st.sampled_from(["token", "sequence", "sum"]), st.booleans(), st.integers(0, 99))
def test_the_loss_and_its_gradients_equal_those_of_one_sequence_at_a_time(
    counts: Any, reduction: Any, weighted: Any, seed: int
) -> None:
    loss_fn = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    logits, labels, output, target = pair(counts, seed)
    weights = [torch.randint(0, 3, (count,)).to(torch.float64) for count in counts] if weighted else None
    padded = None
    if weights is not None:
        block = LengthTrackedBatch.from_sequences(weights, padding_value=torch.nan, order=target.permutation)
        padded = block.padded
    loss = sequence_loss(loss_fn, output, target, weights=padded, reduction=reduction)
    expected = alone(loss_fn, logits, labels, reduction, weights)
    torch.testing.assert_close(loss, expected)
    options = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad(loss, logits, retain_graph=True, **options)
    wanted = torch.autograd.grad(expected, logits, **options) if expected.requires_grad else [0 * x for x in logits]
    for left, right in zip(ours, wanted, strict=True):
        torch.testing.assert_close(left, right)


def test_a_batch_without_a_real_step_has_loss_zero_and_stays_connected() -> None:
    logits, _, output, target = pair([0, 0])
    for reduction in ("token", "sequence", "sum"):
        loss = sequence_loss(nn.CrossEntropyLoss(reduction="none"), output, target, reduction=reduction)
        assert loss == 0
        assert not any(x.any() for x in torch.autograd.grad(loss, logits, retain_graph=True))


def test_class_weights_and_ignored_labels_keep_the_number_of_steps() -> None:
    logits, labels, output, target = pair([3, 1])
    weighted = nn.CrossEntropyLoss(reduction="none", weight=torch.arange(CLASSES, **FLOATS), ignore_index=2)
    expected = sum(weighted(x, y).sum() for x, y in zip(logits, labels, strict=True)) / 4
    torch.testing.assert_close(sequence_loss(weighted, output, target), expected)


COMPILERS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not which("g++"), reason="no g++")),
]
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
NEEDS_COMPILER = pytest.mark.skipif(which("g++") is None, reason="needs a C++ compiler")
LOSSES = {
    "labels": (nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1), lambda labels: labels),
    "weighted labels": (nn.CrossEntropyLoss(reduction="none", weight=torch.ones(CLASSES, **FLOATS)), lambda y: y),
    "values": (
        lambda output, target: (output - target).square().sum(-1),
        lambda y: nn.functional.one_hot(y.clamp(min=0), CLASSES).to(torch.float64),
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize(
    ("backend", "name", "weighted"),
    [
        *itertools.product(["eager", "aot_eager"], LOSSES, [False, True]),
        pytest.param("inductor", "labels", True, marks=NEEDS_COMPILER),
    ],
)
def test_compiled_losses_equal_eager_ones_without_a_graph_break(backend: str, name: str, weighted: bool) -> None:
    loss_fn, as_target = LOSSES[name]

    def run(output: Any, target: Any, weights: Any, reduction: Any) -> Any:
        return sequence_loss(loss_fn, output, target, weights=weights, reduction=reduction)

    torch.compiler.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for counts in ([3, 5, 0, 1], [5, 1, 1, 0], [0, 0, 0, 0]):
        if backend == "inductor" and not any(counts) and TORCH < (2, 11):
            # The kernel of torch 2.9 refuses an index that inductor itself made.
            continue
        _, _, output, target = pair(counts, padding=torch.nan)
        target = target.with_padded(as_target(target.padded))
        weights = torch.where(output.mask, torch.rand(output.mask.shape, **FLOATS), torch.nan) if weighted else None
        leaf = output.padded.detach().requires_grad_()
        for reduction in ("token", "sequence", "sum"):
            losses = [f(output.with_padded(leaf), target, weights, reduction) for f in (run, compiled)]
            torch.testing.assert_close(*losses)
            torch.testing.assert_close(*[torch.autograd.grad(loss, leaf)[0] for loss in losses])


def test_half_precision_losses_are_summed_in_single_precision() -> None:
    count = 70_000
    output = LengthTrackedBatch.from_sequences([torch.ones(count, dtype=torch.float16)])
    zeros = output.with_padded(torch.zeros_like(output.padded))
    weights = torch.ones(1, count, dtype=torch.float16)
    for options in ({}, {"weights": weights}, {"reduction": "sequence"}):
        loss = sequence_loss(nn.MSELoss(reduction="none"), output, zeros, **options)
        assert loss.dtype == torch.float32
        assert loss == 1
    assert sequence_loss(nn.MSELoss(reduction="none"), output, zeros, reduction="sum") == count


@pytest.mark.parametrize(("steps", "value"), [(100, 1000.0), (70_000, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_means_are_summed_in_single_precision(dtype: torch.dtype, steps: int, value: float) -> None:
    """Red before: a sum beyond 65,504 was inf, and a count beyond it made the mean NaN."""
    batch = LengthTrackedBatch.from_sequences([torch.full((steps,), value, dtype=dtype), torch.ones(2, dtype=dtype)])
    mean = masked_mean(batch)
    assert mean.dtype == dtype
    assert mean.tolist() == [value, 1]


def test_the_loss_of_one_chunk_against_another_s_targets_is_refused() -> None:
    """Red before: chunks of equal lengths were taken for the same steps."""
    _, _, output, target = pair([4, 4])
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    for chunk, labels in zip(output.split_steps(2), target.split_steps(2), strict=True):
        sequence_loss(loss_fn, chunk, labels)
    with pytest.raises(LengthError, match="output begins at step 0 of its sequences, target at step 2"):
        sequence_loss(loss_fn, output.split_steps(2)[0], target.split_steps(2)[1])


@pytest.mark.parametrize(
    ("change", "options", "kind", "message"),
    [
        (
            lambda t: LengthTrackedBatch(t.padded, [2, 1], permutation=t.permutation),
            {},
            LengthError,
            "target has .2, 1",
        ),
        (lambda t: LengthTrackedBatch(t.padded, t.lengths), {}, LengthError, "collate both fields together"),
        (lambda t: t, {"reduction": "mean"}, ValueError, "reduction must be 'token', 'sequence' or 'sum'"),
        (lambda t: t, {"weights": torch.ones(2)}, ValueError, r"weights must be \[B, T\] = \[2, 3\]"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    change: Callable[..., Any], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    _, _, output, target = pair([1, 3])
    with pytest.raises(kind, match=message):
        sequence_loss(nn.CrossEntropyLoss(reduction="none"), output, change(target), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_reduces_by_itself_is_refused(reduction: str) -> None:
    _, _, output, target = pair([1, 3])
    with pytest.raises(ValueError, match=r'one loss per real step, \[4\], got \[\]: use reduction="none"'):
        sequence_loss(nn.CrossEntropyLoss(reduction=reduction), output, target)


@given(lengths(), st.lists(st.integers(1, 3), max_size=2))
def test_means_and_last_steps_are_those_of_each_row_alone(counts: Any, features: Any) -> None:
    rows = [torch.randn(count, *features, **FLOATS).requires_grad_() for count in counts]
    batch = LengthTrackedBatch.from_sequences(rows, padding_value=torch.nan, order="given")
    means, ends = masked_mean(batch), last_step(batch)
    nothing = torch.zeros(features, **FLOATS)
    for row, mean, end in zip(rows, means, ends, strict=True):
        torch.testing.assert_close(mean, row.mean(0) if len(row) else nothing)
        torch.testing.assert_close(end, row[-1] if len(row) else nothing)
    gradients = torch.autograd.grad(means.sum() + ends.sum(), rows, allow_unused=True, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_mean_of_integers_is_refused_and_their_last_step_is_not() -> None:
    batch = LengthTrackedBatch.from_sequences([[1, 2], [3]])
    assert last_step(batch).tolist() == [2, 3]
    with pytest.raises(TypeError, match="masked_mean needs floating-point values, got torch.int64"):
        masked_mean(batch)


def test_the_scale_of_a_single_process_is_one_over_its_tokens() -> None:
    assert token_scale(8) == 1 / 8
    assert token_scale(0) == 0
    with pytest.raises(ValueError, match="num_tokens must be at least 0, got -1"):
        token_scale(-1)


def _train_on_a_rank(rank: Any, counts: Any, folder: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(counts))
    model = nn.parallel.DistributedDataParallel(_model())
    # Two micro-batches: gradients add up, the scale is taken once.
    batches = _batches(counts[rank], seed=rank)
    scale = token_scale(sum(x.num_tokens for x, _ in batches))
    with model.no_sync():
        (_sum_loss(model, *batches[0]) * scale).backward()
    (_sum_loss(model, *batches[1]) * scale).backward()
    torch.save([weight.grad for weight in model.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _model() -> Any:
    torch.manual_seed(0)
    return nn.Linear(2, CLASSES).double()


def _batches(counts: Any, seed: int) -> Any:
    rng = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(count, 2, generator=rng, **FLOATS) for count in counts]
    labels = [torch.randint(CLASSES, (count,), generator=rng) for count in counts]
    halves = (slice(0, 2), slice(2, None))
    return [tuple(map(LengthTrackedBatch.from_sequences, (inputs[half], labels[half]))) for half in halves]


def _sum_loss(model: Any, inputs: Any, labels: Any) -> Any:
    return sequence_loss(nn.CrossEntropyLoss(reduction="none"), inputs.map(model), labels, reduction="sum")


@pytest.mark.parametrize("counts", [[[3, 1, 4, 2], [9, 1, 1]], [[0, 0, 0], [5, 2, 7]]], ids=["uneven", "one-empty"])
def test_two_processes_take_the_gradient_of_one(counts: list[list[int]], tmp_path: Path) -> None:
    mp.spawn(_train_on_a_rank, (counts, tmp_path), nprocs=2)
    model = _model()
    batches = [batch for rank in range(2) for batch in _batches(counts[rank], seed=rank)]
    tokens = sum(inputs.num_tokens for inputs, _ in batches)
    (sum(_sum_loss(model, *batch) for batch in batches) / tokens).backward()
    for rank in range(2):
        for ours, weight in zip(torch.load(tmp_path / f"{rank}.pt"), model.parameters(), strict=True):
            torch.testing.assert_close(ours, weight.grad)
