"""Mistake 5, trusting padding: it changes final states, looks like a real zero, and attention sees it."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from collate import LengthTrackedBatch, apply_rnn

warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
torch.manual_seed(0)
SEQUENCES = torch.randint(-2, 3, (20, 8)).double().div(2).split([10, 7, 3])
BATCH = LengthTrackedBatch.from_sequences(SEQUENCES)
LSTM, GRU = nn.LSTM(8, 16, batch_first=True, bidirectional=True).double(), nn.GRU(8, 16, batch_first=True).double()


def final_states(direction: int) -> dict[str, float]:
    """Drift of the final states of an LSTM, forward (0) or backward (1)."""
    alone = torch.cat([LSTM(x[None])[1][0][direction] for x in SEQUENCES])
    return drifts(alone, torch=LSTM(BATCH.padded)[1][0][direction], lengthtrack=apply_rnn(LSTM, BATCH)[1][0][direction])


def carried_states() -> dict[str, float]:
    """Drift of the final states of a GRU over chunks of 4 time steps; each chunk starts with the last states."""
    plain = tracked = None
    for chunk in BATCH.split_steps(4):
        plain, tracked = GRU(chunk.padded, plain)[1], apply_rnn(GRU, chunk, tracked)[1]
    return drifts(torch.cat([GRU(x[None])[1] for x in SEQUENCES], 1), torch=plain, lengthtrack=tracked)


def attention() -> dict[str, float]:
    """Drift of self-attention at the real steps `[20, 8]`; torch's attn_mask is True for keys that may be seen."""
    x, mask, bounds = BATCH.padded, ~BATCH.key_padding_mask[:, None], BATCH.cu_seqlens[1:-1].tolist()
    jagged = BATCH.with_padded(x[:, :, None]).nested().transpose(1, 2)
    nested = attend(jagged, jagged, jagged).transpose(1, 2).values()[:, 0]
    flat = torch.cat([attend(row, row, row) for row in BATCH.flat().tensor_split(bounds)])
    alone = torch.cat([attend(row, row, row) for row in SEQUENCES])
    no_mask, swapped, masked = (BATCH.with_padded(attend(x, x, x, m)).flat() for m in (None, ~mask, mask))
    return drifts(alone, no_mask=no_mask, swapped=swapped, key_padding_mask=masked, cu_seqlens=flat, nested=nested)


def drifts(alone: Tensor, **found: Tensor) -> dict[str, float]:
    """||a - b|| / ||b||, where b comes from one sequence at a time."""
    return {name: ((a - alone).norm() / alone.norm()).item() for name, a in found.items()}


def main() -> None:
    """Print the effect of padding on states, on a mask by value, and on attention."""
    tables = {"h_n forward": final_states(0), "h_n backward": final_states(1)}
    tables |= {"h_n over chunks": carried_states(), "attention": attention()}
    for title, table in tables.items():
        print(f"{title:16}", *(f"{name} {round(drift, 12):.3g}" for name, drift in table.items()), sep="  ")
    lost = int((BATCH.flat()[:, 0] == 0).sum())
    print(f"mask by value != 0  loses {lost} of 20 real steps, batch.mask {20 - int(BATCH.mask.sum())}")


if __name__ == "__main__":
    main()
