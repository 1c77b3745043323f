"""Run a recurrent module on a batch: each row as if it were alone."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from collate.batch import LengthTrackedBatch
from collate.errors import LengthError
from collate.packing import to_device

State: TypeAlias = Tensor | tuple[Tensor, Tensor]


def apply_rnn(rnn: nn.RNNBase, batch: LengthTrackedBatch, hx: State | None = None) -> tuple[LengthTrackedBatch, State]:
    """Run `nn.RNN`, `nn.GRU` or `nn.LSTM` over the real steps of every row.

    Args:
        rnn: the module, `batch_first` or not: batches are `[B, T, ...]` either way.
        batch: values `[B, T, input_size]`.
        hx: initial states `[layers * directions, B, H]` in batch order (for an LSTM a pair of them), on the batch's
            device; None starts from zeros.

    Returns:
        Outputs `[B, T, directions * H]`, tracked like the batch, with 0 in the padding; and the final state of each row
        in batch order, taken at the row's own last step (backward directions: first step). An empty row has no outputs
        and keeps its `hx`, so that the chunks of `split_steps`, chained by their states, equal the whole. Outputs stay
        connected to the parameters even if every row is empty, so that distributed training does not hang.

    Raises:
        LengthError: A backward direction is to go on from the state of an earlier chunk: it has yet to see later steps.
        ValueError: `hx` does not hold one state per row.
    """
    if rnn.bidirectional and hx is not None and batch.first_step:
        raise LengthError(
            f"a bidirectional module cannot be carried over chunks: the chunk at step {batch.first_step} would start "
            "its backward direction from a state that has not seen the steps after it. Run the whole batch at once"
        )
    _check_state(hx, len(batch))
    lengths = batch.lengths.numpy()
    if not lengths.any():
        return _run_nothing(rnn, batch, hx)
    # A packed batch holds the rows that are not empty, and wants a state for just these.
    rows = None if lengths.all() else to_device(np.flatnonzero(lengths), batch.device)
    packed, start = batch.pack(), _each(hx, lambda part: part if rows is None else part.index_select(1, rows))
    packed, state = _run_blocks(rnn, packed, start) if _is_faster_in_blocks(rnn, packed) else rnn(packed, start)
    return batch.unpack(packed), state if rows is None else _put(state, rows, hx, len(batch))


def _check_state(hx: State | None, rows: int) -> None:
    for part in () if hx is None else hx if isinstance(hx, tuple) else (hx,):
        if part.dim() != 3 or part.shape[1] != rows:
            raise ValueError(f"hx must be [layers * directions, {rows}, H], one state per row, got {list(part.shape)}")


def _each(state: State | None, change: Callable[[Tensor], Tensor]) -> State | None:
    """Change a state that may be absent, or a pair."""
    if isinstance(state, tuple):
        return change(state[0]), change(state[1])
    return None if state is None else change(state)


def _put(state: State, rows: Tensor, hx: State | None, size: int) -> State:
    """Put the running rows' final states between the initial ones of the rows that are empty."""
    if isinstance(state, tuple):
        h, c = (None, None) if hx is None else hx
        return _put_part(state[0], rows, h, size), _put_part(state[1], rows, c, size)
    return _put_part(state, rows, cast("Tensor | None", hx), size)


def _put_part(part: Tensor, rows: Tensor, hx: Tensor | None, size: int) -> Tensor:
    kept = part.new_zeros(part.shape[0], size, part.shape[2]) if hx is None else hx.to(part.dtype)
    return kept.index_copy(1, rows, part)


def _is_faster_in_blocks(rnn: nn.RNNBase, packed: PackedSequence) -> bool:
    # The CPU's packed kernels slice all steps once per step, and differentiating that is quadratic in T: blocks train 1.1
    # to 7 times (GRU) and 2 to 30 times (LSTM) as fast. Without gradients only the LSTM gains, through oneDNN. cuDNN
    # takes packed batches well.
    return packed.data.is_cpu and not rnn.bidirectional and (rnn.mode == "LSTM" or torch.is_grad_enabled())


def _run_blocks(rnn: nn.RNNBase, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
    """Run a packed batch from row end to row end.

    Between two ends the number of rows is constant, so that the packed steps are a dense block `[steps, rows, F]` just
    as they lie. The states of rows that end are set aside.
    """
    sizes, steps = torch.unique_consecutive(packed.batch_sizes, return_counts=True)
    state = _reordered(hx, packed.sorted_indices)
    outputs: list[Tensor] = []
    ended: list[State] = []
    blocks = packed.data.split((sizes * steps).tolist())
    for block, rows, count in zip(blocks, sizes.tolist(), steps.tolist(), strict=True):
        if outputs:
            running, done = slice(None, rows), slice(rows, None)
            ended.append(cast(State, _each(state, partial(_rows_of, rows=done))))
            state = _each(state, partial(_rows_of, rows=running))
        output, state = _run_block(rnn, block.view(count, rows, -1), state)
        outputs.append(output.flatten(0, 1))
    final = _reordered(_joined([cast(State, state), *ended[::-1]]), packed.unsorted_indices)
    return packed._replace(data=torch.cat(outputs)), cast(State, final)


def _run_block(rnn: nn.RNNBase, block: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Run the module on `[steps, rows, F]`, whatever axis order it wants."""
    if not rnn.batch_first:
        return cast("tuple[Tensor, State]", rnn(block, state))
    output, state = rnn(block.transpose(0, 1), state)
    return output.transpose(0, 1), cast(State, state)


def _rows_of(part: Tensor, rows: slice) -> Tensor:
    return part[:, rows]


def _reordered(state: State | None, order: Tensor | None) -> State | None:
    return state if order is None else _each(state, lambda part: part.index_select(1, order))


def _joined(states: list[State]) -> State:
    if isinstance(states[0], tuple):
        h, c = zip(*states, strict=True)
        return torch.cat(h, 1), torch.cat(c, 1)
    return torch.cat(cast("list[Tensor]", states), 1)


def _run_nothing(rnn: nn.RNNBase, batch: LengthTrackedBatch, hx: State | None) -> tuple[LengthTrackedBatch, State]:
    # Zero, but a zero that has every weight in its graph; no value is read, so that NaN weights do not matter.
    anchor = torch.stack([weight.flatten()[:0].sum() for weight in rnn.parameters()]).sum()
    directions = 2 if rnn.bidirectional else 1
    width, layers = rnn.proj_size or rnn.hidden_size, rnn.num_layers * directions
    zeros = anchor.expand(len(batch), batch.padded.shape[1], directions * width).clone()
    outputs = batch.trusted(
        zeros, batch.lengths, batch.mask, batch.permutation, padding_value=0, first_step=batch.first_step
    )
    if hx is None:
        h = anchor.expand(layers, len(batch), width).clone()
        hx = (h, anchor.expand(layers, len(batch), rnn.hidden_size).clone()) if rnn.mode == "LSTM" else h
    return outputs, hx
