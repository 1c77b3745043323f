"""Pack, unpack and what attention reads: equal to torch's own; what a device is sent, and what it makes of it."""

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import lengths, order_of, sequences
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from collate import LengthError, LengthTrackedBatch, packing
from collate.packing import PackingMap
from collate.tensors import steps as steps_module
from collate.tensors.steps import MANY_BYTES, flat_index, gather_steps, scatter_steps
from collate.training.cpu_rnn import reversed_steps

HOST = torch.device("cpu")
FILLED = lengths().filter(any)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.device, list[Any]]:
    """A device whose memory is the host's: what is sent there is written down, and stays."""
    sent = []

    def send(integers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
        sent.append(integers)
        return torch.as_tensor(integers)

    monkeypatch.setattr(packing, "to_device", send)
    monkeypatch.setattr(steps_module, "to_device", send)
    return torch.device("meta"), sent


@given(FILLED, st.integers(0, 3))
def test_a_device_finds_the_layout_that_the_host_finds(far: tuple[Any, ...], counts: list[int], more: int) -> None:
    device, sent = far
    sent.clear()
    width = max(counts) + more
    here, there = (PackingMap.of(np.array(counts), width, where) for where in (HOST, device))
    assert len(sent) == 1
    assert torch.equal(here.index, there.index)
    assert np.array_equal(here.sizes, there.sizes)
    for ours, theirs in ((here.sorted_indices, there.sorted_indices), (here.unsorted_indices, there.unsorted_indices)):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@given(lengths(), st.integers(0, 3))
def test_a_device_finds_the_indices_of_real_steps_that_the_host_finds(
    far: tuple[Any, ...], counts: list[int], more: int
) -> None:
    device, sent = far
    sent.clear()
    width = max(counts) + more
    here, there = (flat_index(np.array(counts), width, where) for where in (HOST, device))
    assert len(sent) == 1
    assert torch.equal(here, there)
    mask = torch.arange(width) < torch.tensor(counts)[:, None]
    assert torch.equal(here, mask.flatten().nonzero()[:, 0])


def test_a_device_is_sent_integers_for_rows_and_steps_not_for_tokens(
    far: tuple[torch.device, list[Any]],
) -> None:
    device, sent = far
    counts = np.random.default_rng(0).integers(200, 401, 64)
    PackingMap.of(counts, 400, device)
    assert sum(part.size for part in sent) <= 3 * 64 + 2 * 400 < counts.sum() / 15
    sent.clear()
    flat_index(counts, 400, device)
    assert sum(part.size for part in sent) == 2 * 64


def by_torch(padded: torch.Tensor, counts: torch.Tensor, width: int) -> tuple[nn.Module, torch.Tensor]:
    """The rows through torch's own calls, by stable order: torch's own sort shuffles ties."""
    order = counts.argsort(descending=True, stable=True)
    packed = pack_padded_sequence(padded[order], counts[order], batch_first=True)
    block, _ = pad_packed_sequence(packed, batch_first=True, total_length=width)
    return packed, block[order.argsort()]


@given(sequences().filter(lambda rows: all(map(len, rows))), st.sampled_from(["longest", "given", "shuffled"]))
def test_pack_and_unpack_equal_torch_s_bit_for_bit(rows: list[torch.Tensor], kind: str) -> None:
    batch = LengthTrackedBatch.from_sequences(rows, order=order_of(kind, len(rows)))
    theirs, block = by_torch(batch.padded, batch.lengths, batch.padded.shape[1])
    packed = batch.pack()
    assert torch.equal(packed.data, theirs.data)
    assert torch.equal(packed.batch_sizes, theirs.batch_sizes)
    assert torch.equal(batch.unpack(packed).padded, block)


@given(sequences(dtypes=[torch.float64]).filter(lambda rows: all(map(len, rows))), st.booleans())
def test_gradients_equal_torch_s_bit_for_bit_and_are_deterministic(
    deterministic: Any, rows: list[torch.Tensor], in_order: bool
) -> None:
    batch = LengthTrackedBatch.from_sequences(rows, order="longest" if in_order else "given")
    leaf = batch.padded.clone().requires_grad_()
    weights = torch.randn_like(leaf)
    tracked = batch.with_padded(leaf)
    ours = torch.autograd.grad((tracked.unpack(tracked.pack()).padded * weights).sum(), leaf)[0]
    _, block = by_torch(leaf, batch.lengths, leaf.shape[1])
    assert torch.equal(ours, torch.autograd.grad((block * weights).sum(), leaf)[0])


def test_pack_and_unpack_can_be_differentiated_twice() -> None:
    batch = LengthTrackedBatch.from_sequences([torch.randn(n, 2, dtype=torch.float64) for n in (3, 1, 2)])

    def run(padded: torch.Tensor) -> torch.Tensor:
        tracked = batch.with_padded(padded)
        return tracked.unpack(tracked.pack()).padded ** 2

    leaf = batch.padded.clone().requires_grad_()
    assert torch.autograd.gradcheck(run, leaf)
    assert torch.autograd.gradgradcheck(run, leaf)


def test_what_another_layout_packed_is_refused() -> None:
    batch = LengthTrackedBatch.from_sequences([[1, 2, 3], [4]])
    other = LengthTrackedBatch.from_sequences([[1, 2], [3, 4]])
    with pytest.raises(LengthError, match=r"holds \[2, 2\] rows at each step, these lengths make \[2, 1, 1\]"):
        batch.unpack(other.pack())


# --- attention

HEADS, SIZE = 2, 8


def heads(values: torch.Tensor) -> torch.Tensor:
    """`[..., T, HEADS * S]` as attention wants it: `[..., HEADS, T, S]`."""
    return values.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


def attended(batch: LengthTrackedBatch, project: nn.Module) -> torch.Tensor:
    """Padded, masked attention of a batch's rows: the real steps of its result, `[M, HEADS * S]`."""
    query, key, value = map(heads, project(batch.padded).chunk(3, -1))
    # An empty row may attend to its first step: to nothing at all would be NaN.
    open_keys = ~batch.key_padding_mask[:, None, None]
    result = scaled_dot_product_attention(query, key, value, attn_mask=open_keys)
    return batch.with_padded(result.transpose(1, 2).flatten(2)).flat()


def gradients(result: torch.Tensor, project: nn.Module) -> tuple[torch.Tensor, ...]:
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype, device=result.device).view_as(result)
    return torch.autograd.grad((result * weights).sum(), list(project.parameters()))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("counts", [[5, 3, 1], [2, 7, 7, 4]])
def test_attention_on_the_nested_batch_equals_the_padded_and_masked_one(counts: list[int]) -> None:
    torch.manual_seed(0)
    project = nn.Linear(4, 3 * HEADS * SIZE, dtype=torch.float64)
    rows = [torch.randn(n, 4, dtype=torch.float64) for n in counts]
    batch = LengthTrackedBatch.from_sequences(rows, order="given", widths=8)
    # Torch takes no jagged tensor whose steps lie apart.
    query, key, value = (heads(part.contiguous()) for part in project(batch.nested()).chunk(3, -1))
    nested = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).values()
    masked = attended(batch, project)
    torch.testing.assert_close(nested, masked)
    for ours, theirs in zip(gradients(nested, project), gradients(masked, project), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("counts", [[5, 3, 1], [2, 7, 0, 4]])
def test_attention_between_the_bounds_equals_the_padded_and_masked_one(counts: list[int]) -> None:
    """What `varlen_attn` does on a GPU, which it needs: each row alone, between two of the bounds."""
    torch.manual_seed(0)
    project = nn.Linear(4, 3 * HEADS * SIZE, dtype=torch.float64)
    rows = [torch.randn(n, 4, dtype=torch.float64) for n in counts]
    batch = LengthTrackedBatch.from_sequences(rows, order="given", widths=8)
    steps, bounds = project(batch.flat()), batch.cu_seqlens.tolist()
    alone = [
        scaled_dot_product_attention(*map(heads, steps[start:stop].chunk(3, -1))).transpose(0, 1).flatten(1)
        for start, stop in pairwise(bounds)
        if start < stop
    ]
    torch.testing.assert_close(torch.cat(alone), attended(batch, project))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.int8, torch.complex64], ids=str
)
@pytest.mark.parametrize("features", [(), (3,), (2, 5)], ids=str)
def test_many_bytes_are_written_where_few_are(dtype: torch.dtype, features: tuple[int, ...]) -> None:
    lengths = np.random.default_rng(0).integers(0, 400, 40)
    shape = (int(lengths.sum()), 64, *features)
    steps = torch.randint(0, 2, shape).to(dtype)[:, ::2]
    index = flat_index(lengths, 400, torch.device("cpu"))
    assert steps.nbytes > MANY_BYTES
    for padding_value in (0, 1):
        block = scatter_steps(steps, index, (40, 400), padding_value)
        expected = steps.new_full((40 * 400, *steps.shape[1:]), padding_value).index_copy_(0, index, steps)
        assert torch.equal(block.flatten(0, 1), expected)
    assert torch.equal(gather_steps(block, index), steps)


def test_the_layout_of_a_batch_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, found = LengthTrackedBatch.from_sequences([torch.ones(n, 2) for n in (4, 3, 1)]), []
    of = PackingMap.of
    monkeypatch.setattr(PackingMap, "of", lambda *facts: found.append(facts) or of(*facts))
    assert torch.equal(batch.unpack(batch.pack()).padded, batch.padded)
    assert len(found) == 1


# --- skewed batches: what is made is as long as the real steps, not rows x the longest row


def indices_by_matrix(counts: npt.NDArray[Any], width: Any) -> tuple[npt.NDArray[Any], ...]:
    """The oracle: every step of every row, written out, and the running ones taken."""
    rows = np.flatnonzero(counts)
    rows = rows[np.argsort(-counts[rows], kind="stable")]
    running = np.arange(counts.max())[:, None] < counts[rows]
    return (rows * width + np.arange(len(running))[:, None])[running], running.sum(1)


def reversed_by_matrix(sizes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    running = sizes[:, None] > np.arange(sizes[0])
    starts = np.cumsum(sizes) - sizes
    mirrored = running.sum(0) - 1 - np.arange(len(sizes))[:, None]
    return (starts[mirrored] + np.arange(sizes[0]))[running]


@given(FILLED, st.integers(0, 3))
def test_indices_and_reversed_steps_are_those_of_the_whole_matrix(counts: list[int], more: int) -> None:
    counts = np.array(counts)
    layout = PackingMap.of(counts, counts.max() + more, HOST)
    indices, sizes = indices_by_matrix(counts, counts.max() + more)
    assert layout.index.tolist() == indices.tolist()
    assert layout.sizes.tolist() == sizes.tolist()
    assert reversed_steps(sizes).tolist() == reversed_by_matrix(sizes).tolist()


@pytest.mark.parametrize("make", ["pack", "reverse"])
def test_one_long_row_among_many_costs_memory_for_its_steps_alone(make: str) -> None:
    """Red before: 200,000 x 2,000 steps were written out, 400 MB and 3.2 GB."""
    counts = np.array([200_000] + [3] * 1_999)
    sizes = PackingMap.of(counts, 200_000, HOST).sizes
    tracemalloc.start()
    try:
        PackingMap.of(counts, 200_000, HOST) if make == "pack" else reversed_steps(sizes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A few arrays of int64.
    assert peak < 10 * 8 * counts.sum()


# --- dtypes that torch copies by no index

UNCOMMON = [
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


@pytest.mark.parametrize("dtype", UNCOMMON, ids=str)
@pytest.mark.parametrize("features", [(), (2,), (2, 20_000)], ids=str)
def test_dtypes_that_torch_copies_by_no_index_come_back_too(dtype: torch.dtype, features: tuple[int, ...]) -> None:
    """Red before for small batches: "index_copy_cpu" not implemented."""
    bits = torch.randint(0, 100, (3, 4, *features), generator=torch.Generator().manual_seed(0))
    batch = LengthTrackedBatch(bits.to(torch.float32).to(dtype), [4, 2, 3])
    again = batch.unpack(batch.pack())
    # Older versions of torch cannot pack these dtypes at all: it is given their bytes.
    _, block = by_torch(batch.padded.unsqueeze(-1).view(torch.uint8), batch.lengths, 4)
    assert again.padded.dtype == dtype
    assert torch.equal(again.padded.unsqueeze(-1).view(torch.uint8), block)
