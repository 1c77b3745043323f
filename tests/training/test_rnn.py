"""apply_rnn: law 4, a row runs as if it were alone."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import lengths
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from collate import LengthError, LengthTrackedBatch, apply_rnn
from collate.training.cpu_rnn import run_segments

# torch says once that its fastest LSTM has no projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

MODULES = [
    pytest.param(
        kind, {"num_layers": layers, "bidirectional": both, **more}, id=f"{kind.__name__}-{layers}-{both}-{more}"
    )
    for kind, layers, both in itertools.product((nn.RNN, nn.GRU, nn.LSTM), (1, 2), (False, True))
    for more in ([{}, {"proj_size": 2}] if kind is nn.LSTM else [{}])
]


def parts(state: Any) -> Any:
    return state if isinstance(state, tuple) else (state,)


def pick(state: Any, row: Any) -> Any:
    """One row's state, in the structure that the module takes."""
    picked = tuple(part[:, row : row + 1] for part in parts(state))
    return picked if isinstance(state, tuple) else picked[0]


def initial(rnn: Any, rows: int) -> Any:
    """Random states for `rows` rows, float64."""
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    h = torch.randn(layers, rows, rnn.proj_size or rnn.hidden_size, dtype=torch.float64)
    return (h, torch.randn(layers, rows, rnn.hidden_size, dtype=torch.float64)) if rnn.mode == "LSTM" else h


def grads(rnn: Any, loss: Any, sequences: Any) -> Any:
    leaves = [*rnn.parameters(), *sequences]
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def one_at_a_time(rnn: Any, sequences: Any, hx: Any) -> Any:
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
def test_a_batch_s_results_equal_those_of_one_sequence_at_a_time(
    kind: type[Any], options: dict[str, bool | int], counts: Any, batch_first: Any, seed: int
) -> None:
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
def test_with_and_without_gradients_the_numbers_are_the_same(kind: type[Any], options: dict[str, bool | int]) -> None:
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
def test_chunks_chained_by_their_states_equal_the_whole(kind: type[Any], counts: Any, steps: Any) -> None:
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


def test_a_backward_direction_is_not_carried_over_chunks() -> None:
    rnn = nn.GRU(2, 3, bidirectional=True)
    first, second = LengthTrackedBatch.from_sequences([torch.randn(4, 2)]).split_steps(2)
    _, state = apply_rnn(rnn, first)
    with pytest.raises(LengthError, match="bidirectional module cannot be carried over chunks: the chunk at step 2"):
        apply_rnn(rnn, second, state)


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_rows_that_are_all_empty_stay_connected_to_every_parameter(
    kind: type[Any], options: dict[str, bool | int]
) -> None:
    rnn = kind(3, 4, **options)
    batch = LengthTrackedBatch.from_sequences([torch.zeros(0, 3), torch.zeros(0, 3)])
    output, state = apply_rnn(rnn, batch)
    some, _ = apply_rnn(rnn, LengthTrackedBatch.from_sequences([torch.zeros(1, 3), torch.zeros(1, 3)]))
    assert output.padded.shape == some.padded.shape
    (output.padded.sum() + sum(part.sum() for part in parts(state))).backward()
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in rnn.parameters())


def test_an_all_empty_batch_keeps_the_states_it_was_given() -> None:
    rnn = nn.LSTM(3, 4)
    hx = (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    _, state = apply_rnn(rnn, LengthTrackedBatch.from_sequences([torch.zeros(0, 3)] * 2), hx)
    assert all(torch.equal(a, b) for a, b in zip(state, hx, strict=True))


def test_padding_of_nan_reaches_neither_outputs_nor_gradients() -> None:
    rnn = nn.LSTM(2, 3, bidirectional=True)
    padded = torch.randn(2, 5, 2).masked_fill(~torch.tensor([[[1]] * 5, [[1]] * 3 + [[0]] * 2]).bool(), torch.nan)
    padded.requires_grad_()
    output, (h, c) = apply_rnn(rnn, LengthTrackedBatch(padded, [5, 3]))
    (output.padded.sum() + h.sum() + c.sum()).backward()
    assert output.padded.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in rnn.parameters())
    assert not padded.grad[1, 3:].any()


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 4)])
def test_states_of_another_number_of_rows_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hx must be \[layers \* directions, 2, H\]"):
        apply_rnn(nn.GRU(3, 4), LengthTrackedBatch.from_sequences([torch.zeros(1, 3)] * 2), torch.zeros(shape))


@pytest.mark.parametrize(("kind", "options"), MODULES)
@settings(max_examples=10)
@given(counts=lengths(max_rows=6, longest=6), seed=st.integers(0, 2**31))
def test_blocks_do_what_the_packed_module_does(
    kind: type[Any], options: dict[str, bool | int], counts: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    rnn = kind(3, 4, **options).double()
    batch = LengthTrackedBatch.from_sequences([torch.randn(count, 3).double() for count in (*counts, 1)], order="given")
    packed = batch.pack()
    rows = int(packed.batch_sizes[0])
    hx = initial(rnn, rows)
    (ours, state), (theirs, expected) = run_segments(rnn, packed, hx), rnn(packed, hx)
    torch.testing.assert_close(ours.data, theirs.data)
    for one, other in zip(parts(state), parts(expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_dropout_lies_between_layers_and_only_in_training(kind: type[Any], both: bool) -> None:
    # All is dropped, so that what remains is no accident.
    rnn = kind(3, 4, num_layers=2, dropout=1.0, bidirectional=both).double()
    sequences = [torch.randn(count, 3).double() for count in (4, 0, 2)]
    for _ in range(2):
        output, _ = apply_rnn(rnn, LengthTrackedBatch.from_sequences(sequences))
        outputs, _, _ = one_at_a_time(rnn, sequences, initial_zeros(rnn, 3))
        for ours, expected in zip(output.unsort().sequences(), outputs, strict=True):
            torch.testing.assert_close(ours, ours[:0] if expected is None else expected)
        rnn.eval()


def initial_zeros(rnn: Any, rows: int) -> Any:
    hx = initial(rnn, rows)
    return tuple(torch.zeros_like(part) for part in hx) if isinstance(hx, tuple) else torch.zeros_like(hx)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_as_it_does_in_torch(kind: type[Any], dtype: torch.dtype, both: bool) -> None:
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
def test_under_autocast_rows_run_as_they_do_alone(kind: type[Any], dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_under_autocast_to_float16_it_gives_what_the_module_gives(kind: type[Any]) -> None:
    """Red before with an LSTM, where the processor has no float16: oneDNN could not create its primitive."""
    rnn, batch = kind(3, 4), LengthTrackedBatch.from_sequences([torch.randn(count, 3) for count in (4, 2)])
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(apply_rnn(rnn, batch)[0].pack().data, rnn(batch.pack())[0].data)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_it_runs_on_the_meta_device(kind: type[Any]) -> None:
    """Red before: torch does not say whether autocast is on there."""
    rnn = kind(3, 4).to("meta")
    batch = LengthTrackedBatch.from_sequences([torch.randn(count, 3) for count in (4, 0, 2)]).to("meta")
    assert apply_rnn(rnn, batch)[0].padded.shape == (3, 4, 4)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_run_can_be_differentiated_twice(kind: type[Any], both: bool) -> None:
    rnn = kind(2, 2, bidirectional=both).double()
    rows = [torch.randn(count, 2, dtype=torch.float64, requires_grad=True) for count in (2, 1, 3)]

    def through(*leaves: Any) -> Any:
        output, state = apply_rnn(rnn, LengthTrackedBatch.from_sequences(leaves, order="given"))
        return output.padded, *parts(state)

    assert torch.autograd.gradgradcheck(through, rows)


class Stack(nn.Module):
    """A module of a user's own: two LSTMs with a normalisation between them; the state is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(3, 4), nn.LSTM(4, 5, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, packed: Any, hx: Any = None) -> Any:
        hx = hx or (None,) * 4
        packed, first = self.first(packed, hx[:2] if hx[0] is not None else None)
        packed, second = self.second(
            packed._replace(data=self.norm(packed.data)), hx[2:] if hx[2] is not None else None
        )
        return packed, (*first, *second)


@settings(max_examples=20)
@given(counts=lengths(max_rows=5, longest=6), steps=st.integers(1, 5))
def test_modules_of_ones_own_run_row_by_row_and_in_chunks(counts: Any, steps: Any) -> None:
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


def test_a_module_of_ones_own_stays_connected_when_all_rows_are_empty() -> None:
    stack = Stack()
    output, state = apply_rnn(stack, LengthTrackedBatch.from_sequences([torch.zeros(0, 3)] * 2))
    assert output.padded.shape == (2, 1, 5)
    assert [part.shape for part in state] == [(1, 2, 4), (1, 2, 4), (1, 2, 5), (1, 2, 5)]
    output.padded.sum().backward()
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in stack.parameters())


def test_a_module_that_returns_something_else_is_refused() -> None:
    class Bare(nn.GRU):
        def forward(self, packed: Any, hx: Any = None) -> Any:
            return super().forward(packed, hx)[0]

    with pytest.raises(TypeError, match="Bare must take a PackedSequence and return a PackedSequence and a state, got"):
        apply_rnn(Bare(3, 4), LengthTrackedBatch.from_sequences([torch.zeros(2, 3)]))


def test_hooks_of_a_module_are_called() -> None:
    rnn, seen = nn.LSTM(3, 4), []
    rnn.register_forward_hook(lambda module, inputs, result: seen.append(type(inputs[0])))
    apply_rnn(rnn, LengthTrackedBatch.from_sequences([torch.zeros(2, 3)]))
    assert seen == [PackedSequence]


# --- what torch's module refuses is refused, and what was put in front of it is called


def shapes_of_states(rnn: Any, rows: int) -> Any:
    """The shapes of a state that fits."""
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    h = (layers, rows, rnn.proj_size or rnn.hidden_size)
    return (h, (layers, rows, rnn.hidden_size)) if rnn.mode == "LSTM" else (h,)


DTYPES = st.sampled_from([torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16, torch.int64])


@st.composite
def awkward_runs(draw: Any) -> Any:
    """A module, a batch and a state, each of which may be a little wrong."""
    kind = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
    options = {"num_layers": draw(st.integers(1, 2)), "bidirectional": draw(st.booleans()), "bias": draw(st.booleans())}
    options |= {"proj_size": draw(st.sampled_from([0, 2]))} if kind is nn.LSTM else {}
    rnn = kind(3, 4, batch_first=draw(st.booleans()), **options).to(
        draw(st.sampled_from([torch.float32, torch.float64]))
    )
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any))
    features = draw(st.sampled_from([(3,), (3,), (3,), (2,), (5,), (300,), (), (1, 3), (3, 1)]))
    batch = LengthTrackedBatch(torch.randn(len(counts), 4, *features).to(draw(DTYPES)), counts)
    return rnn, batch, draw(awkward_states(rnn, len(counts)))


@st.composite
def awkward_states(draw: Any, rnn: Any, rows: int) -> Any:
    if draw(st.booleans()):
        return None
    shapes = [list(shape) for shape in shapes_of_states(rnn, rows)]
    for shape in shapes:
        axis, change = draw(st.integers(0, 2)), draw(st.sampled_from([0, 0, 0, 1, -1]))
        shape[axis] = max(shape[axis] + change, 0)
    shapes = draw(st.sampled_from([shapes, shapes, shapes, shapes[:1], [*shapes, shapes[0]]]))
    device = draw(st.sampled_from(["cpu", "cpu", "cpu", "meta"]))
    state = tuple(torch.zeros(shape, dtype=draw(DTYPES), device=device) for shape in shapes)
    return state if rnn.mode == "LSTM" and draw(st.integers(0, 3)) else draw(st.sampled_from([state[0], state]))


def outcome(run: Any) -> Any:
    """What a run gives, or the error that it raises."""
    try:
        result, state = run()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
        return error
    return result, state


@settings(max_examples=300)
@given(awkward_runs(), st.booleans())
def test_a_run_is_refused_exactly_where_torch_s_module_refuses_it(case: Any, with_gradients: Any) -> None:
    """Red before: kernels were called with inputs and states of any size, and wrote beyond their memory."""
    rnn, batch, hx = case
    filled = batch.lengths.nonzero()[:, 0]

    def by_torch() -> Any:
        for part in () if hx is None else parts(hx):
            # One state per row, empty ones too, is what we ask for ourselves.
            if part.dim() != 3 or part.shape[1] != len(batch):
                raise ValueError(part.shape)
            # oneDNN takes another dtype's memory for its own.
            assert part.dtype == batch.padded.dtype
        # Packed sequences of one length are not checked by torch's LSTM, padded blocks are.
        rnn(batch.padded if rnn.batch_first else batch.padded.transpose(0, 1), hx)
        state = hx if hx is None or len(filled) == len(batch) else tuple(part[:, filled] for part in parts(hx))
        return rnn(batch.pack(), state if state is hx or isinstance(hx, tuple) else state[0])

    with torch.set_grad_enabled(with_gradients):
        ours, theirs = outcome(lambda: apply_rnn(rnn, batch, hx)), outcome(by_torch)
    assert isinstance(ours, Exception) == isinstance(theirs, Exception), (ours, theirs)
    if not isinstance(ours, Exception):
        torch.testing.assert_close(ours[0].pack().data, theirs[0].data, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_an_all_empty_batch_of_other_features_is_refused_too(kind: type[Any], with_gradients: bool) -> None:
    batch = LengthTrackedBatch(torch.zeros(2, 3, 5), [0, 0])
    with torch.set_grad_enabled(with_gradients), pytest.raises(RuntimeError, match="Expected 3, got 5"):
        apply_rnn(kind(3, 4), batch)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_weights_that_were_replaced_by_others_of_another_size_are_refused(kind: type[Any]) -> None:
    rnn = kind(3, 4)
    rnn.weight_ih_l0 = nn.Parameter(torch.zeros_like(rnn.weight_ih_l0)[:, :2].contiguous())
    with pytest.raises(RuntimeError):
        apply_rnn(rnn, LengthTrackedBatch.from_sequences([torch.randn(3, 3)]))


def wrapped(rnn: Any, calls: Any) -> Any:
    """As accelerate's hooks and many tracers do: another `forward` on the instance."""
    run = rnn.forward
    rnn.forward = lambda *inputs: calls.append("instance") or run(*inputs)
    return lambda: None


def with_patched_class(rnn: Any, calls: Any) -> Any:
    run = type(rnn).forward
    type(rnn).forward = lambda self, *inputs: calls.append("class") or run(self, *inputs)
    return lambda: setattr(type(rnn), "forward", run)


def with_patched_call(rnn: Any, calls: Any) -> Any:
    run = rnn._call_impl
    rnn._call_impl = lambda *inputs: calls.append("call") or run(*inputs)
    return lambda: None


def with_compiled_call(rnn: Any, calls: Any) -> Any:
    run = rnn._call_impl
    rnn._compiled_call_impl = lambda *inputs: calls.append("compiled") or run(*inputs)
    return lambda: None


def with_hook(name: str) -> Any:
    def register(rnn: Any, calls: Any) -> Any:
        return getattr(rnn, name)(lambda *inputs: calls.append(name) and None).remove

    return register


def with_global_hook(name: str) -> Any:
    def register(rnn: Any, calls: Any) -> Any:
        return getattr(nn.modules.module, name)(lambda *inputs: calls.append(name) and None).remove

    return register


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize(
    "intercept",
    [
        pytest.param(wrapped, id="forward"),
        pytest.param(with_patched_class, id="class"),
        pytest.param(with_patched_call, id="call"),
        pytest.param(with_compiled_call, id="compiled"),
        *[pytest.param(with_hook(name), id=name) for name in ("register_forward_hook", "register_forward_pre_hook")],
        *[
            pytest.param(with_global_hook(name), id=name)
            for name in ("register_module_forward_hook", "register_module_forward_pre_hook")
        ],
    ],
)
def test_whatever_was_put_in_front_of_a_module_is_called(kind: type[Any], intercept: Callable[..., Any]) -> None:
    """Red before for all but the instance's own hooks: kernels were run with the module's weights."""
    rnn, calls = kind(3, 4), []
    batch = LengthTrackedBatch.from_sequences([torch.randn(n, 3) for n in (3, 2)])
    expected = apply_rnn(rnn, batch)[0].padded
    undo = intercept(rnn, calls)
    try:
        output, _ = apply_rnn(rnn, batch)
    finally:
        undo()
    assert len(calls) == 1
    torch.testing.assert_close(output.padded, expected)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_subclass_with_a_forward_of_its_own_is_called(kind: type[Any]) -> None:
    class Negated(kind):
        def forward(self, packed: Any, hx: Any = None) -> Any:
            packed, state = super().forward(packed, hx)
            return packed._replace(data=-packed.data), state

    rnn, batch = Negated(3, 4), LengthTrackedBatch.from_sequences([torch.randn(n, 3) for n in (3, 2)])
    plain = kind(3, 4)
    plain.load_state_dict(rnn.state_dict())
    torch.testing.assert_close(apply_rnn(rnn, batch)[0].padded, -apply_rnn(plain, batch)[0].padded)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["full_backward_hook", "full_backward_pre_hook"])
def test_backward_hooks_are_called_where_torch_calls_them(name: str, whole: bool) -> None:
    def run(call: Any) -> Any:
        rnn, calls = nn.GRU(3, 4), []

        def hook(*_: Any) -> None:
            calls.append(name)

        handle = (
            getattr(nn.modules.module, f"register_module_{name}")(hook)
            if whole
            else getattr(rnn, f"register_{name}")(hook)
        )
        try:
            call(rnn).sum().backward()
        finally:
            handle.remove()
        return len(calls)

    batch = LengthTrackedBatch.from_sequences([torch.randn(n, 3) for n in (3, 2)])
    assert run(lambda rnn: apply_rnn(rnn, batch)[0].padded) == run(lambda rnn: rnn(batch.pack())[0].data)


def test_a_state_may_be_a_list_as_in_torch() -> None:
    rnn, batch = nn.LSTM(3, 4), LengthTrackedBatch.from_sequences([torch.randn(n, 3) for n in (3, 0)])
    hx = [torch.randn(1, 2, 4), torch.randn(1, 2, 4)]
    torch.testing.assert_close(apply_rnn(rnn, batch, hx)[1], apply_rnn(rnn, batch, tuple(hx))[1])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_empty_rows_stay_connected_to_what_made_inputs_and_states(kind: type[Any]) -> None:
    """Red before: an embedding got no gradient from a batch without a step, for which DDP waits forever."""
    words, rnn, begin = nn.Embedding(5, 3), kind(3, 4), nn.Parameter(torch.randn(1, 1, 4))
    batch = LengthTrackedBatch.from_sequences([torch.zeros(0, dtype=torch.int64)] * 2)
    hx = begin.expand(1, 2, 4)
    output, _ = apply_rnn(rnn, batch.map(words), (hx, hx) if kind is nn.LSTM else hx)
    output.padded.sum().backward()
    for parameter in (*words.parameters(), *rnn.parameters(), begin):
        assert parameter.grad is not None
        assert not parameter.grad.any()
