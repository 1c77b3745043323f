"""A snapshot of a batch's lengths and permutation from when it was made: a write to them, or to the mask, is noticed.

A batch with lengths [3, 1] keeps a copy of them. After `batch.lengths[0] = 2` the next use of lengths compares the two
and raises, since mask, permutation and padding do not follow such a write.
"""

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from collate.errors import LengthError
from collate.lengths.validation import check_batch_lengths, check_mask, check_permutation
from collate.tensors.graphs import refuse_export
from collate.tensors.masks import length_mask
from collate.tensors.numpy_view import HostArray, Int64Array, to_array
from collate.tensors.steps import PaddingValue

_SNAPSHOT: Final = "_kept_on_host"

# Cells up to which the real ones of a mask are counted at each use, which takes two microseconds or so: it finds writes
# that torch does not count, through NumPy or `.data`.
_FEW_CELLS: Final = 1 << 15


class TrackedBatch(Protocol):
    """What this room needs to know of a batch, which is defined above it."""

    @property
    def padded(self) -> Tensor:
        """Values `[B, T, *F]`."""

    @property
    def lengths(self) -> Tensor:
        """Steps of each row, int64 `[B]` on the host."""

    @property
    def mask(self) -> Tensor:
        """Real steps, bool `[B, T]`."""

    @property
    def permutation(self) -> Tensor:
        """Sample index of each row, int64 `[B]` on the host."""

    @property
    def padding_value(self) -> PaddingValue | None:
        """What the padding holds."""

    @property
    def first_step(self) -> int:
        """Time steps before these."""


@dataclass
class _Snapshot:
    """A batch's integers when it was made.

    Attributes:
        lengths: int64 `[B]`.
        counts: Their memory, which is compared in a third of the time.
        permutation: Memory of the permutation; None where it was not read yet, as in a pytree.
        version: how often torch had written to the mask when it was right; None where it was not read yet.
        total: M, once it is known.
    """

    lengths: Int64Array
    counts: bytes
    permutation: bytes | None = None
    version: int | None = None
    total: int | None = None


def keep_lengths(batch: TrackedBatch) -> None:
    """Keep a batch's integers, which are known to be right; what is no tensor with memory is left for later."""
    if type(batch.lengths) is Tensor and batch.lengths.is_cpu:
        snapshot = _take_snapshot(batch, batch.lengths)
        snapshot.permutation = _memory_of(batch.permutation)
        # What is not there yet will be made by torch once, as it should be.
        snapshot.version = _version_of(vars(batch)["mask"]) if "mask" in vars(batch) else 0


def keep_lengths_that_fit(batch: TrackedBatch) -> None:
    """Copy a batch's lengths if they fit its values; all else, which may be anything, is left for later.

    What does not fit is refused where lengths are used, and not here: a pytree is put together from any leaves.
    """
    padded, lengths = batch.padded, batch.lengths
    if type(lengths) is not Tensor or not isinstance(padded, Tensor) or padded.dim() < 2 or not lengths.is_cpu:
        return
    try:
        check_batch_lengths(lengths, padded.shape[0], padded.shape[1])
    except (LengthError, TypeError, RuntimeError):
        # torch does not say what numbers are in a tensor that vmap maps over.
        return
    _take_snapshot(batch, lengths)


def host_lengths(batch: TrackedBatch) -> Int64Array:
    """The lengths that a batch was made with: int64 `[B]`, not to be written to.

    Mask and permutation are checked as well. A mask on a device is not read, which would wait for the device; on the
    host, a write through NumPy to a large one is left to `verify`.

    Raises:
        LengthError: Lengths, mask or permutation were written to since, so that they no longer agree; or, where the
            batch was made in compiled code or from a pytree's leaves, they do not fit `padded`; or a program is being
            exported.
        TypeError: Such a batch has a mask that is not bool, or a permutation that is not of integers.
        ValueError: Such a batch has a permutation that is none.
    """
    refuse_export()
    snapshot: _Snapshot | None = vars(batch).get(_SNAPSHOT)
    if snapshot is None:
        # Compiled code and pytrees check nothing when they make a batch.
        snapshot = _take_snapshot(batch, check_batch_lengths(batch.lengths, *batch.padded.shape[:2]))
    elif snapshot.counts != to_array(batch.lengths).tobytes():
        raise LengthError(
            f"the batch was made with lengths {snapshot.lengths.tolist()}, and they were written to: they now are "
            f"{batch.lengths.tolist()}, which mask and padding do not follow. Make a new batch with "
            "with_padded(values, lengths=...)"
        )
    _check_permutation(batch, snapshot)
    _check_mask(batch, snapshot)
    return snapshot.lengths


def check_unwritten(batch: TrackedBatch) -> None:
    """Check that a batch's lengths, mask and permutation are those that it was made with.

    Compiled code and fake tensors are not looked at.

    Raises:
        LengthError: They were written to.
    """
    if not torch.compiler.is_compiling() and type(batch.lengths) is Tensor:
        host_lengths(batch)


def check_permutation_unwritten(batch: TrackedBatch) -> None:
    """Check the permutation alone, where lengths and mask are about to be replaced.

    Raises:
        LengthError: It was written to.
    """
    if not torch.compiler.is_compiling() and _SNAPSHOT in vars(batch):
        _check_permutation(batch, vars(batch)[_SNAPSHOT])


def check_tracked(name: str, *batches: object) -> None:
    """Check that a function is not given tensors instead of batches.

    Raises:
        TypeError: It is.
    """
    for batch in batches:
        if isinstance(batch, (Tensor, PackedSequence)):
            raise TypeError(
                f"{name} takes a LengthTrackedBatch, got a {type(batch).__name__}: wrap it, "
                "LengthTrackedBatch(padded, lengths) with values [B, T, *F] and the length of each row"
            )


def _take_snapshot(batch: TrackedBatch, lengths: Tensor) -> _Snapshot:
    """Copy a batch's lengths into its dictionary."""
    counts = to_array(lengths)
    snapshot = vars(batch)[_SNAPSHOT] = _Snapshot(counts.copy(), counts.tobytes())
    return snapshot


def _check_permutation(batch: TrackedBatch, snapshot: _Snapshot) -> None:
    """Compare the permutation with the snapshot's.

    Raises:
        LengthError: It was written to.
    """
    contents = _memory_of(batch.permutation)
    if contents is None or contents == snapshot.permutation:
        return
    if snapshot.permutation is not None:
        raise LengthError(
            f"the batch was made with permutation {np.frombuffer(snapshot.permutation, np.int64).tolist()}, and it was "
            f"written to: it now is {batch.permutation.tolist()}, which rows and other fields do not follow. Make a "
            "new batch with LengthTrackedBatch(padded, lengths, permutation=...)"
        )
    check_permutation(batch.permutation, len(snapshot.lengths))
    snapshot.permutation = contents


def _check_mask(batch: TrackedBatch, snapshot: _Snapshot) -> None:
    """Compare the mask with the lengths, where torch has written to it or it is small.

    Raises:
        LengthError: It does not agree.
    """
    # The mask of a wide batch is made at its first use, and a check is no use.
    mask = vars(batch).get("mask")
    if type(mask) is not Tensor or not mask.is_cpu:
        return
    version = _version_of(mask)
    if version == snapshot.version and (mask.numel() > _FEW_CELLS or _counts(mask, snapshot)):
        return
    values = _values_of(mask)
    if values is None:
        return
    if snapshot.version is None:
        check_mask(mask, torch.from_numpy(snapshot.lengths), batch.padded)
    elif not np.array_equal(values, real := length_mask(snapshot.lengths, values.shape[1])):
        row = int(np.flatnonzero((values != real).any(1))[0])
        raise LengthError(
            f"the batch's mask was written to: row {row} now marks {int(values[row].sum())} steps, its length is "
            f"{snapshot.lengths[row]}. A mask is the first `length` steps and nothing else: give sequence_loss "
            "weights= to leave steps out, or make a new batch with with_padded(values, lengths=...)"
        )
    snapshot.version = version


def _counts(mask: Tensor, snapshot: _Snapshot) -> bool:
    """Whether a mask has as many real steps as there were, as far as it can be read."""
    if snapshot.total is None:
        snapshot.total = int(snapshot.lengths.sum())
    values = _values_of(mask)
    return values is None or np.count_nonzero(values) == snapshot.total


def _version_of(mask: Tensor) -> int | None:
    """How often torch has written to a tensor; always 0 in inference mode, where torch does not count."""
    if type(mask) is not Tensor:
        return None
    return 0 if mask.is_inference() else mask._version  # noqa: SLF001 - what autograd itself looks at


def _memory_of(contents: Tensor) -> bytes | None:
    """The memory of integers on the host; None of what cannot be read, such as fake tensors and those of vmap."""
    if type(contents) is not Tensor or not contents.is_cpu:
        return None
    try:
        return contents.numpy().tobytes()
    except RuntimeError:
        return None


def _values_of(mask: Tensor) -> HostArray | None:
    """A mask as an array; None where no memory can be shared."""
    try:
        return mask.numpy()
    except RuntimeError:
        # Within torch.func nothing shares memory.
        return None
