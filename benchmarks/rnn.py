"""`apply_rnn` on the CPU against torch's packed run, and its padded run that ignores lengths."""

from dataclasses import asdict

import numpy as np
import torch
from harness import Row, compare, save
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from collate import LengthTrackedBatch, apply_rnn

FEATURES, HIDDEN = 128, 256


def batch_of(lengths: np.ndarray) -> LengthTrackedBatch:
    """Random values `[B, T, 128]` of the given lengths."""
    return LengthTrackedBatch.from_sequences([torch.randn(int(length), FEATURES) for length in lengths])


def measure(
    name: str, kind: type[nn.RNNBase], batch: LengthTrackedBatch, *, both: bool, layers: int, train: bool
) -> Row:
    """Time one case: the forward pass, and in training also the backward pass."""
    rnn = kind(FEATURES, HIDDEN, num_layers=layers, bidirectional=both, batch_first=True)

    def finish(output: torch.Tensor) -> None:
        if train:
            output.sum().backward()

    def ours() -> None:
        with torch.set_grad_enabled(train):
            finish(apply_rnn(rnn, batch)[0].padded)

    def packed() -> None:
        with torch.set_grad_enabled(train):
            sequence = pack_padded_sequence(batch.padded, batch.lengths, batch_first=True)
            finish(pad_packed_sequence(rnn(sequence)[0], batch_first=True)[0])

    def padded() -> None:
        with torch.set_grad_enabled(train):
            finish(rnn(batch.padded)[0])

    case = f"{kind.__name__} x{layers}{' both ways' if both else ''}, {name}, {'training' if train else 'inference'}"
    bar = ("LSTM 3x of packed" if kind is nn.LSTM else "never slower than packed") if train else ""
    return compare(
        case, "apply_rnn", {"apply_rnn": ours, "torch packed": packed, "torch padded": padded}, rounds=3, bar=bar
    )


def main() -> None:
    """Print and save all cases."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    batches = {
        "64 rows of 90-110": batch_of(rng.integers(90, 111, 64)),
        "64 rows of 10-110": batch_of(rng.integers(10, 111, 64)),
        "256 rows of 20-40": batch_of(rng.integers(20, 41, 256)),
        "8 rows of 400-500": batch_of(rng.integers(400, 501, 8)),
    }
    rows = [
        measure(name, kind, batch, both=both, layers=layers, train=train)
        for kind in (nn.LSTM, nn.GRU)
        for layers, both in ((1, False), (2, False), (1, True))
        for name, batch in batches.items()
        for train in (True, False)
    ]
    save("rnn", [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
