"""Leak 2, state that is carried on: convolutions, scans and recurrent modules that run over the border of a document.

python examples/leaks/state_carried_on.py
"""

from itertools import pairwise

import torch
from compare import Step, documents, losses_of, show
from torch import Tensor, nn
from torch.nn.functional import pad

from collate import VarlenBatch, apply_rnn

torch.manual_seed(0)
EMBED, HEAD = nn.Embedding(24, 8).double(), nn.Linear(8, 24).double()
CONV, RNN = nn.Conv1d(8, 8, 3).double(), nn.GRU(8, 8, batch_first=True).double()


def scan(steps: Tensor, starts: Tensor) -> Tensor:
    """Each step plus half of the state before it, which is dropped at `starts`: `[R, C, 8]` and bool `[R, C]`."""
    state, states = torch.zeros_like(steps[:, 0]), []
    for step, start in zip(steps.unbind(1), starts.unbind(1), strict=True):
        state = step + 0.5 * torch.where(start[:, None], 0.0, state)
        states.append(state)
    return torch.stack(states, 1)


def by_document(batch: VarlenBatch, hidden: Tensor) -> Tensor:
    """The convolution of each document alone, put back in its place."""
    pieces = batch.cu_seqlens.unique().tolist()
    parts = hidden.flatten(0, 1).split([b - a for a, b in pairwise(pieces)])
    return torch.cat([CONV(pad(part.T, (2, 0))).T for part in parts]).view_as(hidden)


def steps() -> dict[str, Step]:
    """Three layers that mix steps, over the row and within documents."""
    mixes = {
        "convolution over the row": lambda b, x: CONV(pad(x.transpose(1, 2), (2, 0))).transpose(1, 2),
        "convolution of each document": by_document,
        "scan over the row": lambda b, x: scan(x, torch.zeros_like(b.mask)),
        "scan, reset at documents": lambda b, x: scan(x, b.position_ids == 0),
        "GRU over the row": lambda b, x: RNN(x)[0],
        "GRU, lengthtrack": lambda b, x: apply_rnn(RNN, b.with_values(x))[0].values,
    }
    return {name: lambda b, mix=mix: losses_of(HEAD(mix(b, EMBED(b.values))), b) for name, mix in mixes.items()}


def main() -> None:
    """Print what each layer does to documents."""
    show(steps(), documents())


if __name__ == "__main__":
    main()
