"""A varlen batch on its way: bad input, writes, pickles, pytrees, devices, compiled code."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_varlen_laws import packed
from torch import nn
from torch.utils import _pytree as pytree

from collate import (
    DevicePrefetcher,
    LengthError,
    VarlenBatch,
    VarlenCollator,
    apply_rnn,
    last_step,
    masked_mean,
    sequence_loss,
)
from collate.varlen.spans import check_int32

PARTS = ("values", "lengths", "documents_per_row", "permutation", "mask", "document_ids", "position_ids", "cu_seqlens")


def same(ours: Any, theirs: Any) -> Any:
    """Whether two batches are the same bit for bit."""
    alike = all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in PARTS)
    return alike and (ours.padding_value, ours.ignore_index, ours.max_seqlen, ours.align, ours.max_documents) == (
        theirs.padding_value,
        theirs.ignore_index,
        theirs.max_seqlen,
        theirs.align,
        theirs.max_documents,
    )


def small(**options: Any) -> Any:
    options = {"capacity": 6, "rows": 3, "align": 2, "max_documents": 2, "max_seqlen": 5} | options
    return VarlenBatch.from_sequences([torch.arange(n) for n in (5, 2, 3)], padding_value=-1, **options)


@given(packed(), st.booleans())
def test_pickles_copies_and_pytrees_give_the_same_batch(case: Any, chunk: Any) -> None:
    _, batch = case
    if chunk:
        batch = batch.split_steps(batch.align)[-1]
    leaves, spec = pytree.tree_flatten(batch)
    weights_only = io.BytesIO()
    torch.save(batch, weights_only)
    weights_only.seek(0)
    for again in (
        pickle.loads(pickle.dumps(batch)),
        copy.copy(batch),
        copy.deepcopy(batch),
        pytree.tree_unflatten(leaves, spec),
        torch.load(weights_only),
        pickle.loads(bytes(ForkingPickler.dumps(batch))),
    ):
        assert same(again, batch)
        assert torch.equal(again.flat(), batch.flat())
        again.verify()


def test_pytrees_take_any_leaves() -> None:
    batch = small()
    counts = pytree.tree_map(lambda leaf: leaf.numel(), batch)
    assert "VarlenBatch(18" in repr(counts)
    doubled = pytree.tree_map(lambda leaf: leaf, batch)
    assert same(doubled, batch)
    broken = pytree.tree_map(lambda leaf: leaf * 3, batch)
    with pytest.raises(LengthError, match="documents_per_row sums to 9, there are 3 lengths"):
        broken.flat()


def test_a_pickle_is_small_and_a_piece_sends_only_itself() -> None:
    batch = VarlenBatch.from_sequences([torch.zeros(100) for _ in range(200)], capacity=1000)
    whole, piece = len(pickle.dumps(batch)), len(pickle.dumps(batch.split_rows(1)[0]))
    assert whole < batch.values.nbytes + 6000
    assert piece < batch.values.nbytes / 10


@pytest.mark.parametrize("name", ["lengths", "documents_per_row", "permutation"])
def test_a_write_to_the_integers_is_noticed(name: str) -> None:
    batch = small()
    getattr(batch, name)[0] += 1
    for use in (batch.flat, batch.sequences, batch.to_padded, lambda: batch.split_rows(1), lambda: pickle.dumps(batch)):
        with pytest.raises(LengthError, match=f"made with {name} .* written to"):
            use()


@pytest.mark.parametrize("name", ["mask", "document_ids", "position_ids", "cu_seqlens"])
def test_a_write_to_what_kernels_read_is_noticed(name: str) -> None:
    batch = small()
    part = getattr(batch, name)
    part[0] = 0
    for use in (batch.flat, batch.to_padded, batch.verify, lambda: last_step(batch), lambda: batch.to(torch.float32)):
        with pytest.raises(LengthError, match=r"the batch's \w+ were written to 1 times since they were made"):
            use()
    other = small()
    getattr(other, name).numpy()[0] ^= True
    with pytest.raises(LengthError, match="are not those of"):
        other.verify()


def test_what_the_caller_keeps_is_not_the_batchs() -> None:
    lengths, per_row = torch.tensor([2, 1]), np.array([2])
    batch = VarlenBatch(torch.zeros(1, 4), lengths, per_row)
    lengths[0], per_row[0] = 9, 9
    assert batch.lengths.tolist() == [2, 1]
    assert batch.num_tokens == 3


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((torch.zeros(4), [1]), ValueError, r"values must be \[R, C, ...\]"),
        (([[1]], [1]), TypeError, "values must be a tensor"),
        ((torch.zeros(2, 4), [1, 2]), ValueError, "documents_per_row must say how many"),
        ((torch.zeros(2, 4), [1, 2], [2]), LengthError, r"documents_per_row must be one per row, \[2\], got \[1\]"),
        ((torch.zeros(2, 4), [1, 2], [1, 2]), LengthError, "documents_per_row sums to 3, there are 2 lengths"),
        ((torch.zeros(1, 4), [3, 2]), LengthError, r"row 0 have \[3, 2\] steps and end at step 5 .*the capacity is 4"),
        ((torch.zeros(1, 4), [-1, 2]), LengthError, "lengths must not be negative, got -1 at index 0"),
        ((torch.zeros(1, 4), [1.0, 2.0]), TypeError, "lengths must be integers"),
        ((torch.zeros(1, 4), [1, 2], None, [0, 0]), ValueError, "permutation must hold distinct indices"),
        ((torch.zeros(1, 4), None), TypeError, "lengths must be integers, got None"),
        ((torch.zeros(1, 4), 3), LengthError, r"lengths must be one-dimensional, got shape \[\]"),
        (
            (torch.zeros(1, 4), [2**62] * 4),
            LengthError,
            "document 0 in row 0 has 4611686018427387904 steps, the capacity",
        ),
    ],
)
def test_what_does_not_agree_is_refused(arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        VarlenBatch(*arguments)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"align": 3}, ValueError, "capacity must be a multiple of align, got 4 and 3"),
        ({"max_documents": 1}, LengthError, "row 0 holds 2 documents, max_documents is 1"),
        ({"max_seqlen": 1}, LengthError, "document 1 has 2 steps, max_seqlen is 1"),
        ({"padding_value": 0.5}, ValueError, "padding_value 0.5 cannot be held by torch.int64"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        VarlenBatch(torch.zeros(1, 4, dtype=torch.int64), [1, 2], **options)


def test_offsets_beyond_int32_are_refused() -> None:
    check_int32(1, 2**31 - 1)
    with pytest.raises(LengthError, match="2 rows of 1073741824 steps are 2147483648 steps, offsets are int32"):
        check_int32(2, 2**30)
    values = torch.zeros(1, 1).expand(2**16, 2**15)
    with pytest.raises(LengthError, match="offsets are int32"):
        VarlenBatch(values, [1], [1] + [0] * (2**16 - 1))


def test_a_deflated_length_is_found_by_verify() -> None:
    batch = VarlenBatch(torch.tensor([[1, 2, 3, 0]]), [2], padding_value=0)
    with pytest.raises(LengthError, match="padding at step 2 holds 3"):
        batch.verify()


def test_losses_refuse_what_does_not_belong_together() -> None:
    batch = small(align=1)
    values = batch.with_values(torch.zeros(3, 6, 4))
    other = VarlenBatch(batch.values, batch.lengths, batch.documents_per_row, [1, 0, 2])
    loss = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(LengthError, match="collate both fields together"):
        sequence_loss(loss, values, other)
    with pytest.raises(TypeError, match="output is a VarlenBatch, target is a LengthTrackedBatch"):
        sequence_loss(loss, values, batch.to_padded())
    with pytest.raises(ValueError, match=r"weights must be \[B, T\] = \[3, 6\], or of documents \[N\]"):
        sequence_loss(loss, values, batch, weights=torch.ones(2))


def test_errors_say_what_to_do() -> None:
    batch = small()
    with pytest.raises(AttributeError, match="a batch is no tensor"):
        batch.shape  # noqa: B018
    with pytest.raises(LengthError, match=r"new values must be \[3, 6\] and features"):
        batch.with_values(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="one entry for each of the 3 documents, got 2"):
        batch.unsort([1, 2])
    with pytest.raises(ValueError, match=r"one entry for each of the 3 documents, got shape \[2, 3\] with dim=5"):
        batch.unsort(torch.zeros(2, 3), dim=5)
    with pytest.raises(TypeError, match="a tensor or a list with one entry per document, got a tuple"):
        batch.unsort((1, 2, 3))
    with pytest.raises(TypeError, match=r"new values must be a tensor \[3, 6\] and features, got NoneType"):
        batch.map(lambda values: None)
    with pytest.raises(TypeError, match="rows must be an int, got True"):
        batch.split_rows(True)
    with pytest.raises(TypeError, match="steps must be an int, got 2.0"):
        batch.split_steps(2.0)
    with pytest.raises(TypeError, match="concat takes VarlenBatch objects, got a LengthTrackedBatch"):
        VarlenBatch.concat([batch, batch.to_padded()])
    with pytest.raises(ValueError, match="ignore_index -100 cannot be held by torch.uint8"):
        batch.to(torch.uint8).next_step_labels()
    with pytest.raises(ValueError, match="multiple of 2 \\* size = 4"):
        batch.context_parallel(0, 2)
    with pytest.raises(ValueError, match="names 'padded', which is none of"):
        batch.as_dict({"x": "padded"})
    with pytest.raises(ValueError, match="multiple of align=2"):
        batch.split_steps(3)
    with pytest.raises(LengthError, match="at least one batch"):
        VarlenBatch.concat([])
    with pytest.raises(ValueError, match="batches must share"):
        VarlenBatch.concat([batch, small(align=1)])


def test_options_are_kept_as_python_numbers_that_load_again() -> None:
    """NumPy's numbers would be refused by weights-only loading."""
    collate = VarlenCollator(np.float32(-1), capacity=np.int64(8), max_documents=np.int32(2), max_seqlen=np.int64(6))
    batch = collate([torch.arange(3.0)])
    made = VarlenBatch(torch.zeros(1, 4), [2], padding_value=np.float32(0), ignore_index=np.int64(-1))
    for saved in (batch, made, made.next_step_labels(np.int64(-2))):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        assert same(torch.load(file), saved)
        assert {type(value) for value in saved.spans.options.values()} <= {int, type(None)}


def test_labels_keep_their_mark_in_another_dtype() -> None:
    labels = small().next_step_labels().to(torch.uint8)
    ours = sequence_loss(lambda x, y: x + 0 * y, labels.with_values(torch.ones(3, 6)), labels, reduction="sum")
    assert labels.ignore_index == 156
    assert ours == 7


def test_a_padded_batch_that_was_imported_alone_goes_to_varlen() -> None:
    code = "from collate.batch import *; print(LengthTrackedBatch.from_sequences([[1, 2], [3]]).to_varlen(capacity=4))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.startswith("VarlenBatch([1, 4] int64")


@pytest.mark.parametrize("kind", ["padded", "varlen"])
def test_a_batch_that_a_recurrent_module_has_read_is_sent_as_before(kind: str) -> None:
    """What `apply_rnn` keeps with the batch, an index for each real step, stays where it is."""
    batch = VarlenBatch.from_sequences([torch.zeros(n, 2) for n in (500, 300)])
    batch = batch.to_padded() if kind == "padded" else batch
    before = pickle.dumps(batch)
    apply_rnn(nn.GRU(2, 3), batch)
    assert pickle.dumps(batch) == before
    assert bytes(ForkingPickler.dumps(copy.deepcopy(batch))) == bytes(ForkingPickler.dumps(batch))
    assert vars(copy.deepcopy(batch)).keys() == vars(pickle.loads(before)).keys()
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    assert torch.equal(torch.load(file).flat(), batch.flat())


def test_dtypes_and_devices_change_values_alone() -> None:
    batch = small()
    floats = batch.to(torch.float16)
    assert floats.values.dtype == torch.float16
    assert floats.padding_value == -1
    assert floats.spans is batch.spans
    assert floats.offsets is batch.offsets
    assert batch.to("cpu") is batch
    meta = batch.to("meta")
    assert meta.values.is_meta
    assert meta.cu_seqlens.is_meta
    assert meta.mask.shape == (3, 6)
    assert meta.lengths.tolist() == batch.lengths.tolist()
    assert list(DevicePrefetcher([batch], "cpu")) == [batch]


def test_a_default_device_and_inference_mode_change_nothing() -> None:
    collate = VarlenCollator(-1, capacity=6, rows=3, align=2)
    samples = [torch.arange(5.0), torch.arange(3.0)]
    expected = parts_of(collate(samples))
    with torch.device("meta"):
        on_default = parts_of(collate(samples))
    with torch.inference_mode():
        in_inference = parts_of(collate(samples))
    for parts in (on_default, in_inference):
        for ours, theirs in zip(parts, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def parts_of(batch: VarlenBatch) -> list[torch.Tensor]:
    """Everything that a batch makes of its documents."""
    padded = batch.to_padded()
    made = [batch.next_step_labels(), padded.to_varlen(capacity=6), *batch.split_rows(1), *batch.split_steps(2)]
    results = [part.values for part in (*made, VarlenBatch.concat([batch, batch]), pickle.loads(pickle.dumps(batch)))]
    shared = batch.context_parallel(0, 1).take(batch.values)
    sums = [masked_mean(batch), last_step(batch), batch.flat(), batch.unsort(last_step(batch)), shared]
    return [*results, *sums, padded.padded, *(getattr(batch, name) for name in PARTS)]


def test_a_dict_for_trainers_holds_what_kernels_take() -> None:
    batch = small()
    given = batch.as_dict({"input_ids": "values", "cu_seq_lens_q": "cu_seqlens", "max_length_q": "max_seqlen"})
    assert given["max_length_q"] == 5
    assert given["cu_seq_lens_q"] is not None


class Model(nn.Module):
    """Reads everything that a graph may hold: masks, ids, positions, offsets, labels, the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions, self.head = nn.Embedding(9, 8), nn.Embedding(64, 8), nn.Linear(8, 9)

    def forward(self, tokens: Any) -> Any:
        hidden = self.embed(tokens.values) + self.positions(tokens.position_ids)
        ids = tokens.document_ids
        allowed = (ids[:, :, None] == ids[:, None]) & tokens.mask[:, None]
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        scores = (hidden @ hidden.mT).masked_fill(~(allowed & causal), -1e9).softmax(-1)
        logits = tokens.with_values(scores @ hidden).map(self.head)
        labels = tokens.next_step_labels()
        loss = nn.CrossEntropyLoss(reduction="none")
        both = [sequence_loss(loss, logits, labels, reduction=kind) for kind in ("token", "sequence")]
        return sum(both) + 0 * (tokens.cu_seqlens_padded[-1] + tokens.max_seqlen)


def run_of(count: Any, collate: Any, seed: int = 0) -> Iterator[Any]:
    """Batches of as many documents as it happens, of one capacity."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        lengths = rng.integers(1, 20, rng.integers(2, 9)).tolist()
        yield collate([torch.from_numpy(rng.integers(0, 9, n)) for n in lengths])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_run_of_one_capacity_is_compiled_once_in_200_batches(backend: str) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    graphs = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    model = Model()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    collate = VarlenCollator(capacity=32, rows=8, max_documents=8)
    for number, batch in enumerate(run_of(200, collate)):
        loss = compiled(batch)
        if number % 20 == 0:
            torch.testing.assert_close(loss, model(batch))
            weights = list(model.parameters())
            for ours, theirs in zip(*[torch.autograd.grad(x, weights) for x in (loss, model(batch))], strict=True):
                torch.testing.assert_close(ours, theirs)
    assert len(graphs) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_rows_without_any_document_travel_too() -> None:
    last = small().split_rows(1)[-1].split_steps(2)[-1]
    empty = VarlenBatch.from_sequences([torch.zeros(2)], capacity=2, rows=2).split_rows(1)[1]
    assert len(empty) == 0
    assert empty.mask.sum() == 0
    assert empty.cu_seqlens.tolist() == [0, 2]
    for batch in (last, empty):
        assert same(pickle.loads(pickle.dumps(batch)), batch)
        assert batch.next_step_labels().values.shape == batch.values.shape
    with pytest.raises(LengthError, match="at least one document"):
        empty.to_padded()


@given(packed())
def test_a_deep_copy_can_be_used_and_still_notices_writes(case: Any) -> None:
    """It was red: torch counts the copy of a tensor as a write to it, so every use of the copy was refused."""
    _, batch = case
    for made_before in (False, True):
        # Ids that were made before the copy are made again from its own offsets.
        assert not made_before or batch.mask.shape == batch.values.shape[:2]
        copied = copy.deepcopy({"tokens": batch, "again": batch})
        assert copied["again"] is copied["tokens"]
        copied["tokens"].verify()
        assert torch.equal(copied["tokens"].flat(), batch.flat())
    copied["tokens"].position_ids.add_(1)
    with pytest.raises(LengthError, match="position_ids were written to 1 times"):
        copied["tokens"].flat()
    batch.verify()
