"""Mistake 2, padding in the loss: the mean counts it, and masks come too late or no longer fit."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from collate import LengthTrackedBatch, apply_rnn, sequence_loss

torch.manual_seed(0)
RNN, HEAD = nn.GRU(4, 16, batch_first=True).double(), nn.Linear(16, 6).double()
X = LengthTrackedBatch.from_sequences(torch.randn(10, 4, dtype=torch.float64).split([5, 3, 2]), widths=8)
Y = LengthTrackedBatch.from_sequences(torch.tensor([1, 4, 2, 5, 3, 2, 2, 4, 1, 5]).split([5, 3, 2]), widths=8)
PER_STEP = nn.CrossEntropyLoss(reduction="none")


def unpack(lengths: list[int]) -> Tensor:
    """Plain PyTorch: logits of the rows padded to width 8, packed and unpacked: `[3, max(lengths), 6]`."""
    packed = pack_padded_sequence(X.padded, torch.tensor(lengths), batch_first=True)
    return HEAD(pad_packed_sequence(RNN(packed)[0], batch_first=True)[0])


def losses() -> dict[str, tuple[Tensor, Tensor]]:
    """PyTorch's mean over all unpacked cells and lengthtrack's losses, each with the loss of one sequence at a time."""
    cells = PER_STEP(unpack([5, 3, 2]).flatten(0, 1), Y.padded[:, :5].flatten())
    rows = [PER_STEP(HEAD(RNN(x)[0]), y) for x, y in zip(X.sequences(), Y.sequences(), strict=True)]
    token, sequence = torch.cat(rows).mean(), torch.stack([row.mean() for row in rows]).mean()
    alone = {"token": token, "sequence": sequence, "sum": torch.cat(rows).sum()}
    hidden = apply_rnn(RNN, X)[0].map(HEAD)
    ours = {f"lengthtrack, {name}": (sequence_loss(PER_STEP, hidden, Y, reduction=name), alone[name]) for name in alone}
    return {"torch, all cells": (cells.mean(), token)} | ours


def drifts(got: Tensor, want: Tensor) -> list[float]:
    """||got - want|| / ||want|| of a loss and its gradients for GRU weights, head weights and head bias."""
    grads = [torch.autograd.grad(x, [RNN.weight_hh_l0, HEAD.weight, HEAD.bias], retain_graph=True) for x in (got, want)]
    return [((a - b).norm() / b.norm()).item() for a, b in [(got, want), *zip(*grads, strict=True)]]


def times_mask(lengths: list[int]) -> str:
    """The shape that torch unpacks, and its product with the mask: a shape or an error."""
    try:
        return f"{list(unpack(lengths).shape)} times its mask: {list((unpack(lengths) * X.mask[..., None]).shape)}"
    except RuntimeError as error:
        return f"{list(unpack(lengths).shape)} times its mask: {type(error).__name__}"


def main() -> None:
    """Print drifts, then masks that come too late, and masks that no longer fit."""
    print("drift from one sequence at a time          loss   GRU weights  head weights     head bias")
    for name, pair in losses().items():
        print(f"{name:33}", *(f"{round(drift, 12):13.3g}" for drift in drifts(*pair)))
    mean = losses()["torch, all cells"][0].item()
    print(f"\nmean of all cells {mean:.6f}, times the mask over its sum {(mean * X.mask).sum() / X.mask.sum():.6f}")
    print("lengths 5, 3, 2 padded to width 8: torch unpacks", times_mask([5, 3, 2]))
    print("lengths 1, 1, 1 padded to width 8: torch unpacks", times_mask([1, 1, 1]))


if __name__ == "__main__":
    main()
