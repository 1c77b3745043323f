"""What losses, means and recurrent modules need of a batch, padded or varlen."""

from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from collate.packing import PackingMap
from collate.tensors.numpy_view import Int64Array


class SequenceBatch(Protocol):
    """Values of time steps, and where the sequences are: a `LengthTrackedBatch` or a `VarlenBatch`.

    A sequence is a row of the one and a document of the other. S is B, or the slots of the table of segments.
    """

    is_varlen: ClassVar[bool]

    @property
    def step_values(self) -> Tensor:
        """Values `[B, T, *F]`."""

    @property
    def mask(self) -> Tensor:
        """Real steps, bool `[B, T]`."""

    @property
    def device(self) -> torch.device:
        """The device of the values."""

    @property
    def num_tokens(self) -> int:
        """Real steps."""

    @property
    def ignore_index(self) -> int | None:
        """What steps without a label hold, in a batch of labels."""

    @property
    def first_step(self) -> int:
        """Time steps of the sequences before these, in earlier chunks."""

    def __len__(self) -> int:
        """Sequences."""

    def host_lengths(self) -> Int64Array:
        """Lengths int64 `[N]`."""

    def check_unwritten(self) -> None:
        """Check that nobody wrote to the lengths."""

    def real_step_index(self) -> Tensor:
        """Flat index of every real step, sequence after sequence: int64 `[M]`."""

    def packing_map(self, device: torch.device) -> PackingMap:
        """The index map between padded and packed."""

    def with_step_values(self, values: Tensor, padding_value: Any) -> Self:
        """New values of the same steps."""

    def sum_sequences(self, steps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Sums over sequences: `[B, T, *G]` -> `[S, *G]`."""

    def step_counts(self) -> Tensor:
        """Real steps of sequences: integers `[S]`, which a sum in floating point would not count beyond 2**24."""

    def pick_sequences(self, sums: Tensor) -> Tensor:
        """The entries of sequences: `[S, *G]` -> `[N, *G]`."""

    def spread_weights(self, weights: Tensor) -> Tensor | None:
        """Weights `[N]` as weights `[B, T]`."""

    def last_values(self) -> tuple[Tensor, Tensor]:
        """Last steps `[N, *F]`, and whether there is one, bool `[N]`."""

    def difference(self, other: Any) -> str | None:
        """Why another batch is not of the same steps; None where it is."""


SequencesT = TypeVar("SequencesT", bound=SequenceBatch)


def labelled_steps(target: SequenceBatch) -> Tensor | None:
    """The real steps that have labels, bool `[B, T]`; None where all have."""
    if target.ignore_index is None:
        return None
    labels = target.step_values
    has_label = labels != target.ignore_index
    # A step with several labels counts once.
    return target.mask & (has_label if has_label.dim() == 2 else has_label.flatten(2).any(2))


def count_labelled_steps(batch: SequenceBatch) -> int | Tensor:
    """The number of real steps, in a batch of labels of those that have one."""
    labelled = labelled_steps(batch)
    return batch.num_tokens if labelled is None else labelled.sum()
