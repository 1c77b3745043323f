"""Mistake 1, wrong declared lengths: nothing in PyTorch raises, and state, loss and gradient drift."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from collate import LengthTrackedBatch, PadCollator, apply_rnn

TRUE, INFLATED, DEFLATED, BEYOND = [5, 3, 2], [5, 5, 5], [3, 1, 1], [9, 3, 2]
SEQUENCES = torch.randn(10, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).split(TRUE)
PADDED = pad_sequence(SEQUENCES, batch_first=True)


def drifts(lengths: list[int] | None) -> list[float]:
    """Drift of states, loss and gradient from one sequence at a time; None: lengthtrack, without declared lengths."""
    tracked, declared = LengthTrackedBatch.from_sequences(SEQUENCES), torch.tensor(lengths or TRUE)
    packed = pack_padded_sequence(PADDED, declared, batch_first=True)
    batched = _train(lambda rnn: (apply_rnn(rnn, tracked) if lengths is None else rnn(packed))[1][0][0])
    alone = _train(lambda rnn: torch.cat([rnn(x[None])[1][0][0] for x in SEQUENCES]))
    return [((a - b).norm() / b.norm()).item() for a, b in zip(batched, alone, strict=True)]


def _train(run: Callable[[nn.LSTM], Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    rnn, head = nn.LSTM(1, 16, batch_first=True).double(), nn.Linear(16, 3).double()
    loss = nn.functional.cross_entropy(head(state := run(rnn)), torch.tensor([0, 1, 2]))
    gradient = torch.autograd.grad(loss, [*rnn.parameters(), *head.parameters()])
    return [state.detach(), loss.detach(), torch.cat([part.flatten() for part in gradient])]


def answer(call: Callable[..., object], *args: object, **options: object) -> str:
    """The error of a call, or "no error"."""
    try:
        call(*args, **options)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main() -> None:
    """Print the drift with wrong lengths, and which calls raise an error."""
    print("drift from one sequence at a time           h_n      loss  gradient")
    for n in (TRUE, INFLATED, DEFLATED, None):
        shown = [f"{round(drift, 12):10.3g}" for drift in drifts(n)]
        print(f"{f'torch, declared {n}' if n else 'lengthtrack':37}{''.join(shown)}")
    for n in (INFLATED, DEFLATED, BEYOND):
        samples = [{"x": x, "steps": steps} for x, steps in zip(SEQUENCES, n, strict=True)]
        print(f"\ntrue {TRUE}, declared {n}, padded to width 5")
        print("  pack_padded_sequence:", answer(pack_padded_sequence, PADDED, torch.tensor(n), batch_first=True))
        print("  from_sequences:", answer(LengthTrackedBatch.from_sequences, SEQUENCES, lengths=n))
        print("  PadCollator:", answer(PadCollator(length_field="steps"), samples))
        print("  verify:", answer(lambda n=n: LengthTrackedBatch(PADDED, torch.tensor(n), padding_value=0).verify()))


if __name__ == "__main__":
    main()
