"""Send integers from the host to an accelerator without waiting for it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collate.errors import LengthError


def to_device(integers: npt.NDArray[np.integer[Any]] | Tensor, device: torch.device) -> Tensor:
    """Send integers of any shape to the device without waiting for it: pinned on the way to a GPU.

    From pageable memory the copy would wait for all work that is queued on the GPU: milliseconds for some 100 bytes.

    Raises:
        LengthError: A CUDA graph is being captured: it would keep these lengths for every batch it is replayed on.
    """
    refuse_capture(device)
    sent = integers if isinstance(integers, Tensor) else torch.from_numpy(integers)
    return sent.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else sent.to(device)


def refuse_capture(device: torch.device) -> None:
    """Refuse to use host lengths while a CUDA graph is being captured.

    Raises:
        LengthError: One is being captured: it would keep these lengths for every batch it is replayed on.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise LengthError(
            "calls that use host lengths (pack, unpack, flat, apply_rnn, a new mask) cannot be captured in a CUDA "
            "graph, which would replay these lengths for every batch: capture calls that read the mask, on batches of "
            "fixed shapes that are made outside the graph"
        )
