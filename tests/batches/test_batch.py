"""LengthTrackedBatch: laws 1 to 3, and what a batch goes through between making and use."""

import copy
import dataclasses
import io
import itertools
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, ORDERS, fill, lengths, order_of, sequences
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils import _pytree as pytree

from collate import LengthError, LengthTrackedBatch, apply_rnn, last_step, masked_mean, sequence_loss
from collate.operations.serialization import THROUGH_PIPE, send
from collate.tensors.masks import length_mask


def agrees(batch: LengthTrackedBatch) -> None:
    """Law 1, written out a second time and slowly."""
    rows, width = batch.padded.shape[:2]
    assert width >= 1
    assert batch.lengths.dtype == torch.int64
    assert batch.permutation.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    assert sorted(batch.permutation.tolist()) == list(range(rows))
    for row in range(rows):
        length = int(batch.lengths[row])
        assert 0 <= length <= width
        assert batch.mask[row].tolist() == [step < length for step in range(width)]


def same(left: LengthTrackedBatch, right: LengthTrackedBatch) -> bool:
    facts = [(b.padding_value, b.first_step, b.padded.dtype) for b in (left, right)]
    parts = [(b.padded, b.lengths, b.mask, b.permutation) for b in (left, right)]
    return facts[0] == facts[1] and all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


@given(sequences(), ORDERS, st.sampled_from([None, 4, [7, 100]]), st.booleans())
def test_what_is_made_agrees_and_unsorts_to_what_went_in(
    rows: list[torch.Tensor], kind: str, widths: int | list[int] | None, as_arrays: bool
) -> None:
    given_rows = rows
    if as_arrays and rows[0].dtype != torch.bfloat16:
        given_rows = [row.numpy() for row in rows]
    batch = LengthTrackedBatch.from_sequences(
        given_rows, padding_value=1, order=order_of(kind, len(rows)), widths=widths
    )
    agrees(batch)
    batch.verify()
    assert (batch.padded[~batch.mask] == 1).all()
    assert batch.num_tokens == sum(map(len, rows))
    source = batch.unsort()
    agrees(source)
    assert source.permutation.tolist() == list(range(len(rows)))
    assert all(torch.equal(a, b) for a, b in zip(source.sequences(), rows, strict=True))
    assert all(
        torch.equal(row, rows[index]) for row, index in zip(batch.sequences(), batch.permutation.tolist(), strict=True)
    )


@given(sequences())
def test_the_padded_block_is_the_one_pad_sequence_makes(rows: list[torch.Tensor]) -> None:
    batch = LengthTrackedBatch.from_sequences(rows, order="given")
    expected = pad_sequence(rows, batch_first=True)
    if expected.shape[1] == 0:
        expected = expected.new_zeros(len(rows), 1, *rows[0].shape[1:])
    assert torch.equal(batch.padded, expected)


@given(sequences(max_rows=40))
def test_longest_first_is_stable(rows: list[torch.Tensor]) -> None:
    batch = LengthTrackedBatch.from_sequences(rows)
    counts = [len(row) for row in rows]
    assert batch.permutation.tolist() == sorted(range(len(rows)), key=lambda index: -counts[index])


@pytest.mark.parametrize("features", [(), (3,)])
@pytest.mark.parametrize("width", [3, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_short_and_long_rows_are_padded_alike(dtype: torch.dtype, width: int, features: tuple[int, ...]) -> None:
    counts = [length * width for length in (1, 0, 4, 2)]
    rng = np.random.default_rng(0)
    rows = [fill(rng, (count, *features), dtype) for count in counts]
    strided = [torch.stack([row, row], -1)[..., 0] for row in rows]
    expected = pad_sequence([rows[i] for i in (2, 3, 0, 1)], batch_first=True, padding_value=1)
    kinds = [rows, strided] if dtype == torch.bfloat16 else [rows, strided, [row.numpy() for row in rows]]
    for kind in kinds:
        batch = LengthTrackedBatch.from_sequences(kind, padding_value=1)
        assert torch.equal(batch.padded, expected)
        assert batch.padded.untyped_storage().nbytes() == batch.padded.nbytes


def test_gradients_flow_through_long_rows() -> None:
    rows = [torch.randn(count, 2, requires_grad=True) for count in (40, 0, 90)]
    (LengthTrackedBatch.from_sequences(rows).padded ** 2).sum().backward()
    assert all(torch.equal(row.grad, 2 * row) for row in rows)


@pytest.mark.parametrize("first", [torch.zeros(3), torch.zeros(2000), torch.zeros(2000).numpy()])
def test_an_empty_row_of_another_shape_is_refused(first: npt.NDArray[Any] | torch.Tensor) -> None:
    rows = [first, first[:0, None]]
    with pytest.raises(ValueError, match="all samples must have one feature shape"):
        LengthTrackedBatch.from_sequences(rows)


@given(sequences(), ORDERS)
def test_unpack_undoes_pack_at_the_same_width_and_in_batch_order(rows: list[torch.Tensor], kind: str) -> None:
    batch = LengthTrackedBatch.from_sequences(rows, order=order_of(kind, len(rows)), widths=9)
    if not batch.num_tokens:
        with pytest.raises(LengthError, match="all .* rows have length 0"):
            batch.pack()
        return
    back = batch.unpack(batch.pack())
    agrees(back)
    back.verify()
    assert torch.equal(back.padded, torch.where(_like(batch.mask, batch.padded), batch.padded, 0))
    assert torch.equal(back.lengths, batch.lengths)


def _like(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return mask.reshape(*mask.shape, *[1] * (values.dim() - 2))


@given(sequences().filter(lambda rows: all(len(row) for row in rows)))
def test_pack_gives_what_torch_packs(rows: list[torch.Tensor]) -> None:
    batch = LengthTrackedBatch.from_sequences(rows, order="given")
    ours = batch.pack()
    torchs = pack_padded_sequence(batch.padded, batch.lengths, batch_first=True, enforce_sorted=False)
    assert torch.equal(ours.batch_sizes, torchs.batch_sizes)
    padded, counts = pad_packed_sequence(ours, batch_first=True)
    assert torch.equal(counts, batch.lengths)
    assert torch.equal(padded, batch.padded)
    if ours.sorted_indices is not None:
        assert torch.equal(ours.unsorted_indices[ours.sorted_indices], torch.arange(len(rows)))


@given(sequences(dtypes=[torch.float64]), st.booleans())
def test_gradients_flow_through_padding_packing_and_flattening(rows: list[torch.Tensor], packs: bool) -> None:
    leaves = [row.clone().requires_grad_() for row in rows]
    batch = LengthTrackedBatch.from_sequences(leaves)
    if not batch.num_tokens:
        return
    steps = batch.pack().data if packs else batch.flat()
    (steps**2).sum().backward()
    assert all(torch.equal(leaf.grad, 2 * row) for leaf, row in zip(leaves, rows, strict=True))


def test_packing_can_be_differentiated_twice() -> None:
    rows = [torch.randn(length, 2, dtype=torch.float64, requires_grad=True) for length in (3, 1, 2)]

    def through(*leaves: Any) -> torch.Tensor:
        batch = LengthTrackedBatch.from_sequences(leaves, order="given")
        return batch.unpack(batch.pack()).padded ** 2

    assert torch.autograd.gradcheck(through, rows)
    assert torch.autograd.gradgradcheck(through, rows)


@given(sequences(), st.integers(1, 5))
def test_concat_of_split_is_the_batch_itself(rows: list[torch.Tensor], size: int) -> None:
    batch = LengthTrackedBatch.from_sequences(rows)
    pieces = batch.split(size)
    assert all(len(piece) <= size for piece in pieces)
    assert same(LengthTrackedBatch.concat(pieces), batch)


@given(sequences(dtypes=[torch.int64]), sequences(dtypes=[torch.int64]))
def test_concat_of_two_batches_follows_both_source_orders(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    left, right = ([row[..., None].flatten(1)[:, :1] for row in rows] for rows in (left, right))
    both = LengthTrackedBatch.concat([LengthTrackedBatch.from_sequences(rows) for rows in (left, right)])
    agrees(both)
    assert all(torch.equal(a, b) for a, b in zip(both.unsort().sequences(), [*left, *right], strict=True))


def test_concat_takes_pieces_one_by_one() -> None:
    batch = LengthTrackedBatch.from_sequences([torch.ones(3), torch.ones(2)])
    pieces: Any = iter(batch.split(1))
    assert torch.equal(LengthTrackedBatch.concat(pieces).padded, batch.padded)


@given(sequences(), st.integers(1, 7))
def test_chunks_in_time_hold_every_step_once(rows: list[torch.Tensor], steps: int) -> None:
    batch = LengthTrackedBatch.from_sequences(rows)
    chunks = batch.split_steps(steps)
    for chunk in chunks:
        agrees(chunk)
        chunk.verify()
        assert len(chunk) == len(batch)
    assert [chunk.first_step for chunk in chunks] == list(range(0, batch.padded.shape[1], steps))
    for row, whole in enumerate(batch.sequences()):
        assert torch.equal(torch.cat([chunk.sequences()[row] for chunk in chunks]), whole)


@given(sequences())
def test_a_batch_survives_pickle_copy_pytrees_and_weights_only_loading(rows: list[torch.Tensor]) -> None:
    batch = LengthTrackedBatch.from_sequences(rows)
    file = io.BytesIO()
    torch.save({"batch": batch}, file)
    file.seek(0)
    survivors = [
        pickle.loads(pickle.dumps(batch)),
        copy.copy(batch),
        copy.deepcopy(batch),
        dataclasses.replace(batch),
        torch.load(file)["batch"],
        pytree.tree_map(lambda tensor: tensor.clone(), batch),
    ]
    for survivor in survivors:
        assert same(survivor, batch)


def test_a_chunk_ships_its_own_steps_and_not_the_storage_it_looks_into() -> None:
    batch = LengthTrackedBatch.from_sequences([torch.zeros(10_000), torch.zeros(9_000)])
    assert len(pickle.dumps(batch.split_steps(10)[1])) < 2_000


def test_a_result_travels_without_its_graph() -> None:
    batch = LengthTrackedBatch.from_sequences([torch.ones(2, requires_grad=True)]).map(torch.exp)
    assert not pickle.loads(pickle.dumps(batch)).padded.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int8], ids=str)
@pytest.mark.parametrize("steps", [0, 3, 40_000])
def test_small_values_go_through_the_pipe_and_large_ones_through_memory(dtype: torch.dtype, steps: int) -> None:
    made = LengthTrackedBatch.from_sequences(
        [torch.ones(steps, 5).to(dtype), torch.zeros(1, 5).to(dtype)], order="given"
    )
    small = 0 < made.padded.nbytes <= THROUGH_PIPE
    _, parts = send(made)
    assert any(isinstance(part, torch.Tensor) for part in parts) is not small
    for batch in (made, made.with_padded(made.padded.clone().share_memory_())):
        kept = ForkingPickler.loads(ForkingPickler.dumps(batch))
        assert same(kept, batch)
        # Who takes it may write to it.
        kept.padded.zero_()


@pytest.mark.parametrize("rows", [2, THROUGH_PIPE // 8])
def test_what_is_conjugated_lazily_comes_through_a_queue(rows: int) -> None:
    """Red before: torch's queues forget that it is, and so did a batch's."""
    values = torch.randn(rows, 2, dtype=torch.complex64)
    for padded in (values.conj(), values.conj().imag):
        sent = ForkingPickler.loads(ForkingPickler.dumps(LengthTrackedBatch(padded, [2] * rows)))
        assert torch.equal(sent.padded, padded)


def test_a_block_that_requires_gradients_still_does_on_the_other_side() -> None:
    leaf = LengthTrackedBatch.from_sequences([torch.ones(3), torch.ones(1)])
    leaf = leaf.with_padded(leaf.padded.requires_grad_())
    for batch, still in ((leaf, True), (leaf.map(lambda x: x * 2), False), (leaf.map(torch.Tensor.detach), False)):
        kept = ForkingPickler.loads(ForkingPickler.dumps(batch))
        assert kept.padded.requires_grad is still
        assert torch.equal(kept.padded, batch.padded)


@given(sequences(), st.sampled_from(DTYPES))
def test_a_change_of_dtype_leaves_lengths_and_padding_as_they_were(
    rows: list[torch.Tensor], dtype: torch.dtype
) -> None:
    batch = LengthTrackedBatch.from_sequences(rows, padding_value=1).to(dtype)
    assert batch.padded.dtype == dtype
    agrees(batch)
    batch.verify()


def test_to_gives_the_batch_itself_where_nothing_changes() -> None:
    batch = LengthTrackedBatch.from_sequences([[1, 2], [3]])
    assert batch.to("cpu") is batch
    assert batch.to(torch.int64, non_blocking=True) is batch


@given(sequences(dtypes=[torch.float32]), st.integers(0, 2))
def test_states_and_rows_of_any_tensor_come_back_in_source_order(rows: list[torch.Tensor], dim: int) -> None:
    batch = LengthTrackedBatch.from_sequences(rows)
    shape = [2, 2, 2]
    shape[dim] = len(rows)
    state = batch.permutation.reshape([-1 if axis == dim else 1 for axis in range(3)]).expand(shape)
    assert batch.unsort(state, dim).movedim(dim, 0).flatten(1)[:, 0].tolist() == list(range(len(rows)))


@given(sequences(dtypes=[torch.float32]))
def test_the_views_for_attention_say_the_same_as_the_lengths(rows: list[torch.Tensor]) -> None:
    batch = LengthTrackedBatch.from_sequences(rows)
    flat, bounds = batch.flat(), batch.cu_seqlens
    assert bounds.dtype == torch.int32
    assert bounds.diff().tolist() == batch.lengths.tolist()
    for row, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        assert torch.equal(flat[start:stop], batch.sequences()[row])
        assert batch.position_ids[start:stop].tolist() == list(range(stop - start))
    hidden = batch.key_padding_mask
    empty = batch.lengths == 0
    assert torch.equal(hidden[~empty], ~batch.mask[~empty])
    assert not hidden[empty, 0].any()
    assert hidden[empty, 1:].all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_nested_tensor_holds_the_same_rows_and_pads_back() -> None:
    rows = [torch.randn(length, 2) for length in (3, 5, 1)]
    batch = LengthTrackedBatch.from_sequences(rows, widths=8)
    nested = batch.nested()
    assert all(torch.equal(a, b) for a, b in zip(nested.unbind(), batch.sequences(), strict=True))
    assert torch.equal(nested.to_padded_tensor(0.0), batch.padded[:, :5])


def test_positions_in_a_later_chunk_go_on_where_the_earlier_one_ended() -> None:
    chunk = LengthTrackedBatch.from_sequences([[1, 2, 3, 4], [5, 6, 7]]).split_steps(2)[1]
    assert chunk.position_ids.tolist() == [2, 3, 2]


def test_a_plain_dict_holds_what_it_is_asked_for() -> None:
    batch = LengthTrackedBatch.from_sequences([[1, 2], [3]])
    plain = batch.as_dict({"input_ids": "padded", "attention_mask": "mask"})
    assert plain["input_ids"] is batch.padded
    assert plain["attention_mask"] is batch.mask
    with pytest.raises(ValueError, match="'ids' names 'tokens', which is none of padded"):
        batch.as_dict({"ids": "tokens"})


def test_a_batch_says_what_it_is() -> None:
    batch = LengthTrackedBatch.from_sequences([torch.zeros(n, 2) for n in range(9)])
    assert repr(batch) == (
        "LengthTrackedBatch([9, 8, 2] float32 on cpu, lengths=[8, 7, 6, 5, 4, 3, ... 0], padding 50.0%)"
    )


@given(lengths(), st.integers(0, 3))
def test_a_real_value_in_the_padding_is_found(counts: list[int], extra: int) -> None:
    rows = [torch.ones(count, 2) for count in counts]
    batch = LengthTrackedBatch.from_sequences(rows, order="given", widths=[max(counts) + 1 + extra])
    deflated = [max(count - 1, 0) for count in counts]
    wrong = LengthTrackedBatch(batch.padded, deflated, padding_value=0)
    if any(counts):
        with pytest.raises(LengthError, match=r"row \d+ has \d+ steps, but its padding at step \d+ holds 1.0"):
            wrong.verify()


def test_padding_of_nan_is_recognised_as_untouched() -> None:
    batch = LengthTrackedBatch.from_sequences([torch.ones(2), torch.ones(1)], padding_value=float("nan"))
    batch.verify()
    batch.padded[1, 1] = 0
    with pytest.raises(LengthError, match="holds 0.0 instead of padding_value nan"):
        batch.verify()


def test_new_values_leave_padding_unspecified_and_may_have_new_lengths() -> None:
    batch = LengthTrackedBatch.from_sequences([torch.randn(6, 2), torch.randn(4, 2)])
    assert batch.map(nn.Linear(2, 3)).padding_value is None
    shorter = batch.with_padded(batch.padded[:, ::2], lengths=(batch.lengths + 1) // 2)
    agrees(shorter)
    assert shorter.lengths.tolist() == [3, 2]


class Model(nn.Module):
    """All that a batch goes through in a compiled or exported model."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(2, 3)

    def forward(self, batch: LengthTrackedBatch) -> tuple[LengthTrackedBatch | torch.Tensor, ...]:
        hidden = batch.map(self.widen)
        shorter = hidden.with_padded(hidden.padded[:, :2], hidden.lengths.clamp(max=2))
        return hidden, shorter, hidden.unsort(), masked_mean(hidden), last_step(shorter), batch.key_padding_mask


def alike(
    left: tuple[LengthTrackedBatch | torch.Tensor, ...], right: tuple[LengthTrackedBatch | torch.Tensor, ...]
) -> None:
    for ours, expected in zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_give_the_same_batches_without_a_graph_break(backend: str) -> None:
    torch.compiler.reset()
    model = Model()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for counts in ([3, 5, 1], [5, 5, 4], [1, 0, 6, 2]):
        batch = LengthTrackedBatch.from_sequences([torch.randn(count, 2) for count in counts])
        alike(compiled(batch), model(batch))
        agrees(compiled(batch)[1])


# Up to torch 2.9, what it reads from a file is no memory to write to, and it warns of that.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_an_exported_model_takes_and_gives_batches_once_it_was_saved(tmp_path: Path) -> None:
    model = Model()
    batch = LengthTrackedBatch.from_sequences([torch.randn(count, 2) for count in (3, 5, 1)])
    torch.export.save(torch.export.export(model, (batch,)), tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    other = LengthTrackedBatch.from_sequences([torch.randn(count, 2) for count in (2, 2, 5)])
    for given_batch in (batch, other):
        alike(exported(given_batch), model(given_batch))
    assert isinstance(exported(batch)[0], LengthTrackedBatch)


def test_two_steps_of_a_pinned_batch_need_an_accelerator() -> None:
    batch = LengthTrackedBatch.from_sequences([[1, 2], [3]])
    if torch.accelerator.is_available():
        pinned = batch.pin_memory()
        assert pinned.padded.is_pinned()
        assert pinned.lengths.is_pinned()
    else:
        # A build for CUDA asks for a driver of NVIDIA.
        with pytest.raises(RuntimeError, match="accelerator|NVIDIA"):
            batch.pin_memory()


BLOCK = torch.zeros(2, 3)
TRACKED = LengthTrackedBatch(torch.zeros(2, 3, 4), [3, 1])
SPARSE = torch.ones(3).to_sparse()


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: LengthTrackedBatch(BLOCK, [4, 1]), LengthError, "length of row 0 is 4, it must be from 0 to .* 3"),
        (lambda: LengthTrackedBatch(BLOCK, [1, -1]), LengthError, "length of row 1 is -1"),
        (lambda: LengthTrackedBatch(BLOCK, [1]), LengthError, r"one per row, \[2\], got shape \[1\]"),
        (lambda: LengthTrackedBatch(BLOCK, [1.0, 2.0]), TypeError, "lengths must be integers, got float64"),
        (lambda: LengthTrackedBatch(BLOCK, torch.tensor([1.5, 2])), TypeError, "integers, got torch.float32"),
        (lambda: LengthTrackedBatch(BLOCK, [float("nan"), 2]), TypeError, "integers, got float64"),
        (lambda: LengthTrackedBatch(BLOCK, [True, False]), TypeError, "integers, got bool"),
        (lambda: LengthTrackedBatch(BLOCK, torch.ones(2, device="meta")), LengthError, "must stay on the host"),
        (lambda: LengthTrackedBatch(torch.zeros(2), [1, 1]), ValueError, r"\[B, T, ...\] .* got \[2\]"),
        (lambda: LengthTrackedBatch(torch.zeros(0, 2), []), ValueError, "at least one row"),
        (lambda: LengthTrackedBatch(torch.zeros(2, 0), [0, 0]), ValueError, "one step, got"),
        (lambda: LengthTrackedBatch(BLOCK, [1, 2], permutation=[0, 0]), ValueError, "distinct indices"),
        (lambda: LengthTrackedBatch(BLOCK, [1, 2], permutation=[0, -1]), ValueError, "distinct indices"),
        (lambda: LengthTrackedBatch(BLOCK, [1, 2], permutation=[0]), ValueError, "one sample index per row"),
        (lambda: LengthTrackedBatch(BLOCK, [1, 2], permutation=[0.0, 1.0]), TypeError, "permutation must be integers"),
        (lambda: LengthTrackedBatch(BLOCK, [1, 2], mask=BLOCK), TypeError, "mask must be bool"),
        (lambda: LengthTrackedBatch(BLOCK, [1, 2], mask=BLOCK[:1] > 0), ValueError, r"mask must be \[2, 3\]"),
        (lambda: LengthTrackedBatch(BLOCK, [1, 2], mask=BLOCK == 0), LengthError, "mask of row 0 marks 3 steps"),
        (lambda: LengthTrackedBatch(BLOCK > 0, [1, 2], padding_value=3), ValueError, "cannot be held by torch.bool"),
        (lambda: LengthTrackedBatch(BLOCK, [1, 2], padding_value="0"), TypeError, "must be a number, got '0'"),
        (lambda: LengthTrackedBatch.from_sequences([]), LengthError, "at least one row, got an empty list"),
        (lambda: LengthTrackedBatch.from_sequences([torch.tensor(1)]), ValueError, "sample 0 has no axis"),
        (lambda: LengthTrackedBatch.from_sequences([[1], [1.0]]), TypeError, "one dtype, got int64 in sample 0"),
        (lambda: LengthTrackedBatch.from_sequences([BLOCK, BLOCK.T]), ValueError, r"\[2, 3\] in sample 0 and \[3, 2\]"),
        (lambda: LengthTrackedBatch.from_sequences([["a"]]), TypeError, "the list in sample 0 must hold numbers"),
        (lambda: LengthTrackedBatch.from_sequences([[[1], [2, 3]]]), ValueError, "the list in sample 0 is ragged"),
        (lambda: LengthTrackedBatch.from_sequences([BLOCK, "ab"]), TypeError, "sample 1 must be a tensor or an array"),
        (lambda: LengthTrackedBatch.from_sequences([np.array(["a"])]), TypeError, "torch has no dtype for arrays"),
        (
            lambda: LengthTrackedBatch.from_sequences([[1, 2, 3]], widths=[2]),
            LengthError,
            "widths must reach the longest sequence",
        ),
        (lambda: LengthTrackedBatch.from_sequences([[1]], widths=0), ValueError, "widths must be at least 1, got 0"),
        (lambda: LengthTrackedBatch.from_sequences([[1]], widths=[]), ValueError, "at least one width"),
        (lambda: LengthTrackedBatch.from_sequences([[1]], widths=True), TypeError, "widths must be an int, got True"),
        (lambda: LengthTrackedBatch.from_sequences([[1]], order="short"), ValueError, "order must be 'longest'"),
        (lambda: LengthTrackedBatch.from_sequences([[1]], order=[1]), ValueError, "permutation of the 1 rows"),
        (
            lambda: LengthTrackedBatch.from_sequences([[1, 2]], lengths=[3]),
            LengthError,
            "declared length is 3 .inflated",
        ),
        (
            lambda: LengthTrackedBatch.from_sequences([[1, 2]], lengths=[1]),
            LengthError,
            "declared length is 1 .deflated",
        ),
        (lambda: LengthTrackedBatch.from_sequences([[1, 2]], lengths=[2, 2]), LengthError, "1 samples came with"),
        (
            lambda: LengthTrackedBatch.from_sequences([torch.zeros(1, dtype=torch.uint8)], padding_value=-100),
            ValueError,
            "padding_value -100 cannot be held by torch.uint8",
        ),
        (lambda: LengthTrackedBatch(BLOCK.numpy(), [3, 1]), TypeError, "padded must be a tensor .* got ndarray"),
        (lambda: LengthTrackedBatch(np.ma.masked_array([1]), [1]), TypeError, "padded must be a tensor"),
        (
            lambda: LengthTrackedBatch(BLOCK, [3, 1], mask=[[True] * 3] * 2),
            TypeError,
            "mask must be a bool tensor, .* list",
        ),
        (
            lambda: LengthTrackedBatch(BLOCK, [3, 1], first_step=-1),
            ValueError,
            "first_step must be at least 0, got -1",
        ),
        (lambda: LengthTrackedBatch(BLOCK, [3, 1], first_step=1.5), TypeError, "first_step must be an int, got 1.5"),
        (
            lambda: LengthTrackedBatch(BLOCK, np.ma.masked_array([3, 1])),
            TypeError,
            "lengths must be integers, got a masked",
        ),
        (
            lambda: LengthTrackedBatch.from_sequences([torch.ones(2, requires_grad=True), np.ones(2, np.float32)]),
            TypeError,
            "sample 0 requires gradients, which would end here: make tensors of the arrays among the samples",
        ),
        (
            lambda: LengthTrackedBatch.from_sequences([torch.ones(80, 5), torch.ones(80, 7)]),
            ValueError,
            r"only the first axis may differ.* where time comes last, transpose each sample to \[T, F\]",
        ),
        (lambda: apply_rnn(nn.LSTM(4, 2), TRACKED.padded), TypeError, "apply_rnn takes .* Tensor: wrap it, Length"),
        (lambda: apply_rnn(nn.LSTM(4, 2), TRACKED.pack()), TypeError, "apply_rnn takes .* PackedSequence: wrap it"),
        (lambda: last_step(TRACKED.padded), TypeError, "last_step takes a LengthTrackedBatch, got a Tensor"),
        (lambda: masked_mean(TRACKED.padded), TypeError, "masked_mean takes a LengthTrackedBatch, got a Tensor"),
        (lambda: sequence_loss(None, TRACKED, BLOCK), TypeError, "sequence_loss takes a LengthTrackedBatch, got a Ten"),
        (lambda: sequence_loss(None, BLOCK, TRACKED), TypeError, "sequence_loss takes a LengthTrackedBatch, got a Ten"),
        (lambda: nn.LSTM(4, 2)(TRACKED), AttributeError, r"no attribute 'dim'.*apply_rnn\(rnn, batch\).*\.padded"),
        (lambda: nn.Linear(4, 2)(TRACKED), TypeError, "must be Tensor, not LengthTrackedBatch"),
        (lambda: TRACKED.shape, AttributeError, r"a batch is no tensor"),
        (lambda: TRACKED.nonsense, AttributeError, "'LengthTrackedBatch' object has no attribute 'nonsense'$"),
        (lambda: LengthTrackedBatch(BLOCK, [3, 1]).with_padded(BLOCK[:, :2]), LengthError, "pass lengths="),
        (lambda: LengthTrackedBatch(BLOCK, [3, 1]).with_padded(BLOCK[:1], [3]), LengthError, "keep all rows"),
        (lambda: LengthTrackedBatch(BLOCK, [3, 1]).unsort(BLOCK, dim=1), ValueError, "axis 1 must hold .* 2 rows"),
        (lambda: LengthTrackedBatch(BLOCK, [3, 1]).split(0), ValueError, "rows must be at least 1"),
        (lambda: LengthTrackedBatch(BLOCK, [3, 1]).split_steps(0), ValueError, "steps must be at least 1"),
        (lambda: LengthTrackedBatch.concat([]), LengthError, "at least one batch"),
        (
            lambda: LengthTrackedBatch.concat(
                [LengthTrackedBatch(BLOCK, [1, 1]), LengthTrackedBatch(BLOCK > 0, [1, 1])]
            ),
            ValueError,
            "must share dtype",
        ),
        (
            lambda: LengthTrackedBatch(BLOCK, [3, 1]).unpack(LengthTrackedBatch(BLOCK, [3, 2]).pack()),
            LengthError,
            "unpack with the batch that was packed",
        ),
        (
            lambda: LengthTrackedBatch(BLOCK, [3, 1]).unpack(LengthTrackedBatch(BLOCK, [1, 3]).pack()),
            LengthError,
            r"rows come as \[1, 0\]",
        ),
        (
            lambda: LengthTrackedBatch(BLOCK, [0, 0]).unpack(LengthTrackedBatch(BLOCK, [1, 3]).pack()),
            LengthError,
            "rows that are all empty",
        ),
        # Red before, all of these: torch's words about storage and sizes, an AttributeError, or bounds that wrapped.
        (
            lambda: LengthTrackedBatch.from_sequences([torch.ones(3).to_sparse()] * 2),
            TypeError,
            r"sample 0 is a sparse tensor \(torch.sparse_coo\): make it dense with .to_dense",
        ),
        (lambda: LengthTrackedBatch.from_sequences([torch.ones(3), SPARSE]), TypeError, "sample 1 is a sparse tensor"),
        (lambda: LengthTrackedBatch.from_sequences([np.ones(3), SPARSE]), TypeError, "sample 1 is a sparse tensor"),
        (
            lambda: LengthTrackedBatch.from_sequences([torch.ones(9**5), torch.ones(9**5).to_sparse()]),
            TypeError,
            "sample 1 is a sparse tensor",
        ),
        (
            lambda: LengthTrackedBatch.from_sequences([torch.eye(3), torch.eye(3).to_sparse()]),
            TypeError,
            "sample 1 is a sparse tensor",
        ),
        (
            lambda: LengthTrackedBatch.from_sequences([torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]),
            TypeError,
            r"sample 0 is a nested tensor, .* \.unbind\(\)",
        ),
        (
            lambda: LengthTrackedBatch.from_sequences([torch.eye(3), TRACKED.nested()]),
            TypeError,
            "sample 1 is a nested tensor",
        ),
        (
            lambda: TRACKED.map(lambda padded: (padded, None)),
            TypeError,
            r"must be a tensor \[B, T, ...\], got tuple: .* apply_rnn\(rnn, batch\)",
        ),
        (
            lambda: TRACKED.unsort([torch.ones(1)] * 2),
            TypeError,
            "unsort takes a tensor .* list of tensors: unsort each",
        ),
        (lambda: TRACKED.unsort(["a", "b"]), TypeError, r"got a list: .* batch.permutation.argsort\(\)"),
        (lambda: TRACKED.unsort(TRACKED), TypeError, r"got a LengthTrackedBatch: call its own unsort\(\)"),
        (
            lambda: sequence_loss(torch.sub, TRACKED, TRACKED, weights=TRACKED),
            TypeError,
            r"weights must be a tensor \[B, T\], got LengthTrackedBatch: pass its .padded",
        ),
        (
            lambda: sequence_loss(torch.sub, TRACKED, TRACKED, weights=[[1.0] * 3] * 2),
            TypeError,
            "got list: torch.as_tensor",
        ),
        (
            lambda: LengthTrackedBatch(torch.empty(2, 2**30, device="meta"), [2**30] * 2).cu_seqlens,
            LengthError,
            r"int32, .* 2 rows have 2147483648 real steps, .* split\(rows\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR")
def test_bad_input_is_refused_with_what_where_and_the_way_out(
    make: Callable[..., Any], kind: type[Any], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make()


BYTES = {
    torch.float8_e4m3fn: ({0, -1.0, 448, float("nan")}, {float("inf"), -float("inf"), 449}),
    torch.float8_e5m2: ({0, -1.0, float("inf"), -float("inf")}, {1e5}),
    torch.float8_e4m3fnuz: ({0, -1.0, float("nan")}, {float("inf"), 241}),
    torch.float8_e5m2fnuz: ({0, -1.0}, {float("inf"), -float("inf")}),
    torch.float8_e8m0fnu: ({1, 0.5}, {0, -1.0, float("inf")}),
}


@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_a_float_of_eight_bits_is_padded_by_what_it_can_hold(dtype: torch.dtype) -> None:
    """Red before: infinity was taken for each of them, and became nan in four; so was 0 where there is none."""
    held, others = BYTES[dtype]
    rows = [torch.ones(n).to(dtype) for n in (3, 1)]
    for value in held:
        padded = LengthTrackedBatch.from_sequences(rows, padding_value=value).padded.to(torch.float64)
        assert torch.equal(padded[1, 1:], torch.full((2,), value, dtype=torch.float64)) or value != value
        assert bool(padded.isnan().any()) == (value != value)
    for value in others:
        with pytest.raises(ValueError, match="cannot be held by torch.float8"):
            LengthTrackedBatch.from_sequences(rows, padding_value=value)


def test_new_values_of_a_later_chunk_keep_its_first_step() -> None:
    """Red before: with new lengths, the chunk was taken for one from the beginning."""
    chunk = LengthTrackedBatch.from_sequences([torch.arange(6.0), torch.arange(5.0)]).split_steps(4)[1]
    shorter = chunk.with_padded(chunk.padded[:, :1], lengths=chunk.lengths.clamp(max=1))
    assert shorter.first_step == chunk.first_step == 4
    assert shorter.position_ids.tolist() == [4, 4]
    assert chunk.with_padded(chunk.padded).first_step == 4
    strided = chunk.with_padded(chunk.padded[:, ::2], lengths=[1, 1], first_step=2)
    assert strided.position_ids.tolist() == [2, 2]
    with pytest.raises(ValueError, match="first_step must be at least 0, got -1"):
        chunk.with_padded(chunk.padded, first_step=-1)


# --- lengths that are written to after the batch was made

BATCHES = {
    "made": lambda: LengthTrackedBatch(torch.randn(3, 6, 2), torch.tensor([6, 4, 2])),
    "collated": lambda: LengthTrackedBatch.from_sequences([torch.randn(n, 2) for n in (6, 4, 2)]),
    "mapped": lambda: BATCHES["made"]().map(torch.exp),
    "moved": lambda: BATCHES["made"]().to(torch.float64),
    "unsorted": lambda: BATCHES["made"]().unsort(),
    "a piece": lambda: BATCHES["made"]().split(3)[0],
    "a chunk": lambda: BATCHES["made"]().split_steps(6)[0],
    "joined": lambda: LengthTrackedBatch.concat([BATCHES["made"]()]),
    "unpacked": lambda: BATCHES["made"]().unpack(BATCHES["made"]().pack()),
    "pickled": lambda: pickle.loads(pickle.dumps(BATCHES["made"]())),
    "copied": lambda: copy.copy(BATCHES["made"]()),
    "deeply copied": lambda: copy.deepcopy(BATCHES["made"]()),
    "replaced": lambda: dataclasses.replace(BATCHES["made"]()),
    "a pytree": lambda: pytree.tree_map(torch.clone, BATCHES["made"]()),
    "an output": lambda: apply_rnn(nn.GRU(2, 2), BATCHES["made"]())[0],
}
USES = {
    "pack": LengthTrackedBatch.pack,
    "unpack": lambda batch: batch.unpack(BATCHES["made"]().pack()),
    "flat": LengthTrackedBatch.flat,
    "masked_mean": masked_mean,
    "last_step": last_step,
    "key_padding_mask": lambda batch: batch.key_padding_mask,
    "sequences": LengthTrackedBatch.sequences,
    "num_tokens": lambda batch: batch.num_tokens,
    "padding_fraction": lambda batch: batch.padding_fraction,
    "verify": LengthTrackedBatch.verify,
    "unsort": LengthTrackedBatch.unsort,
    "split": lambda batch: batch.split(2),
    "split_steps": lambda batch: batch.split_steps(2),
    "concat": lambda batch: LengthTrackedBatch.concat([batch, batch]),
    "cu_seqlens": lambda batch: batch.cu_seqlens,
    "position_ids": lambda batch: batch.position_ids,
    "nested": LengthTrackedBatch.nested,
    "as_dict": lambda batch: batch.as_dict({"n": "lengths"}),
    "to": lambda batch: batch.to("meta"),
    "map": lambda batch: batch.map(torch.exp),
    "with_padded": lambda batch: batch.with_padded(batch.padded),
    "pickle": pickle.dumps,
    "send": send,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "apply_rnn": lambda batch: apply_rnn(nn.GRU(2, 2).to(batch.padded.dtype), batch),
    "sequence_loss": lambda batch: sequence_loss(lambda x, y: (x - y).sum(-1), batch, batch),
    "loss against it": lambda batch: sequence_loss(lambda x, y: (x - y).sum(-1), BATCHES["made"](), batch),
}
WRITES = {
    "in place": lambda lengths: lengths.sub_(1),
    "through NumPy": lambda lengths: lengths.numpy().__setitem__(1, 3),
    "through data": lambda lengths: lengths.data.fill_(2),
    "out of range": lambda lengths: lengths.__setitem__(1, 9),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("use", USES)
@torch.no_grad()
def test_lengths_that_were_written_to_are_noticed_wherever_they_are_used(use: str) -> None:
    """Red before for all but lengths out of range in `pack`: mask and lengths parted without a word."""
    for make, write in itertools.product(BATCHES.values(), WRITES.values()):
        batch = make()
        USES[use](batch)
        before = batch.lengths.tolist()
        write(batch.lengths)
        with pytest.raises(LengthError, match=rf"made with lengths \[{before[0]}, .* were written to"):
            USES[use](batch)


OTHER_WRITES = {
    "mask in place": (
        lambda b: b.mask.__setitem__((1, 1), False),
        "mask was written to: row 1 now marks 3 steps, .* 4",
    ),
    "mask cleared": (lambda b: b.mask.zero_(), "mask was written to: row 0 now marks 0 steps"),
    "mask moved": (lambda b: b.mask.copy_(b.mask.flip(1)), "mask was written to: row 1"),
    "mask, NumPy": (lambda b: b.mask.numpy().__setitem__((0, 0), False), "mask was written to: row 0"),
    "mask, data": (lambda b: b.mask.data.fill_(True), "mask was written to: row 1 now marks 6 steps"),
    "places in place": (lambda b: b.permutation.copy_(b.permutation.flip(0)), "permutation .* and it was written to"),
    "places zeroed": (lambda b: b.permutation.zero_(), r"it now is \[0, 0, 0\]"),
    "places, NumPy": (lambda b: b.permutation.numpy().__setitem__(0, 7), r"it now is \[7, 1, 2\]"),
    "places, data": (lambda b: b.permutation.data.add_(1), r"it now is \[1, 2, 3\]"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("use", USES)
@torch.no_grad()
def test_mask_and_permutation_that_were_written_to_are_noticed_too(use: str) -> None:
    """Red before for all but `verify`: means used the mask, losses the lengths, and `unsort` other places."""
    for make, (write, message) in itertools.product(BATCHES.values(), OTHER_WRITES.values()):
        batch = make()
        USES[use](batch)
        write(batch)
        with pytest.raises(LengthError, match=message):
            USES[use](batch)


def test_permutation_written_to_are_not_taken_over_with_new_lengths() -> None:
    """Red before: only what unsorted in the end showed it."""
    batch = BATCHES["made"]()
    batch.permutation.copy_(torch.tensor([1, 0, 2]))
    with pytest.raises(LengthError, match="it was written to"):
        batch.with_padded(batch.padded, lengths=[6, 4, 2])
    with pytest.raises(LengthError, match="it was written to"):
        batch.unsort(torch.ones(3))


def test_a_mask_that_is_written_to_and_still_right_is_let_be() -> None:
    batch, mask = BATCHES["made"](), torch.arange(6) < torch.tensor([[6], [4], [2]])
    given = LengthTrackedBatch(batch.padded, batch.lengths, mask=mask)
    for made in (batch, given):
        made.mask.logical_or_(mask)
        masked_mean(made)
        made.pack()
    mask.zero_()
    with pytest.raises(LengthError, match="mask was written to: row 0 now marks 0"):
        given.pack()


def test_masks_written_to_in_inference_mode_are_noticed() -> None:
    with torch.inference_mode():
        batch = BATCHES["made"]()
        batch.mask[0, 5] = False
        with pytest.raises(LengthError, match="mask was written to"):
            batch.pack()


def test_a_large_mask_is_looked_at_where_torch_has_written_to_it() -> None:
    batch = LengthTrackedBatch(torch.zeros(2, 40_000), [40_000, 3])
    batch.pack()
    batch.mask[1, 3] = True
    with pytest.raises(LengthError, match="mask was written to: row 1 now marks 4 steps, its length is 3"):
        batch.pack()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: ~part if part.dtype == torch.bool else part, "mask of row 0 marks 0 steps"),
        (lambda part: part.float() if part.dtype == torch.bool else part, "mask must be bool"),
        (lambda part: torch.zeros_like(part) if part.tolist() == [2, 0, 1] else part, "distinct indices"),
    ],
)
def test_masks_and_permutation_that_a_pytree_made_unfit_are_refused(change: Callable[..., Any], message: str) -> None:
    """Red before: law 1 says that `pack` checks what a pytree was put together from."""
    batch = LengthTrackedBatch.from_sequences([[1, 2], [3], [4, 5, 6]])
    assert batch.permutation.tolist() == [2, 0, 1]
    with pytest.raises((LengthError, TypeError, ValueError), match=message):
        pytree.tree_map(change, batch).pack()


@pytest.mark.parametrize("given_as", ["tensor", "array"])
def test_lengths_and_indices_of_the_caller_do_not_change_the_batch(given_as: str) -> None:
    """Red before: the caller's tensors were kept."""
    lengths, indices = torch.tensor([6, 4, 2]), torch.tensor([2, 0, 1])
    kept = (lengths, indices) if given_as == "tensor" else (lengths.numpy(), indices.numpy())
    made = LengthTrackedBatch(torch.randn(3, 6), *kept[:1], permutation=kept[1])
    shorter = made.with_padded(torch.randn(3, 6, 1), lengths=kept[0])
    lengths.sub_(1)
    indices.zero_()
    for batch in (made, shorter):
        agrees(batch)
        assert batch.lengths.tolist() == [6, 4, 2]
        assert batch.permutation.tolist() == [2, 0, 1]
        batch.pack()


def test_lengths_written_to_are_noticed_in_inference_mode() -> None:
    with torch.inference_mode():
        batch = BATCHES["made"]()
        batch.lengths.sub_(1)
        with pytest.raises(LengthError, match="were written to"):
            batch.pack()


def test_a_batch_whose_lengths_were_written_to_can_still_be_shown() -> None:
    batch = BATCHES["made"]()
    batch.lengths.sub_(1)
    assert "lengths=[5, 3, 1]" in repr(batch)


# --- copies and pytrees


def test_a_copy_shares_its_parts_and_the_graph() -> None:
    """Red before: a copy went the way of pickle, which detaches, and its mask was made anew."""
    leaf = torch.randn(2, 3, requires_grad=True)
    batch = LengthTrackedBatch(leaf * 2, [3, 1])
    copied = copy.copy(batch)
    assert all(getattr(copied, part) is getattr(batch, part) for part in ("padded", "lengths", "mask", "permutation"))
    copied.padded.sum().backward()
    assert leaf.grad is not None


def test_a_deep_copy_has_memory_of_its_own_and_keeps_leaves_and_sharing() -> None:
    leaf = LengthTrackedBatch(torch.randn(2, 3, requires_grad=True), [3, 1])
    twice = copy.deepcopy([leaf, leaf, leaf.padded])
    assert twice[0] is twice[1]
    assert twice[0].padded is twice[2]
    assert twice[2].requires_grad
    assert same(twice[0], leaf)
    for part in ("padded", "lengths", "mask", "permutation"):
        assert getattr(twice[0], part).data_ptr() != getattr(leaf, part).data_ptr()
    with pytest.raises(RuntimeError, match="deepcopy"):
        # As torch says of a tensor that was computed.
        copy.deepcopy(leaf.map(torch.exp))


@pytest.mark.parametrize("use", ["pack", "flat", "sequences", "num_tokens", "position_ids"])
@pytest.mark.parametrize(
    "change",
    [
        lambda part: part * 2 if part.dtype == torch.int64 else part,
        lambda part: -part if part.dtype == torch.int64 else part,
        lambda part: part[:, :2] if part.dim() > 1 else part,
        lambda part: part.float(),
    ],
    ids=["doubled", "negated", "cut in time", "floats"],
)
def test_lengths_that_a_pytree_made_unfit_are_refused(change: Callable[..., Any], use: str) -> None:
    """Red before: steps of other rows were read, without a word."""
    batch = pytree.tree_map(change, LengthTrackedBatch.from_sequences([torch.arange(1.0, n + 1) for n in (6, 3, 1)]))
    with pytest.raises((LengthError, TypeError), match="length"):
        USES[use](batch)


def test_vmap_maps_over_the_rows_of_a_batch() -> None:
    """Red before: putting the pytree together raised."""
    batch = LengthTrackedBatch.from_sequences([torch.arange(1.0, n + 1) for n in (3, 1)])
    assert torch.equal(torch.vmap(lambda row: row.padded.sum())(batch), torch.tensor([6.0, 1.0]))


def test_a_pytree_node_takes_any_leaves() -> None:
    """Red before: None in place of the mask raised."""
    batch = LengthTrackedBatch.from_sequences([[1, 2, 3], [4]], padding_value=7)
    leaves, spec = pytree.tree_flatten({"x": batch})
    for others in ([None] * 4, [object() for _ in leaves], [[leaf.shape] for leaf in leaves]):
        rebuilt = pytree.tree_unflatten(others, spec)
        assert type(rebuilt["x"]) is LengthTrackedBatch
        assert rebuilt["x"].padding_value == 7
        repr(rebuilt)
        assert pytree.tree_structure(pytree.tree_map(lambda _: 0, batch)) == pytree.tree_structure(batch)
    assert pytree.tree_leaves(pytree.tree_map(lambda part: part.dtype, batch)) == [leaf.dtype for leaf in leaves]
    assert same(pytree.tree_unflatten(leaves, spec)["x"], batch)


def test_a_subclass_keeps_its_kind_through_everything() -> None:
    """Red before: a subclass was a leaf to pytrees, and weights-only loading refused it."""

    class Frames(LengthTrackedBatch):
        @property
        def seconds(self) -> float:
            return self.num_tokens / 100

    batch = Frames.from_sequences([[1, 2], [3]])
    assert len(pytree.tree_leaves(batch)) == 4
    doubled = pytree.tree_map(lambda part: part.clone(), batch)
    for kept in (doubled, copy.copy(batch), copy.deepcopy(batch), batch.map(lambda x: x * 2), batch.to(torch.float32)):
        assert type(kept) is Frames
        assert kept.seconds == 0.03
    assert pytree.tree_structure(batch) != pytree.tree_structure(LengthTrackedBatch.from_sequences([[1, 2], [3]]))


class Spectrum(LengthTrackedBatch):
    """A subclass that can be found by its name."""


def test_a_subclass_loads_under_weights_only(tmp_path: Path) -> None:
    torch.save(Spectrum.from_sequences([[1, 2], [3]]), tmp_path / "batch.pt")
    assert type(torch.load(tmp_path / "batch.pt")) is Spectrum


def test_joined_batches_that_are_padded_with_nan_keep_their_padding_value() -> None:
    rows = [torch.ones(2), torch.ones(1)]
    parts = [LengthTrackedBatch.from_sequences(rows, padding_value=float("nan")).to(torch.float64) for _ in range(2)]
    joined = LengthTrackedBatch.concat([parts[0], pickle.loads(pickle.dumps(parts[1]))])
    assert joined.padding_value != joined.padding_value
    joined.verify()
    assert pytree.tree_structure(parts[0]) == pytree.tree_structure(pickle.loads(pickle.dumps(parts[1])))


def test_a_batch_of_fake_tensors_is_made_without_reading_them() -> None:
    with FakeTensorMode():
        batch = LengthTrackedBatch(torch.zeros(2, 3, 4), torch.tensor([3, 1]), permutation=torch.tensor([1, 0]))
        assert batch.mask.shape == (2, 3)
        assert masked_mean(batch).shape == (2, 4)
        assert batch.map(torch.exp).unsort().padded.shape == (2, 3, 4)


@pytest.mark.parametrize("width", [2**15 - 1, 2**15, 2**15 + 1, 70_000])
def test_masks_of_wide_blocks_are_those_of_narrow_ones(width: int) -> None:
    counts = np.array([width, 0, 1, width - 1, 2**15 - 1, 2**14])
    assert np.array_equal(length_mask(counts, width), np.arange(width) < counts[:, None])


WIDE_ROWS = [torch.arange(float(n)) for n in (40_000, 3, 70_000, 0)]
JOURNEYS = {
    "at once": lambda batch: batch,
    "copied": copy.copy,
    "deeply copied": copy.deepcopy,
    "replaced": dataclasses.replace,
    "pickled": lambda batch: pickle.loads(pickle.dumps(batch)),
    "a pytree": lambda batch: pytree.tree_map(torch.clone, batch),
    "mapped": lambda batch: batch.map(torch.sin),
    "moved": lambda batch: batch.to(torch.float64),
    "unsorted and back": lambda batch: LengthTrackedBatch.from_sequences(batch.unsort().sequences()),
    "packed": lambda batch: batch.unpack(batch.pack()),
    "split": lambda batch: LengthTrackedBatch.concat(batch.split(3)),
}


@pytest.mark.parametrize("journey", JOURNEYS.values(), ids=JOURNEYS)
@pytest.mark.parametrize("kind", ["tensors", "arrays"])
def test_a_wide_batch_has_a_mask_wherever_it_goes(journey: Callable[..., Any], kind: str) -> None:
    """A collator does not make it, since nothing may use it before it goes to a device, where it is made again."""
    rows = WIDE_ROWS if kind == "tensors" else [row.numpy() for row in WIDE_ROWS]
    batch = LengthTrackedBatch.from_sequences(rows, padding_value=5)
    assert batch.num_tokens == 110_003
    there = journey(batch)
    agrees_widely(there)
    agrees_widely(batch)
    assert batch.mask is batch.mask
    there.verify()


def agrees_widely(batch: LengthTrackedBatch) -> None:
    assert batch.lengths.tolist() == [70_000, 40_000, 3, 0]
    assert torch.equal(batch.mask, torch.arange(70_000) < batch.lengths[:, None])


def test_writes_are_noticed_in_a_wide_batch_with_and_without_a_mask() -> None:
    batch = LengthTrackedBatch.from_sequences(WIDE_ROWS)
    batch.lengths[1] = 4
    with pytest.raises(LengthError, match="they were written to"):
        batch.mask  # noqa: B018
    for first in (lambda batch: batch.pack(), lambda batch: batch.mask):
        batch = LengthTrackedBatch.from_sequences(WIDE_ROWS)
        first(batch)
        batch.mask[2, 3] = True
        with pytest.raises(LengthError, match="mask was written to: row 2 now marks 4 steps, its length is 3"):
            masked_mean(batch)


def test_compiled_code_takes_wide_batches_with_and_without_a_mask() -> None:
    def used(batch: LengthTrackedBatch) -> torch.Tensor:
        return torch.where(batch.mask, batch.padded, 0).sum(1) + masked_mean(batch)

    torch._dynamo.reset()
    compiled = torch.compile(used, backend="eager", fullgraph=True)
    for count in (2, 3, 4):
        for read in (False, True):
            batch = LengthTrackedBatch.from_sequences(WIDE_ROWS[:count])
            assert batch.mask.any() or not read
            fresh = LengthTrackedBatch.from_sequences(WIDE_ROWS[:count])
            assert torch.equal(compiled(batch if read else fresh), used(batch))


LONG = {
    "conjugate": lambda row: torch.complex(row, row).conj(),
    "negative": lambda row: torch.complex(row, row).conj().imag,
    "strided": lambda row: torch.stack([row, row], -1)[..., 0],
    "a parameter": lambda row: nn.Parameter(row, requires_grad=False),
    "bfloat16": lambda row: row.to(torch.bfloat16),
    "expanded": lambda row: row[:1].expand(len(row), *row.shape[1:]),
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("features", [(), (3,)])
def test_long_rows_of_any_memory_are_padded_as_torch_pads_them(kind: str, features: tuple[int, ...]) -> None:
    rows = [LONG[kind](torch.randn(n, *features)) for n in (40_000, 1, 80_000)]
    batch = LengthTrackedBatch.from_sequences(rows, padding_value=3, order="given")
    assert torch.equal(batch.padded, pad_sequence([row.resolve_conj() for row in rows], True, 3))
    batch.padded.zero_()
    assert all(row.any() for row in rows)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is (deprecated|not supported)")
def test_changes_flow_through_long_rows_in_forward_mode() -> None:
    with forward_ad.dual_level():
        change = torch.randn(40_000)
        rows = [forward_ad.make_dual(torch.randn(40_000), change), torch.randn(80_000)]
        padded = LengthTrackedBatch.from_sequences(rows, order="given").padded
        tangent = forward_ad.unpack_dual(padded).tangent
    assert torch.equal(tangent[0, :40_000], change)
    assert not tangent[1].any()
