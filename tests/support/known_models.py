"""Training steps of well-known architectures and of torch's tutorials, small: right ones and known mistakes.

Each entry makes a module, a step and a batch, as in `transformers_steps`. Models take batches as their authors wrote
them: padded blocks, lengths and masks.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from collate import PadCollator

WORDS, WIDE, CLASSES = 12, 8, 4
PER_STEP = nn.CrossEntropyLoss(reduction="none")


def sentences() -> dict[str, Any]:
    """Source and target words from 3 on; 0 is padding, 1 begins and 2 ends a target. Scores are probabilities."""
    draw, samples = torch.Generator().manual_seed(3), []
    for index, (length, other) in enumerate(((7, 4), (5, 6), (4, 3), (2, 5))):
        target = torch.cat([torch.tensor([1]), torch.randint(3, WORDS, (other,), generator=draw), torch.tensor([2])])
        samples.append(
            {
                "source": torch.randint(3, WORDS, (length,), generator=draw),
                "target": target,
                "frames": torch.randn(length, WIDE, generator=draw),
                "tags": torch.randint(0, CLASSES, (length,), generator=draw),
                "scores": torch.rand(length, generator=draw),
                "letters": torch.randint(3, WORDS, ((length + 1) // 2,), generator=draw),
                "label": index % 3,
            }
        )
    return PadCollator({"source": 0, "target": 0, "letters": 0, "frames": 0, "tags": -100, "scores": 0})(samples)


class Parts(nn.Module):
    """What the models below are made of."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDE)
        self.sparse = nn.Embedding(WORDS, WIDE, sparse=True)
        self.lstm = nn.LSTM(WIDE, WIDE, batch_first=True)
        self.both = nn.LSTM(WIDE, WIDE // 2, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(WIDE, WIDE)
        self.gru = nn.GRU(WIDE, WIDE, batch_first=True)
        self.query, self.key, self.score = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 1)
        self.tag, self.word = nn.Linear(WIDE, CLASSES), nn.Linear(WIDE, WORDS)
        self.join = nn.Linear(2 * WIDE, WIDE)
        self.moves = nn.Parameter(torch.randn(CLASSES, CLASSES) / 2)
        self.layer = nn.TransformerEncoderLayer(WIDE, 2, 16, dropout=0.1, batch_first=True)
        self.translator = nn.Transformer(WIDE, 2, 1, 1, 16, dropout=0.1, batch_first=True)
        self.conv, self.wide_conv = nn.Conv1d(WIDE, WIDE, 3), nn.Conv1d(WIDE, WIDE, 3, dilation=2)
        self.depthwise = nn.Conv1d(WIDE, WIDE, 3, padding=1, groups=WIDE)
        self.normed = parametrizations.spectral_norm(nn.Linear(WIDE, WIDE))
        self.norm = nn.LayerNorm(WIDE)
        self.register_buffer("table", torch.randn(12, WIDE) / 4, persistent=False)
        self.register_buffer("running", torch.zeros(WIDE))


def packed(rnn: nn.Module, field: Any, inputs: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """As the tutorials have it: pack, run, pad."""
    block = pack_padded_sequence(inputs, field.lengths, batch_first=True, enforce_sorted=False)
    outputs, state = rnn(block)
    return pad_packed_sequence(outputs, batch_first=True, total_length=field.padded.shape[1])[0], state


def tagged(m: Parts, b: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(m.tag(hidden).transpose(1, 2), b["tags"].padded, ignore_index=-100)


def told(hidden: torch.Tensor, b: dict[str, Any]) -> torch.Tensor:
    return F.cross_entropy(hidden[:, :3], b["label"])


# --- taggers and language models


def tagger(m: Any, b: Any) -> Any:
    return tagged(m, b, packed(m.lstm, b["source"], m.words(b["source"].padded))[0])


def tagger_of_padding(m: Parts, b: dict[str, Any]) -> torch.Tensor:
    logits = m.tag(packed(m.lstm, b["source"], m.words(b["source"].padded))[0])
    return F.cross_entropy(logits.flatten(0, 1), b["tags"].padded.clamp(min=0).flatten())


def tagger_unsorted(m: Parts, b: dict[str, Any]) -> torch.Tensor:
    # torch sorts rows inside of pack; the data come out in its order, the targets are in that of the batch.
    field = b["source"]
    order = field.lengths.argsort(descending=True, stable=True)
    block = pack_padded_sequence(m.words(field.padded)[order], field.lengths[order], batch_first=True)
    outputs = pad_packed_sequence(m.lstm(block)[0], batch_first=True, total_length=field.padded.shape[1])[0]
    return tagged(m, b, outputs)


def crf(m: Parts, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    """The score of all paths less that of the true one, summed over rows: the tutorial's BiLSTM-CRF, in batches."""
    field = b["source"]
    scores, tags = m.tag(packed(m.both, field, m.words(field.padded))[0]), b["tags"].padded.clamp(min=0)
    mask = field.mask if masked else torch.ones_like(field.mask)
    total, true = scores[:, 0], scores[:, 0].gather(1, tags[:, :1])[:, 0]
    for step in range(1, scores.shape[1]):
        longer = (total[:, :, None] + m.moves + scores[:, step, None]).logsumexp(1)
        total = torch.where(mask[:, step, None], longer, total)
        here = m.moves[tags[:, step - 1], tags[:, step]] + scores[:, step].gather(1, tags[:, step, None])[:, 0]
        true = true + here * mask[:, step]
    return (total.logsumexp(1) - true).mean()


def language_model(m: Parts, b: dict[str, Any], shift: int = 1) -> torch.Tensor:
    """The transformer tutorial: positions from a table, a causal mask, the next word."""
    words = b["target"]
    inputs = words.padded[:, :-1]
    hidden = m.words(inputs) * math.sqrt(WIDE) + m.table[: inputs.shape[1]]
    causal = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1])
    logits = m.word(m.layer(hidden, src_mask=causal, is_causal=True))
    if shift:
        return F.cross_entropy(logits.transpose(1, 2), words.padded[:, 1:], ignore_index=0)
    return F.cross_entropy(logits.transpose(1, 2), words.padded[:, 1:])


def temporal_convolution(m: Parts, b: dict[str, Any], causal: bool = True) -> torch.Tensor:
    """Dilated convolutions, each padded on the left only, so that padding on the right is never seen."""
    hidden = m.words(b["source"].padded).transpose(1, 2)
    for conv, reach in ((m.conv, 2), (m.wide_conv, 4)):
        sides = (reach, 0) if causal else (reach // 2, reach // 2)
        hidden = hidden + conv(F.pad(hidden, sides)).relu()
    return tagged(m, b, hidden.transpose(1, 2))


# --- two sequences


def attention_decoder(m: Parts, b: dict[str, Any], masked: bool = True, forced: float = 1.0) -> torch.Tensor:
    """The translation tutorial: additive attention over the encoder's outputs, a cell, teacher forcing."""
    source, target = b["source"], b["target"].padded
    memory, (state, _) = packed(m.lstm, source, m.words(source.padded))
    state, word, losses = state[-1], target[:, 0], []
    for step in range(1, target.shape[1]):
        scores = m.score(torch.tanh(m.query(state)[:, None] + m.key(memory)))[..., 0]
        if masked:
            scores = scores.masked_fill(~source.mask, -torch.inf)
        context = (scores.softmax(1)[..., None] * memory).sum(1)
        state = m.cell(m.join(torch.cat([m.words(word), context], 1)), state)
        logits = m.word(state)
        losses.append(F.cross_entropy(logits, target[:, step], ignore_index=0, reduction="sum"))
        word = target[:, step] if random.random() < forced else logits.argmax(1)
    return torch.stack(losses).sum() / (target[:, 1:] != 0).sum()


def translation(m: Parts, b: dict[str, Any], memory_mask: bool = True, source_mask: bool = True) -> torch.Tensor:
    """The tutorial on `nn.Transformer`: masks are made of the words, since 0 is never a real one."""
    source, target = b["source"].padded, b["target"].padded[:, :-1]
    hidden = m.translator(
        m.words(source) + m.table[: source.shape[1]],
        m.words(target) + m.table[: target.shape[1]],
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1]),
        src_key_padding_mask=(source == 0) if source_mask else None,
        memory_key_padding_mask=(source == 0) if memory_mask else None,
    )
    return F.cross_entropy(m.word(hidden).transpose(1, 2), b["target"].padded[:, 1:], ignore_index=0)


def transducer(m: Parts, b: dict[str, Any], ends: bool = True) -> torch.Tensor:
    """All alignments of frames with words, as the RNN transducer sums them, each row at its own corner."""
    frames, words = b["frames"], b["target"]
    encoded = packed(m.lstm, frames, frames.padded)[0]
    predicted = m.gru(m.words(F.pad(words.padded, (1, 0))))[0]
    joint = m.word(torch.tanh(encoded[:, :, None] + predicted[:, None])).log_softmax(-1)
    blank = joint[..., 0]
    emit = joint[:, :, :-1].gather(3, words.padded[:, None, :, None].expand(-1, joint.shape[1], -1, 1))[..., 0]
    columns: list[list[torch.Tensor]] = []
    for time in range(joint.shape[1]):
        column = [columns[-1][0] + blank[:, time - 1, 0] if time else torch.zeros(len(joint))]
        for step in range(emit.shape[2]):
            up = column[-1] + emit[:, time, step]
            column.append(torch.logaddexp(up, columns[-1][step + 1] + blank[:, time - 1, step + 1]) if time else up)
        columns.append(column)
    paths = torch.stack([torch.stack(column, 1) for column in columns], 1) + blank
    rows = torch.arange(len(joint))
    at = (frames.lengths - 1, words.lengths) if ends else (frames.padded.shape[1] - 1, words.padded.shape[1])
    return -paths[rows, at[0], at[1]].sum()


def pointer(m: Parts, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    """A pointer network: the softmax is over the places of the source."""
    memory, (state, _) = packed(m.lstm, b["source"], m.words(b["source"].padded))
    scores = (m.query(state[-1])[:, None] * memory).sum(2)
    if masked:
        scores = scores.masked_fill(~b["source"].mask, -torch.inf)
    return F.cross_entropy(scores, b["label"].clamp(max=1))


def entailment(m: Parts, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    """Two sentences, each the maximum over a bidirectional LSTM, compared: InferSent."""
    found = []
    for name in ("source", "target"):
        hidden = packed(m.both, b[name], m.words(b[name].padded))[0]
        found.append((hidden.masked_fill(~b[name].mask[..., None], -torch.inf) if masked else hidden).amax(1))
    return told(m.join(torch.cat(found, 1)), b)


# --- speech


def speech(m: Parts, b: dict[str, Any], lengths: Callable[..., Any] | None = None) -> torch.Tensor:
    """Convolution, bidirectional recurrence, CTC: the shape of Deep Speech 2."""
    frames, letters = b["frames"], b["letters"]
    hidden = m.conv(F.pad((frames.padded * frames.mask[..., None]).transpose(1, 2), (1, 1))).transpose(1, 2)
    scores = m.word(packed(m.both, frames, hidden.relu())[0]).log_softmax(-1).transpose(0, 1)
    counts = frames.lengths if lengths is None else lengths(frames)
    return F.ctc_loss(scores, letters.padded, counts, letters.lengths)


def conformer(m: Parts, b: dict[str, Any], masked: bool = True) -> torch.Tensor:
    """A block of attention, and of a depthwise convolution that must not see what attention left in the padding."""
    frames = b["frames"]
    hidden = m.layer(frames.padded, src_key_padding_mask=~frames.mask)
    inner = F.glu(m.join.weight.new_ones(1) * torch.cat([hidden, m.query(hidden)], 2), 2)
    if masked:
        inner = inner.masked_fill(~frames.mask[..., None], 0)
    return tagged(m, b, hidden + m.norm(m.depthwise(inner.transpose(1, 2)).transpose(1, 2)))


def stop_token(m: Parts, b: dict[str, Any], masked: bool = True) -> dict[str, torch.Tensor]:
    """Frames and the probability to stop, as Tacotron has them: a term each."""
    frames, scores = b["frames"], b["scores"]
    hidden = packed(m.lstm, frames, F.pad(frames.padded[:, :-1], (0, 0, 1, 0)))[0]
    guess = torch.sigmoid(m.score(hidden)[..., 0])
    spectrum = (m.query(hidden) - frames.padded).abs().mean(2)
    if not masked:
        return {"frames": spectrum.mean(), "stop": F.binary_cross_entropy(guess, scores.padded)}
    stop = F.binary_cross_entropy(guess[scores.mask], scores.padded[scores.mask])
    return {"frames": spectrum[frames.mask].mean(), "stop": stop}


RIGHT = {
    "tutorial: tagger with packed LSTM": tagger,
    "tutorial: BiLSTM-CRF": crf,
    "tutorial: transformer language model": language_model,
    "tutorial: translation with attention": attention_decoder,
    "tutorial: nn.Transformer translation": translation,
    "scheduled sampling": lambda m, b: attention_decoder(m, b, forced=0.5),
    "temporal convolution": temporal_convolution,
    "RNN transducer": transducer,
    "pointer network": pointer,
    "InferSent": entailment,
    "Deep Speech with CTC": speech,
    "Conformer": conformer,
    "Tacotron's stop token": stop_token,
    "sparse embeddings": lambda m, b: tagged(m, b, m.sparse(b["source"].padded)),
    "spectral norm": lambda m, b: tagged(m, b, m.normed(b["frames"].padded)),
}

MISTAKES = {
    "tagger: padding is a class": (tagger_of_padding, {"width"}),
    "tagger: rows left in the order of packing": (tagger_unsorted, {"order"}),
    "BiLSTM-CRF without a mask": (lambda m, b: crf(m, b, masked=False), {"width", "other rows"}),
    "language model: padding is a word": (lambda m, b: language_model(m, b, shift=0), {"width", "other rows"}),
    "temporal convolution that looks ahead": (lambda m, b: temporal_convolution(m, b, causal=False), {"padding"}),
    "attention over padding in the decoder": (
        lambda m, b: attention_decoder(m, b, masked=False),
        {"width", "other rows"},
    ),
    "translation without memory mask": (lambda m, b: translation(m, b, memory_mask=False), {"width", "other rows"}),
    "translation without source mask": (lambda m, b: translation(m, b, source_mask=False), {"width", "other rows"}),
    "transducer read at the corner of the block": (lambda m, b: transducer(m, b, ends=False), {"width", "other rows"}),
    "pointer into the padding": (lambda m, b: pointer(m, b, masked=False), {"width", "other rows"}),
    "InferSent: maximum over the zeros of padding": (lambda m, b: entailment(m, b, masked=False), {"other rows"}),
    "CTC over the width": (
        lambda m, b: speech(m, b, lambda f: torch.full_like(f.lengths, f.padded.shape[1])),
        {"width", "other rows"},
    ),
    "Conformer: convolution over what attention left": (lambda m, b: conformer(m, b, masked=False), {"padding"}),
    "Tacotron: means over the block": (lambda m, b: stop_token(m, b, masked=False), {"width", "padding"}),
}


def made(step: Any) -> Any:
    def make() -> tuple[Parts, Callable[..., Any], dict[str, Any]]:
        parts = Parts()
        return parts, lambda batch: step(parts, batch), sentences()

    return make


RIGHT = {name: made(step) for name, step in RIGHT.items()}
MISTAKES = {name: (made(step), probes) for name, (step, probes) in MISTAKES.items()}
