"""A padded batch as sequences: the methods that losses, means and recurrent modules call on every kind of batch."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from collate.lengths.tracking import TrackedBatch, check_unwritten, host_lengths
from collate.lengths.validation import IntegersLike
from collate.operations import views
from collate.operations.construct import changed_batch
from collate.packing import PackingMap
from collate.tensors.graphs import outside_graphs
from collate.tensors.numpy_view import Int64Array
from collate.tensors.steps import PaddingValue


class PaddedSequences:
    """The methods of a `LengthTrackedBatch` that a `VarlenBatch` has as well, and the ways to other layouts."""

    is_varlen: ClassVar[bool] = False

    @property
    def ignore_index(self) -> int | None:
        """What a varlen batch of labels holds in time steps without a label; here all real time steps count."""
        return None

    @property
    def step_values(self: TrackedBatch) -> Tensor:
        """The padded values, `[B, T, *F]`."""
        return self.padded

    def with_step_values(self, values: Tensor, padding_value: PaddingValue | None) -> Self:
        """New values `[B, T, *G]` of the same time steps, with what the padding holds."""
        return changed_batch(self, padded=values, padding_value=padding_value)  # type: ignore[type-var]

    def host_lengths(self: TrackedBatch) -> Int64Array:
        """The lengths that the batch was made with: int64 `[B]`, not to be written to.

        Raises:
            LengthError: They were written to since.
        """
        return host_lengths(self)

    def check_unwritten(self: TrackedBatch) -> None:
        """Check that lengths are those that the batch was made with; it checks nothing in compiled code.

        Raises:
            LengthError: They were written to.
        """
        check_unwritten(self)

    def real_step_index(self: TrackedBatch) -> Tensor:
        """Flat index of every real time step, row after row: int64 `[M]` on the batch's device."""
        return views.real_step_index(self)

    def packing_map(self: TrackedBatch, device: torch.device) -> PackingMap:
        """The index map between padded and packed; made once."""
        return views.packing_map(self, device)

    def sum_sequences(self, steps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Sums over each row of something that has one entry per time step: `[B, T, *G]` -> `[B, *G]`."""
        return steps.sum(1, dtype=dtype)

    def step_counts(self: TrackedBatch) -> Tensor:
        """Real time steps of each row: int64 `[B]`."""
        return self.mask.sum(1)

    def pick_sequences(self, sums: Tensor) -> Tensor:
        """The rows' entries of what `sum_sequences` gives: all of them."""
        return sums

    def spread_weights(self, weights: Tensor) -> Tensor | None:
        """None: weights of a padded batch are `[B, T]`. One for each of B rows could be mistaken for T time steps."""
        del weights
        return None

    def last_values(self: TrackedBatch) -> tuple[Tensor, Tensor]:
        """Each row's value at its last real time step, `[B, *F]`, and whether it has one, bool `[B]`."""
        # From the mask, which is on the values' device, so that nothing is sent to it.
        last = (self.mask.sum(1) - 1).clamp(min=0)
        rows = torch.arange(len(self.padded), device=self.padded.device)
        return self.padded[rows, last], self.mask[:, 0]

    def difference(self: TrackedBatch, other: TrackedBatch) -> str | None:
        """Why another batch is not of the same time steps of the same rows; None where it is."""
        if self.first_step != other.first_step:
            return (
                f"output begins at step {self.first_step} of its sequences, target at step {other.first_step}: give "
                "both the same chunk of split_steps"
            )
        if not np.array_equal(host_lengths(self), host_lengths(other)):
            return (
                f"output has lengths {self.lengths.tolist()}, target has {other.lengths.tolist()}: they must be of the "
                "same steps of the same rows"
            )
        if torch.equal(self.permutation, other.permutation):
            return None
        return (
            f"output's rows are samples {self.permutation.tolist()}, target's are {other.permutation.tolist()}: "
            "collate both fields together, or unsort both"
        )

    def left_padded(self: TrackedBatch, names: Mapping[str, str] = views.LEFT_PADDED) -> dict[str, Tensor]:
        """The rows with their padding on the left, as plain tensors, for models that generate: `**batch.left_padded()`.

        A decoder continues a row after its last column, so its last real time step must stand there. Only these tensors
        are padded on the left; the batch stays as it is. Gradients flow.

        Args:
            names: What each key names: `"values"` (`[B, T, *F]`; what the padding held is on the left now), `"mask"`
                (bool `[B, T]`, True where a time step is real) or `"position_ids"` (int64 `[B, T]`, the index of a time
                step in its sequence, 0 in the padding). The default keys are those of transformers: `input_ids`,
                `attention_mask`, `position_ids`.

        Returns:
            A dict of tensors on the device of the values, in batch order.

        Raises:
            LengthError: The lengths or the mask were written to.
            ValueError: A key names something else.

        Examples:
            >>> import torch
            >>> from collate import LengthTrackedBatch
            >>> batch = LengthTrackedBatch.from_sequences([torch.tensor([5, 6, 7]), torch.tensor([8])])
            >>> batch.left_padded({"x": "values", "positions": "position_ids"})
            {'x': tensor([[5, 6, 7],
                    [0, 0, 8]]), 'positions': tensor([[0, 1, 2],
                    [0, 0, 0]])}
        """
        return views.left_padded_tensors(self, names)

    @outside_graphs
    def to_varlen(
        self,
        *,
        capacity: int | None = None,
        rows: int | None = None,
        align: int = 1,
        max_documents: int | None = None,
        max_seqlen: int | None = None,
        arrange: Literal["given", "best-fit"] = "given",
        documents_per_row: IntegersLike | None = None,
    ) -> Any:
        """The sequences as the documents of a `VarlenBatch`, several in each row; gradients flow.

        Args:
            capacity: Time steps of a row; None puts all into one row.
            rows: As in `VarlenBatch.from_sequences`, as are the options that follow.
            align: Documents start at its multiples.
            max_documents: Documents that a row may have.
            max_seqlen: The longest document that kernels must expect.
            arrange: `"given"` cuts rows from the batch in its order, `"best-fit"` fills as few as hold it.
            documents_per_row: int64 `[R]`, the number of sequences of each row, in batch order; instead of `arrange`.

        Raises:
            LengthError: The rows do not hold the sequences.
            ValueError: An option has an impossible value, or this is a later chunk of `split_steps`.
        """
        if vars(self)["first_step"]:
            raise ValueError("a later chunk of split_steps cannot be put into other rows: convert the whole batch")
        options: dict[str, Any] = {"capacity": capacity, "rows": rows, "align": align, "max_documents": max_documents}
        options |= {"max_seqlen": max_seqlen, "arrange": arrange}
        # The class is in a room above this one, and may not be loaded yet.
        return import_module("collate.varlen.batch").VarlenBatch.from_padded(self, options, documents_per_row)
