"""Training steps of sentence classifiers and of training idioms that are common: right ones and known mistakes.

They are made of the parts of `known_models`.
"""

from typing import Any

import torch
from known_models import PER_STEP, WORDS, made, packed, tagged, told
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from collate import apply_rnn, sequence_loss

# --- sentences as a whole


def names(m: Any, b: dict[str, Any], last: str = "state") -> torch.Tensor:
    """Names and their languages: the state at each row's end."""
    outputs, state = packed(m.gru, b["source"], m.words(b["source"].padded))
    return told(state[-1] if last == "state" else outputs[:, -1], b)


def text_convolution(m: Any, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    """Windows of words and the largest answer: Kim's sentence classifier."""
    field = b["source"]
    words = m.words(field.padded) * field.mask[..., None]
    hidden = m.conv(F.pad(words.transpose(1, 2), (1, 1))).transpose(1, 2)
    return told((hidden.masked_fill(~field.mask[..., None], -torch.inf) if masked else hidden).amax(1), b)


def bags(m: Any, b: dict[str, Any], ends: bool = True) -> torch.Tensor:
    """The tutorial of text classification: all words in a row, and where each text begins."""
    field = b["source"]
    if ends:
        words, starts = field.flat(), field.cu_seqlens[:-1]
    else:
        words, starts = field.padded.flatten(), torch.arange(len(field)) * field.padded.shape[1]
    return told(F.embedding_bag(words.long(), m.words.weight, starts.long()), b)


def deep_set(m: Any, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    hidden = m.query(b["frames"].padded).relu()
    return told(m.key((hidden * b["frames"].mask[..., None] if masked else hidden).sum(1)), b)


def autoencoder(m: Any, b: dict[str, Any], noise: float = 0.0, masked: bool = True) -> dict[str, torch.Tensor]:
    """A variational autoencoder of sentences: two terms, words and the distance of the state from a normal one."""
    field = b["source"]
    _, (state, _) = packed(m.lstm, field, m.words(field.padded))
    mean, spread = m.query(state[-1]), m.key(state[-1])
    start = mean + noise * torch.randn_like(mean) * (spread / 2).exp()
    hidden, _ = packed(m.gru, field, m.words(F.pad(field.padded[:, :-1], (1, 0))) + start[:, None])
    distance = -0.5 * (1 + spread - mean.square() - spread.exp()).sum(1)
    losses = PER_STEP(m.word(hidden).transpose(1, 2), field.padded)
    return {"words": losses[field.mask].mean() if masked else losses.mean(), "distance": distance.mean()}


# --- idioms of training


def checkpointed(m: Any, b: Any) -> Any:
    hidden = m.words(b["source"].padded)
    for _ in range(2):
        hidden = checkpoint(m.layer, hidden, None, ~b["source"].mask, use_reentrant=False)
    return tagged(m, b, hidden)


def recommender(m: Any, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    """The next item against a random one, pair by pair: SASRec with the loss of BPR."""
    items = b["source"]
    causal = nn.Transformer.generate_square_subsequent_mask(items.padded.shape[1] - 1)
    hidden = m.layer(m.words(items.padded[:, :-1]), src_mask=causal, is_causal=True)
    better = (hidden * m.words(items.padded[:, 1:])).sum(2)
    worse = (hidden * m.words(items.padded[:, 1:] * 5 % WORDS)).sum(2)
    losses = -F.logsigmoid(better - worse)
    return losses[items.mask[:, 1:]].sum() if masked else losses.sum()


def preference(m: Any, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    """Direct preference optimization: log-probabilities of two answers, each summed over its words."""
    sums = []
    for name in ("source", "target"):
        words = b[name].padded
        chances = m.word(m.gru(m.words(words[:, :-1]))[0]).log_softmax(2).gather(2, words[:, 1:, None])[..., 0]
        sums.append((chances * b[name].mask[:, 1:] if masked else chances).sum(1))
    return -F.logsigmoid(0.1 * (sums[0] - sums[1])).mean()


def policy(m: Any, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    """Policy gradients: what is still to be earned, summed from each row's end."""
    rewards = b["scores"].padded * b["scores"].mask if masked else b["scores"].padded
    earned = rewards.flip(1).cumsum(1).flip(1)
    chances = m.tag(m.gru(b["frames"].padded)[0]).log_softmax(2)[..., 0]
    return -(chances * earned)[b["frames"].mask].sum() / b["frames"].num_tokens


def forecast(m: Any, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    """A mean and a variance for every step, from the steps before it: DeepAR."""
    values = b["frames"].padded[..., 0]
    hidden, _ = m.gru(F.pad(b["frames"].padded[:, :-1], (0, 0, 1, 0)))
    losses = F.gaussian_nll_loss(m.score(hidden)[..., 0], values, F.softplus(hidden[..., 0]) + 0.1, reduction="none")
    return losses[b["frames"].mask].mean() if masked else losses.mean()


def distilled(m: Any, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    student = m.tag(packed(m.lstm, b["source"], m.words(b["source"].padded))[0]).log_softmax(2)
    teacher = m.tag(m.words(b["source"].padded)).detach().softmax(2)
    if not masked:
        return F.kl_div(student.flatten(0, 1), teacher.flatten(0, 1), reduction="batchmean")
    return F.kl_div(student[b["source"].mask], teacher[b["source"].mask], reduction="batchmean")


def multitask(m: Any, b: Any, together: bool = False) -> Any:
    hidden, (state, _) = packed(m.lstm, b["source"], m.words(b["source"].padded))
    terms = {"tags": tagged(m, b, hidden), "label": told(state[-1], b)}
    return sum(terms.values()) if together else terms


def truncated(m: Any, b: Any, carried: bool = True) -> Any:
    """Truncated back-propagation: chunks of three steps, the state carried on without its history."""
    state, loss = None, torch.zeros(())
    for words, tags in zip(b["source"].split_steps(3), b["tags"].split_steps(3), strict=True):
        hidden, state = apply_rnn(m.gru, words.map(m.words), state if carried else None)
        assert isinstance(state, torch.Tensor)
        state = state.detach()
        loss = loss + sequence_loss(PER_STEP, hidden.map(m.tag), tags, reduction="sum")
    return loss


def with_statistics(m: Any, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    """Features normalised by a mean that is kept over the run of training."""
    frames = b["frames"]
    values = frames.flat() if masked else frames.padded.flatten(0, 1)
    with torch.no_grad():
        m.running.mul_(0.9).add_(0.1 * values.mean(0))
    return tagged(m, b, m.query(frames.padded - (m.running if not masked else 0)))


RIGHT = {
    "tutorial: text classification with bags": bags,
    "tutorial: names and languages": names,
    "TextCNN": text_convolution,
    "deep set": deep_set,
    "variational autoencoder": autoencoder,
    "variational autoencoder with noise": lambda m, b: autoencoder(m, b, noise=1.0),
    "checkpointing with dropout": checkpointed,
    "recommender with BPR": recommender,
    "preference optimization": preference,
    "policy gradients": policy,
    "DeepAR": forecast,
    "distillation": distilled,
    "two tasks, two means": multitask,
    "truncated back-propagation": truncated,
    "running mean of real steps": with_statistics,
}

MISTAKES = {
    "names: output[:, -1]": (lambda m, b: names(m, b, last="column"), {"dead step"}),
    "TextCNN: windows of padding": (lambda m, b: text_convolution(m, b, masked=False), {"width", "other rows"}),
    "bags of padding": (lambda m, b: bags(m, b, ends=False), {"width", "other rows"}),
    "deep set: sum over padding": (lambda m, b: deep_set(m, b, masked=False), {"padding", "width"}),
    "variational autoencoder: words of padding": (lambda m, b: autoencoder(m, b, masked=False), {"width"}),
    "variational autoencoder with noise: words of padding": (
        lambda m, b: autoencoder(m, b, noise=1.0, masked=False),
        {"padding"},
    ),
    "BPR: pairs of padding": (lambda m, b: recommender(m, b, masked=False), {"width", "other rows"}),
    "preference: words of padding": (lambda m, b: preference(m, b, masked=False), {"width", "other rows"}),
    "policy: earned in the padding": (lambda m, b: policy(m, b, masked=False), {"padding"}),
    "DeepAR: mean over the block": (lambda m, b: forecast(m, b, masked=False), {"padding", "width"}),
    "distillation: batchmean over the block": (lambda m, b: distilled(m, b, masked=False), {"width", "other rows"}),
    "running mean over padding": (lambda m, b: with_statistics(m, b, masked=False), {"padding", "width"}),
}

RIGHT = {name: made(step) for name, step in RIGHT.items()}
MISTAKES = {name: (made(step), probes) for name, (step, probes) in MISTAKES.items()}
