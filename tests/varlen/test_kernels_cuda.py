"""What only a GPU can show of kernels: flex with its backward pass, `varlen_attn`, and tables made without waiting."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from collate import VarlenBatch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

KINDS = {"causal": {}, "bidirectional": {}, "sliding": {"window": 100}, "prefix": {"prefix": 50}}


def case(dtype: torch.dtype) -> tuple[VarlenBatch, list[Tensor], Tensor]:
    """A batch of two rows, query, key and value `[2, 700, 4, 64]`, and the output's gradient."""
    torch.manual_seed(0)
    documents = [torch.zeros(n, 4, 64) for n in (400, 300, 0, 290, 130, 1, 77)]
    batch = VarlenBatch.from_sequences(documents, capacity=700, align=4, max_documents=6).to("cuda", dtype)
    shape = batch.values.shape
    parts = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    return batch, parts, torch.randn(shape, device="cuda", dtype=dtype)


def with_gradients(output: Tensor, parts: list[Tensor], gradient: Tensor, mask: Tensor) -> list[Tensor]:
    real = mask[..., None, None]
    return [output.detach() * real, *torch.autograd.grad(output, parts, gradient * real)]


def dense(batch: VarlenBatch, parts: list[Tensor], kind: str) -> Tensor:
    heads_first = [part.transpose(1, 2) for part in parts]
    mask = batch.kwargs_for("sdpa", kind=kind, **KINDS[kind])
    return F.scaled_dot_product_attention(*heads_first, **mask).transpose(1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_flex_gives_the_numbers_and_the_gradients_of_the_dense_mask(kind: str) -> None:
    batch, parts, gradient = case(torch.float32)
    blocks = batch.block_mask(kind, **KINDS[kind])
    output = torch.compile(flex_attention)(*(part.transpose(1, 2) for part in parts), block_mask=blocks).transpose(1, 2)
    found = with_gradients(output, parts, gradient, batch.mask)
    expected = with_gradients(dense(batch, parts, kind), parts, gradient, batch.mask)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "sliding"])
def test_varlen_attn_gives_the_numbers_and_the_gradients_of_the_dense_mask(kind: str) -> None:
    batch, parts, gradient = case(torch.bfloat16)
    output = batch.attend(*parts, kind=kind, **KINDS[kind])
    found = with_gradients(output, parts, gradient, batch.mask)
    expected = with_gradients(dense(batch, parts, kind), parts, gradient, batch.mask)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_block_masks_are_made_on_the_device_without_waiting(kind: str) -> None:
    batch, _, _ = case(torch.float32)
    option = KINDS[kind]
    expected = batch.to("cpu").block_mask(kind, **option)
    batch.block_mask(kind, **option)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = batch.block_mask(kind, **option)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_indices", "q_indices", "full_q_num_blocks", "full_q_indices"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
