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

# In a mask of up to this many cells, the real ones are counted at each use, in about two microseconds. That notices
# writes through NumPy or `.data`, which torch's version counter misses.
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
        """Time steps of the sequences before this chunk."""


@dataclass
class _Snapshot:
    """A batch's integers when it was made.

    Attributes:
        lengths: int64 `[B]`.
        counts: The bytes of the lengths: to compare bytes takes a third of the time.
        permutation: The bytes of the permutation; None if it was not read yet, as in a pytree.
        version: The mask's version counter when it was last checked; None if it was not checked yet.
        total: M, once it is known.
    """

    lengths: Int64Array
    counts: bytes
    permutation: bytes | None = None
    version: int | None = None
    total: int | None = None


def keep_lengths(batch: TrackedBatch) -> None:
    """Keep a copy of a batch's checked integers; tensors without memory, such as fake ones, are left for later."""
    if type(batch.lengths) is Tensor and batch.lengths.is_cpu:
        snapshot = _take_snapshot(batch, batch.lengths)
        snapshot.permutation = _memory_of(batch.permutation)
        # A mask that does not exist yet starts with version 0 when `DerivedMask` makes it.
        snapshot.version = version_of(vars(batch)["mask"]) if "mask" in vars(batch) else 0


def keep_lengths_that_fit(batch: TrackedBatch) -> None:
    """Copy a batch's lengths if they fit its values; the other parts may be anything, and are left for later.

    Lengths that do not fit are refused at their first use, not here: a pytree may be made of any leaves.
    """
    padded, lengths = batch.padded, batch.lengths
    if type(lengths) is not Tensor or not isinstance(padded, Tensor) or padded.dim() < 2 or not lengths.is_cpu:
        return
    try:
        check_batch_lengths(lengths, padded.shape[0], padded.shape[1])
    except (LengthError, TypeError, RuntimeError):
        # torch does not show the numbers in a tensor that vmap maps over.
        return
    # The permutation and the mask are checked when lengths are first used.
    _take_snapshot(batch, lengths)


def host_lengths(batch: TrackedBatch) -> Int64Array:
    """The lengths that a batch was made with: int64 `[B]`, not to be written to.

    Mask and permutation are checked as well. A mask on a device is not read, which would wait for the device; on the
    host, a write through NumPy to a large one is left to `verify`.

    Raises:
        LengthError: Lengths, mask or permutation were written to, so that they no longer agree; or the batch was made
            in compiled code or from a pytree's leaves, and they do not fit `padded`; or a program is being exported.
        TypeError: The mask of such a batch is not bool, or its permutation does not hold integers.
        ValueError: The permutation of such a batch is not one.
    """
    refuse_export()
    snapshot: _Snapshot | None = vars(batch).get(_SNAPSHOT)
    if snapshot is None:
        # Compiled code and pytrees check nothing when they make a batch.
        snapshot = _take_snapshot(batch, check_batch_lengths(batch.lengths, *batch.padded.shape[:2]))
    # Lengths are compared by value, not by a version counter, which misses writes through NumPy.
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

    It checks nothing in compiled code or for fake tensors.

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
    """Check that a function was given batches, not tensors.

    Raises:
        TypeError: It was given a tensor, or something else.
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
    # None: a batch from a pytree's leaves, whose permutation was never checked. It is checked now, once.
    if snapshot.permutation is not None:
        raise LengthError(
            f"the batch was made with permutation {np.frombuffer(snapshot.permutation, np.int64).tolist()}, and it was "
            f"written to: it now is {batch.permutation.tolist()}, which rows and other fields do not follow. Make a "
            "new batch with LengthTrackedBatch(padded, lengths, permutation=...)"
        )
    check_permutation(batch.permutation, len(snapshot.lengths))
    snapshot.permutation = contents


def _check_mask(batch: TrackedBatch, snapshot: _Snapshot) -> None:
    """Compare the mask with the lengths, if torch has written to it or if it is small.

    Raises:
        LengthError: It does not agree.
    """
    # A wide batch makes its mask at the first use; a check alone should not make it.
    mask = vars(batch).get("mask")
    if type(mask) is not Tensor or not mask.is_cpu:
        return
    version = version_of(mask)
    if version == snapshot.version and (mask.numel() > _FEW_CELLS or _counts(mask, snapshot)):
        return
    values = _values_of(mask)
    if values is None:
        return
    # A mask that was never checked (from a pytree) may have a wrong shape or dtype too.
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
    """Whether a mask still has its number of real steps; True where it cannot be read."""
    if snapshot.total is None:
        snapshot.total = int(snapshot.lengths.sum())
    values = _values_of(mask)
    return values is None or np.count_nonzero(values) == snapshot.total


def version_of(mask: Tensor) -> int | None:
    """How often torch has written to a tensor; always 0 in inference mode, where torch does not count."""
    if type(mask) is not Tensor:
        return None
    return 0 if mask.is_inference() else mask._version  # noqa: SLF001 - what autograd itself looks at


def _memory_of(contents: Tensor) -> bytes | None:
    """The bytes of integers on the host; None for tensors that cannot be read: fake ones and those of vmap."""
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
