"""check_step: what it says of steps that return no loss, raise, read nothing or are not numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_fixtures import batch, net, probes
from pipelines import PER_STEP, RIGHT, logits_of, tagged, targets

from collate import LengthError, check_step

__all__ = ["batch", "net"]


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda loss: (loss, loss), TypeError, r'got tuple: .*\{"tags": loss'),
        (lambda loss: {"loss": (loss,)}, TypeError, "term 'loss' of the step must return a scalar tensor, got tuple"),
        (lambda loss: {}, TypeError, "empty mapping"),
        (lambda loss: loss.item(), TypeError, r"got float: return the tensor, without item\(\)"),
        (lambda loss: None, TypeError, "got NoneType: add a return statement"),
        (lambda loss: loss.expand(4), LengthError, r"scalar loss, got shape \[4\]: reduce it"),
        (lambda loss: {"loss": loss, "logits": loss.expand(4, 7)}, LengthError, r"'logits'.*output\.loss"),
        (lambda loss: loss + 1j, TypeError, "real loss, got torch.complex64"),
    ],
)
def test_a_result_that_is_no_loss_is_refused_with_a_way_out(
    result: Callable[..., Any], error: type[Exception], message: str, net: Any, batch: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        check_step(lambda b: result(RIGHT["packed tagger"](net, b)), batch)


def test_a_loss_that_is_nan_is_told_so(net: Any, batch: dict[str, Any]) -> None:
    report = check_step(lambda b: RIGHT["packed tagger"](net, b) * torch.nan, batch)
    assert probes(report) == {"finite"}
    assert "the loss is nan" in str(report)
    gradients = check_step(lambda b: RIGHT["packed tagger"](net, b) + (net.head.weight * 0).sum().sqrt(), batch)
    assert "gradients are not finite" in str(gradients)


def test_a_step_that_reads_nothing_is_told_so(net: Any, batch: dict[str, Any]) -> None:
    report = check_step(lambda b: net.head.weight.sum(), batch)
    assert probes(report) == {"dead step"}
    assert "no value of x, ids, y moves the loss: nothing is read" in str(report)


def test_a_denominator_of_its_own_is_named(net: Any, batch: dict[str, Any]) -> None:
    def thirds(b: dict[str, Any]) -> torch.Tensor:
        counted = b["x"].mask.float().cumsum(1).remainder(3) == 1
        losses = PER_STEP(logits_of(net, b).transpose(1, 2), targets(b, 0))
        return losses[counted & b["x"].mask].mean()

    [finding] = [each for each in check_step(thirds, batch).findings if each.probe == "other rows"]
    assert "a custom denominator" in finding.likely[0]


def test_a_step_may_take_its_labels_out_of_the_batch(net: Any, batch: dict[str, Any]) -> None:
    def popping(b: dict[str, Any]) -> torch.Tensor:
        return tagged(net, {"x": b["x"], "y": b.pop("y")}, net.widen(b["x"].padded))

    assert check_step(popping, batch).ok
    assert set(batch) == {"x", "ids", "y", "label"}


def test_a_step_that_calls_backward_is_told_so(net: Any, batch: dict[str, Any]) -> None:
    def moving(b: dict[str, Any]) -> torch.Tensor:
        loss = RIGHT["packed tagger"](net, b)
        loss.backward()
        return loss

    with pytest.raises(LengthError, match="must not call backward itself"):
        check_step(moving, batch)


def test_a_drift_that_is_not_finite_is_called_nan_or_infinity(net: Any, batch: dict[str, Any]) -> None:
    def wide(b: dict[str, Any]) -> torch.Tensor:
        return RIGHT["packed tagger"](net, b) * (1 if b["x"].padded.shape[1] < 8 else torch.nan)

    assert "width: a wider batch moves the loss or its gradients to nan or infinity" in str(check_step(wide, batch))
    alone = check_step(lambda b: RIGHT["packed tagger"](net, b) * (torch.nan if len(b["x"]) == 1 else 1), batch)
    assert "row 0 alone gives nan" in str(alone)


def test_a_mean_over_pairs_of_steps_is_one_over_rows_too(net: Any, batch: dict[str, Any]) -> None:
    def pairs(b: dict[str, Any]) -> torch.Tensor:
        hidden, mask = net.widen(b["x"].padded), b["x"].mask[:, :, None] & b["x"].mask[:, None]
        return (hidden @ hidden.transpose(1, 2))[mask].square().mean()

    assert check_step(pairs, batch).ok


def test_a_step_that_leaves_a_term_out_is_told_so(net: Any, batch: dict[str, Any]) -> None:
    def some(b: dict[str, Any]) -> dict[str, torch.Tensor]:
        loss = RIGHT["packed tagger"](net, b)
        return {"loss": loss, "other": loss} if len(b["x"]) > 1 else {"loss": loss}

    assert "must always give the same terms, got ['loss'] instead of ['loss', 'other']" in str(check_step(some, batch))
