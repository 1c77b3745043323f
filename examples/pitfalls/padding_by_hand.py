"""Mistake 3, padding by hand: to the corpus maximum, with a class as padding, or with rows left in sorted order."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from collate import LengthTrackedBatch, apply_rnn, sequence_loss
from samplers import LengthBucketBatchSampler

torch.manual_seed(0)
CORPUS = (20 * torch.randn(1280, dtype=torch.float64).exp()).long().clamp(1, 250)
INPUTS = torch.randn(16, 4, dtype=torch.float64).split([3, 7, 1, 5])
TARGETS = torch.tensor([1, 0, 4, 2, 0, 3, 1, 0, 2, 4, 3, 0, 1, 0, 2, 3]).split([3, 7, 1, 5])
RNN, HEAD = nn.GRU(4, 16, batch_first=True).double(), nn.Linear(16, 5).double()


def cells_per_token() -> dict[str, list[float]]:
    """Padded cells per real token, for 1,280 log-normal lengths and 32 rows per batch."""
    planned = LengthBucketBatchSampler(CORPUS.numpy(), batch_size=32)
    cut = {"padded to the corpus maximum": [CORPUS], "padded to each batch's maximum": CORPUS.split(32)}
    cut["that, by LengthBucketBatchSampler"] = [CORPUS[rows] for rows in planned]
    return {name: [sum(len(n) * int(n.max()) for n in parts) / int(CORPUS.sum())] for name, parts in cut.items()}


def losses() -> dict[str, list[float]]:
    """Loss and its gradient for the bias of class 0; the targets of the batch are padded with that class."""
    x, y = (LengthTrackedBatch.from_sequences(rows) for rows in (INPUTS, TARGETS))
    logits = apply_rnn(RNN, x)[0].map(HEAD)
    found = {"one by one": cross_entropy(torch.cat([HEAD(RNN(x)[0]) for x in INPUTS]), torch.cat(TARGETS))}
    name = f"torch, ignore_index=0 counts {int((y.flat() != 0).sum())} of 16"
    found[name] = cross_entropy(logits.padded.flatten(0, 1), y.padded.flatten(), ignore_index=0)
    found["lengthtrack"] = sequence_loss(nn.CrossEntropyLoss(reduction="none"), logits, y)
    slopes = [torch.autograd.grad(loss, HEAD.bias, retain_graph=True)[0][0].item() for loss in found.values()]
    return {name: [found[name].item(), slope] for name, slope in zip(found, slopes, strict=True)}


def state_drifts() -> dict[str, list[float]]:
    """Drift of final states `[4, 16]` from those of one sequence at a time, ||a - b|| / ||b||."""
    order = torch.tensor([3, 7, 1, 5]).argsort(descending=True)
    packed = pack_padded_sequence(pad_sequence([INPUTS[i] for i in order]), torch.tensor([7, 5, 3, 1]))
    state, alone = RNN(packed)[1][0], torch.cat([RNN(x[None])[1][0] for x in INPUTS])
    batch = LengthTrackedBatch.from_sequences(INPUTS)
    states = {"torch, sorted": state, "torch, sorted twice": state[order], "torch, inverse": state[order.argsort()]}
    states["lengthtrack, unsort"] = batch.unsort(apply_rnn(RNN, batch)[1], dim=1)[0]
    return {name: [((a - alone).norm() / alone.norm()).item()] for name, a in states.items()}


def main() -> None:
    """Print the cost of padding, the gradient of a class that is used as padding, and the effect of sorting rows."""
    titles = ("cells per real token", "loss of 16 real tokens, gradient of class 0", "drift of final states")
    for title, figures in zip(titles, (cells_per_token(), losses(), state_drifts()), strict=True):
        print(title)
        for name, row in figures.items():
            print(f"  {name:38}", *(f"{round(x, 12):8.3g}" for x in row))


if __name__ == "__main__":
    main()
