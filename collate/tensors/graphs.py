"""Calls that read lengths on the host, and therefore cannot be in a compiled or exported graph."""

from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar, cast

import torch

from collate.errors import LengthError

try:
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
except ImportError:
    # This is not a public part of torch; the public function imports the whole compiler.
    _CAN_SKIP = False
else:
    _CAN_SKIP = True

Params = ParamSpec("Params")
Result = TypeVar("Result")

_REASON: Final = (
    "calls that use host lengths (apply_rnn, pack, unpack, flat, sequences, num_tokens, position_ids, nested) cannot "
    "be in a graph, which would keep these lengths for every batch. Compile without fullgraph=True: the graph is "
    "broken there and resumes after the call. Export only calls that read the mask; a recurrent module that is "
    "batch_first and has one direction gives the same outputs at real steps from "
    "batch.with_padded(module(batch.padded)[0]): see docs/export.md"
)


def outside_graphs(call: Callable[Params, Result]) -> Callable[Params, Result]:
    """Let `torch.compile` break its graph at a call of this function, and run the call as it is.

    It does what `torch.compiler.disable` does, which would import the whole compiler whenever this package is imported,
    and that takes as long as importing torch.
    """
    if not _CAN_SKIP:
        return cast("Callable[Params, Result]", torch.compiler.disable(call, reason=_REASON))
    set_code_exec_strategy(call.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    vars(call).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=_REASON)
    return call


def is_making_graph(tensor: torch.Tensor) -> bool:
    """Whether operations on a tensor are traced by a compiler, or captured in a CUDA graph."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def refuse_export() -> None:
    """Refuse to take host lengths into a program that is being exported.

    Raises:
        LengthError: One is being exported: it would keep these lengths for every batch.
    """
    if torch.compiler.is_exporting():
        raise LengthError(_REASON)
