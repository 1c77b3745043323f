"""Training steps written for the tests of `check_step`: right ones, and mistakes with the probes that must see them.

A step takes the parts of `Net` and a batch `{"x", "ids", "y", "label"}`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from collate import LengthTrackedBatch, PadCollator, apply_rnn, last_step, masked_mean, sequence_loss

CLASSES = 4
PER_STEP = nn.CrossEntropyLoss(reduction="none")


class Net(nn.Module):
    """All that the pipelines below are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 6)
        self.gru = nn.GRU(6, 8, batch_first=True)
        self.both = nn.LSTM(6, 4, batch_first=True, bidirectional=True)
        self.time_major = nn.GRU(6, 8)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.widen = nn.Linear(6, 8)
        self.head = nn.Linear(8, CLASSES)
        self.drop = nn.Dropout(0.3)
        self.score = nn.Linear(8, 1)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.deep = nn.LSTM(6, 8, num_layers=2, dropout=0.5, batch_first=True)


def batch_on(device: str) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    samples: list[dict[str, Any]] = [
        {
            "x": torch.randn(length, 6, generator=rng),
            "ids": torch.randint(0, CLASSES, (length,), generator=rng),
            "y": torch.randint(0, CLASSES, (length,), generator=rng),
            "label": index % CLASSES,
        }
        for index, length in enumerate((7, 5, 3, 2))
    ]
    samples[0]["y"][:2] = 0
    batch = PadCollator({"x": 0, "ids": 0, "y": -100})(samples)
    return {name: part.to(device) for name, part in batch.items()}


def tagged(net: Net, batch: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    return sequence_loss(PER_STEP, batch["x"].with_padded(net.head(hidden)), batch["y"])


def classify(net: Net, batch: dict[str, Any], state: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net.head(state), batch["label"])


def pooled_max(net: Any, batch: Any) -> Any:
    hidden = net.widen(batch["x"].padded).masked_fill(~batch["x"].mask[..., None], -torch.inf)
    return classify(net, batch, hidden.amax(1))


def masked_conv(net: Any, batch: Any) -> Any:
    inputs = torch.where(batch["x"].mask[..., None], batch["x"].padded, 0)
    hidden = net.conv(inputs.transpose(1, 2)).transpose(1, 2).relu()
    return classify(net, batch, masked_mean(batch["x"].with_padded(hidden)))


def attended(net: Net, batch: dict[str, Any], hidden_keys: torch.Tensor | None) -> torch.Tensor:
    hidden = net.widen(batch["x"].padded)
    return net.attention(hidden, hidden, hidden, key_padding_mask=hidden_keys, need_weights=False)[0]


def connectionist(net: Any, batch: Any) -> Any:
    hidden, _ = apply_rnn(net.gru, batch["x"])
    scores = net.head(hidden.padded).log_softmax(-1).transpose(0, 1)
    labels = torch.ones(len(batch["x"]), 1, dtype=torch.int64, device=scores.device)
    return F.ctc_loss(scores, labels, batch["x"].lengths, torch.ones(len(labels), dtype=torch.int64), reduction="sum")


def by_torch(net: Any, batch: Any, **options: Any) -> Any:
    packed = pack_padded_sequence(batch["x"].padded, batch["x"].lengths, batch_first=True, **options)
    return pad_packed_sequence(net.gru(packed)[0], batch_first=True, total_length=batch["x"].padded.shape[1])[0]


def both_by_flipping(net: Any, batch: Any) -> Any:
    # A backward direction by hand: each row's own real steps are reversed, not the padded block.
    lengths = batch["x"].lengths.to(batch["x"].device)
    indices = torch.arange(batch["x"].padded.shape[1], device=batch["x"].device)
    mirrored = torch.where(batch["x"].mask, lengths[:, None] - 1 - indices, indices)
    backward, _ = net.gru(batch["x"].padded.gather(1, mirrored[..., None].expand_as(batch["x"].padded)))
    return tagged(net, batch, backward.gather(1, mirrored[..., None].expand_as(backward)))


def pooled_by_attention(net: Net, batch: dict[str, Any], masked: bool) -> torch.Tensor:
    hidden = net.widen(batch["x"].padded)
    scores = net.score(hidden)[..., 0]
    if masked:
        scores = scores.masked_fill(~batch["x"].mask, -torch.inf)
    return classify(net, batch, (scores.softmax(1)[..., None] * hidden).sum(1))


def dot_product(net: Net, batch: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    hidden = net.widen(batch["x"].padded)
    return tagged(net, batch, F.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=mask, dropout_p=0.2))


def encoded(net: Any, batch: Any) -> Any:
    hidden = net.widen(batch["x"].padded)
    return tagged(net, batch, net.encoder(hidden, src_key_padding_mask=batch["x"].key_padding_mask))


def packed_targets(net: Any, batch: Any) -> Any:
    logits = net.head(net.gru(batch["x"].pack())[0].data)
    return F.cross_entropy(logits, batch["y"].pack().data)


RIGHT = {
    "packed tagger": lambda net, b: tagged(net, b, apply_rnn(net.gru, b["x"])[0].padded),
    "packed tagger, sequence mean": lambda net, b: sequence_loss(
        PER_STEP, apply_rnn(net.gru, b["x"])[0].map(net.head), b["y"], reduction="sequence"
    ),
    "both directions": lambda net, b: tagged(net, b, apply_rnn(net.both, b["x"])[0].padded),
    "final state": lambda net, b: classify(net, b, apply_rnn(net.gru, b["x"])[1][-1]),
    "last step": lambda net, b: classify(net, b, last_step(apply_rnn(net.gru, b["x"])[0])),
    "forward run over padding, masked": lambda net, b: tagged(net, b, net.gru(b["x"].padded)[0]),
    "torch's own calls, unsorted": lambda net, b: tagged(net, b, by_torch(net, b, enforce_sorted=False)),
    "torch's own calls, sorted": lambda net, b: tagged(net, b, by_torch(net, b)),
    "embedding of integers": lambda net, b: tagged(net, b, apply_rnn(net.gru, b["ids"].map(net.embedding))[0].padded),
    "mean pooling": lambda net, b: classify(net, b, masked_mean(b["x"].map(net.widen))),
    "max pooling": pooled_max,
    "ReLU": lambda net, b: classify(net, b, masked_mean(b["x"].map(lambda x: net.widen(x).relu()))),
    "convolution": masked_conv,
    "attention": lambda net, b: tagged(net, b, attended(net, b, b["x"].key_padding_mask)),
    "CTC": connectionist,
    "dropout": lambda net, b: tagged(net, b, net.drop(apply_rnn(net.gru, b["x"])[0].padded)),
    "ignore_index of -100": lambda net, b: F.cross_entropy(
        net.head(net.gru(b["x"].padded)[0]).flatten(0, 1), b["y"].padded.flatten(), ignore_index=-100
    ),
    "the first step": lambda net, b: classify(net, b, net.widen(b["x"].padded[:, 0])),
    "a backward direction by flipping real steps": both_by_flipping,
    "pooling by attention": lambda net, b: pooled_by_attention(net, b, masked=True),
    "scaled dot products": lambda net, b: dot_product(net, b, b["x"].mask[:, None]),
    "transformer layer with dropout": encoded,
    "packed targets": packed_targets,
    "functional dropout": lambda net, b: tagged(net, b, F.dropout(apply_rnn(net.gru, b["x"])[0].padded, 0.5)),
    "dropout between layers": lambda net, b: tagged(net, b, apply_rnn(net.deep, b["x"])[0].padded),
    "layer norm": lambda net, b: tagged(net, b, F.layer_norm(net.widen(b["x"].padded), (8,))),
    "a sum": lambda net, b: sequence_loss(PER_STEP, b["x"].map(net.widen).map(net.head), b["y"], reduction="sum"),
}


def declared(net: Net, batch: dict[str, Any], change: Callable[..., Any]) -> torch.Tensor:
    lengths = change(batch["x"].lengths, batch["x"].padded.shape[1])
    return apply_rnn(net.gru, LengthTrackedBatch(batch["x"].padded, lengths))[1][-1]


def targets(batch: dict[str, Any], value: int) -> torch.Tensor:
    return torch.where(batch["y"].mask, batch["y"].padded, value)


def sorted_and_left(net: Net, batch: dict[str, Any], back: str) -> torch.Tensor:
    order = batch["x"].padded[:, 0, 0].argsort()
    state = apply_rnn(net.gru, LengthTrackedBatch(batch["x"].padded[order], batch["x"].lengths[order]))[1][-1]
    return classify(net, batch, state[order] if back == "wrong" else state)


def misaligned(net: Net, batch: dict[str, Any]) -> torch.Tensor:
    packed = batch["x"].pack()
    return F.cross_entropy(net.head(net.gru(packed)[0].data), batch["y"].flat())


def trimmed(net: Net, batch: dict[str, Any]) -> torch.Tensor:
    width = batch["x"].padded.shape[1] - 2
    losses = PER_STEP(net.head(net.gru(batch["x"].padded)[0][:, :width]).transpose(1, 2), targets(batch, 0)[:, :width])
    return losses[batch["x"].mask[:, :width]].mean()


def mask_after_mean(net: Net, batch: dict[str, Any]) -> torch.Tensor:
    logits = net.head(net.gru(batch["x"].padded)[0])
    loss = F.cross_entropy(logits.flatten(0, 1), targets(batch, 0).flatten())
    return (loss * batch["x"].mask).sum() / batch["x"].mask.sum()


def mean_of_means(net: Net, batch: dict[str, Any]) -> torch.Tensor:
    losses = PER_STEP(net.head(net.widen(batch["x"].padded)).transpose(1, 2), targets(batch, 0)) * batch["x"].mask
    halves = zip(losses.split(3), batch["x"].mask.split(3), strict=True)
    return torch.stack([loss.sum() / mask.sum() for loss, mask in halves]).mean()


def guessed(net: Net, batch: dict[str, Any]) -> torch.Tensor:
    mask = batch["ids"].padded != 0
    losses = PER_STEP(net.head(net.widen(net.embedding(batch["ids"].padded))).transpose(1, 2), targets(batch, 0))
    return (losses * mask).sum() / mask.sum()


def logits_of(net: Net, batch: dict[str, Any]) -> torch.Tensor:
    return net.head(net.gru(batch["x"].padded)[0])


MISTAKES = {
    "inflated lengths": (lambda n, b: classify(n, b, declared(n, b, lambda x, t: torch.full_like(x, t))), {"padding"}),
    "lengths one too many": (
        lambda n, b: classify(n, b, declared(n, b, lambda x, t: (x + 1).clamp(max=t))),
        {"padding"},
    ),
    "deflated lengths": (lambda n, b: classify(n, b, declared(n, b, lambda x, t: (x - 1).clamp(min=1))), {"dead step"}),
    "swapped lengths": (lambda n, b: classify(n, b, declared(n, b, lambda x, t: x.flip(0))), {"padding", "dead step"}),
    "final state over padding": (lambda n, b: classify(n, b, n.gru(b["x"].padded)[1][-1]), {"padding", "width"}),
    "last column": (lambda n, b: classify(n, b, n.gru(b["x"].padded)[0][:, -1]), {"padding", "width"}),
    "backward over padding": (lambda n, b: tagged(n, b, n.both(b["x"].padded)[0]), {"padding", "width"}),
    "loss not masked": (
        lambda n, b: F.cross_entropy(logits_of(n, b).flatten(0, 1), targets(b, 0).flatten()),
        {"padding", "width"},
    ),
    "mask after the mean": (mask_after_mean, {"padding", "width"}),
    "mask, then mean over all": (
        lambda n, b: (PER_STEP(logits_of(n, b).transpose(1, 2), targets(b, 0)) * b["x"].mask).mean(),
        {"width"},
    ),
    "mean over the width": (lambda n, b: classify(n, b, n.widen(b["x"].padded).mean(1)), {"padding", "width"}),
    "mask guessed from zeros": (guessed, {"padding", "other rows"}),
    "class 0 ignored": (
        lambda n, b: F.cross_entropy(logits_of(n, b).flatten(0, 1), targets(b, 0).flatten(), ignore_index=0),
        {"other rows"},
    ),
    "order not restored": (lambda n, b: sorted_and_left(n, b, "not"), {"order"}),
    "wrong permutation": (lambda n, b: sorted_and_left(n, b, "wrong"), {"order"}),
    "packed against row order": (misaligned, {"order", "other rows"}),
    "forgotten batch_first": (lambda n, b: tagged(n, b, n.time_major(b["x"].padded)[0]), {"order", "other rows"}),
    "wrong polarity": (lambda n, b: tagged(n, b, attended(n, b, b["x"].mask)), {"padding"}),
    "attention without a mask": (lambda n, b: tagged(n, b, attended(n, b, None)), {"padding", "width"}),
    "convolution into padding": (
        lambda n, b: tagged(n, b, n.conv(b["x"].padded.transpose(1, 2)).transpose(1, 2)),
        {"padding"},
    ),
    "batch norm over padding": (
        lambda n, b: tagged(n, b, n.norm(n.widen(b["x"].padded).transpose(1, 2)).transpose(1, 2)),
        {"padding", "other rows"},
    ),
    "trimmed steps": (trimmed, {"dead step"}),
    "dropped row": (
        lambda n, b: F.cross_entropy(n.head(apply_rnn(n.gru, b["x"])[1][-1][:-1]), b["label"][:-1]),
        {"dead step"},
    ),
    "mean of means": (mean_of_means, {"order", "other rows"}),
    "backward direction by flipping the block": (
        lambda n, b: tagged(n, b, n.gru(b["x"].padded.flip(1))[0].flip(1)),
        {"padding", "width"},
    ),
    "pooling by attention without a mask": (
        lambda n, b: pooled_by_attention(n, b, masked=False),
        {"padding", "width"},
    ),
    "mask added to the scores as numbers": (
        lambda n, b: dot_product(n, b, b["x"].mask[:, None].float()),
        {"padding", "width"},
    ),
    "causal attention read at the padded end": (
        lambda n, b: classify(
            n,
            b,
            F.scaled_dot_product_attention(*[n.widen(b["x"].padded)] * 3, is_causal=True)[:, -1],  # type: ignore[misc]
        ),
        {"padding", "width"},
    ),
    "positions relative to the width": (
        lambda n, b: tagged(
            n, b, n.widen(b["x"].padded) + torch.linspace(0, 1, b["x"].padded.shape[1], device=b["x"].device)[:, None]
        ),
        {"width"},
    ),
    "normalised over time": (
        lambda n, b: tagged(n, b, F.instance_norm(n.widen(b["x"].padded).transpose(1, 2)).transpose(1, 2)),
        {"padding", "width"},
    ),
    "loss divided by the rows' widths": (
        lambda n, b: (PER_STEP(logits_of(n, b).transpose(1, 2), targets(b, 0)) * b["x"].mask).mean(1).mean(),
        {"width"},
    ),
    "lengths of another field": (
        lambda n, b: classify(n, b, declared(n, b, lambda x, t: torch.full_like(x, int(x.float().mean())))),
        {"padding", "dead step"},
    ),
    "max over padding": (lambda n, b: classify(n, b, n.widen(b["x"].padded).amax(1)), {"padding"}),
}
