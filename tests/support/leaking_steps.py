"""Training steps on rows of documents: planted leaks, and right ones. Each entry makes a module, a step and a batch.

Steps return losses per document `[N]`; `summed` makes one number of them. Nothing is downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collate import VarlenBatch, apply_rnn, masked_mean

VOCAB, WIDTH, LENGTHS = 24, 12, (5, 3, 9, 1, 6, 4, 7)


def token_batch(**options: Any) -> VarlenBatch:
    """Documents of random tokens in rows of 16 steps, with gaps."""
    draw = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, VOCAB, (n,), generator=draw) for n in LENGTHS]
    return VarlenBatch.from_sequences(documents, **{"capacity": 16, **options})


def losses_of(logits: Tensor, batch: VarlenBatch, labels: Tensor | None = None) -> Tensor:
    """The mean loss of each document: `[N]`."""
    labels = batch.next_step_labels().values if labels is None else labels
    return masked_mean(batch.with_values(F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")))


class Model(nn.Module):
    """Embedding, learned positions, whatever mixes steps, and a head. A subclass breaks one part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.mix: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def positions(self, batch: VarlenBatch) -> Tensor:
        return batch.position_ids

    def labels(self, batch: VarlenBatch) -> Tensor:
        return batch.next_step_labels().values

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        """What mixes the steps of a document: `[R, C, WIDTH]`."""
        query = self.mix(hidden).unflatten(2, (2, -1))
        return batch.attend(query, query, query).flatten(2)

    def forward(self, batch: VarlenBatch) -> Tensor:
        """The losses of the documents: `[N]`."""
        hidden = self.embed(batch.values) + self.place(self.positions(batch))
        return losses_of(self.head(hidden + self.mixed(hidden, batch)), batch, self.labels(batch))


def with_mask(model: Model, hidden: Tensor, mask: Tensor) -> Tensor:
    query = model.mix(hidden)[:, None]
    return F.scaled_dot_product_attention(query, query, query, attn_mask=mask)[:, 0]


def segments(batch: VarlenBatch) -> list[tuple[int, int]]:
    """First step and the step behind the last, of documents and gaps, in rows laid one after the other."""
    bounds = torch.unique_consecutive(batch.cu_seqlens).tolist()
    return list(pairwise(bounds))


def by_segment(call: Callable[[Tensor], Tensor], hidden: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """A function applied to each piece `[steps, WIDTH]`."""
    flat = hidden.flatten(0, 1)
    return torch.cat([call(flat[start:end]) for start, end in bounds]).view_as(hidden)


def decayed(steps: Tensor) -> Tensor:
    """A scan: each step is itself, and half of the scan before it."""
    state, out = torch.zeros_like(steps[0]), []
    for step in steps:
        state = 0.5 * state + step
        out.append(state)
    return torch.stack(out)


# --- planted leaks


class ConvolutionAcross(Model):
    """A causal convolution over the row."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3)

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return self.mix(F.pad(hidden.transpose(1, 2), (2, 0))).transpose(1, 2)


class StateNotReset(Model):
    """A recurrent module over the row."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return self.mix(hidden)[0]


class ScanNotReset(Model):
    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return torch.stack([decayed(row) for row in self.mix(hidden)])


class RunningPositions(Model):
    def positions(self, batch: VarlenBatch) -> Tensor:
        return torch.arange(batch.values.shape[1]).expand(batch.values.shape)


class LabelsCross(Model):
    """Labels shifted over the row, so that the last step of a document has the next one's first as its label."""

    def labels(self, batch: VarlenBatch) -> Tensor:
        return batch.values.roll(-1, 1)


class WrongOffset(Model):
    """All borders one step too late."""

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        ids = batch.document_ids.roll(1, 1)
        mask = (ids[:, :, None] == ids[:, None]).tril()[:, None]
        return with_mask(self, hidden, mask)


class OverflowingOffset(Model):
    """Offsets in bytes in int32: with wide steps those behind the first 2 GiB are wrong."""

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        steps = torch.arange(batch.values.numel(), dtype=torch.int32) - batch.position_ids.flatten().int()
        bytes_ = steps * (1 << 29)
        first = (bytes_ >> 29).long() % batch.values.numel()
        return self.mix(hidden + hidden.flatten(0, 1)[first].view_as(hidden))


class NormOverRow(Model):
    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return self.mix((hidden - hidden.mean(1, keepdim=True)) / hidden.std(1, keepdim=True))


class PooledOverRow(Model):
    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        weights = batch.mask[..., None].float()
        return self.mix(hidden + (hidden * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True))


class Polarity(Model):
    """A mask that hides what it should show."""

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        mask = ~batch.attention_mask("bidirectional") | torch.eye(hidden.shape[1], dtype=torch.bool)
        return with_mask(self, hidden, mask)


class SharedSink(Model):
    """The first step of the row is seen by all of its documents."""

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        mask = batch.attention_mask()
        mask[..., 0] = True
        return with_mask(self, hidden, mask)


class WrongRanks(Model):
    """The row cut into four pieces for two context-parallel ranks, which are joined as the ranks have them."""

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        pieces = self.mix(hidden).chunk(4, 1)
        ranks = torch.cat([pieces[0], pieces[3]], 1), torch.cat([pieces[1], pieces[2]], 1)
        return torch.cat(ranks, 1)


class BorrowedOffsets(Model):
    """Offsets of another batch."""

    other = VarlenBatch.from_sequences([torch.zeros(n) for n in (8, 8, 8, 8, 8, 8)], capacity=16)

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return by_segment(lambda steps: steps.cumsum(0), self.mix(hidden), segments(self.other))


class _Rolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Tensor) -> Tensor:
        return steps.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + 0.1 * gradient.roll(-1, 1)


class BackwardAcross(Model):
    """A custom backward pass that reads the next document's gradient."""

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        rolled: Callable[[Tensor], Tensor] = _Rolled.apply
        return rolled(super().mixed(hidden, batch))


class DroppedLast(Model):
    def forward(self, batch: VarlenBatch) -> Tensor:
        losses = super().forward(batch)
        return torch.where(torch.arange(len(losses)) < len(losses) - 1, losses, 0.0)


class MixedUp(Model):
    def forward(self, batch: VarlenBatch) -> Tensor:
        return super().forward(batch).roll(1)


@dataclass(frozen=True)
class Case:
    """A step to check.

    Attributes:
        make: a function that gives the module whose call with a batch gives losses `[N]`.
        probes: what must be found, nothing else.
        module: a part of the name of the module that must be named, or of the words instead.
        options: of the batch.
        as_scalar: whether it can be seen in one number.
    """

    make: Callable[[], Any]
    probes: frozenset[str] = frozenset({"other documents"})
    module: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    as_scalar: bool = True


LEAKS = {
    "convolution across borders": Case(ConvolutionAcross, module="mix (Conv1d)"),
    "recurrent state not reset": Case(StateNotReset, module="mix (GRU)"),
    "scan state not reset": Case(ScanNotReset, module="in ScanNotReset, before head"),
    "running positions": Case(RunningPositions, frozenset({"order"})),
    "labels that cross": Case(LabelsCross, module="in LabelsCross", as_scalar=False),
    "wrong offset": Case(WrongOffset, module="in WrongOffset, before head"),
    "int32 overflow": Case(OverflowingOffset, module="in OverflowingOffset, before mix"),
    "normalisation over the row": Case(NormOverRow, module="in NormOverRow, before mix"),
    "pooled statistic over the row": Case(PooledOverRow, module="in PooledOverRow, before mix"),
    "mask polarity": Case(Polarity, module="in Polarity, before head"),
    "shared attention sink": Case(SharedSink, module="in SharedSink, before head"),
    "context-parallel split in wrong order": Case(WrongRanks, module="in WrongRanks, before head"),
    "offsets of another batch": Case(BorrowedOffsets, module="in BorrowedOffsets, before head"),
    "backward pass across borders": Case(BackwardAcross, module="in the backward pass"),
    "dropped last document": Case(DroppedLast, frozenset({"dead document"})),
    "documents mixed up": Case(MixedUp, frozenset({"other documents", "dead document"}), as_scalar=False),
}


# --- right ones


class DocumentConvolution(Model):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3)

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return by_segment(lambda steps: self.mix(F.pad(steps.T, (2, 0))).T, hidden, segments(batch))


class DocumentScan(Model):
    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return by_segment(decayed, self.mix(hidden), segments(batch))


class Recurrent(Model):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return apply_rnn(self.mix, batch.with_values(hidden))[0].values


class Pooled(Model):
    """Each document's own mean, added to its steps."""

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        means = F.pad(masked_mean(batch.with_values(hidden)), (0, 0, 0, 1))
        return self.mix(hidden + means[batch.document_ids.long()])


class Dropped(Model):
    """Attention both ways, layer norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return with_mask(self, hidden, batch.attention_mask("bidirectional"))


class ContextParallel(Model):
    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        parts = [batch.context_parallel(rank, 2) for rank in (0, 1)]
        return parts[0].join(parts, [part.take(self.mix(hidden)) for part in parts])


class WithOptions(nn.Module):
    """A model of transformers, called as the batch says."""

    def __init__(self, model: nn.Module, *, kind: Any = "causal", **changes: Any) -> None:
        super().__init__()
        self.model, self.kind, self.changes = model, kind, changes

    def forward(self, batch: VarlenBatch) -> Tensor:
        arguments = batch.kwargs_for("transformers", kind=self.kind)
        changes = {name: change(batch) for name, change in self.changes.items()}
        if self.kind == "bidirectional":
            del arguments["use_cache"]
        return losses_of(self.model(batch.values, **{**arguments, **changes}).logits, batch)


def hugging(name: str, kind: str = "causal", sizes: dict[str, Any] | None = None, **changes: Any) -> Callable[[], Any]:
    """A tiny random model of transformers by the name of its family."""

    def make() -> nn.Module:
        import transformers  # noqa: PLC0415 - an extra

        torch.manual_seed(0)
        common: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        common |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
        family, _, head = name.partition(" ")
        config = getattr(transformers, f"{family}Config")(**{**common, **(sizes or {})})
        return WithOptions(getattr(transformers, f"{family}{head or 'ForCausalLM'}")(config), kind=kind, **changes)

    return make


GATED = {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}

RIGHT = {
    "attention by attend": Model,
    "recurrence by apply_rnn": Recurrent,
    "convolution of each document": DocumentConvolution,
    "scan of each document": DocumentScan,
    "mean of each document": Pooled,
    "both ways, layer norm, dropout": Dropped,
    "context parallelism": ContextParallel,
    "Llama": hugging("Llama", sizes=GATED),
    "GPT-2": hugging("GPT2 LMHeadModel", sizes={"n_positions": 32}),
    "Mistral, sliding window": hugging("Mistral", sizes={**GATED, "sliding_window": 4}),
    "Qwen2": hugging("Qwen2", sizes=GATED),
    "Gemma": hugging("Gemma", sizes=GATED),
    "GPT-NeoX": hugging("GPTNeoX", sizes={"intermediate_size": 24}),
    "BERT, dense mask": hugging(
        "Bert ForMaskedLM", kind="bidirectional", sizes={"intermediate_size": 24, "max_position_embeddings": 32}
    ),
}

HUGGING_LEAKS = {
    "a 2-D mask": hugging("Llama", sizes=GATED, attention_mask=lambda batch: batch.mask.long()),
    "a cache": hugging("GPT2 LMHeadModel", sizes={"n_positions": 32}, use_cache=lambda batch: True),
}


# --- documents meet on purpose


class BatchNormed(Model):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return super().mixed(self.norm(hidden.transpose(1, 2)).transpose(1, 2), batch)


class BatchNormedLeak(BatchNormed):
    """A leak behind a batch norm."""

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        normed = super().mixed(hidden, batch)
        return normed + normed.mean(1, keepdim=True)


class CapacityRouter(nn.Module):
    """Two experts that take the first eight steps that choose them, of whatever document."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = self.gate(hidden).argmax(-1)
        kept = F.one_hot(chosen, 2).cumsum(1).gather(2, chosen[..., None]) <= 4
        outputs = torch.stack([expert(hidden) for expert in self.experts], 2)
        index = chosen[..., None, None].expand(-1, -1, 1, WIDTH)
        return outputs.gather(2, index)[:, :, 0] * kept


class Experts(Model):
    def __init__(self) -> None:
        super().__init__()
        self.mix = CapacityRouter()

    def mixed(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return self.mix(hidden)


MEETINGS = {
    "batch norm": (BatchNormed, {"meeting"}, "norm (BatchNorm1d)"),
    "expert capacity": (Experts, {"meeting"}, "mix (CapacityRouter)"),
    "a leak behind batch norm": (BatchNormedLeak, {"meeting", "other documents"}, "norm (BatchNorm1d)"),
}


def summed(step: Callable[[VarlenBatch], Tensor]) -> Callable[[VarlenBatch], Tensor]:
    """One number of losses per document."""
    return lambda batch: step(batch).sum()
