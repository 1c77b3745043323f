"""What a `VarlenBatch` gives to kernels: block masks, dense masks, keyword arguments, and attention itself."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from collate.errors import LengthError
from collate.tensors.graphs import outside_graphs
from collate.tensors.masks import expand_like
from collate.tensors.numpy_view import Int64Array
from collate.tensors.to_device import to_device
from collate.varlen.kernels.block_masks import BlockRows, make_block_mask
from collate.varlen.kernels.kernel_arguments import Kernel, arguments_of
from collate.varlen.kernels.mask_kinds import (
    MaskFunction,
    MaskKind,
    MaskOptions,
    check_mask_options,
    dense_mask,
    mask_function,
    step_ids,
)
from collate.varlen.offsets import document_starts
from collate.varlen.views import DocumentViews
from collate.widths import check_count

_SMALLEST_BLOCK: Final = 16


class KernelViews(DocumentViews):
    """Views of a `VarlenBatch` for kernels."""

    @outside_graphs
    def block_mask(
        self,
        kind: MaskKind = "causal",
        *,
        window: int | None = None,
        prefix: int | Sequence[int] | Tensor | None = None,
        block_size: int = 128,
    ) -> BlockMask:
        """The mask of these documents for `flex_attention`, made from host lengths, without a mask of all pairs.

        Equal to what `create_block_mask` makes, in counts and in the indices that they count. A step of a gap sees
        itself only.

        Args:
            kind: which steps of its own document a step sees: `"causal"`: those before it, and itself;
                `"bidirectional"`: all; `"sliding"`: the last `window`; `"prefix"`: as causal, and the first `prefix`
                steps.
            window: for `"sliding"`: how many steps a step sees, itself included.
            prefix: for `"prefix"`: one number, or int `[N]` on the host, documents in row order.
            block_size: steps of a block, a multiple of 16; flex takes 128 where nothing else is said.

        Returns:
            Tables `[R, 1, blocks, blocks]` on the values' device, of one shape for all batches of R x C.

        Raises:
            LengthError: There is not one prefix for each document, or one is negative or on a device.
            TypeError: An option is not an integer.
            ValueError: There is no such kind, an option is missing or of another kind, or `block_size` is no multiple
                of 16.
        """
        options = self._in_this_chunk(check_mask_options(kind, window, prefix, self._whole_lengths()))
        size = check_count("block_size", block_size, least=1, hint="flex takes 128")
        if size % _SMALLEST_BLOCK:
            raise ValueError(f"block_size must be a multiple of {_SMALLEST_BLOCK}, got {size}: flex takes 128")
        capacity = self.offsets.shape[1]
        per_row, lengths = self.documents_per_row.numpy(), self.host_lengths()
        starts = document_starts(lengths, per_row, capacity, self.align)
        blocks = BlockRows.of(lengths, starts, per_row, capacity=capacity, block_size=size, prefix=options.prefix)
        return make_block_mask(blocks, options, self._allowed(options), capacity=capacity, device=self.device)

    @outside_graphs
    def attention_mask(
        self,
        kind: MaskKind = "causal",
        *,
        window: int | None = None,
        prefix: int | Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """All pairs of steps of each row, True where a query may see a key: bool `[R, 1, C, C]`.

        For `scaled_dot_product_attention`, whose `attn_mask` it is. It takes C x C bytes for each row.

        Args:
            kind: as in `block_mask`.
            window: as in `block_mask`.
            prefix: as in `block_mask`.

        Raises:
            LengthError: There is not one prefix for each document, or one is negative or on a device.
            TypeError: An option is not an integer.
            ValueError: There is no such kind, or an option is missing or of another kind.
        """
        options = self._in_this_chunk(check_mask_options(kind, window, prefix, self._whole_lengths()))
        return dense_mask(self._allowed(options), *self.offsets.shape, self.device)

    @outside_graphs
    def kwargs_for(
        self,
        kernel: Kernel,
        *,
        kind: MaskKind = "causal",
        window: int | None = None,
        prefix: int | Sequence[int] | Tensor | None = None,
    ) -> dict[str, Any]:
        """What a kernel or a model is called with next to its values, under the names that it has for them.

        Args:
            kernel: `"sdpa"`, `"flex_attention"`, `"varlen_attn"` (all three of torch), `"flash_attn"`
                (`flash_attn_varlen_func`), `"fla"` (flash-linear-attention), `"mamba"` (`seq_idx` of mamba-ssm and
                causal-conv1d), `"transformer_engine"` (`DotProductAttention`), `"transformers"`, or
                `"transformers_flash"` for its models with FlashAttention.
            kind: as in `block_mask`; not every kernel has all kinds.
            window: as in `block_mask`.
            prefix: as in `block_mask`.

        Returns:
            Keyword arguments. Kernels with offsets take values `[R * C, ...]`, fla one row `[1, R * C, ...]`, the
            others `[R, ...]`.

        Raises:
            LengthError: There is not one prefix for each document, or one is negative or on a device.
            TypeError: An option is not an integer.
            ValueError: There is no such kernel or kind, the kernel has no such kind, or an option is missing.
        """
        return arguments_of(self, kernel, check_mask_options(kind, window, prefix, self._whole_lengths()))

    @outside_graphs
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        kind: MaskKind = "causal",
        window: int | None = None,
        prefix: int | Sequence[int] | Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of every step within its document, with the best of torch's kernels for the device.

        On CUDA, half precision goes to `varlen_attn`, except for `"prefix"`. Everything else goes to
        `scaled_dot_product_attention` with a dense mask, which gives the same numbers on any device.

        Args:
            query: `[R, C, H, D]`.
            key: `[R, C, G, D]`; H is a multiple of G.
            value: `[R, C, G, D]`.
            kind: as in `block_mask`.
            window: as in `block_mask`.
            prefix: as in `block_mask`.
            scale: of the scores; None is 1 / sqrt(D).

        Returns:
            `[R, C, H, D]`; what gaps give is unspecified, and what they hold, NaN too, reaches no document.

        Raises:
            LengthError: Rows or steps are not those of the batch; or as in `block_mask`.
            TypeError: An option is not an integer.
            ValueError: There is no such kind, or an option is missing or of another kind.
        """
        shape = tuple(self.offsets.shape)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 4 or tuple(tensor.shape[:2]) != shape:
                raise LengthError(f"{name} must be {[*shape]} and heads and features, got {list(tensor.shape)}")
        options = self._in_this_chunk(check_mask_options(kind, window, prefix, self._whole_lengths()))
        grouped = query.shape[2] != key.shape[2]
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and options.kind != "prefix":
            # The module imports the whole compiler, which takes as long as importing torch.
            varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
            flat = (part.flatten(0, 1) for part in (query, key, value))
            arguments = arguments_of(self, "varlen_attn", options)
            output: Tensor = varlen_attn(*flat, **arguments, scale=scale, enable_gqa=grouped)
            return output.view(query.shape)
        mask = dense_mask(self._allowed(options), shape[0], shape[1], self.device)
        heads_first = [part.transpose(1, 2) for part in self._without_gaps(query, key, value)]
        output = scaled_dot_product_attention(
            heads_first[0], heads_first[1], heads_first[2], attn_mask=mask, scale=scale, enable_gqa=grouped
        )
        return output.transpose(1, 2)

    def _whole_lengths(self) -> Int64Array:
        """Steps of each document up to here, those in earlier chunks of `split_steps` too: int64 `[N]`."""
        return self.host_lengths() + self.spans.array("first_steps")

    def _in_this_chunk(self, options: MaskOptions) -> MaskOptions:
        """Options whose prefix counts the steps of this chunk only: others of it were in earlier ones."""
        if options.prefix is None:
            return options
        rest = np.maximum(options.prefix - self.spans.array("first_steps"), 0)
        return replace(options, prefix=rest)

    def _without_gaps(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Tensors `[R, C, ...]` with 0 in gaps: a dense mask gives those the weight 0, but 0 times NaN is NaN."""
        if not self.padding_fraction:
            return parts
        return tuple(torch.where(expand_like(self.mask, part), part, 0) for part in parts)

    def _allowed(self, options: MaskOptions) -> MaskFunction:
        """Which pairs of steps are allowed, as a function of indices on the values' device."""
        ids = self.document_ids
        ends = None
        if options.prefix is not None:
            ends = self._prefix_ends(options.prefix)
        return mask_function(options.kind, step_ids(ids), window=options.window, prefix_ends=ends)

    def _prefix_ends(self, prefix: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        """Where the prefix of each step's document ends in its row: int32 `[R, C]`; 0 in gaps."""
        rows, capacity = self.offsets.shape
        per_row = self.documents_per_row.numpy()
        row_starts = np.repeat(np.arange(rows) * capacity, per_row)
        ends = document_starts(self.host_lengths(), per_row, capacity, self.align) - row_starts + prefix
        # Document -1, a gap, takes the first entry.
        table = to_device(np.append(0, ends).astype(np.int32), self.device)
        return table.index_select(0, (self.document_ids + 1).flatten()).view(rows, capacity)
