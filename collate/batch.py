"""LengthTrackedBatch: padded values and what is known of their lengths, kept together and kept true.

Axes, here and in the whole package: B rows, T steps, F feature axes, M real steps (`sum(lengths)`).
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, cast, overload

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.utils.rnn import PackedSequence

from collate.errors import LengthError
from collate.lengths.tracking import check_unwritten, host_lengths, keep_lengths, keep_lengths_that_fit
from collate.lengths.validation import (
    Integers,
    Order,
    check_declared,
    check_lengths,
    check_mask,
    check_mask_values,
    check_permutation,
    check_untouched,
    real_steps,
    row_order,
)
from collate.options import Number, check_padding_value, same_nan
from collate.packing import Layout, flat_places, gather_steps, scatter_steps
from collate.padding import Mask, Rows, join_rows, place_steps, read_rows, real_places
from collate.serialization import reduce, travels
from collate.tensors.graphs import outside_graphs
from collate.tensors.numpy_view import Int64Array, shares_memory, to_array
from collate.tensors.to_device import refuse_capture, to_device
from collate.widths import Widths, check_widths, padded_width

# What a field that is derived from the others is before it is: the annotation says what it is after.
_DERIVED = cast(Tensor, None)


@travels
@dataclass(frozen=True, eq=False, repr=False)
class LengthTrackedBatch:
    """A padded block of variable-length rows with their lengths, mask and permutation.

    Real steps come first in each row, padding after. Rows stand in batch order; `unsort` leads back to source order.
    Lengths and permutation stay on the host wherever the block goes. Lengths are not to be written to, which is noticed
    where they are used. A subclass may add methods, but no fields.

    Attributes:
        padded: `[B, T, *F]`, T >= 1, any dtype and device.
        lengths: int64 `[B]` on the host, real steps of each row, 0 to T.
        mask: bool `[B, T]` on the block's device, True where a step is real; derived when None.
        permutation: int64 `[B]` on the host; row i was sample `permutation[i]` of the list that was collated; the
            given order when None. A piece made by `split` keeps the places its rows had.
        padding_value: what the padding holds; None where that is unspecified, as after `with_padded`.
        first_step: steps of the sequences that came before this block: 0, but in later chunks of `split_steps`.

    Raises:
        LengthError: Lengths or mask do not agree with the block, or lengths are not on the host.
        TypeError: The block is no tensor, lengths or permutation are not integers, or the mask is not bool.
        ValueError: The block has fewer than two axes, no row or no step; or the permutation is none; or the dtype
            cannot hold the padding value; or `first_step` is negative.

    Example:
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
    mask: Tensor = _DERIVED
    permutation: Tensor = _DERIVED
    padding_value: Number | None = None
    first_step: int = 0

    # The other kind of batch, which stands above this module and puts itself here.
    varlen_class: ClassVar[Any] = None
    # What a varlen batch of labels has in steps without a label; here all real steps count.
    ignore_index: ClassVar[None] = None
    is_varlen: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rows, width = _block_shape(self.padded)
        if not torch.compiler.is_compiling():
            _check_first_step(self.first_step)
            # What the caller keeps and writes to is not the batch's.
            object.__setattr__(self, "lengths", _own(check_lengths(self.lengths, rows, width), self.lengths))
            keep_lengths(self)
            if self.mask is not None:
                check_mask(self.mask, self.lengths, self.padded)
            if self.permutation is not None:
                places = _own(check_permutation(self.permutation, rows), self.permutation)
                object.__setattr__(self, "permutation", places)
            if self.padding_value is not None:
                object.__setattr__(self, "padding_value", check_padding_value(self.padding_value, self.padded.dtype))
        if self.mask is None:
            object.__setattr__(self, "mask", real_steps(self.lengths, width, self.padded.device))
        if self.permutation is None:
            object.__setattr__(self, "permutation", torch.arange(rows))

    @classmethod
    @outside_graphs
    def from_sequences(
        cls,
        sequences: Sequence[object],
        *,
        padding_value: Number = 0,
        order: Order = "longest",
        widths: Widths = None,
        lengths: Integers | None = None,
    ) -> Self:
        """Pad a list of sequences into a batch.

        Args:
            sequences: B >= 1 tensors or arrays `[L_i, *F]` of one dtype and feature shape, or lists of numbers; L_i may
                be 0. Gradients flow back to tensors that require them.
            padding_value: what the padding holds; the dtype must be able to hold it.
            order: `"longest"` (longest row first, ties in source order), `"given"`, or a permutation `[B]`: row i is
                then `sequences[order[i]]`.
            widths: None (T is the longest length, at least 1), an int (T is a multiple of it), or the allowed T.
            lengths: declared lengths `[B]` in source order, held against the real ones.

        Raises:
            LengthError: There is no sequence, a declared length is not the real one, or a row is wider than `widths`.
            TypeError: Dtypes differ, or a sequence is not one.
            ValueError: Feature shapes differ, the order is no permutation, or the dtype cannot hold the padding value.
        """
        rows = read_rows(sequences)
        if lengths is not None:
            check_declared(lengths, rows.lengths)
        by = row_order(rows.lengths, order)
        width = padded_width(int(rows.lengths.max()), check_widths(widths))
        return cls.from_rows(rows, by, (len(by), width), padding_value)

    @classmethod
    def from_rows(cls, rows: Rows, order: Int64Array, shape: tuple[int, int], padding_value: Number) -> Self:
        """Pad rows that `collate.padding.read_rows` has checked; what `from_sequences` and the collator share.

        Args:
            rows: B rows.
            order: int64 `[B]`, a permutation.
            shape: rows (B, or more to be filled with empty rows) and width of the block.
            padding_value: what the padding holds.

        Raises:
            ValueError: The dtype cannot hold the padding value, or feature shapes differ.
        """
        value = check_padding_value(padding_value, rows.dtype)
        lengths, places = rows.lengths[order], order
        if shape[0] > len(order):
            lengths = np.append(lengths, np.zeros(shape[0] - len(order), np.int64))
            places = np.append(order, np.arange(len(order), shape[0]))
        real = real_places(lengths, shape[1])
        padded = _pad(rows, order, real, value)
        mask = torch.from_numpy(real) if padded.is_cpu else None
        return cls.trusted(padded, torch.from_numpy(lengths), mask, torch.from_numpy(places), padding_value=value)

    @classmethod
    def trusted(
        cls,
        padded: Tensor,
        lengths: Tensor,
        mask: Tensor | None,
        permutation: Tensor,
        *,
        padding_value: Number | None,
        first_step: int = 0,
    ) -> Self:
        """Make a batch whose parts are known to agree, without reading them again; the parts as in the class."""
        if mask is None:
            mask = real_steps(lengths, padded.shape[1], padded.device)
        batch = cls._of_parts((padded, lengths, mask, permutation), padding_value, first_step)
        if not torch.compiler.is_compiling():
            keep_lengths(batch)
        return batch

    @classmethod
    def rebuilt(cls, parts: Sequence[Any], padding_value: Number | None, first_step: int) -> Self:
        """Make a batch of parts that nobody looks at, which may be anything: what a pytree is put together from.

        Args:
            parts: padded, lengths, mask and permutation.
            padding_value: as in the class.
            first_step: as in the class.
        """
        batch = cls._of_parts(parts, padding_value, first_step)
        if not torch.compiler.is_compiling():
            keep_lengths_that_fit(batch)
        return batch

    @classmethod
    def _of_parts(cls, parts: Sequence[Any], padding_value: Number | None, first_step: int) -> Self:
        batch = object.__new__(cls)
        for name, part in zip(("padded", "lengths", "mask", "permutation"), parts, strict=True):
            object.__setattr__(batch, name, part)
        object.__setattr__(batch, "padding_value", padding_value)
        object.__setattr__(batch, "first_step", first_step)
        if padding_value is not None and not torch.compiler.is_compiling():
            object.__setattr__(batch, "padding_value", same_nan(padding_value))
        return batch

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        travels(cls)

    if not TYPE_CHECKING:
        # Type checkers would take it for a promise that every attribute is there.
        def __getattr__(self, name: str) -> Any:
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            if hasattr(Tensor, name):
                message += (
                    ": a batch is no tensor. A recurrent module runs on it by apply_rnn(rnn, batch), a module that "
                    "works on every step alone by batch.map(module); .padded is its block"
                )
            raise AttributeError(message)

    # --- what it holds

    def __len__(self) -> int:
        return self.padded.shape[0]

    def __repr__(self) -> str:
        if not isinstance(self.padded, Tensor) or not isinstance(self.lengths, Tensor):
            # A pytree of something else.
            return f"LengthTrackedBatch({self.padded!r}, {self.lengths!r}, {self.mask!r}, {self.permutation!r})"
        lengths = self.lengths.tolist()
        shown = str(lengths) if len(lengths) <= 8 else f"[{', '.join(map(str, lengths[:6]))}, ... {lengths[-1]}]"
        dtype = str(self.padded.dtype).removeprefix("torch.")
        padding = 1 - sum(lengths) / (self.padded.shape[0] * self.padded.shape[1])
        return (
            f"LengthTrackedBatch({list(self.padded.shape)} {dtype} on {self.device}, lengths={shown}, "
            f"padding {padding:.1%})"
        )

    @property
    def device(self) -> torch.device:
        """The padded block's device; lengths and permutation are on the host."""
        return self.padded.device

    @property
    @outside_graphs
    def num_tokens(self) -> int:
        """Real steps of all rows, a host integer."""
        return int(host_lengths(self).sum())

    @property
    @outside_graphs
    def padding_fraction(self) -> float:
        """Share of the block's B x T steps that are padding."""
        return 1 - self.num_tokens / self.mask.numel()

    @outside_graphs
    def sequences(self) -> list[Tensor]:
        """The rows without their padding, in batch order: B views `[L_i, *F]`."""
        return [row[:length] for row, length in zip(self.padded, host_lengths(self).tolist(), strict=True)]

    @outside_graphs
    def flat(self) -> Tensor:
        """The real steps of all rows, row after row: `[M, *F]`; gradients flow back to those steps only."""
        return gather_steps(self.padded, self.step_places())

    @outside_graphs
    def verify(self) -> None:
        """Hold lengths, mask, permutation and padding against each other, the data included.

        On an accelerator this waits for the device. Padding is read where `padding_value` is known.

        Raises:
            LengthError: They do not agree; a real value in the padding betrays a deflated length.
            TypeError: Lengths or permutation are not integers, or the mask is not bool.
            ValueError: The permutation is none.
        """
        host_lengths(self)
        check_lengths(self.lengths, len(self), self.padded.shape[1])
        check_permutation(self.permutation, len(self))
        check_mask(self.mask, self.lengths, self.padded)
        check_mask_values(self.mask, self.lengths)
        if self.padding_value is not None:
            check_untouched(self.padded, self.mask, self.padding_value)

    # --- new values, same tracking

    def with_padded(self, padded: Tensor, lengths: Integers | None = None) -> Self:
        """The same rows with new values.

        Args:
            padded: `[B, T', *G]` on any device, row i computed from row i; what its padding holds is left unspecified.
            lengths: int64 `[B]`, for values of another width (a strided convolution); None keeps lengths and width.

        Raises:
            LengthError: Rows or width differ without new lengths, or the new lengths do not fit.
        """
        if padded.shape[:2] != self.padded.shape[:2] and (lengths is None or len(padded) != len(self)):
            raise LengthError(
                f"new values must be [{len(self)}, {self.padded.shape[1]}, ...] like the batch, got "
                f"{list(padded.shape)}: pass lengths= where the number of steps changes, keep all rows"
            )
        if lengths is not None:
            return type(self)(padded, cast(Tensor, lengths), permutation=self.permutation)
        return self._changed(padded=padded, padding_value=None)

    def map(self, module: Callable[[Tensor], Tensor]) -> Self:
        """The same rows after a module that works on every step alone, such as an embedding or a linear layer.

        Raises:
            LengthError: The module changed the number of rows or steps.
        """
        return self.with_padded(module(self.padded))

    @outside_graphs
    def pack(self) -> PackedSequence:
        """The rows that are not empty as a `PackedSequence`; lengths are never copied back from a device.

        Raises:
            LengthError: All rows are empty, or the lengths were changed and no longer fit.
        """
        return self.packed_layout(self.device).pack(self.padded)

    @outside_graphs
    def unpack(self, packed: PackedSequence) -> Self:
        """A packed result as a batch of this one's rows, order and width; empty rows come back, padding is 0.

        Args:
            packed: data `[M, *G]`, made from this batch's `pack()`.

        Raises:
            LengthError: It was packed from other lengths or another order.
        """
        if not host_lengths(self).any():
            raise LengthError("a packed batch cannot come from rows that are all empty: these are not its lengths")
        padded = self.packed_layout(packed.data.device).unpack(packed)
        return self._changed(padded=padded, padding_value=0)

    @overload
    def unsort(self) -> Self: ...
    @overload
    def unsort(self, tensor: Tensor, dim: int = 0) -> Tensor: ...
    def unsort(self, tensor: Tensor | None = None, dim: int = 0) -> Self | Tensor:
        """Back to source order: the whole batch, or any tensor that has one entry per row.

        Args:
            tensor: `[..., B, ...]` in batch order, for instance states `[layers, B, H]` with `dim=1`.
            dim: the axis of the rows.

        Raises:
            ValueError: The axis does not hold one entry per row.
        """
        back = self.permutation.argsort(stable=True)
        if tensor is not None:
            if tensor.shape[dim] != len(self):
                raise ValueError(
                    f"axis {dim} must hold the batch's {len(self)} rows, got shape {list(tensor.shape)}: "
                    "pass dim=, the axis of the rows"
                )
            return tensor.index_select(dim, to_device(back, tensor.device))
        return self._rows(back)

    # --- in pieces

    def split(self, rows: int) -> list[Self]:
        """Pieces of at most `rows` rows, in batch order, as for gradient accumulation; `concat` joins them again.

        Raises:
            ValueError: `rows` is below one.
        """
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        return [self._rows(part) for part in torch.arange(len(self)).split(rows)]

    @classmethod
    @outside_graphs
    def concat(cls, batches: Sequence["LengthTrackedBatch"]) -> Self:
        """One batch of all rows, in the order given, as wide as the widest.

        The pieces of a split batch keep their places, so that the whole has its permutation again; otherwise source
        orders follow each other: the first batch's samples, then the second's. Only places tell pieces: what together
        holds each place from 0 once is taken for one whole, also where the pieces are of different batches.

        Args:
            batches: at least one, of one dtype, device, feature shape and `first_step`.

        Raises:
            LengthError: There is no batch.
            ValueError: They differ in what must be the same.
        """
        if not batches:
            raise LengthError("concat needs at least one batch, got none")
        kinds = {(b.padded.dtype, b.device, b.padded.shape[2:], b.first_step) for b in batches}
        if len(kinds) > 1:
            raise ValueError(
                f"batches must share dtype, device, feature shape and first step, got {sorted(map(str, kinds))}"
            )
        values = {b.padding_value for b in batches}
        value = values.pop() if len(values) == 1 else None
        width = max(b.padded.shape[1] for b in batches)
        padded = torch.cat([_widened(b.padded, width, 0 if value is None else value) for b in batches])
        for batch in batches:
            check_unwritten(batch)
        lengths = torch.cat([b.lengths for b in batches])
        places, first_step = joined_places(batches), batches[0].first_step
        return cls.trusted(padded, lengths, None, places, padding_value=value, first_step=first_step)

    def split_steps(self, steps: int) -> list[Self]:
        """Chunks of at most `steps` steps, for truncated back-propagation through time.

        All rows are in every chunk: one that has ended has length zero in the later ones, so that states carried from
        chunk to chunk by `apply_rnn` stay where they are.

        Raises:
            ValueError: `steps` is below one.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        starts = range(0, self.padded.shape[1], steps)
        return [self._steps(start, min(start + steps, self.padded.shape[1])) for start in starts]

    # --- elsewhere

    def to(
        self,
        device: torch.device | torch.dtype | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool | None = None,
    ) -> Self:
        """The batch with its block and mask on another device, or of another dtype; lengths stay as they are.

        Args:
            device: where to; a dtype may stand here as well, as in `Tensor.to`.
            dtype: the block's new dtype.
            non_blocking: None copies without waiting where the block is pinned.

        Returns:
            The batch itself where nothing changes. The mask is not copied but made anew from the lengths.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        wait_not = self.padded.is_pinned() if non_blocking is None and not self.padded.is_cuda else bool(non_blocking)
        padded = self.padded.to(device=device, dtype=dtype, non_blocking=wait_not)
        if padded is self.padded:
            return self
        value = self.padding_value
        if value is not None and padded.dtype != self.padded.dtype:
            value = same_nan(torch.tensor(value, dtype=self.padded.dtype).to(padded.dtype).item())
        return self._changed(padded=padded, padding_value=value)

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, from where `to(device)` copies without waiting.

        Raises:
            RuntimeError: There is no accelerator to pin memory for.
        """
        return self._changed(padded=self.padded.pin_memory(), lengths=self.lengths.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the block and the mask, as `Tensor.record_stream` does."""
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
        copied.__dict__.update({name: deepcopy(part, memo) for name, part in self.__dict__.items()})
        return copied

    # --- for attention and for trainers

    @property
    def key_padding_mask(self) -> Tensor:
        """Mask bool `[B, T]`, True = padding, as `nn.MultiheadAttention` wants; an empty row's first step is open."""
        check_unwritten(self)
        hidden = ~self.mask
        # A row that may attend to nothing gives NaN.
        hidden[:, 0] = False
        return hidden

    @property
    def cu_seqlens(self) -> Tensor:
        """Bounds int32 `[B + 1]` on the block's device: where each row starts and ends in `flat()`."""
        if torch.compiler.is_compiling():
            return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(self.device, torch.int32)
        ends = np.zeros(len(self) + 1, np.int32)
        np.cumsum(host_lengths(self), out=ends[1:])
        return to_device(torch.from_numpy(ends), self.device)

    @property
    @outside_graphs
    def position_ids(self) -> Tensor:
        """Places int64 `[M]` on the block's device: each real step's in its sequence, in the order of `flat()`."""
        return self.step_places() % self.padded.shape[1] + self.first_step

    @outside_graphs
    def nested(self) -> Tensor:
        """The rows as a jagged nested tensor `[B, j, *F]`; gradients flow."""
        lengths = host_lengths(self)
        offsets = self.cu_seqlens.to(torch.int64)
        return torch.nested.nested_tensor_from_jagged(
            self.flat(), offsets, min_seqlen=int(lengths.min()), max_seqlen=max(int(lengths.max()), 1)
        )

    def as_dict(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """A plain dict, for trainers that take nothing else.

        Args:
            names: the attribute that each key holds, such as `{"input_ids": "padded", "attention_mask": "mask"}`.

        Raises:
            ValueError: There is no such attribute.
        """
        check_unwritten(self)
        known = ("padded", "lengths", "mask", "permutation", "key_padding_mask", "cu_seqlens", "position_ids")
        for key, attribute in names.items():
            if attribute not in known:
                raise ValueError(f"{key!r} names {attribute!r}, which is none of {', '.join(known)}")
        return {key: getattr(self, attribute) for key, attribute in names.items()}

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
        documents_per_row: Integers | None = None,
    ) -> Any:
        """The sequences as the documents of a `VarlenBatch`, several in each row; gradients flow.

        Args:
            capacity: steps of a row; None puts all into one row.
            rows: as in `VarlenBatch.from_sequences`, as are the options that follow.
            align: documents start at its multiples.
            max_documents: documents that a row may have.
            max_seqlen: the bound that kernels are told.
            arrange: `"given"` cuts rows from the batch in its order, `"best-fit"` fills as few as hold it.
            documents_per_row: int64 `[R]`, how many sequences go into each row, in batch order; in place of `arrange`.

        Raises:
            LengthError: The rows do not hold the sequences.
            ValueError: An option means nothing, or this is a later chunk of `split_steps`.
        """
        if self.first_step:
            raise ValueError("a later chunk of split_steps cannot be put into other rows: convert the whole batch")
        options: dict[str, Any] = {"capacity": capacity, "rows": rows, "align": align, "max_documents": max_documents}
        options |= {"max_seqlen": max_seqlen, "arrange": arrange}
        return self.varlen_class.from_padded(self, options, documents_per_row)

    # --- what losses, means and recurrent modules read of both kinds of batch

    @property
    def block(self) -> Tensor:
        """The padded values, `[B, T, *F]`."""
        return self.padded

    def with_block(self, block: Tensor, padding_value: Number | None) -> Self:
        """New values `[B, T, *G]` of the same steps, with what the padding holds; the mask stays."""
        return self._changed(padded=block, padding_value=padding_value)

    def host_lengths(self) -> Int64Array:
        """The lengths that the batch was made with: int64 `[B]`, not to be written to.

        Raises:
            LengthError: They were written to since.
        """
        return host_lengths(self)

    def check_unwritten(self) -> None:
        """Check that lengths are those that the batch was made with; compiled code is not looked at.

        Raises:
            LengthError: They were written to.
        """
        check_unwritten(self)

    def step_places(self) -> Tensor:
        """Places of the real steps in `[0, B * T)`, row after row: int64 `[M]` on the block's device."""
        return flat_places(host_lengths(self), self.padded.shape[1], self.device)

    def sum_sequences(self, steps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Sums over each row of something that has one entry per step: `[B, T, *G]` -> `[B, *G]`, of a wider dtype."""
        return steps.sum(1, dtype=dtype)

    def pick_sequences(self, sums: Tensor) -> Tensor:
        """The rows' own entries of what `sum_sequences` gives: all of them."""
        return sums

    def spread_weights(self, weights: Tensor) -> Tensor | None:
        """Nothing: weights of rows are `[B, T]`, where one for each of B rows could be meant for T steps."""
        del weights
        return None

    def last_values(self) -> tuple[Tensor, Tensor]:
        """Each row's value at its last real step, `[B, *F]`, and whether it has one, bool `[B]`."""
        last = (self.mask.sum(1) - 1).clamp(min=0)
        return self.padded[torch.arange(len(self), device=self.device), last], self.mask[:, 0]

    def difference(self, other: "LengthTrackedBatch") -> str | None:
        """What keeps another batch from being of the same steps of the same rows; None where nothing does."""
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

    # --- shared by the methods above

    def packed_layout(self, device: torch.device) -> Layout:
        """How the rows lie in a `PackedSequence`; found once."""
        refuse_capture(device)
        lengths, width = host_lengths(self), self.padded.shape[1]
        known: Layout | None = self.__dict__.get("_known_layout")
        if known is None or not known.is_of(lengths, device):
            # What packs is mostly unpacked too; a frozen dataclass is written to through its dictionary.
            known = self.__dict__["_known_layout"] = Layout.of(lengths, width, device)
        return known

    def _changed(self, **parts: Any) -> Self:
        """The batch with some parts replaced, unread; the mask is made anew where the block went elsewhere."""
        check_unwritten(self)
        known = {part.name: getattr(self, part.name) for part in fields(self)}
        if parts["padded"].device != self.device:
            known["mask"] = None
        return self.trusted(**(known | parts))

    def _rows(self, rows: Tensor) -> Self:
        places = self.permutation[rows]
        index = to_device(rows, self.device)
        padded, mask = self.padded.index_select(0, index), self.mask.index_select(0, index)
        return self._changed(padded=padded, lengths=self.lengths[rows], mask=mask, permutation=places)

    def _steps(self, start: int, stop: int) -> Self:
        lengths = (self.lengths - start).clamp(0, stop - start)
        padded, mask = self.padded[:, start:stop], self.mask[:, start:stop]
        return self._changed(padded=padded, lengths=lengths, mask=mask, first_step=self.first_step + start)


def _pad(rows: Rows, order: Int64Array, real: Mask, value: Number) -> Tensor:
    if not rows.are_short:
        return join_rows(rows, order, real.shape, value)
    steps = rows.join(rows.in_order(order), int(rows.lengths.sum()))
    if _is_differentiated(steps) or not steps.is_cpu:
        return scatter_steps(steps, to_device(np.flatnonzero(real), steps.device), real.shape, value)
    return place_steps(steps, real, rows.dtype, value)


def _is_differentiated(steps: Tensor) -> bool:
    """Whether something must flow through what is done to a tensor, which NumPy would keep back."""
    return steps.requires_grad or not shares_memory(steps) or unpack_dual(steps).tangent is not None


def _own(checked: Tensor, given: object) -> Tensor:
    """What was checked, in memory of its own: as it is where checking made it anew."""
    return checked.clone() if checked is given else checked


def _check_first_step(steps: object) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"first_step must be an int, got {steps!r}")
    if steps < 0:
        raise ValueError(f"first_step must not be negative, got {steps}")


def _block_shape(padded: Tensor) -> tuple[int, int]:
    if not isinstance(padded, Tensor):
        raise TypeError(f"padded must be a tensor [B, T, ...], got {type(padded).__name__}: torch.as_tensor makes one")
    if padded.dim() < 2 or padded.shape[0] < 1 or padded.shape[1] < 1:
        raise ValueError(f"padded must be [B, T, ...] with at least one row and one step, got {list(padded.shape)}")
    return padded.shape[0], padded.shape[1]


def _widened(padded: Tensor, width: int, value: Number) -> Tensor:
    missing = width - padded.shape[1]
    if not missing:
        return padded
    return torch.cat([padded, padded.new_full((len(padded), missing, *padded.shape[2:]), value)], 1)


class HasPermutation(Protocol):
    """What has places, one for each of its sequences."""

    @property
    def permutation(self) -> Tensor:
        """Places, int64 `[N]` on the host."""

    def __len__(self) -> int: ...


def joined_places(batches: Sequence[HasPermutation]) -> Tensor:
    """The permutation of several batches' sequences, one after the other; see `LengthTrackedBatch.concat`."""
    places = torch.cat([batch.permutation for batch in batches])
    if np.array_equal(np.sort(to_array(places)), np.arange(len(places))):
        return places
    starts = np.cumsum([0, *map(len, batches)])
    ranks = [np.argsort(np.argsort(to_array(batch.permutation))) for batch in batches]
    return torch.from_numpy(np.concatenate([rank + start for rank, start in zip(ranks, starts, strict=False)]))
