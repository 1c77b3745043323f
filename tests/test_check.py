"""check_step: what it takes, what it says, and what it leaves as it was."""

import random
from collections import UserDict
from types import MappingProxyType

import numpy as np
import pytest
import torch
from pipelines import CLASSES, MISTAKES, PER_STEP, RIGHT, Net, batch_on, classify, logits_of, tagged, targets
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from collate import LengthError, LengthTrackedBatch, PadCollator, apply_rnn, check_step, masked_mean, sequence_loss


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batch():
    return batch_on("cpu")


def probes(report):
    return {finding.probe for finding in report.findings}


def test_nothing_is_disturbed_by_a_check(net, batch):
    net.norm(torch.randn(3, 8))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    net.head.weight.grad = torch.ones_like(net.head.weight)
    check_step(lambda b: MISTAKES["batch norm over padding"][0](net, b), batch, module=net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert net.drop.training
    assert net.attention.dropout == 0.1


def noisy(net, batch):
    hidden = net.widen(batch["x"].padded)
    return tagged(net, batch, hidden + 0.1 * torch.randn_like(hidden))


def test_a_step_that_draws_noise_leaves_probes_untried_and_says_so(net, batch):
    report = check_step(lambda b: noisy(net, b), batch)
    assert report.ok
    assert "not tried: width, order and company: the step draws random numbers" in str(report)


def test_the_gradients_of_all_leaves_are_compared_without_being_named(net, batch):
    # Unpacked padding reaches the head as a constant: the loss of a symmetric head stays where it is.
    report = check_step(lambda b: net.head(net.gru(b["x"].padded)[0]).sum() * 0 + net.head.weight.sum(), batch)
    assert report.ok
    net.head.weight.data.zero_()
    net.head.bias.data.zero_()
    report = check_step(lambda b: F.cross_entropy(logits_of(net, b).flatten(0, 1), targets(b, 0).flatten()), batch)
    assert {"padding", "width"} <= {finding.probe for finding in report.findings}


def test_a_report_reads_like_one(net, batch):
    text = str(check_step(lambda b: MISTAKES["final state over padding"][0](net, b), batch))
    assert text.startswith("the step breaks ")
    assert "padding: the padding of x moves the loss or its gradients by" in text
    assert str(check_step(lambda b: RIGHT["packed tagger"](net, b), batch)).startswith(
        "the step respects the lengths"
    )


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.ones(2)}, "holds no LengthTrackedBatch"),
        (LengthTrackedBatch(torch.ones(2, 3), [3, 3]), "no padding|has padding"),
    ],
)
def test_a_batch_with_nothing_to_check_is_refused(batch, message):
    with pytest.raises(LengthError, match=message):
        check_step(lambda b: torch.tensor(0.0), batch)


def test_tuples_and_single_batches_are_checked_as_well(net, batch):
    assert check_step(lambda b: net.widen(masked_mean(b)).square().sum(), batch["x"]).ok
    report = check_step(lambda b: net.widen(b[0].padded).square().mean() + b[1].sum(), (batch["x"], torch.ones(4)))
    assert not report.ok


def test_fields_of_two_values_are_tried_with_the_other_one():
    for seed in range(20):
        torch.manual_seed(seed)
        net, samples = Net(), [{"x": torch.randint(2, (n,)), "y": torch.randint(2, (n,))} for n in (6, 4, 3, 1)]

        def right(batch, net=net):
            hidden, _ = apply_rnn(net.gru, batch["x"].map(net.embedding))
            return sequence_loss(PER_STEP, hidden.map(net.head), batch["y"])

        assert check_step(right, PadCollator({"x": 0, "y": -100})(samples), seed=seed).ok
