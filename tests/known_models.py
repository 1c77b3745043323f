"""Training steps of well-known architectures and of torch's tutorials, small: right ones and known mistakes.

Each entry makes a module, a step and a batch, as in `transformers_steps`. Models take batches as their authors wrote
them: padded blocks, lengths and masks.
"""

import math
import random

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from collate import PadCollator, apply_rnn, sequence_loss

WORDS, WIDE, CLASSES = 12, 8, 4
PER_STEP = nn.CrossEntropyLoss(reduction="none")


def sentences():
    """Source and target words from 3 on; 0 is padding, 1 begins and 2 ends a target. Scores are probabilities."""
    draw, samples = torch.Generator().manual_seed(3), []
    for place, (length, other) in enumerate(((7, 4), (5, 6), (4, 3), (2, 5))):
        target = torch.cat([torch.tensor([1]), torch.randint(3, WORDS, (other,), generator=draw), torch.tensor([2])])
        samples.append(
            {
                "source": torch.randint(3, WORDS, (length,), generator=draw),
                "target": target,
                "frames": torch.randn(length, WIDE, generator=draw),
                "tags": torch.randint(0, CLASSES, (length,), generator=draw),
                "scores": torch.rand(length, generator=draw),
                "letters": torch.randint(3, WORDS, ((length + 1) // 2,), generator=draw),
                "label": place % 3,
            }
        )
    return PadCollator({"source": 0, "target": 0, "letters": 0, "frames": 0, "tags": -100, "scores": 0})(samples)


class Parts(nn.Module):
    """What the models below are made of."""

    def __init__(self):
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


def packed(rnn, field, inputs):
    """As the tutorials have it: pack, run, pad."""
    block = pack_padded_sequence(inputs, field.lengths, batch_first=True, enforce_sorted=False)
    outputs, state = rnn(block)
    return pad_packed_sequence(outputs, batch_first=True, total_length=field.padded.shape[1])[0], state


def tagged(m, b, hidden):
    return F.cross_entropy(m.tag(hidden).transpose(1, 2), b["tags"].padded, ignore_index=-100)


def told(hidden, b):
    return F.cross_entropy(hidden[:, :3], b["label"])


# --- taggers and language models


def tagger(m, b):
    return tagged(m, b, packed(m.lstm, b["source"], m.words(b["source"].padded))[0])


def tagger_of_padding(m, b):
    logits = m.tag(packed(m.lstm, b["source"], m.words(b["source"].padded))[0])
    return F.cross_entropy(logits.flatten(0, 1), b["tags"].padded.clamp(min=0).flatten())


def tagger_unsorted(m, b):
    # torch sorts rows inside of pack; the data come out in its order, the targets are in that of the batch.
    field = b["source"]
    order = field.lengths.argsort(descending=True, stable=True)
    block = pack_padded_sequence(m.words(field.padded)[order], field.lengths[order], batch_first=True)
    outputs = pad_packed_sequence(m.lstm(block)[0], batch_first=True, total_length=field.padded.shape[1])[0]
    return tagged(m, b, outputs)


def crf(m, b, masked=True):
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


def language_model(m, b, shift=1):
    """The transformer tutorial: positions from a table, a causal mask, the next word."""
    words = b["target"]
    inputs = words.padded[:, :-1]
    hidden = m.words(inputs) * math.sqrt(WIDE) + m.table[: inputs.shape[1]]
    causal = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1])
    logits = m.word(m.layer(hidden, src_mask=causal, is_causal=True))
    if shift:
        return F.cross_entropy(logits.transpose(1, 2), words.padded[:, 1:], ignore_index=0)
    return F.cross_entropy(logits.transpose(1, 2), words.padded[:, 1:])


def temporal_convolution(m, b, causal=True):
    """Dilated convolutions, each padded on the left only, so that padding on the right is never seen."""
    hidden = m.words(b["source"].padded).transpose(1, 2)
    for conv, reach in ((m.conv, 2), (m.wide_conv, 4)):
        sides = (reach, 0) if causal else (reach // 2, reach // 2)
        hidden = hidden + conv(F.pad(hidden, sides)).relu()
    return tagged(m, b, hidden.transpose(1, 2))


# --- two sequences


def attention_decoder(m, b, masked=True, forced=1.0):
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


def translation(m, b, memory_mask=True, source_mask=True):
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


def transducer(m, b, ends=True):
    """All alignments of frames with words, as the RNN transducer sums them, each row at its own corner."""
    frames, words = b["frames"], b["target"]
    encoded = packed(m.lstm, frames, frames.padded)[0]
    predicted = m.gru(m.words(F.pad(words.padded, (1, 0))))[0]
    joint = m.word(torch.tanh(encoded[:, :, None] + predicted[:, None])).log_softmax(-1)
    blank = joint[..., 0]
    emit = joint[:, :, :-1].gather(3, words.padded[:, None, :, None].expand(-1, joint.shape[1], -1, 1))[..., 0]
    columns = []
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


def pointer(m, b, masked=True):
    """A pointer network: the softmax is over the places of the source."""
    memory, (state, _) = packed(m.lstm, b["source"], m.words(b["source"].padded))
    scores = (m.query(state[-1])[:, None] * memory).sum(2)
    if masked:
        scores = scores.masked_fill(~b["source"].mask, -torch.inf)
    return F.cross_entropy(scores, b["label"].clamp(max=1))


def entailment(m, b, masked=True):
    """Two sentences, each the maximum over a bidirectional LSTM, compared: InferSent."""
    found = []
    for name in ("source", "target"):
        hidden = packed(m.both, b[name], m.words(b[name].padded))[0]
        found.append((hidden.masked_fill(~b[name].mask[..., None], -torch.inf) if masked else hidden).amax(1))
    return told(m.join(torch.cat(found, 1)), b)


# --- speech


def speech(m, b, lengths=None):
    """Convolution, bidirectional recurrence, CTC: the shape of Deep Speech 2."""
    frames, letters = b["frames"], b["letters"]
    hidden = m.conv(F.pad((frames.padded * frames.mask[..., None]).transpose(1, 2), (1, 1))).transpose(1, 2)
    scores = m.word(packed(m.both, frames, hidden.relu())[0]).log_softmax(-1).transpose(0, 1)
    counts = frames.lengths if lengths is None else lengths(frames)
    return F.ctc_loss(scores, letters.padded, counts, letters.lengths)


def conformer(m, b, masked=True):
    """A block of attention, and of a depthwise convolution that must not see what attention left in the padding."""
    frames = b["frames"]
    hidden = m.layer(frames.padded, src_key_padding_mask=~frames.mask)
    inner = F.glu(m.join.weight.new_ones(1) * torch.cat([hidden, m.query(hidden)], 2), 2)
    if masked:
        inner = inner.masked_fill(~frames.mask[..., None], 0)
    return tagged(m, b, hidden + m.norm(m.depthwise(inner.transpose(1, 2)).transpose(1, 2)))


def stop_token(m, b, masked=True):
    """Frames and the probability to stop, as Tacotron has them: a term each."""
    frames, scores = b["frames"], b["scores"]
    hidden = packed(m.lstm, frames, F.pad(frames.padded[:, :-1], (0, 0, 1, 0)))[0]
    guess = torch.sigmoid(m.score(hidden)[..., 0])
    spectrum = (m.query(hidden) - frames.padded).abs().mean(2)
    if not masked:
        return {"frames": spectrum.mean(), "stop": F.binary_cross_entropy(guess, scores.padded)}
    stop = F.binary_cross_entropy(guess[scores.mask], scores.padded[scores.mask])
    return {"frames": spectrum[frames.mask].mean(), "stop": stop}


# --- sentences as a whole


def names(m, b, last="state"):
    """Names and their languages: the state at each row's end."""
    outputs, state = packed(m.gru, b["source"], m.words(b["source"].padded))
    return told(state[-1] if last == "state" else outputs[:, -1], b)


def text_convolution(m, b, masked=True):
    """Windows of words and the largest answer: Kim's sentence classifier."""
    field = b["source"]
    words = m.words(field.padded) * field.mask[..., None]
    hidden = m.conv(F.pad(words.transpose(1, 2), (1, 1))).transpose(1, 2)
    return told((hidden.masked_fill(~field.mask[..., None], -torch.inf) if masked else hidden).amax(1), b)


def bags(m, b, ends=True):
    """The tutorial of text classification: all words in a row, and where each text begins."""
    field = b["source"]
    if ends:
        words, starts = field.flat(), field.cu_seqlens[:-1]
    else:
        words, starts = field.padded.flatten(), torch.arange(len(field)) * field.padded.shape[1]
    return told(F.embedding_bag(words.long(), m.words.weight, starts.long()), b)


def deep_set(m, b, masked=True):
    hidden = m.query(b["frames"].padded).relu()
    return told(m.key((hidden * b["frames"].mask[..., None] if masked else hidden).sum(1)), b)


def autoencoder(m, b, noise=0.0, masked=True):
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


def checkpointed(m, b):
    hidden = m.words(b["source"].padded)
    for _ in range(2):
        hidden = checkpoint(m.layer, hidden, None, ~b["source"].mask, use_reentrant=False)
    return tagged(m, b, hidden)


def recommender(m, b, masked=True):
    """The next item against a random one, pair by pair: SASRec with the loss of BPR."""
    items = b["source"]
    causal = nn.Transformer.generate_square_subsequent_mask(items.padded.shape[1] - 1)
    hidden = m.layer(m.words(items.padded[:, :-1]), src_mask=causal, is_causal=True)
    better = (hidden * m.words(items.padded[:, 1:])).sum(2)
    worse = (hidden * m.words(items.padded[:, 1:] * 5 % WORDS)).sum(2)
    losses = -F.logsigmoid(better - worse)
    return losses[items.mask[:, 1:]].sum() if masked else losses.sum()


def preference(m, b, masked=True):
    """Direct preference optimization: log-probabilities of two answers, each summed over its words."""
    sums = []
    for name in ("source", "target"):
        words = b[name].padded
        chances = m.word(m.gru(m.words(words[:, :-1]))[0]).log_softmax(2).gather(2, words[:, 1:, None])[..., 0]
        sums.append((chances * b[name].mask[:, 1:] if masked else chances).sum(1))
    return -F.logsigmoid(0.1 * (sums[0] - sums[1])).mean()


def policy(m, b, masked=True):
    """Policy gradients: what is still to be earned, summed from each row's end."""
    rewards = b["scores"].padded * b["scores"].mask if masked else b["scores"].padded
    earned = rewards.flip(1).cumsum(1).flip(1)
    chances = m.tag(m.gru(b["frames"].padded)[0]).log_softmax(2)[..., 0]
    return -(chances * earned)[b["frames"].mask].sum() / b["frames"].num_tokens


def forecast(m, b, masked=True):
    """A mean and a variance for every step, from the steps before it: DeepAR."""
    values = b["frames"].padded[..., 0]
    hidden, _ = m.gru(F.pad(b["frames"].padded[:, :-1], (0, 0, 1, 0)))
    losses = F.gaussian_nll_loss(m.score(hidden)[..., 0], values, F.softplus(hidden[..., 0]) + 0.1, reduction="none")
    return losses[b["frames"].mask].mean() if masked else losses.mean()


def distilled(m, b, masked=True):
    student = m.tag(packed(m.lstm, b["source"], m.words(b["source"].padded))[0]).log_softmax(2)
    teacher = m.tag(m.words(b["source"].padded)).detach().softmax(2)
    if not masked:
        return F.kl_div(student.flatten(0, 1), teacher.flatten(0, 1), reduction="batchmean")
    return F.kl_div(student[b["source"].mask], teacher[b["source"].mask], reduction="batchmean")


def multitask(m, b, together=False):
    hidden, (state, _) = packed(m.lstm, b["source"], m.words(b["source"].padded))
    terms = {"tags": tagged(m, b, hidden), "label": told(state[-1], b)}
    return sum(terms.values()) if together else terms


def truncated(m, b, carried=True):
    """Truncated back-propagation: chunks of three steps, the state carried on without its history."""
    state, loss = None, 0
    for words, tags in zip(b["source"].split_steps(3), b["tags"].split_steps(3), strict=True):
        hidden, state = apply_rnn(m.gru, words.map(m.words), state if carried else None)
        state = state.detach()
        loss = loss + sequence_loss(PER_STEP, hidden.map(m.tag), tags, reduction="sum")
    return loss


def with_statistics(m, b, masked=True):
    """Features normalised by a mean that is kept over the run of training."""
    frames = b["frames"]
    values = frames.flat() if masked else frames.padded.flatten(0, 1)
    with torch.no_grad():
        m.running.mul_(0.9).add_(0.1 * values.mean(0))
    return tagged(m, b, m.query(frames.padded - (m.running if not masked else 0)))


RIGHT = {
    "tutorial: tagger with packed LSTM": tagger,
    "tutorial: BiLSTM-CRF": crf,
    "tutorial: transformer language model": language_model,
    "tutorial: translation with attention": attention_decoder,
    "tutorial: nn.Transformer translation": translation,
    "tutorial: text classification with bags": bags,
    "tutorial: names and languages": names,
    "scheduled sampling": lambda m, b: attention_decoder(m, b, forced=0.5),
    "temporal convolution": temporal_convolution,
    "RNN transducer": transducer,
    "pointer network": pointer,
    "InferSent": entailment,
    "Deep Speech with CTC": speech,
    "Conformer": conformer,
    "Tacotron's stop token": stop_token,
    "TextCNN": text_convolution,
    "deep set": deep_set,
    "variational autoencoder": autoencoder,
    "variational autoencoder with noise": lambda m, b: autoencoder(m, b, noise=1.0),
    "checkpointing with dropout": checkpointed,
    "sparse embeddings": lambda m, b: tagged(m, b, m.sparse(b["source"].padded)),
    "spectral norm": lambda m, b: tagged(m, b, m.normed(b["frames"].padded)),
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
    "tagger: padding is a class": (tagger_of_padding, {"width"}),
    "tagger: rows left in the order of packing": (tagger_unsorted, {"order"}),
    "BiLSTM-CRF without a mask": (lambda m, b: crf(m, b, masked=False), {"width", "company"}),
    "language model: padding is a word": (lambda m, b: language_model(m, b, shift=0), {"width", "company"}),
    "temporal convolution that looks ahead": (lambda m, b: temporal_convolution(m, b, causal=False), {"padding"}),
    "attention over padding in the decoder": (
        lambda m, b: attention_decoder(m, b, masked=False),
        {"width", "company"},
    ),
    "translation without memory mask": (lambda m, b: translation(m, b, memory_mask=False), {"width", "company"}),
    "translation without source mask": (lambda m, b: translation(m, b, source_mask=False), {"width", "company"}),
    "transducer read at the corner of the block": (lambda m, b: transducer(m, b, ends=False), {"width", "company"}),
    "pointer into the padding": (lambda m, b: pointer(m, b, masked=False), {"width", "company"}),
    "InferSent: maximum over the zeros of padding": (lambda m, b: entailment(m, b, masked=False), {"company"}),
    "CTC over the width": (
        lambda m, b: speech(m, b, lambda f: torch.full_like(f.lengths, f.padded.shape[1])),
        {"width", "company"},
    ),
    "Conformer: convolution over what attention left": (lambda m, b: conformer(m, b, masked=False), {"padding"}),
    "Tacotron: means over the block": (lambda m, b: stop_token(m, b, masked=False), {"width", "padding"}),
    "names: output[:, -1]": (lambda m, b: names(m, b, last="column"), {"dead step"}),
    "TextCNN: windows of padding": (lambda m, b: text_convolution(m, b, masked=False), {"width", "company"}),
    "bags of padding": (lambda m, b: bags(m, b, ends=False), {"width", "company"}),
    "deep set: sum over padding": (lambda m, b: deep_set(m, b, masked=False), {"padding", "width"}),
    "variational autoencoder: words of padding": (lambda m, b: autoencoder(m, b, masked=False), {"width"}),
    "variational autoencoder with noise: words of padding": (
        lambda m, b: autoencoder(m, b, noise=1.0, masked=False),
        {"padding"},
    ),
    "BPR: pairs of padding": (lambda m, b: recommender(m, b, masked=False), {"width", "company"}),
    "preference: words of padding": (lambda m, b: preference(m, b, masked=False), {"width", "company"}),
    "policy: earned in the padding": (lambda m, b: policy(m, b, masked=False), {"padding"}),
    "DeepAR: mean over the block": (lambda m, b: forecast(m, b, masked=False), {"padding", "width"}),
    "distillation: batchmean over the block": (lambda m, b: distilled(m, b, masked=False), {"width", "company"}),
    "running mean over padding": (lambda m, b: with_statistics(m, b, masked=False), {"padding", "width"}),
}


def _made(step):
    def make():
        parts = Parts()
        return parts, lambda batch: step(parts, batch), sentences()

    return make


RIGHT = {name: _made(step) for name, step in RIGHT.items()}
MISTAKES = {name: (_made(step), probes) for name, (step, probes) in MISTAKES.items()}
