"""Run a recurrent module on a batch: each row as if it were alone."""

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from collate.batch import LengthTrackedBatch
from collate.blocks import State, each_part, is_faster_in_blocks, run_blocks
from collate.errors import LengthError
from collate.packing import to_device


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
    packed, start = batch.pack(), each_part(hx, lambda part: part if rows is None else part.index_select(1, rows))
    packed, state = run_blocks(rnn, packed, start) if is_faster_in_blocks(rnn, packed) else rnn(packed, start)
    return batch.unpack(packed), state if rows is None else _put(state, rows, hx, len(batch))


def _check_state(hx: State | None, rows: int) -> None:
    for part in () if hx is None else hx if isinstance(hx, tuple) else (hx,):
        if part.dim() != 3 or part.shape[1] != rows:
            raise ValueError(f"hx must be [layers * directions, {rows}, H], one state per row, got {list(part.shape)}")


def _put(state: State, rows: Tensor, hx: State | None, size: int) -> State:
    """Put the running rows' final states between the initial ones of the rows that are empty."""
    if isinstance(state, tuple):
        h, c = (None, None) if hx is None else hx
        return _put_part(state[0], rows, h, size), _put_part(state[1], rows, c, size)
    return _put_part(state, rows, cast("Tensor | None", hx), size)


def _put_part(part: Tensor, rows: Tensor, hx: Tensor | None, size: int) -> Tensor:
    kept = part.new_zeros(part.shape[0], size, part.shape[2]) if hx is None else hx.to(part.dtype)
    return kept.index_copy(1, rows, part)


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
