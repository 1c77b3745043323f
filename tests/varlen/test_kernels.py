"""What kernels and models are called with: each against its own signature, and against one document at a time."""

import ast
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from collate import LengthError, VarlenBatch

SIZES, HEADS = (5, 3, 9, 1, 6), (2, 4)

# Without a compiler flex makes all scores, which is what these small cases want.
uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def packed_rows(align: int = 1, dtype: torch.dtype = torch.float32) -> tuple[VarlenBatch, dict[str, Tensor]]:
    """Two rows, and query, key and value `[2, 14, 2, 4]` that require gradients."""
    torch.manual_seed(0)
    documents = [torch.randn(n, *HEADS) for n in SIZES]
    batch = VarlenBatch.from_sequences(documents, capacity=16, align=align).to(dtype)
    parts = {
        name: torch.randn(batch.values.shape, dtype=dtype, requires_grad=True) for name in ("query", "key", "value")
    }
    return batch, parts


def one_by_one(batch: VarlenBatch, parts: dict[str, Tensor], call: Callable[..., Tensor]) -> list[Tensor]:
    """Attention of each document alone: `[L_i, H, D]` in row order."""
    documents = [batch.with_values(part).sequences() for part in parts.values()]
    return [
        call(*(part.transpose(0, 1)[None] for part in three))[0].transpose(0, 1)
        for three in zip(*documents, strict=True)
    ]


def sdpa(batch: VarlenBatch, parts: dict[str, Tensor]) -> Tensor:
    heads_first = [part.transpose(1, 2) for part in parts.values()]
    return F.scaled_dot_product_attention(*heads_first, **batch.kwargs_for("sdpa")).transpose(1, 2)


def jagged(batch: VarlenBatch, parts: dict[str, Tensor]) -> Tensor:
    """Jagged tensors of all documents in torch's own attention, which on a CPU is not causal: `[M, H, D]`."""
    offsets = F.pad(batch.lengths[batch.lengths > 0].cumsum(0), (1, 0))
    made = [torch.nested.nested_tensor_from_jagged(batch.with_values(part).flat(), offsets) for part in parts.values()]
    output = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in made))
    return output.transpose(1, 2).values()


@uncompiled
@pytest.mark.parametrize("align", [1, 4])
def test_attention_of_a_row_is_that_of_each_document_alone(align: int) -> None:
    batch, parts = packed_rows(align)
    alone = one_by_one(batch, parts, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    with torch.no_grad():
        flexed = flex_attention(
            *(part.detach().transpose(1, 2) for part in parts.values()), **batch.kwargs_for("flex_attention")
        ).transpose(1, 2)
    for output in (sdpa(batch, parts), flexed, batch.attend(**parts)):
        for ours, theirs in zip(batch.with_values(output).sequences(), alone, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        # A step of a gap sees itself, and nothing is divided by zero.
        assert bool(output.isfinite().all())


@uncompiled
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "sliding", "prefix"])
def test_flex_and_sdpa_give_the_same_numbers_for_every_kind(kind: str) -> None:
    batch, parts = packed_rows(4)
    option = {"sliding": {"window": 3}, "prefix": {"prefix": 2}}.get(kind, {})
    heads_first = [part.detach().transpose(1, 2) for part in parts.values()]
    dense = F.scaled_dot_product_attention(*heads_first, **batch.kwargs_for("sdpa", kind=kind, **option))
    blocks = batch.kwargs_for("flex_attention", kind=kind, **option)
    torch.testing.assert_close(flex_attention(*heads_first, **blocks), dense, atol=1e-5, rtol=1e-5)
    attended = batch.attend(**{name: part.detach() for name, part in parts.items()}, kind=kind, **option)
    real = batch.mask
    torch.testing.assert_close(attended[real], dense.transpose(1, 2)[real], atol=0, rtol=0)


def test_gradients_through_the_mask_are_those_of_each_document_alone() -> None:
    batch, parts = packed_rows()
    weights = torch.randn(batch.values.shape)
    alone = one_by_one(batch, parts, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    total = sum(
        (part * weight).sum() for part, weight in zip(alone, batch.with_values(weights).sequences(), strict=True)
    )
    expected = torch.autograd.grad(total, list(parts.values()))
    mask = batch.mask[..., None, None]
    for output in (sdpa(batch, parts), batch.attend(**parts)):
        found = torch.autograd.grad((output * weights * mask).sum(), list(parts.values()))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("held", [float("nan"), float("inf")])
def test_what_gaps_hold_reaches_no_document_through_attend(held: float) -> None:
    """It was red: outputs and gradients of all documents in a row were NaN, as 0 times NaN is NaN."""
    batch, parts = packed_rows(4)
    gaps = ~batch.mask[..., None, None]
    spoilt = {name: part.detach().masked_fill(gaps, held).requires_grad_() for name, part in parts.items()}
    results = []
    for three in (parts, spoilt):
        output = batch.with_values(batch.attend(**three)).flat()
        gradients = torch.autograd.grad(output.square().sum(), list(three.values()))
        results.append([output, *(batch.with_values(gradient).flat() for gradient in gradients)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("align", [1, 4])
def test_jagged_tensors_give_the_numbers_and_gradients_of_the_mask(align: int) -> None:
    batch, parts = packed_rows(align)
    dense = batch.with_values(batch.attend(**parts, kind="bidirectional")).flat()
    weights = torch.randn(dense.shape)
    expected = torch.autograd.grad((dense * weights).sum(), list(parts.values()))
    output = jagged(batch, parts)
    torch.testing.assert_close(output, dense, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(torch.autograd.grad((output * weights).sum(), list(parts.values())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_flex_reads_the_block_tables_as_sdpa_reads_the_mask() -> None:
    """Only compiled code skips blocks."""
    torch.manual_seed(0)
    batch = VarlenBatch.from_sequences([torch.randn(n, 1, 16) for n in (200, 3, 130, 60)], capacity=500)
    query, key, value = (torch.randn(1, 1, 500, 16) for _ in range(3))
    mask = batch.block_mask("sliding", window=140)
    assert 0 < int(mask.full_kv_num_blocks.sum() + mask.kv_num_blocks.sum()) < 10
    with torch.no_grad():
        found = torch.compile(flex_attention)(query, key, value, block_mask=mask)
    dense = F.scaled_dot_product_attention(query, key, value, **batch.kwargs_for("sdpa", kind="sliding", window=140))
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-5)


def test_attend_lets_heads_share_keys_and_refuses_other_shapes() -> None:
    batch, parts = packed_rows()
    shared = {"key": parts["key"][:, :, :1], "value": parts["value"][:, :, :1]}
    wide = {name: part.expand_as(parts["query"]) for name, part in shared.items()}
    torch.testing.assert_close(batch.attend(parts["query"], **shared), batch.attend(parts["query"], **wide))
    with pytest.raises(LengthError, match=r"key must be \[2, 16\] and heads and features, got \[2, 15, 2, 4\]"):
        batch.attend(parts["query"], parts["key"][:, :15], parts["value"])


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.sampled_from([1, 4]))
def test_seq_idx_says_which_steps_are_of_one_document(lengths: list[int], align: int) -> None:
    documents = [torch.zeros(n) for n in lengths]
    batch = VarlenBatch.from_sequences(documents, capacity=16, align=align)
    found = batch.kwargs_for("mamba")["seq_idx"]
    assert (found.dtype, found.shape) == (torch.int32, batch.values.shape)
    assert int(found.min()) >= 0
    ids = batch.document_ids
    for row, others in zip(found, ids, strict=True):
        same = others[:, None] == others
        assert torch.equal(
            (row[:, None] == row)[same & (others >= 0)], torch.ones(int((same & (others >= 0)).sum())).bool()
        )
        assert not bool((row[:, None] == row)[~same].any())


# --- each kernel's own signature

# Read in the released packages that are named; the page says which of them were installed when the tests ran.
DOCUMENTED = {
    "flash_attn": (
        "flash-attn 2.8.3.post2, flash_attn_varlen_func",
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size softcap "
        "alibi_slopes deterministic return_attn_probs block_table",
    ),
    "mamba": (
        "mamba-ssm 2.3.2.post1, Mamba2.forward",
        "self u seqlen seq_idx cu_seqlens inference_params",
    ),
    "fla": (
        "fla-core 0.6.0, chunk_gated_delta_rule",
        "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_beta_sigmoid_in_kernel "
        "allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu chunk_indices cp_context kwargs",
    ),
    "transformer_engine": (
        "transformer-engine 2.20.2, DotProductAttention.forward",
        "self query_layer key_layer value_layer attention_mask qkv_format cu_seqlens_q cu_seqlens_kv "
        "cu_seqlens_q_padded cu_seqlens_kv_padded max_seqlen_q max_seqlen_kv attn_mask_type window_size "
        "bottom_right_diagonal softcap",
    ),
}
# Where a package keeps the function: the module's file, the class if it is a method, and the function.
SOURCES = {
    "flash_attn": ("flash_attn", "flash_attn_interface.py", None, "flash_attn_varlen_func"),
    "mamba": ("mamba_ssm", "modules/mamba2.py", "Mamba2", "forward"),
    "fla": ("fla", "ops/gated_delta_rule/chunk.py", None, "chunk_gated_delta_rule"),
    "transformer_engine": (
        "transformer_engine",
        "pytorch/attention/dot_product_attention/dot_product_attention.py",
        "DotProductAttention",
        "forward",
    ),
}


def parameters_in(package: str, file: str, owner: str | None, name: str) -> set[str]:
    """The parameters of a function in an installed package, read without importing it: that may need a GPU."""
    spec = find_spec(package)
    assert spec is not None
    path = Path(next(iter(spec.submodule_search_locations or []))) / file
    tree: ast.AST = ast.parse(path.read_text())
    if owner is not None:
        tree = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == owner)
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


@pytest.mark.parametrize("kernel", SOURCES)
def test_an_extension_takes_the_arguments_that_are_made_for_it(kernel: str) -> None:
    package, *where = SOURCES[kernel]
    installed = find_spec(package) is not None
    names = parameters_in(package, *where) if installed else set(DOCUMENTED[kernel][1].split())
    batch, _ = packed_rows()
    assert batch.kwargs_for(kernel).keys() <= names


def test_varlen_attn_takes_the_arguments_that_are_made_for_it() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    batch, _ = packed_rows()
    parameters = inspect.signature(varlen.varlen_attn).parameters
    assert batch.kwargs_for("varlen_attn").keys() <= parameters.keys()
    assert batch.kwargs_for("varlen_attn", kind="sliding", window=4)["window_size"] == (3, 0)
    assert batch.kwargs_for("varlen_attn", kind="bidirectional")["window_size"] == (-1, -1)


def test_offsets_of_kernels_count_gaps_as_sequences() -> None:
    batch = VarlenBatch.from_sequences([torch.zeros(3), torch.zeros(2)], capacity=8, align=4, max_documents=3)
    arguments = batch.kwargs_for("flash_attn")
    assert arguments["cu_seqlens_q"].tolist() == [0, 3, 4, 6, 8, 8, 8]
    assert (arguments["max_seqlen_q"], arguments["causal"], arguments["window_size"]) == (8, True, (-1, 0))
    apart = batch.kwargs_for("transformer_engine", kind="bidirectional")
    assert apart["cu_seqlens_q"].tolist() == [0, 3, 5, 5, 5, 5, 5]
    assert apart["cu_seqlens_q_padded"].tolist() == [0, 4, 8, 8, 8, 8, 8]
    assert apart["attn_mask_type"] == "padding"
    assert batch.kwargs_for("fla")["cu_seqlens"].dtype == torch.int64


def test_a_kernel_without_a_kind_of_mask_says_who_has_it() -> None:
    batch, _ = packed_rows()
    with pytest.raises(ValueError, match="flash_attn has no prefix attention .*; flex_attention and sdpa have all"):
        batch.kwargs_for("flash_attn", kind="prefix", prefix=2)
    with pytest.raises(ValueError, match="kernel must be one of .* got 'xformers'"):
        batch.kwargs_for("xformers")


# --- models of transformers


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")


def tiny(transformers: ModuleType, name: str) -> nn.Module:
    """A random model of a few thousand weights, with large ones so that its outputs differ."""
    sizes = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    heads = {"intermediate_size": 24, "num_key_value_heads": 1}
    torch.manual_seed(0)
    make = {
        "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)),
        "GPT-2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_positions=32)),
    }
    return make[name]().eval()


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@pytest.mark.parametrize("options", [{"capacity": None}, {"capacity": 16}, {"capacity": 16, "align": 4}])
def test_a_model_gives_each_document_of_a_row_what_it_gives_it_alone(
    transformers: ModuleType, name: str, options: dict[str, int]
) -> None:
    model = tiny(transformers, name)
    documents = [torch.randint(3, 24, (n,)) for n in SIZES]
    batch = VarlenBatch.from_sequences(documents, **options)
    with torch.no_grad():
        logits = batch.with_values(model(batch.values, **batch.kwargs_for("transformers")).logits)
        for ours, document in zip(logits.unsort(), documents, strict=True):
            torch.testing.assert_close(ours, model(document[None]).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_a_cache_or_a_2d_mask_lets_documents_see_each_other(transformers: ModuleType, name: str) -> None:
    """Why the arguments say `use_cache=False` and `attention_mask=None`."""
    model = tiny(transformers, name)
    batch = VarlenBatch.from_sequences([torch.randint(3, 24, (n,)) for n in SIZES])
    arguments = batch.kwargs_for("transformers")
    assert arguments["use_cache"] is False
    with torch.no_grad():
        right = model(batch.values, **arguments).logits
        for change in ({"use_cache": True}, {"attention_mask": batch.mask.long()}):
            wrong = model(batch.values, **{**arguments, **change}).logits
            assert float((wrong - right)[batch.mask].abs().max()) > 0.1, change


def test_an_encoder_takes_the_dense_mask(transformers: ModuleType) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=24, max_position_embeddings=32, initializer_range=0.3)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    documents = [torch.randint(3, 24, (n,)) for n in SIZES]
    batch = VarlenBatch.from_sequences(documents, capacity=16)
    arguments = batch.kwargs_for("transformers", kind="bidirectional")
    del arguments["use_cache"]
    with torch.no_grad():
        hidden = batch.with_values(model(batch.values, **arguments).last_hidden_state)
        for ours, document in zip(hidden.unsort(), documents, strict=True):
            torch.testing.assert_close(ours, model(document[None]).last_hidden_state[0], atol=1e-5, rtol=0)


def test_arguments_for_flash_attention_are_those_of_transformers(transformers: ModuleType) -> None:
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    documents = [torch.randint(3, 24, (n,)) for n in SIZES]
    theirs = collator([{"input_ids": document} for document in documents])
    ours = VarlenBatch.from_sequences(documents).kwargs_for("transformers_flash")
    assert torch.equal(ours["position_ids"], theirs["position_ids"])
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        # Slots that are not used repeat the last offset.
        assert np.array_equal(torch.unique_consecutive(ours[name]), theirs[name])
        assert ours[name].dtype == theirs[name].dtype
    assert ours["max_length_q"] >= theirs["max_length_q"]
    assert set(theirs) - {"input_ids", "labels"} <= set(ours)


def test_a_prefix_counts_from_the_document_and_not_from_its_chunk() -> None:
    """It was red: the first steps of a later chunk saw steps behind them, as if the prefix began there."""
    batch = VarlenBatch.from_sequences([torch.zeros(6), torch.zeros(4)], capacity=10)
    whole = batch.attention_mask("prefix", prefix=[5, 2])[0, 0]
    for start, chunk in zip((0, 4, 8), batch.split_steps(4), strict=True):
        steps = slice(start, start + chunk.values.shape[1])
        for mask in (
            chunk.attention_mask("prefix", prefix=[5, 2]),
            chunk.kwargs_for("sdpa", kind="prefix", prefix=[5, 2])["attn_mask"],
        ):
            assert torch.equal(mask[0, 0], whole[steps, steps])
