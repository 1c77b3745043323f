"""What only a GPU can show of rows with several documents: nothing waits for it, and it computes what the CPU does."""

from typing import Any

import pytest
import torch
from torch import nn

from collate import DevicePrefetcher, VarlenCollator, apply_rnn, last_step, masked_mean, sequence_loss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]


def samples() -> Any:
    rng = torch.Generator().manual_seed(0)
    counts = [5, 3, 0, 9, 2]
    return [{"x": torch.randn(n, 6, generator=rng), "y": torch.randint(0, 3, (n,), generator=rng)} for n in counts]


def everything(batch: Any, rnn: Any) -> Any:
    """All that reads the documents, and the gradients of the loss."""
    hidden, state = apply_rnn(rnn, batch["x"])
    labels = batch["y"].next_step_labels()
    losses = [
        sequence_loss(nn.CrossEntropyLoss(reduction="none"), hidden, labels, reduction=kind)
        for kind in ("token", "sequence", "sum")
    ]
    part = batch["x"].context_parallel(1, 2)
    views = [batch["x"].mask, batch["x"].document_ids, batch["x"].position_ids, part.take(batch["x"].values)]
    sums = [masked_mean(hidden), last_step(hidden), batch["x"].unsort(state, dim=1)]
    return [*losses, *sums, *views, *torch.autograd.grad(sum(losses), list(rnn.parameters()))]


@pytest.mark.parametrize("pinned", [True, False])
def test_no_call_waits_and_all_equal_the_cpu(pinned: bool) -> None:
    torch.manual_seed(0)
    rnn = nn.GRU(6, 3)
    batch = VarlenCollator({"x": 0, "y": -100}, capacity=16, align=4, max_documents=4)(samples())
    expected = everything(batch, rnn)
    with DevicePrefetcher([batch], "cuda", depth=1 if pinned else 0) as batches:
        sent = next(iter(batches))
    rnn.cuda()
    everything(sent, rnn)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = everything(sent, rnn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-4)


def test_sums_of_documents_are_deterministic_and_launches_constant() -> None:
    def kernels(count: Any) -> Any:
        values = torch.randn(1, count * 50, 8, device="cuda")
        batch = VarlenCollator()([torch.zeros(50, 8)] * count).to("cuda").with_values(values)
        first = masked_mean(batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            again = masked_mean(batch)
        assert torch.equal(first, again)
        return len([event for event in profile.events() if "memcpy" not in event.name.lower()])

    assert kernels(200) <= kernels(4)
