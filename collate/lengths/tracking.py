"""The lengths that a batch was made with, on the host: a copy stays with the batch, so that a write is noticed."""

from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from collate.errors import LengthError
from collate.lengths.validation import check_lengths
from collate.tensors.graphs import refuse_export
from collate.tensors.numpy_view import Int64Array, to_array

_COPY: Final = "_lengths_on_host"


class Tracked(Protocol):
    """What has lengths."""

    @property
    def padded(self) -> Tensor:
        """The block `[B, T, *F]`."""

    @property
    def lengths(self) -> Tensor:
        """Steps of each row, int64 `[B]` on the host."""


def keep_lengths(batch: Tracked) -> None:
    """Copy a batch's lengths, which are known to be right; what is no tensor with memory is left for later."""
    if type(batch.lengths) is Tensor and batch.lengths.is_cpu:
        vars(batch)[_COPY] = to_array(batch.lengths).copy()


def keep_lengths_that_fit(batch: Tracked) -> None:
    """Copy a batch's lengths if they fit its block; all else, which may be anything, is left for later.

    What does not fit is refused where lengths are used, and not here: a pytree is put together from any leaves.
    """
    padded, lengths = batch.padded, batch.lengths
    if type(lengths) is not Tensor or not isinstance(padded, Tensor) or padded.dim() < 2 or not lengths.is_cpu:
        return
    try:
        check_lengths(lengths, padded.shape[0], padded.shape[1])
    except (LengthError, TypeError, RuntimeError):
        # torch does not say what numbers are in a tensor that vmap maps over.
        return
    keep_lengths(batch)


def host_lengths(batch: Tracked) -> Int64Array:
    """The lengths that a batch was made with: int64 `[B]`, not to be written to.

    Raises:
        LengthError: The batch's lengths were written to since, so that its mask no longer agrees; or, where it was made
            in compiled code or from a pytree's leaves, they do not fit the block; or a program is being exported.
    """
    refuse_export()
    kept: Int64Array | None = vars(batch).get(_COPY)
    if kept is None:
        # Compiled code and pytrees check nothing when they make a batch.
        kept = vars(batch)[_COPY] = to_array(check_lengths(batch.lengths, *batch.padded.shape[:2])).copy()
    elif not np.array_equal(kept, to_array(batch.lengths)):
        raise LengthError(
            f"the batch was made with lengths {kept.tolist()}, and they were written to: they now are "
            f"{batch.lengths.tolist()}, which mask and padding do not follow. Make a new batch with "
            "with_padded(values, lengths=...)"
        )
    return kept


def check_unwritten(batch: Tracked) -> None:
    """Check that a batch's lengths are those that it was made with; compiled code and fake tensors are not looked at.

    Raises:
        LengthError: They were written to.
    """
    if not torch.compiler.is_compiling() and type(batch.lengths) is Tensor:
        host_lengths(batch)


def check_tracked(name: str, *batches: object) -> None:
    """Check that a function is not given tensors in place of batches.

    Raises:
        TypeError: It is.
    """
    for batch in batches:
        if isinstance(batch, (Tensor, PackedSequence)):
            raise TypeError(
                f"{name} takes a LengthTrackedBatch, got a {type(batch).__name__}: wrap it, "
                "LengthTrackedBatch(padded, lengths) with a block [B, T, *F] and the steps of each row"
            )
