"""apply_rnn: law 4, a row runs as if it were alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import lengths
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from collate import LengthError, LengthTrackedBatch, apply_rnn
from collate.blocks import run_blocks

# torch says once that its fastest LSTM has no projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

MODULES = [
    pytest.param(
        kind, {"num_layers": layers, "bidirectional": both, **more}, id=f"{kind.__name__}-{layers}-{both}-{more}"
    )
    for kind, layers, both in itertools.product((nn.RNN, nn.GRU, nn.LSTM), (1, 2), (False, True))
    for more in ([{}, {"proj_size": 2}] if kind is nn.LSTM else [{}])
]


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def pick(state, row):
    """One row's state, in the structure that the module takes."""
    picked = tuple(part[:, row : row + 1] for part in parts(state))
    return picked if isinstance(state, tuple) else picked[0]


def initial(rnn, rows):
    """Random states for `rows` rows, float64."""
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    h = torch.randn(layers, rows, rnn.proj_size or rnn.hidden_size, dtype=torch.float64)
    return (h, torch.randn(layers, rows, rnn.hidden_size, dtype=torch.float64)) if rnn.mode == "LSTM" else h


def grads(rnn, loss, sequences):
    leaves = [*rnn.parameters(), *sequences]
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def one_at_a_time(rnn, sequences, hx):
    """The oracle: torch's module on each sequence by itself; an empty one keeps its state."""
    outputs, states, loss = [], [], sum(0 * weight.sum() for weight in rnn.parameters())
    for row, sequence in enumerate(sequences):
        state = pick(hx, row)
        if len(sequence):
            output, state = rnn(sequence[None] if rnn.batch_first else sequence[:, None], state)
            outputs.append(output.squeeze(0 if rnn.batch_first else 1))
        else:
            outputs.append(None)
        states.append(state)
        loss = loss + sum((part**2).sum() for part in parts(state))
        loss = loss + ((outputs[-1] ** 2).sum() if len(sequence) else 0)
    return outputs, states, loss


@pytest.mark.parametrize(("kind", "options"), MODULES)
@settings(max_examples=15)
@given(counts=lengths(max_rows=5, longest=6), batch_first=st.booleans(), seed=st.integers(0, 2**31))
def test_batched_outputs_states_losses_and_gradients_equal_those_of_one_at_a_time(
    kind, options, counts, batch_first, seed
):
    torch.manual_seed(seed)
    rnn = kind(3, 4, batch_first=batch_first, **options).double()
    sequences = [torch.randn(count, 3, dtype=torch.float64, requires_grad=True) for count in counts]
    hx = initial(rnn, len(counts))

    batch = LengthTrackedBatch.from_sequences(sequences, widths=4)
    in_batch_order = tuple(part[:, batch.permutation] for part in parts(hx))
    output, state = apply_rnn(rnn, batch, in_batch_order if isinstance(hx, tuple) else in_batch_order[0])
    loss = (output.padded**2).sum() + sum((part**2).sum() for part in parts(state))

    outputs, states, expected_loss = one_at_a_time(rnn, sequences, hx)
    torch.testing.assert_close(loss, expected_loss)
    for row, sequence in enumerate(output.unsort().sequences()):
        if len(sequence):
            torch.testing.assert_close(sequence, outputs[row])
    for part, ours in enumerate(parts(state)):
        expected = torch.cat([parts(alone)[part] for alone in states], 1)
        torch.testing.assert_close(batch.unsort(ours, dim=1), expected)
    assert not output.padded[~output.mask].any()
    for ours, alone in zip(grads(rnn, loss, sequences), grads(rnn, expected_loss, sequences), strict=True):
        torch.testing.assert_close(ours, alone)


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_with_and_without_gradients_the_numbers_are_the_same(kind, options):
    rnn = kind(3, 4, **options).double()
    batch = LengthTrackedBatch.from_sequences([torch.randn(count, 3).double() for count in (4, 0, 7, 4)], order="given")
    output, state = apply_rnn(rnn, batch)
    with torch.no_grad():
        again, state_again = apply_rnn(rnn, batch)
    torch.testing.assert_close(output.padded, again.padded)
    for one, other in zip(parts(state), parts(state_again), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@settings(max_examples=20)
@given(counts=lengths(max_rows=5, longest=6), steps=st.integers(1, 5))
def test_chunks_chained_by_their_states_equal_the_whole(kind, counts, steps):
    rnn = kind(2, 3, num_layers=2).double()
    batch = LengthTrackedBatch.from_sequences([torch.randn(count, 2, dtype=torch.float64) for count in counts])
    whole, final = apply_rnn(rnn, batch)
    state, outputs = None, []
    for chunk in batch.split_steps(steps):
        output, state = apply_rnn(rnn, chunk, state)
        outputs.append(output.padded)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.padded)
    for ours, expected in zip(parts(state), parts(final), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_backward_direction_is_not_carried_over_chunks():
    rnn = nn.GRU(2, 3, bidirectional=True)
    first, second = LengthTrackedBatch.from_sequences([torch.randn(4, 2)]).split_steps(2)
    _, state = apply_rnn(rnn, first)
    with pytest.raises(LengthError, match="bidirectional module cannot be carried over chunks: the chunk at step 2"):
        apply_rnn(rnn, second, state)


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_rows_that_are_all_empty_stay_connected_to_every_parameter(kind, options):
    rnn = kind(3, 4, **options)
    batch = LengthTrackedBatch.from_sequences([torch.zeros(0, 3), torch.zeros(0, 3)])
    output, state = apply_rnn(rnn, batch)
    some, _ = apply_rnn(rnn, LengthTrackedBatch.from_sequences([torch.zeros(1, 3), torch.zeros(1, 3)]))
    assert output.padded.shape == some.padded.shape
    (output.padded.sum() + sum(part.sum() for part in parts(state))).backward()
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in rnn.parameters())


def test_an_all_empty_batch_keeps_the_states_it_was_given():
    rnn = nn.LSTM(3, 4)
    hx = (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    _, state = apply_rnn(rnn, LengthTrackedBatch.from_sequences([torch.zeros(0, 3)] * 2), hx)
    assert all(torch.equal(a, b) for a, b in zip(state, hx, strict=True))


def test_padding_of_nan_reaches_neither_outputs_nor_gradients():
    rnn = nn.LSTM(2, 3, bidirectional=True)
    padded = torch.randn(2, 5, 2).masked_fill(~torch.tensor([[[1]] * 5, [[1]] * 3 + [[0]] * 2]).bool(), torch.nan)
    padded.requires_grad_()
    output, (h, c) = apply_rnn(rnn, LengthTrackedBatch(padded, [5, 3]))
    (output.padded.sum() + h.sum() + c.sum()).backward()
    assert output.padded.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in rnn.parameters())
    assert not padded.grad[1, 3:].any()


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 4)])
def test_states_of_another_number_of_rows_are_refused(shape):
    with pytest.raises(ValueError, match=r"hx must be \[layers \* directions, 2, H\]"):
        apply_rnn(nn.GRU(3, 4), LengthTrackedBatch.from_sequences([torch.zeros(1, 3)] * 2), torch.zeros(shape))


@pytest.mark.parametrize(("kind", "options"), MODULES)
@settings(max_examples=10)
@given(counts=lengths(max_rows=6, longest=6), seed=st.integers(0, 2**31))
def test_blocks_do_what_the_packed_module_does(kind, options, counts, seed):
    torch.manual_seed(seed)
    rnn = kind(3, 4, **options).double()
    batch = LengthTrackedBatch.from_sequences([torch.randn(count, 3).double() for count in (*counts, 1)], order="given")
    packed = batch.pack()
    rows = int(packed.batch_sizes[0])
    hx = initial(rnn, rows)
    (ours, state), (theirs, expected) = run_blocks(rnn, packed, hx), rnn(packed, hx)
    torch.testing.assert_close(ours.data, theirs.data)
    for one, other in zip(parts(state), parts(expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_dropout_lies_between_layers_and_only_in_training(kind, both):
    # All is dropped, so that what remains is no accident.
    rnn = kind(3, 4, num_layers=2, dropout=1.0, bidirectional=both).double()
    sequences = [torch.randn(count, 3).double() for count in (4, 0, 2)]
    for _ in range(2):
        output, _ = apply_rnn(rnn, LengthTrackedBatch.from_sequences(sequences))
        outputs, _, _ = one_at_a_time(rnn, sequences, initial_zeros(rnn, 3))
        for ours, expected in zip(output.unsort().sequences(), outputs, strict=True):
            torch.testing.assert_close(ours, ours[:0] if expected is None else expected)
        rnn.eval()


def initial_zeros(rnn, rows):
    hx = initial(rnn, rows)
    return tuple(torch.zeros_like(part) for part in hx) if isinstance(hx, tuple) else torch.zeros_like(hx)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_as_it_does_in_torch(kind, dtype, both):
    rnn = kind(3, 4, num_layers=2, bidirectional=both).to(dtype)
    batch = LengthTrackedBatch.from_sequences([torch.randn(count, 3) for count in (4, 7, 1)]).to(dtype)
    theirs, expected = rnn(batch.pack())
    output, state = apply_rnn(rnn, batch)
    near = {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(output.padded, batch.unpack(theirs).padded, **near)
    for one, other in zip(parts(state), parts(expected), strict=True):
        torch.testing.assert_close(one, other, **near)
    (output.padded.sum() + sum(part.sum() for part in parts(state))).backward()
    assert all(weight.grad.dtype == dtype for weight in rnn.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_under_autocast_rows_run_as_they_do_alone(kind, dtype):
    rnn = kind(3, 4, num_layers=2).to(dtype)
    sequences = [torch.randn(count, 3).to(dtype) for count in (4, 0, 2)]
    batch = LengthTrackedBatch.from_sequences(sequences, order="given")
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = apply_rnn(rnn, batch)
        alone = [rnn(sequence[:, None])[0][:, 0] for sequence in sequences if len(sequence)]
        output.padded.float().sum().backward()
    for ours, expected in zip([output.sequences()[0], output.sequences()[2]], alone, strict=True):
        torch.testing.assert_close(ours.float(), expected.float(), atol=0.02, rtol=0.02)
    assert all(weight.grad.dtype == dtype for weight in rnn.parameters())


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_run_can_be_differentiated_twice(kind, both):
    rnn = kind(2, 2, bidirectional=both).double()
    rows = [torch.randn(count, 2, dtype=torch.float64, requires_grad=True) for count in (2, 1, 3)]

    def through(*leaves):
        output, state = apply_rnn(rnn, LengthTrackedBatch.from_sequences(leaves, order="given"))
        return output.padded, *parts(state)

    assert torch.autograd.gradgradcheck(through, rows)


class Stack(nn.Module):
    """A module of a user's own: two LSTMs with a normalisation between them; the state is flattened."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LSTM(3, 4), nn.LSTM(4, 5, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, packed, hx=None):
        hx = hx or (None,) * 4
        packed, first = self.first(packed, hx[:2] if hx[0] is not None else None)
        packed, second = self.second(
            packed._replace(data=self.norm(packed.data)), hx[2:] if hx[2] is not None else None
        )
        return packed, (*first, *second)


@settings(max_examples=20)
@given(counts=lengths(max_rows=5, longest=6), steps=st.integers(1, 5))
def test_modules_of_ones_own_run_row_by_row_and_in_chunks(counts, steps):
    stack = Stack().double()
    sequences = [torch.randn(count, 3).double() for count in counts]
    batch = LengthTrackedBatch.from_sequences(sequences, order="given")
    output, state = apply_rnn(stack, batch)
    for row, sequence in enumerate(sequences):
        if len(sequence):
            packed, alone = stack(LengthTrackedBatch.from_sequences([sequence]).pack())
            torch.testing.assert_close(output.sequences()[row], packed.data)
            assert all(torch.allclose(part[:, row], other[:, 0]) for part, other in zip(state, alone, strict=True))
        else:
            assert not any(part[:, row].any() for part in state)
    carried = None
    for chunk in batch.split_steps(steps):
        _, carried = apply_rnn(stack, chunk, carried)
    assert all(torch.allclose(part, other) for part, other in zip(carried, state, strict=True))


def test_a_module_of_ones_own_stays_connected_when_all_rows_are_empty():
    stack = Stack()
    output, state = apply_rnn(stack, LengthTrackedBatch.from_sequences([torch.zeros(0, 3)] * 2))
    assert output.padded.shape == (2, 1, 5)
    assert [part.shape for part in state] == [(1, 2, 4), (1, 2, 4), (1, 2, 5), (1, 2, 5)]
    output.padded.sum().backward()
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in stack.parameters())


def test_a_module_that_returns_something_else_is_refused():
    class Bare(nn.GRU):
        def forward(self, packed, hx=None):
            return super().forward(packed, hx)[0]

    with pytest.raises(TypeError, match="Bare must take a PackedSequence and return a PackedSequence and a state, got"):
        apply_rnn(Bare(3, 4), LengthTrackedBatch.from_sequences([torch.zeros(2, 3)]))


def test_hooks_of_a_module_are_called():
    rnn, seen = nn.LSTM(3, 4), []
    rnn.register_forward_hook(lambda module, inputs, result: seen.append(type(inputs[0])))
    apply_rnn(rnn, LengthTrackedBatch.from_sequences([torch.zeros(2, 3)]))
    assert seen == [PackedSequence]
