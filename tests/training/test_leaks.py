"""Leaks between documents are found and named, right steps are not accused: `check_step` on rows of documents."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from leaking_steps import (
    HUGGING_LEAKS,
    LEAKS,
    MEETINGS,
    RIGHT,
    VOCAB,
    Case,
    Model,
    decayed,
    losses_of,
    summed,
    token_batch,
    with_mask,
)
from torch import Tensor
from torch.nn import functional as F

from collate import LengthError, VarlenBatch, VarlenCollator, check_step, masked_mean, sequence_loss
from collate.training.checking.leaks.probes import change_sets
from collate.training.checking.report import StepReport

needs_transformers = pytest.mark.usefixtures("transformers")


@pytest.fixture
def transformers() -> object:
    return pytest.importorskip("transformers")


def probes(report: StepReport) -> set[str]:
    return {finding.probe for finding in report.findings}


@pytest.mark.parametrize("name", LEAKS)
def test_a_planted_leak_is_found_in_losses_of_documents(name: str) -> None:
    case: Case = LEAKS[name]
    report = check_step(case.make(), token_batch(**dict(case.options)))
    assert probes(report) == case.probes, str(report)
    assert case.module in str(report)


@pytest.mark.parametrize("name", [name for name, case in LEAKS.items() if case.as_scalar])
def test_a_planted_leak_is_found_in_one_number(name: str) -> None:
    case: Case = LEAKS[name]
    report = check_step(summed(case.make()), token_batch(**dict(case.options)))
    assert probes(report) == case.probes, str(report)
    assert "losses of documents: the step returns one number" in str(report)


@pytest.mark.parametrize("name", HUGGING_LEAKS)
@needs_transformers
def test_a_switch_that_turns_document_masks_off_is_found(name: str) -> None:
    report = check_step(HUGGING_LEAKS[name](), token_batch())
    assert probes(report) == {"other documents"}, str(report)
    assert "attn" in str(report).split("first difference")[1].lower()


@pytest.mark.parametrize("form", ["documents", "scalar", "bfloat16", "thorough"])
@pytest.mark.parametrize("name", RIGHT)
@needs_transformers
def test_a_right_model_is_not_accused(name: str, form: str) -> None:
    module = RIGHT[name]()
    step: Callable[[VarlenBatch], Tensor] = summed(module) if form == "scalar" else module
    module = module.bfloat16() if form == "bfloat16" else module
    batch = token_batch(align=4, capacity=20) if name == "context parallelism" else token_batch()
    report = check_step(step, batch, thorough=form == "thorough")
    assert report.ok, str(report)


@pytest.mark.parametrize("name", MEETINGS)
def test_documents_that_meet_on_purpose_are_named_as_such(name: str) -> None:
    make, expected, module = MEETINGS[name]
    report = check_step(make(), token_batch())
    assert probes(report) == expected, str(report)
    [meeting] = [finding for finding in report.findings if finding.probe == "meeting"]
    assert "documents meet on purpose" in meeting.what
    assert module in meeting.what


# --- what a step may return and take


def plain(batch: VarlenBatch) -> tuple[dict[str, Tensor], Tensor]:
    """The flat tensors that another packer makes, and their offsets."""
    flat = VarlenBatch.from_sequences(batch.unsort())
    return {"tokens": flat.values, "labels": flat.next_step_labels().values}, flat.cu_seqlens


def flat_step(cu_seqlens: Tensor, *, leak: bool, form: str) -> Callable[[dict[str, Tensor]], Tensor]:
    """A tiny model on plain tensors `[1, T]`, which begins its scan again at each document or does not."""
    torch.manual_seed(0)
    embed, head = torch.nn.Embedding(VOCAB, 8), torch.nn.Linear(8, VOCAB)
    bounds = [0, int(cu_seqlens[-1])] if leak else cu_seqlens.tolist()

    def step(batch: dict[str, Tensor]) -> Tensor:
        hidden = embed(batch["tokens"])[0]
        pieces = [hidden[start:end].cumsum(0) for start, end in pairwise(bounds)]
        losses = F.cross_entropy(head(torch.cat(pieces)), batch["labels"][0], reduction="none")
        if form == "steps":
            return losses
        if form == "documents":
            return torch.stack([losses[start:end].sum() for start, end in pairwise(cu_seqlens.tolist())])
        return losses.sum() / (batch["labels"] >= 0).sum()

    return step


@pytest.mark.parametrize("form", ["steps", "documents", "scalar"])
@pytest.mark.parametrize("leak", [True, False])
def test_plain_tensors_with_offsets_are_checked_as_well(form: str, leak: bool) -> None:
    fields, cu_seqlens = plain(token_batch())
    report = check_step(flat_step(cu_seqlens, leak=leak, form=form), fields=fields, cu_seqlens=cu_seqlens)
    assert probes(report) == ({"other documents"} if leak else set()), str(report)
    assert "order: the step knows the offsets of plain tensors itself" in str(report) or leak


def test_fields_may_be_named_in_a_batch_that_holds_more() -> None:
    fields, cu_seqlens = plain(token_batch())
    step = flat_step(cu_seqlens, leak=True, form="steps")
    batch = {**fields, "position_ids": torch.arange(35)[None], "name": "a"}
    report = check_step(step, batch, fields=["tokens"], cu_seqlens=cu_seqlens.tolist())
    assert probes(report) == {"other documents"}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"fields": {"x": torch.zeros(4)}}, TypeError, "fields and cu_seqlens go together"),
        ({"cu_seqlens": [0, 4]}, TypeError, "fields and cu_seqlens go together"),
        ({"fields": ["x"], "cu_seqlens": [0, 4]}, TypeError, "give fields as a mapping of tensors, or a batch and"),
        ({"fields": {"x": torch.zeros(4)}, "cu_seqlens": [0, 3, 2]}, LengthError, "must begin at 0 and never fall"),
        ({"fields": {"x": torch.zeros(4)}, "cu_seqlens": [0, 2, 6]}, LengthError, "ends at step 6, the fields have"),
        ({"fields": {"x": torch.zeros(4)}, "cu_seqlens": [0, 4]}, LengthError, "two or more that have steps"),
        ({"fields": {"x": [1.0]}, "cu_seqlens": [0, 1]}, LengthError, "must name tensors of the batch, 'x' is list"),
    ],
)
def test_plain_tensors_that_do_not_fit_are_refused(options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        check_step(lambda batch: batch["x"], **options)


def test_results_per_step_and_several_terms_are_compared() -> None:
    module = LEAKS["shared attention sink"].make()
    batch = token_batch()

    def step(batch: VarlenBatch) -> dict[str, Tensor]:
        losses = module(batch)
        return {"right": Model()(batch), "wrong": losses, "number": losses.mean()}

    report = check_step(step, batch)
    assert probes(report) == {"other documents"}
    assert "term 'wrong'" in str(report)

    def hidden(batch: VarlenBatch) -> VarlenBatch:
        return batch.with_values(torch.stack([decayed(row) for row in module.embed(batch.values)]))

    assert probes(check_step(hidden, batch)) == {"other documents"}


@pytest.mark.parametrize("shape", [(3,), (2, 5), (7, 7, 1)])
def test_a_result_of_another_shape_says_which_are_taken(shape: tuple[int, ...]) -> None:
    if shape[0] == len(token_batch()):
        # `[N, ...]` is a result of documents.
        assert check_step(lambda batch: torch.zeros(shape), token_batch()).findings[0].probe == "dead document"
        return
    with pytest.raises(LengthError, match=r"must be per document \[7\], per step \[3, 16\], or one number, got"):
        check_step(lambda batch: torch.zeros(shape), token_batch())


def test_float_fields_are_checked_in_one_number() -> None:
    torch.manual_seed(0)
    batch = VarlenBatch.from_sequences([torch.randn(n, 4) for n in (4, 6, 3)], capacity=8)
    assert check_step(lambda b: (b.values * b.mask[..., None]).square().sum(), batch).ok
    leaks = check_step(lambda b: (b.values.cumsum(1) * b.mask[..., None]).square().sum(), batch)
    assert probes(leaks) == {"other documents"}
    assert "the gradient of field 'the batch'" in str(leaks)


def test_one_number_that_reaches_no_step_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(VOCAB, 2))
    with pytest.raises(LengthError, match="return losses per document"):
        check_step(lambda batch: (F.one_hot(batch.values, VOCAB).float() @ weight).square().sum(), token_batch())


# --- what is right all the same


def test_a_mean_over_a_count_of_contents_is_a_note_and_no_leak() -> None:
    torch.manual_seed(0)
    batch = {
        "x": VarlenBatch.from_sequences([torch.randn(n, 3) for n in (4, 6, 3)]),
        "weights": VarlenBatch.from_sequences([torch.rand(n) + 0.5 for n in (4, 6, 3)]),
    }

    def step(batch: dict[str, VarlenBatch]) -> Tensor:
        weights = batch["weights"].values
        return (batch["x"].values.square().sum(-1) * weights).sum() / weights.sum()

    report = check_step(step, batch)
    assert report.ok, str(report)
    assert "right where the loss is divided by a count of contents" in str(report)


@pytest.mark.parametrize("leak", [False, True])
def test_a_weighted_loss_in_one_number_is_no_leak_of_its_weights(leak: bool) -> None:
    """It was red: the gradient of a weight has a share of the mean, which was called a leak."""
    model = Model()
    samples = [{"x": row, "w": torch.rand(len(row)) + 0.5} for row in token_batch().unsort()]
    batch = VarlenCollator(capacity=20)(samples)

    def step(batch: dict[str, VarlenBatch]) -> Tensor:
        hidden = model.embed(batch["x"].values)
        logits = model.head(hidden.cumsum(1) if leak else hidden)
        labels = batch["x"].next_step_labels()
        per_step = torch.nn.CrossEntropyLoss(reduction="none")
        return sequence_loss(per_step, batch["x"].with_values(logits), labels, weights=batch["w"].values)

    report = check_step(step, batch)
    assert probes(report) == ({"other documents"} if leak else set()), str(report)


def follows(batch: VarlenBatch, name: str) -> Any:
    """What a collate function may put next to the tokens, made from their lengths."""
    if name == "offsets":
        return batch.cu_seqlens
    if name == "flat positions":
        return batch.position_ids.flatten()
    if name == "flex":
        return batch.block_mask(block_size=16)
    mask = batch.attention_mask()
    return mask.numpy() if name == "array" else mask


@pytest.mark.parametrize("name", ["offsets", "flat positions", "mask", "array", "flex"])
def test_what_says_where_documents_are_is_not_turned_nor_accused(name: str) -> None:
    """It was red: documents were turned, these tensors were not, and right steps were called wrong in `order`."""
    tokens = token_batch()
    model = Model()

    def step(batch: dict[str, Any]) -> Tensor:
        values, extra = batch["tokens"].values, batch["extra"]
        if name == "flat positions":
            mask = (extra.view(values.shape) == 0).cumsum(1)
            mask = (mask[:, :, None] == mask[:, None]).tril()[:, None]
        elif name == "offsets":
            ids = torch.searchsorted(extra[1:].contiguous(), torch.arange(values.numel()), right=True)
            mask = (ids.view(values.shape)[:, :, None] == ids.view(values.shape)[:, None]).tril()[:, None]
        elif name == "flex":
            mask = extra.mask_mod(torch.arange(len(values))[:, None, None], None, *_grid(values.shape[1]))[:, None]
        else:
            mask = torch.as_tensor(extra)
        hidden = model.embed(values)
        return losses_of(model.head(with_mask(model, hidden, mask)), batch["tokens"])

    report = check_step(step, {"tokens": tokens, "extra": follows(tokens, name)})
    assert report.ok, str(report)
    assert "order: 'extra' may say where documents are" in str(report)


def _grid(steps: int) -> tuple[Tensor, Tensor]:
    """Query and key steps of all pairs."""
    return torch.arange(steps)[:, None], torch.arange(steps)


def test_tensors_that_follow_documents_keep_the_probe_of_order() -> None:
    tokens = token_batch()
    model, positions = Model(), torch.nn.Embedding(64, 12)
    batch = {"tokens": tokens, "y": torch.rand(len(tokens)), "classes": torch.rand(VOCAB), "scale": torch.tensor(2.0)}

    def step(batch: dict[str, Any]) -> Tensor:
        tokens = batch["tokens"]
        hidden = model.embed(tokens.values) + positions(torch.arange(tokens.values.shape[1]))
        return losses_of(model.head(hidden), tokens) * batch["scale"]

    assert probes(check_step(step, batch)) == {"order"}


@pytest.mark.parametrize("leak", [False, True])
def test_collated_positions_are_no_contents(leak: bool) -> None:
    """It was red: other positions moved the borders that a model finds by them, and a right one was accused."""
    samples = [{"x": row, "position_ids": torch.arange(len(row))} for row in token_batch().unsort()]
    batch = VarlenCollator(capacity=20)(samples)
    model = Model()

    def step(batch: dict[str, VarlenBatch]) -> Tensor:
        jumps = F.pad(batch["position_ids"].values.diff(dim=1) != 1, (1, 0)).cumsum(1)
        mask = (jumps[:, :, None] == jumps[:, None]).tril()[:, None]
        hidden = model.embed(batch["x"].values)
        return losses_of(model.head(with_mask(model, hidden, mask | leak)), batch["x"])

    report = check_step(step, batch)
    assert probes(report) == ({"other documents"} if leak else set()), str(report)
    assert "'position_ids': it counts the steps of each document" in str(report)


def test_a_model_may_find_borders_by_tokens_that_all_documents_begin_with() -> None:
    documents = [torch.cat([torch.tensor([1]), document]) for document in token_batch().unsort()]
    batch = VarlenBatch.from_sequences(documents, capacity=20)
    model = Model()

    def step(batch: VarlenBatch) -> Tensor:
        number = (batch.values == 1).cumsum(1)
        mask = (number[:, :, None] == number[:, None]).tril()[:, None]
        hidden = model.embed(batch.values)
        return losses_of(model.head(with_mask(model, hidden, mask)), batch)

    assert check_step(step, batch).ok


def test_labels_without_loss_make_no_dead_document() -> None:
    batch = {"x": token_batch(), "labels": token_batch().next_step_labels()}
    silent = batch["labels"].values.clone()
    silent[batch["labels"].document_ids == 2] = -100
    model = Model()

    def step(batch: dict[str, VarlenBatch]) -> Tensor:
        hidden = model.embed(batch["x"].values)
        return losses_of(model.head(hidden), batch["x"], batch["labels"].values)

    assert check_step(step, {**batch, "labels": batch["labels"].with_values(silent)}).ok


def test_empty_documents_and_empty_rows_are_no_leak() -> None:
    documents = [torch.tensor([3, 4, 5]), torch.tensor([], dtype=torch.int64), torch.tensor([6, 7])]
    batch = VarlenBatch.from_sequences(documents, capacity=8, rows=2)
    assert check_step(lambda batch: RIGHT["attention by attend"]()(batch), batch).ok


def test_documents_of_one_token_can_be_changed_all_the_same() -> None:
    batch = VarlenBatch.from_sequences([torch.full((n,), 7) for n in (4, 5)])
    assert check_step(Model(), batch).ok


def test_results_in_the_order_of_the_samples_are_named() -> None:
    model = Model()
    report = check_step(lambda batch: batch.unsort(model(batch)), token_batch())
    assert "as after unsort()" in str(report)


def test_fields_of_other_lengths_and_values_of_documents_go_together() -> None:
    samples = [{"t": torch.full((n,), n), "f": torch.randn(2 * n + 1, 3), "y": n % 3} for n in (5, 3, 6, 2)]
    batch = VarlenCollator(capacity={"t": 10, "f": 20})(samples)
    torch.manual_seed(0)
    embed, linear = torch.nn.Embedding(24, 3), torch.nn.Linear(3, 3)

    def step(batch: dict[str, Any], values: Tensor) -> Tensor:
        logits = masked_mean(batch["t"].map(embed)) + masked_mean(batch["f"].with_values(values).map(linear))
        return F.cross_entropy(logits, batch["y"], reduction="none")

    assert check_step(lambda batch: step(batch, batch["f"].values), batch).ok
    assert probes(check_step(lambda batch: step(batch, batch["f"].values.cumsum(1)), batch)) == {"other documents"}


def test_fewer_than_two_documents_cannot_leak() -> None:
    with pytest.raises(LengthError, match="two or more that have steps, got"):
        check_step(Model(), VarlenBatch.from_sequences([torch.tensor([3, 4, 5])]))


# --- what single runs show


def test_thorough_runs_separate_every_pair_in_two_log_n_runs() -> None:
    for count in range(2, 20):
        sets = change_sets(range(count), thorough=True)
        assert len(sets) == 2 * math.ceil(math.log2(count))
        apart = {(one, other) for changed in sets for one in changed for other in set(range(count)) - set(changed)}
        assert apart == {(one, other) for one in range(count) for other in range(count) if one != other}


def test_a_leak_between_two_even_documents_needs_thorough_runs() -> None:
    model = Model()

    def step(batch: VarlenBatch) -> Tensor:
        losses = model(batch).clone()
        losses[2] = losses[2] + 1e-5 * losses[0].detach()
        return losses

    with torch.no_grad():
        assert check_step(lambda batch: step(batch).detach(), token_batch()).findings[0].probe == "graph"
    assert "other documents" not in probes(check_step(step, token_batch()))
    report = check_step(step, token_batch(), thorough=True)
    assert "other contents of document 0 move the result of document 2" in str(report)


def test_a_leak_of_one_bit_is_found_in_bfloat16() -> None:
    model = Model().bfloat16()

    def step(batch: VarlenBatch) -> Tensor:
        losses = model(batch)
        return losses * (1 + 2**-7 * (losses[1] > losses[0]))

    assert probes(check_step(step, token_batch())) <= {"other documents"}


def test_noise_is_measured_and_a_leak_beyond_it_is_found() -> None:
    draw = torch.Generator().manual_seed(0)

    def noisy(step: Callable[[VarlenBatch], Tensor]) -> Callable[[VarlenBatch], Tensor]:
        return lambda batch: step(batch) * (1 + 1e-6 * torch.rand(len(batch), generator=draw))

    right = check_step(noisy(Model()), token_batch())
    assert right.ok, str(right)
    assert "two runs of the same batch differ" in str(right)
    assert probes(check_step(noisy(LEAKS["scan state not reset"].make()), token_batch())) == {"other documents"}
    wild = check_step(lambda batch: Model()(batch) * torch.rand((), generator=draw), token_batch())
    assert probes(wild) == {"repeat"}


def test_a_loss_that_is_not_finite_or_trains_nothing_is_named() -> None:
    model = Model()
    assert probes(check_step(lambda batch: model(batch) / 0, token_batch())) == {"finite"}
    assert "graph" in probes(check_step(lambda batch: model(batch).detach(), token_batch()))


def test_the_check_leaves_buffers_and_random_states_as_they_were() -> None:
    module, _, _ = MEETINGS["batch norm"]
    model = module()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    check_step(model, token_batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.norm.training


def test_samples_and_a_varlen_collator_are_checked_together() -> None:
    samples = [torch.randint(3, VOCAB, (n,)) for n in (5, 3, 9, 2, 6)]
    step = summed_mean(RIGHT["scan of each document"]())
    assert check_step(step, samples=samples, collate=VarlenCollator(capacity=12)).ok
    report = check_step(
        summed_mean(LEAKS["convolution across borders"].make()), samples=samples, collate=VarlenCollator(capacity=12)
    )
    assert "other documents" in probes(report)


def summed_mean(module: torch.nn.Module) -> Callable[[VarlenBatch], Tensor]:
    return lambda batch: module(batch).mean()
