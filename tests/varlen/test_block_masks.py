"""Block masks in closed form, compared with torch's own, which looks at all pairs of steps."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from collate import LengthError, VarlenBatch
from collate.varlen.kernels import block_masks
from collate.varlen.kernels.block_masks import BlockRows, key_ranges, make_block_mask, query_ranges
from collate.varlen.kernels.mask_kinds import MaskOptions, mask_function, step_ids
from collate.varlen.offsets import document_starts

KINDS = ("causal", "bidirectional", "sliding", "prefix")
SIDES = ("kv", "full_kv", "q", "full_q")


@st.composite
def batches(draw: st.DrawFn, longest: int = 300) -> VarlenBatch:
    """Rows of documents of all lengths, empty ones and empty rows among them."""
    lengths = st.one_of(st.integers(0, longest), st.integers(0, 20), st.sampled_from([0, 1, 63, 64, 65, 127, 128, 256]))
    per_row = draw(st.lists(st.lists(lengths, max_size=6), min_size=1, max_size=3))
    align = draw(st.sampled_from([1, 1, 8]))
    sizes = [sum(-(-n // align) * align for n in row) for row in per_row]
    capacity = max(*sizes, 1) + draw(st.integers(0, 200))
    capacity = -(-capacity // align) * align
    values = torch.zeros(len(per_row), capacity, dtype=torch.int8)
    return VarlenBatch(values, np.array(list(chain(*per_row)), np.int64), [len(row) for row in per_row], align=align)


@st.composite
def options(draw: st.DrawFn, lengths: torch.Tensor) -> dict[str, object]:
    kind = draw(st.sampled_from(KINDS))
    if kind == "sliding":
        return {"kind": kind, "window": draw(st.integers(1, 400))}
    if kind == "prefix":
        one = st.integers(0, 300)
        return {
            "kind": kind,
            "prefix": draw(st.one_of(one, st.lists(one, min_size=len(lengths), max_size=len(lengths)))),
        }
    return {"kind": kind}


def tables(mask: BlockMask, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    return getattr(mask, f"{side}_num_blocks"), getattr(mask, f"{side}_indices")


def assert_equal(ours: BlockMask, theirs: BlockMask) -> None:
    """Counts, and in each row as many indices as are counted."""
    assert ours.shape == theirs.shape
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for side in SIDES:
        (count, index), (their_count, their_index) = tables(ours, side), tables(theirs, side)
        assert index.shape == their_index.shape
        assert (count.dtype, index.dtype) == (torch.int32, torch.int32)
        assert torch.equal(count, their_count), side
        counted = torch.arange(index.shape[-1]) < count[..., None]
        assert torch.equal(index[counted], their_index[counted]), side
        # What is not counted is a block nevertheless.
        assert index.min() >= 0
        assert index.max() < max(index.shape[-1], 1)


def slow_mask(batch: VarlenBatch, kind: str, window: int = 0, prefix: object = 0) -> torch.Tensor:
    """All pairs of steps, one document after the other: bool `[R, C, C]`."""
    rows, capacity = batch.values.shape[:2]
    mask = torch.eye(capacity, dtype=torch.bool).repeat(rows, 1, 1)
    starts = document_starts(batch.lengths.numpy(), batch.documents_per_row.numpy(), capacity, batch.align)
    prefixes = np.broadcast_to(np.asarray(prefix), len(batch))
    for start, length, first in zip(starts.tolist(), batch.lengths.tolist(), prefixes.tolist(), strict=True):
        row, step = divmod(start, capacity) if length else (0, 0)
        here = torch.ones(length, length, dtype=torch.bool)
        if kind != "bidirectional":
            here = here.tril()
        if kind == "sliding":
            here = here.triu(1 - window)
        if kind == "prefix":
            here[:, :first] = True
        mask[row, step : step + length, step : step + length] = here
    return mask


@given(st.data())
def test_a_block_mask_is_that_of_all_pairs_of_steps(data: st.DataObject) -> None:
    batch = data.draw(batches())
    option = data.draw(options(batch.lengths))
    size = data.draw(st.sampled_from([16, 64, 128]))
    expected = slow_mask(batch, **option)
    rows, capacity = batch.values.shape
    theirs = create_block_mask(
        lambda b, h, q, k: expected[b, q, k], rows, None, capacity, capacity, device="cpu", BLOCK_SIZE=size
    )
    assert_equal(batch.block_mask(**option, block_size=size), theirs)
    assert torch.equal(batch.attention_mask(**option)[:, 0], expected)


@given(st.data())
def test_tables_made_on_a_device_are_those_of_the_host(data: st.DataObject) -> None:
    batch = data.draw(batches())
    option = data.draw(options(batch.lengths))
    ours = batch.block_mask(**option, block_size=64)
    made = []
    real = block_masks._fill_on_host
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_masks, "_fill_on_host", lambda *args: made.append(1) or block_masks._fill_on_device(*args))
        theirs = batch.block_mask(**option, block_size=64)
    assert len(made) == 2
    assert block_masks._fill_on_host is real
    for side in SIDES:
        for one, other in zip(tables(ours, side), tables(theirs, side), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 128])
def test_a_row_of_16384_steps_has_the_mask_of_all_its_pairs(kind: str, size: int) -> None:
    rng = np.random.default_rng(size)
    lengths = rng.integers(1, 900, 40)
    capacity = 16_384 - size // 3
    lengths = lengths[np.cumsum(lengths) < capacity - 7000]
    # One document over many blocks, and a total that is no multiple of a block.
    lengths = np.append(lengths, 6000)
    batch = VarlenBatch(torch.zeros(1, capacity, dtype=torch.int8), lengths)
    option: dict[str, object] = {"kind": kind}
    option |= {"window": 1000} if kind == "sliding" else {"prefix": lengths // 3} if kind == "prefix" else {}
    ours = batch.block_mask(**option, block_size=size)
    theirs = create_block_mask(ours.mask_mod, 1, None, capacity, capacity, device="cpu", BLOCK_SIZE=size)
    assert_equal(ours, theirs)


def test_the_shape_of_the_tables_does_not_depend_on_the_documents() -> None:
    one = VarlenBatch(torch.zeros(1, 1000), [1000]).block_mask()
    many = VarlenBatch(torch.zeros(1, 1000), [10] * 100).block_mask()
    assert [tables(one, side)[1].shape for side in SIDES] == [tables(many, side)[1].shape for side in SIDES]
    assert one.shape == (1, 1, 1000, 1000)


def test_no_table_of_all_pairs_of_steps_is_made() -> None:
    """At 2 M steps such a table would take four terabytes, and the index tables of 8,192 steps a block 1 MB."""
    capacity = 1 << 21
    batch = VarlenBatch(torch.zeros(1, 1, dtype=torch.int8).expand(1, capacity), [capacity // 5] * 5)
    mask = batch.block_mask("bidirectional", block_size=8192)
    assert mask.kv_indices.shape == (1, 1, 256, 256)


@settings(max_examples=20)
@given(st.integers(1, 500), st.integers(1, 4))
def test_ranges_of_keys_and_of_queries_are_each_others_transpose(window: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(0, 200, 12)
    capacity = int(lengths.sum()) + 30
    rows = BlockRows.of(
        lengths, document_starts(lengths, np.array([12]), capacity, 1), np.array([12]), capacity=capacity, block_size=16
    )
    options_ = MaskOptions("sliding", window=window)
    keys, queries = key_ranges(rows, options_), query_ranges(rows, options_)
    blocks = rows.index
    seen = (blocks >= keys.first[0][:, None]) & (blocks <= keys.last[0][:, None])
    sees = (blocks >= queries.first[0][:, None]) & (blocks <= queries.last[0][:, None])
    assert np.array_equal(seen, sees.T)


@pytest.mark.parametrize(
    ("options_", "error", "words"),
    [
        ({"kind": "local"}, ValueError, "kind must be one of causal, bidirectional, sliding, prefix, got 'local'"),
        ({"kind": "sliding"}, ValueError, "kind='sliding' needs window"),
        ({"kind": "causal", "window": 3}, ValueError, "kind='causal' takes no window"),
        ({"kind": "prefix"}, ValueError, "needs prefix"),
        ({"kind": "sliding", "window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"kind": "sliding", "window": 2.0}, TypeError, "window must be an int"),
        ({"kind": "prefix", "prefix": [1]}, LengthError, r"one per document, \[2\], got \[1\]"),
        ({"kind": "prefix", "prefix": [1, -1]}, LengthError, "must not be negative, got -1"),
        ({"kind": "prefix", "prefix": 0.5}, TypeError, "whole numbers of steps"),
        ({"block_size": 100}, ValueError, "block_size must be a multiple of 16, got 100"),
    ],
)
def test_an_impossible_option_is_refused_by_name(options_: dict, error: type, words: str) -> None:
    batch = VarlenBatch(torch.zeros(1, 8), [3, 4])
    with pytest.raises(error, match=words):
        batch.block_mask(**options_)


def test_lengths_that_were_written_to_are_noticed() -> None:
    batch = VarlenBatch(torch.zeros(1, 8), [3, 4])
    batch.lengths[0] = 4
    with pytest.raises(LengthError, match="written to"):
        batch.block_mask()


def test_the_mask_function_takes_what_flex_gives_it() -> None:
    ids = step_ids(torch.tensor([[0, 0, -1, -1]]))
    assert ids.tolist() == [[0, 0, -3, -4]]
    allowed = mask_function("bidirectional", ids)
    number = torch.tensor
    assert bool(allowed(number(0), number(0), number(1), number(0)))
    assert not bool(allowed(number(0), number(0), number(3), number(2)))
    rows = BlockRows.of(np.array([2]), np.array([0]), np.array([1]), capacity=4, block_size=16)
    mask = make_block_mask(rows, MaskOptions("bidirectional"), allowed, capacity=4, device=torch.device("cpu"))
    assert mask.kv_num_blocks.tolist() == [[[1]]]


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_a_block_mask_of_rows_that_are_empty_at_first(kind: str) -> None:
    batch = VarlenBatch(torch.zeros(3, 16), [1], [0, 0, 1])
    expected = slow_mask(batch, kind)
    theirs = create_block_mask(lambda b, h, q, k: expected[b, q, k], 3, None, 16, 16, device="cpu", BLOCK_SIZE=16)
    assert_equal(batch.block_mask(kind, block_size=16), theirs)
