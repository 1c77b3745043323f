"""The laws of rows with several documents: each is compared with one document at a time."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from collate import (
    LengthError,
    LengthTrackedBatch,
    VarlenBatch,
    apply_rnn,
    last_step,
    masked_mean,
    sequence_loss,
    token_scale,
)
from collate.varlen.segment_sums import sum_segments

ALIGNS = st.sampled_from([1, 1, 2, 8])


@st.composite
def options_for(draw: Any, longest: Any) -> Any:
    """Options under which documents of up to `longest` steps fit."""
    align = draw(ALIGNS)
    least = max(-(-longest // align) * align, align)
    capacity = draw(st.sampled_from([None, least, least + align, 3 * least]))
    arrange = draw(st.sampled_from(["best-fit", "given"]))
    return {"align": align, "capacity": capacity, "arrange": arrange}


@st.composite
def packed(draw: Any, dtypes: Any = None) -> Any:
    """Documents, and the batch that they are put into."""
    documents = draw(strategies.sequences(dtypes))
    options = draw(options_for(max(map(len, documents))))
    value = 0 if documents[0].dtype == torch.bool else 1
    return documents, VarlenBatch.from_sequences(documents, padding_value=value, **options)


@st.composite
def floats(draw: Any, dtype: Any = torch.float64, features: Any = (3,)) -> Any:
    """Documents of random floats `[L_i, *features]`, and options."""
    counts = draw(strategies.lengths(6, 7))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    documents = [torch.randn(n, *features, generator=rng, dtype=dtype) for n in counts]
    return documents, draw(options_for(max(counts)))


def slow_rows(batch: Any) -> Any:
    """Where each step belongs, found by walking over the rows: (document, position) of every step, None in gaps."""
    rows, capacity = batch.values.shape[:2]
    cells = [[None] * capacity for _ in range(rows)]
    document = 0
    for row, count in enumerate(batch.documents_per_row.tolist()):
        step = 0
        for _ in range(count):
            while step % batch.align:
                step += 1
            for position in range(int(batch.lengths[document])):
                cells[row][step] = (document, position)
                step += 1
            document += 1
    return cells


def slow_segments(cells: Any) -> Any:
    """Bounds of runs of steps of one document, or of none, row by row."""
    bounds = []
    for number, row in enumerate(cells):
        for step, cell in enumerate(row):
            owner = None if cell is None else cell[0]
            before = None if step == 0 or row[step - 1] is None else row[step - 1][0]
            if step == 0 or owner != before:
                bounds.append(number * len(row) + step)
    return bounds


@given(packed())
def test_every_step_is_where_a_walk_over_the_rows_finds_it(case: Any) -> None:
    documents, batch = case
    cells = slow_rows(batch)
    ids = [[-1 if cell is None else cell[0] for cell in row] for row in cells]
    positions = [[0 if cell is None else cell[1] for cell in row] for row in cells]
    assert batch.document_ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    assert batch.mask.tolist() == [[cell is not None for cell in row] for row in cells]
    assert (batch.document_ids.dtype, batch.position_ids.dtype) == (torch.int32, torch.int64)
    for row, cells_of_row in enumerate(cells):
        for step, cell in enumerate(cells_of_row):
            value = batch.values[row, step]
            if cell is None:
                assert (value == batch.padding_value).all()
            else:
                assert torch.equal(value, documents[batch.permutation[cell[0]]][cell[1]])


@given(packed())
def test_agreement_order_and_conservation(case: Any) -> None:
    documents, batch = case
    assert batch.mask.sum() == batch.lengths.sum() == batch.num_tokens == sum(map(len, documents))
    assert sorted(batch.permutation.tolist()) == list(range(len(documents)))
    assert batch.documents_per_row.sum() == len(batch) == len(documents)
    for ours, theirs in zip(batch.unsort(), documents, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(batch.flat(), torch.cat(batch.sequences()))
    assert batch.longest == max(map(len, documents)) <= batch.max_seqlen == batch.values.shape[1]
    batch.verify()


@given(packed(), st.data())
def test_any_permutation_leads_back_to_the_source_order(case: Any, data: st.DataObject) -> None:
    _, batch = case
    permutation = data.draw(st.permutations(range(len(batch))))
    other = VarlenBatch(batch.values, batch.lengths, batch.documents_per_row, permutation, align=batch.align)
    results = [None] * len(batch)
    for document, sample in enumerate(permutation):
        results[sample] = document
    assert other.unsort(torch.arange(len(batch))).tolist() == other.unsort(list(range(len(batch)))) == results
    assert other.unsort(torch.arange(len(batch))[None], dim=1).tolist() == [results]


@given(packed(), st.integers(0, 3))
def test_bounds_are_those_of_runs_and_slots_are_fixed(case: Any, spare: Any) -> None:
    _, batch = case
    most = int(batch.documents_per_row.max()) + spare
    rows = batch.values.shape[0]
    fixed = VarlenBatch(
        batch.values, batch.lengths, batch.documents_per_row, align=batch.align, max_documents=max(most, 1)
    )
    slots = rows * (max(most, 1) + 1 if batch.align == 1 else 2 * max(most, 1))
    total = batch.mask.numel()
    for bounds in (fixed.cu_seqlens, fixed.cu_seqlens_padded, fixed.cu_seqlens_real):
        assert bounds.shape == (slots + 1,)
        assert bounds.dtype == torch.int32
        assert (bounds.diff() >= 0).all()
    # Empty documents are segments without steps, and the gap before one is another than the gap behind it.
    empty = set(batch.spans.starts()[batch.lengths.numpy() == 0].tolist())
    assert set(fixed.cu_seqlens.tolist()) == {*slow_segments(slow_rows(batch)), *empty, total}
    used = (fixed.cu_seqlens.diff() > 0).sum() + (batch.lengths == 0).sum()
    assert (fixed.cu_seqlens[used + 1 :] == total).all()


@given(packed())
def test_padded_offsets_hold_documents_and_their_alignment(case: Any) -> None:
    _, batch = case
    padded, real = batch.cu_seqlens_padded.tolist(), batch.cu_seqlens_real.tolist()
    cells = [cell for row in slow_rows(batch) for cell in row]
    lengths = []
    for start, stop, first, last in zip(padded, padded[1:], real, real[1:], strict=False):
        owned = [cell for cell in cells[start:stop] if cell is not None]
        assert len(owned) == last - first
        assert len({cell[0] for cell in owned}) <= 1
        lengths += [last - first] if owned else []
    assert lengths == [n for n in batch.lengths.tolist() if n]
    assert padded[-1] == len(cells)
    assert all(bound % batch.align == 0 for bound in padded)


@given(packed())
def test_to_padded_and_back_is_the_same_bit_for_bit(case: Any) -> None:
    documents, batch = case
    padded = batch.to_padded()
    for ours, theirs in zip(padded.unsort().sequences(), documents, strict=True):
        assert torch.equal(ours, theirs)
    again = padded.to_varlen(
        capacity=batch.values.shape[1], align=batch.align, documents_per_row=batch.documents_per_row
    )
    assert torch.equal(again.values, batch.values)
    assert torch.equal(again.offsets.table, batch.offsets.table)
    assert again.permutation.tolist() == batch.permutation.tolist()


@given(strategies.sequences(), st.data())
def test_a_padded_batch_to_varlen_and_back_is_the_same(sequences: Any, data: Any) -> None:
    batch = LengthTrackedBatch.from_sequences(sequences)
    options = data.draw(options_for(int(batch.lengths.max())))
    back = batch.to_varlen(**options).to_padded(widths=[batch.padded.shape[1]])
    if options["arrange"] == "given":
        assert torch.equal(back.padded, batch.padded)
        assert torch.equal(back.lengths, batch.lengths)
    assert torch.equal(back.unsort().padded, batch.unsort().padded)


@given(floats(), st.booleans())
def test_gradients_flow_there_and_back_to_real_steps_alone(case: Any, there_and_back: Any) -> None:
    documents, options = case
    documents = [document.requires_grad_() for document in documents]
    batch = VarlenBatch.from_sequences(documents, padding_value=float("nan"), **options)
    if there_and_back:
        batch = batch.to_padded().to_varlen(**options)
    (batch.flat() * 2).sum().backward()
    for document in documents:
        assert (document.grad == 2).all() if len(document) else document.grad.numel() == 0


@given(floats(), st.integers(1, 3))
def test_pieces_join_to_the_whole(case: Any, rows: Any) -> None:
    documents, options = case
    batch = VarlenBatch.from_sequences(documents, **options)
    parts = batch.split_rows(rows)
    assert [len(part.documents_per_row) <= rows for part in parts] == [True] * len(parts)
    whole = VarlenBatch.concat(parts)
    assert torch.equal(whole.values, batch.values)
    assert torch.equal(whole.cu_seqlens, batch.cu_seqlens) or batch.max_documents is None
    for name in ("lengths", "documents_per_row", "permutation", "document_ids", "position_ids"):
        assert torch.equal(getattr(whole, name), getattr(batch, name))


@given(packed([torch.int64, torch.int32]))
def test_labels_are_the_next_steps_of_the_same_document(case: Any) -> None:
    _, batch = case
    labels = batch.next_step_labels()
    for document, shifted in zip(batch.sequences(), labels.sequences(), strict=True):
        if len(document):
            assert torch.equal(shifted[:-1], document[1:])
            assert (shifted[-1] == -100).all()
    assert (labels.values[~labels.mask] == -100).all()


class OneByOne:
    """What losses are, computed for one document after the other."""

    def __init__(self, batch: Any, documents: Any, targets: Any, weights: Any = None) -> None:
        self.sums, self.counts = [], []
        for index in batch.permutation.tolist():
            losses = F.cross_entropy(documents[index], targets[index], reduction="none")
            weight = (targets[index] != -100).to(losses.dtype)
            if weights is not None:
                weight = weight * weights[index]
            self.sums.append((losses * weight).sum())
            self.counts.append(weight.sum())

    def reduced(self, reduction: Any) -> Any:
        total, count = sum(self.sums), sum(self.counts)
        if reduction == "sum":
            return total
        if reduction == "token":
            return total / count if count else total
        means = [s / c for s, c in zip(self.sums, self.counts, strict=True) if c]
        return sum(means) / len(means) if means else total


@pytest.mark.parametrize("reduction", ["token", "sequence", "sum"])
@given(case=floats(), weighted=st.sampled_from([None, None, "steps", "documents"]), next_step=st.booleans())
def test_losses_equal_one_document_at_a_time(case: Any, reduction: Any, weighted: Any, next_step: Any) -> None:
    documents, options = case
    documents = [document.requires_grad_() for document in documents]
    rng = np.random.default_rng(0)
    tokens = [torch.from_numpy(rng.integers(0, 3, len(document))) for document in documents]
    output = VarlenBatch.from_sequences(documents, **options)
    target = VarlenBatch.from_sequences(tokens, **options)
    targets = tokens
    if next_step:
        target = target.next_step_labels()
        targets = [torch.cat([t[1:], torch.tensor([-100])])[: len(t)] for t in tokens]
    weights, by_document = None, None
    if weighted == "documents":
        by_document = torch.from_numpy(rng.integers(0, 3, len(documents))).double()
        weights = by_document[output.permutation]
    elif weighted == "steps":
        by_document = [torch.from_numpy(rng.integers(0, 3, len(document))).double() for document in documents]
        weights = VarlenBatch.from_sequences(by_document, padding_value=9, **options).values
    loss = sequence_loss(nn.CrossEntropyLoss(reduction="none"), output, target, weights=weights, reduction=reduction)
    expected = OneByOne(output, documents, targets, by_document).reduced(reduction)
    torch.testing.assert_close(loss, expected.detach(), check_dtype=False)
    if isinstance(expected, torch.Tensor) and expected.requires_grad:
        ours = torch.autograd.grad(loss, documents, retain_graph=True)
        theirs = torch.autograd.grad(expected, documents, allow_unused=True)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other)


@given(floats())
def test_means_and_last_steps_equal_one_document_at_a_time(case: Any) -> None:
    documents, options = case
    batch = VarlenBatch.from_sequences(documents, padding_value=float("nan"), **options)
    zero = torch.zeros(3, dtype=torch.float64)
    means, lasts = batch.unsort(masked_mean(batch)), batch.unsort(last_step(batch))
    for document, mean, last in zip(documents, means, lasts, strict=True):
        torch.testing.assert_close(mean, document.mean(0) if len(document) else zero)
        assert torch.equal(last, document[-1] if len(document) else zero)
    assert token_scale(batch) == token_scale(sum(map(len, documents)))


@given(floats(), st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]), st.booleans(), st.integers(1, 2))
def test_a_recurrent_module_equals_one_document_at_a_time(
    case: Any, kind: Any, bidirectional: Any, layers: Any
) -> None:
    documents, options = case
    documents = [document.requires_grad_() for document in documents]
    torch.manual_seed(0)
    rnn = kind(3, 2, num_layers=layers, bidirectional=bidirectional, batch_first=True, dtype=torch.float64)
    batch = VarlenBatch.from_sequences(documents, padding_value=float("nan"), **options)
    outputs, state = apply_rnn(rnn, batch)
    state = state if isinstance(state, tuple) else (state,)
    assert outputs.values.shape[:2] == batch.values.shape[:2]
    assert (outputs.values[~outputs.mask] == 0).all()
    ours = batch.unsort(outputs.sequences())
    ends = [batch.unsort(part, dim=1) for part in state]
    for index, document in enumerate(documents):
        if not len(document):
            assert all((end[:, index] == 0).all() for end in ends)
            continue
        expected, final = rnn(document[None])
        torch.testing.assert_close(ours[index], expected[0])
        for end, part in zip(ends, final if isinstance(final, tuple) else (final,), strict=True):
            torch.testing.assert_close(end[:, index], part[:, 0])
        (grad,) = torch.autograd.grad(ours[index].square().sum(), document, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected.square().sum(), document)
        torch.testing.assert_close(grad, theirs)


@given(floats(), st.sampled_from([nn.GRU, nn.LSTM]), st.integers(1, 5))
def test_chunks_of_rows_that_carry_states_equal_the_whole(case: Any, kind: Any, steps: Any) -> None:
    documents, options = case
    rnn = kind(3, 2, dtype=torch.float64)
    batch = VarlenBatch.from_sequences(documents, **options)
    whole, end = apply_rnn(rnn, batch)
    state, outputs = None, []
    chunks = batch.split_steps(steps * batch.align)
    for chunk in chunks:
        output, state = apply_rnn(rnn, chunk, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat([output.values for output in outputs], 1), whole.values)
    for ours, theirs in zip(state if kind is nn.LSTM else (state,), end if kind is nn.LSTM else (end,), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(torch.cat([chunk.position_ids for chunk in chunks], 1), batch.position_ids)
    assert torch.equal(torch.cat([chunk.document_ids for chunk in chunks], 1), batch.document_ids)


@given(floats(torch.float32), st.integers(0, 5))
def test_what_a_document_holds_changes_no_other_by_one_bit(case: Any, which: Any) -> None:
    documents, options = case
    torch.manual_seed(0)
    model = nn.GRU(3, 4)

    def run(contents: Any) -> Any:
        leaves = [content.clone().requires_grad_() for content in contents]
        batch = VarlenBatch.from_sequences(leaves, **options)
        hidden, _ = apply_rnn(model, batch)
        mean = masked_mean(hidden)
        grads = torch.autograd.grad(mean.square().sum(), leaves)
        return batch.unsort(hidden.sequences()), batch.unsort(mean), batch.unsort(last_step(hidden)), grads

    which %= len(documents)
    changed = [document * 3 + 1 if index == which else document for index, document in enumerate(documents)]
    for before, after in zip(run(documents), run(changed), strict=True):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            assert index == which or torch.equal(one, other)


@given(floats(), st.integers(1, 3), st.integers(0, 2))
def test_ranks_of_a_context_share_every_step_once_with_equal_work(case: Any, size: Any, spare: Any) -> None:
    documents, _ = case
    align = 2 * size
    longest = max(map(len, documents))
    capacity = (-(-max(longest, 1) // align) + spare) * align
    batch = VarlenBatch.from_sequences(documents, capacity=capacity, align=align)
    parts = [batch.context_parallel(rank, size) for rank in range(size)]
    indices = torch.cat([part.index.flatten() for part in parts])
    assert sorted(indices.tolist()) == list(range(batch.mask.numel()))
    assert torch.equal(parts[0].join(parts, [part.take(batch.values) for part in parts]), batch.values)
    bounds = batch.cu_seqlens_padded.tolist()
    for start, stop in pairwise(bounds):
        # Pairs under a causal mask, where alignment is counted as steps: a document by itself is even.
        work = [sum(int(p) - start + 1 for p in part.index.flatten() if start <= p < stop) for part in parts]
        assert len(set(work)) == 1
        for rank, part in enumerate(parts):
            piece = (stop - start) // (2 * size)
            head = list(range(start + rank * piece, start + (rank + 1) * piece))
            tail = list(range(stop - (rank + 1) * piece, stop - rank * piece))
            local = part.index.flatten()[start // size : stop // size].tolist()
            assert local == head + tail
        assert all(int(part.cu_seqlens_padded[bounds.index(start)]) == start // size for part in parts)


@given(floats(), st.integers(1, 3))
def test_any_split_of_the_rows_gives_the_gradient_of_the_whole(case: Any, rows: Any) -> None:
    documents, options = case
    model = nn.Linear(3, 3, dtype=torch.float64)
    rng = np.random.default_rng(0)
    tokens = [torch.from_numpy(rng.integers(0, 3, len(document))) for document in documents]
    output = VarlenBatch.from_sequences(documents, **options)
    target = VarlenBatch.from_sequences(tokens, **options).next_step_labels()
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    whole = sequence_loss(loss_fn, output.map(model), target)
    parts = zip(output.split_rows(rows), target.split_rows(rows), strict=True)
    split = sum(sequence_loss(loss_fn, part.map(model), labels, reduction="sum") for part, labels in parts)
    ours = torch.autograd.grad(split * token_scale(target), model.parameters())
    for mine, other in zip(ours, torch.autograd.grad(whole, model.parameters()), strict=True):
        torch.testing.assert_close(mine, other)


# Torch's own, when it loads its forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@given(strategies.lengths(5, 4))
def test_sums_of_segments_have_all_derivatives_and_are_mapped(lengths: Any) -> None:
    cu_seqlens = torch.tensor(np.append(0, np.cumsum(lengths)), dtype=torch.int32)
    steps = torch.randn(int(cu_seqlens[-1]), 2, dtype=torch.float64, requires_grad=True)

    def sums(values: Any) -> Any:
        return sum_segments(values, cu_seqlens)

    slow = torch.stack([part.sum(0) for part in steps.split(lengths)])
    torch.testing.assert_close(sums(steps), slow)
    if steps.numel():
        assert torch.autograd.gradcheck(sums, steps, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(sums, steps)
        mapped = torch.func.vmap(sums)(torch.stack([steps, 2 * steps]).detach())
        torch.testing.assert_close(mapped, torch.stack([slow, 2 * slow]))


def test_rows_that_are_all_empty_keep_parameters_in_the_graph() -> None:
    rnn = nn.GRU(3, 2)
    batch = VarlenBatch.from_sequences([torch.zeros(0, 3), torch.zeros(0, 3)], capacity=4)
    outputs, state = apply_rnn(rnn, batch)
    assert outputs.values.shape == (1, 4, 2)
    assert state.shape == (1, 2, 2)
    outputs.values.sum().backward()
    assert all(weight.grad is not None for weight in rnn.parameters())


def test_bidirectional_modules_are_not_carried_over_chunks() -> None:
    batch = VarlenBatch.from_sequences([torch.zeros(5, 3), torch.zeros(2, 3)])
    first, second, _ = batch.split_steps(3)
    rnn = nn.GRU(3, 2, bidirectional=True)
    _, state = apply_rnn(rnn, first)
    with pytest.raises(LengthError, match="cannot be carried over chunks: the chunk at step 3"):
        apply_rnn(rnn, second, state)
