"""Run a recurrent module on a batch: each row as if it were alone."""

from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from collate.errors import LengthError
from collate.lengths.tracking import check_tracked
from collate.tensors.graphs import outside_graphs
from collate.tensors.to_device import to_device
from collate.training.cpu_rnn import each_part, is_faster_in_segments, run_segments
from collate.training.rnn_modules import RnnState, check_rnn_inputs, is_plain
from collate.training.sequences import SequencesT


@outside_graphs
def apply_rnn(rnn: nn.Module, batch: SequencesT, hx: RnnState | None = None) -> tuple[SequencesT, RnnState]:
    """Run `nn.RNN`, `nn.GRU`, `nn.LSTM`, or a custom module around them, over the real steps of every sequence.

    Args:
        rnn: The module, `batch_first` or not: batches are `[B, T, ...]` either way. A custom module takes a
            `PackedSequence`, and a state where one is given, and returns a `PackedSequence` of as many steps and a
            state: a tensor `[*, B, *]` or a tuple of them, or None.
        batch: A `LengthTrackedBatch` or a `VarlenBatch` of values `[B, T, input_size]`. A sequence is a row of the one
            and a document of the other; the module starts again at each. B is their number below.
        hx: Initial states `[layers * directions, B, H]` in batch order (for an LSTM a pair of them), on the batch's
            device; None starts from zeros.

    Returns:
        Outputs `[B, T, directions * H]`, tracked like the batch, with 0 in the padding; and the final state of each row
        in batch order, taken at the row's own last step (backward directions: first step). An empty row has no outputs
        and keeps its `hx`, so that the chunks of `split_steps`, chained by their states, equal the whole. Outputs stay
        connected to the parameters even if every row is empty, so that distributed training does not hang.

    Raises:
        LengthError: A backward direction would start from the state of an earlier chunk, which has not seen later
            steps.
        RuntimeError: Features, states or weights are of another size, or on another device, than the module takes.
        TypeError: `batch` is a tensor, a custom module does not return a `PackedSequence` and a state, or `hx`
            is not a pair for an LSTM and a tensor for another torch module.
        ValueError: `hx` does not hold one state per row, or dtypes differ.
    """
    check_tracked("apply_rnn", batch)
    if getattr(rnn, "bidirectional", False) and hx is not None and batch.first_step:
        raise LengthError(
            f"a bidirectional module cannot be carried over chunks: the chunk at step {batch.first_step} would start "
            "its backward direction from a state that has not seen the steps after it. Run the whole batch at once"
        )
    hx = tuple(hx) if isinstance(hx, list) else hx
    _check_state(hx, len(batch))
    lengths = batch.host_lengths()
    if not lengths.any():
        return _run_nothing(rnn, batch, hx)
    packing = batch.packing_map(batch.device)
    # A packed batch holds only the rows that are not empty, and takes the states of these.
    rows = None if lengths.all() else to_device(np.flatnonzero(lengths), batch.device)
    start = hx if rows is None else each_part(hx, partial(torch.index_select, dim=1, index=rows))
    packed, state = _run_module(rnn, packing.pack(batch.step_values), start)
    outputs = batch.with_step_values(packing.unpack(packed), 0)
    return outputs, state if rows is None else _fill_states(state, rows, hx, len(batch))


def _run_module(rnn: nn.Module, packed: PackedSequence, hx: RnnState | None) -> tuple[PackedSequence, RnnState]:
    """Run the module on a packed batch, in dense segments where that is faster.

    Raises:
        TypeError: A custom module returns something else.
    """
    if is_plain(rnn):
        plain = cast(nn.RNNBase, rnn)
        check_rnn_inputs(plain, packed, hx)
        if is_faster_in_segments(plain, packed, hx):
            return run_segments(plain, packed, hx)
    result = rnn(packed) if hx is None else rnn(packed, hx)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], PackedSequence)):
        raise TypeError(
            f"{type(rnn).__name__} must take a PackedSequence and return a PackedSequence and a state, "
            f"got {type(result).__name__}"
        )
    return result


def _check_state(hx: RnnState | None, rows: int) -> None:
    """Check that initial states hold one state per row.

    Raises:
        ValueError: They do not.
    """
    for part in () if hx is None else hx if isinstance(hx, tuple) else (hx,):
        if part.dim() != 3 or part.shape[1] != rows:
            raise ValueError(f"hx must be [layers * directions, {rows}, H], one state per row, got {list(part.shape)}")


def _fill_states(state: RnnState, rows: Tensor, hx: RnnState | None, size: int) -> RnnState:
    """Put the running rows' final states between the initial ones of the rows that are empty."""
    if isinstance(state, tuple):
        starts = hx if isinstance(hx, tuple) else [None] * len(state)
        return tuple(_put_part(part, rows, start, size) for part, start in zip(state, starts, strict=True))
    return state if state is None else _put_part(state, rows, cast("Tensor | None", hx), size)


def _put_part(part: Tensor, rows: Tensor, hx: Tensor | None, size: int) -> Tensor:
    """One tensor of the states, `[*, B, *]`."""
    states = part.new_zeros(part.shape[0], size, *part.shape[2:]) if hx is None else hx.to(part.dtype)
    # Out of place: the caller's initial states stay as they are, and gradients flow to both parts.
    return states.index_copy(1, rows, part)


def _run_nothing(rnn: nn.Module, batch: SequencesT, hx: RnnState | None) -> tuple[SequencesT, RnnState]:
    """Outputs and states of a batch whose rows are all empty."""
    # One time step of one row tells how wide outputs and states are; its values are not used.
    step = PackedSequence(batch.step_values.new_zeros(1, *batch.step_values.shape[2:]), torch.tensor([1], device="cpu"))
    with torch.no_grad():
        packed, state = _run_module(rnn, step, each_part(hx, partial(torch.narrow, dim=1, start=0, length=1)))
    # A zero whose graph holds every weight, and every module before it, such as an embedding: distributed training
    # would hang without their gradients. No value is read, so that NaN weights do not matter.
    states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
    sources = (*rnn.parameters(), batch.step_values, *states)
    anchor = sum((source.flatten()[:0].sum() for source in sources), torch.zeros((), device=batch.device))

    def zeros(sample: Tensor, *shape: int) -> Tensor:
        return anchor.to(sample.dtype).expand(shape).clone()

    outputs = batch.with_step_values(zeros(packed.data, *batch.step_values.shape[:2], *packed.data.shape[1:]), 0)
    if hx is not None:
        return outputs, hx
    return outputs, each_part(state, lambda part: zeros(part, part.shape[0], len(batch), *part.shape[2:]))
