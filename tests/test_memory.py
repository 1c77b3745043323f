"""find_max_tokens: real allocations, a real limit, and nothing left changed."""

import pytest
import torch
from torch import nn

from collate import find_max_tokens
from collate.memory import _is_out_of_memory, peak_resident

MEGABYTE = 1 << 20


def allocate(bytes_per_token):
    def step(rows, width):
        torch.ones(rows * width * bytes_per_token, dtype=torch.uint8)

    return step


def test_the_answer_is_close_to_what_the_limit_holds():
    used = peak_resident()
    limit = used + 512 * MEGABYTE
    tokens = find_max_tokens(allocate(4096), [(1, 16), (1, 64), (1, 256)], device="cpu", limit=limit, share=1.0)
    assert 0.7 * 131_072 <= tokens <= 1.3 * 131_072


def test_the_width_that_needs_most_decides():
    def quadratic(rows, width):
        torch.ones(rows * width * width * 64, dtype=torch.uint8)

    limit = peak_resident() + 400 * MEGABYTE
    narrow = find_max_tokens(quadratic, [64], device="cpu", limit=limit, share=1.0)
    wide = find_max_tokens(quadratic, [64, 512], device="cpu", limit=limit, share=1.0)
    assert narrow > 4 * wide


def test_the_greatest_budget_to_try_is_kept():
    assert find_max_tokens(allocate(1), [10], device="cpu", limit=1 << 40, most=1000) == 1000


def test_weights_gradients_buffers_optimizer_and_random_state_are_given_back():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = [weight.grad.clone() for weight in module.parameters()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    random = torch.get_rng_state()

    def step(rows, width):
        optimizer.zero_grad()
        module(torch.randn(rows * width, 4)).square().sum().backward()
        optimizer.step()

    find_max_tokens(step, [4], device="cpu", limit=1 << 40, most=64, module=module, optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(w.grad, g) for w, g in zip(module.parameters(), gradients, strict=True))
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("shapes", "options", "kind", "message"),
    [
        ([], {"limit": 1}, ValueError, "shapes must name widths"),
        ([0], {"limit": 1}, ValueError, "shapes must name widths of at least 1"),
        ([8], {}, ValueError, "limit must be given on cpu"),
        ([8], {"limit": 1, "share": 0}, ValueError, "share must be above 0"),
        ([8], {"limit": 1}, MemoryError, "not even one row of 8 steps fits in 0 bytes"),
    ],
)
def test_what_cannot_be_answered_is_refused(shapes, options, kind, message):
    with pytest.raises(kind, match=message):
        find_max_tokens(allocate(1), shapes, device="cpu", **options)


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"])
def test_every_library_s_words_for_lack_of_memory_are_known(words):
    assert _is_out_of_memory(RuntimeError(words))
    assert _is_out_of_memory(torch.OutOfMemoryError())
    assert not _is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
