"""LengthTrackedBatch: padded values together with their lengths, which stay true.

Axes in the whole package: B rows, T time steps (the width), F feature axes, M real time steps (`sum(lengths)`).
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from collate.errors import LengthError
from collate.lengths.permutation import Order, row_order, unsort_tensor
from collate.lengths.tracking import check_unwritten, host_lengths, keep_lengths
from collate.lengths.validation import (
    IntegersLike,
    check_batch_lengths,
    check_declared,
    check_mask,
    check_mask_values,
    check_padded,
    check_padding_intact,
    check_permutation,
)
from collate.operations import pieces, views
from collate.operations.construct import DerivedMask, changed_batch, check_parts, padded_batch, replace_values
from collate.operations.sequences import PaddedSequences
from collate.operations.serialization import reduce, travels
from collate.padding.rows import measure_rows
from collate.tensors.graphs import outside_graphs
from collate.tensors.masks import device_mask
from collate.tensors.steps import PaddingValue, gather_steps
from collate.widths import Widths, check_widths, padded_width


@travels
@dataclass(frozen=True, eq=False, repr=False)
class LengthTrackedBatch(PaddedSequences):
    """Padded values of variable-length rows with their lengths, mask and permutation.

    Real time steps come first in each row, padding after. Rows are in batch order; `unsort` restores source order.
    Lengths and permutation stay on the host on whatever device the values are. Do not write to lengths, mask or
    permutation: a write is noticed where they are used; a mask on a device is only read by `verify`. A subclass may add
    methods, but no fields.

    Attributes:
        padded: `[B, T, *F]`, T >= 1, any dtype and device.
        lengths: int64 `[B]` on the host, real time steps of each row, 0 to T.
        mask: bool `[B, T]` on the device of `padded`, True where a time step is real; derived when None.
        permutation: int64 `[B]` on the host; row i was sample `permutation[i]` of the list that was collated; the
            given order when None. A piece made by `split` keeps the indices of its rows.
        padding_value: What the padding holds; None where that is unspecified, as after `with_padded`.
        first_step: Time steps of the sequences before these: 0, except in later chunks of `split_steps`.

    Raises:
        LengthError: Lengths or mask do not agree with `padded`, or lengths are not on the host.
        TypeError: `padded` is no tensor, lengths or permutation are not integers, or the mask is not bool.
        ValueError: `padded` has fewer than two axes, no row or no time step; or the permutation is not one; or the
            dtype cannot hold the padding value; or `first_step` is negative.

    Examples:
        >>> import torch
        >>> from collate import LengthTrackedBatch
        >>> batch = LengthTrackedBatch.from_sequences([torch.tensor([1, 2]), torch.tensor([3, 4, 5])])
        >>> batch.padded
        tensor([[3, 4, 5],
                [1, 2, 0]])
        >>> batch.lengths, batch.permutation
        (tensor([3, 2]), tensor([1, 0]))
        >>> batch.unsort().padded
        tensor([[1, 2, 0],
                [3, 4, 5]])
    """

    padded: Tensor
    lengths: Tensor
    # None is what they are before they are derived; the annotations say what they are afterwards.
    mask: Tensor = None  # type: ignore[assignment]
    permutation: Tensor = None  # type: ignore[assignment]
    padding_value: PaddingValue | None = None
    first_step: int = 0

    def __post_init__(self) -> None:
        rows, width = check_padded(self.padded)
        if not torch.compiler.is_compiling():
            check_parts(self, rows, width)
        if self.mask is None:
            object.__setattr__(self, "mask", device_mask(self.lengths, width, self.padded.device))
        if self.permutation is None:
            object.__setattr__(self, "permutation", torch.arange(rows, device="cpu"))
        if not torch.compiler.is_compiling():
            keep_lengths(self)

    @classmethod
    @outside_graphs
    def from_sequences(
        cls,
        sequences: Sequence[object],
        *,
        padding_value: PaddingValue = 0,
        order: Order = "longest",
        widths: Widths = None,
        lengths: IntegersLike | None = None,
    ) -> Self:
        """Pad a list of sequences into a batch.

        Args:
            sequences: B >= 1 tensors or arrays `[L_i, *F]` of one dtype and feature shape, or lists of numbers; L_i may
                be 0. Gradients flow back to tensors that require them.
            padding_value: What the padding holds; the dtype must be able to hold it.
            order: `"longest"` (longest row first, ties in source order), `"given"`, or a permutation `[B]`: row i is
                then `sequences[order[i]]`.
            widths: None (T is the longest length, at least 1), an int (T is a multiple of it), or the allowed T.
            lengths: Declared lengths `[B]` in source order, checked against the real ones.

        Raises:
            LengthError: There is no sequence, a declared length is not the real one, or a row is wider than `widths`.
            TypeError: Dtypes differ, or an entry is not a sequence of numbers.
            ValueError: Feature shapes differ, the order is no permutation, or the dtype cannot hold the padding value.
        """
        rows = measure_rows(sequences)
        if lengths is not None:
            check_declared(lengths, rows.lengths)
        permutation = row_order(rows.lengths, order)
        width = padded_width(int(rows.lengths.max()), check_widths(widths))
        return padded_batch(cls, rows, permutation, shape=(len(permutation), width), padding_value=padding_value)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        travels(cls)

    if not TYPE_CHECKING:
        # A type checker would take it as a promise that every attribute exists.
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(views.missing_attribute(self, name))

    # --- what it holds

    def __len__(self) -> int:
        return self.padded.shape[0]

    def __repr__(self) -> str:
        return views.describe_batch(self)

    @property
    def device(self) -> torch.device:
        """The device of `padded`; lengths and permutation are on the host."""
        return self.padded.device

    @property
    @outside_graphs
    def num_tokens(self) -> int:
        """Real time steps of all rows, a host integer."""
        return int(host_lengths(self).sum())

    @property
    @outside_graphs
    def padding_fraction(self) -> float:
        """Fraction of the B x T time steps that is padding."""
        return 1 - self.num_tokens / self.mask.numel()

    @outside_graphs
    def sequences(self) -> list[Tensor]:
        """The rows without their padding, in batch order: B views `[L_i, *F]`."""
        return [row[:length] for row, length in zip(self.padded, host_lengths(self).tolist(), strict=True)]

    @outside_graphs
    def flat(self) -> Tensor:
        """The real time steps of all rows, row after row: `[M, *F]`; gradients flow back to those steps only."""
        return gather_steps(self.padded, views.real_step_index(self))

    @outside_graphs
    def verify(self) -> None:
        """Check lengths, mask, permutation and padding against each other, the data included.

        On an accelerator this waits for the device. Padding is read where `padding_value` is known.

        Raises:
            LengthError: They do not agree; a real value in the padding reveals a length that is too small.
            TypeError: Lengths or permutation are not integers, or the mask is not bool.
            ValueError: The permutation is not one.
        """
        host_lengths(self)
        check_batch_lengths(self.lengths, len(self), self.padded.shape[1])
        check_permutation(self.permutation, len(self))
        check_mask(self.mask, self.lengths, self.padded)
        check_mask_values(self.mask, self.lengths)
        if self.padding_value is not None:
            check_padding_intact(self.padded, self.mask, self.padding_value)

    # --- new values, same lengths

    def with_padded(
        self, padded: Tensor, lengths: IntegersLike | None = None, *, first_step: int | None = None
    ) -> Self:
        """The same rows with new values.

        Args:
            padded: `[B, T', *G]` on any device, row i computed from row i; its padding counts as unspecified.
            lengths: int64 `[B]`, for values of another width (a strided convolution); None keeps lengths and width.
            first_step: Time steps before these, where a stride changes the number in a later chunk of `split_steps`;
                None keeps the batch's.

        Raises:
            LengthError: Rows or width differ without new lengths, or the new lengths do not fit.
            TypeError: Lengths or `first_step` are not integers.
            ValueError: `first_step` is negative.
        """
        return replace_values(self, padded, lengths, first_step)

    def map(self, module: Callable[[Tensor], Tensor]) -> Self:
        """The same rows after a module that works on every time step alone, such as an embedding or a linear layer.

        Raises:
            LengthError: The module changed the number of rows or time steps.
        """
        return self.with_padded(module(self.padded))

    @outside_graphs
    def pack(self) -> PackedSequence:
        """The rows that are not empty as a `PackedSequence`; lengths are never copied back from a device.

        Raises:
            LengthError: All rows are empty, or the lengths were changed and no longer fit.
        """
        return views.packing_map(self, self.device).pack(self.padded)

    @outside_graphs
    def unpack(self, packed: PackedSequence) -> Self:
        """A packed result as a batch of this one's rows, order and width; empty rows come back, padding is 0.

        Args:
            packed: Data `[M, *G]`, made from this batch's `pack()`.

        Raises:
            LengthError: It was packed from other lengths or another order.
        """
        if not host_lengths(self).any():
            raise LengthError("a packed batch cannot come from rows that are all empty: these are not its lengths")
        padded = views.packing_map(self, packed.data.device).unpack(packed)
        return changed_batch(self, padded=padded, padding_value=0)

    @overload
    def unsort(self) -> Self: ...
    @overload
    def unsort(self, tensor: Tensor, dim: int = 0) -> Tensor: ...
    def unsort(self, tensor: Tensor | None = None, dim: int = 0) -> Self | Tensor:
        """Back to source order: the whole batch, or any tensor that has one entry per row.

        Args:
            tensor: `[..., B, ...]` in batch order, for instance states `[layers, B, H]` with `dim=1`.
            dim: The axis of the rows.

        Raises:
            LengthError: The permutation, the lengths or the mask were written to.
            TypeError: The argument is no tensor.
            ValueError: The axis does not hold one entry per row.
        """
        if tensor is None:
            check_unwritten(self)
            return pieces.select_rows(self, self.permutation.argsort(stable=True))
        return unsort_tensor(self, tensor, dim)

    # --- in pieces

    def split(self, rows: int) -> list[Self]:
        """Pieces of at most `rows` rows, in batch order, as for gradient accumulation; `concat` joins them again.

        Raises:
            TypeError: `rows` is not an int.
            ValueError: `rows` is below one.
        """
        return pieces.split_rows(self, rows)

    @classmethod
    @outside_graphs
    def concat(cls, batches: Sequence["LengthTrackedBatch"]) -> Self:
        """One batch of all rows, in the order given, as wide as the widest.

        The pieces of a split batch keep the indices of their rows, and the result has the permutation of the whole.
        Otherwise source orders follow each other: the first batch's samples, then the second's. Batches count as pieces
        of one batch if together they hold each index from 0 once.

        Args:
            batches: At least one, of one dtype, device, feature shape and `first_step`.

        Raises:
            LengthError: There is no batch.
            ValueError: They differ in what must be the same.
        """
        return pieces.concat_batches(cls, batches)

    def split_steps(self, steps: int) -> list[Self]:
        """Chunks of at most `steps` time steps, for truncated back-propagation through time.

        All rows are in every chunk: one that has ended has length 0 in later chunks, so that states carried from chunk
        to chunk by `apply_rnn` keep their rows.

        Raises:
            TypeError: `steps` is not an int.
            ValueError: `steps` is below one.
        """
        return pieces.split_time_steps(self, steps)

    # --- elsewhere

    def to(
        self,
        device: torch.device | torch.dtype | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool | None = None,
    ) -> Self:
        """The batch with values and mask on another device, or of another dtype; lengths stay as they are.

        Args:
            device: The target; a dtype is taken here as well, as in `Tensor.to`.
            dtype: The new dtype of the values.
            non_blocking: None copies without waiting where the values are pinned.

        Returns:
            The batch itself where nothing changes. The mask is not copied but derived again from the lengths.
        """
        return pieces.move_batch(self, device, dtype, non_blocking)

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, from where `to(device)` copies without waiting.

        Raises:
            RuntimeError: There is no accelerator to pin memory for.
        """
        return changed_batch(self, padded=self.padded.pin_memory(), lengths=self.lengths.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses values and mask, as `Tensor.record_stream` does."""
        for tensor in (self.padded, self.mask):
            tensor.record_stream(cast("torch.cuda.Stream", stream))

    def __reduce__(self) -> tuple[object, ...]:
        return reduce(self)

    def __copy__(self) -> Self:
        check_unwritten(self)
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        check_unwritten(self)
        copied = memo[id(self)] = object.__new__(type(self))
        parts = {name: part for name, part in vars(self).items() if name != views.PACKING_MAP}
        copied.__dict__.update(deepcopy(parts, memo))
        return copied

    # --- for attention and for trainers

    @property
    def key_padding_mask(self) -> Tensor:
        """Mask bool `[B, T]`, True = padding, as `nn.MultiheadAttention` wants; an empty row's first step is False."""
        return views.hidden_keys(self)

    @property
    def cu_seqlens(self) -> Tensor:
        """Offsets int32 `[B + 1]` on the device of `padded`: where each row starts and ends in `flat()`.

        Raises:
            LengthError: The real time steps are more than int32 can count (not checked in compiled code).
        """
        return views.cumulative_lengths(self)

    @property
    @outside_graphs
    def position_ids(self) -> Tensor:
        """Index of each real time step in its sequence, in the order of `flat()`: int64 `[M]` on `device`."""
        return views.real_step_index(self) % self.padded.shape[1] + self.first_step

    @outside_graphs
    def nested(self) -> Tensor:
        """The rows as a jagged nested tensor `[B, j, *F]`; gradients flow."""
        return views.nested_tensor(self)

    def as_dict(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """A plain dict, for trainers that take nothing else.

        Args:
            names: The attribute for each key, such as `{"input_ids": "padded", "attention_mask": "mask"}`.

        Raises:
            ValueError: There is no such attribute.
        """
        return views.named_tensors(self, names)


# An instance's own mask comes first; the dataclass has taken the default of its field already.
LengthTrackedBatch.mask = DerivedMask()  # type: ignore[assignment]
