"""`left_padded`: the same rows with their padding on the left, against torch's own; and generation from them."""

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from collate import LengthError, LengthTrackedBatch


@given(strategies.sequences(), st.sampled_from(["longest", "given"]), st.integers(1, 4))
def test_the_padding_is_on_the_left_as_torch_pads(rows: list[Tensor], order: str, multiple: int) -> None:
    """Red when rows were flipped: their time steps came in the reverse order."""
    batch = LengthTrackedBatch.from_sequences(rows, order=order, padding_value=1, widths=multiple)
    before = batch.padded.clone()
    left = batch.left_padded()
    width = batch.padded.shape[1]
    expected = pad_sequence(batch.sequences(), batch_first=True, padding_value=1, padding_side="left")
    # The width of the batch may be a multiple, on the left as well.
    gap = width - expected.shape[1]
    assert torch.equal(left["input_ids"][:, gap:], expected)
    assert bool((left["input_ids"][:, :gap] == 1).all())
    for row, length in enumerate(batch.lengths.tolist()):
        assert left["attention_mask"][row].tolist() == [False] * (width - length) + [True] * length
        assert left["position_ids"][row].tolist() == [0] * (width - length) + list(range(length))
    assert torch.equal(batch.padded, before)
    assert left["input_ids"].dtype == batch.padded.dtype


def test_gradients_flow_and_chunks_know_their_positions() -> None:
    values = torch.arange(10.0).reshape(2, 5).requires_grad_()
    batch = LengthTrackedBatch(values, torch.tensor([5, 3]))
    (batch.left_padded()["input_ids"] * torch.arange(5.0)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0, 1, 2, 3, 4], [2, 3, 4, 0, 1]]
    later = batch.split_steps(3)[1].left_padded({"p": "position_ids"})
    assert later["p"].tolist() == [[3, 4], [0, 0]]


def test_what_cannot_be_named_and_what_was_written_is_refused() -> None:
    batch = LengthTrackedBatch.from_sequences([torch.ones(2), torch.ones(1)])
    with pytest.raises(ValueError, match="'x' names 'padded', which is none of values, mask, position_ids"):
        batch.left_padded({"x": "padded"})
    batch.lengths[0] = 1
    with pytest.raises(LengthError):
        batch.left_padded()


def test_left_padding_compiles_as_a_whole() -> None:
    batch = LengthTrackedBatch.from_sequences([torch.ones(3), torch.ones(1)])
    compiled = torch.compile(
        lambda padded, lengths: LengthTrackedBatch(padded, lengths).left_padded(), fullgraph=True, backend="eager"
    )
    for ours, plain in zip(compiled(batch.padded, batch.lengths).values(), batch.left_padded().values(), strict=True):
        assert torch.equal(ours, plain)
