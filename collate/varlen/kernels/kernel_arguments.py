"""What each kernel or model is called with next to its values: keyword arguments by the names that it has for them.

Every segment counts as a sequence for kernels that take offsets: documents, and gaps too, so that no document sees a
gap. Slots that are not used are sequences of no steps.
"""

from collections.abc import Callable
from typing import Any, Final, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from collate.varlen.kernels.mask_kinds import MaskOptions

Kernel: TypeAlias = Literal[
    "flash_attn",
    "flex_attention",
    "fla",
    "mamba",
    "sdpa",
    "transformer_engine",
    "transformers",
    "transformers_flash",
    "varlen_attn",
]
"""Kernels whose arguments `VarlenBatch.kwargs_for` makes."""


class KernelBatch(Protocol):
    """What kernels need to know of a varlen batch, which is defined above this room."""

    @property
    def cu_seqlens(self) -> Tensor:
        """Bounds of all segments."""

    @property
    def cu_seqlens_padded(self) -> Tensor:
        """Bounds of documents with their alignment."""

    @property
    def cu_seqlens_real(self) -> Tensor:
        """Real steps before each of these."""

    @property
    def position_ids(self) -> Tensor:
        """Positions in documents."""

    @property
    def max_seqlen(self) -> int:
        """A bound of all lengths."""

    @property
    def values(self) -> Tensor:
        """The rows."""

    def attention_mask(self, kind: Any = "causal", *, window: int | None = None, prefix: Any = None) -> Tensor:
        """All pairs of steps."""

    def block_mask(self, kind: Any = "causal", *, window: int | None = None, prefix: Any = None) -> Any:
        """Blocks of them."""


def arguments_of(batch: KernelBatch, kernel: str, options: MaskOptions) -> dict[str, Any]:
    """Keyword arguments of a kernel.

    Raises:
        ValueError: There is no such kernel, or it has no such kind of mask.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel must be one of {', '.join(get_args(Kernel))}, got {kernel!r}")
    make, kinds = _KERNELS[kernel]
    if options.kind not in kinds:
        raise ValueError(
            f"{kernel} has no {options.kind} attention between the steps of a document, it has {', '.join(kinds)}; "
            "flex_attention and sdpa have all kinds"
        )
    return make(batch, options)


def _mask_arguments(options: MaskOptions) -> dict[str, Any]:
    """A kind of mask as the methods of the batch take it."""
    window = options.window if options.kind == "sliding" else None
    prefix = None if options.prefix is None else torch.from_numpy(options.prefix)
    return {"kind": options.kind, "window": window, "prefix": prefix}


def _sdpa(batch: KernelBatch, options: MaskOptions) -> dict[str, Any]:
    return {"attn_mask": batch.attention_mask(**_mask_arguments(options))}


def _flex(batch: KernelBatch, options: MaskOptions) -> dict[str, Any]:
    return {"block_mask": batch.block_mask(**_mask_arguments(options))}


def _window(options: MaskOptions) -> tuple[int, int]:
    """Steps that a step sees before and behind itself, -1 where that is not limited."""
    if options.kind == "bidirectional":
        return (-1, -1)
    return (options.window - 1 if options.kind == "sliding" else -1, 0)


def _varlen_attn(batch: KernelBatch, options: MaskOptions) -> dict[str, Any]:
    bounds = {"cu_seq_q": batch.cu_seqlens, "cu_seq_k": batch.cu_seqlens}
    return {**bounds, "max_q": batch.max_seqlen, "max_k": batch.max_seqlen, "window_size": _window(options)}


def _flash_attn(batch: KernelBatch, options: MaskOptions) -> dict[str, Any]:
    bounds = {"cu_seqlens_q": batch.cu_seqlens, "cu_seqlens_k": batch.cu_seqlens}
    longest = {"max_seqlen_q": batch.max_seqlen, "max_seqlen_k": batch.max_seqlen}
    return {**bounds, **longest, "causal": options.kind != "bidirectional", "window_size": _window(options)}


def _transformer_engine(batch: KernelBatch, options: MaskOptions) -> dict[str, Any]:
    real, padded = batch.cu_seqlens_real, batch.cu_seqlens_padded
    return {
        "qkv_format": "thd",
        "attn_mask_type": "padding" if options.kind == "bidirectional" else "padding_causal",
        "cu_seqlens_q": real,
        "cu_seqlens_kv": real,
        "cu_seqlens_q_padded": padded,
        "cu_seqlens_kv_padded": padded,
        "max_seqlen_q": batch.max_seqlen,
        "max_seqlen_kv": batch.max_seqlen,
        "window_size": _window(options),
    }


def _transformers(batch: KernelBatch, options: MaskOptions) -> dict[str, Any]:
    # With a cache the models do not look for documents in the positions, and a 2-D mask switches that off as well.
    mask = None if options.kind == "causal" else batch.attention_mask(**_mask_arguments(options))
    return {"position_ids": batch.position_ids, "attention_mask": mask, "use_cache": False}


def _transformers_flash(batch: KernelBatch, options: MaskOptions) -> dict[str, Any]:
    bounds = {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
    longest = {"max_length_q": batch.max_seqlen, "max_length_k": batch.max_seqlen}
    return {**_transformers(batch, options), **bounds, **longest}


def _fla(batch: KernelBatch, options: MaskOptions) -> dict[str, Any]:
    return {"cu_seqlens": batch.cu_seqlens.long()}


def _mamba(batch: KernelBatch, options: MaskOptions) -> dict[str, Any]:
    rows, capacity = batch.values.shape[:2]
    steps = torch.arange(rows * capacity, dtype=torch.int32, device=batch.values.device)
    # The segment of each step: gaps have numbers of their own, since kernels take negative ones for the row's end.
    segment = torch.searchsorted(batch.cu_seqlens[1:].contiguous(), steps, right=True, out_int32=True)
    return {"seq_idx": segment.view(rows, capacity)}


_ALL_KINDS: Final = ("causal", "bidirectional", "sliding", "prefix")
_OFFSET_KINDS: Final = ("causal", "bidirectional", "sliding")

# What makes the arguments of each kernel, and its kinds of mask.
_KERNELS: Final[dict[str, tuple[Callable[[KernelBatch, MaskOptions], dict[str, Any]], tuple[str, ...]]]] = {
    "sdpa": (_sdpa, _ALL_KINDS),
    "flex_attention": (_flex, _ALL_KINDS),
    "varlen_attn": (_varlen_attn, _OFFSET_KINDS),
    "flash_attn": (_flash_attn, _OFFSET_KINDS),
    "transformer_engine": (_transformer_engine, _OFFSET_KINDS),
    "transformers": (_transformers, _ALL_KINDS),
    "transformers_flash": (_transformers_flash, ("causal",)),
    "fla": (_fla, ("causal",)),
    "mamba": (_mamba, ("causal",)),
}
