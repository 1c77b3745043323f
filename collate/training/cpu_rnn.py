"""Run a packed batch on the CPU in dense segments, from row end to row end.

Between two row ends the number of rows is constant, so that the packed steps are a dense segment `[steps, rows, F]` as
they lie in memory. torch's dense kernel runs it, the state goes to the next segment, and the states of rows that end
are set aside. A backward direction runs in the same way on steps that are reversed row by row.

Rows of 5, 2 and 2 time steps have the sizes 3, 3, 1, 1, 1: two segments, of 2 time steps x 3 rows and 3 x 1.

>>> row_counts, steps = torch.unique_consecutive(torch.tensor([3, 3, 1, 1, 1]), return_counts=True)
>>> list(zip(steps.tolist(), row_counts.tolist()))
[(2, 3), (3, 1)]

Reversed row by row, packed step 0 (row 0, time step 0) comes from packed step 8 (row 0, time step 4):

>>> reversed_steps(np.array([3, 3, 1, 1, 1]))
tensor([8, 4, 5, 7, 1, 2, 6, 3, 0])
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from collate.tensors.numpy_view import Int64Array, to_array
from collate.training.rnn_modules import RnnState

_KERNELS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
    "GRU": torch.gru,
    "LSTM": torch.lstm,
}


# The dtypes that autocast converts; it leaves float64 as it is.
_CAST = {torch.float32, torch.bfloat16}


def is_faster_in_segments(rnn: nn.RNNBase, packed: PackedSequence, hx: RnnState | None) -> bool:
    """Whether segments are the fastest exact way for a plain module, on this device, with or without gradients.

    The CPU's packed kernels slice all steps once per step, and differentiating that is quadratic in T: segments train
    1.7 to 3.1 times (GRU) and 3.2 to 12 times (LSTM) as fast (`benchmarks/rnn.py`). Without gradients only the LSTM
    gains, through oneDNN. cuDNN takes packed batches well. Mixed dtypes under autocast, which torch cannot join, are
    left to the module.
    """
    if not packed.data.is_cpu or not (isinstance(rnn, nn.LSTM) or torch.is_grad_enabled()):
        return False
    if not torch.is_autocast_enabled("cpu"):
        return packed.data.is_floating_point()
    if isinstance(rnn, nn.LSTM) and torch.get_autocast_dtype("cpu") not in _CAST:
        # oneDNN's LSTM has no float16 on most processors.
        return False
    states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
    weights = (weight for layer in rnn.all_weights for weight in layer)
    dtypes = {tensor.dtype for tensor in (packed.data, *states, *weights)}
    return dtypes <= _CAST or dtypes == {torch.float64}


def run_segments(rnn: nn.RNNBase, packed: PackedSequence, hx: RnnState | None) -> tuple[PackedSequence, RnnState]:
    """Do what `rnn(packed, hx)` does.

    Args:
        rnn: A plain module with any number of layers and directions.
        packed: Data `[M, input_size]`. It and `hx` must fit the module (`check_rnn_inputs`): the kernels check nothing.
        hx: `[layers * directions, B, H]`, for an LSTM a pair; None starts from zeros.

    Returns:
        The outputs, packed in the same way, and the final state of each row.
    """
    sizes = packed.batch_sizes
    state = _reordered(_zeros(rnn, packed) if hx is None else hx, packed.sorted_indices)
    if rnn.bidirectional:
        data, final = _run_directions(rnn, packed.data, sizes, state)
    else:
        data, final = _run_direction(_kernel(rnn, range(rnn.num_layers)), packed.data, sizes, state)
    return packed._replace(data=data), _reordered(final, packed.unsorted_indices)


def each_part(state: RnnState | None, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to each tensor of a state, which is a tensor, a tuple of tensors, or None."""
    if isinstance(state, tuple):
        return tuple(map(change, state))
    return None if state is None else change(state)


def _run_directions(rnn: nn.RNNBase, data: Tensor, sizes: Tensor, state: RnnState) -> tuple[Tensor, RnnState]:
    """Run layer by layer: a layer reads both directions of the one before."""
    # The same permutation reverses steps and puts them back: it is its own inverse.
    reverse = reversed_steps(to_array(sizes))
    finals = []
    for layer in range(rnn.num_layers):
        # torch drops between layers: not before the first, not after the last.
        if layer and rnn.dropout:
            data = F.dropout(data, rnn.dropout, rnn.training)
        outputs = []
        for index, order in ((2 * layer, None), (2 * layer + 1, reverse)):
            start = each_part(state, partial(torch.narrow, dim=0, start=index, length=1))
            steps = data if order is None else data.index_select(0, order)
            output, final = _run_direction(_kernel(rnn, [index]), steps, sizes, start)
            outputs.append(output if order is None else output.index_select(0, order))
            finals.append(final)
        data = torch.cat(outputs, -1)
    return data, _joined(finals, dim=0)


def _run_direction(
    kernel: Callable[[Tensor, RnnState], tuple[Tensor, RnnState]], data: Tensor, sizes: Tensor, state: RnnState
) -> tuple[Tensor, RnnState]:
    """Run time-major steps `[M, F]` of `sizes[t]` rows at each step t, longest row first."""
    counts, steps = (to_array(part).tolist() for part in torch.unique_consecutive(sizes, return_counts=True))
    outputs: list[Tensor] = []
    ended: list[RnnState] = []
    # Sizes 3, 3, 1, 1, 1: counts 3 and 1, steps 2 and 3, so that the segments have 6 and 3 packed steps.
    segments = data.split([rows * length for rows, length in zip(counts, steps, strict=True)])
    for segment, rows, length in zip(segments, counts, steps, strict=True):
        if outputs:
            # Rows are sorted longest first, so that the rows which end here are the last ones.
            ended.append(each_part(state, partial(_state_rows, rows=slice(rows, None))))
            state = each_part(state, partial(_state_rows, rows=slice(rows)))
        output, state = kernel(segment.view(length, rows, -1), state)
        outputs.append(output.flatten(0, 1))
    # The rows that ended last are the longest of the ended ones: reversed, the states are in row order.
    return torch.cat(outputs), _joined([state, *ended[::-1]], dim=1)


def _kernel(rnn: nn.RNNBase, indices: Sequence[int]) -> Callable[[Tensor, RnnState], tuple[Tensor, RnnState]]:
    """Torch's dense kernel with the weights of some layers, or of one direction of one layer."""
    weights = [weight for index in indices for weight in rnn.all_weights[index]]

    options = {
        "has_biases": rnn.bias,
        "num_layers": len(indices),
        "dropout": rnn.dropout,
        "train": rnn.training,
        "bidirectional": False,
        "batch_first": False,
    }

    def call(segment: Tensor, state: RnnState) -> tuple[Tensor, RnnState]:
        output, *final = _KERNELS[rnn.mode](segment, state, weights, **options)
        return output, (final[0], final[1]) if len(final) == 2 else final[0]

    return call


def reversed_steps(sizes: Int64Array) -> Tensor:
    """Where each row's steps lie when each row is read from its end: int64 `[M]`, its own inverse.

    Args:
        sizes: int64 `[max L]`, rows still running at each step.
    """
    total = np.arange(int(sizes.sum()))
    # All rows are equally long: whole time steps change places.
    if sizes[-1] == sizes[0]:
        return torch.from_numpy(total.reshape(len(sizes), -1)[::-1].ravel())
    starts = np.cumsum(sizes) - sizes
    # The rank of a packed step is its row: rows are longest first in each time step.
    ranks = total - np.repeat(starts, sizes)
    # Row i, longest first, runs for as many steps as have more than i rows.
    lengths = len(sizes) - np.searchsorted(sizes[::-1], np.arange(sizes[0]), side="right")
    mirrored = lengths[ranks] - 1 - np.repeat(np.arange(len(sizes)), sizes)
    return torch.from_numpy(starts[mirrored] + ranks)


def _zeros(rnn: nn.RNNBase, packed: PackedSequence) -> RnnState:
    """Initial states of zeros, for an LSTM a pair."""
    layers, rows = rnn.num_layers * (2 if rnn.bidirectional else 1), int(packed.batch_sizes[0])
    h = packed.data.new_zeros(layers, rows, rnn.proj_size or rnn.hidden_size)
    return (h, packed.data.new_zeros(layers, rows, rnn.hidden_size)) if rnn.mode == "LSTM" else h


def _state_rows(part: Tensor, rows: slice) -> Tensor:
    """Some rows of a state `[layers, B, H]`."""
    return part[:, rows]


def _reordered(state: RnnState, order: Tensor | None) -> RnnState:
    """A state with its rows in another order."""
    return state if order is None else cast(RnnState, each_part(state, partial(torch.index_select, dim=1, index=order)))


def _joined(states: Sequence[RnnState], dim: int) -> RnnState:
    """States joined along an axis."""
    if isinstance(states[0], tuple):
        h, c = zip(*cast("list[tuple[Tensor, Tensor]]", states), strict=True)
        return torch.cat(h, dim), torch.cat(c, dim)
    return torch.cat(cast("list[Tensor]", states), dim)
