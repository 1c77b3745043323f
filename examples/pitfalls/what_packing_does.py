"""Mistake 4, guessing what packing does: its order, its last steps, and which lengths it refuses."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from collate import LengthTrackedBatch, apply_rnn, last_step

ROWS = [torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([6, 7, 8, 9])]
BATCH = LengthTrackedBatch.from_sequences(ROWS, order="given", widths=6)
PACK = {
    "torch": lambda n: pack_padded_sequence(BATCH.padded, n, batch_first=True, enforce_sorted=False),
    "lengthtrack": lambda n: LengthTrackedBatch(BATCH.padded, n).pack(),
}
LENGTHS = {
    "right": [3, 2, 4],
    "too few": [3, 2],
    "too many": [3, 2, 4, 1],
    "beyond T": [3, 2, 9],
    "inflated": [5, 2, 4],
    "floats": [3.7, 2.2, 4.9],
    "bools": [True, True, True],
    "an empty row": [3, 0, 4],
}


def answer(library: str, lengths: list[float]) -> str:
    """The packed data that a library makes with these lengths, or its error."""
    try:
        packed = PACK[library](torch.tensor(lengths))
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return f"packs {packed.data.tolist()}, batch sizes {packed.batch_sizes.tolist()}"


def last_step_drifts() -> list[float]:
    """Drift of outputs at the last real steps from the final states of a GRU, forward and backward."""
    torch.manual_seed(0)
    rnn = nn.GRU(1, 8, bidirectional=True).double()
    outputs, states = apply_rnn(rnn, BATCH.map(lambda x: x[..., None].double()))
    pairs = zip(last_step(outputs).chunk(2, dim=1), states, strict=True)
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


def main() -> None:
    """Print packed data for right and wrong lengths, and the drift of the last steps."""
    print(f"{[row.tolist() for row in ROWS]} padded to width 6")
    for name, lengths in LENGTHS.items():
        print(f"{name}: {lengths}", *(f"  {library:12}{answer(library, lengths)}" for library in PACK), sep="\n")
    width = pad_packed_sequence(PACK["torch"](BATCH.lengths), batch_first=True)[0].shape[1]
    print(f"unpacked to a width of {width} by torch, {BATCH.unpack(BATCH.pack()).padded.shape[1]} by lengthtrack")
    forward, backward = (f"{round(drift, 12):.3g}" for drift in last_step_drifts())
    print(f"last_step of the outputs against h_n: drift {forward} forward, {backward} backward")


if __name__ == "__main__":
    main()
