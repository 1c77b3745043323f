"""What only a GPU can show: nothing waits for it, copies overlap and stay whole, launches do not grow with T."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from strategies import DTYPES, fill
from test_packing import HEADS, SIZE, attended, gradients, heads
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from collate import (
    DevicePrefetcher,
    LengthError,
    LengthTrackedBatch,
    PadCollator,
    apply_rnn,
    find_max_tokens,
    last_step,
    masked_mean,
    sequence_loss,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
CUDA = torch.device("cuda")
MEGABYTE = 1 << 20
# Torch asks for it in deterministic matrix products, and reads it at the first of all.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
COUNTS = {"full": [9, 7, 7, 2], "with empty rows": [5, 0, 3, 0], "one row": [4]}
every_count = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


@pytest.fixture
def unwaiting() -> Iterator[Any]:
    """Makes torch raise an error wherever the host would wait for the GPU, from when it is called to the test's end."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def samples_of(counts: Any, features: int = 6, classes: int = 3) -> Any:
    return [{"x": torch.randn(n, features), "y": torch.randint(0, classes, (n,)), "n": n} for n in counts]


def collated(counts: Any, **options: Any) -> Any:
    return PadCollator({"x": 0, "y": -100}, **options)(samples_of(counts))


# --- no wait


@every_count
@pytest.mark.parametrize("loading", [(False, "x"), (True, "x"), (True, False)])
@pytest.mark.parametrize("running", [(nn.LSTM, "token"), (nn.LSTM, "sequence"), (nn.GRU, "sum")])
def test_nothing_waits_from_the_loader_to_the_end_of_the_backward_pass(
    unwaiting: Any, counts: list[int], loading: tuple[Any, ...], running: tuple[type[Any], str]
) -> None:
    (pinned, sort_by), (kind, reduction) = loading, running
    rnn, head = kind(6, 8, num_layers=2, batch_first=True).to(CUDA), nn.Linear(8, 3).to(CUDA)
    optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=0.1)
    collate = PadCollator({"x": 0, "y": -100}, sort_by=sort_by)
    loader = DataLoader(
        samples_of(counts) * 4, batch_size=len(counts), collate_fn=collate, pin_memory=pinned, shuffle=False
    )
    losses = []

    def epoch() -> None:
        for batch in DevicePrefetcher(loader, CUDA):
            hidden, _ = apply_rnn(rnn, batch["x"])
            loss = sequence_loss(
                nn.CrossEntropyLoss(reduction="none"), hidden.map(head), batch["y"], reduction=reduction
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())

    epoch()
    unwaiting()
    epoch()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@every_count
def test_no_view_of_a_batch_waits(unwaiting: Any, counts: list[int]) -> None:
    batch = collated(counts)["x"].pin_memory().to(CUDA)
    leaf = batch.padded.clone().requires_grad_()
    weights = torch.rand(batch.mask.shape, device=CUDA)

    def views() -> Any:
        tracked = batch.with_padded(leaf)
        total = masked_mean(tracked).sum() + last_step(tracked).sum() + tracked.flat().sum()
        total += sequence_loss(lambda a, b: (a - b).square().sum(-1), tracked, batch, weights=weights)
        total += tracked.unsort().padded.sum() + tracked.unsort(tracked.padded[None], dim=1).sum()
        total += sum(piece.padded.sum() for piece in [*tracked.split(2), *tracked.split_steps(3)])
        total += LengthTrackedBatch.concat(tracked.split(2)).padded.sum()
        total += tracked.nested().values().sum()
        total.backward()
        return batch.key_padding_mask, batch.cu_seqlens, batch.position_ids

    views()
    unwaiting()
    views()


def test_a_wait_would_be_found(unwaiting: Any) -> None:
    batch = collated([3, 1])["x"].to(CUDA)
    unwaiting()
    with pytest.raises(RuntimeError, match="synchroniz"):
        batch.mask.sum().item()
    with pytest.raises(RuntimeError, match="synchroniz"):
        batch.padded[batch.mask]


# --- pack and unpack


@every_count
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["longest", "given"])
def test_a_batch_is_packed_and_unpacked_as_on_the_host(counts: list[int], dtype: torch.dtype, order: str) -> None:
    rng = np.random.default_rng(0)
    rows = [fill(rng, (n, 3), dtype) for n in counts]
    host = LengthTrackedBatch.from_sequences(rows, order=order, widths=4)
    batch = host.to(CUDA)
    here, there = host.pack(), batch.pack()
    assert torch.equal(there.data.cpu(), here.data)
    assert torch.equal(there.batch_sizes, here.batch_sizes)
    assert there.batch_sizes.is_cpu
    for ours, theirs in zip(here[2:], there[2:], strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs.cpu())
    assert torch.equal(batch.unpack(there).padded.cpu(), host.unpack(here).padded)
    assert torch.equal(batch.flat().cpu(), host.flat())


def test_gradients_equal_torch_s_bit_for_bit_and_are_deterministic(deterministic: None) -> None:
    batch = LengthTrackedBatch.from_sequences([torch.randn(n, 5) for n in (9, 8, 5, 2)]).to(CUDA)
    leaf = batch.padded.clone().requires_grad_()
    weights = torch.randn_like(leaf)
    tracked = batch.with_padded(leaf)
    packed = pack_padded_sequence(leaf, batch.lengths, batch_first=True)
    assert torch.equal(tracked.pack().data, packed.data)
    results = [tracked.unpack(tracked.pack()).padded, pad_packed_sequence(packed, batch_first=True)[0]]
    assert torch.equal(*results)
    assert torch.equal(*[torch.autograd.grad((result * weights).sum(), leaf)[0] for result in results])


@pytest.mark.parametrize("reduction", ["token", "sequence", "sum"])
def test_a_whole_step_is_deterministic_and_equals_the_host_s(deterministic: None, reduction: str) -> None:
    torch.manual_seed(0)
    batch = collated([9, 7, 0, 2], sort_by=False)
    head = nn.Linear(6, 3)

    def gradients_on(device: Any) -> Any:
        moved = head.to(device)
        output = batch["x"].to(device).map(moved)
        loss_fn = nn.CrossEntropyLoss(reduction="none")
        loss = sequence_loss(loss_fn, output, batch["y"].to(device), reduction=reduction)
        return [part.cpu() for part in torch.autograd.grad(loss, list(moved.parameters()))]

    here, there, again = gradients_on("cpu"), gradients_on(CUDA), gradients_on(CUDA)
    for ours, theirs, repeated in zip(here, there, again, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(theirs, repeated)


def launches(call: Any) -> Any:
    """Kernels, copies and fills that a call asks for."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        call()
        torch.cuda.synchronize()
    wanted = ("Launch", "Memcpy", "Memset")
    events = [event for event in profile.key_averages() if event.key.startswith("cu")]
    return sum(event.count for event in events if any(word in event.key for word in wanted))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("order", ["longest", "given"])
def test_the_number_of_launches_does_not_depend_on_the_number_of_steps(order: str) -> None:
    def both_of(steps: Any) -> Any:
        counts = np.linspace(steps // 2, steps, 8).astype(int)[:: -1 if order == "longest" else 1]
        batch = LengthTrackedBatch.from_sequences([torch.randn(n, 4) for n in counts], order="given").to(CUDA)
        leaf = batch.padded.clone().requires_grad_()
        tracked = batch.with_padded(leaf)
        return lambda: tracked.unpack(tracked.pack()).padded.sum().backward()

    few, many = launches(both_of(20)), launches(both_of(1000))
    assert 0 < many <= few + 4
    assert many < 60


# --- prefetching


class Numbered:
    """Batches that hold their own number, each large enough for its copy to take a while."""

    def __init__(self, count: Any, pinned: Any) -> None:
        self.count, self.pinned = count, pinned

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            block = torch.full((8, 1 << 19), number, dtype=torch.int32)
            batch = LengthTrackedBatch(block, [1 << 19] * 8)
            yield batch.pin_memory() if self.pinned else batch


def left_over() -> Any:
    """Bytes in use on the device; what a stream has yet to let go of is let go of first."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("pinned", [False, True])
def test_what_a_late_step_reads_is_its_own_batch(depth: int, pinned: bool) -> None:
    """The step is held up, its batch dropped at once: its memory must not be given to a batch that comes after."""
    sums = []
    for batch in DevicePrefetcher(Numbered(8, pinned), CUDA, depth=depth):
        torch.cuda._sleep(20_000_000)
        sums.append(batch.padded.sum(dtype=torch.int64) + batch.mask.sum())
        del batch
    tokens = 8 << 19
    assert torch.stack(sums).tolist() == [tokens * (number + 1) for number in range(8)]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_memory_on_the_device_is_bounded_by_the_depth(depth: int) -> None:
    size = (8 << 19) * 5  # int32 values and a bool mask.
    before = left_over()
    torch.cuda.reset_peak_memory_stats()
    for batch in DevicePrefetcher(Numbered(12, pinned=True), CUDA, depth=depth):
        batch.padded[0, 0].item()
        del batch
    # One in use, `depth` and the next on the way, one whose end is not known yet, and what a mask is made with.
    assert torch.cuda.max_memory_allocated() - before <= (depth + 4) * size
    assert left_over() - before <= size // 100


def test_a_copy_runs_beside_the_step(unwaiting: Any) -> None:
    """The host takes the next batch while the GPU is still busy with the step before."""
    batches = iter(DevicePrefetcher(Numbered(3, pinned=True), CUDA, depth=1))
    next(batches)
    torch.cuda.synchronize()
    started = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)
    started.record()
    unwaiting()
    second = next(batches)
    third = next(batches)
    assert not started.query()
    torch.cuda.set_sync_debug_mode("default")
    assert second.padded[0, 0].item() == 1
    assert third.padded[0, 0].item() == 2


def test_containers_arrive_whole_and_on_the_device() -> None:
    batches = list(DevicePrefetcher([collated([3, 1]) | {"more": (torch.ones(2), "text")}] * 3, CUDA))
    for batch in batches:
        assert batch["x"].device.type == batch["y"].mask.device.type == batch["more"][0].device.type == "cuda"
        assert batch["x"].lengths.is_cpu
        assert batch["more"][1] == "text"
        batch["x"].verify()


def test_an_early_end_and_a_close_leave_nothing_on_the_device() -> None:
    before = left_over()
    with DevicePrefetcher(Numbered(8, pinned=True), CUDA) as batches:
        for _batch in batches:
            break
        del _batch
    assert left_over() - before <= MEGABYTE


# --- graphs


def test_what_reads_host_lengths_is_refused_while_a_graph_is_captured() -> None:
    batch = collated([3, 1])["x"].to(CUDA)
    batch.pack()

    def capture(reads: Any) -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.ones(1, device=CUDA)
            reads()

    for reads in (batch.pack, batch.flat, lambda: batch.with_padded(batch.padded, batch.lengths)):
        with pytest.raises(LengthError, match="cannot be captured in a CUDA graph"):
            capture(reads)


# --- attention


@pytest.mark.parametrize("counts", [[5, 3, 1], [2, 7, 7, 4]])
def test_varlen_attention_equals_the_padded_and_masked_one(counts: list[int]) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    torch.manual_seed(0)
    size = 64
    project = nn.Linear(4, 3 * HEADS * size, device=CUDA, dtype=torch.bfloat16)
    rows = [torch.randn(n, 4, dtype=torch.bfloat16) for n in counts]
    batch = LengthTrackedBatch.from_sequences(rows, order="given", widths=8).to(CUDA)
    query, key, value = (part.unflatten(-1, (HEADS, size)).contiguous() for part in project(batch.flat()).chunk(3, -1))
    bounds, longest = batch.cu_seqlens, int(batch.lengths.max())
    ours = varlen.varlen_attn(query, key, value, bounds, bounds, longest, longest)
    masked = attended(batch.to(torch.float64), project.double())
    torch.testing.assert_close(ours.flatten(1).double(), masked, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("counts", [[5, 3, 1], [2, 7, 7, 4]])
def test_attention_on_the_nested_batch_equals_the_padded_and_masked_one(counts: list[int]) -> None:
    torch.manual_seed(0)
    project = nn.Linear(4, 3 * HEADS * SIZE, device=CUDA)
    batch = LengthTrackedBatch.from_sequences([torch.randn(n, 4) for n in counts], order="given", widths=8).to(CUDA)
    query, key, value = (heads(part.contiguous()) for part in project(batch.nested()).chunk(3, -1))
    result = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    nested, masked = result.flatten(2).values(), attended(batch, project)
    torch.testing.assert_close(nested, masked, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(gradients(nested, project), gradients(masked, project), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# --- memory


def test_a_gpu_is_filled_and_not_overrun() -> None:
    def step(rows: int, width: int) -> None:
        torch.ones(rows * width * 4096, dtype=torch.uint8, device=CUDA)

    tokens = find_max_tokens(step, [256], device=CUDA, memory_limit=4096 * MEGABYTE)
    assert 0.8 * 943_718 <= tokens <= 943_718


def test_running_out_of_memory_leaves_the_model_as_it_was() -> None:
    model = nn.Linear(64, 64).to(CUDA)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 64, device=CUDA)).sum().backward()
    optimizer.step()
    before = [value.clone() for value in (*model.parameters(), *[weight.grad for weight in model.parameters()])]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    random = torch.cuda.get_rng_state()

    def step(rows: int, width: int) -> None:
        optimizer.zero_grad()
        loss = model(torch.randn(rows * width, 64, device=CUDA)).square().sum()
        torch.empty(rows * width << 20, dtype=torch.uint8, device=CUDA)
        loss.backward()
        optimizer.step()

    tokens = find_max_tokens(step, [64], device=CUDA, module=model, optimizer=optimizer)
    assert tokens << 20 <= torch.cuda.get_device_properties(CUDA).total_memory
    after = [*model.parameters(), *[weight.grad for weight in model.parameters()]]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(torch.equal(state["exp_avg"], old) for state, old in zip(optimizer.state.values(), moments, strict=True))
    assert torch.equal(torch.cuda.get_rng_state(), random)
