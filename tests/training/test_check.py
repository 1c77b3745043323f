"""check_step: what it takes, what it says, and what it leaves as it was."""

import random
from collections import UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from check_fixtures import batch, net, probes
from pipelines import CLASSES, MISTAKES, PER_STEP, RIGHT, Net, logits_of, tagged, targets
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from collate import (
    LengthError,
    LengthTrackedBatch,
    PadCollator,
    VarlenBatch,
    apply_rnn,
    check_step,
    masked_mean,
    sequence_loss,
)

__all__ = ["batch", "net"]


def test_nothing_is_disturbed_by_a_check(net: Net, batch: dict[str, Any]) -> None:
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


def noisy(net: Net, batch: dict[str, Any]) -> torch.Tensor:
    hidden = net.widen(batch["x"].padded)
    return tagged(net, batch, hidden + 0.1 * torch.randn_like(hidden))


def test_a_step_that_draws_noise_leaves_probes_untried_and_says_so(net: Net, batch: dict[str, Any]) -> None:
    report = check_step(lambda b: noisy(net, b), batch)
    assert report.ok
    assert "not tried: width, order and other rows: the step draws random numbers" in str(report)


def test_the_gradients_of_all_leaves_are_compared_without_being_named(net: Net, batch: dict[str, Any]) -> None:
    # A head of zeros gives one loss whatever it reads: only gradients tell.
    net.head.weight.data.zero_()
    net.head.bias.data.zero_()
    report = check_step(lambda b: F.cross_entropy(logits_of(net, b).flatten(0, 1), targets(b, 0).flatten()), batch)
    assert {"padding", "width"} <= {finding.probe for finding in report.findings}


def test_a_report_reads_like_one(net: Net, batch: dict[str, Any]) -> None:
    text = str(check_step(lambda b: MISTAKES["final state over padding"][0](net, b), batch))
    assert text.startswith("the step breaks ")
    assert "padding: the padding of x moves the loss or its gradients by" in text
    assert str(check_step(lambda b: RIGHT["packed tagger"](net, b), batch)).startswith("the step respects the lengths")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.ones(2)}, "holds no LengthTrackedBatch"),
        (LengthTrackedBatch(torch.ones(2, 3), [3, 3]), "no padding|has padding"),
    ],
)
def test_a_batch_with_nothing_to_check_is_refused(
    batch: LengthTrackedBatch | dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(LengthError, match=message):
        check_step(lambda b: torch.tensor(0.0), batch)


def test_tuples_and_single_batches_are_checked_as_well(net: Net, batch: dict[str, Any]) -> None:
    assert check_step(lambda b: net.widen(masked_mean(b)).square().sum(), batch["x"]).ok
    report = check_step(lambda b: net.widen(b[0].padded).square().mean() + b[1].sum(), (batch["x"], torch.ones(4)))
    assert not report.ok


def test_fields_of_two_values_are_tried_with_the_other_one() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        net, samples = Net(), [{"x": torch.randint(2, (n,)), "y": torch.randint(2, (n,))} for n in (6, 4, 3, 1)]

        def right(batch: dict[str, LengthTrackedBatch], net: Net = net) -> torch.Tensor:
            hidden, _ = apply_rnn(net.gru, batch["x"].map(net.embedding))
            return sequence_loss(PER_STEP, hidden.map(net.head), batch["y"])

        assert check_step(right, PadCollator({"x": 0, "y": -100})(samples), seed=seed).ok


# --- what it takes


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
def test_every_class_of_mapping_is_taken(kind: type[Any], net: Net, batch: dict[str, Any]) -> None:
    given = kind(dict(batch))
    assert check_step(lambda b: RIGHT["packed tagger"](net, b), given).ok
    assert "padding" in probes(check_step(lambda b: MISTAKES["backward over padding"][0](net, b), given))


def test_rows_keep_their_places_and_chunks_their_first_step(net: Net) -> None:
    samples = [{"x": torch.randn(n, 6), "y": torch.randint(CLASSES, (n,))} for n in (3, 9, 8, 5)]
    batch, teacher = PadCollator({"x": 0, "y": -100})(samples), torch.rand(4)
    table = torch.randn(20, 8)

    def by_place(b: dict[str, LengthTrackedBatch]) -> torch.Tensor:
        losses = masked_mean(b["x"].map(net.widen)).square().sum(1)
        return (losses * teacher[b["x"].permutation]).sum()

    def by_position(b: dict[str, LengthTrackedBatch]) -> torch.Tensor:
        hidden = net.widen(b["x"].flat()) + table[b["x"].position_ids]
        return F.cross_entropy(net.head(hidden.relu()), b["y"].flat())

    assert check_step(by_place, batch).ok
    later = {name: field.split_steps(4)[1] for name, field in batch.items()}
    assert check_step(by_position, later).ok


def test_arrays_and_tuples_with_an_entry_per_row_go_with_the_rows(net: Net, batch: dict[str, Any]) -> None:
    given = batch | {"array": np.arange(4) % CLASSES, "tuple": (0, 1, 2, 3), "list": ["0", "1", "2", "3"]}

    def step(b: dict[str, Any]) -> torch.Tensor:
        assert [str(entry) for entry in b["tuple"]] == b["list"] == [str(entry) for entry in b["array"]]
        return F.cross_entropy(apply_rnn(net.gru, b["x"])[1][-1], torch.as_tensor(b["array"]))

    assert check_step(step, given).ok


def test_a_pair_of_columns_of_two_rows_is_no_column_of_two_entries(net: Net) -> None:
    samples = [(torch.randn(n, 6), torch.randint(CLASSES, (n,))) for n in (5, 2)]
    batch = PadCollator({"0": 0, "1": -100})(samples)
    assert check_step(lambda b: tagged(net, {"x": b[0], "y": b[1]}, net.widen(b[0].padded)), batch).ok
    assert check_step(lambda b: tagged(net, {"x": b[0], "y": b[1]}, net.widen(b[0].padded)), list(batch)).ok


def test_what_went_with_the_rows_by_its_size_alone_is_named(net: Net, batch: dict[str, Any]) -> None:
    given = batch | {"weights": torch.rand(CLASSES)}

    def weighted(b: dict[str, Any]) -> torch.Tensor | None:
        return F.cross_entropy(net.head(net.widen(b["x"].flat())), b["y"].flat(), weight=b["weights"], reduction="sum")

    report = check_step(weighted, given)
    assert "label, weights followed the rows (4 entries)" in str(report)


def test_a_complex_field_is_checked(net: Net) -> None:
    samples = [torch.randn(n, 6, dtype=torch.complex64) for n in (6, 4, 3, 2)]
    batch = LengthTrackedBatch.from_sequences(samples)
    assert check_step(lambda b: net.widen(b.flat().abs()).square().sum(), batch).ok
    assert "padding" in probes(check_step(lambda b: net.widen(b.padded.abs()).square().sum(), batch))


# --- several losses


def test_each_term_of_a_mapping_is_checked_by_itself(net: Net, batch: dict[str, Any]) -> None:
    hidden = {"tags": "packed tagger", "label": "final state"}
    report = check_step(lambda b: {term: RIGHT[name](net, b) for term, name in hidden.items()}, batch)
    assert report.ok, report
    wrong = check_step(
        lambda b: {"tags": RIGHT["packed tagger"](net, b), "label": MISTAKES["last column"][0](net, b)}, batch
    )
    assert all("the term 'label'" in finding.what for finding in wrong.findings if finding.probe != "other rows")
    assert "another term 'label'" in str(wrong)


def test_two_means_in_one_loss_are_told_to_be_returned_as_terms(net: Net, batch: dict[str, Any]) -> None:
    report = check_step(lambda b: RIGHT["packed tagger"](net, b) + RIGHT["final state"](net, b), batch)
    [finding] = report.findings
    assert finding.probe == "other rows"
    assert any("return them as a mapping" in mistake for mistake in finding.likely)


def test_a_small_term_is_not_held_to_more_than_rounding(net: Net, batch: dict[str, Any]) -> None:
    assert check_step(
        lambda b: {"loss": RIGHT["packed tagger"](net, b), "tiny": 1e-12 * RIGHT["a sum"](net, b)}, batch
    ).ok


# --- runs under equal conditions


def plain(net: Net, batch: dict[str, Any]) -> torch.Tensor:
    return tagged(net, batch, net.widen(batch["x"].padded))


@pytest.mark.parametrize(
    "cut", [lambda x: x.detach(), lambda x: torch.tensor(x.item()), lambda x: x.argmax() * 1.0], ids=["d", "i", "a"]
)
def test_a_loss_without_a_graph_is_found(cut: Callable[..., Any], net: Net, batch: dict[str, Any]) -> None:
    """Red before: gradients of nothing agree with gradients of nothing."""
    report = check_step(lambda b: cut(plain(net, b)), batch)
    assert "graph" in probes(report)
    assert "graph: the loss has no graph, so that no gradient flows" in str(report)
    with torch.no_grad():
        assert "torch.no_grad()" in str(check_step(lambda b: plain(net, b), batch))


def test_a_term_without_a_graph_is_noted_and_one_of_frozen_weights_is_not(net: Net, batch: dict[str, Any]) -> None:
    """Red before."""
    report = check_step(lambda b: {"tags": plain(net, b), "error": plain(net, b).detach()}, batch)
    assert report.ok, report
    assert "gradients of term 'error': it has no graph" in str(report)
    net.requires_grad_(False)
    assert check_step(lambda b: plain(net, b), batch).ok


def test_random_numbers_of_python_and_numpy_are_seeded_and_given_back(net: Net, batch: dict[str, Any]) -> None:
    def sampled(b: dict[str, Any]) -> torch.Tensor:
        scale = 1 + (random.random() < 0.5) + np.random.rand() + np.random.randn()  # noqa: NPY002
        return RIGHT["packed tagger"](net, b) * scale

    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    np.random.randn()  # noqa: NPY002 - a second normal number waits
    expected = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    report = check_step(sampled, batch)
    assert report.ok, report
    assert (random.getstate(), str(np.random.get_state())) == expected  # noqa: NPY002
    assert "draws random numbers" in str(report)


def test_a_step_that_remembers_is_told_so_and_nothing_else(net: Net, batch: dict[str, Any]) -> None:
    calls = []

    def counted(b: dict[str, Any]) -> torch.Tensor:
        calls.append(b)
        return RIGHT["packed tagger"](net, b) * (1 + 0.1 * len(calls))

    report = check_step(counted, batch)
    assert probes(report) == {"repeat"}
    assert "the step remembers" in str(report)


def test_buffers_of_modules_that_run_are_given_back_without_being_named(net: Net, batch: dict[str, Any]) -> None:
    norm = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
    net.norm(torch.randn(3, 8))
    before = {name: value.clone() for module in (norm, net) for name, value in module.state_dict().items()}
    assert check_step(lambda b: tagged(net, b, norm(b["x"].padded)), batch).ok
    check_step(lambda b: MISTAKES["batch norm over padding"][0](net, b), batch)
    after = {name: value for module in (norm, net) for name, value in module.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_step_may_write_to_its_batch(net: Net, batch: dict[str, Any]) -> None:
    """Red before: the second run got what the first had left, and the user's batch was changed."""

    def writes(b: dict[str, Any]) -> torch.Tensor:
        b["x"].padded.mul_(0.5).sub_(0.1)
        b["label"] += 1
        b["label"] %= CLASSES
        state = apply_rnn(net.gru, b["x"])[1][-1]
        return F.cross_entropy(net.head(state), b["label"])

    before = {name: getattr(batch[name], "padded", batch[name]).clone() for name in ("x", "label")}
    assert check_step(writes, batch).ok
    for name, values in before.items():
        assert torch.equal(getattr(batch[name], "padded", batch[name]), values)


def test_a_step_may_write_to_a_batch_of_documents() -> None:
    """Red before: the check said that the step remembers, and the user's batch was changed."""
    batch = VarlenBatch.from_sequences([torch.randn(length, 3) for length in (3, 5, 4)])
    layer = nn.Linear(3, 1)

    def writes(b: VarlenBatch) -> torch.Tensor:
        b.values.mul_(0.5).sub_(0.1)
        return (layer(b.values).squeeze(-1) * (b.document_ids >= 0)).square().sum()

    before = batch.values.clone()
    assert check_step(writes, batch).ok
    assert torch.equal(batch.values, before)


def test_weights_that_a_step_moves_are_put_back(net: Net, batch: dict[str, Any]) -> None:
    """Red before: a teacher that follows its student was told to remember, and kept what the check had made of it."""
    teacher = Net()

    def follows(b: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            target = apply_rnn(teacher.gru, b["x"])[1][-1]
            for weight, other in zip(teacher.gru.parameters(), net.gru.parameters(), strict=True):
                weight.data = weight.data * 0.9 + other.data * 0.1 + 0.01
        return (apply_rnn(net.gru, b["x"])[1][-1] - target).square().mean(1).sum()

    def trains(b: dict[str, Any]) -> torch.Tensor:
        loss = RIGHT["packed tagger"](net, b)
        with torch.no_grad():
            for weight in net.parameters():
                weight.sub_(0.01)
        return loss

    before = [weight.detach().clone() for weight in (*net.parameters(), *teacher.parameters())]
    assert check_step(follows, batch).ok
    with pytest.raises(LengthError, match="must not move an optimizer: return the loss before that"):
        check_step(trains, batch, module=net)
    for weight, value in zip((*net.parameters(), *teacher.parameters()), before, strict=True):
        assert torch.equal(weight, value)


def test_a_buffer_that_is_replaced_is_put_back(net: Net, batch: dict[str, Any]) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps = self.steps + 1
            return x * self.steps

    counter = Counter()
    kept = counter.steps
    assert check_step(lambda b: tagged(net, b, counter(net.widen(b["x"].padded))), batch).ok
    assert counter.steps is kept
    assert kept == 0


def test_dropout_is_off_where_layers_are_computed_again(net: Net, batch: dict[str, Any]) -> None:
    def again(b: dict[str, Any]) -> torch.Tensor:
        hidden = checkpoint(net.encoder, net.widen(b["x"].padded), None, ~b["x"].mask, use_reentrant=False)
        return tagged(net, b, net.drop(hidden))

    assert check_step(again, batch).ok


def test_reentrant_checkpoints_are_refused_with_a_way_out(net: Net, batch: dict[str, Any]) -> None:
    def again(b: dict[str, Any]) -> torch.Tensor:
        hidden = checkpoint(net.encoder, net.widen(b["x"].padded), None, ~b["x"].mask, use_reentrant=True)
        return tagged(net, b, hidden)

    with pytest.raises(LengthError, match="Pass use_reentrant=False"):
        check_step(again, batch)


def test_sparse_gradients_are_compared(net: Net, batch: dict[str, Any]) -> None:
    embedding = nn.Embedding(CLASSES, 8, sparse=True)
    assert check_step(lambda b: tagged(net, b, embedding(b["ids"].padded)), batch).ok
    wrong = check_step(lambda b: net.head(embedding(b["ids"].padded)).square().sum(), batch)
    assert {"padding", "width"} <= probes(wrong)


def test_values_are_such_as_the_loss_allows(net: Net) -> None:
    samples = [{"x": torch.randn(n, 6), "p": torch.rand(n)} for n in (6, 4, 3, 2)]
    batch = PadCollator()(samples)

    def chance(b: dict[str, LengthTrackedBatch]) -> torch.Tensor:
        guess = torch.sigmoid(net.score(net.widen(b["x"].padded)))[..., 0]
        return F.binary_cross_entropy(guess[b["x"].mask], b["p"].padded[b["p"].mask])

    assert check_step(chance, batch).ok


def test_what_a_step_raises_on_another_last_step_is_noted(net: Net, batch: dict[str, Any]) -> None:
    def strict(b: dict[str, Any]) -> torch.Tensor | None:
        if bool(
            (b["ids"].padded[b["ids"].mask] != batch["ids"].padded[batch["ids"].mask][: b["ids"].num_tokens]).any()
        ):
            raise RuntimeError("all texts must end with the same token")
        return RIGHT["packed tagger"](net, b)

    report = check_step(strict, batch)
    assert "dead step of ids: with other values the step raises all texts must end" in str(report)


def test_a_table_of_positions_as_long_as_the_batch_is_no_mistake(net: Net, batch: dict[str, Any]) -> None:
    table = nn.Parameter(torch.randn(7, 8))
    report = check_step(lambda b: tagged(net, b, net.widen(b["x"].padded) + table[: b["x"].padded.shape[1]]), batch)
    assert report.ok, report
    ends = check_step(
        lambda b: tagged(net, b, net.widen(b["x"].padded) + table[: b["x"].padded.shape[1]].flip(0)), batch
    )
    assert "width" in probes(ends)


def test_a_field_of_one_number_is_not_accused(net: Net, batch: dict[str, Any]) -> None:
    kinds = LengthTrackedBatch.from_sequences([torch.zeros(n, dtype=torch.int64) for n in (7, 5, 3, 2)])
    embedding = nn.Embedding(1, 8)
    report = check_step(
        lambda b: tagged(net, b, net.widen(b["x"].padded) + embedding(b["kinds"].padded)), batch | {"kinds": kinds}
    )
    assert report.ok, report
    assert "kinds holds the same number everywhere" in str(report)


def test_the_name_of_the_probe_in_release_0_1_is_equal_with_a_warning(net: Net, batch: dict[str, Any]) -> None:
    [finding] = [
        each
        for each in check_step(lambda b: MISTAKES["batch norm over padding"][0](net, b), batch).findings
        if each.probe == "other rows"
    ]
    with pytest.warns(DeprecationWarning, match='"company" is now "other rows"'):
        assert finding.probe == "company"
    assert finding.probe != "order"
